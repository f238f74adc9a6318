//! GPM: busy shares between two samples that the client takes, from the exact timeline. As with all other calls, a sample is of the time
//! up to which the driver serves.

use std::ffi::c_uint;

use nvml_wrapper_sys::bindings::{
    nvmlDevice_t, nvmlGpmMetric_t, nvmlGpmMetricsGet_t, nvmlGpmSample_t, nvmlGpmSupport_t, nvmlReturn_t,
};

use super::{Call, INVALID_ARGUMENT, NOT_SUPPORTED, State, failed, get, guard, nvml, put, version_of};
use crate::model::Engine;
use crate::tally::Reading;

/// The readings of the unit's parts, each with its share of the GPU.
pub type Sample = Vec<(f64, Reading)>;

const VERSION: c_uint = 1;
const GRAPHICS_UTIL: c_uint = 1;
const SM_UTIL: c_uint = 2;
const DRAM_UTIL: c_uint = 10;
/// More than the metrics of any nvml.h.
const METRICS_MAX: c_uint = 1_024;

fn take(call: Call, device: nvmlDevice_t, gi: Option<c_uint>, sample: nvmlGpmSample_t) -> Result<(), nvmlReturn_t> {
    call.on_unit(device, |s, unit| {
        if !*s.driver.world.gpm(unit.gpu) || unit.mig.is_some() {
            return Err(NOT_SUPPORTED);
        }
        let readings = s.driver.readings(unit.gpu, gi).map_err(failed)?;
        if readings.is_empty() {
            return Err(INVALID_ARGUMENT);
        }
        *s.samples.get_mut(&(sample as usize)).ok_or(INVALID_ARGUMENT)? = Some(readings);
        Ok(())
    })
}

/// Percent between two samples, weighted by the size of the parts.
fn percent(before: &Sample, after: &Sample, engine: Engine) -> f64 {
    let (mut busy, mut whole) = (0.0, 0.0);
    for ((part, before), (_, after)) in before.iter().zip(after) {
        busy += part * (after.seconds[engine as usize] - before.seconds[engine as usize]);
        whole += part * (after.at_us.saturating_sub(before.at_us) as f64 / 1e6);
    }
    if whole > 0.0 { busy * 100.0 / whole } else { 0.0 }
}

fn sample(state: &State, handle: nvmlGpmSample_t) -> Result<&Sample, nvmlReturn_t> {
    state.samples.get(&(handle as usize)).and_then(Option::as_ref).ok_or(INVALID_ARGUMENT)
}

nvml! {
    fn nvmlGpmQueryDeviceSupport(call, device: nvmlDevice_t, to: *mut nvmlGpmSupport_t) {
        version_of(to.cast(), VERSION)?;
        call.on_unit(device, |s, unit| {
            let isSupportedDevice = c_uint::from(*s.driver.world.gpm(unit.gpu));
            put(to, nvmlGpmSupport_t { version: VERSION, isSupportedDevice })
        })
    }
    fn nvmlGpmSampleAlloc(call, to: *mut nvmlGpmSample_t) {
        call.on_library(|s| {
            let handle = s.new_handle();
            s.samples.insert(handle, None);
            put(to, handle as nvmlGpmSample_t)
        })
    }
    fn nvmlGpmSampleFree(call, sample: nvmlGpmSample_t) {
        call.on_library(|s| s.samples.remove(&(sample as usize)).map(|_| ()).ok_or(INVALID_ARGUMENT))
    }
    fn nvmlGpmSampleGet(call, device: nvmlDevice_t, sample: nvmlGpmSample_t) { take(call, device, None, sample) }
    fn nvmlGpmMigSampleGet(call, device: nvmlDevice_t, gpu_instance: c_uint, sample: nvmlGpmSample_t) {
        take(call, device, Some(gpu_instance), sample)
    }
    fn nvmlGpmMetricsGet(call, metrics: *mut nvmlGpmMetricsGet_t) {
        version_of(metrics.cast(), VERSION)?;
        call.on_library(|s| {
            // Only these fields: the number of metrics that follow differs between versions of nvml.h.
            // SAFETY: version_of found it not NULL, and the fields before the metrics are the caller's.
            let (count, first, second) = unsafe { ((*metrics).numMetrics, (*metrics).sample1, (*metrics).sample2) };
            let (before, after) = (sample(s, first)?, sample(s, second)?);
            if count > METRICS_MAX || before.len() != after.len() {
                return Err(INVALID_ARGUMENT);
            }
            for at in 0..count as usize {
                // SAFETY: at < numMetrics, and the caller's array has that many elements.
                let to: *mut nvmlGpmMetric_t = unsafe { (&raw mut (*metrics).metrics).cast::<nvmlGpmMetric_t>().add(at) };
                let mut metric = get(to)?;
                let engine = match metric.metricId {
                    GRAPHICS_UTIL | SM_UTIL => Some(Engine::Sm),
                    DRAM_UTIL => Some(Engine::Mem),
                    _ => None,
                };
                metric.nvmlReturn = if engine.is_some() { 0 } else { NOT_SUPPORTED };
                metric.value = engine.map_or(0.0, |engine| percent(before, after, engine));
                put(to, metric)?;
            }
            Ok(())
        })
    }
}
