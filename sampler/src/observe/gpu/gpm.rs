//! GPM: the driver computes metrics from the difference between two samples of a GPU instance's counters. GPM is the only source of the
//! utilization of a MIG device.

use std::time::Duration;

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{nvmlGpmMetricsGet_t, nvmlGpmSample_t, nvmlGpmSupport_t};
use sampler_core::observation::GpmInterval;
use sampler_core::units::BootNs;

use super::library::Handle;
use super::nvml_caller::NvmlCaller;
use crate::health::nvml_calls::Call;
use crate::observe::clock::boot_now;

/// Time between two samples: the driver requires more than 0.1 s.
pub const EVERY: Duration = Duration::from_secs(1);
/// NVML_GPM_METRIC_GRAPHICS_UTIL: percent of time in which any engine for compute or graphics was busy.
const GRAPHICS_UTIL: u32 = 1;
/// NVML_GPM_SUPPORT_VERSION and NVML_GPM_METRICS_GET_VERSION.
const VERSION: u32 = 1;

/// Whether this GPU supports GPM.
pub fn is_supported(parent: &Handle, driver: &mut NvmlCaller) -> bool {
    let supported = driver.call(Call::GpmQueryDeviceSupport, || {
        let symbol = nvml_sym(parent.generation.lib().nvmlGpmQueryDeviceSupport.as_ref())?;
        let mut support = nvmlGpmSupport_t { version: VERSION, isSupportedDevice: 0 };
        // SAFETY: the handle belongs to this open library, and `support` contains its version.
        nvml_try(unsafe { symbol(parent.pointer(), &raw mut support) })?;
        Ok(support.isSupportedDevice != 0)
    });
    supported.unwrap_or(false)
}

/// Two samples of one GPU instance; each new sample replaces the older one.
pub struct Gpm {
    /// The GPU, not the MIG device.
    parent: Handle,
    instance: u32,
    samples: [nvmlGpmSample_t; 2],
    /// The time of the last sample, and its index.
    last: Option<(BootNs, usize)>,
}

// SAFETY: the samples belong to this object, and NVML does not bind them to a thread.
unsafe impl Send for Gpm {}

impl Gpm {
    pub fn new(parent: &Handle, instance: u32) -> Result<Self, NvmlError> {
        let mut gpm = Self { parent: parent.clone(), instance, samples: [std::ptr::null_mut(); 2], last: None };
        let alloc = *nvml_sym(parent.generation.lib().nvmlGpmSampleAlloc.as_ref())?;
        for sample in &mut gpm.samples {
            // SAFETY: `sample` is the output argument of the call; drop frees it.
            nvml_try(unsafe { alloc(&raw mut *sample) })?;
        }
        Ok(gpm)
    }

    /// Takes a sample; returns the utilization since the previous sample, if there was one.
    pub fn sample(&mut self, driver: &mut NvmlCaller) -> Result<Option<GpmInterval>, NvmlError> {
        let into = self.last.map_or(0, |(_, n)| 1 - n);
        driver.call(Call::GpmMigSampleGet, || {
            let get = nvml_sym(self.parent.generation.lib().nvmlGpmMigSampleGet.as_ref())?;
            // SAFETY: handle and sample belong to this open library.
            nvml_try(unsafe { get(self.parent.pointer(), self.instance, self.samples[into]) })
        })?;
        let now = boot_now();
        let Some((from, before)) = self.last.replace((now, into)) else { return Ok(None) };
        let percent = driver.call(Call::GpmMetricsGet, || self.metric(before, into))?;
        // NaN and values out of range are discarded.
        let busy = (0.0..=100.5).contains(&percent).then_some((percent / 100.0).min(1.0));
        Ok(busy.map(|busy_ratio| GpmInterval { from, to: now, busy_ratio }))
    }

    fn metric(&self, first: usize, second: usize) -> Result<f64, NvmlError> {
        let get = nvml_sym(self.parent.generation.lib().nvmlGpmMetricsGet.as_ref())?;
        // SAFETY: consists of numbers and pointers, for which all-zero bytes are valid.
        let mut request: Box<nvmlGpmMetricsGet_t> = Box::new(unsafe { std::mem::zeroed() });
        (request.version, request.numMetrics) = (VERSION, 1);
        (request.sample1, request.sample2) = (self.samples[first], self.samples[second]);
        request.metrics[0].metricId = GRAPHICS_UTIL;
        // SAFETY: both samples belong to this open library, and `request` contains its version.
        nvml_try(unsafe { get(&raw mut *request) })?;
        nvml_try(request.metrics[0].nvmlReturn)?;
        Ok(request.metrics[0].value)
    }
}

impl Drop for Gpm {
    fn drop(&mut self) {
        let Ok(free) = self.parent.generation.lib().nvmlGpmSampleFree.as_ref() else { return };
        for sample in self.samples.into_iter().filter(|sample| !sample.is_null()) {
            // SAFETY: this library allocated the sample, and it is not used again.
            unsafe { free(sample) };
        }
    }
}
