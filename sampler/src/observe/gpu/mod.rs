//! NVML: one thread per GPU, because a driver call may block for long; a hung GPU stalls its own samples and nothing else.
//!
//! ```text
//!  gpu-watch   opens the library (a generation), lists GPUs every 5 s, starts and ends pollers, opens anew when the driver was replaced
//!  gpu-open    opens GPUs for gpu-watch, which leaves it behind where it hangs
//!  gpu-N       one GPU and its MIG devices: rings, rows, lists, readings, as its budget allows
//!  gpu-events  XID errors of all GPUs
//!  gpu-pids    settles whether the driver's pids are this machine's
//! ```
//! A generation lives as long as anyone uses it. Threads that hang keep theirs, and are waited for by nobody.

mod budget;
mod calls;
mod device_nodes;
mod driver;
mod events;
mod gpm;
mod inspect;
mod library;
mod mig;
mod pace;
mod pid_space;
mod poller;
mod readings;
mod ring;
mod slots;
mod told;
mod watch;
mod xids;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use nvml_wrapper::Nvml;
use nvml_wrapper::error::NvmlError;
use sampler_core::observation::Rejected;
use sampler_core::observation::{Answer, GpuBatch, Observation};
use sampler_core::units::{BootNs, WallTime};
use thiserror::Error;

pub use self::inspect::inspect;
pub use self::watch::start;

use self::pid_space::PidCheck;
use self::slots::Slots;
use crate::config::Config;
use crate::health::Health;
use crate::inbox::{Closed, Outbox};

#[derive(Debug, Error)]
pub enum GpuError {
    #[error(
        "cannot use the NVIDIA driver library {path}: {error}; install the NVIDIA driver, or name its libnvidia-ml.so.1 with --nvml-lib"
    )]
    // Not a `source`: nvml-wrapper's message already repeats its own.
    Init { path: String, error: NvmlError },
    #[error("the NVIDIA driver does not list its GPUs")]
    List(#[source] NvmlError),
    #[error("the NVIDIA driver library does not answer")]
    Hangs,
    #[error("cannot start the thread {name}")]
    Thread { name: String, source: std::io::Error },
}

/// What reading one GPU may take.
pub fn limits(config: &Config) -> budget::Limits {
    budget::Limits { cpu_percent: config.gpu_budget_percent, wait_percent: config.gpu_wait_percent }
}

/// What every thread here has.
pub struct Context {
    to: Outbox,
    health: Arc<Health>,
    stop: Arc<AtomicBool>,
    slots: Slots,
    /// MIG devices by GPU, from a thread that ended with its library to the next.
    mig_left: Mutex<HashMap<Arc<str>, mig::Left>>,
    procfs: PathBuf,
    limits: budget::Limits,
    pids: Arc<PidCheck>,
}

impl Context {
    pub fn new(config: &Config, to: &Outbox, health: &Arc<Health>, stop: &Arc<AtomicBool>) -> Result<Self, GpuError> {
        let stopping = Arc::clone(stop);
        let pids = PidCheck::start(config, to, health, move || stopping.load(Ordering::Relaxed))?;
        Ok(Self {
            to: to.clone(),
            health: Arc::clone(health),
            stop: Arc::clone(stop),
            slots: Slots::default(),
            mig_left: Mutex::default(),
            procfs: config.path_procfs.clone(),
            limits: limits(config),
            pids,
        })
    }

    /// A poll's batch: the pids that it names are checked, and it goes to the core.
    fn polled(&self, batch: GpuBatch) -> Result<(), Closed> {
        self.pids.names(&batch);
        self.to.observe(Observation::from(batch))
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Loads the library. May hang in the driver.
fn open(lib: Option<&Path>) -> Result<Nvml, GpuError> {
    // The file name that the driver installs; `libnvidia-ml.so` alone exists only with the development files.
    let path = lib.map_or_else(|| std::ffi::OsStr::new("libnvidia-ml.so.1"), Path::as_os_str);
    Nvml::builder().lib_path(path).init().map_err(|error| GpuError::Init { path: path.to_string_lossy().into_owned(), error })
}

fn spawn(name: &str, f: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, GpuError> {
    let name = name.to_owned();
    std::thread::Builder::new().name(name.clone()).spawn(f).map_err(|source| GpuError::Thread { name, source })
}

/// Empty, and as yet without an end.
fn batch(slot: usize, began: BootNs, answer: Answer) -> GpuBatch {
    GpuBatch {
        gpu: slot,
        began,
        ring_began: began,
        ended: began,
        wall: WallTime::default(),
        answer,
        ticks: Vec::new(),
        engine_ticks: Vec::new(),
        rows: Vec::new(),
        rejected: [0; Rejected::ALL.len()],
        stepped: false,
        gpm: None,
        processes: None,
        readings: None,
    }
}
