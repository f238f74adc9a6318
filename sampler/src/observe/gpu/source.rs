//! Where the samples of a GPU are read: the driver's own buffer while NVML agrees with it, else NVML.
//!
//! ```text
//!  undecided --refused by the driver, or refuted twice--> NVML
//!            --confirmed by NVML--> buffer --refuted twice, or reads fail--> NVML
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
use super::sample_buffer::{BufferSample, SampleBuffer, is_witnessed};
use crate::health::nvml_calls::Call;

/// Interval of comparisons until one is possible: a process must be named.
const UNDECIDED_EVERY: Duration = Duration::from_secs(2);
/// A comparison is repeated after this time, and at intervals that double up to the second value once it was successful.
const COMPARED_EVERY: [Duration; 2] = [Duration::from_secs(10), Duration::from_secs(600)];
/// Comparisons or reads that fail in succession before the buffer is no longer used. A single one may fail while a clock is set.
const MAX_FAILURES: u32 = 2;

pub enum Source {
    Undecided { next: Instant, failures: u32 },
    Nvml,
    Buffer(Box<WitnessedBuffer>),
}

impl Default for Source {
    fn default() -> Self {
        Self::Undecided { next: Instant::now(), failures: 0 }
    }
}

/// The driver's own buffer, while NVML agrees with it.
pub struct WitnessedBuffer {
    buffer: SampleBuffer,
    next: Instant,
    interval: Duration,
    failures: u32,
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
        let Self::Undecided { next, failures } = self else { return None };
        let failures = *failures;
        if Instant::now() < *next {
            return None;
        }
        let Some(folder) = devfs.iter().find(|folder| folder.join(CONTROL).exists()) else {
            *self = Self::Nvml;
            return None;
        };
        let mut buffer = match RmClient::open(folder, pci_bus_id).and_then(SampleBuffer::new) {
            Ok(buffer) => buffer,
            Err(error) => {
                *self = Self::Nvml;
                return Some(Err(error.to_string()));
            }
        };
        let [interval, _] = COMPARED_EVERY;
        match compare(&mut buffer, tools) {
            Some((true, samples)) => {
                let next = Instant::now() + interval;
                let witnessed = WitnessedBuffer { buffer, next, interval, failures: 0, engines_until_us: 0 };
                *self = Self::Buffer(Box::new(witnessed));
                Some(Ok(samples))
            }
            Some((false, _)) if failures + 1 >= MAX_FAILURES => {
                *self = Self::Nvml;
                Some(Err("it differs from NVML".into()))
            }
            compared => {
                *self = Self::Undecided {
                    next: Instant::now() + UNDECIDED_EVERY,
                    failures: failures + u32::from(compared.is_some()),
                };
                None
            }
        }
    }
}

impl WitnessedBuffer {
    pub fn read(&mut self) -> Result<Vec<BufferSample>, NvmlError> {
        Ok(self.buffer.read()?)
    }

    pub fn is_trusted(&self) -> bool {
        self.failures < MAX_FAILURES
    }

    pub fn failed(&mut self) {
        self.failures += 1;
    }

    /// Compares with NVML again where that is due.
    pub fn witness_again(&mut self, tools: &mut Tools<'_>) {
        if Instant::now() < self.next {
            return;
        }
        match compare(&mut self.buffer, tools) {
            Some((true, _)) => self.failures = 0,
            Some((false, _)) => self.failures += 1,
            None => {}
        }
        let [soon, late] = COMPARED_EVERY;
        self.interval = if self.failures > 0 { soon } else { (2 * self.interval).min(late) };
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
            let (at, percent) = (GpuNs(sample.at_us.saturating_mul(1000)), sample.percent);
            others().map(move |engine| EngineSample { engine, at, busy_percent: percent[engine as usize] })
        };
        new.flat_map(of_sample).collect()
    }
}

/// Compares the driver's buffer with NVML; `None` where that is not possible. Also returns the samples of the buffer.
fn compare(buffer: &mut SampleBuffer, tools: &mut Tools<'_>) -> Option<(bool, Vec<BufferSample>)> {
    let samples = tools.driver.call(Call::GetSamples, || tools.buffers.samples(tools.handle, GPU_UTILIZATION, 0)).ok()?;
    let newest = samples.iter().max_by_key(|sample| sample.at_us).filter(|sample| sample.percent > 0)?.at_us;
    let process_samples = query_process_samples(tools, newest.saturating_sub(1))?;
    let own = tools.driver.call(Call::SampleBuffer, || Ok(buffer.read()?)).ok()?;
    Some((is_witnessed(&own, &samples, &process_samples)?, own))
}
