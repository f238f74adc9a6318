//! Writes the families of devices.

use sampler_core::device::{Reason, THROTTLE_REASONS};
use sampler_core::observation::Rejected;
use sampler_core::snapshot::GpuView;
use strum::VariantArray as _;

use super::catalogue::{Family, gpus as families, samples as sample_families};
use super::encode::{Families, Labels};
use super::ledger::{ExportedGpu, Exposition};
use super::series_starts::{SeriesId, SeriesOwner};

/// A GPU in MIG mode has its readings. Time, samples and memory are those of its MIG devices.
pub fn gpus(page: &Exposition, to: &mut Families<'_>) {
    info(page, to);
    time(page, to);
    engines(page, to);
    readings(page, to);
    events(page, to);
    samples(page, to);
    clock(page, to);
}

fn with_labels(view: &GpuView, more: &[(&str, &str)], add: impl FnOnce(Labels<'_>)) {
    let mut labels = vec![("uuid", &*view.info.uuid.0)];
    labels.extend(view.info.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
    labels.extend(more);
    add(&labels);
}

fn leaves(page: &Exposition) -> impl Iterator<Item = &ExportedGpu> {
    page.gpus.iter().filter(|gpu| gpu.view.info.is_leaf())
}

fn present(page: &Exposition) -> impl Iterator<Item = &ExportedGpu> {
    page.gpus.iter().filter(|gpu| gpu.view.gone.is_none())
}

fn known<'a>(
    to: &mut Families<'_>,
    family: &'static Family,
    gpus: impl Iterator<Item = &'a ExportedGpu>,
    value: impl Fn(&GpuView) -> Option<f64>,
) {
    let mut family = to.family(family);
    for gpu in gpus {
        with_labels(&gpu.view, &[], |labels| family.add_known(labels, value(&gpu.view)));
    }
}

/// Series of a GPU that start at zero, distinguished by the value of `label`.
fn parts<'a, 'g, P: AsRef<str>, I: IntoIterator<Item = (P, f64)>>(
    to: &mut Families<'_>,
    family: &'static Family,
    gpus: impl Iterator<Item = &'g ExportedGpu>,
    label: &'a str,
    values: impl Fn(&'g ExportedGpu) -> I,
) {
    let mut family = to.family(family);
    for gpu in gpus {
        let owner = SeriesOwner::Gpu(gpu.view.info.uuid.clone());
        for (part, value) in values(gpu) {
            let part = part.as_ref();
            let series = SeriesId { owner: &owner, part };
            with_labels(&gpu.view, &[(label, part)], |labels| family.add_from_zero(series, labels, value));
        }
    }
}

/// The count of each leaf; starts at zero.
fn count(to: &mut Families<'_>, family: &'static Family, page: &Exposition, value: impl Fn(&GpuView) -> u64) {
    let mut family = to.family(family);
    for gpu in leaves(page) {
        let owner = SeriesOwner::Gpu(gpu.view.info.uuid.clone());
        let series = SeriesId { owner: &owner, part: "" };
        with_labels(&gpu.view, &[], |labels| family.add_from_zero(series, labels, value(&gpu.view) as f64));
    }
}

fn info(page: &Exposition, to: &mut Families<'_>) {
    let mut info = to.family(&families::INFO);
    for ExportedGpu { view, .. } in present(page) {
        let i = &view.info;
        let index = i.index.to_string();
        let labels = [
            ("index", &*index),
            ("model", &i.model),
            ("pci_bus_id", &i.pci_bus_id),
            ("driver_version", &i.driver_version),
            ("mig_mode", i.mig_mode.name()),
        ];
        with_labels(view, &labels, |labels| info.add(labels, 1.0));
    }
}

fn time(page: &Exposition, to: &mut Families<'_>) {
    parts(to, &families::TIME_SECONDS, leaves(page), "state", |gpu| {
        let t = gpu.view.time;
        [("busy", gpu.busy_seconds), ("idle", t.idle), ("unobserved", t.unobserved), ("unsupported", t.unsupported)]
    });
    parts(to, &families::CREDITED_SECONDS, leaves(page), "namespace", |gpu| {
        gpu.credited.iter().map(|(namespace, seconds)| (namespace, *seconds))
    });
    parts(to, &families::UNATTRIBUTED_SECONDS, leaves(page), "reason", |gpu| {
        Reason::VARIANTS.iter().map(|reason| reason.name()).zip(gpu.view.unattributed)
    });
}

fn engines(page: &Exposition, to: &mut Families<'_>) {
    parts(to, &families::ENGINE_SECONDS, leaves(page), "engine", |gpu| {
        gpu.view.engines.iter().map(|engine| (engine.engine.name(), engine.busy))
    });
    parts(to, &families::ENGINE_UNATTRIBUTED_SECONDS, leaves(page), "engine", |gpu| {
        gpu.view.engines.iter().map(|engine| (engine.engine.name(), engine.unattributed.iter().sum()))
    });
}

fn readings(page: &Exposition, to: &mut Families<'_>) {
    let bytes = |b: Option<u64>| b.map(|b| b as f64);
    known(to, &families::UTILIZATION, leaves(page), |v| v.utilization_ratio);
    known(to, &families::MEMORY_USED, leaves(page), |v| bytes(v.readings.memory_used_bytes));
    known(to, &families::MEMORY_TOTAL, leaves(page), |v| bytes(v.readings.memory_total_bytes));
    known(to, &families::POWER, present(page), |v| v.readings.power_watts);
    known(to, &families::ENERGY, present(page), |v| v.readings.energy_joules);
    known(to, &families::TEMPERATURE, present(page), |v| v.readings.temperature_celsius);
    known(to, &families::SM_CLOCK, present(page), |v| v.readings.sm_clock_hertz);
}

fn events(page: &Exposition, to: &mut Families<'_>) {
    parts(to, &families::THROTTLE_SECONDS, page.gpus.iter(), "reason", |gpu| {
        let seconds = gpu.view.throttle_seconds.iter().flatten();
        THROTTLE_REASONS.iter().zip(seconds).map(|((_, reason), seconds)| (reason, *seconds))
    });
    parts(to, &families::XID_ERRORS, page.gpus.iter(), "xid", |gpu| {
        gpu.view.xids.iter().map(|(xid, count)| (xid.to_string(), *count as f64))
    });
}

fn samples(page: &Exposition, to: &mut Families<'_>) {
    known(to, &sample_families::LAST_SAMPLE, leaves(page), |v| v.last_sample.map(|t| t.seconds()));
    known(to, &sample_families::SAMPLE_PERIOD, leaves(page), |v| v.sample_period_seconds);
    count(to, &sample_families::SAMPLES, page, |v| v.counts.samples);
    count(to, &sample_families::QUERIED_SAMPLES, page, |v| v.counts.queried);
    known(to, &sample_families::SHARE_STDERR, leaves(page), |v| v.expected_stderr_ratio);
    count(to, &sample_families::SAMPLE_GAPS, page, |v| v.sample_gaps);
    count(to, &sample_families::RING_OVERRUNS, page, |v| v.ring_overruns);
    parts(to, &sample_families::REJECTED_SAMPLES, leaves(page), "reason", |gpu| {
        let counts = Rejected::VARIANTS.iter().map(|reason| reason.name()).zip(gpu.view.rejected);
        counts.chain([("off_grid", gpu.view.off_grid)]).map(|(reason, count)| (reason, count as f64))
    });
}

fn clock(page: &Exposition, to: &mut Families<'_>) {
    known(to, &sample_families::CLOCK_OFFSET, leaves(page), |v| v.clock.ahead_of_boot_seconds);
    known(to, &sample_families::CLOCK_UNCERTAINTY, leaves(page), |v| v.clock.uncertainty_seconds);
    known(to, &sample_families::CLOCK_DRIFT, leaves(page), |v| v.clock.drift_ratio);
    count(to, &sample_families::CLOCK_STEPS, page, |v| v.clock.steps);
}
