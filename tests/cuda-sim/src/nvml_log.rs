//! Writes the use of GPUs to the log of the simulated NVML: which processes have a context, and when each of them was on the GPU.
//!
//! Each line is one append. The format is that of `loads` in nvml-sim; the tests of this package read it with nvml-sim's own reader.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::error::{Error, at};
use crate::schedule::Span;

const FILE: &str = "loads";
/// Memory that the process list shows for a context.
pub const CONTEXT_BYTES: u64 = 512 << 20;

/// What is to be written.
#[derive(Clone, Copy, Debug)]
pub enum Entry {
    Ran(Span),
    /// The process has no context any more.
    End {
        load: u64,
        at_ns: u64,
    },
}

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

    /// Appends a line for each load with its spans, then the ends.
    pub fn write(&self, entries: &[Entry]) -> Result<(), Error> {
        if entries.is_empty() { Ok(()) } else { self.append(&lines(entries)) }
    }

    fn append(&self, text: &str) -> Result<(), Error> {
        let file = OpenOptions::new().append(true).open(&self.path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(at(&self.path, "append a line"))
    }
}

/// Both ends of a span are cut to microseconds, so spans that adjoin still do.
fn lines(entries: &[Entry]) -> String {
    let (mut spans, mut ends) = (BTreeMap::<u64, Vec<String>>::new(), String::new());
    for entry in entries {
        match entry {
            Entry::Ran(Span { load, from_ns, to_ns }) => {
                spans.entry(*load).or_default().push(format!("[{},{}]", from_ns / 1_000, to_ns / 1_000));
            }
            Entry::End { load, at_ns } => ends += &format!("{{\"end\":{load},\"end_us\":{}}}\n", at_ns / 1_000),
        }
    }
    let lines = spans.into_iter().map(|(load, spans)| format!("{{\"ran\":{load},\"spans\":[{}]}}\n", spans.join(",")));
    lines.chain([ends]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_have_one_line_for_each_load() {
        let span = |load, from_ns, to_ns| Entry::Ran(Span { load, from_ns, to_ns });
        let end = Entry::End { load: 7, at_ns: 9_999 };
        let entries = [span(7, 1_000, 3_500), end, span(2, 3_500, 4_000), span(7, 4_000, 9_999)];
        assert_eq!(
            lines(&entries),
            "{\"ran\":2,\"spans\":[[3,4]]}\n{\"ran\":7,\"spans\":[[1,3],[4,9]]}\n{\"end\":7,\"end_us\":9}\n"
        );
        assert_eq!(lines(&[]), "");
    }
}
