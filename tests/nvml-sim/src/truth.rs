//! Prints what really happened, as a reference for estimators.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;

use nvidia_ml_sim::clock::GpuClock;
use nvidia_ml_sim::follow::Follower;
use nvidia_ml_sim::model::{ENGINES, Engine, Model, SERVED_AFTER_US};
use nvidia_ml_sim::world::{Unit, World};
use nvidia_ml_sim::{loads, time};
use serde_json::{Map, Value, json};

pub fn print(dir: &Path, from: Option<u64>, to: Option<u64>, samples: bool) -> anyhow::Result<()> {
    let world = World::read(dir)?;
    let mut log = Follower::new(dir, &world)?;
    log.read()?;
    loads::close_dead(dir, log.loads.iter())?;
    // Younger events may still be added to the log.
    let settled = loads::now_us() - SERVED_AFTER_US;
    log.read()?;
    let from = from.unwrap_or(world.begun_us).max(world.begun_us);
    let to = to.unwrap_or(settled).min(settled).max(from);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let model = |unit| Model { world: &world, unit, loads: log.loads.of(unit), faults: &log.faults };
    if samples {
        let mut comma = "";
        write!(out, "[")?;
        // In MIG mode no samples are taken.
        for gpu in (0..world.gpus.len()).filter(|gpu| world.gpus[*gpu].mig.is_empty()) {
            let (model, clock) = (model(gpu.into()), GpuClock::new(&world, gpu)?);
            for span in model.grid(from, to) {
                let sample = model.sample(span);
                let (at, stamp) = (sample.at_us, clock.stamp(sample.at_us));
                let entry = json!({
                    "gpu": gpu, "uuid": world.gpus[gpu].uuid, "time": time::format(at), "time_us": at, "gpu_time_us": stamp,
                    "util": by_engine(sample.util), "pid": by_engine(sample.pid),
                });
                write!(out, "{comma}\n{entry}")?;
                comma = ",";
            }
        }
        writeln!(out, "\n]")?;
    } else {
        let gpus: Vec<_> = world.units().into_iter().map(|unit| unit_truth(&world, model(unit), from, to)).collect();
        let truth = json!({"from": time::format(from), "to": time::format(to), "gpus": gpus});
        writeln!(out, "{}", serde_json::to_string_pretty(&truth)?)?;
    }
    Ok(out.flush()?)
}

fn by_engine<T: Into<Value>>(values: [T; ENGINES]) -> Map<String, Value> {
    Engine::NAMES.iter().map(|name| (*name).to_owned()).zip(values.map(Into::into)).collect()
}

struct ProcessTruth {
    pid: u32,
    start_time: u64,
    seconds: [f64; ENGINES],
    active: f64,
}

/// The truth of one GPU or MIG device.
fn unit_truth(world: &World, model: Model<'_>, from: u64, to: u64) -> Value {
    let mut processes: Vec<ProcessTruth> = Vec::new();
    let mut indices = HashMap::new();
    for spent in model.truth(from, to) {
        let (pid, start_time) = (spent.load.pid, spent.load.start_time);
        let index = *indices.entry((pid, start_time)).or_insert_with(|| {
            processes.push(ProcessTruth { pid, start_time, seconds: [0.0; ENGINES], active: 0.0 });
            processes.len() - 1
        });
        let process = &mut processes[index];
        process.seconds.iter_mut().zip(spent.seconds).for_each(|(all, seconds)| *all += seconds);
        process.active += spent.active;
    }
    let busy = processes.iter().fold(0.0, |sum, p| sum + p.seconds[0]);
    let process = |p: &ProcessTruth| {
        let engines = by_engine(p.seconds);
        let (seconds, active) = (p.seconds[0], p.active);
        json!({"pid": p.pid, "start_time": p.start_time, "gpu_seconds": seconds, "active_seconds": active, "engine_seconds": engines})
    };
    let list: Vec<_> = processes.iter().map(process).collect();
    let mut truth = json!({"uuid": world.uuid(model.unit), "busy_seconds": busy, "processes": list});
    if let Unit { gpu, mig: Some(_) } = model.unit {
        truth["gpu_uuid"] = json!(world.gpus[gpu].uuid);
    }
    truth
}
