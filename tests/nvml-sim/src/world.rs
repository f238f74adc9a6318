//! The simulated machine: its GPUs, their sampling grids and pid rules, and which quirks of real drivers they have.
//! `init` writes it once; after that it is only read. README.md of this package documents every key.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::faults::{self, Fault, FaultKind, Faults, Held, Xid};
use crate::model::SERVED_AFTER_US;
use crate::time;

pub const FILE: &str = "world.toml";

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $word:ident)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$of])* $word),* }
    )*};
}

words! {
    /// The process that a sample names: the one on the engine at its instant, or the last one within its period.
    PidRule { #[default] Instant Last }
    /// Whether the resource manager returns its own sample buffer, below NVML, or returns it with wrong pids.
    RmSamples { #[default] Refused Served Wrong }
    /// How utilization becomes whole percents.
    Rounding { #[default] Down Nearest }
    /// Whether a sample still names its process when that has ended.
    ExitedPids { #[default] Kept Blank }
    /// What a process sample over several samples is the average of: those that name its pid, or all.
    Average { #[default] OverNamed OverAll }
    /// The zero of stamps.
    Clock { #[default] Epoch Boot }
    RowOrder { #[default] Time Shuffled }
    /// Whether a process sample has its sample's stamp, or one a few ms earlier, as if taken process by process.
    RowStamps { #[default] Device Process }
    /// Whether GetSamples returns idle samples.
    IdleRing { #[default] Zeros Dry }
    /// What GetUtilizationRates returns.
    Rates { #[default] Ring Zero }
    ListMemory { #[default] Known Unknown }
    /// What the driver recommends for the recovery of the GPU.
    RecoveryAction { #[default] None Reset Reboot DrainP2p DrainAndReset }
    /// The fields that count NVLink bytes: in KiB without protocol overhead, or in bytes as from NVLink 5 on.
    NvlinkFields { #[default] Throughput Count }
    /// What the counters of the time for each clocks event reason do.
    ThrottleTimes { #[default] Exact Frozen Missing }
    /// What a call for process samples returns: these, the same with 0 %, none, or NOT_SUPPORTED.
    ProcessCall { #[default] Works Zeros Empty Unsupported }
    /// Invalid process samples that a result may contain in addition.
    Garbage { #[default] Util PidZero PidMax Stale Exited Zombies }
}

/// At a time since the world's begin the clock is set by this much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockStep {
    pub at: String,
    pub by_us: i64,
}

/// Keys of the world for all GPUs that a GPU may override.
macro_rules! world {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $default:expr;)*) => {
        #[derive(Clone, Debug, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct World {
            pub seed: u64,
            pub driver_version: String,
            /// Age of a sample when the driver first serves it, microseconds.
            pub delay_us: u64,
            /// Begin of this world, and boot of its machine, in microseconds since the epoch; `init` sets them.
            pub begun_us: u64,
            pub booted_us: u64,
            /// Latency of process lists, and of every other call.
            pub list_us: u64,
            pub call_us: u64,
            /// Whether calls of one process wait for each other, as with one lock in the driver.
            pub one_lock: bool,
            /// Symbols that the library does not have.
            pub missing: Vec<String>,
            /// Whether the driver's pids are of another kernel's pid space.
            pub foreign_pids: bool,
            /// Whether there are stand-ins for the device nodes, which processes hold open.
            pub nodes: bool,
            /// Whether the library needs device nodes and /proc/driver/nvidia, stand-ins of which are in the world's folder.
            pub kernel_files: bool,
            $($(#[$doc])* pub $name: $type,)*
            pub faults: Vec<FaultKey>,
            pub xids: Vec<XidKey>,
            pub gpus: Vec<Gpu>,
        }

        #[derive(Clone, Debug, Default, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Gpu {
            pub name: String,
            pub uuid: String,
            pub pci_bus_id: String,
            pub memory_bytes: u64,
            /// `/dev/nvidia<minor>`; by default the index.
            pub minor: Option<u32>,
            $($(#[$doc])* pub $name: Option<$type>,)*
            /// Its MIG devices; if there are any, the GPU is in MIG mode.
            pub mig: Vec<Mig>,
        }

        impl Default for World {
            fn default() -> Self {
                Self {
                    seed: 1,
                    driver_version: "535.183.01".into(),
                    delay_us: SERVED_AFTER_US,
                    begun_us: 0,
                    booted_us: 0,
                    list_us: 0,
                    call_us: 0,
                    one_lock: false,
                    missing: Vec::new(),
                    foreign_pids: false,
                    nodes: false,
                    kernel_files: false,
                    $($name: $default,)*
                    faults: Vec::new(),
                    xids: Vec::new(),
                    gpus: Vec::new(),
                }
            }
        }

        impl World {
            $(pub fn $name(&self, gpu: usize) -> &$type {
                self.gpus.get(gpu).and_then(|g| g.$name.as_ref()).unwrap_or(&self.$name)
            })*
        }
    };
}

world! {
    pid_rule: PidRule = PidRule::Instant;
    /// The resource manager's own sample buffer, below NVML.
    rm_samples: RmSamples = RmSamples::Refused;
    rounding: Rounding = Rounding::Down;
    exited_pids: ExitedPids = ExitedPids::Kept;
    average: Average = Average::OverNamed;
    /// A sample is returned only if it is newer than the given stamp by more than this, microseconds.
    newer_by_us: u64 = 0;
    /// Period of the sampling grid, microseconds. Measured on real boards: 167.1 to 169.8 ms.
    period_us: u64 = 167_139;
    /// Largest distance of a sample from its point on the grid, microseconds.
    jitter_us: u64 = 0;
    /// Number of samples that the driver keeps.
    ring: usize = 72;
    clock: Clock = Clock::Epoch;
    clock_offset_us: i64 = 0;
    clock_drift_ppm: f64 = 0.0;
    row_order: RowOrder = RowOrder::Time;
    /// The result of the size query: a capacity, not a count.
    row_probe: u32 = 100;
    rows_grow: bool = false;
    row_stamps: RowStamps = RowStamps::Device;
    idle_ring: IdleRing = IdleRing::Zeros;
    garbage: Vec<Garbage> = Vec::new();
    garbage_every: u64 = 1;
    /// Of ProcessUtilization, and of ProcessesUtilizationInfo.
    process_utilization: ProcessCall = ProcessCall::Works;
    processes_utilization_info: ProcessCall = ProcessCall::Works;
    utilization_rates: Rates = Rates::Ring;
    list_memory: ListMemory = ListMemory::Known;
    list_entry_bytes: u64 = 24;
    energy: bool = false;
    accounting: bool = false;
    gpm: bool = false;
    /// Aggregate ECC errors: corrected, uncorrected. Empty: not supported.
    ecc_errors: Vec<u64> = Vec::new();
    /// Rows remapped for correctable and for uncorrectable errors, pending, failure. Empty: not supported.
    remapped_rows: Vec<u64> = Vec::new();
    recovery_action: RecoveryAction = RecoveryAction::None;
    /// Bytes that it sends; it receives half as many. 0: not supported.
    nvlink_bytes_per_second: u64 = 0;
    nvlink_fields: NvlinkFields = NvlinkFields::Throughput;
    pcie_bytes_per_second: u64 = 0;
    /// Width of the counters of PCIe bytes.
    pcie_counter_bits: u32 = 64;
    throttle_times: ThrottleTimes = ThrottleTimes::Exact;
    clock_steps: Vec<ClockStep> = Vec::new();
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultKey {
    pub gpu: Option<usize>,
    pub from: String,
    pub lasts: Option<String>,
    pub kind: FaultKind,
    pub call: Option<String>,
    pub error: Option<String>,
    #[serde(default)]
    pub micros: u64,
    pub reasons: Option<String>,
    pub mhz: Option<u32>,
    pub watts: Option<u32>,
    pub celsius: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct XidKey {
    pub gpu: usize,
    pub at: String,
    pub xid: u64,
    #[serde(default = "one")]
    pub count: u64,
}

fn one() -> u64 {
    1
}

/// One MIG device. Values that are 0 or empty get defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "MigKey")]
pub struct Mig {
    pub uuid: String,
    pub gi: u32,
    pub ci: u32,
    pub memory_bytes: u64,
    /// Number of the GPU's seven slices that it has.
    pub slices: u32,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum MigKey {
    Uuid(String),
    Table(MigTable),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MigTable {
    uuid: String,
    #[serde(default)]
    gi: u32,
    #[serde(default)]
    ci: u32,
    #[serde(default)]
    memory_bytes: u64,
    #[serde(default)]
    slices: u32,
}

impl From<MigKey> for Mig {
    fn from(key: MigKey) -> Self {
        match key {
            MigKey::Uuid(uuid) => Self { uuid, gi: 0, ci: 0, memory_bytes: 0, slices: 0 },
            MigKey::Table(MigTable { uuid, gi, ci, memory_bytes, slices }) => Self { uuid, gi, ci, memory_bytes, slices },
        }
    }
}

/// Slices of a GPU that is divided completely.
pub const MIG_SLICES: u32 = 7;

/// A unit with engines of its own: a GPU, or one of its MIG devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Unit {
    pub gpu: usize,
    pub mig: Option<usize>,
}

impl From<usize> for Unit {
    fn from(gpu: usize) -> Self {
        Self { gpu, mig: None }
    }
}

fn span_us(key: &str, text: &str) -> anyhow::Result<u64> {
    time::span(text).map(faults::micros).map_err(|problem| anyhow::anyhow!("{key} = {text:?}: {problem}"))
}

/// Folder of the stand-ins for device nodes.
pub const DEVICES: &str = "dev";

impl World {
    /// Stand-ins for the device nodes that a process using that GPU holds, or of all GPUs; none in a world without nodes.
    pub fn nodes(&self, dir: &Path, gpu: Option<usize>) -> Vec<PathBuf> {
        if !self.nodes && !self.kernel_files {
            return Vec::new();
        }
        let used = self.gpus.iter().enumerate().filter(|(index, _)| gpu.is_none_or(|gpu| gpu == *index));
        let numbered = used.map(|(index, gpu)| format!("nvidia{}", gpu.minor.unwrap_or(index as u32)));
        let common = ["nvidiactl", "nvidia-uvm"].map(str::to_owned);
        common.into_iter().chain(numbered).map(|name| dir.join(DEVICES).join(name)).collect()
    }

    pub fn read(dir: &Path) -> anyhow::Result<World> {
        let path = dir.join(FILE);
        let text = fs::read_to_string(&path)
            .with_context(|| format!("{}: create a world with `nvml-sim init --dir {}`", path.display(), dir.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    /// Sets defaults and validates the values.
    pub fn parse(text: &str) -> anyhow::Result<World> {
        let mut world: World = toml::from_str(text)?;
        for index in 0..world.gpus.len() {
            let mix = crate::model::mix(world.seed, index as u64, 0);
            world.gpus[index].fill_in(index, mix);
            world.check(index)?;
        }
        if !(SERVED_AFTER_US..=10_000_000).contains(&world.delay_us) {
            bail!("delay_us = {} is outside {SERVED_AFTER_US}..10000000", world.delay_us);
        }
        if world.gpus.is_empty() {
            world.check(0)?;
        }
        if world.driver_major().is_none() {
            bail!("driver_version = {:?} must begin with a number and a dot", world.driver_version);
        }
        world.faults()?;
        world.xids()?;
        Ok(world)
    }

    fn check(&self, index: usize) -> anyhow::Result<()> {
        let (period, jitter, ring) = (*self.period_us(index), *self.jitter_us(index), *self.ring(index));
        if !(20_000..=2_000_000).contains(&period) {
            bail!("period_us = {period} is outside 20000..2000000");
        }
        if jitter > period / 4 {
            bail!("jitter_us = {jitter} is more than a quarter of the period, {period}");
        }
        if !(1..=4096).contains(&ring) {
            bail!("ring = {ring} is outside 1..4096");
        }
        if *self.garbage_every(index) == 0 || *self.row_probe(index) == 0 {
            bail!("garbage_every and row_probe must be at least 1");
        }
        if ![0, 2].contains(&self.ecc_errors(index).len()) || ![0, 4].contains(&self.remapped_rows(index).len()) {
            bail!("ecc_errors has 2 numbers and remapped_rows has 4");
        }
        if ![32, 64].contains(self.pcie_counter_bits(index)) {
            bail!("pcie_counter_bits must be 32 or 64");
        }
        let drift = *self.clock_drift_ppm(index);
        if !(-100_000.0..=100_000.0).contains(&drift) {
            bail!("clock_drift_ppm = {drift} is outside -100000..100000");
        }
        self.clock_steps_us(index)?;
        let Some(gpu) = self.gpus.get(index) else { return Ok(()) };
        if !gpu.uuid.starts_with("GPU-") || gpu.uuid.len() > 79 || gpu.name.len() > 95 {
            bail!("gpus[{index}]: uuid must begin with GPU- and have at most 79 bytes, name at most 95");
        }
        match gpu.mig.iter().find(|mig| !mig.uuid.starts_with("MIG-") || mig.uuid.len() > 79) {
            Some(mig) => bail!("gpus[{index}]: mig {:?} must begin with MIG- and have at most 79 bytes", mig.uuid),
            None => Ok(()),
        }
    }

    /// The `[[faults]]`, in microseconds since the epoch.
    pub fn faults(&self) -> anyhow::Result<Faults> {
        let fault = |(n, key): (usize, &FaultKey)| {
            let problem = |text: String| anyhow::anyhow!("faults[{n}]: {text}");
            let from_us = self.begun_us + span_us("from", &key.from)?;
            let lasts = key.lasts.as_ref().map(|text| span_us("lasts", text)).transpose()?;
            let error = key.error.as_ref().map_or(Ok(0), |name| faults::error(name)).map_err(problem)?;
            let reasons = key.reasons.as_ref().map_or(Ok(0), |list| faults::reasons(list)).map_err(problem)?;
            let (gpu, kind, call, micros) = (key.gpu, key.kind, key.call.clone(), key.micros);
            let until_us = lasts.map(|us| from_us.saturating_add(us));
            let held = Held { mhz: key.mhz, watts: key.watts, celsius: key.celsius };
            let fault = Fault { gpu, from_us, until_us, kind, call, error, micros, reasons, held };
            let fault = faults::validated(fault).map_err(problem)?;
            match gpu.filter(|gpu| *gpu >= self.gpus.len() && !self.gpus.is_empty()) {
                Some(gpu) => Err(problem(format!("gpu = {gpu}: there are {}, numbered from 0", self.gpus.len()))),
                None => Ok(fault),
            }
        };
        Ok(Faults::new(self.faults.iter().enumerate().map(fault).collect::<anyhow::Result<_>>()?))
    }

    pub fn xids(&self) -> anyhow::Result<Vec<Xid>> {
        let xid = |key: &XidKey| {
            Ok(Xid { gpu: key.gpu, at_us: self.begun_us + span_us("at", &key.at)?, xid: key.xid, count: key.count })
        };
        self.xids.iter().map(xid).collect()
    }

    /// Times in microseconds since the epoch, with the steps.
    pub fn clock_steps_us(&self, gpu: usize) -> anyhow::Result<Vec<(u64, i64)>> {
        let step = |step: &ClockStep| Ok((self.begun_us + span_us("at", &step.at)?, step.by_us));
        self.clock_steps(gpu).iter().map(step).collect()
    }

    pub fn driver_major(&self) -> Option<u32> {
        self.driver_version.split_once('.')?.0.parse().ok()
    }

    /// The second number of the driver version.
    pub fn driver_minor(&self) -> u32 {
        self.driver_version.split('.').nth(1).and_then(|minor| minor.parse().ok()).unwrap_or(0)
    }

    /// All units: GPUs first, in their order, then the MIG devices.
    pub fn units(&self) -> Vec<Unit> {
        let migs = |(gpu, g): (usize, &Gpu)| (0..g.mig.len()).map(move |mig| Unit { gpu, mig: Some(mig) }).collect::<Vec<_>>();
        (0..self.gpus.len()).map(Unit::from).chain(self.gpus.iter().enumerate().flat_map(migs)).collect()
    }

    pub fn mig(&self, unit: Unit) -> Option<&Mig> {
        self.gpus.get(unit.gpu)?.mig.get(unit.mig?)
    }

    pub fn uuid(&self, unit: Unit) -> &str {
        let mig = self.mig(unit).map(|mig| &*mig.uuid);
        mig.or_else(|| self.gpus.get(unit.gpu).map(|gpu| &*gpu.uuid)).unwrap_or_default()
    }

    pub fn memory_bytes(&self, unit: Unit) -> u64 {
        let mig = self.mig(unit).map(|mig| mig.memory_bytes);
        mig.or_else(|| self.gpus.get(unit.gpu).map(|gpu| gpu.memory_bytes)).unwrap_or_default()
    }
}

impl Gpu {
    fn fill_in(&mut self, index: usize, mix: u64) {
        if self.name.is_empty() {
            self.name = "Tesla V100-SXM2-16GB".into();
        }
        if self.memory_bytes == 0 {
            self.memory_bytes = 16 << 30;
        }
        if self.uuid.is_empty() {
            let (a, b, c, e) = (mix >> 32, mix >> 16 & 0xffff, mix & 0xfff, mix & 0xffff_ffff_ffff);
            self.uuid = format!("GPU-{a:08x}-{b:04x}-4{c:03x}-8{index:03x}-{e:012x}");
        }
        if self.pci_bus_id.is_empty() {
            self.pci_bus_id = format!("00000000:{:02X}:00.0", 4 + index);
        }
        for (number, mig) in self.mig.iter_mut().enumerate() {
            mig.slices = mig.slices.max(1);
            if mig.gi == 0 {
                mig.gi = number as u32 + 1;
            }
            if mig.memory_bytes == 0 {
                // Each of the seven slices has an eighth of the memory.
                mig.memory_bytes = self.memory_bytes / 8 * u64::from(mig.slices);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_holds_the_nodes_of_its_gpu() {
        let world = World::parse("nodes = true\n[[gpus]]\n[[gpus]]\nminor = 7").unwrap();
        let names = |gpu| world.nodes(Path::new("/d"), gpu).iter().map(|p| p.display().to_string()).collect::<Vec<_>>();
        assert_eq!(names(Some(1)), ["/d/dev/nvidiactl", "/d/dev/nvidia-uvm", "/d/dev/nvidia7"]);
        assert_eq!(names(None).len(), 4);
        assert!(World::parse("[[gpus]]").unwrap().nodes(Path::new("/d"), None).is_empty());
    }

    #[test]
    fn the_default_delay_is_the_minimum() {
        assert_eq!(World::parse("").unwrap().delay_us, 20_000);
    }

    #[test]
    fn valid_worlds_parse_and_errors_name_the_key() {
        let check = |toml: &str, expect: &str| {
            let result = World::parse(toml).map_or_else(|e| format!("{e:#}"), |w| format!("ok {}", w.gpus.len()));
            assert!(result.contains(expect), "{toml}: {result}");
        };
        check("", "ok 0");
        check("[[gpus]]\n[[gpus]]\npid_rule = 'last'", "ok 2");
        check("sede = 1", "unknown field `sede`");
        check("pid_rule = 'first'", "unknown variant `first`");
        check("rounding = 'down'\nexited_pids = 'blank'\n[[gpus]]\naverage = 'over_all'", "ok 1");
        check("rounding = 'up'", "unknown variant `up`");
        check("exited_pids = 'gone'", "unknown variant `gone`");
        check("average = 'all'", "unknown variant `all`");
        check("period_us = 1\n[[gpus]]", "period_us = 1 is outside");
        check("delay_us = 10000000\n[[gpus]]", "ok 1");
        check("delay_us = 19999", "delay_us = 19999 is outside 20000..10000000");
        check("delay_us = 10000001", "delay_us = 10000001 is outside 20000..10000000");
        check("[[gpus]]\nuuid = 'x'", "gpus[0]: uuid must begin with GPU-");
        check("ring = 0", "ring = 0 is outside");
        check("[[gpus]]\nring = 5000", "ring = 5000 is outside");
        check("jitter_us = 41000\n[[gpus]]", "ok 1");
        check("jitter_us = 42000", "jitter_us = 42000 is more than a quarter");
        check("clock_drift_ppm = 1e9", "clock_drift_ppm = 1000000000 is outside");
        check("driver_version = 'x'", "must begin with a number");
        check("garbage = ['zombies', 'pid_max']\ngarbage_every = 0", "must be at least 1");
        check("garbage = ['dust']", "unknown variant `dust`");
        check("ecc_errors = [1]", "ecc_errors has 2 numbers");
        check("remapped_rows = [1, 0, 0]", "remapped_rows has 4");
        check("pcie_counter_bits = 16", "must be 32 or 64");
        check("recovery_action = 'drain_p2p'\necc_errors = [1, 0]\n[[gpus]]", "ok 1");
        check("[[gpus]]\n[[gpus.clock_steps]]\nat = '20s'\nby_us = -3", "ok 1");
        check("[[gpus]]\n[[gpus.clock_steps]]\nat = '20'\nby_us = -3", "at = \"20\": expected a duration");
        check("[[faults]]\nfrom = '1s'\nkind = 'error'\nerror = 'GPU_IS_LOST'", "ok 0");
        check("[[faults]]\nfrom = '1s'\nkind = 'error'\nerror = 'GONE'", "faults[0]: \"GONE\" is not an NVML error");
        check("[[gpus]]\n[[faults]]\ngpu = 1\nfrom = '1s'\nkind = 'lost'", "faults[0]: gpu = 1: there are 1");
        check("[[faults]]\nfrom = '1s'\nkind = 'throttle'\nreasons = 'sw_thermal'\nmhz = 900\ncelsius = 88", "ok 0");
        check("[[xids]]\ngpu = 0\nat = '1s'\nxid = 79", "ok 0");
        check("[[gpus]]\nmig = ['MIG-a', { uuid = 'MIG-b', gi = 9, slices = 3 }]", "ok 1");
        check("[[gpus]]\nmig = ['x']", "must begin with MIG-");
    }

    #[test]
    fn a_gpus_own_keys_take_precedence_and_all_keys_survive_writing() {
        let text = "jitter_us = 9\nring = 5\ngarbage = ['util']\n[[faults]]\nfrom = '1s'\nlasts = '2s'\nkind = 'freeze'\n\
                    [[gpus]]\nring = 7\nmig = ['MIG-a', { uuid = 'MIG-b', gi = 9, slices = 3 }]\n[[gpus]]\nclock = 'boot'\n\
                    [[gpus.clock_steps]]\nat = '20s'\nby_us = -3\n";
        let world = World { begun_us: 1_000, ..World::parse(text).unwrap() };
        let again = World::parse(&toml::to_string(&world).unwrap()).unwrap();
        for world in [world, again] {
            assert_eq!((*world.ring(0), *world.ring(1), *world.jitter_us(0)), (7, 5, 9));
            assert_eq!((*world.clock(0), *world.clock(1)), (Clock::Epoch, Clock::Boot));
            assert_eq!(world.clock_steps_us(1).unwrap(), [(20_001_000, -3)]);
            assert!(!world.faults().unwrap().recorded(0, 1_001_000) && world.faults().unwrap().recorded(0, 3_001_000));
            let mig = &world.gpus[0].mig;
            assert_eq!((mig[0].gi, mig[1].gi, mig[1].slices, mig[0].memory_bytes), (1, 9, 3, 2 << 30));
            assert_eq!(world.units().len(), 4);
        }
    }
}
