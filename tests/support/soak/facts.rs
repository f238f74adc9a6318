//! The samples in the sessions of a run, one by one: each belongs to the process that the simulator recorded for it, and is credited to the
//! container of that process, or has a reason instead.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use sampler_core::fact::{ContainerFact, Fact, GpuFact, User};
use sampler_core::units::ContainerKey;
use sampler_session::Session;

use super::accounts::Problem;
use super::world::HOST;
use crate::record::{NamedSample, RecordedProcesses, id_of};

/// The user that a session credits a sample to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CreditedTo {
    /// By container id, or by the name of another user.
    User(String),
    Host,
    /// There is a reason instead.
    Unattributed,
}

/// One process of one sample in a session.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SessionSample {
    pub uuid: String,
    pub stamp_us: u64,
    pub pid: u32,
    pub to: CreditedTo,
}

/// The samples of a session that name a process.
pub fn samples(session: &Session) -> Vec<SessionSample> {
    let mut uuids: HashMap<u32, String> = HashMap::new();
    let mut ids: HashMap<ContainerKey, String> = HashMap::new();
    let mut samples = Vec::new();
    for fact in &session.facts {
        match fact {
            Fact::Gpu { gpu, fact: GpuFact::Opened(info), .. } => {
                uuids.insert(*gpu, info.uuid.to_string());
            }
            Fact::Container(ContainerFact { key, cgroup_path, container_id, .. }) => {
                ids.insert(*key, container_id.clone().unwrap_or_else(|| id_of(cgroup_path)));
            }
            Fact::Gpu { gpu, fact: GpuFact::Utilization(sample), .. } => {
                samples.extend(sample.processes.iter().map(|process| SessionSample {
                    uuid: uuids.get(gpu).cloned().unwrap_or_default(),
                    stamp_us: sample.stamp.0 / 1000,
                    pid: process.pid,
                    to: match process.user {
                        User::Container(key) => CreditedTo::User(ids.get(&key).cloned().unwrap_or_default()),
                        User::Host(_) => CreditedTo::Host,
                        User::Unattributed(_) => CreditedTo::Unattributed,
                    },
                }));
            }
            _ => {}
        }
    }
    samples
}

/// Of the samples that were recorded while an agent ran, at least this part is in sessions that have ended: some were interrupted.
const COMPARED_LEAST: f64 = 0.4;
/// Of those at most this part has a reason instead of a user, beyond the time of which the agent states not to know the user.
const UNATTRIBUTED_MOST: f64 = 0.05;

/// How many samples of sessions were compared.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SessionVerdict {
    pub compared: u64,
    /// Of these, the ones that have a reason instead of a user.
    pub unattributed: u64,
}

impl SessionVerdict {
    /// What is wrong with their numbers. `recorded`: samples while an agent ran; `unknown`: the part of the time of which it states not to
    /// know the user.
    pub fn problems(&self, recorded: u64, unknown: f64) -> Vec<Problem> {
        let Self { compared, unattributed } = *self;
        let mut problems = Vec::new();
        if (compared as f64) < COMPARED_LEAST * recorded as f64 {
            let text = format!("{compared} samples are in sessions, {recorded} were recorded while an agent ran");
            problems.push(Problem::new("samples in sessions", text));
        }
        if unattributed as f64 > (UNATTRIBUTED_MOST + unknown) * compared as f64 {
            let text = format!("{unattributed} of {compared} samples in sessions have a reason instead of a user");
            problems.push(Problem::new("unattributed samples", text));
        }
        problems
    }
}

/// Compares with the record. A clock that was set may give two samples the same stamp, either of which is meant.
pub fn judge(
    found: &BTreeSet<SessionSample>,
    recorded: &[NamedSample],
    processes: &RecordedProcesses,
) -> (SessionVerdict, Vec<Problem>) {
    let mut by_stamp: BTreeMap<(&str, u64, u32), Vec<&NamedSample>> = BTreeMap::new();
    for sample in recorded {
        by_stamp.entry((&sample.uuid, sample.stamp_us, sample.pid)).or_default().push(sample);
    }
    let (mut verdict, mut problems) = (SessionVerdict::default(), Vec::new());
    for sample in found {
        verdict.compared += 1;
        verdict.unattributed += u64::from(sample.to == CreditedTo::Unattributed);
        let of_stamp = by_stamp.get(&(sample.uuid.as_str(), sample.stamp_us, sample.pid)).map_or(&[][..], Vec::as_slice);
        let owners = || of_stamp.iter().filter_map(|recorded| processes.owner(recorded)).map(|life| id_of(&life.cgroup));
        let is_owned = match &sample.to {
            CreditedTo::User(id) => owners().any(|owner| owner == *id),
            CreditedTo::Host => owners().any(|owner| owner == HOST),
            CreditedTo::Unattributed => !of_stamp.is_empty(),
        };
        if !is_owned {
            let text = format!("{sample:?} belongs to {:?}", owners().collect::<Vec<_>>());
            problems.push(Problem::new("wrong owner of a sample", text));
        }
    }
    (verdict, problems)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::RecordedLife;

    #[test]
    fn few_samples_and_many_without_a_user_are_found() {
        let problems = |compared, unattributed, unknown| SessionVerdict { compared, unattributed }.problems(1000, unknown).len();
        assert_eq!(
            (problems(500, 20, 0.0), problems(399, 10, 0.0), problems(500, 30, 0.0), problems(500, 30, 0.1)),
            (0, 1, 1, 0)
        );
    }

    #[test]
    fn a_sample_of_another_container_or_of_no_process_is_found() {
        let life = |cgroup: &str, pid: u32| RecordedLife {
            pid,
            cgroup: cgroup.into(),
            gpu: 0,
            begin_us: 1_000_000,
            end_us: 9_000_000,
            gone_us: 9_000_000,
        };
        let processes = RecordedProcesses::new(&[life("/x/a", 7), life(HOST, 8)], 100_000);
        let sample = |pid| NamedSample { gpu: 0, uuid: "G".into(), pid, at_us: 2_000_000, stamp_us: 500 };
        let recorded = [sample(7), sample(8)];
        let judge = |pid: u32, stamp_us: u64, to: CreditedTo| {
            let (verdict, problems) =
                judge(&BTreeSet::from([SessionSample { uuid: "G".into(), stamp_us, pid, to }]), &recorded, &processes);
            assert_eq!(verdict.compared, 1);
            problems.len()
        };
        let user = |id: &str| CreditedTo::User(id.into());
        assert_eq!(
            (judge(7, 500, user("a")), judge(7, 500, CreditedTo::Unattributed), judge(8, 500, CreditedTo::Host)),
            (0, 0, 0)
        );
        assert_eq!((judge(7, 500, user("b")), judge(7, 500, CreditedTo::Host), judge(8, 500, user("a"))), (1, 1, 1));
        assert_eq!((judge(9, 500, user("a")), judge(7, 501, user("a")), judge(9, 500, CreditedTo::Unattributed)), (1, 1, 1));
    }
}
