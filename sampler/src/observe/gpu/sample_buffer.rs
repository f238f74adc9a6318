//! The driver's own buffer of utilization samples, in one read: for each sample its time, and for each engine the utilization and the
//! process. NVML derives its answers from it, with one call for each engine and another one for the processes.
//!
//! Control 0x20802096 of the resource manager. It refuses parameters of another size, so the layouts are tried. What it returns is used
//! only while it matches NVML (`matches_nvml`).

use sampler_core::device::Engine;
use sampler_core::reconstruct::{RawProcessSample, RawSample};
use strum::EnumCount as _;

use super::rm::{RmClient, RmError};

/// NV2080_CTRL_CMD_PERF_GET_GPUMON_PERFMON_UTIL_SAMPLES_V2.
const GET_SAMPLES: u32 = 0x2080_2096;
const SAMPLES: usize = 72;
/// NV2080_CTRL_GPUMON_SAMPLE_TYPE_PERFMON_UTIL.
const TYPE_UTILIZATION: u32 = 2;
/// Type, size, count, and the slot that is written next.
const HEADER: usize = 16;
const NEXT_SLOT: usize = 12;
/// The stamp of a sample comes first, then its engines.
const STAMP: usize = 8;
const NO_PROCESS: u32 = u32::MAX;
/// Unit of utilization in the buffer: hundredths of a percent.
const UNITS_PER_PERCENT: u32 = 100;

/// Order of the engines in a sample; each begins with utilization, a scale, and the pid.
const ORDER: [Engine; 6] = [Engine::Memory, Engine::Compute, Engine::Encoder, Engine::Decoder, Engine::Jpeg, Engine::Ofa];
const PID: usize = 8;

/// The layout of a sample in a range of driver versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SampleLayout {
    engines: usize,
    engine_size: usize,
    sample_size: usize,
}

/// 570 and later; 550 to 565; 535 to 545.
const LAYOUTS: [SampleLayout; 3] = [
    SampleLayout { engines: 6, engine_size: 128, sample_size: 776 },
    SampleLayout { engines: 6, engine_size: 116, sample_size: 704 },
    SampleLayout { engines: 4, engine_size: 116, sample_size: 472 },
];

/// NVML gives samples times that differ by up to 1 ms from those of the buffer (measured), and the grid is far coarser.
pub const SAME_SAMPLE_US: u64 = 20_000;
/// Busy samples that a comparison requires.
const COMPARED: usize = 8;
/// Of ten of them, so many must be equal. A sample may be taken between the two reads.
const EQUAL_OF_TEN: usize = 9;

impl SampleLayout {
    fn bytes(self) -> usize {
        HEADER + SAMPLES * self.sample_size
    }
}

pub struct SampleBuffer {
    client: RmClient,
    layout: SampleLayout,
    words: Vec<u64>,
}

/// One sample of the buffer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BufferSample {
    pub at_us: u64,
    /// Whole percents, cut as by NVML; indexed as [`Engine`].
    pub percent: [u32; Engine::COUNT],
    pub pid: [Option<u32>; Engine::COUNT],
    /// Whether the driver's layout has the engine.
    pub has: [bool; Engine::COUNT],
}

impl BufferSample {
    pub fn device_sample(&self) -> RawSample {
        RawSample { at_us: self.at_us, percent: self.percent[Engine::Compute as usize] }
    }

    /// One entry for each process that it names, with the engines for which it names it.
    pub fn process_samples(&self) -> impl Iterator<Item = RawProcessSample> {
        let mut entries: Vec<RawProcessSample> = Vec::new();
        for (engine, (percent, pid)) in self.percent.into_iter().zip(self.pid).enumerate() {
            let Some(pid) = pid.filter(|_| percent > 0 && self.has[engine]) else { continue };
            let known = entries.iter_mut().find(|entry| entry.pid == pid);
            let entry = match known {
                Some(entry) => entry,
                None => entries.push_mut(RawProcessSample { at_us: self.at_us, pid, percent: [0; Engine::COUNT] }),
            };
            entry.percent[engine] = percent;
        }
        entries.into_iter()
    }
}

impl SampleBuffer {
    /// The buffer of the client's GPU, with the layout that its driver accepts.
    pub fn new(client: RmClient) -> Result<Self, RmError> {
        let [newest, older @ ..] = LAYOUTS;
        let mut buffer = Self { client, layout: newest, words: Vec::new() };
        // The error of the newest layout is the significant one where all are refused.
        let Err(refused) = buffer.fill() else { return Ok(buffer) };
        for layout in older {
            buffer.layout = layout;
            if buffer.fill().is_ok() {
                return Ok(buffer);
            }
        }
        Err(refused)
    }

    fn fill(&mut self) -> Result<(), RmError> {
        self.words.clear();
        self.words.resize(self.layout.bytes().div_ceil(8), 0);
        // Type in the first byte, size in the second word of four bytes.
        self.words[0] = u64::from(TYPE_UTILIZATION) | ((SAMPLES * self.layout.sample_size) as u64) << 32;
        self.client.control_gpu("samples", GET_SAMPLES, &mut self.words)
    }

    /// All samples in the buffer, in the order in which they were taken.
    pub fn read(&mut self) -> Result<Vec<BufferSample>, RmError> {
        self.fill()?;
        Ok(parse(&self.words, self.layout))
    }
}

/// The four bytes at an offset that is a multiple of four, as a number.
fn number(words: &[u64], offset: usize) -> u32 {
    words.get(offset / 8).map_or(0, |word| (word >> (8 * (offset % 8))) as u32)
}

fn parse(words: &[u64], layout: SampleLayout) -> Vec<BufferSample> {
    let mut samples = Vec::new();
    let next = number(words, NEXT_SLOT) as usize;
    for slot in (0..SAMPLES).map(|n| (next + n) % SAMPLES) {
        let begin = HEADER + slot * layout.sample_size;
        let stamp_ns = words.get(begin / 8).copied().unwrap_or_default();
        if stamp_ns == 0 {
            continue;
        }
        let mut sample = BufferSample { at_us: stamp_ns / 1000, ..BufferSample::default() };
        for (n, engine) in ORDER.into_iter().take(layout.engines).enumerate() {
            let at = begin + STAMP + n * layout.engine_size;
            let percent = number(words, at) / UNITS_PER_PERCENT;
            (sample.percent[engine as usize], sample.has[engine as usize]) = (percent, percent <= 100);
            sample.pid[engine as usize] = Some(number(words, at + PID)).filter(|pid| *pid != NO_PROCESS);
        }
        // A sample with an impossible utilization is as good as missing.
        if sample.has[Engine::Compute as usize] {
            samples.push(sample);
        }
    }
    samples
}

/// Whether NVML's answers are those of the buffer: its device samples, and the process samples of one of them. `None` where there are too
/// few for a comparison, or none that names a process.
pub fn matches_nvml(buffer: &[BufferSample], samples: &[RawSample], process_samples: &[RawProcessSample]) -> Option<bool> {
    let near = |at_us: u64| {
        let nearest = buffer.iter().min_by_key(|sample| sample.at_us.abs_diff(at_us))?;
        (nearest.at_us.abs_diff(at_us) <= SAME_SAMPLE_US).then_some(nearest)
    };
    let compute = Engine::Compute as usize;
    let (mut compared, mut equal) = (0, 0);
    for sample in samples.iter().filter(|sample| sample.percent <= 100) {
        let own = near(sample.at_us).map(|own| own.percent[compute]);
        // Idle samples are equal in any buffer.
        if sample.percent > 0 || own.is_some_and(|percent| percent > 0) {
            compared += 1;
            equal += usize::from(own.is_some_and(|percent| percent.abs_diff(sample.percent) <= 1));
        }
    }
    let is_valid =
        |process: &&RawProcessSample| (1..=100).contains(&process.percent[compute]) && !matches!(process.pid, 0 | u32::MAX);
    let mut named = process_samples.iter().filter(is_valid).peekable();
    if compared < COMPARED || named.peek().is_none() {
        return None;
    }
    let is_same = |process: &RawProcessSample| near(process.at_us).is_none_or(|own| own.pid[compute] == Some(process.pid));
    Some(equal * 10 >= compared * EQUAL_OF_TEN && named.all(is_same))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000;

    fn put(words: &mut [u64], offset: usize, count: usize, value: u64) {
        for n in 0..count {
            words[(offset + n) / 8] |= (value >> (8 * n) & 0xff) << (8 * ((offset + n) % 8));
        }
    }

    #[test]
    fn every_layout_is_parsed_in_the_order_of_the_samples() {
        for layout in LAYOUTS {
            let mut words = vec![0; layout.bytes().div_ceil(8)];
            // The buffer wrapped: slot 1 is the oldest one.
            put(&mut words, NEXT_SLOT, 4, 1);
            for (slot, stamp_ns, util, pid) in [(0, 2_000_000_999u64, 3_986, 7u32), (1, 1_000_000_000, 0, NO_PROCESS)] {
                let begin = HEADER + slot * layout.sample_size;
                put(&mut words, begin, 8, stamp_ns);
                for engine in 0..layout.engines {
                    let at = begin + STAMP + engine * layout.engine_size;
                    put(&mut words, at, 4, if engine == 1 { util } else { 0 });
                    put(&mut words, at + PID, 4, if engine == 1 { pid } else { NO_PROCESS }.into());
                }
            }
            let samples = parse(&words, layout);
            let seen: Vec<_> = samples.iter().map(|s| (s.at_us, s.device_sample().percent, s.pid[0])).collect();
            assert_eq!(seen, [(1_000_000, 0, None), (2_000_000, 39, Some(7))], "{layout:?}");
            assert_eq!(samples[0].process_samples().count(), 0);
            let named: Vec<_> = samples[1].process_samples().collect();
            assert_eq!(named, [RawProcessSample { at_us: 2_000_000, pid: 7, percent: [39, 0, 0, 0, 0, 0] }], "{layout:?}");
        }
    }

    #[test]
    fn the_buffer_is_used_only_while_it_matches_nvml() {
        let sample = |n: u64, percent, pid| {
            let mut sample = BufferSample { at_us: n * 200 * MS, ..BufferSample::default() };
            (sample.percent[0], sample.pid[0]) = (percent, pid);
            sample
        };
        let buffer: Vec<BufferSample> = (1..=72).map(|n| sample(n, n as u32, Some(5))).collect();
        let nvml = |shift: u64| -> Vec<RawSample> {
            (2..=72).map(|n| RawSample { at_us: n * 200 * MS - shift, percent: n as u32 }).collect()
        };
        let names = |pid| [RawProcessSample { at_us: 72 * 200 * MS, pid, percent: [72, 0, 0, 0, 0, 0] }];
        assert_eq!(matches_nvml(&buffer, &nvml(766), &names(5)), Some(true));
        assert_eq!(matches_nvml(&buffer, &nvml(766), &names(6)), Some(false), "another process");
        assert_eq!(matches_nvml(&buffer, &nvml(100 * MS), &names(5)), Some(false), "another grid");
        let other: Vec<RawSample> = nvml(0).into_iter().map(|s| RawSample { percent: 100 - s.percent, ..s }).collect();
        assert_eq!(matches_nvml(&buffer, &other, &names(5)), Some(false), "other utilization");
        assert_eq!(matches_nvml(&buffer, &nvml(0)[..3], &names(5)), None);
        let idle: Vec<RawSample> = nvml(0).into_iter().map(|s| RawSample { percent: 0, ..s }).collect();
        let own_idle: Vec<BufferSample> = buffer.iter().map(|s| BufferSample { percent: [0; Engine::COUNT], ..*s }).collect();
        assert_eq!(matches_nvml(&own_idle, &idle, &names(5)), None, "idle samples are equal in any buffer");
        assert_eq!(matches_nvml(&buffer, &nvml(0), &[]), None, "no process");
    }

    /// Any content of the driver's buffer, in every layout.
    #[test]
    fn fuzz_sample_buffer() {
        devkit::fuzz(file!(), "sample_buffer", move |bytes| {
            for layout in LAYOUTS {
                let mut words = vec![0; layout.bytes().div_ceil(8)];
                // The fuzzer's bytes again and again: whole buffers are longer than what it makes.
                for (n, byte) in bytes.iter().cycle().take(if bytes.is_empty() { 0 } else { words.len() * 8 }).enumerate() {
                    words[n / 8] |= u64::from(*byte) << (8 * (n % 8));
                }
                let samples = parse(&words, layout);
                assert!(samples.len() <= SAMPLES && samples.iter().all(|sample| sample.device_sample().percent <= 100));
                let named: Vec<RawProcessSample> = samples.iter().flat_map(BufferSample::process_samples).collect();
                assert!(named.len() <= samples.len() * layout.engines);
                for process in &named {
                    assert!(process.pid != NO_PROCESS && process.percent.iter().all(|percent| *percent <= 100), "{process:?}");
                    assert!(process.percent.iter().any(|percent| *percent > 0), "{process:?}");
                }
                let own: Vec<RawSample> = samples.iter().map(BufferSample::device_sample).collect();
                let _either = matches_nvml(&samples, &own, &named);
            }
            let short: Vec<u64> = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
            assert!(parse(&short, LAYOUTS[0]).len() <= SAMPLES);
        });
    }
}
