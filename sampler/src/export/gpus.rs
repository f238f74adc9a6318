//! The metric families of devices.

use sampler_core::device::{Reason, THROTTLE_REASONS};
use sampler_core::observation::Rejected;
use sampler_core::snapshot::GpuView;

use super::encode::{Families, Family, Labels};
use super::ledger::{Exposition, GpuRow};

/// All of them. A GPU in MIG mode has its readings; time, samples and memory are its MIG devices'.
pub fn gpus(page: &Exposition, to: &mut Families) {
    info(page, to);
    time(page, to);
    engines(page, to);
    readings(page, to);
    events(page, to);
    samples(page, to);
}

fn of(view: &GpuView, more: &[(&str, &str)], add: impl FnOnce(Labels<'_>)) {
    let mut labels = vec![("uuid", &*view.info.uuid.0)];
    labels.extend(view.info.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
    labels.extend(more);
    add(&labels);
}

fn leaves(page: &Exposition) -> impl Iterator<Item = &GpuRow> {
    page.gpus.iter().filter(|gpu| gpu.view.info.is_leaf())
}

fn present(page: &Exposition) -> impl Iterator<Item = &GpuRow> {
    page.gpus.iter().filter(|gpu| gpu.view.gone.is_none())
}

fn each<'a>(mut family: Family<'_>, gpus: impl Iterator<Item = &'a GpuRow>, value: impl Fn(&GpuView) -> Option<f64>) {
    for gpu in gpus {
        if let Some(value) = value(&gpu.view) {
            of(&gpu.view, &[], |labels| family.add(labels, value));
        }
    }
}

fn info(page: &Exposition, to: &mut Families) {
    let mut info = to.gauge("gpu_info", "What a GPU is.");
    for GpuRow { view, .. } in present(page) {
        let i = &view.info;
        let index = i.index.to_string();
        let labels = [
            ("index", &*index),
            ("model", &i.model),
            ("pci_bus_id", &i.pci_bus_id),
            ("driver_version", &i.driver_version),
            ("mig_mode", i.mig_mode.name()),
        ];
        of(view, &labels, |labels| info.add(labels, 1.0));
    }
}

fn time(page: &Exposition, to: &mut Families) {
    let mut time = to.counter(
        "gpu_time_seconds_total",
        "Time of this GPU by state; the states sum to the wall time in which it was there, up to what is not settled.",
    );
    for gpu in leaves(page) {
        let t = gpu.view.time;
        for (state, seconds) in
            [("busy", gpu.busy_seconds), ("idle", t.idle), ("unobserved", t.unobserved), ("unsupported", t.unsupported)]
        {
            of(&gpu.view, &[("state", state)], |labels| time.add(labels, seconds));
        }
    }
    let mut credited = to.counter("gpu_credited_seconds_total", "GPU-seconds credited to containers; outlives them.");
    for gpu in leaves(page) {
        for (namespace, seconds) in &gpu.credited {
            of(&gpu.view, &[("namespace", namespace)], |labels| credited.add(labels, *seconds));
        }
    }
    let mut unattributed = to.counter("gpu_unattributed_seconds_total", "Busy seconds that are on no container, and why.");
    for gpu in leaves(page) {
        for (reason, seconds) in Reason::ALL.iter().zip(gpu.view.unattributed) {
            of(&gpu.view, &[("reason", reason.name())], |labels| unattributed.add(labels, seconds));
        }
    }
}

fn engines(page: &Exposition, to: &mut Families) {
    let help = "Busy seconds of the engines beside compute, each sampled by itself.";
    let mut busy = to.counter("gpu_engine_seconds_total", help);
    for gpu in leaves(page) {
        for engine in &gpu.view.engines {
            of(&gpu.view, &[("engine", engine.engine.name())], |labels| busy.add(labels, engine.busy));
        }
    }
    let help = "Busy seconds of those engines that are on no container.";
    let mut unattributed = to.counter("gpu_engine_unattributed_seconds_total", help);
    for gpu in leaves(page) {
        for engine in &gpu.view.engines {
            let seconds = engine.unattributed.iter().sum();
            of(&gpu.view, &[("engine", engine.engine.name())], |labels| unattributed.add(labels, seconds));
        }
    }
}

fn readings(page: &Exposition, to: &mut Families) {
    let bytes = |b: Option<u64>| b.map(|b| b as f64);
    each(to.gauge("gpu_utilization_ratio", "Busy share of the past 10 seconds."), leaves(page), |v| v.utilization_ratio);
    each(to.gauge("gpu_memory_used_bytes", "Device memory in use."), leaves(page), |v| bytes(v.readings.memory_used_bytes));
    each(to.gauge("gpu_memory_total_bytes", "Device memory."), leaves(page), |v| bytes(v.readings.memory_total_bytes));
    each(to.gauge("gpu_power_watts", "Power drawn."), present(page), |v| v.readings.power_watts);
    let help = "Energy drawn since the driver was loaded.";
    each(to.counter("gpu_energy_joules_total", help), present(page), |v| v.readings.energy_joules);
    each(to.gauge("gpu_temperature_celsius", "Core temperature."), present(page), |v| v.readings.temperature_celsius);
    each(to.gauge("gpu_sm_clock_hertz", "SM clock."), present(page), |v| v.readings.sm_clock_hertz);
}

fn events(page: &Exposition, to: &mut Families) {
    let help = "Time in which the driver named this reason for its clocks, read once a second, once a minute where driver calls are slow.";
    let mut throttled = to.counter("gpu_throttle_seconds_total", help);
    for gpu in &page.gpus {
        for ((_, reason), seconds) in THROTTLE_REASONS.iter().zip(gpu.view.throttle_seconds.iter().flatten()) {
            of(&gpu.view, &[("reason", reason)], |labels| throttled.add(labels, *seconds));
        }
    }
    let mut xids = to.counter("gpu_xid_errors_total", "XID errors that the driver told of.");
    for gpu in &page.gpus {
        for (xid, count) in &gpu.view.xids {
            of(&gpu.view, &[("xid", &xid.to_string())], |labels| xids.add(labels, *count as f64));
        }
    }
}

fn samples(page: &Exposition, to: &mut Families) {
    let help = "When the last driver sample was read.";
    each(to.gauge("gpu_sampler_last_sample_timestamp_seconds", help), leaves(page), |v| v.last_sample.map(|t| t.seconds()));
    let help = "The driver's sampling grid, as learned.";
    each(to.gauge("gpu_sampler_sample_period_seconds", help), leaves(page), |v| v.sample_period_seconds);
    let help = "Samples whose time was booked.";
    each(to.counter("gpu_sampler_samples_total", help), leaves(page), |v| Some(v.counts.samples as f64));
    let help = "Samples of which the process was queried; the time of the others is divided over these.";
    each(to.counter("gpu_sampler_queried_samples_total", help), leaves(page), |v| Some(v.counts.queried as f64));
    let help = "Standard error of a share of one half over 10 s, at the rate at which processes were queried in the past 10 s. \
                Absent while the GPU is idle, and where it is measured by GPM.";
    each(to.gauge("gpu_sampler_share_stderr_ratio", help), leaves(page), |v| v.expected_stderr_ratio);
    let help = "Times that samples were lost between two polls.";
    each(to.counter("gpu_sampler_sample_gaps_total", help), leaves(page), |v| Some(v.sample_gaps as f64));
    let help = "Those of them in which the driver's ring had gone round before it was read.";
    each(to.counter("gpu_sampler_ring_overruns_total", help), leaves(page), |v| Some(v.ring_overruns as f64));
    let mut rejected =
        to.counter("gpu_sampler_rejected_samples_total", "Samples and rows that break the driver's own rules, and how.");
    for gpu in leaves(page) {
        for (why, count) in Rejected::ALL.iter().zip(gpu.view.rejected) {
            of(&gpu.view, &[("reason", why.name())], |labels| rejected.add(labels, count as f64));
        }
        of(&gpu.view, &[("reason", "off_grid")], |labels| rejected.add(labels, gpu.view.off_grid as f64));
    }
    let help = "The GPU's clock less the machine's boot time, as polls bound it from above.";
    each(to.gauge("gpu_sampler_clock_offset_seconds", help), leaves(page), |v| v.clock.ahead_of_boot_seconds);
    let help = "Width of what the true offset is in, if the driver serves a sample within a period.";
    each(to.gauge("gpu_sampler_clock_uncertainty_seconds", help), leaves(page), |v| v.clock.uncertainty_seconds);
    let help = "Seconds that the GPU's clock gains in one.";
    each(to.gauge("gpu_sampler_clock_drift_ratio", help), leaves(page), |v| v.clock.drift_ratio);
    let help = "Times that the GPU's clock was set.";
    each(to.counter("gpu_sampler_clock_steps_total", help), leaves(page), |v| Some(v.clock.steps as f64));
}
