//! The content of State frames, and which facts belong in a file.

use super::generate::{Node, Random, SECOND, START};
use crate::State;
use sampler_core::device::Reason;
use sampler_core::experiment::{ExperimentDesign, ExperimentFact, FreezeConsent};
use sampler_core::fact::*;
use sampler_core::observation::EngineFact;
use sampler_core::units::{BootNs, ContainerKey, GpuNs};

fn container(key: u64) -> Fact {
    Fact::Container(ContainerFact {
        key: ContainerKey(key),
        cgroup_path: format!("/docker/{key}"),
        container_id: None,
        runtime: None,
        pod_uid: None,
        created: BootNs(1),
        creation_seen: true,
    })
}

fn labels(key: u64, name: &str) -> Fact {
    Fact::Labels(LabelFact { key: ContainerKey(key), name: name.into(), ..LabelFact::default() })
}

fn sample(second: u64, user: User) -> Fact {
    let process = AttributedProcess { pid: 7, percent: 9, user, since: BootNs(1) };
    let sample = UtilizationSample { stamp: GpuNs(1), ns: SECOND, busy_percent: 9, processes: vec![process] };
    Fact::Gpu { gpu: 0, at: BootNs(START + second * SECOND), fact: GpuFact::Utilization(sample) }
}

fn follow(state: &mut State, facts: &[Fact]) -> Vec<Fact> {
    let mut emitted = Vec::new();
    for fact in facts {
        state.follow(fact, &mut |fact| emitted.push(fact));
    }
    emitted
}

const C1: User = User::Container(ContainerKey(1));

#[test]
fn a_container_is_emitted_when_first_named() {
    let mut state = State::default();
    assert_eq!(follow(&mut state, &[container(1), labels(1, "a"), container(2)]), []);
    assert_eq!(follow(&mut state, &[sample(1, C1)]), [container(1), labels(1, "a"), sample(1, C1)]);
    assert_eq!(follow(&mut state, &[sample(2, C1), labels(1, "b"), labels(2, "c")]), [sample(2, C1), labels(1, "b")]);
    assert_eq!(state.labelled().count(), 1);
    let forgotten = |key| Fact::ContainerForgotten { key: ContainerKey(key) };
    assert_eq!(follow(&mut state, &[forgotten(1), forgotten(2)]), [forgotten(1)]);
    assert_eq!(
        follow(&mut state, &[sample(3, C1), container(1)]),
        [sample(3, C1), container(1)],
        "named before its container fact"
    );
}

#[test]
fn a_serving_engine_is_emitted_if_its_container_is_and_is_in_no_state() {
    let engine =
        |key| Fact::Engine(EngineFact { key: ContainerKey(key), at: BootNs(START + 9 * SECOND), ..EngineFact::default() });
    let mut state = State::default();
    assert_eq!(follow(&mut state, &[container(1), engine(1), engine(2)]), []);
    assert_eq!(follow(&mut state, &[sample(1, C1), engine(1)]), [container(1), sample(1, C1), engine(1)]);
    assert!(!state.facts().iter().any(|fact| matches!(fact, Fact::Engine(_))));
    assert_eq!(state.now(), BootNs(START + 9 * SECOND));
}

#[test]
fn users_not_recently_named_are_emitted_again() {
    let mut state = State::default();
    follow(&mut state, &[container(1), labels(1, "a"), sample(1, C1)]);
    assert_eq!(state.facts(), [container(1), labels(1, "a")], "the GPU has no Opened fact");
    follow(&mut state, &[sample(70, User::Unattributed(Reason::NoPid))]);
    assert_eq!(state.facts(), []);
    assert_eq!(follow(&mut state, &[labels(1, "b")]), []);
    assert_eq!(follow(&mut state, &[sample(71, C1)]), [container(1), labels(1, "b"), sample(71, C1)]);
}

#[test]
fn host_processes_without_a_name_are_listed_until_named() {
    let process = HostProcess { pid: 7, start: BootNs(3) };
    let comm = Fact::Comm { process, comm: "python3".into() };
    let mut state = State::default();
    follow(&mut state, &[sample(1, User::Host(process))]);
    assert_eq!(state.unnamed_processes().collect::<Vec<_>>(), [process]);
    let all = [comm];
    assert_eq!(follow(&mut state, &all), all);
    assert_eq!((state.unnamed_processes().count(), state.facts()), (0, all.to_vec()));
}

/// A sample without processes is complete once four later samples have processes, or after ten seconds.
#[test]
fn is_complete_waits_for_neighbouring_samples() {
    let node = Node { gpus: 1, processes: 0, max_processes: 0 };
    let at = |second: u64| BootNs(START + second * SECOND);
    let mut state = State::default();
    assert!(state.is_complete(at(5)), "there is no GPU");
    node.begin().iter().for_each(|fact| state.apply(fact));
    let unnamed = |second| {
        let sample = UtilizationSample { stamp: GpuNs(1), ns: SECOND, busy_percent: 9, processes: Vec::new() };
        Fact::Gpu { gpu: 0, at: at(second), fact: GpuFact::Utilization(sample) }
    };
    state.apply(&sample(4, C1));
    assert!(!state.is_complete(at(5)));
    state.apply(&unnamed(5));
    state.apply(&unnamed(7));
    for second in 8..11 {
        state.apply(&sample(second, C1));
        assert!(state.is_complete(at(4)) && !state.is_complete(at(5)));
    }
    state.apply(&sample(11, C1));
    assert!(state.is_complete(at(5)) && state.is_complete(at(11)));
    state.apply(&unnamed(12));
    assert!(!state.is_complete(at(12)));
    state.apply(&Fact::Gpu { gpu: 0, at: at(22), fact: GpuFact::Idle { ns: SECOND } });
    assert!(state.is_complete(at(12)));
}

/// The time in which the driver was replaced is reported after the device was opened again.
#[test]
fn is_complete_waits_for_the_time_before_a_device_was_opened_again() {
    let node = Node { gpus: 1, processes: 0, max_processes: 0 };
    let at = |second: u64| BootNs(START + second * SECOND);
    let mut state = State::default();
    let begin = node.begin();
    begin.iter().for_each(|fact| state.apply(fact));
    state.apply(&sample(4, C1));
    let opened = begin.iter().find_map(|fact| match fact {
        Fact::Gpu { fact: opened @ GpuFact::Opened(_), .. } => Some(opened.clone()),
        _ => None,
    });
    state.apply(&Fact::Gpu { gpu: 0, at: at(9), fact: opened.unwrap() });
    assert!(state.is_complete(at(4)) && !state.is_complete(at(8)));
    let before = GpuFact::Unobserved { ns: 5 * SECOND, why: UnobservedReason::Start };
    state.apply(&Fact::Gpu { gpu: 0, at: at(9), fact: before });
    assert!(state.is_complete(at(8)));
}

#[test]
fn containers_without_gpu_use_leave_no_trace() {
    let mut state = State::default();
    let mut emitted = Vec::new();
    for key in 0..300_000 {
        let gone = Fact::ContainerGone { key: ContainerKey(key), at: BootNs(START) };
        emitted.extend(follow(&mut state, &[container(key), labels(key, "x"), gone]));
    }
    assert_eq!((emitted, state.facts()), (vec![], vec![]));
}

/// A reader that begins with a State has the same state as one that read all facts.
#[test]
fn a_state_replaces_all_facts_before_it() {
    let node = Node { gpus: 3, processes: 9, max_processes: 2 };
    let mut state = State::default();
    node.begin().iter().for_each(|fact| state.apply(fact));
    let mut random = Random(5);
    for second in 0..130 {
        node.second(second, &mut random).iter().for_each(|fact| state.apply(fact));
    }
    state.apply(&Fact::Gpu { gpu: 1, at: BootNs(START), fact: GpuFact::Gone });
    let facts = state.facts();
    let mut restored = State::default();
    facts.iter().chain(&facts).for_each(|fact| restored.apply(fact));
    assert_eq!(restored.facts(), facts);
    let is_summed = |fact: &Fact| matches!(fact, Fact::Gpu { fact: GpuFact::Utilization(_) | GpuFact::Idle { .. }, .. });
    assert!(!facts.iter().any(is_summed));
    assert!(!facts.iter().any(|fact| matches!(fact, Fact::Gpu { gpu: 1, .. })), "it is gone");
}

#[test]
fn the_last_experiment_is_in_the_state_until_a_minute_after_its_end() {
    let design = ExperimentDesign { seed: 3, bursts: 6, window_ns: SECOND, pause_ns: 0, consent: FreezeConsent::Operator };
    let schedule = design.draw("/docker/1".into(), "/docker/2".into(), BootNs(START));
    let frozen = |burst: u32, to: u64| {
        Fact::Experiment(ExperimentFact::Frozen { experiment: BootNs(START), burst, from: BootNs(START), to: BootNs(to) })
    };
    let scheduled = Fact::Experiment(ExperimentFact::Schedule(schedule));
    let mut state = State::default();
    let all = [scheduled.clone(), frozen(0, START + 1)];
    assert_eq!(follow(&mut state, &all), all);
    // The same schedule again keeps the freezes; a burst that the schedule does not have is not kept.
    follow(&mut state, &[scheduled.clone(), frozen(6, START + 2), frozen(0, START + 3)]);
    assert_eq!(state.facts(), [scheduled, frozen(0, START + 3)]);
    follow(&mut state, &[sample(73, User::Unattributed(Reason::NoPid))]);
    assert_eq!(state.facts(), []);
}
