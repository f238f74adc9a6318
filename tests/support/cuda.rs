//! Processes that use the simulated CUDA driver, the truth of their waiting, and which functions of the library have breakpoints.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _};
use serde_json::Value;

use crate::{Sim, var};

/// A call that blocks, and the call on which clients are noticed: its breakpoint is in all processes of a library.
pub const BLOCKING_CALL: &str = "cuStreamSynchronize";
pub const FIRST_CALL: &str = "cuInit";

/// What `cuda-work truth` states of one process.
#[derive(Clone, Debug)]
pub struct WaitTruth {
    /// As the library's functions measure it, and as their caller does.
    pub wait_some_s: f64,
    pub caller_some_s: f64,
    pub calls: f64,
    pub gpu_s: f64,
    /// PIDs that were on the GPU during the waiting, with seconds.
    pub during: Vec<(u32, f64)>,
}

impl WaitTruth {
    /// Seconds of the waiting in which this process was on the GPU.
    pub fn during(&self, pid: u32) -> f64 {
        self.during.iter().filter(|(other, _)| *other == pid).map(|(_, seconds)| seconds).sum()
    }
}

impl Sim {
    /// Puts the CUDA library into the world. Returns its path.
    pub fn install_cuda(&self) -> Result<PathBuf> {
        let output = Command::new(var("CUDA_WORK_BIN")?).args(["install", "--dir"]).arg(self.dir.path()).output()?;
        ensure!(output.status.success(), "cuda-work install: {}", String::from_utf8_lossy(&output.stderr));
        Ok(self.dir.path().join("lib/libcuda.so.1"))
    }

    /// The words of `cuda-work run` with these arguments, for a command that is started by another program.
    pub fn cuda_words(&self, arguments: &str) -> Result<Vec<String>> {
        let dir = self.dir.path().display();
        let mut words = vec!["env".to_owned(), format!("NVML_SIM_DIR={dir}"), var("CUDA_WORK_BIN")?];
        words.extend(["run".to_owned(), "--dir".to_owned(), dir.to_string()]);
        words.extend(arguments.split_whitespace().map(str::to_owned));
        Ok(words)
    }

    /// The truth of a process in a span of the wall clock, in microseconds; `None` if it did not use CUDA then.
    pub fn wait_truth(&self, pid: u32, (from_us, to_us): (u64, u64)) -> Result<Option<WaitTruth>> {
        let [from, to] = [from_us, to_us].map(nvidia_ml_sim::time::format);
        let mut command = Command::new(var("CUDA_WORK_BIN")?);
        let output = command.args(["truth", "--from", &from, "--to", &to, "--dir"]).arg(self.dir.path()).output()?;
        ensure!(output.status.success(), "cuda-work truth: {}", String::from_utf8_lossy(&output.stderr));
        let truth: Value = serde_json::from_slice(&output.stdout)?;
        let processes = truth["processes"].as_array().context("processes")?;
        let Some(process) = processes.iter().find(|process| process["pid"] == pid) else { return Ok(None) };
        let number = |value: &Value, key: &str| value[key].as_f64().with_context(|| format!("{key} of {value}"));
        let other = |one: &Value| Ok((one["pid"].as_u64().context("pid")? as u32, number(one, "seconds")?));
        Ok(Some(WaitTruth {
            wait_some_s: number(process, "wait_some_seconds")?,
            caller_some_s: number(process, "caller_some_seconds")?,
            calls: number(process, "calls")?,
            gpu_s: number(process, "gpu_seconds")?,
            during: process["while"].as_array().context("while")?.iter().map(other).collect::<Result<_>>()?,
        }))
    }
}

#[derive(Clone, Debug)]
struct Function {
    name: String,
    offset: u64,
    first_byte: u8,
}

/// The exported functions of a CUDA library, as the file has them.
#[derive(Clone, Debug)]
pub struct CudaLibrary {
    pub path: PathBuf,
    functions: Vec<Function>,
}

impl CudaLibrary {
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let elf = object::File::parse(&*bytes)?;
        let segments: Vec<(u64, u64, u64)> =
            elf.segments().map(|segment| (segment.address(), segment.file_range().1, segment.file_range().0)).collect();
        let offset = |address: u64| {
            let within = |(start, size, offset): &(u64, u64, u64)| {
                address.checked_sub(*start).filter(|distance| distance < size).map(|distance| offset + distance)
            };
            segments.iter().find_map(within)
        };
        let function = |symbol: object::Symbol<'_, '_>| {
            let name = symbol.name().ok().filter(|name| name.starts_with("cu") && symbol.is_definition())?.to_owned();
            let offset = offset(symbol.address())?;
            Some(Function { name, offset, first_byte: *bytes.get(offset as usize)? })
        };
        let functions: Vec<Function> = elf.dynamic_symbols().filter_map(function).collect();
        ensure!(functions.iter().any(|function| function.name == BLOCKING_CALL), "{}: no {BLOCKING_CALL}", path.display());
        Ok(Self { path: path.to_owned(), functions })
    }

    /// The functions of which the first instruction differs from the file in this process: they have a breakpoint.
    pub fn breakpoints(&self, pid: u32) -> Result<BTreeSet<String>> {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).with_context(|| format!("maps of {pid}"))?;
        let memory = File::open(format!("/proc/{pid}/mem"))?;
        let mappings: Vec<(u64, u64, u64)> = maps.lines().filter_map(|line| self.mapping(line)).collect();
        let mut found = BTreeSet::new();
        for function in &self.functions {
            let within = |(from, to, begin): &(u64, u64, u64)| {
                let address = from + function.offset.checked_sub(*begin)?;
                (address < *to).then_some(address)
            };
            let Some(address) = mappings.iter().find_map(within) else { continue };
            let mut byte = [0];
            memory.read_exact_at(&mut byte, address).with_context(|| format!("memory of {pid} at {address:x}"))?;
            if byte[0] != function.first_byte {
                found.insert(function.name.clone());
            }
        }
        Ok(found)
    }

    /// Whether the process has a probe on a blocking call.
    pub fn is_probed(&self, pid: u32) -> Result<bool> {
        Ok(self.breakpoints(pid)?.contains(BLOCKING_CALL))
    }

    /// Begin, end and offset in the file of a mapping of this library's code.
    fn mapping(&self, line: &str) -> Option<(u64, u64, u64)> {
        let mut fields = line.splitn(6, ' ').map(str::trim);
        let (range, permissions, offset) = (fields.next()?, fields.next()?, fields.next()?);
        let path = fields.nth(2)?.trim_end_matches(" (deleted)");
        let (from, to) = range.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let is_code = Path::new(path) == self.path && permissions.contains('x');
        is_code.then_some((number(from)?, number(to)?, number(offset)?))
    }
}

/// Run time of a process on processors, of all of its threads with this name, or of all threads that live; seconds.
pub fn run_time_s(pid: u32, thread: Option<&str>) -> Result<f64> {
    let mut sum_ns = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let read = |file: &str| std::fs::read_to_string(entry.path().join(file)).ok();
        // A thread may have ended meanwhile.
        let (Some(name), Some(stat)) = (read("comm"), read("schedstat")) else { continue };
        if thread.is_none_or(|thread| name.trim() == thread) {
            sum_ns += stat.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).context("schedstat")?;
        }
    }
    Ok(sum_ns as f64 * 1e-9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_of_the_library_is_found_in_maps_also_when_the_file_was_replaced() {
        let library = CudaLibrary { path: "/w/lib/libcuda.so.1".into(), functions: Vec::new() };
        for (line, expect) in [
            ("7f10-7f20 r-xp 00001000 fd:01 1234                       /w/lib/libcuda.so.1", Some((0x7f10, 0x7f20, 0x1000))),
            ("7f10-7f20 r-xp 0000f000 fd:01 1234    /w/lib/libcuda.so.1 (deleted)", Some((0x7f10, 0x7f20, 0xf000))),
            ("7f10-7f20 r--p 00001000 fd:01 1234                       /w/lib/libcuda.so.1", None),
            ("7f10-7f20 r-xp 00001000 fd:01 1234                       /w/other/libcuda.so.1", None),
            ("7f10-7f20 r-xp 00000000 00:00 0 ", None),
        ] {
            assert_eq!(library.mapping(line), expect, "{line}");
        }
    }
}
