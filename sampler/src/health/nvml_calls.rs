//! Driver calls by device: durations, errors, support. Each device has its own lock, which is held for microseconds after a call and
//! never during one, so that neither other GPUs nor a scrape wait for a call.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::call_watchdog::{CallSlot, Caller, Change};
use super::condition::Condition;
use super::{CALL_BOUNDS, DurationHistogram, Times};
use sampler_core::units::{BootNs, WallTime};
use strum::{EnumCount as _, VariantArray as _};

/// The driver calls; each can be unsupported independently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, strum::EnumCount, strum::IntoStaticStr, strum::VariantArray)]
pub enum Call {
    Init,
    Shutdown,
    GetCount,
    GetHandleByIndex,
    #[strum(serialize = "GetHandleByUUID")]
    #[strum(serialize = "GetUUID")]
    GetUuid,
    #[strum(serialize = "GetName")]
    GetInfo,
    GetMigMode,
    #[strum(serialize = "GetMigDeviceHandleByIndex")]
    GetMigDevices,
    GetGpuInstanceId,
    GetSamples,
    #[strum(serialize = "GetSamples:memory")]
    GetMemorySamples,
    #[strum(serialize = "GetSamples:encoder")]
    GetEncoderSamples,
    #[strum(serialize = "GetSamples:decoder")]
    GetDecoderSamples,
    #[strum(serialize = "GetSamples:jpeg")]
    GetJpegSamples,
    #[strum(serialize = "GetSamples:ofa")]
    GetOfaSamples,
    /// The driver's own sample buffer, not a call of NVML.
    SampleBuffer,
    GetProcessesUtilizationInfo,
    GetProcessUtilization,
    GetUtilizationRates,
    GetComputeRunningProcesses,
    GetGraphicsRunningProcesses,
    #[strum(serialize = "GetMPSComputeRunningProcesses")]
    GetMpsComputeRunningProcesses,
    #[strum(serialize = "GetMemoryInfo_v2")]
    GetMemoryInfoV2,
    GetMemoryInfo,
    GetPowerUsage,
    GetEnforcedPowerLimit,
    GetTotalEnergyConsumption,
    GetTemperature,
    GetClockInfo,
    #[strum(serialize = "GetCurrentClocksEventReasons")]
    GetClocksEventReasons,
    #[strum(serialize = "GetFieldValues:health")]
    GetHealthFields,
    #[strum(serialize = "GetFieldValues:throttle")]
    GetThrottleFields,
    #[strum(serialize = "GetFieldValues:nvlink")]
    GetNvlinkFields,
    #[strum(serialize = "GetFieldValues:pcie")]
    GetPcieFields,
    GpmQueryDeviceSupport,
    GpmMigSampleGet,
    GpmMetricsGet,
    RegisterEvents,
    EventSetWait,
}

impl Call {
    /// The `call` label: the name in NVML without `nvmlDevice` or `nvml`. The rings read by GetSamples, and the fields read together by
    /// GetFieldValues, are distinguished.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// The state of a call that was not tried yet.
const UNTRIED: u8 = 2;

#[derive(Default)]
struct CallCounts {
    calls: BTreeMap<Call, DurationHistogram<{ CALL_BOUNDS.len() }>>,
    errors: BTreeMap<(Call, String), u64>,
}

/// The calls of one device.
pub struct DeviceCalls {
    pub uuid: Arc<str>,
    /// When all counts were 0.
    created: WallTime,
    counts: Mutex<CallCounts>,
    supported: [AtomicU8; Call::COUNT],
    /// Whether samples are read from the driver's own buffer: 1, 0, or [`UNTRIED`].
    sample_buffer: AtomicU8,
    /// 0 if unknown.
    poll_interval_ns: AtomicU64,
    /// Bits of the recent shares of time: processor time, and time in driver calls.
    recent_ratios: [AtomicU64; 2],
}

/// The calls of one device, for export.
#[derive(Clone, Debug, Default)]
pub struct DeviceView {
    pub uuid: String,
    /// When all counts were 0.
    pub created: WallTime,
    pub calls: Vec<(&'static str, Times)>,
    /// (call, error, count).
    pub errors: Vec<(&'static str, String, u64)>,
    pub supported: Vec<(&'static str, bool)>,
    pub sample_buffer: Option<bool>,
    pub poll_interval_seconds: Option<f64>,
    pub busy_ratio: Option<f64>,
    pub cpu_ratio: Option<f64>,
    /// Whether a call has not returned for seconds; `None` if no thread reads the device.
    pub stalled: Option<bool>,
}

impl DeviceCalls {
    fn new(uuid: Arc<str>) -> Self {
        Self {
            uuid,
            created: SystemTime::now().into(),
            counts: Mutex::default(),
            supported: std::array::from_fn(|_| AtomicU8::new(UNTRIED)),
            sample_buffer: AtomicU8::new(UNTRIED),
            poll_interval_ns: AtomicU64::new(0),
            recent_ratios: std::array::from_fn(|_| AtomicU64::new(f64::NAN.to_bits())),
        }
    }

    fn counts(&self) -> MutexGuard<'_, CallCounts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn record(&self, call: Call, took: Duration, error: Option<String>) {
        let mut counts = self.counts();
        counts.calls.entry(call).or_insert_with(|| DurationHistogram::new(&CALL_BOUNDS)).record(took);
        if let Some(error) = error {
            *counts.errors.entry((call, error)).or_default() += 1;
        }
    }

    pub fn set_supported(&self, call: Call, supported: bool) {
        self.supported[call as usize].store(supported.into(), Ordering::Relaxed);
    }

    /// Whether samples are read from the driver's own buffer, not through NVML; `None` where there are no samples.
    pub fn set_sample_buffer(&self, used: Option<bool>) {
        self.sample_buffer.store(used.map_or(UNTRIED, u8::from), Ordering::Relaxed);
    }

    /// `recent_ratios`: shares of processor time and of time in driver calls over the past 30 s; NaN if unknown.
    pub fn set_pace(&self, poll_interval: Duration, recent_ratios: [f64; 2]) {
        self.poll_interval_ns.store(u64::try_from(poll_interval.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        for (stored, ratio) in self.recent_ratios.iter().zip(recent_ratios) {
            stored.store(ratio.to_bits(), Ordering::Relaxed);
        }
    }

    fn view(&self, stalled: Option<bool>) -> DeviceView {
        let supported =
            Call::VARIANTS.iter().zip(&self.supported).map(|(call, state)| (call.name(), state.load(Ordering::Relaxed)));
        let interval = self.poll_interval_ns.load(Ordering::Relaxed);
        let sample_buffer = self.sample_buffer.load(Ordering::Relaxed);
        let [cpu, busy] = [0, 1].map(|n| f64::from_bits(self.recent_ratios[n].load(Ordering::Relaxed)));
        let counts = self.counts();
        DeviceView {
            uuid: self.uuid.to_string(),
            created: self.created,
            calls: counts.calls.iter().map(|(call, calls)| (call.name(), calls.times())).collect(),
            errors: counts.errors.iter().map(|((call, error), n)| (call.name(), error.clone(), *n)).collect(),
            supported: supported.filter(|(_, state)| *state != UNTRIED).map(|(name, state)| (name, state == 1)).collect(),
            sample_buffer: (sample_buffer != UNTRIED).then_some(sample_buffer == 1),
            poll_interval_seconds: (interval > 0).then_some(interval as f64 * 1e-9),
            // A thread that hangs cannot update the ratio; all its time is spent in the call.
            busy_ratio: if stalled == Some(true) { Some(1.0) } else { (!busy.is_nan()).then_some(busy) },
            cpu_ratio: (!cpu.is_nan()).then_some(cpu),
            stalled,
        }
    }
}

/// Every device and every thread that calls the driver.
#[derive(Default)]
pub struct DriverHealth {
    devices: Mutex<Vec<Arc<DeviceCalls>>>,
    slots: Mutex<Vec<Arc<CallSlot>>>,
}

impl DriverHealth {
    fn devices(&self) -> MutexGuard<'_, Vec<Arc<DeviceCalls>>> {
        self.devices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Arc<CallSlot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calls of a device. Counts continue when it is opened again.
    pub fn device(&self, uuid: &str) -> Arc<DeviceCalls> {
        let mut devices = self.devices();
        if let Some(known) = devices.iter().find(|device| &*device.uuid == uuid) {
            return Arc::clone(known);
        }
        let device = Arc::new(DeviceCalls::new(uuid.into()));
        devices.push(Arc::clone(&device));
        device
    }

    pub fn forget(&self, uuid: &str) {
        self.devices().retain(|device| &*device.uuid != uuid);
    }

    /// `condition` holds while a call does not return; `uuid` is the GPU that is not sampled during that time.
    pub fn caller(&self, condition: Condition, uuid: Option<&str>) -> Caller {
        let slot = Arc::new(CallSlot::new(condition, uuid.map(Into::into)));
        self.slots().push(Arc::clone(&slot));
        Caller { slot }
    }

    pub(super) fn watch(&self, now: BootNs) -> Vec<Change> {
        let mut changes = Vec::new();
        self.slots().retain(|slot| {
            changes.extend(slot.watch(now));
            !slot.is_over()
        });
        changes
    }

    pub fn view(&self) -> Vec<DeviceView> {
        let slots: Vec<(Arc<str>, bool)> =
            self.slots().iter().filter(|s| !s.is_over()).filter_map(|s| Some((s.uuid.clone()?, s.is_stalled()))).collect();
        let devices: Vec<Arc<DeviceCalls>> = self.devices().clone();
        let stalled = |uuid: &str| slots.iter().filter(|(u, _)| &**u == uuid).map(|(_, stalled)| *stalled).reduce(|a, b| a || b);
        devices.iter().map(|device| device.view(stalled(&device.uuid))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_in_their_buckets() {
        let health = DriverHealth::default();
        let device = health.device("GPU-1");
        for us in [30, 700, 700, 50_000] {
            device.record(Call::GetSamples, Duration::from_micros(us), None);
        }
        device.record(Call::GetMemoryInfo, Duration::from_micros(1), Some("Unknown".into()));
        device.set_supported(Call::GetSamples, true);
        device.set_supported(Call::GetOfaSamples, false);
        let view = &health.view()[0];
        let (name, times) = &view.calls[0];
        assert_eq!((*name, times.count), ("GetSamples", 4));
        assert_eq!(times.buckets, [1, 1, 1, 1, 3, 3, 3, 3, 4, 4]);
        assert!((times.sum_seconds - 0.05143).abs() < 1e-9);
        assert_eq!(view.errors, [("GetMemoryInfo", "Unknown".to_owned(), 1)]);
        assert_eq!(view.supported, [("GetSamples", true), ("GetSamples:ofa", false)]);
        assert_eq!((view.busy_ratio, view.poll_interval_seconds, view.stalled), (None, None, None));
    }

    #[test]
    fn counts_continue_when_a_device_is_opened_again() {
        let health = DriverHealth::default();
        health.device("GPU-1").record(Call::GetSamples, Duration::from_micros(1), None);
        health.device("GPU-1").record(Call::GetSamples, Duration::from_micros(1), None);
        assert_eq!(health.view()[0].calls[0].1.count, 2);
        health.forget("GPU-1");
        assert!(health.view().is_empty());
    }
}
