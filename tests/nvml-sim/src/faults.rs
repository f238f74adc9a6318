//! Faults and XIDs with their times, from the world file and from the log.
//!
//! Like loads they are on the timeline, so every process gets the same faults, and the truth includes them: while a GPU is absent, lost or
//! without its driver, nothing runs on it and nothing is recorded; while its sample buffer is frozen, nothing is recorded.

use std::time::Duration;

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum FaultKind {
    /// The calls return an NVML error.
    Error,
    /// The calls block until the fault ends.
    Stall,
    /// The calls take longer.
    Slow,
    /// The GPU fell off the bus.
    Lost,
    /// The sample buffer stops advancing while calls succeed.
    Freeze,
    /// Clocks are throttled, with reasons.
    Throttle,
    /// The driver is unloaded and replaced by a new instance.
    Reload,
    /// The GPU does not exist.
    Absent,
    /// The busy counter of the compute engine stays at 100 %, whatever runs.
    Latch,
}

/// In the form of the log: times in microseconds since the epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fault {
    /// `None`: all GPUs.
    pub gpu: Option<usize>,
    pub from_us: u64,
    /// `None`: never.
    pub until_us: Option<u64>,
    pub kind: FaultKind,
    /// `None`: every call on the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub call: Option<String>,
    #[serde(default)]
    pub error: u32,
    #[serde(default)]
    pub micros: u64,
    /// Bits of nvmlClocksEventReasons.
    #[serde(default)]
    pub reasons: u64,
    #[serde(default, flatten)]
    pub held: Held,
}

/// Limits of a throttled device; absent ones do not apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Upper limit of the SM clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mhz: Option<u32>,
    /// The power limit, and upper limit of the power.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub watts: Option<u32>,
    /// Lower limit of the temperature.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub celsius: Option<u32>,
}

/// Ends the matching faults that are in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Clear {
    pub gpu: Option<usize>,
    pub kind: Option<FaultKind>,
    pub at_us: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Xid {
    pub gpu: usize,
    pub at_us: u64,
    pub xid: u64,
    pub count: u64,
}

/// The effect of faults on a call at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    pub slow_us: u64,
    pub stalled: bool,
    pub error: Option<u32>,
}

/// Codes and names of nvmlReturn_t, without NVML_ERROR_, with the text of nvmlErrorString.
pub const ERRORS: [(u32, &str, &std::ffi::CStr); 32] = [
    (0, "SUCCESS", c"Success"),
    (1, "UNINITIALIZED", c"Uninitialized"),
    (2, "INVALID_ARGUMENT", c"Invalid Argument"),
    (3, "NOT_SUPPORTED", c"Not Supported"),
    (4, "NO_PERMISSION", c"Insufficient Permissions"),
    (5, "ALREADY_INITIALIZED", c"Already Initialized"),
    (6, "NOT_FOUND", c"Not Found"),
    (7, "INSUFFICIENT_SIZE", c"Insufficient Size"),
    (8, "INSUFFICIENT_POWER", c"Insufficient External Power"),
    (9, "DRIVER_NOT_LOADED", c"Driver Not Loaded"),
    (10, "TIMEOUT", c"Timeout"),
    (11, "IRQ_ISSUE", c"Interrupt Request Issue"),
    (12, "LIBRARY_NOT_FOUND", c"NVML Shared Library Not Found"),
    (13, "FUNCTION_NOT_FOUND", c"Function Not Found"),
    (14, "CORRUPTED_INFOROM", c"Corrupted infoROM"),
    (15, "GPU_IS_LOST", c"GPU is lost"),
    (16, "RESET_REQUIRED", c"GPU requires reset"),
    (17, "OPERATING_SYSTEM", c"GPU access blocked by the operating system"),
    (18, "LIB_RM_VERSION_MISMATCH", c"Driver/library version mismatch"),
    (19, "IN_USE", c"In use by another client"),
    (20, "MEMORY", c"Insufficient Memory"),
    (21, "NO_DATA", c"No data"),
    (22, "VGPU_ECC_NOT_SUPPORTED", c"vGPU ECC not supported"),
    (23, "INSUFFICIENT_RESOURCES", c"Insufficient resources"),
    (24, "FREQ_NOT_SUPPORTED", c"Frequency not supported"),
    (25, "ARGUMENT_VERSION_MISMATCH", c"Argument version mismatch"),
    (26, "DEPRECATED", c"Deprecated"),
    (27, "NOT_READY", c"Not ready"),
    (28, "GPU_NOT_FOUND", c"GPU not found"),
    (29, "INVALID_STATE", c"Invalid state"),
    (30, "RESET_TYPE_NOT_SUPPORTED", c"Reset type not supported"),
    (999, "UNKNOWN", c"Unknown Error"),
];

const REASONS: [(&str, u64); 9] = [
    ("idle", 1),
    ("applications_clocks", 2),
    ("sw_power_cap", 4),
    ("hw_slowdown", 8),
    ("sync_boost", 0x10),
    ("sw_thermal", 0x20),
    ("hw_thermal", 0x40),
    ("hw_power_brake", 0x80),
    ("display_clock", 0x100),
];

pub const GPU_IS_LOST: u32 = 15;

pub fn error(name: &str) -> Result<u32, String> {
    let name = name.strip_prefix("NVML_ERROR_").unwrap_or(name);
    let known = ERRORS.iter().find(|(code, known, _)| *code != 0 && *known == name);
    known.map(|(code, ..)| *code).ok_or_else(|| {
        let names: Vec<&str> = ERRORS[1..].iter().map(|(_, name, _)| *name).collect();
        format!("{name:?} is not an NVML error; choose from {}", names.join(", "))
    })
}

/// Parses a list such as `sw_power_cap,hw_thermal` into bits.
pub fn reasons(list: &str) -> Result<u64, String> {
    list.split(',').map(str::trim).filter(|name| !name.is_empty()).try_fold(0, |bits, name| {
        let bit = REASONS.iter().find(|(known, _)| *known == name).map(|(_, bit)| bit);
        bit.map(|bit| bits | bit).ok_or_else(|| {
            let names: Vec<&str> = REASONS.iter().map(|(name, _)| *name).collect();
            format!("{name:?} is not a reason; choose from {}", names.join(", "))
        })
    })
}

/// Validates a fault without its times: options that its kind lacks, or does not take, are errors.
pub fn validated(fault: Fault) -> Result<Fault, String> {
    let require = |given: bool, what: &str| if given { Ok(()) } else { Err(format!("kind {:?} requires {what}", fault.kind)) };
    match fault.kind {
        FaultKind::Error => require(fault.error != 0, "an error")?,
        FaultKind::Slow => require(fault.micros != 0, "micros")?,
        FaultKind::Throttle => require(fault.reasons != 0, "reasons")?,
        _ => {}
    }
    let of_calls = matches!(fault.kind, FaultKind::Error | FaultKind::Stall | FaultKind::Slow);
    if fault.call.is_some() && !of_calls {
        return Err(format!("kind {:?} does not apply to a single call", fault.kind));
    }
    if fault.held != Held::default() && fault.kind != FaultKind::Throttle {
        return Err(format!("kind {:?} has no limits: mhz, watts and celsius require kind throttle", fault.kind));
    }
    if fault.kind == FaultKind::Reload && fault.gpu.is_some() {
        return Err("the driver is reloaded for every GPU: omit gpu".into());
    }
    Ok(fault)
}

pub fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

impl Fault {
    /// A fault without end, on every GPU, and without the options that its kind requires.
    pub fn of_kind(kind: FaultKind) -> Self {
        let (call, held) = (None, Held::default());
        Self { gpu: None, from_us: 0, until_us: None, kind, call, error: 0, micros: 0, reasons: 0, held }
    }

    fn of(&self, gpu: usize) -> bool {
        self.gpu.is_none_or(|g| g == gpu)
    }

    fn at(&self, us: u64) -> bool {
        self.from_us <= us && self.until_us.is_none_or(|until| us < until)
    }
}

/// Faults in the order in which they were declared.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults(Vec<Fault>);

impl Faults {
    pub fn new(faults: Vec<Fault>) -> Self {
        Self(faults)
    }

    pub fn add(&mut self, fault: Fault) {
        self.0.push(fault);
    }

    pub fn clear(&mut self, clear: &Clear) {
        let matches = |f: &Fault| clear.gpu.is_none_or(|gpu| f.gpu == Some(gpu)) && clear.kind.is_none_or(|kind| f.kind == kind);
        for fault in self.0.iter_mut().filter(|f| matches(f) && f.at(clear.at_us)) {
            fault.until_us = Some(clear.at_us);
        }
    }

    fn in_force(&self, gpu: usize, at_us: u64) -> impl Iterator<Item = &Fault> {
        self.0.iter().filter(move |f| f.of(gpu) && f.at(at_us))
    }

    /// The effect on a call on a device; with `gpu` `None`, on the library: only faults that name that call and no GPU apply there.
    pub fn effect(&self, call: &str, gpu: Option<usize>, at_us: u64) -> Effect {
        let mut effect = Effect::default();
        for fault in self.0.iter().filter(|f| f.at(at_us)) {
            let named = fault.call.as_deref().is_some_and(|c| c == call);
            let met = match gpu {
                Some(gpu) => fault.of(gpu) && (named || fault.call.is_none()),
                None => fault.gpu.is_none() && named,
            };
            match fault.kind {
                FaultKind::Error if met => effect.error = effect.error.or(Some(fault.error)),
                FaultKind::Stall if met => effect.stalled = true,
                FaultKind::Slow if met => effect.slow_us += fault.micros,
                // An absent GPU that a client still holds counts as lost.
                FaultKind::Lost | FaultKind::Absent if met => effect.error = Some(GPU_IS_LOST),
                _ => {}
            }
        }
        effect
    }

    /// Whether nothing runs on the GPU.
    pub fn down(&self, gpu: usize, at_us: u64) -> bool {
        self.in_force(gpu, at_us).any(|f| matches!(f.kind, FaultKind::Lost | FaultKind::Reload | FaultKind::Absent))
    }

    /// Whether a sample of this time gets into the sample buffer.
    pub fn recorded(&self, gpu: usize, at_us: u64) -> bool {
        !self
            .in_force(gpu, at_us)
            .any(|f| matches!(f.kind, FaultKind::Lost | FaultKind::Reload | FaultKind::Absent | FaultKind::Freeze))
    }

    pub fn absent(&self, gpu: usize, at_us: u64) -> bool {
        self.in_force(gpu, at_us).any(|f| f.kind == FaultKind::Absent)
    }

    pub fn lost(&self, gpu: usize, at_us: u64) -> bool {
        self.in_force(gpu, at_us).any(|f| f.kind == FaultKind::Lost)
    }

    pub fn latched(&self, gpu: usize, at_us: u64) -> bool {
        self.in_force(gpu, at_us).any(|f| f.kind == FaultKind::Latch)
    }

    pub fn reasons(&self, gpu: usize, at_us: u64) -> u64 {
        self.in_force(gpu, at_us).filter(|f| f.kind == FaultKind::Throttle).fold(0, |bits, f| bits | f.reasons)
    }

    /// Time up to `to_us` in which a reason was in force.
    pub fn throttled_us(&self, gpu: usize, reason: u64, to_us: u64) -> u64 {
        let of_reason = self.0.iter().filter(|f| f.of(gpu) && f.kind == FaultKind::Throttle && f.reasons & reason != 0);
        let mut spans: Vec<(u64, u64)> = of_reason.map(|f| (f.from_us, f.until_us.unwrap_or(to_us).min(to_us))).collect();
        spans.sort_unstable();
        let (mut passed, mut sum) = (0, 0);
        for (from, until) in spans {
            sum += until.saturating_sub(from.max(passed));
            passed = passed.max(until);
        }
        sum
    }

    /// The limits in force; of several faults, the strictest.
    pub fn held(&self, gpu: usize, at_us: u64) -> Held {
        let least = |a: Option<u32>, b: Option<u32>| a.into_iter().chain(b).min();
        let all = self.in_force(gpu, at_us).filter(|f| f.kind == FaultKind::Throttle).map(|f| f.held);
        all.fold(Held::default(), |a, b| Held {
            mhz: least(a.mhz, b.mhz),
            watts: least(a.watts, b.watts),
            celsius: a.celsius.into_iter().chain(b.celsius).max(),
        })
    }

    pub fn reloading(&self, at_us: u64) -> bool {
        self.0.iter().any(|f| f.kind == FaultKind::Reload && f.at(at_us))
    }

    /// Whether the driver was replaced after `since_us`.
    pub fn reloaded(&self, since_us: u64, at_us: u64) -> bool {
        self.0.iter().any(|f| f.kind == FaultKind::Reload && f.from_us > since_us && f.from_us <= at_us)
    }

    /// The sample buffer that exists at `at_us` contains nothing older than the returned time.
    pub fn ring_begins(&self, gpu: usize, at_us: u64) -> u64 {
        let ends = |f: &Fault| f.until_us.map_or(at_us, |until| until.min(at_us));
        let restarts = |f: &&Fault| matches!(f.kind, FaultKind::Reload | FaultKind::Absent) && f.of(gpu) && f.from_us <= at_us;
        self.0.iter().filter(restarts).map(ends).max().unwrap_or(0)
    }

    /// The time from which on `span_us` of recorded time lie before `to_us`, allowing for pauses.
    pub fn reaches_back(&self, gpu: usize, to_us: u64, span_us: u64) -> u64 {
        let pauses = self.0.iter().filter(|f| f.of(gpu) && matches!(f.kind, FaultKind::Lost | FaultKind::Freeze));
        let mut pauses: Vec<(u64, u64)> = pauses.map(|f| (f.until_us.unwrap_or(to_us).min(to_us), f.from_us)).collect();
        pauses.sort_unstable_by(|a, b| b.cmp(a));
        let (mut from, mut passed) = (to_us.saturating_sub(span_us), to_us);
        for (ends, begins) in pauses {
            // Pauses may overlap; overlapping time counts once.
            let ends = ends.min(passed);
            if ends > from && begins < ends {
                from = from.saturating_sub(ends - begins);
                passed = begins;
            }
        }
        from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(kind: FaultKind, gpu: Option<usize>, from_us: u64, until_us: Option<u64>) -> Fault {
        Fault { gpu, from_us, until_us, error: 6, micros: 9, reasons: 4, ..Fault::of_kind(kind) }
    }

    #[test]
    fn faults_affect_the_calls_that_they_name() {
        let named = |kind, call: &str| Fault { call: Some(call.into()), ..fault(kind, None, 0, None) };
        let none = Effect::default();
        let error = |code| Effect { error: Some(code), ..none };
        let check = |fault: Fault, call, gpu, at, expect| {
            assert_eq!(Faults::new(vec![fault.clone()]).effect(call, gpu, at), expect, "{fault:?} {call} {gpu:?} {at}");
        };
        check(fault(FaultKind::Error, Some(1), 10, Some(20)), "a", Some(1), 10, error(6));
        check(fault(FaultKind::Error, Some(1), 10, Some(20)), "a", Some(1), 20, none);
        check(fault(FaultKind::Error, Some(1), 10, Some(20)), "a", Some(1), 9, none);
        check(fault(FaultKind::Error, Some(1), 10, None), "a", Some(0), 10, none);
        check(fault(FaultKind::Error, None, 10, None), "a", Some(0), 1 << 60, error(6));
        // A call on the library is affected only by faults that name it.
        check(fault(FaultKind::Error, None, 10, None), "a", None, 10, none);
        check(named(FaultKind::Error, "a"), "a", None, 10, error(6));
        check(named(FaultKind::Error, "a"), "b", Some(0), 10, none);
        check(named(FaultKind::Slow, "a"), "a", Some(0), 10, Effect { slow_us: 9, ..none });
        check(named(FaultKind::Stall, "a"), "a", Some(0), 10, Effect { stalled: true, ..none });
        check(fault(FaultKind::Lost, Some(0), 0, None), "a", Some(0), 10, error(GPU_IS_LOST));
        check(fault(FaultKind::Absent, Some(0), 0, None), "a", Some(0), 10, error(GPU_IS_LOST));
        check(fault(FaultKind::Freeze, Some(0), 0, None), "a", Some(0), 10, none);
    }

    #[test]
    fn a_frozen_sample_buffer_reaches_further_back() {
        let check = |faults: &[(FaultKind, u64, Option<u64>)], expect: u64| {
            let faults = Faults::new(faults.iter().map(|(kind, from, until)| fault(*kind, None, *from, *until)).collect());
            assert_eq!(faults.reaches_back(0, 1000, 100), expect, "{faults:?}");
        };
        check(&[], 900);
        check(&[(FaultKind::Freeze, 950, None)], 850);
        check(&[(FaultKind::Freeze, 950, Some(980))], 870);
        check(&[(FaultKind::Freeze, 950, Some(980)), (FaultKind::Lost, 800, Some(880))], 790);
        check(
            &[(FaultKind::Freeze, 950, Some(980)), (FaultKind::Freeze, 940, Some(970)), (FaultKind::Freeze, 955, Some(960))],
            860,
        );
        check(&[(FaultKind::Freeze, 100, Some(200)), (FaultKind::Throttle, 0, None)], 900);
    }

    #[test]
    fn names_are_parsed_and_required_options_checked() {
        assert_eq!((error("GPU_IS_LOST"), error("NVML_ERROR_UNKNOWN")), (Ok(15), Ok(999)));
        assert!(error("SUCCESS").is_err() && error("LOST").is_err_and(|e| e.contains("GPU_IS_LOST")));
        assert_eq!(reasons("sw_power_cap, hw_thermal"), Ok(0x44));
        assert!(reasons("heat").is_err_and(|e| e.contains("sw_thermal")));
        let wrong = |f: Fault| validated(f).unwrap_err();
        assert!(wrong(Fault { error: 0, ..fault(FaultKind::Error, None, 0, None) }).contains("requires an error"));
        assert!(wrong(Fault { micros: 0, ..fault(FaultKind::Slow, None, 0, None) }).contains("requires micros"));
        assert!(wrong(Fault { reasons: 0, ..fault(FaultKind::Throttle, None, 0, None) }).contains("requires reasons"));
        assert!(
            wrong(Fault { call: Some("a".into()), ..fault(FaultKind::Lost, None, 0, None) })
                .contains("not apply to a single call")
        );
        assert!(wrong(fault(FaultKind::Reload, Some(0), 0, None)).contains("every GPU"));
    }

    #[test]
    fn of_several_throttles_the_strictest_limits_apply() {
        let throttle = |from, until, mhz, watts, celsius| Fault {
            held: Held { mhz, watts, celsius },
            ..fault(FaultKind::Throttle, Some(0), from, Some(until))
        };
        let faults =
            Faults::new(vec![throttle(10, 30, Some(900), None, Some(88)), throttle(20, 40, Some(1000), Some(150), Some(70))]);
        let check = |at, mhz, watts, celsius| assert_eq!(faults.held(0, at), Held { mhz, watts, celsius }, "{at}");
        check(15, Some(900), None, Some(88));
        check(25, Some(900), Some(150), Some(88));
        check(35, Some(1000), Some(150), Some(70));
        check(40, None, None, None);
        let wrong = Fault { held: Held { mhz: Some(1), ..Held::default() }, ..fault(FaultKind::Slow, None, 0, None) };
        assert!(validated(wrong).unwrap_err().contains("has no limits"));
    }

    #[test]
    fn overlapping_throttles_of_a_reason_count_once() {
        let throttle = |from, until, reasons| Fault { reasons, ..fault(FaultKind::Throttle, Some(0), from, until) };
        let faults = Faults::new(vec![throttle(50, None, 4), throttle(10, Some(30), 0x44), throttle(20, Some(40), 4)]);
        let times = [(4, 45), (4, 60), (0x40, 60), (8, 60)].map(|(reason, to)| faults.throttled_us(0, reason, to));
        assert_eq!(times, [30, 40, 20, 0]);
        assert_eq!(faults.throttled_us(1, 4, 60), 0);
    }

    #[test]
    fn a_clear_ends_matching_faults_in_force() {
        let mut faults = Faults::new(vec![
            fault(FaultKind::Stall, Some(0), 10, None),
            fault(FaultKind::Stall, Some(1), 10, None),
            fault(FaultKind::Slow, Some(0), 10, Some(15)),
            fault(FaultKind::Slow, Some(0), 30, None),
        ]);
        faults.clear(&Clear { gpu: Some(0), kind: None, at_us: 20 });
        let ends: Vec<_> = faults.0.iter().map(|f| f.until_us).collect();
        assert_eq!(ends, [Some(20), None, Some(15), None]);
        faults.clear(&Clear { gpu: None, kind: Some(FaultKind::Stall), at_us: 25 });
        assert_eq!(faults.0[1].until_us, Some(25));
    }

    #[test]
    fn a_reload_and_an_arrival_restart_the_sample_buffer() {
        let faults =
            Faults::new(vec![fault(FaultKind::Reload, None, 10, Some(20)), fault(FaultKind::Absent, Some(1), 0, Some(50))]);
        assert_eq!((faults.ring_begins(0, 5), faults.ring_begins(0, 15), faults.ring_begins(0, 90)), (0, 15, 20));
        assert_eq!(faults.ring_begins(1, 90), 50);
        assert!(faults.reloaded(5, 10) && !faults.reloaded(10, 90) && !faults.reloaded(5, 9));
        assert!(faults.absent(1, 49) && !faults.absent(1, 50) && !faults.absent(0, 5));
    }
}
