//! The scenarios, as a table: which user uses which GPU and how, and the findings that a report must contain.
//!
//! On a simulator that divides 2 ms slices by demand, these choices make the truth unambiguous: phases of 12 s, in which a user has 70
//! samples; a GPU that is saturated where a user is to be blamed (demands sum to 1 or more) and clearly not saturated elsewhere (0.8 at
//! most, while saturation begins at 0.9); schedules of living processes that count from the same instant.

use devkit::Random;

/// Duration of the session in seconds; the times below count from its begin.
pub const DURATION: f64 = 90.0;
/// Users that are present throughout start before the session and end after it.
const BEFORE: f64 = -3.0;
const AFTER: f64 = DURATION + 2.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupPlace {
    /// In a cgroup of its own on v2.
    Container,
    /// Also on the hierarchy of the cpu controller; with a quota of so many microseconds in each 100 ms, if any.
    WithCpu(Option<u32>),
    /// Outside any container.
    Host,
}

#[derive(Clone, Debug)]
pub enum Act {
    /// A process that runs from `from` to `to` with these arguments of `nvml-sim load`. `SINCE` stands for the begin of the session.
    Process { from: f64, to: f64, load: String },
    /// As [`Act::Process`], in a cgroup that is created and removed with it.
    Life { from: f64, to: f64, load: String },
    /// Consecutive processes of 2.5 s each.
    Jobs { from: f64, count: u32 },
    /// A process that uses a processor and does not use a GPU.
    Spin { from: f64, to: f64 },
}

pub struct ScenarioUser {
    pub name: &'static str,
    pub place: CgroupPlace,
    pub acts: Vec<Act>,
    /// Total GPU-seconds that the demands imply.
    pub seconds: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Grade {
    Coactive,
    /// With the victim's GPU-seconds per second without the other user and with it.
    Confirmed(f64, f64),
}

/// The expected finding for `victim` and another user of its GPU.
pub struct Pair {
    pub victim: &'static str,
    pub aggressor: &'static str,
    pub grade: Grade,
}

pub struct CauseOf {
    pub victim: &'static str,
    pub cause: &'static str,
    pub verdict: &'static str,
}

pub struct Scenario {
    pub name: &'static str,
    pub users: Vec<ScenarioUser>,
    pub pairs: Vec<Pair>,
    pub causes: Vec<CauseOf>,
    /// Time, verb of nvml-sim, and its arguments after the GPU.
    pub happens: Vec<(f64, &'static str, &'static str)>,
}

/// One process for the whole session, with a schedule of demands.
fn steps(steps: &str) -> Act {
    Act::Process { from: BEFORE, to: AFTER, load: format!("--mem 1GiB --since SINCE --demands {steps}") }
}

fn ways(ways: &str) -> Act {
    Act::Process { from: BEFORE, to: AFTER, load: format!("--mem 1GiB {ways}") }
}

/// On three times for 12 s; off before, between and after.
fn on_off(demand: &str) -> String {
    format!("0:12s,{demand}:12s,0:12s,{demand}:12s,0:12s,{demand}:12s,0")
}
/// The seconds of the session in which [`on_off`] is on and off.
const ON: f64 = 36.0;
const OFF: f64 = DURATION - ON;
const TIMES: [(f64, f64); 3] = [(12.0, 24.0), (36.0, 48.0), (60.0, 72.0)];

/// Bursts of a demand of 0.4 and pauses, each of 0.2 to 1.5 s, fixed by the seed; with the GPU-seconds that they imply.
fn bursts(seed: u64) -> (String, f64) {
    let mut random = Random(seed);
    let mut draw = || 200 + random.below(1301);
    let (mut all, mut on_ms, mut at_ms) = (Vec::new(), 0, 0);
    while (at_ms as f64) < DURATION * 1e3 {
        let (on, off) = (draw(), draw());
        all.push(format!("0.4:{on}ms,0:{off}ms"));
        on_ms += on.min((DURATION * 1e3) as u64 - at_ms);
        at_ms += on + off;
    }
    (all.join(","), 0.4 * on_ms as f64 / 1e3)
}

fn user(name: &'static str, act: Act, seconds: f64) -> ScenarioUser {
    ScenarioUser { name, place: CgroupPlace::Container, acts: vec![act], seconds }
}

fn coactive(victim: &'static str, aggressor: &'static str) -> Pair {
    Pair { victim, aggressor, grade: Grade::Coactive }
}

fn confirmed(victim: &'static str, aggressor: &'static str, before: f64, after: f64) -> Pair {
    Pair { victim, aggressor, grade: Grade::Confirmed(before, after) }
}

fn causes(victim: &'static str, verdict: &'static str, causes: &[&'static str]) -> Vec<CauseOf> {
    causes.iter().map(|cause| CauseOf { victim, cause, verdict }).collect()
}

fn scenario(name: &'static str, users: Vec<ScenarioUser>, pairs: Vec<Pair>) -> Scenario {
    Scenario { name, users, pairs, causes: Vec::new(), happens: Vec::new() }
}

/// All scenarios, in the order of their GPUs.
pub fn all() -> Vec<Scenario> {
    [fair(), blamed(), innocent(), own_causes(), lives()].into_iter().flatten().collect()
}

const OF_GPU: [&str; 4] = ["gpu-clocks", "gpu-power", "gpu-thermal", "gpu-error"];

fn fair() -> Vec<Scenario> {
    let mut fair = scenario(
        "fair pair",
        vec![user("a", steps("1.0"), DURATION / 2.0), user("b", steps("1.0"), DURATION / 2.0)],
        vec![coactive("a", "b"), coactive("b", "a")],
    );
    fair.users.iter_mut().for_each(|user| user.place = CgroupPlace::WithCpu(None));
    fair.causes = causes("a", "ruled-out", &OF_GPU);
    fair.causes.extend(causes("a", "ruled-out", &["gpu-memory", "cpu-quota"]));
    let unequal = scenario(
        "90/10 pair",
        vec![user("large", steps("0.9"), DURATION * 0.9), user("small", steps("0.1"), DURATION * 0.1)],
        vec![coactive("small", "large"), coactive("large", "small")],
    );
    vec![fair, unequal]
}

/// A user comes and goes on a saturated GPU, and the victim gets less meanwhile.
fn blamed() -> Vec<Scenario> {
    let victim = || user("victim", steps("1.0"), OFF + ON / 2.0);
    let process = |(from, to)| Act::Process { from, to, load: "--mem 1GiB --demand 1.0".into() };
    let comes = ScenarioUser { acts: TIMES.map(process).to_vec(), ..user("comes", steps("1.0"), ON / 2.0) };
    let same = user("comes", steps(&on_off("1.0")), ON / 2.0);
    let pairs = || vec![confirmed("victim", "comes", 1.0, 0.5), coactive("comes", "victim")];
    let host = ScenarioUser { place: CgroupPlace::Host, ..user("comes", steps(&on_off("1.0")), ON / 2.0) };
    // Three processes at once, so that the change is large compared to the sampling error.
    let three = ScenarioUser {
        acts: std::iter::repeat_with(|| steps(&on_off("0.5"))).take(3).collect(),
        ..user("comes", steps("1.0"), ON * 1.5 / 2.8)
    };
    // Of the whole GPU while the neighbour is off and on. One that wants all has a drop that the sides of six changes show.
    let share = OFF / 1.3 + ON / 2.8;
    vec![
        scenario("comes and goes as processes", vec![victim(), comes], pairs()),
        scenario("comes and goes in one process", vec![victim(), same], pairs()),
        scenario("a host process comes and goes", vec![victim(), host], pairs()),
        scenario(
            "one of two neighbours comes and goes",
            vec![user("victim", steps("1.0"), share), user("constant", steps("0.3"), 0.3 * share), three],
            vec![
                confirmed("victim", "comes", 1.0 / 1.3, 1.0 / 2.8),
                coactive("victim", "constant"),
                coactive("constant", "victim"),
            ],
        ),
    ]
}

/// No user delays another, although it may appear so.
fn innocent() -> Vec<Scenario> {
    let ((one, of_one), (two, of_two)) = (bursts(1), bursts(2));
    vec![
        scenario(
            "room for both",
            vec![user("a", steps("0.3"), DURATION * 0.3), user("b", steps(&on_off("0.3")), ON * 0.3)],
            vec![coactive("a", "b"), coactive("b", "a")],
        ),
        // The victim's phase ends as the other's begins, once, on a saturated GPU: one change proves nothing.
        scenario(
            "a phase ends as another begins",
            vec![user("victim", steps("1.0:45s,0.5"), 45.0 + 45.0 / 3.0), user("other", steps("0:45s,1.0"), 45.0 * 2.0 / 3.0)],
            vec![coactive("victim", "other"), coactive("other", "victim")],
        ),
        // The same repeatedly, where the GPU has room for both.
        scenario(
            "phases alternate, with room",
            vec![
                user("victim", steps("1.0:12s,0.3:12s,1.0:12s,0.3:12s,1.0:12s,0.3:12s,1.0"), OFF + ON * 0.3),
                user("other", steps(&on_off("0.5")), ON * 0.5),
            ],
            vec![coactive("victim", "other"), coactive("other", "victim")],
        ),
        scenario(
            "bursts",
            vec![user("a", steps(&one), of_one), user("b", steps(&two), of_two)],
            vec![coactive("a", "b"), coactive("b", "a")],
        ),
        // Periods without a simple ratio to the driver's grid of 167 ms: one with such a ratio, such as 130 ms (7 to 9), would be sampled
        // at few of its phases.
        scenario(
            "periods",
            vec![
                user("a", ways("--demand 0.8 --every 103ms --on 51ms"), DURATION * 0.8 * 51.0 / 103.0),
                user("b", ways("--demand 0.2 --every 605ms --on 302ms"), DURATION * 0.2 * 302.0 / 605.0),
            ],
            vec![coactive("a", "b"), coactive("b", "a")],
        ),
    ]
}

fn own_causes() -> Vec<Scenario> {
    let mut starved = scenario(
        "starved by its own quota",
        vec![
            ScenarioUser {
                place: CgroupPlace::WithCpu(Some(3_000)),
                acts: vec![steps("0.9:30s,0.2:30s,0.9"), Act::Spin { from: 30.0, to: 60.0 }],
                ..user("victim", steps("1.0"), 60.0)
            },
            user("other", steps("0:30s,0.5:30s,0"), 15.0),
        ],
        vec![coactive("victim", "other")],
    );
    starved.causes = causes("victim", "possible", &["cpu-quota"]);
    starved.causes.extend(causes("victim", "ruled-out", &OF_GPU));
    let halves = || vec![user("a", steps("1.0"), DURATION / 2.0), user("b", steps("1.0"), DURATION / 2.0)];
    let mut throttled = scenario("a throttled GPU", halves(), vec![coactive("a", "b")]);
    throttled.causes = causes("a", "possible", &["gpu-clocks", "gpu-power", "gpu-thermal"]);
    throttled.causes.extend(causes("a", "ruled-out", &["gpu-error"]));
    let throttle = "--kind throttle --reasons sw_power_cap,hw_slowdown,hw_thermal --mhz 900 --watts 150 --celsius 88 --for 80s";
    throttled.happens = vec![(5.0, "fault", throttle)];
    let mut full = scenario("full memory and an XID", halves(), vec![coactive("a", "b")]);
    full.users[1].acts.push(Act::Process { from: 10.0, to: 80.0, load: "--mem 15GiB".into() });
    full.causes = causes("a", "possible", &["gpu-memory", "gpu-error"]);
    full.causes.extend(causes("a", "ruled-out", &OF_GPU[..3]));
    full.happens = vec![(20.0, "xid", "--xid 31")];
    vec![starved, throttled, full]
}

fn lives() -> Vec<Scenario> {
    let life = |from, to| Act::Life { from, to, load: "--mem 1GiB --demand 0.3".into() };
    vec![
        scenario(
            "30 short jobs",
            vec![
                ScenarioUser { acts: vec![Act::Jobs { from: 0.5, count: 30 }], ..user("jobs", steps("1.0"), 37.5) },
                user("other", steps("1.0"), DURATION - 37.5),
            ],
            vec![coactive("jobs", "other"), coactive("other", "jobs")],
        ),
        scenario(
            "restarted in between",
            vec![
                ScenarioUser { acts: vec![life(5.0, 35.0), life(45.0, 80.0)], ..user("restarted", steps("1.0"), 65.0 * 0.3) },
                user("other", steps("0.3"), DURATION * 0.3),
            ],
            vec![coactive("restarted", "other"), coactive("other", "restarted")],
        ),
    ]
}
