//! GPM: counters of a GPU instance, read twice; the driver says what came between. The only thing that tells how busy a MIG device is.

use std::time::Duration;

use nvml_wrapper::error::{NvmlError, nvml_sym, nvml_try};
use nvml_wrapper_sys::bindings::{nvmlGpmMetricsGet_t, nvmlGpmSample_t, nvmlGpmSupport_t};
use sampler_core::observation::GpmInterval;
use sampler_core::units::BootNs;

use super::library::Handle;
use super::nvml_caller::NvmlCaller;
use crate::health::nvml_calls::Call;
use crate::observe::clock::boot_now;

/// Between two looks: the driver wants more than 0.1 s.
pub const EVERY: Duration = Duration::from_secs(1);
/// NVML_GPM_METRIC_GRAPHICS_UTIL: percent of time in which any engine for compute or graphics was busy.
const GRAPHICS_UTIL: u32 = 1;
/// NVML_GPM_SUPPORT_VERSION and NVML_GPM_METRICS_GET_VERSION.
const VERSION: u32 = 1;

/// Whether this GPU has such counters.
pub fn is_supported(parent: &Handle, driver: &mut NvmlCaller) -> bool {
    let asked = driver.call(Call::GpmQueryDeviceSupport, || {
        let symbol = nvml_sym(parent.generation.lib().nvmlGpmQueryDeviceSupport.as_ref())?;
        let mut support = nvmlGpmSupport_t { version: VERSION, isSupportedDevice: 0 };
        // SAFETY: the handle belongs to this open library, and `support` says its own version.
        nvml_try(unsafe { symbol(parent.pointer(), &raw mut support) })?;
        Ok(support.isSupportedDevice != 0)
    });
    asked.unwrap_or(false)
}

/// Two looks at one GPU instance, the older replaced by each new one.
pub struct Gpm {
    /// Of the GPU, not of the MIG device.
    parent: Handle,
    instance: u32,
    samples: [nvmlGpmSample_t; 2],
    /// When the last look was taken, and in which of the two.
    last: Option<(BootNs, usize)>,
}

// SAFETY: the samples are this object's own, and NVML does not tie them to a thread.
unsafe impl Send for Gpm {}

impl Gpm {
    pub fn new(parent: &Handle, instance: u32) -> Result<Self, NvmlError> {
        let mut gpm = Self { parent: parent.clone(), instance, samples: [std::ptr::null_mut(); 2], last: None };
        let alloc = *nvml_sym(parent.generation.lib().nvmlGpmSampleAlloc.as_ref())?;
        for sample in &mut gpm.samples {
            // SAFETY: `sample` is what the call fills; drop frees it.
            nvml_try(unsafe { alloc(&raw mut *sample) })?;
        }
        Ok(gpm)
    }

    /// Looks; how busy the instance was since the look before, if there was one.
    pub fn look(&mut self, driver: &mut NvmlCaller) -> Result<Option<GpmInterval>, NvmlError> {
        let into = self.last.map_or(0, |(_, n)| 1 - n);
        driver.call(Call::GpmMigSampleGet, || {
            let get = nvml_sym(self.parent.generation.lib().nvmlGpmMigSampleGet.as_ref())?;
            // SAFETY: handle and sample belong to this open library.
            nvml_try(unsafe { get(self.parent.pointer(), self.instance, self.samples[into]) })
        })?;
        let now = boot_now();
        let Some((from, before)) = self.last.replace((now, into)) else { return Ok(None) };
        let percent = driver.call(Call::GpmMetricsGet, || self.metric(before, into))?;
        // Not a number, or out of range, is an answer that says nothing.
        let busy = (0.0..=100.5).contains(&percent).then_some((percent / 100.0).min(1.0));
        Ok(busy.map(|busy_ratio| GpmInterval { from, to: now, busy_ratio }))
    }

    fn metric(&self, first: usize, second: usize) -> Result<f64, NvmlError> {
        let get = nvml_sym(self.parent.generation.lib().nvmlGpmMetricsGet.as_ref())?;
        // SAFETY: numbers and pointers that the driver fills, for which all-zero is a value.
        let mut asked: Box<nvmlGpmMetricsGet_t> = Box::new(unsafe { std::mem::zeroed() });
        (asked.version, asked.numMetrics) = (VERSION, 1);
        (asked.sample1, asked.sample2) = (self.samples[first], self.samples[second]);
        asked.metrics[0].metricId = GRAPHICS_UTIL;
        // SAFETY: both samples belong to this open library, and `asked` says its own version.
        nvml_try(unsafe { get(&raw mut *asked) })?;
        nvml_try(asked.metrics[0].nvmlReturn)?;
        Ok(asked.metrics[0].value)
    }
}

impl Drop for Gpm {
    fn drop(&mut self) {
        let Ok(free) = self.parent.generation.lib().nvmlGpmSampleFree.as_ref() else { return };
        for sample in self.samples.into_iter().filter(|sample| !sample.is_null()) {
            // SAFETY: this library allocated the sample, and nothing uses it again.
            unsafe { free(sample) };
        }
    }
}
