//! The design of a freezing experiment: which windows a suspect is frozen in, drawn at random from a seed before the first freeze.
//!
//! ```text
//!  burst     |----- window -----|----- window -----|  pause  |----- window -----|----- window -----|
//!  suspect   |      frozen      |       runs       |         |       runs       |      frozen      |   the coin of each burst decides
//! ```
//! Both windows of a burst have the same length, and exactly one of them is frozen: a suspect is frozen for at most half of the time by
//! construction. The coins are independent and fair, so under the hypothesis that freezing changes nothing, every assignment of coins
//! explains an outcome equally well; the test in `sampler-report` (`freeze`) needs no other assumption. Pauses vary by chance, so that no
//! periodic load of the victim can stay in step with the windows.
//!
//! Does not freeze anything and does not read a clock: times are inputs or offsets.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use crate::units::BootNs;

const SECOND_NS: u64 = 1_000_000_000;
/// Number of bursts. With fewer, no outcome could be distinguished from chance; with more, an experiment takes half an hour.
pub const BURSTS: RangeInclusive<u32> = 6..=100;
/// Length of a freeze. Sessions have several samples a second; a longer freeze may exceed timeouts of the suspect's own peers.
pub const FREEZE_NS: RangeInclusive<u64> = SECOND_NS / 10..=10 * SECOND_NS;
/// Mean pause between bursts.
pub const PAUSE_NS: RangeInclusive<u64> = 0..=60 * SECOND_NS;
/// A freeze may begin and end this much outside of its window: a guard that was late, or waited for processes to stop.
const SLACK_NS: u64 = SECOND_NS;
/// Length of the path of a cgroup (PATH_MAX).
const MAX_PATH_BYTES: usize = 4096;

/// Why a suspect may be frozen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FreezeConsent {
    /// Each of its containers has the annotation or label for it.
    #[default]
    Annotation,
    /// The operator gave `--i-may-freeze`.
    Operator,
}

/// What is chosen before a schedule is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExperimentDesign {
    pub seed: u64,
    pub bursts: u32,
    /// Length of each window, and so of each freeze.
    pub window_ns: u64,
    /// Mean pause between two bursts; each pause is between half of it and one and a half.
    pub pause_ns: u64,
    pub consent: FreezeConsent,
}

/// Two windows of equal length without a gap between them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedBurst {
    /// Start of the first window, after the start of the experiment.
    pub offset_ns: u64,
    /// Whether the suspect is frozen in the first window; if not, in the second.
    pub frozen_first: bool,
}

/// The schedule of an experiment, as it is written into the session before the first freeze.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExperimentSchedule {
    /// Path of the cgroup of the victim: a container, pod, job, unit or login session.
    pub victim: String,
    /// Path of the cgroup that is frozen: a container, or a pod with its containers.
    pub suspect: String,
    pub seed: u64,
    /// Start of the experiment; it identifies the experiment within a session.
    pub start: BootNs,
    pub window_ns: u64,
    pub bursts: Vec<PlannedBurst>,
    pub consent: FreezeConsent,
}

/// A statement about an experiment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExperimentFact {
    Schedule(ExperimentSchedule),
    /// The suspect was frozen: all of its processes were stopped from `from` to `to`.
    Frozen {
        /// The start of the experiment.
        experiment: BootNs,
        burst: u32,
        from: BootNs,
        to: BootNs,
    },
}

/// A span of boot time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootSpan {
    pub from: BootNs,
    pub to: BootNs,
}

/// splitmix64: the same numbers for a seed on every machine and in every version, since a schedule must be reproducible.
#[derive(Clone, Debug)]
pub struct SeededRandom(u64);

impl SeededRandom {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A fair coin.
    pub fn coin(&mut self) -> bool {
        self.draw() >> 63 == 1
    }

    /// Uniform in `0..=most`.
    fn up_to(&mut self, most: u64) -> u64 {
        // The upper half of the product: the deviation from uniform is below one in 2^20 for spans of minutes.
        ((u128::from(self.draw()) * (u128::from(most) + 1)) >> 64) as u64
    }
}

impl FreezeConsent {
    /// How it is written in logs and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Annotation => "annotation",
            Self::Operator => "operator",
        }
    }
}

impl ExperimentDesign {
    /// Draws the schedule of an experiment that starts at `start`.
    pub fn draw(&self, victim: String, suspect: String, start: BootNs) -> ExperimentSchedule {
        let mut random = SeededRandom::new(self.seed);
        let mut offset_ns = 0_u64;
        let mut bursts = Vec::new();
        for _ in 0..self.bursts {
            offset_ns = offset_ns.saturating_add(self.pause_ns / 2 + random.up_to(self.pause_ns));
            bursts.push(PlannedBurst { offset_ns, frozen_first: random.coin() });
            offset_ns = offset_ns.saturating_add(self.window_ns.saturating_mul(2));
        }
        ExperimentSchedule { victim, suspect, seed: self.seed, start, window_ns: self.window_ns, bursts, consent: self.consent }
    }
}

impl ExperimentSchedule {
    fn windows(&self, burst: u32) -> Option<(BootSpan, BootSpan, bool)> {
        let planned = self.bursts.get(usize::try_from(burst).ok()?)?;
        let from = self.start.plus(planned.offset_ns);
        let middle = from.plus(self.window_ns);
        let (first, second) = (BootSpan { from, to: middle }, BootSpan { from: middle, to: middle.plus(self.window_ns) });
        Some((first, second, planned.frozen_first))
    }

    /// The window of a burst in which the suspect is to be frozen.
    pub fn frozen_window(&self, burst: u32) -> Option<BootSpan> {
        self.windows(burst).map(|(first, second, frozen_first)| if frozen_first { first } else { second })
    }

    /// The other window of the burst.
    pub fn running_window(&self, burst: u32) -> Option<BootSpan> {
        self.windows(burst).map(|(first, second, frozen_first)| if frozen_first { second } else { first })
    }

    /// The end of the last window.
    pub fn end(&self) -> BootNs {
        let last = self.bursts.last().map_or(0, |burst| burst.offset_ns.saturating_add(self.window_ns.saturating_mul(2)));
        self.start.plus(last)
    }

    /// Number of bursts.
    pub fn len(&self) -> u32 {
        u32::try_from(self.bursts.len()).unwrap_or(u32::MAX)
    }

    pub fn is_empty(&self) -> bool {
        self.bursts.is_empty()
    }

    /// Why no experiment may have this schedule; `None` if one may.
    pub fn problem(&self) -> Option<String> {
        let is_path = |path: &str| path.starts_with('/') && path.len() <= MAX_PATH_BYTES && !path.contains('\0');
        if !is_path(&self.victim) || !is_path(&self.suspect) {
            return Some("victim and suspect must be paths of cgroups within their hierarchy, beginning with /".into());
        }
        if self.victim == self.suspect {
            return Some("victim and suspect are the same cgroup".into());
        }
        if !BURSTS.contains(&self.len()) {
            return Some(format!("{} bursts: give {} to {}", self.len(), BURSTS.start(), BURSTS.end()));
        }
        if !FREEZE_NS.contains(&self.window_ns) {
            return Some(format!("a window of {} ns: give 0.1 s to 10 s", self.window_ns));
        }
        let overlaps = |pair: &[PlannedBurst]| pair[1].offset_ns.saturating_sub(pair[0].offset_ns) < 2 * self.window_ns;
        // A pause draws one number before the coin.
        let mut random = SeededRandom::new(self.seed);
        let mut is_drawn = |burst: &PlannedBurst| {
            let _pause = random.draw();
            random.coin() == burst.frozen_first
        };
        if !self.bursts.iter().all(&mut is_drawn) {
            return Some(format!("the coins are not those of the seed {}", self.seed));
        }
        if self.bursts.windows(2).any(overlaps) {
            return Some("two bursts of the schedule overlap".into());
        }
        None
    }
}

/// The schedule of one experiment, and the bursts of which the freeze was reported: each once.
#[derive(Clone, Debug)]
pub struct ReportedFreezes {
    schedule: ExperimentSchedule,
    reported: BTreeSet<u32>,
}

impl ReportedFreezes {
    pub fn new(schedule: ExperimentSchedule) -> Self {
        Self { schedule, reported: BTreeSet::new() }
    }

    /// Accepts the freeze of a burst, or returns why it is not one of this experiment. `now`: a freeze is reported after its end.
    pub fn report(&mut self, experiment: BootNs, burst: u32, real: BootSpan, now: BootNs) -> Result<(), String> {
        if experiment != self.schedule.start {
            return Err(format!(
                "the experiment of the session started at {} ns, not at {} ns",
                self.schedule.start.0, experiment.0
            ));
        }
        let Some(window) = self.schedule.frozen_window(burst) else {
            return Err(format!("there is no burst {burst}: the experiment has {}", self.schedule.len()));
        };
        if real.from >= real.to || real.to > now {
            return Err(format!("the freeze of burst {burst} does not end after its start and before now"));
        }
        if real.from < window.from.minus(SLACK_NS) || real.to > window.to.plus(SLACK_NS) {
            return Err(format!("the freeze of burst {burst} is not in its window"));
        }
        if self.reported.insert(burst) { Ok(()) } else { Err(format!("the freeze of burst {burst} was reported before")) }
    }
}

impl BootSpan {
    pub fn ns(self) -> u64 {
        self.to.saturating_since(self.from)
    }
}

/// Whether the cgroup at `path` is the one at `root` or below it.
pub fn is_at_or_below(path: &str, root: &str) -> bool {
    match path.strip_prefix(root.trim_end_matches('/')) {
        Some(rest) => rest.is_empty() || rest.starts_with('/'),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn design(seed: u64) -> ExperimentDesign {
        ExperimentDesign { seed, bursts: 20, window_ns: 3 * SECOND_NS, pause_ns: SECOND_NS, consent: FreezeConsent::Operator }
    }

    fn draw(design: ExperimentDesign) -> ExperimentSchedule {
        design.draw("/docker/a".into(), "/docker/b".into(), BootNs(5 * SECOND_NS))
    }

    #[test]
    fn a_schedule_is_a_function_of_its_seed() {
        assert_eq!(draw(design(7)), draw(design(7)));
        assert_ne!(draw(design(7)).bursts, draw(design(8)).bursts);
        // These numbers must never change: a seed in a session reproduces its schedule.
        let coins: Vec<bool> = draw(design(1)).bursts.iter().map(|burst| burst.frozen_first).collect();
        assert_eq!(SeededRandom::new(0).draw(), 0xE220_A839_7B1D_CDAF);
        assert_eq!(coins.len(), 20);
    }

    #[test]
    fn every_schedule_is_valid_and_frozen_for_at_most_half_of_the_time() {
        for seed in 0..500 {
            for (bursts, window_ns, pause_ns) in
                [(6, SECOND_NS / 10, 0), (20, 3 * SECOND_NS, SECOND_NS), (100, 10 * SECOND_NS, 60 * SECOND_NS)]
            {
                let schedule = draw(ExperimentDesign { seed, bursts, window_ns, pause_ns, consent: FreezeConsent::Operator });
                assert_eq!(schedule.problem(), None);
                let mut until = schedule.start;
                let mut frozen_ns = 0;
                for burst in 0..schedule.len() {
                    let (frozen, running) = (schedule.frozen_window(burst).unwrap(), schedule.running_window(burst).unwrap());
                    let (first, second) = if frozen.from < running.from { (frozen, running) } else { (running, frozen) };
                    assert!(first.from >= until && first.to == second.from && frozen.ns() == running.ns());
                    (until, frozen_ns) = (second.to, frozen_ns + frozen.ns());
                }
                assert!(2 * frozen_ns <= schedule.end().saturating_since(schedule.start));
            }
        }
    }

    #[test]
    fn coins_are_fair_and_independent() {
        let (mut first, mut same) = (0, 0);
        for seed in 0..2000 {
            let bursts = draw(design(seed)).bursts;
            first += bursts.iter().filter(|burst| burst.frozen_first).count();
            same += bursts.windows(2).filter(|pair| pair[0].frozen_first == pair[1].frozen_first).count();
        }
        // 40,000 and 38,000 coins: five standard errors are 500 and 490.
        assert!((19_500..=20_500).contains(&first) && (18_500..=19_500).contains(&same), "{first} {same}");
    }

    #[test]
    fn invalid_schedules_are_named() {
        let check = |change: &dyn Fn(&mut ExperimentSchedule), expect: &str| {
            let mut schedule = draw(design(1));
            change(&mut schedule);
            let problem = schedule.problem().unwrap_or_default();
            assert!(problem.contains(expect), "{problem}");
        };
        check(&|schedule| schedule.victim = "a".into(), "paths of cgroups");
        check(&|schedule| schedule.suspect = schedule.victim.clone(), "the same cgroup");
        check(&|schedule| schedule.bursts.truncate(5), "5 bursts: give 6 to 100");
        check(&|schedule| schedule.window_ns = 11 * SECOND_NS, "0.1 s to 10 s");
        check(&|schedule| schedule.bursts[4].frozen_first ^= true, "the coins are not those of the seed 1");
        check(&|schedule| schedule.bursts[3].offset_ns = schedule.bursts[2].offset_ns, "overlap");
    }

    #[test]
    fn a_freeze_is_reported_once_and_in_its_window() {
        let schedule = draw(design(1));
        let (start, window) = (schedule.start, schedule.frozen_window(2).unwrap());
        let mut freezes = ReportedFreezes::new(schedule);
        let mut check = |start, burst, real, now, problem: &str| match freezes.report(start, burst, real, now) {
            Ok(()) => assert_eq!(problem, ""),
            Err(error) => assert!(!problem.is_empty() && error.contains(problem), "{error}"),
        };
        let now = window.to.plus(SECOND_NS);
        let moved = |by| BootSpan { from: window.from.plus(by), to: window.to.plus(by) };
        check(BootNs(1), 2, window, now, "not at 1 ns");
        check(start, 20, window, now, "no burst 20");
        check(start, 2, BootSpan { from: window.to, to: window.from }, now, "after its start");
        check(start, 2, window, window.to.minus(1), "before now");
        check(start, 2, moved(2 * SECOND_NS), now.plus(9 * SECOND_NS), "not in its window");
        check(start, 3, window, now, "not in its window");
        check(start, 2, moved(SECOND_NS / 10), now, "");
        check(start, 2, window, now, "reported before");
    }

    #[test]
    fn paths_are_compared_by_segment() {
        for (path, root, expect) in [
            ("/a/b", "/a", true),
            ("/a", "/a", true),
            ("/ab", "/a", false),
            ("/a", "/a/b", false),
            ("/a", "/", true),
            ("/a/b", "/a/", true),
        ] {
            assert_eq!(is_at_or_below(path, root), expect, "{path} {root}");
        }
    }
}
