//! The same simulated GPUs, read at the same time by the agent and by other exporters: what each reports, next to the simulator's record.
//!
//! Only `cargo xtask bench peers` runs it, because it may have to download the others first. Every client uses the same library, is read
//! once a second, and has no other information. The table is Markdown; `docs/peers.md` has one.

mod clients;
mod read;
mod table;
mod world;

use std::time::{Duration, Instant};

use anyhow::Result;
use clients::Client;
use read::Reader;
use world::Scene;

/// Duration of the workloads.
const LASTS: Duration = Duration::from_secs(60);
/// Time in which every client is read a few times before the workloads.
const WARM: Duration = Duration::from_secs(6);
/// Until the agent has closed its last window, and a reader with an interval of 15 s has read once more.
const SETTLED: Duration = Duration::from_secs(17);

fn main() -> Result<()> {
    let named = std::env::args().skip(1).any(|word| word == "peers");
    if !named {
        println!("peers: skipped; it runs only when it is named: `cargo xtask bench peers`");
        return Ok(());
    }
    println!("\npeers");
    let mut scene = Scene::new()?;
    let clients = Client::all(&scene)?;
    let mut reader = Reader::start(&clients);
    reader.until(Instant::now() + WARM);
    let used = clients.iter().map(Client::processor_seconds).collect::<Result<Vec<f64>>>()?;
    let from = reader.mark();
    scene.play(&mut reader, LASTS)?;
    let played = reader.mark() - from;
    let used: Vec<f64> =
        clients.iter().zip(used).map(|(client, before)| Ok(client.processor_seconds()? - before)).collect::<Result<_>>()?;
    reader.until(Instant::now() + SETTLED);
    let truth = scene.truth()?;
    let seen = reader.end();
    if let Some(folder) = std::env::var_os(clients::LOG).map(std::path::PathBuf::from) {
        for (client, pages) in clients.iter().zip(&seen) {
            let text = pages.last().map_or("", |page| &page.text);
            std::fs::write(folder.join(format!("{}.page", client.name)), text)?;
        }
    }
    for line in
        table::lines(&table::Run { clients: &clients, seen: &seen, scene: &scene, truth: &truth, from, played, used: &used })?
    {
        println!("{line}");
    }
    Ok(())
}
