use devkit::Random;
use devkit::gpu_users::{Phase, Played, PlayedSample, User, Wait, play, scenario};

use super::*;

fn evaluate(windows: &[DemandWindow], other: usize, pairs: usize) -> Demand {
    DemandWindows::new(windows.to_vec(), 1).evaluate(other, pairs)
}

const BUSY: User = User { work_s: 0.01, think_s: 0.0, wait: Wait::Block, phase: Phase::Always, overhead_s: 0.0, throttled: 0.0 };
const IN_PHASES: User = User { phase: Phase::Repeats { on: 12.0, off: 10.0, offset: 3.0 }, ..BUSY };

/// The windows of one user; the others keep their order.
fn windows(played: &Played, victim: usize) -> Vec<DemandWindow> {
    let window = |(number, second): (usize, &devkit::gpu_users::Second)| {
        let others = || (0..second.sampled_s.len()).filter(|user| *user != victim);
        let samples = |user: usize| {
            let is_in = |sample: &&PlayedSample| sample.user == user && sample.at_s as usize == number && sample.busy_s > 0.0;
            played.samples.iter().filter(is_in).count() as u32
        };
        DemandWindow {
            number: number as u64,
            waited: second.waited_s[victim],
            calls: second.calls[victim],
            own: second.sampled_s[victim],
            others: others().map(|user| second.sampled_s[user]).collect(),
            named: others().map(samples).collect(),
        }
    };
    played.seconds.iter().enumerate().map(window).collect()
}

/// The position of a user among the others of a victim.
fn position(victim: usize, other: usize) -> usize {
    if other > victim { other - 1 } else { other }
}

fn found(users: &[User], victim: usize, other: usize, seed: u64) -> Demand {
    let played = play(users, 100, &mut Random(seed));
    evaluate(&windows(&played, victim), position(victim, other), users.len() - 1)
}

/// How many of twenty seeds are confirmed.
fn confirmed(users: &[User], victim: usize, other: usize) -> usize {
    (0..20).filter(|seed| found(users, victim, other, *seed).confirmed).count()
}

#[test]
fn a_user_that_comes_and_goes_keeps_a_busy_one_waiting() {
    for victim in [
        BUSY,
        User { think_s: 0.01, ..BUSY },
        User { wait: Wait::BlockLate, ..BUSY },
        User { overhead_s: 0.005, ..BUSY },
        User { throttled: 0.3, ..BUSY },
    ] {
        let n = confirmed(&[victim, IN_PHASES], 0, 1);
        assert!(n >= 19, "{victim:?}: {n} of 20");
    }
    let demand = found(&[BUSY, IN_PHASES], 0, 1, 7);
    assert!((demand.effect.unwrap() - 0.5).abs() < 0.03, "half of each second: {demand:?}");
}

/// Windows in which no call returned have waiting, too.
#[test]
fn calls_that_are_longer_than_a_window_count_as_a_whole() {
    let other = User { phase: Phase::Repeats { on: 22.0, off: 20.0, offset: 3.0 }, ..BUSY };
    let played = play(&[User { work_s: 0.6, ..BUSY }, other], 200, &mut Random(1));
    let truth = played.kept_waiting_s[0][1] / played.on_s[1];
    let demand = evaluate(&windows(&played, 0), 0, 1);
    assert!(demand.confirmed && (demand.effect.unwrap() - truth).abs() < 0.05, "{truth}: {demand:?}");
}

/// Windows of a victim with 50 calls a second and little scatter; the others are on by their number and the window's.
fn drawn(n_windows: u64, others: usize, is_on: impl Fn(usize, u64) -> bool, waits: impl Fn(&[bool]) -> f64) -> Vec<DemandWindow> {
    let window = |number: u64| {
        let on: Vec<bool> = (0..others).map(|other| is_on(other, number)).collect();
        DemandWindow {
            number,
            waited: waits(&on) + 0.001 * (number % 3) as f64,
            calls: 50.0,
            own: 0.2,
            others: on.iter().map(|on| if *on { 0.3 } else { 0.0 }).collect(),
            named: on.iter().map(|on| 2 * u32::from(*on)).collect(),
        }
    };
    (0..n_windows).map(window).collect()
}

/// The equations have one number for what a user causes, the interval has also that it depends on a third one.
#[test]
fn intervals_are_wide_where_a_third_user_matters() {
    let is_on = |other: usize, number: u64| if other == 0 { number / 9 % 2 == 1 } else { number / 23 % 2 == 1 };
    let width = |with_third: f64| {
        let waits = |on: &[bool]| 0.25 + if on[0] && on[1] { with_third } else { 0.4 * f64::from(u8::from(on[0])) };
        let found = evaluate(&drawn(240, 2, is_on, waits), 0, 2);
        let [least, most] = found.interval.unwrap();
        assert!(found.confirmed && least <= 0.4 && most >= with_third, "{found:?}");
        most - least
    };
    let (same, other) = (width(0.4), width(0.1));
    assert!(same < 0.05 && other > 0.1, "{same}, {other}");
}

/// Without one span there would be nothing to compare, so only the ends are known that hold for each confirmed pair.
#[test]
fn an_interval_that_rests_on_one_span_has_the_least_and_the_most() {
    let waits = |on: &[bool]| 0.25 + 0.4 * f64::from(u8::from(on[0]));
    let found = evaluate(&drawn(60, 1, |_, number| !(25..40).contains(&number), waits), 0, 1);
    let [least, most] = found.interval.unwrap();
    assert!(found.confirmed && least == LEAST_EFFECT && (most - 0.65).abs() < 0.01, "{found:?}");
    let hardly = evaluate(&drawn(60, 1, |_, number| !(25..40).contains(&number), |_| 0.25), 0, 1);
    assert!(!hardly.confirmed && hardly.effect.is_some() && hardly.interval.is_none(), "{hardly:?}");
}

/// However many users are always on, each of those that start together is compared with the others of them.
#[test]
fn one_of_many_that_start_together_is_not_blamed_for_all() {
    const ALWAYS: usize = 12;
    const TOGETHER: usize = 20;
    let window = |number: u64| {
        let on = number / 10 % 2 == 1;
        let part = if on { 0.02 } else { 0.0 };
        DemandWindow {
            number,
            waited: if on { 0.7 } else { 0.3 } + 0.001 * (number % 3) as f64,
            calls: 50.0,
            own: 0.2,
            others: [[0.03; ALWAYS].as_slice(), &[part; TOGETHER]].concat(),
            named: [[1; ALWAYS].as_slice(), &[u32::from(on); TOGETHER]].concat(),
        }
    };
    let windows: Vec<DemandWindow> = (0..120).map(window).collect();
    for other in ALWAYS..ALWAYS + TOGETHER {
        let demand = evaluate(&windows, other, ALWAYS + TOGETHER);
        assert!(!demand.confirmed && demand.why_not.contains("another user started and stopped"), "{demand:?}");
    }
}

/// Time of samples without a PID is divided among all that are present.
#[test]
fn a_user_that_receives_time_without_being_named_is_off() {
    let played = play(&[User { think_s: 0.01, ..BUSY }, IN_PHASES], 100, &mut Random(3));
    let mut windows = windows(&played, 0);
    let expect = evaluate(&windows, 0, 1);
    windows.iter_mut().filter(|window| window.named[0] == 0).for_each(|window| window.others[0] = 0.004);
    let found = evaluate(&windows, 0, 1);
    assert!(found.confirmed && found.windows_without > 20, "{found:?}");
    assert_eq!((found.windows_with, found.changes), (expect.windows_with, expect.changes));
}

#[test]
fn users_that_do_not_wait_are_not_confirmed() {
    let yields = User { phase: Phase::WhileOff(1), ..BUSY };
    let second_stage = User { work_s: 0.002, phase: Phase::After(1), ..BUSY };
    let light = User { work_s: 0.004, think_s: 0.2, ..IN_PHASES };
    for (name, victim, other) in [
        ("it yields", yields, IN_PHASES),
        ("it yields, with copies", User { overhead_s: 0.01, ..yields }, IN_PHASES),
        ("it polls", User { wait: Wait::Poll, ..BUSY }, IN_PHASES),
        ("it polls and yields", User { wait: Wait::Poll, ..yields }, IN_PHASES),
        ("it waits for its input", second_stage, User { think_s: 0.02, ..IN_PHASES }),
        ("the other is hardly there", User { think_s: 0.03, ..BUSY }, light),
        ("the other is always there", BUSY, BUSY),
    ] {
        let n = confirmed(&[victim, other], 0, 1);
        assert!(n <= 1, "{name}: {n} of 20 are confirmed");
    }
}

#[test]
fn a_third_user_is_not_blamed_for_another() {
    let idle = User { think_s: 0.4, work_s: 0.004, ..BUSY };
    let bystander = User { phase: Phase::Repeats { on: 9.0, off: 14.0, offset: 0.0 }, ..idle };
    assert!(confirmed(&[BUSY, IN_PHASES, bystander], 0, 2) <= 1);
    assert!(confirmed(&[BUSY, IN_PHASES, bystander], 0, 1) >= 18);
    // A light user that is always there does not hide it.
    assert!(confirmed(&[BUSY, IN_PHASES, idle], 0, 1) >= 18);
}

#[test]
fn what_cannot_be_compared_says_so() {
    let reason = |users: &[User], part: &str| {
        let demand = found(users, 0, 1, 1);
        assert!(!demand.confirmed && demand.why_not.contains(part), "{demand:?}");
    };
    reason(&[BUSY, BUSY], "too short a time");
    reason(&[User { wait: Wait::Poll, ..BUSY }, IN_PHASES], "did not wait in blocking calls");
    reason(&[User { phase: Phase::WhileOn(1), ..BUSY }, IN_PHASES], "too few blocking calls while the contender was off");
    let once = User { phase: Phase::Repeats { on: 200.0, off: 50.0, offset: 200.0 }, ..BUSY };
    reason(&[BUSY, once], "only once");
    let with_it = User { phase: Phase::WhileOn(1), ..BUSY };
    let together = DemandWindows::new(windows(&play(&[BUSY, IN_PHASES, with_it], 100, &mut Random(1)), 0), 1);
    let demand = together.compare_changes(0, 2);
    assert!(!demand.confirmed && demand.why_not.contains("at the same times"), "{demand:?}");
    assert_eq!(evaluate(&[], 0, 1).windows_with, 0);
}

/// A busy user and one in phases, of any pace: the interval has the truth as often as it states, less what chance makes of 120 plays.
#[test]
fn intervals_contain_the_truth() {
    let (mut within, mut all) = (0, 0);
    for seed in 0..120 {
        let mut random = Random(seed);
        let mut between = |from: f64, to: f64| from + (to - from) * random.unit();
        let victim = User { work_s: between(0.004, 0.03), think_s: between(0.0, 0.03), ..BUSY };
        let (on, off) = (between(6.0, 16.0), between(6.0, 16.0));
        let phase = Phase::Repeats { on, off, offset: between(0.0, on + off) };
        let other = User { work_s: between(0.004, 0.03), think_s: between(0.0, 0.03), phase, ..BUSY };
        let played = play(&[victim, other], 100, &mut random);
        let truth = played.kept_waiting_s[0][1] / played.on_s[1];
        let demand = DemandWindows::new(windows(&played, 0), 1).evaluate(0, 2);
        let Some([least, most]) = demand.interval else { continue };
        all += 1;
        within += u32::from(least <= truth && truth <= most);
        println!("{seed}: {truth:.3} in {least:.3} to {most:.3}: {}", least <= truth && truth <= most);
    }
    println!("{within} of {all}");
    assert!(all > 80 && within * 100 >= all * 90, "{within} of {all}");
}

/// The judgement of each pair of a play, by victim and other user.
fn judged(played: &Played) -> Vec<Vec<Demand>> {
    let n = played.on_s.len();
    let sets: Vec<DemandWindows> = (0..n).map(|victim| DemandWindows::new(windows(played, victim), 1)).collect();
    let one = |victim: usize, other: usize| match victim == other {
        true => Demand::default(),
        false => sets[victim].evaluate(position(victim, other), n - 1),
    };
    let first: Vec<Vec<Demand>> = (0..n).map(|victim| (0..n).map(|other| one(victim, other)).collect()).collect();
    let with_mutual = |victim: usize, other: usize| {
        let found = first[victim][other].clone();
        let mutual = || sets[victim].mutual(position(victim, other), n - 1);
        if found.confirmed || !first[other][victim].confirmed { found } else { mutual().unwrap_or(found) }
    };
    (0..n).map(|victim| (0..n).map(|other| with_mutual(victim, other)).collect()).collect()
}

/// How many of twenty seeds are confirmed, by any of the bases, and how many of these by this one.
fn confirmed_by(users: &[User], (victim, other): (usize, usize), basis: DemandBasis) -> (usize, usize) {
    let found = |seed| judged(&play(users, 120, &mut Random(seed)))[victim][other].clone();
    let confirmed: Vec<Demand> = (0..20).map(found).filter(|demand| demand.confirmed).collect();
    (confirmed.len(), confirmed.iter().filter(|demand| demand.basis == basis).count())
}

/// Where one of two others takes the place of the other, a comparison of windows with and without it shows nothing.
#[test]
fn users_that_replace_each_other_are_known_from_the_quietest_windows() {
    let first = User { phase: Phase::Repeats { on: 9.0, off: 8.0, offset: 3.0 }, work_s: 0.02, ..BUSY };
    let second = User { phase: Phase::WhileOff(1), ..first };
    // It also works while both are off, since they pause now and then.
    let victim = User { think_s: 0.01, ..BUSY };
    let pauses = |user: User, on: f64, off: f64| User { phase: Phase::Repeats { on, off, offset: 0.0 }, ..user };
    for users in [[victim, first, pauses(second, 21.0, 9.0)], [victim, pauses(first, 14.0, 11.0), pauses(second, 31.0, 12.0)]] {
        for other in 1..3 {
            let (confirmed, _) = confirmed_by(&users, (0, other), DemandBasis::Quietest);
            assert!(confirmed >= 18, "{other}: {confirmed} of 20");
        }
    }
}

/// Two that start and stop together cannot be separated by comparison; each had half of the GPU time of both.
#[test]
fn users_that_come_together_share_what_they_cause() {
    let together = [BUSY, IN_PHASES, User { phase: Phase::WhileOn(1), ..BUSY }];
    for other in 1..3 {
        let (confirmed, quietest) = confirmed_by(&together, (0, other), DemandBasis::Quietest);
        assert!(confirmed >= 18 && quietest == confirmed, "{other}: {confirmed} of 20, {quietest}");
    }
}

/// What a third user causes is not booked to one that keeps no user waiting.
#[test]
fn a_pipeline_or_a_bystander_next_to_a_third_user_is_not_confirmed() {
    let first_stage = User { work_s: 0.03, think_s: 0.06, ..BUSY };
    let second_stage = User { work_s: 0.02, phase: Phase::After(1), ..BUSY };
    let in_phases = User { phase: Phase::Repeats { on: 17.0, off: 11.0, offset: 5.0 }, ..first_stage };
    let yields = User { phase: Phase::WhileOff(1), ..BUSY };
    for (name, users) in [
        ("a pipeline", [second_stage, first_stage, IN_PHASES]),
        ("a pipeline in phases", [second_stage, in_phases, IN_PHASES]),
        ("it yields", [yields, in_phases, IN_PHASES]),
        ("it yields to a busy one", [yields, User { phase: in_phases.phase, ..BUSY }, IN_PHASES]),
    ] {
        let mut wrong = 0;
        for seed in 0..20 {
            let played = play(&users, 120, &mut Random(seed));
            let truth = played.kept_waiting_s[0][1] / played.on_s[1];
            wrong += usize::from(judged(&played)[0][1].confirmed && truth < LEAST_EFFECT);
        }
        assert!(wrong <= 1, "{name}: {wrong} of 20 are confirmed");
    }
}

#[test]
fn what_is_booked_is_at_most_what_the_other_used() {
    let third = User { phase: Phase::Repeats { on: 17.0, off: 9.0, offset: 5.0 }, work_s: 0.02, ..BUSY };
    let (mut within, mut below, mut all) = (0, 0, 0);
    for wait in [Wait::Block, Wait::BlockLate] {
        for seed in 0..20 {
            let victim = User { think_s: 0.01, overhead_s: 0.004, wait, ..BUSY };
            let played = play(&[victim, IN_PHASES, third], 120, &mut Random(seed));
            let set = DemandWindows::new(windows(&played, 0), 1);
            for other in 1..3 {
                let booked = set.booked(position(0, other)).expect("it is on for long enough");
                let truth = played.kept_waiting_s[0][other] / played.on_s[other];
                let Some(longer) = booked.longer else { continue };
                all += 1;
                within += u32::from((longer.value - truth).abs() <= half(longer.error));
                below += u32::from(truth <= booked.most.value + half(booked.most.error));
            }
        }
    }
    assert!(all >= 60 && within * 100 >= all * 70 && below == all, "{within} and {below} of {all}");
}

#[test]
fn of_several_gpus_none_runs_one_user_at_a_time() {
    let played = play(&[BUSY, IN_PHASES, User { phase: Phase::WhileOn(1), ..BUSY }], 120, &mut Random(1));
    assert!(DemandWindows::new(windows(&played, 0), 1).booked(0).is_some());
    let set = DemandWindows::new(windows(&played, 0), 2);
    assert!(set.booked(0).is_none() && set.mutual(0, 2).is_none() && !set.evaluate(0, 2).confirmed);
}

/// The other never pauses, so that there is nothing to compare; but it waits for the victim, which comes and goes.
#[test]
fn one_that_waits_for_the_victim_makes_it_wait() {
    let other = User { think_s: 0.004, ..BUSY };
    let victim = User { work_s: 0.012, ..IN_PHASES };
    assert!(confirmed_by(&[victim, other], (1, 0), DemandBasis::Changes).1 >= 19);
    let (confirmed, mutual) = confirmed_by(&[victim, other], (0, 1), DemandBasis::Mutual);
    assert!(confirmed >= 19 && mutual == confirmed, "{confirmed} of 20, {mutual}");
    // One that hardly uses the GPU cannot keep it waiting for longer, whatever it copies.
    let light = User { work_s: 0.001, think_s: 0.1, ..BUSY };
    let copies = User { work_s: 0.05, overhead_s: 0.02, ..IN_PHASES };
    assert!(confirmed_by(&[copies, light], (0, 1), DemandBasis::Mutual).0 <= 1);
}

/// Precision and recall over random scenarios; `cargo xtask bench waits` prints the table for the documents.
#[test]
fn precision_over_random_scenarios() {
    let (mut right, mut wrong, mut missed) = (0, 0, 0);
    for seed in 0..60 {
        let mut random = Random(seed);
        let users = scenario(&mut random);
        let played = play(&users, 100, &mut random);
        let found = judged(&played);
        for (victim, found) in found.iter().enumerate() {
            for (other, demand) in found.iter().enumerate().filter(|(other, _)| *other != victim) {
                let truth = played.kept_waiting_s[victim][other] / played.on_s[other].max(1.0);
                match (demand.confirmed, truth) {
                    (true, 0.02..) => right += 1,
                    (true, _) => {
                        wrong += 1;
                        println!("wrong: seed {seed}, {victim} by {other}, truth {truth:.3}: {demand:?}\n  {users:?}");
                    }
                    (false, 0.05..) => missed += 1,
                    _ => {}
                }
            }
        }
    }
    println!("{right} right, {wrong} wrong, {missed} missed");
    assert!(f64::from(right) >= 0.97 * f64::from(right + wrong), "{right} right, {wrong} wrong");
    assert!(f64::from(right) >= 3.0 * f64::from(missed), "{right} right, {missed} missed");
}
