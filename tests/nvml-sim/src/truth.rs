//! What really happened, for scoring estimators.

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
    // What is younger can still change.
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
                let tick = model.tick(span);
                let (at, stamp) = (tick.at_us, clock.stamp(tick.at_us));
                let row = json!({
                    "gpu": gpu, "uuid": world.gpus[gpu].uuid, "time": time::format(at), "time_us": at, "gpu_time_us": stamp,
                    "util": by_engine(tick.util), "pid": by_engine(tick.pid),
                });
                write!(out, "{comma}\n{row}")?;
                comma = ",";
            }
        }
        writeln!(out, "\n]")?;
    } else {
        let gpus: Vec<_> = world.units().into_iter().map(|unit| told(&world, model(unit), from, to)).collect();
        let answer = json!({"from": time::format(from), "to": time::format(to), "gpus": gpus});
        writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
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

/// One GPU or MIG device.
fn told(world: &World, model: Model<'_>, from: u64, to: u64) -> Value {
    let mut processes: Vec<ProcessTruth> = Vec::new();
    let mut places = HashMap::new();
    for spent in model.truth(from, to) {
        let (pid, start_time) = (spent.load.pid, spent.load.start_time);
        let place = *places.entry((pid, start_time)).or_insert_with(|| {
            processes.push(ProcessTruth { pid, start_time, seconds: [0.0; ENGINES], active: 0.0 });
            processes.len() - 1
        });
        let process = &mut processes[place];
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
    let mut told = json!({"uuid": world.uuid(model.unit), "busy_seconds": busy, "processes": list});
    if let Unit { gpu, mig: Some(_) } = model.unit {
        told["gpu_uuid"] = json!(world.gpus[gpu].uuid);
    }
    told
}
