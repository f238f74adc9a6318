//! Pseudo-random facts of a busy node.

use std::sync::Arc;

use crate::Header;
use sampler_core::device::{DeviceReadings, Engine, GpuInfo, Reason};
use sampler_core::fact::*;
use sampler_core::observation::{CpuQuota, PressureFact, ProcessKind};
use sampler_core::units::{BootNs, ContainerKey, GpuNs, GpuUuid, WallTime};

pub const SECOND: u64 = 1_000_000_000;
/// When the facts begin.
pub const START: u64 = 1_000_000 * SECOND;
/// Samples per second of each GPU, as on a V100.
const SAMPLES_PER_SECOND: u64 = 6;

/// xorshift64*, which returns the same numbers on every machine and with every dependency version.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

#[derive(Clone, Copy)]
pub struct Node {
    pub gpus: u32,
    /// Processes on each GPU, each in its own container except every eighth, which is outside containers.
    pub processes: u32,
    /// Most processes that one sample names.
    pub max_processes: u64,
}

impl Node {
    fn user(self, gpu: u32, n: u32) -> (u32, User, BootNs) {
        let pid = 10_000 + gpu * 1000 + n * 7;
        let since = BootNs(START - u64::from(pid) * 7_654_321);
        let host = User::Host(HostProcess { pid, start: since });
        // Keys do not depend on the GPU, so that a container uses several GPUs.
        let user = if n % 8 == 7 { host } else { User::Container(ContainerKey(u64::from(n) + 1)) };
        (pid, user, since)
    }

    /// The facts of the time before the first sample.
    pub fn begin(self) -> Vec<Fact> {
        let mut all = vec![Fact::Time { at: BootNs(START), wall: WallTime(1_700_000_000 * SECOND) }];
        for n in 0..self.processes {
            let key = ContainerKey(u64::from(n) + 1);
            let id = format!("{:064x}", u128::from(key.0).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835));
            all.push(Fact::Container(ContainerFact {
                key,
                cgroup_path: format!("/kubepods.slice/kubepods-burstable.slice/cri-containerd-{id}.scope"),
                container_id: Some(id),
                runtime: Some("containerd".into()),
                pod_uid: Some(format!("8bb25662-de9a-11e9-84e7-{:012x}", key.0)),
                created: BootNs(START - 100 * SECOND),
                creation_seen: true,
            }));
            all.push(Fact::Labels(LabelFact {
                key,
                namespace: "research".into(),
                pod: format!("trainer-{n}"),
                container: "main".into(),
                name: format!("k8s_main_trainer-{n}"),
                image: "registry.example/trainer:v3".into(),
            }));
        }
        for gpu in 0..self.gpus {
            let info = GpuInfo {
                uuid: GpuUuid(format!("GPU-{gpu:08}-aaaa-bbbb-cccc-ddddeeeeffff").into()),
                index: gpu,
                minor: Some(gpu),
                model: "Tesla V100-SXM2-16GB".into(),
                pci_bus_id: format!("00000000:{gpu:02X}:00.0"),
                driver_version: "535.183.01".into(),
                ..GpuInfo::default()
            };
            all.push(Fact::Gpu { gpu, at: BootNs(START), fact: GpuFact::Opened(Arc::new(info)) });
        }
        all
    }

    /// The facts of the second with number `second`.
    pub fn second(self, second: u64, random: &mut Random) -> Vec<Fact> {
        let mut all = Vec::new();
        let begins = START + second * SECOND;
        for quarter in 1..=4 {
            let at = begins + quarter * SECOND / 4;
            let wall = WallTime(1_700_000_000 * SECOND + at - START + random.below(50_000));
            all.push(Fact::Time { at: BootNs(at), wall });
        }
        for gpu in 0..self.gpus {
            for n in 0..SAMPLES_PER_SECOND {
                // The driver's sampling grid, with jitter in microseconds.
                let at = begins + n * SECOND / SAMPLES_PER_SECOND + random.below(2000) * 1000;
                let ns = SECOND / SAMPLES_PER_SECOND + random.below(2000) * 1000;
                let processes = (0..random.below(self.max_processes + 1)).map(|_| {
                    let (pid, user, since) = self.user(gpu, random.below(u64::from(self.processes)) as u32);
                    let user = if random.below(200) == 0 { User::Unattributed(Reason::Ambiguous) } else { user };
                    AttributedProcess { pid, percent: 1 + random.below(100) as u8, user, since }
                });
                let processes = processes.collect();
                let sample = UtilizationSample {
                    stamp: GpuNs(at / 1000 * 1000 + 1_234_567_000),
                    ns,
                    busy_percent: random.below(101) as u8,
                    processes,
                };
                all.push(Fact::Gpu { gpu, at: BootNs(at), fact: GpuFact::Utilization(sample.clone()) });
                if n == 0 {
                    let fact = GpuFact::EngineSample(Engine::Memory, UtilizationSample { processes: Vec::new(), ..sample });
                    all.push(Fact::Gpu { gpu, at: BootNs(at), fact });
                }
            }
            if (second + u64::from(gpu)).is_multiple_of(2) {
                all.extend(self.readings(gpu, begins, random));
            }
        }
        for n in 0..self.processes {
            all.push(Fact::Pressure(PressureFact {
                key: ContainerKey(u64::from(n) + 1),
                at: BootNs(begins + 3_000_000),
                cpu: Some(CpuQuota {
                    limit_ns: (n % 2 == 0).then_some((400_000_000, 100_000_000)),
                    periods: second * 10,
                    throttled_periods: second / 3,
                    throttled_ns: second * u64::from(n) * 1_234_567,
                }),
                cpu_some_ns: Some(second * u64::from(n) * 765_000),
                memory_some_ns: Some(0),
                io_some_ns: Some(u64::from(n) * 1_000_000),
            }));
        }
        all
    }

    fn readings(self, gpu: u32, begins: u64, random: &mut Random) -> Vec<Fact> {
        let holder = |n| {
            let (pid, user, _) = self.user(gpu, n);
            // The memory of every fourth process changes.
            let more = if n % 4 == 0 { random.below(1024) << 20 } else { 0 };
            Holder { pid, user, kind: ProcessKind::Compute, memory_bytes: Some((u64::from(n) << 20) + more) }
        };
        let held: Arc<[Holder]> = (0..self.processes).map(holder).collect();
        let readings = DeviceReadings {
            memory_used_bytes: Some((8 << 30) + (random.below(4096) << 20)),
            memory_total_bytes: Some(16 << 30),
            power_watts: Some(250.0 + random.below(50_000) as f64 / 1000.0),
            energy_joules: Some((begins / SECOND * 250) as f64 + random.below(1000) as f64 / 1000.0),
            temperature_celsius: Some(60.0 + random.below(5) as f64),
            sm_clock_hertz: Some(1.53e9),
            throttle_reasons: Some(random.below(2) * 4),
        };
        let clock = ClockFact {
            ahead_of_boot_seconds: Some(1.234_567 + random.below(1000) as f64 * 1e-6),
            uncertainty_seconds: Some(0.01),
            period_ns: Some(SECOND / SAMPLES_PER_SECOND),
            steps: 0,
        };
        let all = [GpuFact::Held(Some(held)), GpuFact::Readings(readings), GpuFact::Clock(clock)];
        all.into_iter().map(|fact| Fact::Gpu { gpu, at: BootNs(begins + 500_000_000), fact }).collect()
    }
}

pub fn header() -> Header {
    Header {
        node: "node-1".into(),
        agent_version: "0.1.0".into(),
        start: BootNs(START),
        start_wall: WallTime(1_700_000_000 * SECOND),
        trigger: Some("coactive>0.5".into()),
        ..Header::default()
    }
}
