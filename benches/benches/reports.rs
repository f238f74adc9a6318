//! Reports of sessions at the promised size: 8 GPUs with 64 processes each, 10 minutes, with 1,000 additional processes a second that do
//! not use a GPU.
//!
//! Wall time on a shared machine: the best of five, with its target.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use devkit::Random;
use sampler_core::fact::{AttributedProcess, ContainerFact, Fact, GpuFact, Holder, LabelFact, User, UtilizationSample};
use sampler_core::observation::PressureFact;
use sampler_core::observation::ProcessKind;

use sampler_core::device::{DeviceReadings, GpuInfo};
use sampler_core::units::{BootNs, ContainerKey, GpuNs, GpuUuid, WallTime};
use sampler_session::{End, FileBytes, Header, Packer, State, View, read};

const GPUS: u32 = 8;
const PROCESSES: u64 = 64;
const MINUTES: u64 = 10;
const SECOND: u64 = 1_000_000_000;
const START: u64 = 1_000_000 * SECOND;
const PERIOD: u64 = 167_139_000;
/// Interval of states at which a reader can begin, in seconds.
const STATE_EVERY: u64 = 30;
const TIMES: usize = 5;

/// The container of a process; each process has its own.
fn key(gpu: u32, n: u64) -> ContainerKey {
    ContainerKey(1 + u64::from(gpu) * PROCESSES + n)
}

fn container(key: ContainerKey) -> [Fact; 2] {
    let id = format!("{:064x}", u128::from(key.0).wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835));
    let fact = ContainerFact {
        key,
        cgroup_path: format!("/kubepods.slice/kubepods-burstable.slice/cri-containerd-{id}.scope"),
        container_id: Some(id),
        runtime: Some("containerd".into()),
        pod_uid: Some(format!("8bb25662-de9a-11e9-84e7-{:012x}", key.0)),
        created: BootNs(START - 100 * SECOND),
        creation_seen: true,
    };
    let labels = LabelFact {
        key,
        namespace: format!("team-{}", key.0 % 7),
        pod: format!("trainer-{}", key.0),
        container: "main".into(),
        name: format!("k8s_main_trainer-{}", key.0),
        image: "registry.example/trainer:v3".into(),
    };
    [Fact::Container(fact), Fact::Labels(labels)]
}

fn opened(gpu: u32) -> Fact {
    let info = GpuInfo {
        uuid: GpuUuid(format!("GPU-{gpu:08}-aaaa-bbbb-cccc-ddddeeeeffff").into()),
        index: gpu,
        minor: Some(gpu),
        model: "Tesla V100-SXM2-16GB".into(),
        pci_bus_id: format!("00000000:{gpu:02X}:00.0"),
        driver_version: "535.183.01".into(),
        ..GpuInfo::default()
    };
    Fact::Gpu { gpu, at: BootNs(START), fact: GpuFact::Opened(Arc::new(info)) }
}

fn second(n: u64, random: &mut Random) -> Vec<Fact> {
    let (from, to) = (START + n * SECOND, START + (n + 1) * SECOND);
    let mut all: Vec<Fact> =
        (1..=4).map(|k| from + k * SECOND / 4).map(|at| Fact::Time { at: BootNs(at), wall: WallTime(at) }).collect();
    // A thousand containers with one short process each, without a GPU.
    for k in 0..1_000 {
        let key = ContainerKey(1_000_000 + n * 1_000 + k);
        all.extend(container(key));
        all.push(Fact::ContainerGone { key, at: BootNs(to) });
        all.push(Fact::ContainerForgotten { key });
    }
    for gpu in 0..GPUS {
        let since = |k: u64| BootNs(START - k * 7_654_321);
        let pid = |k: u64| 10_000 + gpu * 1_000 + k as u32;
        for at in (from / PERIOD + 1..=to / PERIOD).map(|k| k * PERIOD) {
            let chosen = random.below(PROCESSES);
            let user = User::Container(key(gpu, chosen));
            let process = AttributedProcess { pid: pid(chosen), percent: 97, user, since: since(chosen) };
            let sample = UtilizationSample {
                stamp: GpuNs(at / 1000 * 1000 + 12_345_678),
                ns: PERIOD,
                busy_percent: 90 + random.below(11) as u8,
                processes: vec![process],
            };
            all.push(Fact::Gpu { gpu, at: BootNs(at), fact: GpuFact::Utilization(sample) });
        }
        if n.is_multiple_of(2) {
            let holder = |k| Holder {
                pid: pid(k),
                user: User::Container(key(gpu, k)),
                kind: ProcessKind::Compute,
                memory_bytes: Some((200 << 20) + if k % 4 == 0 { random.below(64) << 20 } else { 0 }),
            };
            all.push(Fact::Gpu { gpu, at: BootNs(to), fact: GpuFact::Held(Some((0..PROCESSES).map(holder).collect())) });
            let readings = DeviceReadings {
                memory_used_bytes: Some((13 << 30) + (random.below(64) << 20)),
                memory_total_bytes: Some(16 << 30),
                power_watts: Some(250.0 + random.below(50_000) as f64 / 1e3),
                energy_joules: Some((n * 250) as f64),
                temperature_celsius: Some(60.0 + random.below(5) as f64),
                sm_clock_hertz: Some(1.53e9),
                throttle_reasons: Some(0),
            };
            all.push(Fact::Gpu { gpu, at: BootNs(to), fact: GpuFact::Readings(readings) });
        }
        let waits = |k: u64| PressureFact {
            key: key(gpu, k),
            at: BootNs(to),
            cpu: None,
            cpu_some_ns: Some(n * k * 765_000),
            memory_some_ns: Some(0),
            io_some_ns: Some(k * 1_000_000),
        };
        all.extend((0..PROCESSES).map(|k| Fact::Pressure(waits(k))));
    }
    all
}

/// The session file as the recorder writes it.
fn file() -> Result<Vec<u8>> {
    let mut random = Random(1);
    let (mut packer, mut state, mut bytes) = (Packer::new()?, State::default(), FileBytes::default());
    let (start, start_wall) = (BootNs(START), WallTime(START));
    bytes.put(&packer.header(&Header { node: "node-1".into(), start, start_wall, ..Header::default() })?);
    for gpu in 0..GPUS {
        state.apply(&opened(gpu));
        for fact in (0..PROCESSES).flat_map(|n| container(key(gpu, n))) {
            state.apply(&fact);
        }
    }
    for n in 0..MINUTES * 60 {
        if n.is_multiple_of(STATE_EVERY) {
            for frame in packer.state(&state.facts())? {
                bytes.put(&frame);
            }
        }
        let mut written = Vec::new();
        for fact in second(n, &mut random) {
            state.follow(&fact, &mut |fact| written.push(fact));
        }
        for frame in packer.facts(&written)? {
            bytes.put(&frame);
        }
    }
    bytes.put(&packer.end(&End { at: BootNs(START + MINUTES * 60 * SECOND), ..End::default() })?);
    Ok(bytes.bytes)
}

fn best(mut run: impl FnMut() -> Result<()>) -> Result<Duration> {
    let mut best = Duration::MAX;
    for _ in 0..TIMES {
        let begun = Instant::now();
        run()?;
        best = best.min(begun.elapsed());
    }
    Ok(best)
}

fn print_row(what: &str, value: String, aim: &str) {
    println!("{what:<66} {value:>12} {aim:>12}");
}

fn main() -> Result<()> {
    let bytes = file()?;
    let session = read(&bytes)?;
    ensure!(session.damage.is_empty() && session.end.is_some(), "the file is complete: {:?}", session.damage);
    let busy = |report: &sampler_report::Report| report.gpus.iter().map(|gpu| gpu.busy_seconds).sum::<f64>();
    let view = View::default();
    let made = sampler_report::build(&session, &view);
    ensure!(made.users.len() as u64 == u64::from(GPUS) * PROCESSES, "{} users", made.users.len());
    ensure!(busy(&made) > 0.9 * (u64::from(GPUS) * MINUTES * 60) as f64, "{} s busy", busy(&made));
    print_row("8 GPUs, 64 processes each, 10 minutes", "measured".into(), "aim");
    print_row("file, MiB a minute", format!("{:.2}", bytes.len() as f64 / f64::from(1 << 20) / MINUTES as f64), "1");
    let text = sampler_report::TextOptions { width: Some(120), colour: false, unicode: true };
    let read_build_text = best(|| {
        let session = read(&bytes)?;
        let text = sampler_report::text(&sampler_report::build(&session, &view), &text);
        ensure!(text.len() > 1_000, "a page");
        Ok(())
    })?;
    print_row("file to text: read, aggregate, compare all pairs, write, s", format!("{:.2}", read_build_text.as_secs_f64()), "2");
    let html = sampler_report::html(&made);
    let whole = best(|| {
        let session = read(&bytes)?;
        ensure!(
            sampler_report::html(&sampler_report::build(&session, &view)).len() == html.len(),
            "the page is the same each time"
        );
        Ok(())
    })?;
    print_row("file to html, s", format!("{:.2}", whole.as_secs_f64()), "2");
    print_row("html, MB", format!("{:.2}", html.len() as f64 / 1e6), "5");
    let perfetto = sampler_report::perfetto(&made);
    serde_json::from_str::<serde_json::Value>(&perfetto).context("perfetto is JSON")?;
    print_row("perfetto, MB", format!("{:.2}", perfetto.len() as f64 / 1e6), "30");
    Ok(())
}
