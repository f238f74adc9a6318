//! Adds labels of containers and names of host processes to the recorded facts.

use std::collections::HashSet;
use std::path::Path;

use sampler_core::fact::{Fact, HostProcess, LabelFact};
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Label};
use sampler_session::State;

use crate::labels::LabelView;

/// The unit of start times in /proc/PID/stat: USER_HZ is 100 on every Linux system with GPUs.
const CLOCK_TICK_NS: u64 = 10_000_000;
/// Maximum number of names read at once; fewer processes than this appear on GPUs within a second.
const MAX_READS: usize = 64;
/// Process names in the kernel have up to 15 bytes, names of kernel threads up to 63.
const MAX_COMM_BYTES: usize = 64;

fn label_fact(key: ContainerKey, labels: &ContainerLabels) -> LabelFact {
    let text = |label| labels.text(label).to_owned();
    LabelFact {
        key,
        namespace: text(Label::Namespace),
        pod: text(Label::Pod),
        container: text(Label::Container),
        name: text(Label::Name),
        image: text(Label::Image),
    }
}

/// The labels that differ from those in the file.
pub fn labels(state: &State, view: &LabelView) -> Vec<Fact> {
    let changed = |(key, known): (ContainerKey, Option<&LabelFact>)| {
        let now = label_fact(key, view.get(&key)?);
        (known != Some(&now)).then_some(Fact::Labels(now))
    };
    state.labelled().filter_map(changed).collect()
}

/// Reads the names of processes that do not have one yet.
#[derive(Debug, Default)]
pub struct Comms {
    /// Processes of which the name was read or could not be read.
    tried: HashSet<HostProcess>,
}

impl Comms {
    pub fn read(&mut self, state: &State, procfs: &Path) -> Vec<Fact> {
        let unnamed_processes: HashSet<HostProcess> = state.unnamed_processes().collect();
        self.tried.retain(|process| unnamed_processes.contains(process));
        let new: Vec<HostProcess> =
            unnamed_processes.into_iter().filter(|process| !self.tried.contains(process)).take(MAX_READS).collect();
        let mut all = Vec::new();
        for process in new {
            self.tried.insert(process);
            all.extend(comm(procfs, process).map(|comm| Fact::Comm { process, comm }));
        }
        all
    }
}

/// `None` if the process has ended or its PID was reused.
fn comm(procfs: &Path, process: HostProcess) -> Option<String> {
    // Bytes, because a process can set any name for itself, including parentheses.
    let stat = std::fs::read(procfs.join(process.pid.to_string()).join("stat")).ok()?;
    let open = stat.iter().position(|b| *b == b'(')?;
    let close = stat.iter().rposition(|b| *b == b')')?;
    let comm = String::from_utf8_lossy(stat.get(open + 1..close.min(open + 1 + MAX_COMM_BYTES))?).into_owned();
    // Field 22; the first field after the name is field 3.
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    let start_ns = rest.split_ascii_whitespace().nth(19)?.parse::<u64>().ok()?.saturating_mul(CLOCK_TICK_NS);
    // /proc rounds the start time down; kernel events have the exact time.
    (start_ns.abs_diff(process.start.0) <= CLOCK_TICK_NS).then_some(comm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::units::BootNs;

    #[test]
    fn a_name_is_read_only_for_the_same_start_time() {
        let proc = tempfile::tempdir().unwrap();
        let folder = proc.path().join("7");
        std::fs::create_dir(&folder).unwrap();
        let zeros = "0 ".repeat(18);
        std::fs::write(folder.join("stat"), format!("7 (a) (b\u{e9}) S {zeros}1234 0 0\n")).unwrap();
        let read = |start| comm(proc.path(), HostProcess { pid: 7, start: BootNs(start) });
        assert_eq!(read(12_345_678_901), Some("a) (b\u{e9}".into()));
        assert_eq!(read(12_340_000_000), Some("a) (b\u{e9}".into()));
        assert_eq!(read(12_400_000_000), None, "another process");
        assert_eq!(comm(proc.path(), HostProcess { pid: 8, start: BootNs(1) }), None);
    }
}
