//! Writes the families of devices.

use sampler_core::device::{HardwareReadings, Reason, THROTTLE_REASONS};
use sampler_core::observation::Rejected;
use sampler_core::snapshot::{GpuView, UnattributedEnergy};
use strum::VariantArray as _;

use super::catalogue::{Family, gpus as families, samples as sample_families};
use super::encode::{Labels, Page};
use super::exposition::{ExportedGpu, Exposition};
use super::label_text::GpuText;
use super::series_starts::{SeriesOwner, SeriesStarts};

/// Stands with the reasons: what a GPU draws when it is idle.
const IDLE: &str = "idle";

/// A GPU with the labels of its series.
struct LabelledGpu<'a> {
    gpu: &'a ExportedGpu,
    view: &'a GpuView,
    block: String,
}

impl<'a> LabelledGpu<'a> {
    fn new(gpu: &'a ExportedGpu) -> Self {
        Self { gpu, view: &gpu.view, block: GpuText::new(&gpu.view.info).own }
    }

    fn with<'l>(&'l self, more: &'l [(&'l str, &'l str)]) -> Labels<'l> {
        Labels { blocks: [&self.block, ""], more }
    }
}

/// Writes the series of GPUs into a page.
struct GpuWriter<'a> {
    gpus: Vec<LabelledGpu<'a>>,
    to: &'a mut Page,
    starts: &'a mut SeriesStarts,
}

/// A GPU in MIG mode has its readings. Time, samples and memory are those of its MIG devices.
pub fn gpus(page: &Exposition, to: &mut Page, starts: &mut SeriesStarts) {
    let mut writer = GpuWriter { gpus: page.gpus.iter().map(LabelledGpu::new).collect(), to, starts };
    writer.info();
    writer.time();
    writer.energy();
    writer.engines();
    writer.readings();
    writer.hardware();
    writer.events();
    writer.samples();
    writer.clock();
}

fn is_leaf(view: &GpuView) -> bool {
    view.info.is_leaf()
}

fn is_present(view: &GpuView) -> bool {
    view.gone.is_none()
}

impl GpuWriter<'_> {
    fn known(&mut self, family: &'static Family, is_wanted: fn(&GpuView) -> bool, value: impl Fn(&GpuView) -> Option<f64>) {
        let id = self.to.family(family);
        for gpu in self.gpus.iter().filter(|gpu| is_wanted(gpu.view)) {
            self.to.add_known(id, gpu.with(&[]), value(gpu.view));
        }
    }

    /// Series of a GPU that start at zero, distinguished by the value of `label`.
    fn parts<'g, P: AsRef<str>, I: IntoIterator<Item = (P, f64)>>(
        &'g mut self,
        family: &'static Family,
        is_wanted: fn(&GpuView) -> bool,
        label: &str,
        values: impl Fn(&'g ExportedGpu) -> I,
    ) {
        let id = self.to.family(family);
        for gpu in self.gpus.iter().filter(|gpu| is_wanted(gpu.view)) {
            let mut series = self.starts.of(SeriesOwner::Gpu(gpu.view.info.uuid.clone())).created(gpu.gpu.created);
            for (part, value) in values(gpu.gpu) {
                let part = part.as_ref();
                self.to.add_from_zero(id, (&mut series, part), gpu.with(&[(label, part)]), value);
            }
        }
    }

    /// The count of each leaf; starts at zero.
    fn count(&mut self, family: &'static Family, value: impl Fn(&GpuView) -> u64) {
        let id = self.to.family(family);
        for gpu in self.gpus.iter().filter(|gpu| is_leaf(gpu.view)) {
            let mut series = self.starts.of(SeriesOwner::Gpu(gpu.view.info.uuid.clone())).created(gpu.gpu.created);
            self.to.add_from_zero(id, (&mut series, ""), gpu.with(&[]), value(gpu.view) as f64);
        }
    }

    fn info(&mut self) {
        let id = self.to.family(&families::INFO);
        for gpu in self.gpus.iter().filter(|gpu| is_present(gpu.view)) {
            let i = &gpu.view.info;
            let index = i.index.to_string();
            let labels = [
                ("index", &*index),
                ("model", &i.model),
                ("pci_bus_id", &i.pci_bus_id),
                ("driver_version", &i.driver_version),
                ("mig_mode", i.mig_mode.name()),
            ];
            self.to.add(id, gpu.with(&labels), 1.0);
        }
    }

    fn time(&mut self) {
        self.parts(&families::TIME_SECONDS, is_leaf, "state", |gpu| {
            let t = gpu.view.time;
            [("busy", gpu.busy_seconds), ("idle", t.idle), ("unobserved", t.unobserved), ("unsupported", t.unsupported)]
        });
        self.credited();
        self.parts(&families::UNATTRIBUTED_SECONDS, is_leaf, "reason", |gpu| {
            Reason::VARIANTS.iter().map(|reason| reason.name()).zip(gpu.view.unattributed)
        });
    }

    fn credited(&mut self) {
        let id = self.to.family(&families::CREDITED_SECONDS);
        for gpu in self.gpus.iter().filter(|gpu| is_leaf(gpu.view)) {
            let mut series = self.starts.of(SeriesOwner::Gpu(gpu.view.info.uuid.clone())).created(gpu.gpu.created);
            for ((namespace, kind), seconds) in &gpu.gpu.credited {
                let labels = [("namespace", namespace.as_str()), ("kind", *kind)];
                self.to.add_from_zero(id, (&mut series, &format!("{kind} {namespace}")), gpu.with(&labels), *seconds);
            }
        }
    }

    fn energy(&mut self) {
        self.parts(&families::UNATTRIBUTED_ENERGY, is_leaf, "reason", |gpu| {
            let reasons = |energy: &UnattributedEnergy| {
                let reasons = Reason::VARIANTS.iter().map(|reason| reason.name()).zip(energy.reasons);
                reasons.chain([(IDLE, energy.idle)])
            };
            gpu.view.unattributed_energy.as_ref().map(reasons).into_iter().flatten()
        });
    }

    fn engines(&mut self) {
        self.parts(&families::ENGINE_SECONDS, is_leaf, "engine", |gpu| {
            gpu.view.engines.iter().map(|engine| (engine.engine.name(), engine.busy))
        });
        self.parts(&families::ENGINE_UNATTRIBUTED_SECONDS, is_leaf, "engine", |gpu| {
            gpu.view.engines.iter().map(|engine| (engine.engine.name(), engine.unattributed.iter().sum()))
        });
    }

    fn readings(&mut self) {
        let bytes = |b: Option<u64>| b.map(|b| b as f64);
        self.known(&families::UTILIZATION, is_leaf, |v| v.utilization_ratio);
        self.known(&families::MEMORY_USED, is_leaf, |v| bytes(v.readings.memory_used_bytes));
        self.known(&families::MEMORY_TOTAL, is_leaf, |v| bytes(v.readings.memory_total_bytes));
        self.known(&families::POWER, is_present, |v| v.readings.power_watts);
        self.known(&families::ENERGY, is_present, |v| v.readings.energy_joules);
        self.known(&families::TEMPERATURE, is_present, |v| v.readings.temperature_celsius);
        self.known(&families::SM_CLOCK, is_present, |v| v.readings.sm_clock_hertz);
    }

    fn hardware(&mut self) {
        let number = |value: Option<u64>| value.map(|value| value as f64);
        let flag = |value: Option<bool>| value.map(|is_set| f64::from(u8::from(is_set)));
        self.by_type(&families::ECC_ERRORS, ["corrected", "uncorrected"], |hardware| hardware.ecc_errors);
        self.by_type(&families::REMAPPED_ROWS, ["correctable", "uncorrectable"], |hardware| hardware.remapped_rows);
        self.known(&families::ROW_REMAP_PENDING, is_present, |v| flag(v.hardware.remap_pending));
        self.known(&families::ROW_REMAP_FAILURE, is_present, |v| flag(v.hardware.remap_failure));
        let action = self.to.family(&families::RECOVERY_ACTION);
        for gpu in self.gpus.iter().filter(|gpu| is_present(gpu.view)) {
            if let Some(required) = gpu.view.hardware.recovery_action {
                self.to.add(action, gpu.with(&[("action", required.name())]), 1.0);
            }
        }
        self.known(&families::NVLINK_TRANSMIT, is_present, |v| number(v.hardware.nvlink_bytes[0]));
        self.known(&families::NVLINK_RECEIVE, is_present, |v| number(v.hardware.nvlink_bytes[1]));
        self.known(&families::PCIE_TRANSMIT, is_present, |v| number(v.hardware.pcie_bytes[0]));
        self.known(&families::PCIE_RECEIVE, is_present, |v| number(v.hardware.pcie_bytes[1]));
    }

    fn by_type(&mut self, family: &'static Family, types: [&str; 2], values: fn(&HardwareReadings) -> [Option<u64>; 2]) {
        let id = self.to.family(family);
        for gpu in self.gpus.iter().filter(|gpu| is_present(gpu.view)) {
            for (name, value) in types.into_iter().zip(values(&gpu.view.hardware)) {
                self.to.add_known(id, gpu.with(&[("type", name)]), value.map(|value| value as f64));
            }
        }
    }

    fn events(&mut self) {
        self.parts(
            &families::THROTTLE_SECONDS,
            |_| true,
            "reason",
            |gpu| {
                let seconds = gpu.view.throttle_seconds.iter().flatten();
                THROTTLE_REASONS.iter().zip(seconds).map(|((_, reason), seconds)| (reason, *seconds))
            },
        );
        self.parts(
            &families::XID_ERRORS,
            |_| true,
            "xid",
            |gpu| gpu.view.xids.iter().map(|(xid, count)| (xid.to_string(), *count as f64)),
        );
    }

    fn samples(&mut self) {
        self.known(&sample_families::LAST_SAMPLE, is_leaf, |v| v.last_sample.map(|t| t.seconds()));
        self.known(&sample_families::SAMPLE_PERIOD, is_leaf, |v| v.sample_period_seconds);
        self.count(&sample_families::SAMPLES, |v| v.counts.samples);
        self.count(&sample_families::QUERIED_SAMPLES, |v| v.counts.queried);
        self.known(&sample_families::SHARE_STDERR, is_leaf, |v| v.expected_stderr_ratio);
        self.count(&sample_families::SAMPLE_GAPS, |v| v.sample_gaps);
        self.count(&sample_families::RING_OVERRUNS, |v| v.ring_overruns);
        self.parts(&sample_families::REJECTED_SAMPLES, is_leaf, "reason", |gpu| {
            let counts = Rejected::VARIANTS.iter().map(|reason| reason.name()).zip(gpu.view.rejected);
            counts.chain([("off_grid", gpu.view.off_grid)]).map(|(reason, count)| (reason, count as f64))
        });
    }

    fn clock(&mut self) {
        self.known(&sample_families::CLOCK_OFFSET, is_leaf, |v| v.clock.ahead_of_boot_seconds);
        self.known(&sample_families::CLOCK_UNCERTAINTY, is_leaf, |v| v.clock.uncertainty_seconds);
        self.known(&sample_families::CLOCK_DRIFT, is_leaf, |v| v.clock.drift_ratio);
        self.count(&sample_families::CLOCK_STEPS, |v| v.clock.steps);
    }
}
