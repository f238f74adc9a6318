//! The MIG devices of one GPU, read by the thread of that GPU. For MIG devices the driver has no device samples and no process samples,
//! but process lists, memory, and, since Hopper, GPM counters of each GPU instance.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvml_wrapper::error::NvmlError;
use sampler_core::device::{GpuInfo, MigMode};
use sampler_core::observation::{GpmInterval, GpuBatch, Observation, PollStatus};
use sampler_core::units::GpuUuid;

use super::calls::Buffers;
use super::context::Context;
use super::gpm::{self, Gpm};
use super::library::Handle;
use super::nvml_caller::{NvmlCaller, is_unsupported};
use super::readings::{self, Processes};
use crate::health::nvml_calls::Call;
use crate::inbox::Closed;
use crate::observe::clock::{boot_now, wall_now};

/// Maximum number of MIG devices per GPU in NVML; a larger count from a driver is cut to this.
const MOST_DEVICES: u32 = 64;

struct MigDevice {
    slot: usize,
    uuid: String,
    handle: Handle,
    driver: NvmlCaller,
    processes: Processes,
    gpm: Option<Gpm>,
    listed: Option<Instant>,
}

/// A MIG device found by listing.
struct DiscoveredMig {
    uuid: String,
    handle: Handle,
    model: String,
    instance: Option<u32>,
}

/// (UUID, slot) of MIG devices that were read through a library that is no longer used.
pub type RetiredMigs = Vec<(String, usize)>;

#[derive(Default)]
pub struct MigDevices {
    devices: Vec<MigDevice>,
    before: RetiredMigs,
}

/// Whether the GPU is in MIG mode.
pub fn mode(handle: &Handle, driver: &mut NvmlCaller) -> Result<MigMode, NvmlError> {
    match driver.call(Call::GetMigMode, || handle.device().mig_mode()) {
        Ok(mode) if mode.current == 1 => Ok(MigMode::Enabled),
        Ok(_) => Ok(MigMode::Disabled),
        Err(error) if is_unsupported(&error) => Ok(MigMode::Unsupported),
        Err(error) => Err(error),
    }
}

pub fn report_gone(context: &Context, uuid: &str, slot: usize) -> Result<(), Closed> {
    context.slots.gone(uuid);
    context.health.driver.forget(uuid);
    tracing::info!(uuid, "MIG device gone");
    context.to.observe(Observation::GpuGone { gpu: slot, at: boot_now() })
}

fn find(parent: &Handle, driver: &mut NvmlCaller) -> Result<Vec<DiscoveredMig>, NvmlError> {
    let count = driver.call(Call::GetMigDevices, || parent.device().mig_device_count())?;
    let mut all = Vec::new();
    for index in 0..count.min(MOST_DEVICES) {
        // There may be no device at an index.
        let found = driver.call(Call::GetMigDevices, || match parent.mig(index) {
            Ok(handle) => Ok(Some((handle.device().uuid()?, handle))),
            Err(NvmlError::NotFound | NvmlError::InvalidArg) => Ok(None),
            Err(error) => Err(error),
        })?;
        let Some((uuid, handle)) = found else { continue };
        let model = driver.call(Call::GetInfo, || handle.device().name()).unwrap_or_default();
        let instance = driver.call(Call::GetGpuInstanceId, || handle.gpu_instance()).ok();
        all.push(DiscoveredMig { uuid, handle, model, instance });
    }
    Ok(all)
}

impl MigDevices {
    /// `before`: the result of [`MigDevices::left`] for the same GPU.
    pub fn after(before: RetiredMigs) -> Self {
        Self { devices: Vec::new(), before }
    }

    /// The devices, which continue to exist until a later list does not contain them.
    pub fn left(&mut self) -> RetiredMigs {
        let before = std::mem::take(&mut self.before);
        before.into_iter().chain(self.devices.drain(..).map(|device| (device.uuid, device.slot))).collect()
    }

    pub fn uuids(&self) -> Vec<String> {
        self.devices.iter().map(|device| device.uuid.clone()).collect()
    }

    /// Lists the MIG devices and reports added and removed ones; returns whether there were any.
    pub fn update(
        &mut self,
        parent: &Handle,
        info: &GpuInfo,
        driver: &mut NvmlCaller,
        context: &Context,
    ) -> Result<bool, Closed> {
        // A failed list does not mean that devices were removed.
        let Ok(found) = find(parent, driver) else { return Ok(false) };
        let before = self.uuids();
        for device in self.devices.extract_if(.., |d| !found.iter().any(|f| f.uuid == d.uuid)) {
            report_gone(context, &device.uuid, device.slot)?;
        }
        for (uuid, slot) in self.before.drain(..).filter(|(uuid, _)| !found.iter().any(|f| f.uuid == *uuid)) {
            report_gone(context, &uuid, slot)?;
        }
        let mut sharing: HashMap<u32, usize> = HashMap::new();
        for instance in found.iter().filter_map(|f| f.instance) {
            *sharing.entry(instance).or_default() += 1;
        }
        for found in found {
            if self.devices.iter().any(|d| d.uuid == found.uuid) {
                continue;
            }
            // The counters belong to the instance: if several devices share it, its time cannot be assigned to one of them.
            let alone = found.instance.filter(|instance| sharing[instance] == 1);
            let gpm = alone.filter(|_| gpm::is_supported(parent, driver)).and_then(|instance| Gpm::new(parent, instance).ok());
            let slot = context.slots.take(&found.uuid);
            let info = GpuInfo {
                uuid: GpuUuid(found.uuid.as_str().into()),
                parent: Some(info.uuid.clone()),
                gpu_instance: found.instance,
                model: found.model,
                mig_uuids: Vec::new(),
                ..info.clone()
            };
            tracing::info!(uuid = found.uuid, gpu = %info.index, model = info.model, gpm = gpm.is_some(), "MIG device found");
            context.to.observe(Observation::GpuFound { gpu: slot, info: Arc::new(info), at: boot_now() })?;
            self.devices.push(MigDevice {
                slot,
                driver: NvmlCaller::new(&found.uuid, &driver.caller, &context.health),
                uuid: found.uuid,
                handle: found.handle,
                processes: Processes::new(context.procfs.clone()),
                gpm,
                listed: None,
            });
        }
        Ok(self.uuids() != before)
    }

    /// Reads all MIG devices.
    pub fn read(
        &mut self,
        lists_every: Duration,
        driver: &mut NvmlCaller,
        buffers: &mut Buffers,
        context: &Context,
    ) -> Result<(), Closed> {
        for device in &mut self.devices {
            let batch = device.read(lists_every, buffers);
            driver.spent += device.driver.take_spent();
            // A lost or destroyed MIG device is detected through its GPU.
            device.driver.fault = None;
            context.polled(batch)?;
        }
        Ok(())
    }

    pub fn end(&mut self, context: &Context) -> Result<(), Closed> {
        self.left().into_iter().try_for_each(|(uuid, slot)| report_gone(context, &uuid, slot))
    }
}

impl MigDevice {
    fn read(&mut self, lists_every: Duration, buffers: &mut Buffers) -> GpuBatch {
        let began = boot_now();
        let mut processes = None;
        let mut readings = None;
        if self.listed.is_none_or(|at| at.elapsed() >= lists_every) {
            self.listed = Some(Instant::now());
            processes = self.processes.list(&self.handle, &mut self.driver, buffers);
            readings = Some(readings::memory(&self.handle, &mut self.driver));
        }
        let (status, gpm) = self.utilization();
        let (ended, wall) = (boot_now(), wall_now());
        GpuBatch { processes, readings, gpm, ended, wall, ..GpuBatch::new(self.slot, began, status) }
    }

    fn utilization(&mut self) -> (PollStatus, Option<GpmInterval>) {
        let Some(gpm) = &mut self.gpm else { return (PollStatus::Unsupported, None) };
        match gpm.sample(&mut self.driver) {
            Ok(interval) => (PollStatus::Samples, interval),
            Err(error) if is_unsupported(&error) => (PollStatus::Unsupported, None),
            Err(_) => (PollStatus::Failed, None),
        }
    }
}
