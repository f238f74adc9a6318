//! Writes the families of driver calls.

use super::catalogue::{Family, nvml};
use super::encode::{HistogramValue, Page};
use crate::health::CALL_BOUNDS;
use crate::health::nvml_calls::DeviceView;

/// `limits`: of processor time and of time in calls, percent.
pub fn calls(devices: &[DeviceView], limits: [f64; 2], to: &mut Page) {
    let [times, errors, supported] = [&nvml::CALL_SECONDS, &nvml::ERRORS, &nvml::SUPPORTED].map(|family| to.family(family));
    for device in devices {
        for (call, t) in &device.calls {
            let value = HistogramValue { bounds: &CALL_BOUNDS, cumulative: &t.buckets, sum: t.sum_seconds, count: t.count };
            to.add_histogram_since(times, &[("uuid", &*device.uuid), ("call", call)], value, Some(device.created));
        }
        for (call, error, n) in &device.errors {
            to.add_since(errors, &[("uuid", &*device.uuid), ("call", call), ("error", error)], *n as f64, Some(device.created));
        }
        for (call, is_supported) in &device.supported {
            to.add(supported, &[("uuid", &*device.uuid), ("call", call)], f64::from(*is_supported));
        }
    }
    known(to, &nvml::STALLED, devices, |device| device.stalled.map(f64::from));
    known(to, &nvml::SAMPLE_BUFFER, devices, |device| device.sample_buffer.map(f64::from));
    known(to, &nvml::POLL_INTERVAL, devices, |device| device.poll_interval_seconds);
    known(to, &nvml::BUSY, devices, |device| device.busy_ratio);
    known(to, &nvml::CPU, devices, |device| device.cpu_ratio);
    let [cpu_percent, wait_percent] = limits;
    to.add_one(&nvml::CPU_BUDGET, cpu_percent / 100.0);
    to.add_one(&nvml::WAIT_BUDGET, wait_percent / 100.0);
}

fn known(to: &mut Page, family: &'static Family, devices: &[DeviceView], value: impl Fn(&DeviceView) -> Option<f64>) {
    let id = to.family(family);
    for device in devices {
        to.add_known(id, &[("uuid", &*device.uuid)], value(device));
    }
}
