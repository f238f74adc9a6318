//! Plays users of one GPU in time slices, and records which user waited for which: the truth for evaluations of waiting. It has no
//! processes and no clock, so hundreds of scenarios take seconds.
//!
//! ```text
//!  a user: (idle) -> submits work -> blocks, polls or goes on -> done -> thinks -> ...      while its phase is on
//!  the GPU: one user at a time, in slices, round robin among those with work
//! ```
//! What an agent would see is made from it: a sample a sixth of a second, which has the busy part of its period and names the user on the
//! GPU at that instant; where it is idle then, one of the users of the period, by their time, as the agent divides such samples.

use crate::Random;

/// The step of the play.
pub const STEP_S: f64 = 0.0005;
/// Steps that a user keeps the GPU while others have work.
const SLICE_STEPS: u32 = 4;
/// Steps between two samples of the driver.
const SAMPLE_STEPS: u32 = 333;
/// Time between two samples of the driver.
pub const SAMPLE_S: f64 = SAMPLE_STEPS as f64 * STEP_S;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wait {
    /// In a blocking call from the submission to the end of the work.
    Block,
    /// In a blocking call for the second half of the submitted work only: it prepares the next in between.
    BlockLate,
    /// Polls, so no call blocks.
    Poll,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Phase {
    Always,
    /// On for the first and off for the second time, in seconds, from an offset on.
    Repeats {
        on: f64,
        off: f64,
        offset: f64,
    },
    /// On while that user is off: it yields.
    WhileOff(usize),
    /// On while that user is on.
    WhileOn(usize),
    /// Gets a piece of work for each piece that the other user has done: the second stage of a pipeline.
    After(usize),
}

#[derive(Clone, Copy, Debug)]
pub struct User {
    pub work_s: f64,
    pub think_s: f64,
    pub wait: Wait,
    pub phase: Phase,
    /// Time in a blocking call for each piece of work that is not due to the GPU: copies and launches.
    pub overhead_s: f64,
    /// Part of each 100 ms in which its processor quota stops it.
    pub throttled: f64,
}

/// One second of the play.
#[derive(Clone, Debug)]
pub struct Second {
    /// By user: time in blocking calls.
    pub waited_s: Vec<f64>,
    /// By user: blocking calls that returned.
    pub calls: Vec<f64>,
    /// By user: GPU time by the samples.
    pub sampled_s: Vec<f64>,
    pub busy_s: f64,
}

/// A sample of the driver.
#[derive(Clone, Copy, Debug)]
pub struct PlayedSample {
    pub at_s: f64,
    /// The user that it names.
    pub user: usize,
    /// The busy part of its period, which is 0 if the GPU was idle.
    pub busy_s: f64,
}

#[derive(Clone, Debug)]
pub struct Played {
    pub seconds: Vec<Second>,
    pub samples: Vec<PlayedSample>,
    /// By user and other user: time in a blocking call, or polling, with work ready, while the other was on the GPU.
    pub kept_waiting_s: Vec<Vec<f64>>,
    /// By user: true GPU time, and seconds in which its phase was on; of a second stage, in which it had or could get input.
    pub gpu_s: Vec<f64>,
    pub on_s: Vec<f64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// Steps of submitted work that are left, and of the whole piece.
    left: u32,
    piece: u32,
    /// Steps of thinking or of overhead that are left.
    thinking: u32,
    overhead: u32,
    done: u64,
    taken: u64,
}

fn steps(seconds: f64) -> u32 {
    (seconds / STEP_S).round() as u32
}

/// Whether a user works by its phase; a second stage always does.
pub fn is_on(users: &[User], user: usize, at_s: f64) -> bool {
    match users[user].phase {
        Phase::Always | Phase::After(_) => true,
        Phase::Repeats { on, off, offset } => (at_s + offset) % (on + off) < on,
        Phase::WhileOff(other) => !is_on(users, other, at_s),
        Phase::WhileOn(other) => is_on(users, other, at_s),
    }
}

/// Whether a user has work to do by its phase, or by that of the stages before it.
fn has_input(users: &[User], user: usize, at_s: f64) -> bool {
    match users[user].phase {
        Phase::After(first) => has_input(users, first, at_s),
        _ => is_on(users, user, at_s),
    }
}

/// Plays these users for a whole number of seconds.
pub fn play(users: &[User], seconds: u32, random: &mut Random) -> Played {
    play_without(users, None, seconds, random)
}

/// As [`play`], but one of them has no work, though others still follow its phase: what would be if it were not there.
pub fn play_without(users: &[User], absent: Option<usize>, seconds: u32, random: &mut Random) -> Played {
    let n = users.len();
    let mut states = vec![State::default(); n];
    let mut played = Played {
        seconds: Vec::new(),
        samples: Vec::new(),
        kept_waiting_s: vec![vec![0.0; n]; n],
        gpu_s: vec![0.0; n],
        on_s: vec![0.0; n],
    };
    let (mut current, mut slice) = (0, 0);
    // By user: busy steps of the period.
    let (mut period, mut next_sample) = (vec![0; n], SAMPLE_STEPS / 2);
    for step in 0..steps(f64::from(seconds)) {
        if step % steps(1.0) == 0 {
            played.seconds.push(Second { waited_s: vec![0.0; n], calls: vec![0.0; n], sampled_s: vec![0.0; n], busy_s: 0.0 });
        }
        let at_s = f64::from(step) * STEP_S;
        let dones: Vec<u64> = states.iter().map(|state| state.done).collect();
        for user in 0..n {
            let on = is_on(users, user, at_s);
            let counts = match users[user].phase {
                Phase::After(first) => {
                    let state = &states[user];
                    has_input(users, first, at_s) || dones[first] > state.taken || state.left > 0
                }
                _ => on,
            };
            played.on_s[user] += if counts { STEP_S } else { 0.0 };
            if absent != Some(user) {
                submit(&users[user], &mut states[user], on, step, &dones, random);
            }
        }
        // The GPU: the present user until its slice or its work ends.
        if states[current].left == 0 || slice == 0 {
            current = (1..=n).map(|k| (current + k) % n).find(|user| states[*user].left > 0).unwrap_or(current);
            slice = SLICE_STEPS;
        }
        let busy = states[current].left > 0;
        let Some(second) = played.seconds.last_mut() else { continue };
        for user in 0..n {
            let state = &states[user];
            let late = state.left <= state.piece / 2;
            let blocks = match users[user].wait {
                Wait::Block => state.left > 0,
                Wait::BlockLate => state.left > 0 && late,
                Wait::Poll => false,
            };
            if blocks || (state.overhead > 0 && users[user].wait != Wait::Poll) {
                second.waited_s[user] += STEP_S;
            }
            if busy && user != current && state.left > 0 && blocks {
                played.kept_waiting_s[user][current] += STEP_S;
            }
        }
        if busy {
            slice -= 1;
            period[current] += 1;
            second.busy_s += STEP_S;
            played.gpu_s[current] += STEP_S;
            let state = &mut states[current];
            state.left -= 1;
            if state.left == 0 {
                state.done += 1;
                second.calls[current] += if users[current].wait == Wait::Poll { 0.0 } else { 1.0 };
                state.overhead = steps(users[current].overhead_s);
                // Around the mean, so that users do not lock into step.
                state.thinking = steps(users[current].think_s * (0.5 + random.unit()));
            }
        } else {
            slice = 0;
        }
        if step == next_sample {
            let user = if busy { current } else { one_of(&period, random) };
            let busy_s = f64::from(period.iter().sum::<u32>()) * STEP_S;
            second.sampled_s[user] += busy_s;
            played.samples.push(PlayedSample { at_s, user, busy_s });
            period.fill(0);
            next_sample += SAMPLE_STEPS;
        }
    }
    played
}

/// A user, with a chance by its steps.
fn one_of(steps: &[u32], random: &mut Random) -> usize {
    let mut rest = random.unit() * f64::from(steps.iter().sum::<u32>());
    let drawn = steps.iter().position(|steps| {
        rest -= f64::from(*steps);
        rest < 0.0
    });
    drawn.unwrap_or(0)
}

fn submit(user: &User, state: &mut State, on: bool, step: u32, dones: &[u64], random: &mut Random) {
    let throttled = f64::from(step % steps(0.1)) < user.throttled * f64::from(steps(0.1));
    if state.left > 0 {
        return;
    }
    if state.overhead > 0 {
        state.overhead -= 1;
        return;
    }
    if throttled {
        return;
    }
    if state.thinking > 0 {
        state.thinking -= 1;
        return;
    }
    let has_input = match user.phase {
        Phase::After(other) => {
            let more = dones[other] > state.taken;
            state.taken += u64::from(more);
            more
        }
        _ => on,
    };
    if has_input {
        state.left = steps(user.work_s * (0.8 + 0.4 * random.unit())).max(1);
        state.piece = state.left;
    }
}

/// A scenario of two to six users with random rhythms; the seed determines it.
pub fn scenario(random: &mut Random) -> Vec<User> {
    let n = 2 + random.below(5) as usize;
    let between = |random: &mut Random, from: f64, to: f64| from + (to - from) * random.unit();
    (0..n)
        .map(|user| {
            let work_s = between(random, 0.002, 0.04);
            // Some keep the GPU busy, others use a small part.
            let think_s = match random.below(3) {
                0 => 0.0,
                1 => work_s * between(random, 0.2, 1.5),
                _ => work_s * between(random, 2.0, 20.0),
            };
            let wait = match random.below(8) {
                0 => Wait::Poll,
                1 | 2 => Wait::BlockLate,
                _ => Wait::Block,
            };
            let phase = match random.below(10) {
                0 | 1 => Phase::Always,
                2 if user > 0 => Phase::WhileOff(random.below(user as u64) as usize),
                3 if user > 0 => Phase::WhileOn(random.below(user as u64) as usize),
                4 if user > 0 => Phase::After(random.below(user as u64) as usize),
                _ => {
                    let (on, off) = (between(random, 5.0, 25.0), between(random, 5.0, 25.0));
                    Phase::Repeats { on, off, offset: between(random, 0.0, on + off) }
                }
            };
            let overhead_s = if random.below(3) == 0 { work_s * random.unit() } else { 0.0 };
            let throttled = if random.below(5) == 0 { between(random, 0.1, 0.6) } else { 0.0 };
            User { work_s, think_s, wait, phase, overhead_s, throttled }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: User =
        User { work_s: 0.01, think_s: 0.0, wait: Wait::Block, phase: Phase::Always, overhead_s: 0.0, throttled: 0.0 };

    #[test]
    fn two_users_that_want_all_get_half_and_keep_each_other_waiting() {
        let played = play(&[BUSY, BUSY], 20, &mut Random(1));
        for user in 0..2 {
            assert!((played.gpu_s[user] - 10.0).abs() < 0.5, "{:?}", played.gpu_s);
            assert!((played.kept_waiting_s[user][1 - user] - 10.0).abs() < 0.5, "{:?}", played.kept_waiting_s);
            let waited: f64 = played.seconds.iter().map(|second| second.waited_s[user]).sum();
            assert!(waited > 19.0, "{waited}");
            let sampled: f64 = played.seconds.iter().map(|second| second.sampled_s[user]).sum();
            assert!((sampled - 10.0).abs() < 2.5, "{sampled}");
            let samples = played.samples.iter().filter(|sample| sample.user == user).map(|sample| sample.busy_s).sum::<f64>();
            assert!((samples - sampled).abs() < 1e-9, "{samples}, {sampled}");
        }
    }

    #[test]
    fn a_user_that_yields_or_polls_does_not_wait() {
        let other = User { phase: Phase::Repeats { on: 5.0, off: 5.0, offset: 0.0 }, ..BUSY };
        let played = play(&[other, User { phase: Phase::WhileOff(0), ..BUSY }], 40, &mut Random(1));
        assert!(played.kept_waiting_s[1][0] < 0.2, "{:?}", played.kept_waiting_s);
        let played = play(&[other, User { wait: Wait::Poll, ..BUSY }], 40, &mut Random(1));
        assert_eq!(played.seconds.iter().map(|second| second.waited_s[1]).sum::<f64>(), 0.0);
    }

    #[test]
    fn without_a_user_the_others_wait_for_each_other_alone() {
        let other = User { phase: Phase::Repeats { on: 5.0, off: 5.0, offset: 0.0 }, ..BUSY };
        let played = play_without(&[BUSY, other], Some(1), 20, &mut Random(1));
        assert_eq!((played.gpu_s[1], played.kept_waiting_s[0][1]), (0.0, 0.0));
        assert!((played.on_s[1] - 10.0).abs() < 0.1, "its phase stays");
        assert!((played.gpu_s[0] - 20.0).abs() < 0.5, "{:?}", played.gpu_s);
    }

    #[test]
    fn a_second_stage_works_only_after_the_first() {
        let first = User { think_s: 0.02, ..BUSY };
        let played = play(&[first, User { work_s: 0.002, phase: Phase::After(0), ..BUSY }], 20, &mut Random(1));
        assert!(played.gpu_s[1] < 0.3 * played.gpu_s[0], "{:?}", played.gpu_s);
    }
}
