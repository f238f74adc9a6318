//! One GPU's thread: opens it, polls it, finds it again when it was lost.
//!
//! ```text
//!  open --> polling --GPU_IS_LOST, RESET_REQUIRED--> lost --answers again--> open
//!              \--the driver went or was replaced--> ends; gpu-watch opens the library anew
//! ```

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sampler_core::device::{DeviceReadings, GpuInfo, MigMode};
use sampler_core::observation::{Answer, GpuBatch, Observation};
use sampler_core::units::GpuUuid;

use super::budget::{Budget, Cost, Part};
use super::calls::Buffers;
use super::context::Context;
use super::gpm;
use super::gpu_health::GpuHealth;
use super::library::{Handle, Listen};
use super::mig::{self, MigDevices};
use super::nvml_caller::{DeviceFault, NvmlCaller, cpu_now, error_name};
use super::poll_interval::{Pace, SLOW};
use super::readings::{self, Engines, Processes};
use super::ring::{SampleRing, Tools};
use crate::health::call_watchdog::Caller;
use crate::health::nvml_calls::Call;
use crate::inbox::Closed;
use crate::observe::clock::{boot_now, wall_now};

/// The process list holds a global driver lock for milliseconds: rarely.
const LISTS_EVERY: Duration = Duration::from_secs(2);
const READINGS_EVERY: Duration = Duration::from_secs(1);
const ENGINES_EVERY: Duration = Duration::from_secs(2);
/// MIG mode and MIG devices are changed by people.
const MIG_EVERY: Duration = Duration::from_secs(5);
/// Whether it shall end is looked at this often.
const NAP: Duration = Duration::from_millis(200);
/// As `nice` has it; of this thread alone.
const PRIORITY: i32 = -10;

/// What a poller is started with.
pub struct Start {
    pub handle: Handle,
    pub uuid: Arc<str>,
    /// May change when GPUs come or go.
    pub index: Arc<AtomicU32>,
    pub slot: usize,
    /// Set when the GPU is gone.
    pub end: Arc<AtomicBool>,
}

/// When each kind of extra work was last done.
#[derive(Default)]
struct Done {
    lists: Option<Instant>,
    readings: Option<Instant>,
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
    engines: Engines,
    processes: Processes,
    listed: Option<usize>,
    mig: MigDevices,
    done: Done,
    told: GpuHealth,
    /// Of the verdict on the driver's pids, when the lists were read last.
    pid_space_changes: u64,
}

fn due(last: &mut Option<Instant>, every: Duration) -> bool {
    let is = last.is_none_or(|at| at.elapsed() >= every);
    if is {
        *last = Some(Instant::now());
    }
    is
}

impl Poller {
    pub fn new(context: &Arc<Context>, start: Start, caller: Caller) -> Self {
        let uuid = Arc::clone(&start.uuid);
        let info = GpuInfo {
            uuid: GpuUuid(Arc::clone(&uuid)),
            index: start.index.load(Ordering::Relaxed),
            minor: None,
            mig_uuids: Vec::new(),
            parent: None,
            model: String::new(),
            pci_bus_id: String::new(),
            driver_version: String::new(),
            mig_mode: MigMode::Unsupported,
        };
        Self {
            context: Arc::clone(context),
            told: GpuHealth::new(format!("gpu-{}", start.slot), Arc::clone(&uuid), Arc::clone(&context.health)),
            info: Arc::new(info),
            handle: start.handle.clone(),
            driver: NvmlCaller::new(&uuid, &Arc::new(caller), &context.health),
            buffers: Buffers::default(),
            budget: Budget::new(context.limits, boot_now().0),
            pace: Pace::new(),
            ring: SampleRing::default(),
            engines: Engines::default(),
            processes: Processes::new(context.procfs.clone()),
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
        // GPU nodes keep their processors busy, and a late poll is a sample that may not be told apart. What it takes is budgeted.
        // Not allowed: it is polled all the same.
        let _nice = rustix::process::setpriority_process(None, PRIORITY);
        // Closed: the core has ended, and with it the agent.
        let _closed = self.serve();
    }

    /// Nobody wants what this thread would tell.
    fn is_over(&self) -> bool {
        self.context.stopping() || self.start.end.load(Ordering::Relaxed) || self.handle.generation.is_dead()
    }

    fn serve(&mut self) -> Result<(), Closed> {
        self.told.opened();
        self.open()?;
        while !self.is_over() {
            let cpu = cpu_now();
            let interval = match self.driver.trouble() {
                Some(DeviceFault::Dead) => {
                    self.handle.generation.kill();
                    break;
                }
                Some(DeviceFault::Lost) => self.find_again()?,
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
            self.told.gone();
        } else {
            let left = (Arc::clone(&self.start.uuid), self.mig.left());
            self.context.mig_left.lock().unwrap_or_else(PoisonError::into_inner).extend([left]);
        }
        Ok(())
    }

    /// Reads what the device is and tells of it.
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
        // Its ring and clock may be others.
        (self.ring, self.engines, self.done) = (SampleRing::default(), Engines::default(), Done::default());
        self.tell()
    }

    fn tell(&self) -> Result<(), Closed> {
        if self.is_over() {
            return Ok(());
        }
        let (gpu, info) = (self.start.slot, Arc::clone(&self.info));
        self.context.to.observe(Observation::GpuFound { gpu, info, at: boot_now() })
    }

    /// Another GPU came or went before it.
    fn look_at_index(&mut self) -> Result<(), Closed> {
        let index = self.start.index.load(Ordering::Relaxed);
        if index == self.info.index {
            return Ok(());
        }
        Arc::make_mut(&mut self.info).index = index;
        self.tell()
    }

    fn in_mig_mode(&self) -> bool {
        self.info.mig_mode == MigMode::Enabled
    }

    /// Takes what calls took since the last time out of this part's budget.
    fn spend(&mut self, part: Part, own: Duration) {
        let spent = self.driver.take_spent();
        self.budget.spend(part, boot_now().0, Cost { cpu: spent.cpu + own, wait: spent.wall });
    }

    /// One poll; until the next.
    fn poll(&mut self, cpu: Duration) -> Result<Duration, Closed> {
        let mut in_calls = Duration::ZERO;
        // What opening took is a reading.
        self.spent_in_calls(Part::Readings, &mut in_calls);
        self.look_at_index()?;
        let mut batch = GpuBatch::new(self.start.slot, boot_now(), Answer::Unsupported);
        // The ring comes last: the end of the batch bounds the age of its newest sample.
        self.extras(&mut batch, &mut in_calls);
        let mut error = None;
        batch.ring_began = boot_now();
        if !self.in_mig_mode() {
            let row_calls = self.budget.row_calls(boot_now().0, self.pace.coverage);
            let (driver, buffers, budget) = (&mut self.driver, &mut self.buffers, &mut self.budget);
            let mut tools = Tools { handle: &self.handle, driver, buffers, budget };
            let (answer, recovered, failed) = self.ring.poll(&mut tools, row_calls, self.listed);
            if recovered.stepped {
                self.engines.stepped();
            }
            if !recovered.process_samples.is_empty() || recovered.samples.iter().any(|tick| tick.busy_percent > 0) {
                self.pace.used();
            }
            let news_every = self.budget.interval(Part::Lists, readings::NEWS_EVERY);
            if self.processes.is_news(recovered.process_samples.iter().map(|row| row.pid), news_every) {
                self.done.lists = None;
                self.processes.want_all();
            }
            batch.answer = answer;
            (batch.samples, batch.process_samples) = (recovered.samples, recovered.process_samples);
            (batch.rejected, batch.stepped) = (recovered.rejected, recovered.stepped);
            error = failed;
        }
        (batch.ended, batch.wall) = (boot_now(), wall_now());
        let answer = batch.answer;
        if self.is_over() {
            return Ok(Duration::ZERO);
        }
        self.context.polled(batch)?;
        // A GPU that is lost is told of as such.
        if self.driver.trouble().is_none() {
            self.told.answered(error.map(|error| error_name(&error)).as_deref());
        }
        let spent = self.driver.take_spent();
        let own = cpu_now().saturating_sub(cpu).saturating_sub(in_calls + spent.cpu);
        self.budget.spend(Part::SampleRing, boot_now().0, Cost { cpu: spent.cpu + own, wait: spent.wall });
        let interval = match answer {
            Answer::Unsupported if self.in_mig_mode() => self.budget.interval(Part::SampleRing, gpm::EVERY),
            Answer::Unsupported => SLOW,
            Answer::Failed if self.told.fails() => SLOW,
            _ => self.pace.ring(&self.ring, &self.budget),
        };
        if let Some(coverage) = self.pace.changed() {
            self.told.coverage(coverage, self.budget.binding(Part::SampleRing));
        }
        let ratios = self.budget.recent_ratios(boot_now().0);
        self.driver.set_pace(interval, ratios);
        Ok(interval)
    }

    /// Lists, readings, engines and MIG devices, each when it is due and affordable.
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
            self.spent_in_calls(Part::Readings, cpu);
        }
        let half_ring = self.ring.half();
        let engines_every = self.budget.interval_of_ring(Part::Engines, ENGINES_EVERY, half_ring);
        if !self.in_mig_mode() && due(&mut self.done.engines, engines_every) {
            batch.engine_samples = self.engines.read(&self.handle, &mut self.driver, &mut self.buffers);
            self.spent_in_calls(Part::Engines, cpu);
        }
        if due(&mut self.done.mig, self.budget.interval(Part::Engines, MIG_EVERY)) {
            let _closed = self.look_at_mig();
            self.spent_in_calls(Part::Engines, cpu);
        }
        if self.in_mig_mode() {
            // In place of the ring, and out of its budget.
            let _closed = self.mig.read(LISTS_EVERY, &mut self.driver, &mut self.buffers, &self.context);
        }
    }

    fn spent_in_calls(&mut self, part: Part, cpu: &mut Duration) {
        let spent = self.driver.take_spent();
        if spent.wall.is_zero() {
            return;
        }
        *cpu += spent.cpu;
        self.budget.spend(part, boot_now().0, Cost { cpu: spent.cpu, wait: spent.wall });
    }

    fn look_at_mig(&mut self) -> Result<(), Closed> {
        let Ok(mode) = mig::mode(&self.handle, &mut self.driver) else { return Ok(()) };
        let mut changed = mode != self.info.mig_mode;
        if changed {
            Arc::make_mut(&mut self.info).mig_mode = mode;
            self.ring = SampleRing::default();
        }
        if mode == MigMode::Enabled {
            changed |= self.mig.look(&self.handle, &self.info, &mut self.driver, &self.context)?;
        } else {
            self.mig.end(&self.context)?;
        }
        if changed {
            Arc::make_mut(&mut self.info).mig_uuids = self.mig.uuids();
            self.tell()?;
        }
        Ok(())
    }

    /// A GPU that was lost: tries it with a fresh handle.
    fn find_again(&mut self) -> Result<Duration, Closed> {
        let uuid = Arc::clone(&self.start.uuid);
        self.told.lost();
        let (ended, wall) = (boot_now(), wall_now());
        // What was read before it was lost is not so any more.
        let readings = Some(DeviceReadings::default());
        let lost = GpuBatch { ended, wall, readings, ..GpuBatch::new(self.start.slot, ended, Answer::Failed) };
        self.context.to.observe(Observation::from(lost))?;
        self.driver.reset();
        let generation = Arc::clone(&self.handle.generation);
        match self.driver.call(Call::GetHandleByUuid, || Handle::by_uuid(&generation, &uuid)) {
            Ok(handle) => {
                self.handle = handle;
                // A handle is had even of a device that does not answer.
                let _memory = readings::memory(&self.handle, &mut self.driver);
            }
            Err(_) if self.driver.trouble().is_none() => self.driver.set_lost(),
            Err(_) => {}
        }
        if self.driver.trouble().is_none() {
            self.told.back();
            self.open()?;
        }
        self.spend(Part::Readings, Duration::ZERO);
        let ratios = self.budget.recent_ratios(boot_now().0);
        self.driver.set_pace(SLOW, ratios);
        Ok(SLOW)
    }
}
