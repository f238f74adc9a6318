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
pub mod users;
pub mod waits;

use super::encode::TextFormat;
use crate::collectors::Collector;

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Kind {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// All series of one name.
#[derive(Debug)]
pub struct Family {
    pub name: &'static str,
    pub kind: Kind,
    pub unit: &'static str,
    /// All that its series may have.
    pub labels: &'static [&'static str],
    /// Quantity, unit, scope.
    pub help: &'static str,
    /// Completes "Absent ..."; `None` if the family always has a series.
    pub absent: Option<&'static str>,
    /// A series that appears after the first scrape is 0 in its first exposition, so that `increase()` covers all of it.
    pub starts_at_zero: bool,
    /// Its series are 0 when the agent starts to count, at a time that it knows.
    pub has_created: bool,
    pub collector: Collector,
    in_own_collector: bool,
}

impl Family {
    const fn new(kind: Kind, name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self {
            name,
            kind,
            unit,
            labels,
            help: "",
            absent: None,
            starts_at_zero: false,
            has_created: !matches!(kind, Kind::Gauge),
            collector: Collector::Agent,
            in_own_collector: false,
        }
    }

    const fn counter(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(Kind::Counter, name, unit, labels)
    }

    const fn gauge(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(Kind::Gauge, name, unit, labels)
    }

    const fn histogram(name: &'static str, unit: &'static str, labels: &'static [&'static str]) -> Self {
        Self::new(Kind::Histogram, name, unit, labels)
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

    /// What it counts began before the agent: in the driver or in the kernel.
    const fn without_created(mut self) -> Self {
        self.has_created = false;
        self
    }

    /// Another collector than that of its module.
    const fn in_collector(mut self, collector: Collector) -> Self {
        (self.collector, self.in_own_collector) = (collector, true);
        self
    }

    const fn in_module_of(mut self, collector: Collector) -> Self {
        if !self.in_own_collector {
            self.collector = collector;
        }
        self
    }

    /// In OpenMetrics the suffix of a counter belongs to its series.
    pub fn name_in(&self, format: TextFormat) -> &'static str {
        match format {
            TextFormat::Prometheus => self.name,
            TextFormat::OpenMetrics => self.name.strip_suffix("_total").unwrap_or(self.name),
        }
    }

    /// The unit, if the name ends in it: OpenMetrics has no other.
    pub fn unit_in_name(&self) -> Option<&'static str> {
        let rest = self.name_in(TextFormat::OpenMetrics).strip_suffix(self.unit)?;
        rest.ends_with('_').then_some(self.unit)
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

/// Defines families of a collector, and `ALL` with all of them.
macro_rules! families {
    (in $collector:ident; $($name:ident: $family:expr;)+) => {
        $(pub static $name: $crate::export::catalogue::Family =
            $family.in_module_of($crate::collectors::Collector::$collector);)+
        #[cfg_attr(not(test), expect(dead_code, reason = "for docs/metrics.md, which a test generates"))]
        pub static ALL: &[&$crate::export::catalogue::Family] = &[$(&$name),+];
    };
}
use families;
