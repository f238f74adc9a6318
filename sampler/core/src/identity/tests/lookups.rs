//! Lookups in the process and cgroup tables, case by case.

use super::*;

fn check(table: &Processes, pid: u32, from: u64, to: u64, expect: &[CgroupMembership]) {
    assert_eq!(memberships(table, pid, from, to), expect, "{pid} in {from}..{to}");
}

fn table(facts: &[ProcessFact]) -> Processes {
    let mut table = Processes::default();
    for fact in facts {
        table.apply(fact, keep_all);
    }
    table
}

#[test]
fn lookups_return_the_state_at_their_time() {
    use ProcessChange::{Attach, Exec, Exit};
    let reuse = table(&[fork(7, 100, v2(1)), fact(Exit, 7, 100, 200, v2(1)), fork(7, 300, v2(2))]);
    check(&reuse, 7, 150, 160, &[v2(1)]);
    check(&reuse, 7, 310, 320, &[v2(2)]);
    check(&reuse, 7, 210, 290, &[]);
    check(&reuse, 7, 190, 310, &[v2(2), v2(1)]);
    check(&reuse, 8, 150, 160, &[]);
    let moved = table(&[fork(9, 100, v2(1)), fact(Attach, 9, 100, 500, v2(3)), fact(Exec, 9, 100, 600, v2(3))]);
    check(&moved, 9, 200, 300, &[v2(1)]);
    check(&moved, 9, 550, 700, &[v2(3)]);
    check(&moved, 9, 400, 599, &[v2(1), v2(3)]);
    // The image before the exec is not a candidate where the image after it is one.
    check(&moved, 9, 400, 600, &[v2(3)]);
    // An exit without its fork event still has the membership; a move without its fork event does not have the former one.
    check(&table(&[fact(Exit, 5, 100, 200, v2(4))]), 5, 120, 130, &[v2(4)]);
    check(&table(&[fact(Attach, 5, 100, 200, v2(4))]), 5, 120, 130, &[]);
    check(&table(&[fact(Attach, 5, 100, 200, v2(4)), fact(Exit, 5, 100, 300, v2(4))]), 5, 120, 130, &[]);
    // A fork ends a predecessor of which the exit event was lost. Duplicate and late events change nothing.
    check(&table(&[fork(6, 100, v2(1)), fork(6, 400, v2(2))]), 6, 450, 460, &[v2(2)]);
    let doubled = table(&[fork(6, 100, v2(1)), fact(Exit, 6, 100, 200, v2(1)), fact(Exit, 6, 100, 220, v2(1))]);
    check(&doubled, 6, 210, 215, &[]);
    assert_eq!(doubled.histories(Tgid(6)).len(), 1);
}

#[test]
fn a_lost_move_yields_both_memberships() {
    let mut t = table(&[fork(7, 100, v2(1)), fact(ProcessChange::Exec, 7, 100, 200, v2(1))]);
    assert!(t.record_sighting(&seen(7, 100, 1_000, v2(2)), keep_all));
    check(&t, 7, 150, 160, &[v2(1)]);
    check(&t, 7, 500, 510, &[v2(1), v2(2)]);
    check(&t, 7, 1_000, 1_010, &[v2(2)]);
    assert!(!t.record_sighting(&seen(7, 100, 2_000, v2(2)), keep_all));
}

#[test]
fn an_event_takes_precedence_over_a_scan() {
    let mut t = table(&[fork(7, 100, v2(1))]);
    t.record_sighting(&seen(7, 100, 1_000, v2(1)), keep_all);
    t.apply(&fact(ProcessChange::Attach, 7, 100, 1_050, v2(2)), keep_all);
    check(&t, 7, 1_040, 1_040, &[v2(1)]);
    check(&t, 7, 1_060, 1_060, &[v2(2)]);
    // Sighted before the move, and applied after its event.
    assert!(!t.record_sighting(&seen(7, 100, 1_000, v2(1)), keep_all));
    check(&t, 7, 1_060, 1_060, &[v2(2)]);
    // Ended since the sighting.
    t.apply(&fact(ProcessChange::Exit, 7, 100, 1_200, v2(2)), keep_all);
    assert!(!t.record_sighting(&seen(7, 100, 1_150, v2(2)), keep_all));
    assert_eq!(t.size().living, 0);
}

#[test]
fn start_times_from_proc_and_from_the_kernel_identify_one_process() {
    let mut t = Processes::default();
    assert!(t.record_sighting(&seen(3, 1_230_000_000, 2_000_000_000, v2(1)), keep_all));
    t.apply(&fact(ProcessChange::Exit, 3, 1_234_567_890, 3_000_000_000, v2(1)), keep_all);
    assert_eq!((t.size().living, t.size().exited), (0, 1));
    check(&t, 3, 2_500_000_000, 2_500_000_000, &[v2(1)]);
    check(&t, 3, 3_500_000_000, 3_600_000_000, &[]);
    t.expire(BootNs(3_000_000_000 + KEEP_EXITED_NS));
    assert_eq!(t.size().exited, 0);
}

#[test]
fn exited_processes_stay_within_their_bytes_and_those_of_containers_stay_longest() {
    let mut t = Processes::default();
    let second = 1_000_000_000;
    let mut largest = 0;
    let in_container = |intervals: &[ObservedInterval]| intervals.iter().any(|interval| interval.membership == v2(2));
    // 10,000 exits a second for 60 s, every tenth in a container, one in a hundred moved there; pids wrap.
    for n in 0..600_000u64 {
        let (pid, at) = (300 + (n % 32_000) as u32, second + n * second / 10_000);
        let membership = v2(1 + u64::from(n % 10 == 0));
        t.apply(&fork(pid, at, membership), in_container);
        if n % 100 == 1 {
            t.apply(&fact(ProcessChange::Attach, pid, at, at + 10, v2(2)), in_container);
        }
        t.apply(&fact(ProcessChange::Exit, pid, at, at + 1000, membership), in_container);
        if n % 1000 == 0 {
            t.expire(BootNs(at));
            largest = largest.max(t.size().exited_bytes);
        }
    }
    let end = second + 60 * second;
    assert!(largest <= EXITED_BYTES, "{largest} bytes");
    assert!(largest > EXITED_BYTES / 2, "the bound was not reached: {largest} bytes");
    assert!(t.size().evicted > 0);
    // Of a container, 35 s ago: kept. Not of a container, equally long ago: dropped.
    let n = 600_000 - 350_000;
    let at = |n: u64| second + n * second / 10_000;
    check(&t, 300 + (n % 32_000) as u32, at(n), at(n) + 500, &[v2(2)]);
    check(&t, 300 + ((n + 5) % 32_000) as u32, at(n + 5), at(n + 5) + 500, &[]);
    // Memory that is not needed is released.
    t.expire(BootNs(end + KEEP_EXITED_NS + second));
    assert_eq!(t.size().exited, 0);
    assert!(t.size().exited_bytes < EXITED_BYTES / 64, "{} bytes", t.size().exited_bytes);
}

#[test]
fn cgroup_paths_join_in_any_order_and_hierarchies_share_a_container() {
    use CgroupChange::{Created, Removed, Seen};
    let id = "a".repeat(64);
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Seen, 8, 1, 0, "", 1),
        cgroup(Created, 8, 20, 10, &id, 20),
        cgroup(Created, 8, 10, 1, "docker", 10),
        cgroup(Created, 0, 30, 1, "docker", 30),
        cgroup(Created, 0, 31, 30, &id, 31),
        cgroup(Created, 0, 32, 31, "init.scope", 32),
    ] {
        table.apply(&f);
    }
    let container_at =
        |v2: u64, v1: u64| table.container_of(&CgroupMembership { v2_id: v2, v1_id: v1, v1_hierarchy: 8 }, BootNs(50));
    let by_v1 = container_at(1, 20).expect("known");
    assert!(by_v1.is_some());
    assert_eq!(by_v1, container_at(32, 1).expect("known"));
    assert_eq!(container_at(1, 1), Ok(None));
    assert_eq!(container_at(77, 78), Err(UnknownCgroup));
    assert_eq!(table.path(CgroupKey { hierarchy: 0, id: 32 }), Some(format!("/docker/{id}/init.scope")));
    let appeared = table.take_changes();
    assert!(
        matches!(&appeared[..], [ContainerChange::Appeared(r)] if r.creation_seen && r.created == BootNs(20)),
        "{appeared:?}"
    );
    table.apply(&cgroup(Removed, 8, 20, 10, &id, 99));
    table.apply(&cgroup(Removed, 0, 31, 30, &id, 99));
    assert!(matches!(table.take_changes()[..], [ContainerChange::Gone(_, BootNs(99))]));
    assert!(table.container_of(&v2(32), BootNs(50)).is_ok_and(|c| c.is_some()));
    // A removal that is applied before the scan's finding.
    table.apply(&cgroup(Removed, 0, 40, 30, &"b".repeat(64), 100));
    assert!(!table.apply(&cgroup(Seen, 0, 40, 30, &"b".repeat(64), 90)));
    assert!(!table.living().any(|(key, _)| key.id == 40));
}

#[test]
fn monitors_builds_and_pods_inside_a_container_belong_to_it() {
    use CgroupChange::{Created, Seen};
    let id = "a".repeat(64);
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Created, 0, 2, 1, &format!("docker-{id}.scope"), 2),
        cgroup(Created, 0, 3, 2, "libpod_parent", 3),
        cgroup(Created, 0, 4, 3, "conmon", 4),
        cgroup(Created, 0, 5, 2, "buildkit", 5),
        cgroup(Created, 0, 6, 5, "0123456789abcdefghijklmno", 6),
        cgroup(Created, 0, 7, 6, "sub", 7),
        cgroup(Created, 0, 8, 2, "pod8bb25662-de9a-11e9-84e7-f8f21e04010c", 8),
        cgroup(Created, 0, 9, 1, "conmon", 9),
    ] {
        table.apply(&f);
    }
    let container_of = |id| table.container_of(&v2(id), BootNs(10));
    assert!(container_of(2).is_ok_and(|c| c.is_some()));
    for inside in [4, 6, 7, 8] {
        assert_eq!(container_of(inside), container_of(2), "{inside}");
    }
    assert_eq!(container_of(9), Ok(None));
    assert_eq!(table.containers().count(), 1);
}

/// The key of the user of each of these cgroups of the v2 hierarchy, with its short name.
fn names_of(table: &Cgroups, ids: &[u64]) -> Vec<Option<String>> {
    let name = |key: ContainerKey| table.container(key).expect("known").record.identity.short_name();
    ids.iter().map(|id| table.container_of(&v2(*id), BootNs(100)).expect("placed").map(name)).collect()
}

#[test]
fn jobs_units_and_pods_are_users_with_all_their_cgroups() {
    use CgroupChange::{Created, Seen};
    let (pod, id) = ("8bb25662-de9a-11e9-84e7-f8f21e04010c", "a".repeat(64));
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Created, 0, 2, 1, "system.slice", 2),
        cgroup(Created, 0, 3, 2, "vllm.service", 3),
        cgroup(Created, 0, 4, 3, "worker", 4),
        cgroup(Created, 0, 5, 2, "slurmstepd.scope", 5),
        cgroup(Created, 0, 6, 5, "job_7", 6),
        cgroup(Created, 0, 7, 6, "step_0", 7),
        cgroup(Created, 0, 8, 6, "step_1", 8),
        cgroup(Created, 0, 9, 1, "kubepods", 9),
        cgroup(Created, 0, 10, 9, &format!("pod{pod}"), 10),
        cgroup(Created, 0, 11, 10, &id, 11),
        cgroup(Created, 0, 12, 11, "slurmstepd.scope", 12),
        cgroup(Created, 0, 13, 12, "job_7", 13),
    ] {
        table.apply(&f);
    }
    let expect = [
        (1, None),
        (2, None),
        (3, Some("vllm.service")),
        (4, Some("vllm.service")),
        (5, Some("slurmstepd.scope")),
        (6, Some("slurm/7")),
        (7, Some("slurm/7")),
        (8, Some("slurm/7")),
        (10, Some(pod)),
        (11, Some(id.as_str())),
        (12, Some(id.as_str())),
        (13, Some("aaaaaaaaaaaa/slurm/7")),
    ];
    let ids = expect.map(|(id, _)| id);
    assert_eq!(names_of(&table, &ids), expect.map(|(_, name)| name.map(str::to_owned)));
    table.apply(&cgroup(CgroupChange::Removed, 0, 6, 5, "job_7", 50));
    let changes = table.take_changes();
    assert!(matches!(changes.last(), Some(ContainerChange::Gone(_, BootNs(50)))), "{changes:?}");
    assert_eq!(names_of(&table, &[7]), [Some("slurm/7".to_owned())], "attribution is delayed");
}

#[test]
fn a_container_in_one_hierarchy_comes_before_a_unit_in_another() {
    use CgroupChange::{Created, Seen};
    let id = "a".repeat(64);
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Created, 0, 2, 1, "docker.service", 2),
        cgroup(Seen, 8, 1, 0, "", 1),
        cgroup(Created, 8, 2, 1, "docker", 2),
        cgroup(Created, 8, 3, 2, &id, 3),
        cgroup(Created, 8, 4, 1, "docker.service", 4),
    ] {
        table.apply(&f);
    }
    let of = |v2_id, v1_id| {
        let container = table.container_of(&CgroupMembership { v2_id, v1_id, v1_hierarchy: 8 }, BootNs(9))?;
        Ok(container.map(|key| table.container(key).expect("known").record.identity.short_name()))
    };
    assert_eq!(of(2, 3), Ok(Some(id)));
    assert_eq!(of(2, 1), Ok(Some("docker.service".to_owned())));
    assert_eq!(of(1, 4), of(2, 1));
    assert_eq!(of(1, 1), Ok(None));
    assert_eq!(of(2, 77), Err(UnknownCgroup), "the other hierarchy may have a container");
    assert_eq!(table.containers().count(), 2, "a unit is one user in both hierarchies");
}

#[test]
fn the_apps_of_a_rkt_pod_are_two_containers_in_any_number_of_hierarchies() {
    use CgroupChange::{Created, Seen};
    let pod = r"machine-rkt\x2d8bb25662\x2dde9a\x2d11e9\x2d84e7\x2df8f21e04010c.scope";
    let mut table = Cgroups::default();
    for hierarchy in [0, 8] {
        for f in [
            cgroup(Seen, hierarchy, 1, 0, "", 1),
            cgroup(Created, hierarchy, 2, 1, "machine.slice", 2),
            cgroup(Created, hierarchy, 3, 2, pod, 3),
            cgroup(Created, hierarchy, 4, 3, "system.slice", 4),
            cgroup(Created, hierarchy, 5, 4, "web.service", 5),
            cgroup(Created, hierarchy, 6, 4, "log.service", 6),
        ] {
            table.apply(&f);
        }
    }
    let container_of =
        |v2_id, v1_id| table.container_of(&CgroupMembership { v2_id, v1_id, v1_hierarchy: 8 }, BootNs(9)).expect("placed");
    assert_eq!((container_of(5, 1), container_of(6, 1)), (container_of(1, 5), container_of(1, 6)));
    // The pod itself, in which its own services run, is the third.
    assert_eq!(table.containers().count(), 3);
    assert!(container_of(5, 1) != container_of(6, 1) && container_of(5, 1) != container_of(4, 1));
}

#[test]
fn a_renamed_cgroup_resolves_as_of_the_requested_time() {
    use CgroupChange::{Created, Renamed, Seen};
    let (a, b) = ("a".repeat(64), "b".repeat(64));
    let mut table = Cgroups::default();
    for f in [cgroup(Seen, 8, 1, 0, "", 1), cgroup(Created, 8, 2, 1, "docker", 2), cgroup(Created, 8, 3, 2, &a, 3)] {
        table.apply(&f);
    }
    table.apply(&cgroup(Created, 8, 4, 3, "sub", 4));
    table.apply(&cgroup(Renamed, 8, 3, 2, &b, 100));
    let membership = CgroupMembership { v2_id: 0, v1_id: 4, v1_hierarchy: 8 };
    let id = |at| {
        let key = table.container_of(&membership, BootNs(at)).ok()??;
        table.container(key)?.record.identity.container_id.clone()
    };
    assert_eq!((id(50), id(150)), (Some(a), Some(b)));
}

#[test]
fn a_thousand_nested_cgroups_and_a_path_of_4000_characters() {
    let mut table = Cgroups::default();
    table.apply(&cgroup(CgroupChange::Seen, 0, 1, 0, "", 1));
    table.apply(&cgroup(CgroupChange::Created, 0, 2, 1, &"a".repeat(64), 2));
    table.apply(&cgroup(CgroupChange::Created, 0, 3, 1, &format!("docker-{}.scope", "c".repeat(64)), 2));
    for n in 4..1004 {
        table.apply(&cgroup(CgroupChange::Created, 0, n, n - 1, "xyz", n));
    }
    let path = table.path(CgroupKey { hierarchy: 0, id: 1003 }).expect("joined");
    assert!(path.len() > 4000, "{}", path.len());
    assert!(table.container_of(&v2(1003), BootNs(2000)).is_ok_and(|c| c.is_some()));
    assert_eq!(table.containers().count(), 2);
}

#[test]
fn inferred_ends_are_revoked_and_reported_ends_are_final() {
    let attach = ProcessChange::Attach;
    // A scan did not find it; then an event reports it.
    let mut t = table(&[fork(7, 100, v2(1))]);
    t.begin_scan();
    assert_eq!(t.sweep(BootNs(1_000), keep_all), 1);
    t.apply(&fact(attach, 7, 100, 2_000, v2(2)), keep_all);
    check(&t, 7, 2_500, 2_500, &[v2(2)]);
    assert_eq!(t.size().living, 1);
    // It is alive, but its cgroups could not be read: marked, not moved, not swept.
    t.begin_scan();
    assert!(!t.record_sighting(&ProcessSeen { membership: None, ..seen(7, 100, 3_000, v2(9)) }, keep_all));
    assert_eq!(t.sweep(BootNs(3_000), keep_all), 0);
    check(&t, 7, 3_500, 3_500, &[v2(2)]);
    // Its end was reported: what a scan still finds of it (a thread in the driver's teardown) is not a new process.
    t.apply(&fact(ProcessChange::Exit, 7, 100, 4_000, v2(2)), keep_all);
    assert!(!t.record_sighting(&seen(7, 100, 5_000, v2(2)), keep_all));
    assert_eq!(t.size().living, 0);
    // A check that does not find the process ends it, unless something newer is known of it.
    let mut t = table(&[fork(8, 100, v2(1)), fact(attach, 8, 100, 500, v2(2))]);
    t.not_found(Tgid(8), BootNs(400), keep_all);
    assert_eq!(t.size().living, 1);
    t.not_found(Tgid(8), BootNs(600), keep_all);
    assert_eq!(t.size().living, 0);
}

#[test]
fn an_unknown_cgroup_is_not_the_host() {
    use CgroupChange::{Created, Seen};
    let mut table = Cgroups::default();
    table.apply(&cgroup(Seen, 0, 1, 0, "", 1));
    table.apply(&cgroup(Created, 0, 30, 29, "orphan", 2));
    let container_of =
        |table: &Cgroups, v2_id, v1_id| table.container_of(&CgroupMembership { v2_id, v1_id, v1_hierarchy: 8 }, BootNs(9));
    assert_eq!(container_of(&table, 1, 0), Ok(None));
    assert_eq!(container_of(&table, 1, 77), Err(UnknownCgroup), "v2 is the root, and v1 is unknown");
    assert_eq!(container_of(&table, 30, 0), Err(UnknownCgroup), "its parent's creation was lost");
    table.apply(&cgroup(Seen, 0, 29, 1, &"a".repeat(64), 3));
    assert!(container_of(&table, 30, 0).is_ok_and(|c| c.is_some()));
}

#[test]
fn a_container_ends_with_its_cgroup_in_any_order_of_events() {
    use CgroupChange::{Removed, Renamed, Seen};
    let id = "a".repeat(64);
    // Removed during the first scan, before anything above it is known.
    let mut table = Cgroups::default();
    table.apply(&cgroup(Removed, 0, 3, 2, &id, 50));
    table.apply(&cgroup(Seen, 0, 1, 0, "", 10));
    table.apply(&cgroup(Seen, 0, 2, 1, "docker", 10));
    assert!(table.containers().all(|c| c.gone == Some(BootNs(50))), "{:?}", table.take_changes());
    // An ancestor is renamed after the container is gone.
    table.apply(&cgroup(Renamed, 0, 2, 1, "other", 60));
    assert!(table.containers().all(|c| c.gone.is_some()));
}

#[test]
fn a_cgroup_named_after_another_container_is_not_that_container() {
    use CgroupChange::{Created, Removed, Seen};
    let (a, b) = ("a".repeat(64), "b".repeat(64));
    let mut table = Cgroups::default();
    for f in [
        cgroup(Seen, 0, 1, 0, "", 1),
        cgroup(Seen, 0, 2, 1, "docker", 1),
        cgroup(Created, 0, 10, 2, &a, 2),
        cgroup(Created, 0, 11, 2, &b, 2),
        cgroup(Created, 0, 12, 11, &a, 3),
        cgroup(Created, 0, 13, 1, &a, 3),
    ] {
        table.apply(&f);
    }
    let container_of = |table: &Cgroups, id| table.container_of(&v2(id), BootNs(9)).expect("placed").expect("a container");
    let owners: std::collections::HashSet<ContainerKey> = [10, 11, 12, 13].map(|id| container_of(&table, id)).into();
    assert_eq!(owners.len(), 4);
    table.apply(&cgroup(Removed, 0, 10, 2, &a, 20));
    let gone = |table: &Cgroups, id| table.container(container_of(table, id)).is_some_and(|c| c.gone.is_some());
    assert!(gone(&table, 10) && !gone(&table, 12) && !gone(&table, 13));
}

#[test]
fn an_event_takes_precedence_for_names_too_and_tables_are_bounded() {
    use CgroupChange::{Created, Removed, Renamed, Seen};
    let mut table = Cgroups::default();
    table.apply(&cgroup(Seen, 0, 1, 0, "", 1));
    table.apply(&cgroup(Created, 0, 2, 1, "old", 2));
    table.apply(&cgroup(Renamed, 0, 2, 1, "new", 100));
    assert!(!table.apply(&cgroup(Seen, 0, 2, 1, "old", 50)));
    assert_eq!(table.at_path("/new"), Some(CgroupKey { hierarchy: 0, id: 2 }));
    // A cgroup of which the creation event was lost.
    table.apply(&cgroup(Renamed, 0, 3, 1, "renamed", 100));
    assert_eq!(table.at_path("/renamed"), Some(CgroupKey { hierarchy: 0, id: 3 }));
    assert_eq!(table.at_path("/renamed/more"), None);
    for n in 0..50_000u64 {
        table.apply(&cgroup(Created, 0, 100 + n, 1, &format!("{n:064x}"), 200 + n));
        table.apply(&cgroup(Removed, 0, 100 + n, 1, "", 200 + n));
        table.apply(&cgroup(Renamed, 0, 2, 1, &format!("{n:064x}"), 200 + n));
        if n % 1_000 == 0 {
            table.expire(BootNs(200 + n), |_| false);
        }
    }
    table.expire(BootNs(60_000), |_| false);
    assert!(table.containers().count() < 20_000, "{}", table.containers().count());
    assert!(table.evicted > 0);
}
