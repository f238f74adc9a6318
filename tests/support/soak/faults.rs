//! The kinds of faults and their schedule, drawn from the seed. Pure: [`inject`](super::inject) does what a fault is.

use std::time::Duration;

use devkit::Random;

/// What fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FaultKind {
    /// More forks than the rings of kernel events hold.
    Storm,
    /// The runtime's socket vanishes and appears again.
    RuntimeRestart,
    /// The runtime accepts connections and does not respond.
    RuntimeHang,
    /// The runtime denies that any container exists.
    RuntimeNotFound,
    /// The runtime responds with random bytes.
    RuntimeGarbage,
    /// The runtime breaks off in the middle of a response.
    RuntimeHalf,
    /// Driver calls for one GPU do not return.
    GpuStall,
    /// Driver calls for all GPUs do not return.
    DriverStall,
    /// Driver calls for one GPU take 20 ms longer.
    GpuSlow,
    /// One GPU has fallen off the bus, and comes back.
    GpuLost,
    /// One GPU is removed, and added again.
    GpuAbsent,
    /// The driver is replaced.
    DriverReload,
    /// A driver call for one GPU fails.
    GpuError,
    /// The sample buffer of one GPU stops.
    GpuFreeze,
    /// A burst of XID errors on one GPU.
    XidBurst,
    /// The clock of one GPU is set; it happens when the world says so, not when it is drawn.
    ClockStep,
    /// The disk of the sessions is full.
    DiskFull,
    /// The agent is stopped by SIGSTOP, and continues.
    Stop,
    /// A limit of memory just above what the agent uses.
    MemoryLimit,
    /// The agent is killed and started again.
    Kill,
}

/// Every kind that can be drawn, in the order of the report.
pub const INJECTED: [FaultKind; 20] = [
    FaultKind::Storm,
    FaultKind::RuntimeRestart,
    FaultKind::RuntimeHang,
    FaultKind::RuntimeNotFound,
    FaultKind::RuntimeGarbage,
    FaultKind::RuntimeHalf,
    FaultKind::GpuStall,
    FaultKind::DriverStall,
    FaultKind::GpuSlow,
    FaultKind::GpuLost,
    FaultKind::GpuAbsent,
    FaultKind::DriverReload,
    FaultKind::GpuError,
    FaultKind::GpuFreeze,
    FaultKind::XidBurst,
    FaultKind::ClockStep,
    FaultKind::DiskFull,
    FaultKind::Stop,
    FaultKind::MemoryLimit,
    FaultKind::Kill,
];

/// What no machine that runs other things can have, and why.
pub const NEVER_INJECTED: [(&str, &str); 2] = [
    ("system-clock", "the clock of the machine is shared with all that runs on it"),
    ("power-loss", "files are not read after a crash of the kernel"),
];

/// The GPUs with time that a fault may leave in no state for a while.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    Gpu(usize),
    AllGpus,
    /// Time of GPUs goes on.
    NoGpu,
}

impl FaultKind {
    pub fn name(self) -> &'static str {
        match self {
            FaultKind::Storm => "storm",
            FaultKind::RuntimeRestart => "runtime-restart",
            FaultKind::RuntimeHang => "runtime-hang",
            FaultKind::RuntimeNotFound => "runtime-404",
            FaultKind::RuntimeGarbage => "runtime-garbage",
            FaultKind::RuntimeHalf => "runtime-half",
            FaultKind::GpuStall => "gpu-stall",
            FaultKind::DriverStall => "driver-stall",
            FaultKind::GpuSlow => "gpu-slow",
            FaultKind::GpuLost => "gpu-lost",
            FaultKind::GpuAbsent => "gpu-absent",
            FaultKind::DriverReload => "driver-reload",
            FaultKind::GpuError => "gpu-error",
            FaultKind::GpuFreeze => "gpu-freeze",
            FaultKind::XidBurst => "xid-burst",
            FaultKind::ClockStep => "clock-step",
            FaultKind::DiskFull => "disk-full",
            FaultKind::Stop => "stop",
            FaultKind::MemoryLimit => "memory-limit",
            FaultKind::Kill => "kill",
        }
    }

    pub fn is_of_runtime(self) -> bool {
        self.name().starts_with("runtime-")
    }

    /// Whether the agent states it as a condition, however long it lasts.
    pub fn is_a_condition(self) -> bool {
        use FaultKind::{DriverReload, DriverStall, GpuAbsent, GpuLost, GpuStall};
        matches!(self, GpuStall | DriverStall | GpuLost | GpuAbsent | DriverReload)
    }

    /// Range of its length, in seconds.
    fn seconds(self) -> (f64, f64) {
        match self {
            FaultKind::ClockStep | FaultKind::XidBurst | FaultKind::Kill => (0.5, 1.0),
            FaultKind::Storm | FaultKind::DiskFull => (2.0, 3.0),
            FaultKind::GpuSlow | FaultKind::MemoryLimit => (5.0, 10.0),
            // A call is reported after 2 s, which a scrape has to see.
            FaultKind::GpuStall | FaultKind::DriverStall => (5.0, 8.0),
            _ => (3.0, 8.0),
        }
    }

    fn reach(self, gpu: usize) -> Reach {
        match self {
            FaultKind::GpuStall | FaultKind::GpuSlow | FaultKind::GpuError | FaultKind::GpuFreeze => Reach::Gpu(gpu),
            FaultKind::XidBurst | FaultKind::DiskFull => Reach::NoGpu,
            // To let go of a lost GPU the library is shut down; a scan after lost events holds samples of all GPUs back.
            _ if self.is_of_runtime() => Reach::NoGpu,
            _ => Reach::AllGpus,
        }
    }
}

/// One drawn fault.
#[derive(Clone, Copy, Debug)]
pub struct PlannedFault {
    pub kind: FaultKind,
    pub gpu: usize,
    pub lasts: Duration,
    pub reach: Reach,
}

/// Draws faults: every kind once in random order, then again.
pub struct Schedule {
    random: Random,
    kinds: Vec<FaultKind>,
    deck: Vec<FaultKind>,
    gpus: usize,
}

impl Schedule {
    /// `gpus`: GPUs that faults may be injected into.
    pub fn new(seed: u64, kinds: &[FaultKind], gpus: usize) -> Self {
        // The first numbers of seeds that are close are close, too.
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        random.unit();
        let kinds = kinds.iter().copied().filter(|kind| *kind != FaultKind::ClockStep).collect();
        Self { random, kinds, deck: Vec::new(), gpus }
    }

    /// `None` if there is nothing to draw from.
    pub fn draw(&mut self) -> Option<PlannedFault> {
        if self.deck.is_empty() {
            self.deck.clone_from(&self.kinds);
            for last in (1..self.deck.len()).rev() {
                let other = self.random.below(last as u64 + 1) as usize;
                self.deck.swap(last, other);
            }
        }
        let kind = self.deck.pop()?;
        Some(self.planned(kind))
    }

    pub fn planned(&mut self, kind: FaultKind) -> PlannedFault {
        let gpu = self.random.below(self.gpus as u64) as usize;
        let (least, most) = kind.seconds();
        let lasts = Duration::from_secs_f64(least + self.random.unit() * (most - least));
        PlannedFault { kind, gpu, lasts, reach: kind.reach(gpu) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn drawn(seed: u64, n: usize) -> Vec<FaultKind> {
        let mut schedule = Schedule::new(seed, &INJECTED, 4);
        (0..n).filter_map(|_| schedule.draw()).map(|fault| fault.kind).collect()
    }

    #[test]
    fn equal_seeds_draw_equal_faults_and_each_kind_once_before_it_is_repeated() {
        let n = INJECTED.len() - 1;
        assert_eq!(drawn(3, 3 * n), drawn(3, 3 * n));
        assert_ne!(drawn(3, n), drawn(4, n));
        assert_eq!(drawn(3, n).into_iter().collect::<BTreeSet<_>>().len(), n, "all but the clock's steps");
        assert!(Schedule::new(1, &[], 4).draw().is_none());
    }

    #[test]
    fn names_are_unique() {
        assert_eq!(INJECTED.iter().map(|kind| kind.name()).collect::<BTreeSet<_>>().len(), INJECTED.len());
    }
}
