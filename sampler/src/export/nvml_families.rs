//! Metric families about driver calls: what they cost, what they refuse, whether one hangs.

use super::encode::Families;
use crate::health::CALL_BOUNDS;
use crate::health::nvml_calls::DeviceView;

/// `limits`: of processor time and of time in calls, percent.
pub fn calls(devices: &[DeviceView], limits: [f64; 2], to: &mut Families) {
    let mut times = to.histogram("gpu_sampler_nvml_call_seconds", "Duration of driver calls.");
    for device in devices {
        for (call, t) in &device.calls {
            times.add_histogram(&[("uuid", &device.uuid), ("call", call)], &CALL_BOUNDS, &t.buckets, t.sum_seconds, t.count);
        }
    }
    let mut errors = to.counter("gpu_sampler_nvml_errors_total", "Driver calls that failed.");
    for device in devices {
        for (call, error, n) in &device.errors {
            errors.add(&[("uuid", &device.uuid), ("call", call), ("error", error)], *n as f64);
        }
    }
    let mut supported = to.gauge("gpu_sampler_nvml_supported", "Whether the driver serves this call for this device.");
    for device in devices {
        for (call, is) in &device.supported {
            supported.add(&[("uuid", &device.uuid), ("call", call)], f64::from(u8::from(*is)));
        }
    }
    let mut stalled = to.gauge("gpu_sampler_nvml_stalled", "1 while a driver call for this GPU has not returned for 2 s.");
    for device in devices {
        stalled.add_known(&[("uuid", &device.uuid)], device.stalled.map(|is| f64::from(u8::from(is))));
    }
    let mut interval = to.gauge("gpu_sampler_poll_interval_seconds", "How often the driver's samples of this GPU are read.");
    for device in devices {
        interval.add_known(&[("uuid", &device.uuid)], device.poll_interval_seconds);
    }
    let mut busy = to.gauge("gpu_sampler_nvml_busy_ratio", "Share of the past 30 s that was spent in driver calls for this GPU.");
    for device in devices {
        busy.add_known(&[("uuid", &device.uuid)], device.busy_ratio);
    }
    let mut cpu =
        to.gauge("gpu_sampler_gpu_cpu_ratio", "Processor time of reading this GPU over the past 30 s, of one processor.");
    for device in devices {
        cpu.add_known(&[("uuid", &device.uuid)], device.cpu_ratio);
    }
    let [cpu_percent, wait_percent] = limits;
    to.gauge(
        "gpu_sampler_gpu_budget_ratio",
        "Processor time that reading one GPU may take, of one processor: gpu_budget_percent.",
    )
    .add(&[], cpu_percent / 100.0);
    to.gauge(
        "gpu_sampler_gpu_wait_budget_ratio",
        "Share of time that reading one GPU may spend in driver calls: gpu_wait_percent.",
    )
    .add(&[], wait_percent / 100.0);
}
