//! Trigger conditions of armed sessions, such as `coactive>0.5` or `temperature>85:gpu=0 for 5s`.
//!
//! ```text
//!  NAME > NUMBER [:gpu=INDEX or prefix of a UUID] [ for DURATION]
//! ```
//! Conditions are evaluated on snapshots. An unknown value never meets a condition.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use thiserror::Error;

use sampler_core::snapshot::{GpuView, Snapshot};
use sampler_core::units::{BootNs, ContainerKey, GpuUuid};
use strum::VariantArray as _;

/// Contention is computed over this window, as is utilization.
const WINDOW_NS: u64 = 10_000_000_000;
/// Snapshots kept of that window; four arrive each second.
const MAX_SNAPSHOTS: usize = 64;
/// The clocks event reasons for clocks below the requested ones: power, temperature, brakes.
const SLOWDOWN_REASONS: u64 = 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
/// Longer conditions are rejected.
const MAX_TEXT_BYTES: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum Measure {
    /// Share of the last 10 s in which two or more users had samples.
    Coactive,
    /// Busy share of the last 10 s.
    Busy,
    /// GPU-seconds per second, over the last 10 s, that others received while one container was active and the GPU saturated; of the
    /// container with the highest value.
    Contention,
    /// Used share of the memory.
    Memory,
    /// Degrees Celsius.
    Temperature,
    /// Watts.
    Power,
    /// Number of reasons that currently reduce the clocks.
    Throttled,
}

impl Measure {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Trigger {
    pub measure: Measure,
    pub above: f64,
    /// Index or prefix of a UUID; `None` for any GPU.
    pub gpu: Option<String>,
    /// How long the condition must hold.
    pub for_ns: u64,
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum TriggerError {
    #[error("invalid condition {0:?}: expected NAME>NUMBER[:gpu=INDEX][ for DURATION], such as coactive>0.5")]
    Shape(String),
    #[error("unknown measure {0:?}: choose from {names}", names = names())]
    Name(String),
    #[error("invalid threshold {0:?}: expected a number")]
    Number(String),
    #[error("invalid qualifier {0:?}: expected gpu=INDEX or gpu=UUID")]
    Qualifier(String),
    #[error("invalid duration {0:?}: expected a duration such as 5s")]
    Duration(String),
}

fn names() -> String {
    let names: Vec<&str> = Measure::VARIANTS.iter().map(|measure| measure.name()).collect();
    names.join(", ")
}

impl std::str::FromStr for Trigger {
    type Err = TriggerError;

    fn from_str(text: &str) -> Result<Self, TriggerError> {
        let shape = || TriggerError::Shape(text.chars().take(MAX_TEXT_BYTES).collect());
        if text.len() > MAX_TEXT_BYTES {
            return Err(shape());
        }
        let (condition, duration) = split_optional(text, " for ");
        let (condition, qualifier) = split_optional(condition, ":");
        let (name, number) = condition.split_once('>').ok_or_else(shape)?;
        let (name, number) = (name.trim(), number.trim());
        let measure = name.parse().map_err(|_| TriggerError::Name(name.to_owned()))?;
        let above = number.parse().ok().filter(|number: &f64| number.is_finite());
        let above = above.ok_or_else(|| TriggerError::Number(number.to_owned()))?;
        let gpu = qualifier.map(|qualifier| {
            let gpu = qualifier.strip_prefix("gpu=").filter(|gpu| !gpu.is_empty());
            gpu.map(str::to_owned).ok_or_else(|| TriggerError::Qualifier(qualifier.to_owned()))
        });
        let for_ns = duration.map(|duration| {
            let parsed = humantime::parse_duration(duration).ok().and_then(|d| u64::try_from(d.as_nanos()).ok());
            parsed.ok_or_else(|| TriggerError::Duration(duration.to_owned()))
        });
        Ok(Trigger { measure, above, gpu: gpu.transpose()?, for_ns: for_ns.transpose()?.unwrap_or_default() })
    }
}

/// The text before and, if there is one, after the first separator.
fn split_optional<'a>(text: &'a str, separator: &str) -> (&'a str, Option<&'a str>) {
    text.split_once(separator).map_or((text, None), |(before, after)| (before, Some(after.trim())))
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}>{}", self.measure.name(), self.above)?;
        if let Some(gpu) = &self.gpu {
            write!(f, ":gpu={gpu}")?;
        }
        if self.for_ns > 0 {
            let duration = std::time::Duration::from_nanos(self.for_ns);
            write!(f, " for {}", humantime::format_duration(duration))?;
        }
        Ok(())
    }
}

/// A met condition.
#[derive(Clone, Debug, PartialEq)]
pub struct Fired {
    pub gpu: GpuUuid,
    pub value: f64,
    /// The time from which it held without interruption.
    pub since: BootNs,
}

/// Cumulative contention by GPU and container, in GPU-seconds.
type Contended = BTreeMap<(GpuUuid, ContainerKey), f64>;

/// Evaluates one trigger.
#[derive(Debug)]
pub struct Watch {
    trigger: Trigger,
    /// By GPU, the time from which the condition holds.
    held_since: BTreeMap<GpuUuid, BootNs>,
    /// Oldest first; only for [`Measure::Contention`].
    snapshots: VecDeque<(BootNs, Contended)>,
    last: BootNs,
}

impl Watch {
    pub fn new(trigger: Trigger) -> Self {
        Self { trigger, held_since: BTreeMap::new(), snapshots: VecDeque::new(), last: BootNs(0) }
    }

    /// Evaluates a snapshot; a repeated one is ignored.
    pub fn evaluate(&mut self, snapshot: &Snapshot) -> Option<Fired> {
        if snapshot.at <= self.last {
            return None;
        }
        self.last = snapshot.at;
        let contended = if self.trigger.measure == Measure::Contention { self.contention(snapshot) } else { BTreeMap::new() };
        let mut held_since = BTreeMap::new();
        let mut fired = None;
        for gpu in snapshot.gpus.iter().filter(|gpu| gpu.gone.is_none() && self.concerns(gpu)) {
            let uuid = &gpu.info.uuid;
            let value = match self.trigger.measure {
                Measure::Coactive => gpu.coactive_ratio,
                Measure::Busy => gpu.utilization_ratio,
                Measure::Contention => contended.get(uuid).copied(),
                Measure::Memory => memory(gpu),
                Measure::Temperature => gpu.readings.temperature_celsius,
                Measure::Power => gpu.readings.power_watts,
                Measure::Throttled => gpu.readings.throttle_reasons.map(|bits| f64::from((bits & SLOWDOWN_REASONS).count_ones())),
            };
            let Some(value) = value.filter(|value| *value > self.trigger.above) else { continue };
            let since = self.held_since.get(uuid).copied().unwrap_or(snapshot.at);
            held_since.insert(uuid.clone(), since);
            if snapshot.at.saturating_since(since) >= self.trigger.for_ns && fired.is_none() {
                fired = Some(Fired { gpu: uuid.clone(), value, since });
            }
        }
        self.held_since = held_since;
        fired
    }

    fn concerns(&self, gpu: &GpuView) -> bool {
        let Some(wanted) = &self.trigger.gpu else { return true };
        match wanted.parse::<u32>() {
            Ok(index) => gpu.info.index == index,
            Err(_) => gpu.info.uuid.0.starts_with(wanted.as_str()),
        }
    }

    /// By GPU: the GPU-seconds per second that others received, of the container with the highest value.
    fn contention(&mut self, snapshot: &Snapshot) -> BTreeMap<GpuUuid, f64> {
        let mut now = Contended::new();
        for container in &snapshot.containers {
            for pair in &container.gpus {
                let Some(gpu) = snapshot.gpus.get(pair.gpu) else { continue };
                let seconds = pair.contention.iter().map(|c| c.seconds).sum();
                now.insert((gpu.info.uuid.clone(), container.record.key), seconds);
            }
        }
        while self.snapshots.len() >= MAX_SNAPSHOTS
            || self.snapshots.front().is_some_and(|(at, _)| at.plus(WINDOW_NS) < snapshot.at)
        {
            self.snapshots.pop_front();
        }
        let mut most = BTreeMap::new();
        if let Some((_, then)) = self.snapshots.front() {
            for (pair, total) in &now {
                // Divided by the whole window also while snapshots cover less of it: time is credited in bursts.
                let rate = (total - then.get(pair).copied().unwrap_or(0.0)).max(0.0) / (WINDOW_NS as f64 / 1e9);
                let most: &mut f64 = most.entry(pair.0.clone()).or_default();
                *most = most.max(rate);
            }
        }
        self.snapshots.push_back((snapshot.at, now));
        most
    }
}

fn memory(gpu: &GpuView) -> Option<f64> {
    let (used, total) = (gpu.readings.memory_used_bytes?, gpu.readings.memory_total_bytes?);
    (total > 0).then(|| used as f64 / total as f64)
}
