//! The metric catalogue: the only place for the names, types, labels and help texts of metric families.
//!
//! The encoder takes a [`Family`] of this module and rejects labels that it does not declare. `docs/metrics.md` is generated from it
//! (`cargo xtask docs`).

pub mod agent;
pub mod cadvisor;
pub mod containers;
pub mod gpus;
pub mod nvml;
pub mod pressure;
#[cfg(test)]
pub mod reference;
pub mod samples;
pub mod sessions;

use prometheus::proto::MetricType;

/// All series of one name.
#[derive(Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: MetricType,
    #[cfg_attr(not(test), expect(dead_code, reason = "for docs/metrics.md, which a test generates"))]
    pub unit: &'static str,
    /// All that its series may have.
    pub labels: &'static [&'static str],
    /// Quantity, unit, scope.
    pub help: &'static str,
    /// Completes "Absent ..."; `None` if the family always has a series.
    pub absent: Option<&'static str>,
    /// A series that appears after the first scrape is 0 in its first exposition, so that `increase()` covers all of it.
    pub starts_at_zero: bool,
}

impl Family {
    const fn new(kind: MetricType, name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self { name, kind, unit, labels, help: "", absent: None, starts_at_zero: false }
    }

    const fn counter(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(MetricType::COUNTER, name, unit, labels)
    }

    const fn gauge(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(MetricType::GAUGE, name, unit, labels)
    }

    const fn histogram(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(MetricType::HISTOGRAM, name, unit, labels)
    }

    const fn help(mut self, help: &'static str) -> Self {
        self.help = help;
        self
    }

    const fn absent(mut self, when: &'static str) -> Self {
        self.absent = Some(when);
        self
    }

    const fn starts_at_zero(mut self) -> Self {
        self.starts_at_zero = true;
        self
    }

    /// The text of `# HELP`.
    pub fn full_help(&self) -> String {
        match self.absent {
            Some(when) => format!("{} Absent {when}.", self.help),
            None => self.help.to_owned(),
        }
    }
}

/// The labels of a GPU or MIG device.
const DEVICE: &[&str] = &["uuid", "gpu_uuid"];
const IN_MIG_MODE: &str = "for a GPU in MIG mode, because its MIG devices have the series";

/// Defines families, and `ALL` with all of them.
macro_rules! families {
    ($($name:ident: $family:expr;)+) => {
        $(pub static $name: $crate::export::catalogue::Family = $family;)+
        #[cfg_attr(not(test), expect(dead_code, reason = "for docs/metrics.md, which a test generates"))]
        pub static ALL: &[&$crate::export::catalogue::Family] = &[$(&$name),+];
    };
}
use families;
