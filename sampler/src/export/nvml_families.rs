//! Writes the families of driver calls.

use super::catalogue::{Family, nvml};
use super::encode::{Families, HistogramValue};
use crate::health::CALL_BOUNDS;
use crate::health::nvml_calls::DeviceView;

/// `limits`: of processor time and of time in calls, percent.
pub fn calls(devices: &[DeviceView], limits: [f64; 2], to: &mut Families<'_>) {
    let mut times = to.family(&nvml::CALL_SECONDS);
    for device in devices {
        for (call, t) in &device.calls {
            let value = HistogramValue { bounds: &CALL_BOUNDS, cumulative: &t.buckets, sum: t.sum_seconds, count: t.count };
            times.add_histogram(&[("uuid", &device.uuid), ("call", call)], value);
        }
    }
    let mut errors = to.family(&nvml::ERRORS);
    for device in devices {
        for (call, error, n) in &device.errors {
            errors.add(&[("uuid", &device.uuid), ("call", call), ("error", error)], *n as f64);
        }
    }
    let mut supported = to.family(&nvml::SUPPORTED);
    for device in devices {
        for (call, is_supported) in &device.supported {
            supported.add(&[("uuid", &device.uuid), ("call", call)], f64::from(*is_supported));
        }
    }
    known(to, &nvml::STALLED, devices, |device| device.stalled.map(f64::from));
    known(to, &nvml::SAMPLE_BUFFER, devices, |device| device.sample_buffer.map(f64::from));
    known(to, &nvml::POLL_INTERVAL, devices, |device| device.poll_interval_seconds);
    known(to, &nvml::BUSY, devices, |device| device.busy_ratio);
    known(to, &nvml::CPU, devices, |device| device.cpu_ratio);
    let [cpu_percent, wait_percent] = limits;
    to.family(&nvml::CPU_BUDGET).add(&[], cpu_percent / 100.0);
    to.family(&nvml::WAIT_BUDGET).add(&[], wait_percent / 100.0);
}

fn known(to: &mut Families<'_>, family: &'static Family, devices: &[DeviceView], value: impl Fn(&DeviceView) -> Option<f64>) {
    let mut family = to.family(family);
    for device in devices {
        family.add_known(&[("uuid", &device.uuid)], value(device));
    }
}
