//! Containers and processes that come and go, in a thread of their own: batches of short lives in new cgroups, half of them named by
//! bundles, and the cgroups are removed after each batch.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::accounts::AllowedUser;
use super::board::{Board, lock};
use crate::labels::{UID, bundle};
use crate::record::RecordedLife;
use crate::{Sim, wait_for};

/// Containers of one batch, and its processes.
const CONTAINERS: usize = 12;
const PROCESSES: &str = "80";
/// A cgroup can be removed a moment after its last process has ended.
const REMOVED_WITHIN: Duration = Duration::from_secs(10);
/// Ids of the churn's containers begin here; steady users have smaller numbers.
const FIRST_NUMBER: usize = 1000;

pub struct Churn<'a> {
    pub sim: &'a Sim,
    /// Cgroup directory that batches are made below.
    pub below: PathBuf,
    /// The agent's root file system.
    pub root: PathBuf,
    pub uuids: &'a [String],
    pub board: Arc<Board>,
    pub lives: &'a Mutex<Vec<RecordedLife>>,
    pub seed: u64,
}

impl Churn<'_> {
    /// Runs batches until the run is over.
    pub fn run(&self) -> Result<()> {
        let mut batch = 0;
        while !self.board.is_over() {
            self.batch(batch).with_context(|| format!("batch {batch} of the churn"))?;
            batch += 1;
        }
        Ok(())
    }

    fn batch(&self, batch: usize) -> Result<()> {
        let all: BTreeSet<String> = self.uuids.iter().cloned().collect();
        let mut dirs = Vec::new();
        for n in 0..CONTAINERS {
            let number = FIRST_NUMBER + batch * CONTAINERS + n;
            let id = format!("{:08x}{number:056x}", std::process::id());
            let pod = if n % 2 == 0 { format!("churn-{number}") } else { String::new() };
            if !pod.is_empty() {
                bundle(&self.root, &id, &pod, UID)?;
            }
            lock(&self.board.state).allowed.insert(id.clone(), AllowedUser { gpus: all.clone(), pod, since: self.board.now() });
            let dir = self.below.join(&id);
            std::fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
            dirs.push(dir);
        }
        let paths: Vec<&Path> = dirs.iter().map(PathBuf::as_path).collect();
        let seed = (self.seed.wrapping_add(batch as u64) % 1_000_000).to_string();
        let mut args = vec!["--count", PROCESSES, "--at-once", "4", "--lasting", "50ms..1500ms", "--demand", "0.05..0.3"];
        args.extend(["--seed", &seed]);
        // Half of the batches start their processes as runtimes do.
        if batch % 2 == 1 {
            args.extend(["--launch", "0ms..20ms"]);
        }
        let lives = self.sim.lives(&paths, &args)?.all()?;
        self.lives.lock().map_err(|_| anyhow::anyhow!("the record is locked by a thread that panicked"))?.extend(lives);
        for dir in &dirs {
            wait_for("the cgroup is removed", REMOVED_WITHIN, || Ok(std::fs::remove_dir(dir).ok()))?;
        }
        Ok(())
    }
}
