//! Writes the use of GPUs to the log of the simulated NVML: which processes have a context, and when each of them was on the GPU.
//!
//! Each line is one append. The format is that of `loads` in nvml-sim; the tests of this package read it with nvml-sim's own reader.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, at};
use crate::schedule::Span;

const FILE: &str = "loads";
/// Memory that the process list shows for a context.
pub const CONTEXT_BYTES: u64 = 512 << 20;

pub struct NvmlLog {
    path: PathBuf,
}

impl NvmlLog {
    pub fn new(dir: &Path) -> Self {
        Self { path: dir.join(FILE) }
    }

    /// The process has a context from now on. Returns the id of its load.
    pub fn begin(&self, pid: u32, start_time: u64, gpu: usize, now_ns: u64) -> Result<u64, Error> {
        let begin_us = now_ns / 1_000;
        // As nvml-sim makes ids.
        let id = begin_us << 16 | u64::from(pid) & 0xffff;
        self.append(&format!(
            "{{\"begin\":{{\"id\":{id},\"pid\":{pid},\"start_time\":{start_time},\"gpu\":{gpu},\"demand\":0.0,\
             \"memory_bytes\":{CONTEXT_BYTES},\"begin_us\":{begin_us},\"ways\":{{\"scheduled\":true}}}}}}\n"
        ))?;
        Ok(id)
    }

    pub fn end(&self, load: u64, now_ns: u64) -> Result<(), Error> {
        self.append(&format!("{{\"end\":{load},\"end_us\":{}}}\n", now_ns / 1_000))
    }

    /// A line for each load, with its spans.
    pub fn ran(&self, spans: &[Span]) -> Result<(), Error> {
        self.append(&lines(spans))
    }

    fn append(&self, text: &str) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        let file = OpenOptions::new().append(true).open(&self.path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(at(&self.path, "append a line"))
    }
}

/// Both ends of a span are cut to microseconds, so spans that adjoin still do.
fn lines(spans: &[Span]) -> String {
    let mut loads: Vec<u64> = spans.iter().map(|span| span.load).collect();
    loads.sort_unstable();
    loads.dedup();
    let mut text = String::new();
    for load in loads {
        let of_load = spans.iter().filter(|span| span.load == load);
        let list: Vec<String> = of_load.map(|span| format!("[{},{}]", span.from_ns / 1_000, span.to_ns / 1_000)).collect();
        // Writing to a string cannot fail.
        let _ok = writeln!(text, "{{\"ran\":{load},\"spans\":[{}]}}", list.join(","));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_one_line_for_each_load() {
        let span = |load, from_ns, to_ns| Span { load, from_ns, to_ns };
        let spans = [span(7, 1_000, 3_500), span(2, 3_500, 4_000), span(7, 4_000, 9_999)];
        assert_eq!(lines(&spans), "{\"ran\":2,\"spans\":[[3,4]]}\n{\"ran\":7,\"spans\":[[1,3],[4,9]]}\n");
        assert_eq!(lines(&[]), "");
    }
}
