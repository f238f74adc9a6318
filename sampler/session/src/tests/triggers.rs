use std::sync::Arc;

use crate::trigger::{Trigger, Watch};
use sampler_core::device::SampleCounts;
use sampler_core::device::*;
use sampler_core::snapshot::*;
use sampler_core::units::{BootNs, GpuUuid};

fn check(text: &str, expect: &str) {
    let told = text.parse::<Trigger>().map_or_else(|error| error.to_string(), |trigger| trigger.to_string());
    assert!(told.contains(expect), "{text}: {told}");
}

#[test]
fn words() {
    check("coactive>0.5", "coactive>0.5");
    check(" busy > 0.9 ", "busy>0.9");
    check("temperature>85:gpu=0 for 5s", "temperature>85:gpu=0 for 5s");
    check("memory>0.95:gpu=GPU-4 for 1m", "memory>0.95:gpu=GPU-4 for 1m");
    check("throttled>0", "throttled>0");
    check("buzy>0.9", "choose from coactive, busy, contention, memory, temperature, power, throttled");
    check("busy", "is no condition");
    check("busy<1", "is no condition");
    check("busy>much", "\"much\" is no number");
    check("busy>nan", "\"nan\" is no number");
    check("busy>1:cpu=0", "\"cpu=0\" is no qualifier");
    check("busy>1 for ever", "\"ever\" is no duration");
    check(&"x".repeat(10_000), "is no condition");
}

fn gpu(index: u32, temperature: Option<f64>) -> GpuView {
    GpuView {
        info: Arc::new(GpuInfo { uuid: GpuUuid(format!("GPU-{index}").into()), index, ..GpuInfo::default() }),
        readings: DeviceReadings { temperature_celsius: temperature, ..DeviceReadings::default() },
        time: GpuTime::default(),
        unattributed: Default::default(),
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
        gone: None,
    }
}

/// Temperatures of two GPUs by second, and the second in which it fires.
fn fires(trigger: &str, seen: &[[f64; 2]]) -> Option<usize> {
    let mut watch = Watch::new(trigger.parse().unwrap());
    seen.iter().enumerate().position(|(second, [a, b])| {
        let known = |t: f64| Some(t).filter(|t| t.is_finite());
        let at = BootNs((second as u64 + 1) * 1_000_000_000);
        let snapshot = Snapshot { at, gpus: vec![gpu(0, known(*a)), gpu(1, known(*b))], ..Snapshot::default() };
        let fired = watch.see(&snapshot).is_some();
        assert!(watch.see(&snapshot).is_none(), "looked at twice");
        fired
    })
}

#[test]
fn conditions() {
    const UNKNOWN: f64 = f64::NAN;
    assert_eq!(fires("temperature>85", &[[80.0, 85.0], [80.0, 86.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=0", &[[80.0, 99.0], [90.0, 99.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=GPU-1", &[[99.0, 80.0], [99.0, 99.0]]), Some(1));
    assert_eq!(fires("temperature>85:gpu=7", &[[99.0, 99.0]]), None);
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [90.0, 0.0], [90.0, 0.0]]), Some(2));
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [80.0, 90.0], [90.0, 0.0], [90.0, 0.0]]), None, "not for so long");
    assert_eq!(fires("temperature>85 for 2s", &[[90.0, 0.0], [UNKNOWN, 0.0], [90.0, 0.0]]), None, "unknown is not above");
    assert_eq!(fires("power>0", &[[90.0, 90.0]]), None);
}
