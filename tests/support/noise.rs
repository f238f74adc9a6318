//! Plants what the machine of a developer or of a shared CI may have: a busy loop for each processor, pods with and without names that come
//! and go, and a real containerd with a pod. `cargo xtask test --noise` runs the tests next to it.
//!
//! Prints a line when all of it runs, and ends with its standard input.

use std::collections::VecDeque;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use gpu_sampler_tests::Running;
use gpu_sampler_tests::containerd::{Containerd, PodSpec};
use gpu_sampler_tests::kernel::{CgroupTree, remove_cgroups, sleeper};
use gpu_sampler_tests::labels::bundle;

/// Pods that stay.
const STAY: usize = 6;
/// Pods that come and go, and the time between two of them.
const CHURNING: usize = 3;
const EVERY: Duration = Duration::from_secs(2);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("noise: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let end = AtomicBool::new(false);
    let containerd = Containerd::start()?;
    let sandbox = containerd.run_pod(&PodSpec::new("foreign", "noise", "0f0f0f0f-de9a-11e9-84e7-000000000000"))?;
    containerd.run(&sandbox, "main", 0, &["sleep", "1000000"])?;
    let tree = CgroupTree::new("noise")?;
    let stay = (0..STAY).map(|n| NoisePod::new(&tree, n)).collect::<Result<Vec<_>>>()?;
    let processors = thread::available_parallelism()?.get();
    let churned = thread::scope(|scope| {
        for _ in 0..processors {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let churn = scope.spawn(|| churn(&tree, &end));
        println!("noise: {processors} busy loops, {} pods, a containerd", STAY + CHURNING + 1);
        let read = std::io::stdin().read_to_end(&mut Vec::new());
        end.store(true, Ordering::Relaxed);
        churn.join().unwrap_or_else(|_| Err(anyhow!("the churn panicked"))).and(read.map_err(Into::into))
    });
    drop(stay);
    churned.map(drop)
}

fn churn(tree: &CgroupTree, end: &AtomicBool) -> Result<()> {
    let mut living = VecDeque::new();
    let mut n = STAY;
    while !end.load(Ordering::Relaxed) {
        living.push_back(NoisePod::new(tree, n)?);
        if living.len() > CHURNING {
            living.pop_front();
        }
        n += 1;
        thread::sleep(EVERY);
    }
    Ok(())
}

/// A pod's container with a process. Every other one has a name.
struct NoisePod {
    process: Option<Running>,
    pod: PathBuf,
    bundle: Option<PathBuf>,
}

impl NoisePod {
    fn new(tree: &CgroupTree, n: usize) -> Result<Self> {
        let (uid, id) = (format!("0f0f0f0f-de9a-11e9-84e7-{n:012x}"), format!("f{:07x}{n:056x}", std::process::id()));
        // In the machine's own folder of bundles.
        let bundle = n.is_multiple_of(2).then(|| bundle(Path::new("/"), &id, &format!("foreign-{n}"), &uid)).transpose()?;
        let pod = tree.make(&format!("kubepods/burstable/pod{uid}"))?;
        let process = sleeper(&tree.make(&format!("kubepods/burstable/pod{uid}/{id}"))?)?;
        Ok(Self { process: Some(process), pod, bundle })
    }
}

impl Drop for NoisePod {
    /// As a kubelet does: a pod that has ended leaves no cgroup, which agents would have to explain.
    fn drop(&mut self) {
        drop(self.process.take());
        if let Err(error) = remove_cgroups(&self.pod) {
            eprintln!("noise: {error:#}");
        }
        if let Some(folder) = &self.bundle
            && let Err(error) = std::fs::remove_dir_all(folder)
        {
            eprintln!("noise: {} is left: {error}", folder.display());
        }
    }
}
