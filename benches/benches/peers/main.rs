//! The same simulated GPUs, read at once by the agent and by what others run: what each shows, beside the simulator's own record.
//!
//! Only `cargo xtask bench peers` runs it, because it may have to fetch the others first. Every client has the library that the others
//! have, is read once a second, and is told nothing. The table is Markdown; `docs/peers.md` keeps one.

mod clients;
mod read;
mod table;
mod world;

use std::time::{Duration, Instant};

use anyhow::Result;
use clients::Client;
use read::Reader;
use world::Scene;

/// The workloads' time.
const LASTS: Duration = Duration::from_secs(60);
/// Until every client has read a few times.
const WARM: Duration = Duration::from_secs(6);
/// Until the agent has closed its last window, and who reads once in 15 s has read once more.
const SETTLED: Duration = Duration::from_secs(17);

fn main() -> Result<()> {
    let named = std::env::args().skip(1).any(|word| word == "peers");
    if !named {
        println!("peers: left out, it runs only when it is named: `cargo xtask bench peers`");
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
