//! What joins the facts on their way into files: labels of containers, names of processes outside them.

use std::collections::HashSet;
use std::path::Path;

use sampler_core::fact::{Fact, HostProcess, LabelFact};
use sampler_core::units::ContainerKey;
use sampler_labels::{ContainerLabels, Label};
use sampler_session::State;

use crate::labels::LabelView;

/// A clock tick of /proc/PID/stat: USER_HZ is 100 on every Linux that runs GPUs.
const TICK_NS: u64 = 10_000_000;
/// Names read in one go; more processes than this do not appear on GPUs within a second.
const MOST_READS: usize = 64;
/// The kernel's own names have 15 bytes, kernel threads' up to 63.
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

/// Labels that are not in the file as they are now.
pub fn labels(state: &State, view: &LabelView) -> Vec<Fact> {
    let changed = |(key, known): (ContainerKey, Option<&LabelFact>)| {
        let now = label_fact(key, view.get(&key)?);
        (known != Some(&now)).then_some(Fact::Labels(now))
    };
    state.labelled().filter_map(changed).collect()
}

/// Reads names of processes that have none yet.
#[derive(Debug, Default)]
pub struct Comms {
    /// Looked at already, with or without success.
    asked: HashSet<HostProcess>,
}

impl Comms {
    pub fn read(&mut self, state: &State, procfs: &Path) -> Vec<Fact> {
        let nameless: HashSet<HostProcess> = state.nameless().collect();
        self.asked.retain(|process| nameless.contains(process));
        let new: Vec<HostProcess> =
            nameless.into_iter().filter(|process| !self.asked.contains(process)).take(MOST_READS).collect();
        let mut all = Vec::new();
        for process in new {
            self.asked.insert(process);
            all.extend(comm(procfs, process).map(|comm| Fact::Comm { process, comm }));
        }
        all
    }
}

/// `None` when it has ended, or the pid is another's by now.
fn comm(procfs: &Path, process: HostProcess) -> Option<String> {
    // Bytes: a process may have given itself any name, parentheses in it.
    let stat = std::fs::read(procfs.join(process.pid.to_string()).join("stat")).ok()?;
    let open = stat.iter().position(|b| *b == b'(')?;
    let close = stat.iter().rposition(|b| *b == b')')?;
    let comm = String::from_utf8_lossy(stat.get(open + 1..close.min(open + 1 + MAX_COMM_BYTES))?).into_owned();
    // Field 22; the first one behind the name is the third.
    let rest = std::str::from_utf8(stat.get(close + 1..)?).ok()?;
    let start_ns = rest.split_ascii_whitespace().nth(19)?.parse::<u64>().ok()?.saturating_mul(TICK_NS);
    // Rounded down there; the kernel's events have it exactly.
    (start_ns.abs_diff(process.start.0) <= TICK_NS).then_some(comm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_core::units::BootNs;

    #[test]
    fn names_of_processes() {
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
