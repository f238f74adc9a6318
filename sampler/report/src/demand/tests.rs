use devkit::Random;
use devkit::gpu_users::{Phase, Played, User, Wait, play, scenario};

use super::*;

fn evaluate(windows: &[DemandWindow], other: usize, pairs: usize) -> Demand {
    DemandWindows::new(windows.to_vec()).evaluate(other, pairs)
}

const BUSY: User = User { work_s: 0.01, think_s: 0.0, wait: Wait::Block, phase: Phase::Always, overhead_s: 0.0, throttled: 0.0 };
const IN_PHASES: User = User { phase: Phase::Repeats { on: 12.0, off: 10.0, offset: 3.0 }, ..BUSY };

/// The windows of one user; the others keep their order.
fn windows(played: &Played, victim: usize) -> Vec<DemandWindow> {
    let window = |(number, second): (usize, &devkit::gpu_users::Second)| {
        let others = (0..second.sampled_s.len()).filter(|user| *user != victim).map(|user| second.sampled_s[user]);
        DemandWindow {
            number: number as u64,
            waited: second.waited_s[victim],
            calls: second.calls[victim],
            own: second.sampled_s[victim],
            others: others.collect(),
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
    evaluate(&windows(&played, victim), position(victim, other), users.len() * (users.len() - 1))
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
    let demand = found(&[BUSY, IN_PHASES, with_it], 0, 1, 1);
    assert!(demand.interval.is_none_or(|[least, most]| most - least > 0.1), "{demand:?}");
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
        let demand = DemandWindows::new(windows(&played, 0)).evaluate(0, 2);
        let Some([least, most]) = demand.interval else { continue };
        all += 1;
        within += u32::from(least <= truth && truth <= most);
        println!("{seed}: {truth:.3} in {least:.3} to {most:.3}: {}", least <= truth && truth <= most);
    }
    println!("{within} of {all}");
    assert!(all > 80 && within * 100 >= all * 90, "{within} of {all}");
}

/// Precision and recall over random scenarios; `cargo xtask bench waits` prints the table for the documents.
#[test]
fn precision_over_random_scenarios() {
    let (mut right, mut wrong, mut missed) = (0, 0, 0);
    for seed in 0..60 {
        let mut random = Random(seed);
        let users = scenario(&mut random);
        let played = play(&users, 100, &mut random);
        for victim in 0..users.len() {
            let windows = windows(&played, victim);
            for other in (0..users.len()).filter(|other| *other != victim) {
                let truth = played.kept_waiting_s[victim][other] / played.on_s[other].max(1.0);
                let demand = evaluate(&windows, position(victim, other), users.len() * (users.len() - 1));
                match (demand.confirmed, truth) {
                    (true, 0.01..) => right += 1,
                    (true, _) => {
                        wrong += 1;
                        println!("wrong: seed {seed}, {victim} by {other}, truth {truth:.3}: {demand:?}\n  {users:?}");
                    }
                    (false, 0.05..) if demand.changes >= 2 => missed += 1,
                    _ => {}
                }
            }
        }
    }
    println!("{right} right, {wrong} wrong, {missed} missed");
    assert!(f64::from(right) >= 0.97 * f64::from(right + wrong), "{right} right, {wrong} wrong");
    assert!(f64::from(right) >= 1.5 * f64::from(missed), "{right} right, {missed} missed");
}
