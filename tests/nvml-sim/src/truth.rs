//! What really happened, for scoring estimators.

use std::collections::HashMap;
use std::io::Write as _;
use std::path::Path;

use nvidia_ml_sim::follow::Follower;
use nvidia_ml_sim::model::{Model, SERVED_AFTER_US};
use nvidia_ml_sim::world::World;
use nvidia_ml_sim::{loads, time};
use serde_json::json;

pub fn print(dir: &Path, from: Option<u64>, to: Option<u64>, samples: bool) -> anyhow::Result<()> {
    let world = World::read(dir)?;
    let mut log = Follower::new(dir);
    log.read()?;
    loads::close_dead(dir, log.loads.iter())?;
    // What is younger can still change.
    let settled = loads::now_us() - SERVED_AFTER_US;
    log.read()?;
    let from = from.unwrap_or(world.begun_us).max(world.begun_us);
    let to = to.unwrap_or(settled).min(settled).max(from);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let model = |gpu| Model { world: &world, gpu, loads: log.loads.of(gpu) };
    if samples {
        let mut comma = "";
        write!(out, "[")?;
        for (gpu, named) in world.gpus.iter().enumerate() {
            let model = model(gpu);
            for at in model.grid(from, to) {
                let tick = model.tick(at);
                let row = json!({
                    "gpu": gpu, "uuid": named.uuid, "time": time::format(at), "time_us": at,
                    "util": {"sm": tick.util, "mem": tick.util / 2, "enc": 0, "dec": 0},
                    "pid": {"sm": tick.pid, "mem": tick.pid, "enc": null, "dec": null},
                });
                write!(out, "{comma}\n{row}")?;
                comma = ",";
            }
        }
        writeln!(out, "\n]")?;
    } else {
        let gpu = |(gpu, named): (usize, &nvidia_ml_sim::world::Gpu)| {
            let mut processes: Vec<(u32, u64, f64)> = Vec::new();
            let mut places = HashMap::new();
            for (load, seconds) in model(gpu).truth(from, to) {
                let place = *places.entry((load.pid, load.start_time)).or_insert(processes.len());
                match processes.get_mut(place) {
                    Some(process) => process.2 += seconds,
                    None => processes.push((load.pid, load.start_time, seconds)),
                }
            }
            let list: Vec<_> = processes
                .iter()
                .map(|(pid, start_time, seconds)| json!({"pid": pid, "start_time": start_time, "gpu_seconds": seconds}))
                .collect();
            json!({"uuid": named.uuid, "busy_seconds": processes.iter().fold(0.0, |sum, p| sum + p.2), "processes": list})
        };
        let gpus: Vec<_> = world.gpus.iter().enumerate().map(gpu).collect();
        let answer = json!({"from": time::format(from), "to": time::format(to), "gpus": gpus});
        writeln!(out, "{}", serde_json::to_string_pretty(&answer)?)?;
    }
    Ok(out.flush()?)
}
