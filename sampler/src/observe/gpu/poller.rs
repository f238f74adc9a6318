//! The thread of one GPU: opens it and polls it.
//!
//! ```text
//!  open --> polling --GPU_IS_LOST, RESET_REQUIRED--> ends; gpu-watch closes its handles, and opens it again later
//!              \--the driver was unloaded or replaced--> ends; gpu-watch reopens the library
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sampler_core::device::{DeviceReadings, GpuInfo, HardwareReadings, MigMode};
use sampler_core::observation::{BusyLatch, GpuBatch, Observation, PollStatus};
use sampler_core::reconstruct::Recovered;
use sampler_core::units::GpuUuid;

use super::budget::{Budget, Cost, Part};
use super::calls::Buffers;
use super::context::Context;
use super::fields::FieldReader;
use super::gpm;
use super::gpu_health::GpuHealth;
use super::latch::Latch;
use super::library::{Handle, Listen};
use super::mig::{self, MigDevices};
use super::nvml_caller::{DeviceFault, NvmlCaller, error_name};
use super::poll_interval::{Pace, SLOW};
use super::process_calls::ProcessCalls;
use super::readings::{self, Engines, Processes};
use super::ring::{SampleRing, Tools};
use crate::health::call_watchdog::Caller;
use crate::health::nvml_calls::Call;
use crate::inbox::Closed;
use crate::observe::clock::{boot_now, cpu_now, wall_now};

/// The process list holds a global driver lock for milliseconds, so it is read rarely.
const LISTS_EVERY: Duration = Duration::from_secs(2);
const READINGS_EVERY: Duration = Duration::from_secs(1);
/// Counts and states, which no other reading depends on.
const HARDWARE_EVERY: Duration = Duration::from_secs(5);
const ENGINES_EVERY: Duration = Duration::from_secs(2);
/// MIG mode and MIG devices are changed manually.
const MIG_EVERY: Duration = Duration::from_secs(5);
/// How often the thread checks whether it should end.
const NAP: Duration = Duration::from_millis(200);
/// Nice value of this thread.
const PRIORITY: i32 = -10;

/// The inputs of a poller.
pub struct Start {
    pub handle: Handle,
    pub uuid: Arc<str>,
    /// May change when GPUs come or go.
    pub index: Arc<AtomicU32>,
    pub slot: usize,
    /// Set when the GPU was removed.
    pub end: Arc<AtomicBool>,
    /// Set by the thread if the GPU is lost.
    pub lost: Arc<AtomicBool>,
}

/// When each kind of additional work was last done.
#[derive(Default)]
struct Done {
    lists: Option<Instant>,
    readings: Option<Instant>,
    hardware: Option<Instant>,
    engines: Option<Instant>,
    mig: Option<Instant>,
}

pub struct Poller {
    context: Arc<Context>,
    start: Start,
    info: Arc<GpuInfo>,
    handle: Handle,
    driver: NvmlCaller,
    buffers: Buffers,
    budget: Budget,
    pace: Pace,
    ring: SampleRing,
    process_calls: ProcessCalls,
    latch: Latch,
    engines: Engines,
    processes: Processes,
    fields: FieldReader,
    listed: Option<usize>,
    mig: MigDevices,
    done: Done,
    health: GpuHealth,
    /// Changes of the PID space verdict, when the lists were last read.
    pid_space_changes: u64,
}

fn due(last: &mut Option<Instant>, every: Duration) -> bool {
    let is_due = last.is_none_or(|at| at.elapsed() >= every);
    if is_due {
        *last = Some(Instant::now());
    }
    is_due
}

impl Poller {
    pub fn new(context: &Arc<Context>, start: Start, caller: Caller) -> Self {
        let uuid = Arc::clone(&start.uuid);
        let info = GpuInfo { uuid: GpuUuid(Arc::clone(&uuid)), index: start.index.load(Ordering::Relaxed), ..GpuInfo::default() };
        Self {
            context: Arc::clone(context),
            health: GpuHealth::new(start.slot, Arc::clone(&uuid), Arc::clone(&context.health)),
            info: Arc::new(info),
            handle: start.handle.clone(),
            driver: NvmlCaller::new(&uuid, &Arc::new(caller), &context.health),
            buffers: Buffers::default(),
            budget: Budget::new(context.limits, boot_now().0),
            pace: Pace::new(),
            ring: SampleRing::default(),
            process_calls: ProcessCalls::default(),
            latch: Latch::default(),
            engines: Engines::default(),
            processes: Processes::new(context.procfs.clone()),
            fields: FieldReader::default(),
            listed: None,
            mig: MigDevices::after(
                context.mig_left.lock().unwrap_or_else(PoisonError::into_inner).remove(&start.uuid).unwrap_or_default(),
            ),
            done: Done::default(),
            pid_space_changes: 0,
            start,
        }
    }

    pub fn run(mut self) {
        // The processors of GPU nodes are busy, and a late poll may make samples indistinguishable. The cost is budgeted. Without the
        // permission, polling continues at normal priority.
        let _nice = rustix::process::setpriority_process(None, PRIORITY);
        // Closed: the core has ended, and with it the agent.
        let _closed = self.serve();
    }

    /// Whether the results of this thread are no longer needed.
    fn is_over(&self) -> bool {
        self.context.stopping() || self.start.end.load(Ordering::Relaxed) || self.handle.generation.is_dead()
    }

    fn serve(&mut self) -> Result<(), Closed> {
        self.health.opened();
        self.open()?;
        while !self.is_over() {
            let cpu = cpu_now();
            let interval = match self.driver.fault {
                Some(DeviceFault::Dead) => {
                    self.handle.generation.kill();
                    break;
                }
                Some(DeviceFault::Lost) => {
                    self.report_lost()?;
                    self.start.lost.store(true, Ordering::Relaxed);
                    break;
                }
                None => self.poll(cpu)?,
            };
            let until = self.pace.next(interval);
            while !self.is_over()
                && let left = until.saturating_duration_since(Instant::now())
                && !left.is_zero()
            {
                std::thread::sleep(left.min(NAP));
            }
        }
        if self.start.end.load(Ordering::Relaxed) {
            self.mig.end(&self.context)?;
            self.health.gone();
        } else {
            let left = (Arc::clone(&self.start.uuid), self.mig.left());
            self.context.mig_left.lock().unwrap_or_else(PoisonError::into_inner).extend([left]);
        }
        Ok(())
    }

    /// Reads the properties of the device and reports it to the core.
    fn open(&mut self) -> Result<(), Closed> {
        let device = self.handle.device();
        let model = self.driver.call(Call::GetInfo, || device.name()).ok();
        let pci = self.driver.call(Call::GetInfo, || device.pci_info()).ok();
        let minor = self.driver.call(Call::GetInfo, || device.minor_number()).ok();
        let version = self.driver.call(Call::GetInfo, || self.handle.generation.nvml().sys_driver_version()).ok();
        let mode = mig::mode(&self.handle, &mut self.driver);
        self.info = Arc::new(GpuInfo {
            minor,
            model: model.unwrap_or_default(),
            pci_bus_id: pci.map(|p| p.bus_id).unwrap_or_default(),
            driver_version: version.unwrap_or_default(),
            mig_mode: mode.unwrap_or(MigMode::Unsupported),
            ..GpuInfo::clone(&self.info)
        });
        let listen = Listen { slot: self.start.slot, uuid: Arc::clone(&self.start.uuid), device: self.handle.raw() };
        self.handle.generation.listen.lock().unwrap_or_else(PoisonError::into_inner).push(listen);
        // The ring and the clock of the device may have changed.
        (self.ring, self.engines, self.done) = (SampleRing::default(), Engines::default(), Done::default());
        self.announce()
    }

    fn announce(&self) -> Result<(), Closed> {
        if self.is_over() {
            return Ok(());
        }
        let (gpu, info) = (self.start.slot, Arc::clone(&self.info));
        self.context.to.observe(Observation::GpuFound { gpu, info, at: boot_now() })
    }

    /// The index changes when a GPU with a lower index is added or removed.
    fn update_index(&mut self) -> Result<(), Closed> {
        let index = self.start.index.load(Ordering::Relaxed);
        if index == self.info.index {
            return Ok(());
        }
        Arc::make_mut(&mut self.info).index = index;
        self.announce()
    }

    fn in_mig_mode(&self) -> bool {
        self.info.mig_mode == MigMode::Enabled
    }

    /// Polls once; returns the interval to the next poll.
    fn poll(&mut self, cpu: Duration) -> Result<Duration, Closed> {
        let mut in_calls = Duration::ZERO;
        // The cost of opening is charged to readings.
        self.spent_in_calls(Part::Readings, &mut in_calls);
        self.update_index()?;
        let mut batch = GpuBatch::new(self.start.slot, boot_now(), PollStatus::Unsupported);
        // The ring comes last: the end of the batch bounds the age of its newest sample.
        self.extras(&mut batch, &mut in_calls);
        let mut error = None;
        batch.ring_began = boot_now();
        if !self.in_mig_mode() {
            self.choose_source();
            let process_queries = self.budget.process_queries(boot_now().0, self.pace.coverage);
            let (driver, buffers, budget) = (&mut self.driver, &mut self.buffers, &mut self.budget);
            let mut tools = Tools { handle: &self.handle, driver, buffers, budget, process_calls: &mut self.process_calls };
            let (status, recovered, failed) = self.ring.poll(&mut tools, process_queries, self.listed);
            if !self.ring.is_complete() {
                self.verify_process_call(&recovered);
            }
            // Without a call that names processes, none of them means nothing.
            if self.ring.is_complete() || self.process_calls.is_supported {
                batch.latch = self.latch.update(&recovered, &self.handle, &mut self.driver);
            }
            self.health.latch(batch.latch == BusyLatch::Latched);
            if recovered.stepped {
                self.engines.stepped();
            }
            if !recovered.process_samples.is_empty() || recovered.samples.iter().any(|sample| sample.busy_percent > 0) {
                self.pace.used();
            }
            let early_every = self.budget.interval(Part::Lists, readings::EARLY_LISTS_EVERY);
            if self.processes.has_unlisted(recovered.process_samples.iter().map(|sample| sample.pid), early_every) {
                self.done.lists = None;
                self.processes.want_all();
            }
            self.driver.calls.set_sample_buffer(Some(self.ring.is_complete()));
            if let Some(samples) = self.ring.take_engine_samples() {
                batch.engine_samples = samples;
            }
            batch.status = status;
            (batch.samples, batch.process_samples) = (recovered.samples, recovered.process_samples);
            (batch.rejected, batch.stepped) = (recovered.rejected, recovered.stepped);
            error = failed;
        }
        (batch.ended, batch.wall) = (boot_now(), wall_now());
        let status = batch.status;
        if self.is_over() {
            return Ok(Duration::ZERO);
        }
        self.context.polled(batch)?;
        // A lost GPU is reported separately.
        if self.driver.fault.is_none() {
            self.health.polled(error.map(|error| error_name(&error)).as_deref());
        }
        let spent = self.driver.take_spent();
        let own_cpu = cpu_now().saturating_sub(cpu).saturating_sub(in_calls + spent.cpu);
        self.budget.spend(Part::SampleRing, boot_now().0, Cost { cpu: spent.cpu + own_cpu, ..spent });
        let interval = match status {
            PollStatus::Unsupported if self.in_mig_mode() => self.budget.interval(Part::SampleRing, gpm::EVERY),
            PollStatus::Unsupported => SLOW,
            PollStatus::Failed if self.health.fails() => SLOW,
            _ => self.pace.ring(&self.ring, &self.budget),
        };
        if let Some(coverage) = self.pace.changed() {
            self.health.coverage(coverage, self.budget.binding(Part::SampleRing));
        }
        let ratios = self.budget.recent_ratios(boot_now().0);
        self.driver.calls.set_pace(interval, ratios);
        Ok(interval)
    }

    fn choose_source(&mut self) {
        let (driver, buffers, budget) = (&mut self.driver, &mut self.buffers, &mut self.budget);
        let mut tools = Tools { handle: &self.handle, driver, buffers, budget, process_calls: &mut self.process_calls };
        let uuid = &self.info.uuid;
        match self.ring.choose_source(&mut tools, &self.context.devfs, &self.info.pci_bus_id) {
            Some(Ok(())) => {
                self.engines.stepped();
                tracing::info!(%uuid, "samples are read from the driver's own buffer");
            }
            Some(Err(reason)) => {
                // The first read of an engine's own buffer only sets its watermark.
                self.engines.stepped();
                tracing::info!(%uuid, reason, "samples are read through NVML, not from the driver's own buffer");
            }
            None => {}
        }
    }

    fn verify_process_call(&mut self, recovered: &Recovered) {
        let used = self.process_calls.verify(recovered, &self.handle, &mut self.driver, &mut self.buffers);
        if let Some(used) = used.map(|used| used.call().name()) {
            let uuid = &self.info.uuid;
            tracing::warn!(%uuid, used, "the driver's other call for process utilization names no process while the GPU is busy");
        }
    }

    /// Reads lists, readings, engines and MIG devices, each when it is due and within its budget.
    fn extras(&mut self, batch: &mut GpuBatch, cpu: &mut Duration) {
        let lists = self.budget.interval(Part::Lists, LISTS_EVERY);
        let changes = self.context.pids.changes();
        if std::mem::replace(&mut self.pid_space_changes, changes) != changes {
            self.done.lists = None;
        }
        if !self.in_mig_mode() && due(&mut self.done.lists, lists) {
            batch.processes = self.processes.list(&self.handle, &mut self.driver, &mut self.buffers);
            self.listed = batch.processes.as_ref().map(Vec::len);
            if self.listed.is_some_and(|n| n > 0) {
                self.pace.used();
            }
            self.spent_in_calls(Part::Lists, cpu);
        }
        if due(&mut self.done.readings, self.budget.interval(Part::Readings, READINGS_EVERY)) {
            batch.readings = Some(readings::readings(&self.handle, &mut self.driver));
            if due(&mut self.done.hardware, HARDWARE_EVERY) {
                batch.hardware = Some(self.fields.hardware(&self.handle, &mut self.driver));
                batch.throttle_times = Some(self.fields.throttle_times(&self.handle, &mut self.driver));
            }
            self.spent_in_calls(Part::Readings, cpu);
        }
        let half_ring = self.ring.half();
        let engines_every = self.budget.interval_of_ring(Part::Engines, ENGINES_EVERY, half_ring);
        if !self.in_mig_mode() && !self.ring.is_complete() && due(&mut self.done.engines, engines_every) {
            batch.engine_samples = self.engines.read(&self.handle, &mut self.driver, &mut self.buffers);
            self.spent_in_calls(Part::Engines, cpu);
        }
        if due(&mut self.done.mig, self.budget.interval(Part::Engines, MIG_EVERY)) {
            let _closed = self.update_mig();
            self.spent_in_calls(Part::Engines, cpu);
        }
        if self.in_mig_mode() {
            // Instead of the ring, and charged to its budget.
            let _closed = self.mig.read(LISTS_EVERY, &mut self.driver, &mut self.buffers, &self.context);
        }
    }

    /// Charges the cost of calls since the last charge to the budget of this part, and adds their processor time to `cpu`.
    fn spent_in_calls(&mut self, part: Part, cpu: &mut Duration) {
        let spent = self.driver.take_spent();
        if spent.wait.is_zero() {
            return;
        }
        *cpu += spent.cpu;
        self.budget.spend(part, boot_now().0, spent);
    }

    fn update_mig(&mut self) -> Result<(), Closed> {
        let Ok(mode) = mig::mode(&self.handle, &mut self.driver) else { return Ok(()) };
        let mut changed = mode != self.info.mig_mode;
        if changed {
            Arc::make_mut(&mut self.info).mig_mode = mode;
            self.ring = SampleRing::default();
            self.latch = Latch::default();
            self.health.latch(false);
            self.driver.calls.set_sample_buffer(None);
        }
        if mode == MigMode::Enabled {
            changed |= self.mig.update(&self.handle, &self.info, &mut self.driver, &self.context)?;
        } else {
            self.mig.end(&self.context)?;
        }
        if changed {
            Arc::make_mut(&mut self.info).mig_uuids = self.mig.uuids();
            self.announce()?;
        }
        Ok(())
    }

    /// The thread ends, so that the handles of the lost GPU are closed; gpu-watch opens it again when it is back.
    fn report_lost(&mut self) -> Result<(), Closed> {
        self.health.lost();
        let (ended, wall) = (boot_now(), wall_now());
        // The readings from before the loss are outdated.
        let readings = Some(DeviceReadings::default());
        let hardware = Some(HardwareReadings::default());
        let lost = GpuBatch { ended, wall, readings, hardware, ..GpuBatch::new(self.start.slot, ended, PollStatus::Failed) };
        self.context.to.observe(Observation::from(lost))
    }
}
