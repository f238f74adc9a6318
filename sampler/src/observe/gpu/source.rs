//! Where the samples of a GPU are read: the driver's own buffer while it matches NVML, else NVML.
//!
//! ```text
//!  undecided --error at opening, or two comparisons that differ--> NVML
//!            --equal to NVML--> buffer --two comparisons that differ--> NVML
//!                                      --reads that fail--> NVML --10 minutes--> undecided
//! ```
//! Until a comparison is possible, and while it is repeated, samples are read through NVML.

use nvml_wrapper::error::NvmlError;
use sampler_core::device::Engine;
use sampler_core::observation::EngineSample;
use sampler_core::units::GpuNs;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use strum::VariantArray as _;

use super::device_nodes::CONTROL;
use super::ring::{GPU_UTILIZATION, Tools, query_process_samples};
use super::rm::RmClient;
use super::sample_buffer::{BufferSample, SampleBuffer, matches_nvml};
use crate::health::nvml_calls::Call;

/// Interval of comparisons until one is possible: a process must be named.
const UNDECIDED_EVERY: Duration = Duration::from_secs(2);
/// The interval doubles up to this.
const UNDECIDED_MOST: Duration = Duration::from_secs(60);
/// After failed reads the buffer is tried again after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(600);
/// A comparison is repeated after this time, and at intervals that double up to the second value once it was successful.
const COMPARED_EVERY: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(600)];
/// Comparisons or reads that fail in succession before the buffer is no longer used. A single one may fail while a clock is set.
const MAX_FAILURES: u32 = 2;

pub enum Source {
    Undecided {
        next: Instant,
        interval: Duration,
        failures: u32,
    },
    /// Until then; `None`: until the GPU is opened again.
    Nvml(Option<Instant>),
    Buffer(Box<VerifiedBuffer>),
}

impl Default for Source {
    fn default() -> Self {
        Self::Undecided { next: Instant::now(), interval: UNDECIDED_EVERY, failures: 0 }
    }
}

/// The driver's own buffer, while it matches NVML.
pub struct VerifiedBuffer {
    buffer: SampleBuffer,
    next: Instant,
    interval: Duration,
    /// Failed comparisons, and failed reads, in succession.
    mismatches: u32,
    read_failures: u32,
    /// Newest sample of the other engines that was returned, in microseconds of the device.
    engines_until_us: u64,
}

impl Source {
    /// Tries the buffer where that is due. A new decision has the present samples of the buffer, or the reason for NVML.
    pub fn decide(
        &mut self,
        tools: &mut Tools<'_>,
        devfs: &[PathBuf],
        pci_bus_id: &str,
    ) -> Option<Result<Vec<BufferSample>, String>> {
        if let Self::Nvml(Some(until)) = self
            && Instant::now() >= *until
        {
            *self = Self::default();
        }
        let Self::Undecided { next, interval: waited, failures } = self else { return None };
        let (waited, failures) = (*waited, *failures);
        if Instant::now() < *next {
            return None;
        }
        let mut refused = None;
        let opened = tools.driver.call(Call::SampleBuffer, || open(devfs, pci_bus_id, &mut refused));
        let Ok(mut buffer) = opened else {
            *self = Self::Nvml(None);
            return refused.map(Err);
        };
        let [interval, _] = COMPARED_EVERY;
        match compare(&mut buffer, tools) {
            Some((true, samples)) => {
                let next = Instant::now() + interval;
                let verified = VerifiedBuffer { buffer, next, interval, mismatches: 0, read_failures: 0, engines_until_us: 0 };
                *self = Self::Buffer(Box::new(verified));
                Some(Ok(samples))
            }
            Some((false, _)) if failures + 1 >= MAX_FAILURES => {
                *self = Self::Nvml(None);
                Some(Err("it differs from NVML".into()))
            }
            compared => {
                let interval = (2 * waited).min(UNDECIDED_MOST);
                let failures = failures + u32::from(compared.is_some());
                *self = Self::Undecided { next: Instant::now() + waited, interval, failures };
                None
            }
        }
    }
}

impl VerifiedBuffer {
    pub fn read(&mut self) -> Result<Vec<BufferSample>, NvmlError> {
        let samples = self.buffer.read()?;
        self.read_failures = 0;
        Ok(samples)
    }

    /// What follows the buffer, with the reason, if it is no longer used.
    pub fn ended(&self) -> Option<(Source, &'static str)> {
        if self.mismatches >= MAX_FAILURES {
            return Some((Source::Nvml(None), "it differs from NVML"));
        }
        let again = Instant::now() + AGAIN_AFTER;
        (self.read_failures >= MAX_FAILURES).then_some((Source::Nvml(Some(again)), "reads of it fail"))
    }

    pub fn read_failed(&mut self) {
        self.read_failures += 1;
    }

    /// Compares with NVML again where that is due.
    pub fn verify_again(&mut self, tools: &mut Tools<'_>) {
        if Instant::now() < self.next {
            return;
        }
        let [soon, late] = COMPARED_EVERY;
        match compare(&mut self.buffer, tools) {
            Some((true, _)) => {
                self.mismatches = 0;
                self.interval = (2 * self.interval).min(late);
            }
            Some((false, _)) => {
                self.mismatches += 1;
                self.interval = soon;
            }
            // Nothing to compare: an idle GPU, or a failed call.
            None => {}
        }
        self.next = Instant::now() + self.interval;
    }

    /// The samples of the other engines since the last call; the first one only sets the watermark.
    pub fn engines(&mut self, samples: &[BufferSample]) -> Vec<EngineSample> {
        let newest = samples.iter().map(|sample| sample.at_us).max().unwrap_or(self.engines_until_us);
        let known = std::mem::replace(&mut self.engines_until_us, newest);
        if known == 0 {
            return Vec::new();
        }
        let others = || Engine::VARIANTS.iter().copied().filter(|engine| *engine != Engine::Compute);
        let new = samples.iter().filter(|sample| sample.at_us > known);
        let of_sample = |sample: &BufferSample| {
            let BufferSample { at_us, percent, has, .. } = *sample;
            let at = GpuNs(at_us.saturating_mul(1000));
            let there = others().filter(move |engine| has[*engine as usize]);
            there.map(move |engine| EngineSample { engine, at, busy_percent: percent[engine as usize] })
        };
        new.flat_map(of_sample).collect()
    }
}

/// Opens the buffer through the node in one of the folders; `refused` is the reason where none can be used.
fn open(devfs: &[PathBuf], pci_bus_id: &str, refused: &mut Option<String>) -> Result<SampleBuffer, NvmlError> {
    let mut result = Err(NvmlError::NotSupported);
    for folder in devfs.iter().filter(|folder| folder.join(CONTROL).exists()) {
        match RmClient::open(folder, pci_bus_id).and_then(SampleBuffer::new) {
            Ok(buffer) => return Ok(buffer),
            Err(error) => {
                *refused = Some(error.to_string());
                // A driver without this buffer is not a failure.
                let error = NvmlError::from(error);
                let is_lost = matches!(error, NvmlError::GpuLost | NvmlError::ResetRequired);
                result = Err(if is_lost { error } else { NvmlError::NotSupported });
            }
        }
    }
    result
}

/// Compares the driver's buffer with NVML; `None` where that is not possible. Also returns the samples of the buffer.
fn compare(buffer: &mut SampleBuffer, tools: &mut Tools<'_>) -> Option<(bool, Vec<BufferSample>)> {
    let samples = tools.driver.call(Call::GetSamples, || tools.buffers.samples(tools.handle, GPU_UTILIZATION, 0)).ok()?;
    let newest = samples.iter().max_by_key(|sample| sample.at_us).filter(|sample| sample.percent > 0)?.at_us;
    // A request from 1 us before a sample does not return it (measured), one from the sample before does.
    let before = samples.iter().map(|sample| sample.at_us).filter(|at_us| *at_us < newest).max()?;
    let process_samples = query_process_samples(tools, before)?;
    let own = tools.driver.call(Call::SampleBuffer, || Ok(buffer.read()?)).ok()?;
    Some((matches_nvml(&own, &samples, &process_samples)?, own))
}
