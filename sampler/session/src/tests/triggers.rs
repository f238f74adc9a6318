use std::sync::Arc;

use crate::trigger::{Trigger, Watch};
use sampler_core::device::SampleCounts;
use sampler_core::device::*;
use sampler_core::snapshot::*;
use sampler_core::units::{BootNs, GpuUuid};

fn check(text: &str, expect: &str) {
    let outcome = text.parse::<Trigger>().map_or_else(|error| error.to_string(), |trigger| trigger.to_string());
    assert!(outcome.contains(expect), "{text}: {outcome}");
}

#[test]
fn conditions_parse_and_print() {
    check("coactive>0.5", "coactive>0.5");
    check(" busy > 0.9 ", "busy>0.9");
    check("temperature>85:gpu=0 for 5s", "temperature>85:gpu=0 for 5s");
    check("memory>0.95:gpu=GPU-4 for 1m", "memory>0.95:gpu=GPU-4 for 1m");
    check("throttled>0", "throttled>0");
    check("buzy>0.9", "choose from coactive, busy, contention, memory, temperature, power, throttled");
    check("busy", "invalid condition \"busy\"");
    check("busy<1", "invalid condition \"busy<1\"");
    check("busy>much", "invalid threshold \"much\"");
    check("busy>nan", "invalid threshold \"nan\"");
    check("busy>1:cpu=0", "invalid qualifier \"cpu=0\"");
    check("busy>1 for ever", "invalid duration \"ever\"");
    check(&"x".repeat(10_000), "invalid condition \"xxx");
}

fn gpu(index: u32, temperature: Option<f64>) -> GpuView {
    GpuView {
        info: Arc::new(GpuInfo { uuid: GpuUuid(format!("GPU-{index}").into()), index, ..GpuInfo::default() }),
        readings: DeviceReadings { temperature_celsius: temperature, ..DeviceReadings::default() },
        hardware: Default::default(),
        time: GpuTime::default(),
        unattributed: Default::default(),
        unattributed_energy: None,
        utilization_ratio: None,
        coactive_ratio: None,
        last_sample: None,
        sample_period_seconds: None,
        sample_gaps: 0,
        counts: SampleCounts::default(),
        expected_stderr_ratio: None,
        ring_overruns: 0,
        rejected: Default::default(),
        off_grid: 0,
        clock: ClockView::default(),
        engines: Vec::new(),
        throttle_seconds: None,
        xids: Vec::new(),
        unattributed_holders: Vec::new(),
        gone: None,
    }
}

/// Takes the temperatures of two GPUs by second; returns the second in which the trigger fires.
fn fires(trigger: &str, temperatures: &[[f64; 2]]) -> Option<usize> {
    let mut watch = Watch::new(trigger.parse().unwrap());
    temperatures.iter().enumerate().position(|(second, [a, b])| {
        let known = |t: f64| Some(t).filter(|t| t.is_finite());
        let at = BootNs((second as u64 + 1) * 1_000_000_000);
        let snapshot = Snapshot { at, gpus: vec![gpu(0, known(*a)), gpu(1, known(*b))], ..Snapshot::default() };
        let fired = watch.evaluate(&snapshot).is_some();
        assert!(watch.evaluate(&snapshot).is_none(), "the same snapshot again");
        fired
    })
}

#[test]
fn conditions_fire_per_gpu_and_hold_time() {
    const UNKNOWN: f64 = f64::NAN;
    assert_eq!(fires("temperature>85", &[[80.0, 85.0], [80.0, 86.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=0", &[[80.0, 99.0], [90.0, 99.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=GPU-1", &[[99.0, 80.0], [99.0, 99.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=7", &[[99.0, 99.0]]), None);
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [90.0, 0.0], [90.0, 0.0]]), Some(2));
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [80.0, 90.0], [90.0, 0.0], [90.0, 0.0]]), None, "not held for 2 s");
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [UNKNOWN, 0.0], [90.0, 0.0]]), None, "unknown is not above");
    assert_eq!(fires("power>0", &[[90.0, 90.0]]), None);
}
