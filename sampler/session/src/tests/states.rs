//! What a State frame holds, and what of the facts belongs in a file.

use super::generate::{Node, Random, SECOND, START};
use crate::State;
use sampler_core::device::Reason;
use sampler_core::fact::*;
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

fn tick(second: u64, user: User) -> Fact {
    let row = AttributedProcess { pid: 7, percent: 9, user, since: BootNs(1) };
    let tick = UtilizationSample { stamp: GpuNs(1), ns: SECOND, busy_percent: 9, processes: vec![row] };
    Fact::Gpu { gpu: 0, at: BootNs(START + second * SECOND), fact: GpuFact::Utilization(tick) }
}

fn follow(state: &mut State, facts: &[Fact]) -> Vec<Fact> {
    let mut told = Vec::new();
    for fact in facts {
        state.follow(fact, &mut |fact| told.push(fact));
    }
    told
}

const C1: User = User::Container(ContainerKey(1));

#[test]
fn a_container_is_told_once_it_is_named() {
    let mut state = State::default();
    assert_eq!(follow(&mut state, &[container(1), labels(1, "a"), container(2)]), []);
    assert_eq!(follow(&mut state, &[tick(1, C1)]), [container(1), labels(1, "a"), tick(1, C1)]);
    assert_eq!(follow(&mut state, &[tick(2, C1), labels(1, "b"), labels(2, "c")]), [tick(2, C1), labels(1, "b")]);
    assert_eq!(state.labelled().count(), 1);
    let forgotten = |key| Fact::ContainerForgotten { key: ContainerKey(key) };
    assert_eq!(follow(&mut state, &[forgotten(1), forgotten(2)]), [forgotten(1)]);
    assert_eq!(follow(&mut state, &[tick(3, C1), container(1)]), [tick(3, C1), container(1)], "named before it is told");
}

#[test]
fn who_was_not_named_lately_is_told_again() {
    let mut state = State::default();
    follow(&mut state, &[container(1), labels(1, "a"), tick(1, C1)]);
    assert_eq!(state.facts(), [container(1), labels(1, "a")], "the GPU was never told");
    follow(&mut state, &[tick(70, User::Nobody(Reason::NoPid))]);
    assert_eq!(state.facts(), []);
    assert_eq!(follow(&mut state, &[labels(1, "b")]), []);
    assert_eq!(follow(&mut state, &[tick(71, C1)]), [container(1), labels(1, "b"), tick(71, C1)]);
}

#[test]
fn names_of_host_processes() {
    let process = HostProcess { pid: 7, start: BootNs(3) };
    let comm = Fact::Comm { process, comm: "python3".into() };
    let mut state = State::default();
    follow(&mut state, &[tick(1, User::Host(process))]);
    assert_eq!(state.nameless().collect::<Vec<_>>(), [process]);
    let all = [comm];
    assert_eq!(follow(&mut state, &all), all);
    assert_eq!((state.nameless().count(), state.facts()), (0, all.to_vec()));
}

/// A sample that names nobody is told whole once four later ones name somebody, or ten seconds later.
#[test]
fn when_the_end_is_told() {
    let node = Node { gpus: 1, processes: 0, rows: 0 };
    let at = |second: u64| BootNs(START + second * SECOND);
    let mut state = State::default();
    assert!(state.is_told(at(5)), "there is no GPU");
    node.begin().iter().for_each(|fact| state.apply(fact));
    let unnamed = |second| {
        let tick = UtilizationSample { stamp: GpuNs(1), ns: SECOND, busy_percent: 9, processes: Vec::new() };
        Fact::Gpu { gpu: 0, at: at(second), fact: GpuFact::Utilization(tick) }
    };
    state.apply(&tick(4, C1));
    assert!(!state.is_told(at(5)));
    state.apply(&unnamed(5));
    state.apply(&unnamed(7));
    for second in 8..11 {
        state.apply(&tick(second, C1));
        assert!(state.is_told(at(4)) && !state.is_told(at(5)));
    }
    state.apply(&tick(11, C1));
    assert!(state.is_told(at(5)) && state.is_told(at(11)));
    state.apply(&unnamed(12));
    assert!(!state.is_told(at(12)));
    state.apply(&Fact::Gpu { gpu: 0, at: at(22), fact: GpuFact::Idle { ns: SECOND } });
    assert!(state.is_told(at(12)));
}

#[test]
fn a_thousand_lives_a_second_leave_nothing() {
    let mut state = State::default();
    let mut told = Vec::new();
    for key in 0..300_000 {
        let gone = Fact::ContainerGone { key: ContainerKey(key), at: BootNs(START) };
        told.extend(follow(&mut state, &[container(key), labels(key, "x"), gone]));
    }
    assert_eq!((told, state.facts()), (vec![], vec![]));
}

/// Whoever begins with a State knows what whoever read everything knows.
#[test]
fn a_state_stands_for_what_was_before() {
    let node = Node { gpus: 3, processes: 9, rows: 2 };
    let mut state = State::default();
    node.begin().iter().for_each(|fact| state.apply(fact));
    let mut random = Random(5);
    for second in 0..130 {
        node.second(second, &mut random).iter().for_each(|fact| state.apply(fact));
    }
    state.apply(&Fact::Gpu { gpu: 1, at: BootNs(START), fact: GpuFact::Gone });
    let facts = state.facts();
    let mut other = State::default();
    facts.iter().chain(&facts).for_each(|fact| other.apply(fact));
    assert_eq!(other.facts(), facts);
    let adds = |fact: &Fact| matches!(fact, Fact::Gpu { fact: GpuFact::Utilization(_) | GpuFact::Idle { .. }, .. });
    assert!(!facts.iter().any(adds));
    assert!(!facts.iter().any(|fact| matches!(fact, Fact::Gpu { gpu: 1, .. })), "it is gone");
}
