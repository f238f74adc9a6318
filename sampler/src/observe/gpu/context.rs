//! The state shared by the threads that read GPUs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sampler_core::observation::{GpuBatch, Observation};

use super::budget::Limits;
use super::error::GpuError;
use super::mig::RetiredMigs;
use super::pid_space::PidCheck;
use super::slots::Slots;
use crate::config::{Config, SampleSource};
use crate::health::Health;
use crate::inbox::{Closed, CoreSender};

/// The limits for reading one GPU.
pub fn limits(config: &Config) -> Limits {
    Limits { cpu_percent: config.gpu_budget_percent, wait_percent: config.gpu_wait_percent }
}

/// Folders that may have the device nodes; none if only NVML is to be used.
pub fn devfs(config: &Config) -> Vec<PathBuf> {
    match config.sample_source {
        SampleSource::Auto => config.devfs_candidates(),
        SampleSource::Nvml => Vec::new(),
    }
}

/// The shared state.
pub struct Context {
    pub to: CoreSender,
    pub health: Arc<Health>,
    pub stop: Arc<AtomicBool>,
    pub slots: Slots,
    /// MIG devices by GPU, passed from a thread that ended with its library to its successor.
    pub mig_left: Mutex<HashMap<Arc<str>, RetiredMigs>>,
    pub procfs: PathBuf,
    /// Folders that may have the device nodes, for the driver's own sample buffer; empty if it is not to be used.
    pub devfs: Vec<PathBuf>,
    pub limits: Limits,
    pub pids: Arc<PidCheck>,
}

impl Context {
    pub fn new(config: &Config, to: &CoreSender, health: &Arc<Health>, stop: &Arc<AtomicBool>) -> Result<Self, GpuError> {
        let pids = PidCheck::start(config, to, health, Arc::clone(stop))?;
        Ok(Self {
            to: to.clone(),
            health: Arc::clone(health),
            stop: Arc::clone(stop),
            slots: Slots::default(),
            mig_left: Mutex::default(),
            procfs: config.path_procfs.clone(),
            devfs: devfs(config),
            limits: limits(config),
            pids,
        })
    }

    /// Sends the batch of a poll to the core and its PIDs to the PID check.
    pub fn polled(&self, batch: GpuBatch) -> Result<(), Closed> {
        self.pids.check(&batch);
        self.to.observe_later(Observation::from(batch))
    }

    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
