//! Readings, spans and credits in, sums out. Samples are 0.2 s long.

use proptest::prelude::*;
use strum::{EnumCount as _, VariantArray as _};

use super::*;

const SECOND: u64 = 1_000_000_000;
const SAMPLE_NS: u64 = SECOND / 5;
const A: User = User::Container(ContainerKey(1));
const B: User = User::Container(ContainerKey(2));
const C: User = User::Container(ContainerKey(3));

/// A device that draws 80 W, and 300 W more while it is busy.
const IDLE_WATTS: f64 = 80.0;
const BUSY_WATTS: f64 = 300.0;

#[derive(Default)]
struct Device {
    account: EnergyAccount,
    at: BootNs,
    joules: f64,
}

/// Joules of A, B and C, the idle ones, and those of reasons.
#[derive(Debug, PartialEq)]
struct Parts {
    users: [f64; 3],
    idle: f64,
    reasons: [f64; Reason::COUNT],
}

impl Device {
    fn new() -> Self {
        let mut device = Self { joules: 5_000_000.0, ..Self::default() };
        device.read();
        device
    }

    /// Runs for samples of these parts of their time by user, with a reading each `every` samples.
    fn run(&mut self, samples: u64, every: u64, busy: &[(User, f64)]) {
        let all: f64 = busy.iter().map(|(_, part)| part).sum();
        for n in 1..=samples {
            self.at = self.at.plus(SAMPLE_NS);
            self.joules += (IDLE_WATTS + BUSY_WATTS * all) * seconds(SAMPLE_NS);
            self.account.covered(self.at);
            let span_ns = SAMPLE_NS as f64;
            self.account.idle(self.at, span_ns, span_ns * (1.0 - all));
            for (user, part) in busy {
                self.account.credited(&Booked { at: self.at, span_ns, user: *user, ns: span_ns * part });
            }
            if n % every == 0 {
                self.read();
            }
        }
    }

    fn run_unobserved(&mut self, samples: u64, watts: f64) {
        self.at = self.at.plus(samples * SAMPLE_NS);
        self.joules += watts * seconds(samples * SAMPLE_NS);
        self.account.covered(self.at);
        self.account.unobserved(self.at, (samples * SAMPLE_NS) as f64);
    }

    fn read(&mut self) {
        self.account.read(self.at, Some(self.joules));
    }

    fn parts(&mut self) -> Parts {
        self.account.settle(self.at);
        parts(&self.account)
    }
}

fn parts(account: &EnergyAccount) -> Parts {
    let unattributed = account.unattributed().unwrap();
    let joules = |user: User| account.of_container(user.container().unwrap()).unwrap();
    Parts { users: [A, B, C].map(joules), idle: unattributed.idle, reasons: unattributed.reasons }
}

impl Parts {
    fn lost(&self) -> f64 {
        self.reasons[Reason::Lost as usize]
    }

    fn sum(&self) -> f64 {
        self.users.iter().chain(&self.reasons).sum::<f64>() + self.idle
    }
}

#[track_caller]
fn near(is: f64, expected: f64) {
    assert!((is - expected).abs() < 1e-6 * expected.abs().max(1.0), "{is} instead of {expected}");
}

#[test]
fn three_unequal_users_with_idle_gaps_get_the_energy_of_their_busy_time() {
    for every in [5, 10, 35] {
        let mut device = Device::new();
        device.run(70, every, &[]);
        for _ in 0..10 {
            device.run(140, every, &[(A, 0.6), (B, 0.3), (C, 0.1)]);
            device.run(70, every, &[]);
            device.run(70, every, &[(C, 0.2)]);
        }
        let parts = device.parts();
        near(parts.idle, IDLE_WATTS * seconds(device.at.0));
        let expected = [0.6 * 280.0, 0.3 * 280.0, 0.1 * 280.0 + 0.2 * 140.0].map(|busy_s| BUSY_WATTS * busy_s);
        for (joules, expected) in parts.users.into_iter().zip(expected) {
            near(joules, expected);
        }
        near(parts.sum(), device.joules - 5_000_000.0);
        assert_eq!(parts.lost(), 0.0);
    }
}

#[test]
fn a_sample_over_a_reading_belongs_to_both_intervals_in_proportion() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    // The reading is in the middle of a sample of A; then B works.
    device.account.read(device.at.plus(SAMPLE_NS / 2), Some(device.joules + 38.0));
    device.run(1, 2, &[(A, 1.0)]);
    device.run(5, 5, &[(B, 1.0)]);
    let parts = device.parts();
    near(parts.users[0], 30.0 + 30.0);
    near(parts.users[1], 300.0);
}

#[test]
fn an_interval_is_divided_when_its_last_busy_time_is() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    device.run(5, 5, &[(A, 0.5)]);
    let busy_until = device.at;
    device.run(50, 5, &[]);
    // Half of a second waits for its user.
    device.account.settle(busy_until.minus(SECOND));
    assert_eq!(parts(&device.account).users, [0.0; 3]);
    device.account.spread(busy_until, SECOND as f64, |interval, part| interval.idle_ns -= 0.5 * part * SECOND as f64);
    device.account.credited(&Booked { at: busy_until, span_ns: SECOND as f64, user: B, ns: 0.5 * SECOND as f64 });
    let divided = device.parts();
    near(divided.users[0], 75.0);
    near(divided.users[1], 75.0);
    // What is not known to be covered waits, even if no busy time does.
    device.account.read(device.at.plus(SECOND), Some(device.joules + 380.0));
    device.account.settle(BootNs(u64::MAX));
    assert_eq!(parts(&device.account), divided);
}

#[test]
fn before_the_first_idle_interval_all_time_of_an_interval_costs_the_same() {
    let mut device = Device::new();
    device.run(50, 5, &[(A, 0.75), (B, 0.25)]);
    let parts = device.parts();
    near(parts.users[0], 0.75 * 3_800.0);
    near(parts.users[1], 0.25 * 3_800.0);
    assert_eq!(parts.idle, 0.0);
    let mut device = Device::new();
    device.run(50, 5, &[(A, 0.1)]);
    let (parts, spent) = (device.parts(), 1_100.0);
    near(parts.users[0], 0.1 * spent);
    near(parts.idle, 0.9 * spent);
}

#[test]
fn the_idle_power_is_the_lowest_of_the_last_hour_with_idle_time() {
    let mut power = IdlePower::default();
    let add = |power: &mut IdlePower, minute: u64, watts: f64| power.add(BootNs(minute * 60 * SECOND), 5 * SECOND, watts * 5.0);
    power.add(BootNs(0), SECOND, 1.0);
    assert_eq!(power.watts(), None);
    power.add(BootNs(0), 4 * SECOND, 399.0);
    assert_eq!(power.watts(), Some(80.0));
    add(&mut power, 2, 70.0);
    // Work for days, and work that keeps the clocks up in its gaps.
    add(&mut power, 3_000, 90.0);
    assert_eq!(power.watts(), Some(90.0));
    add(&mut power, 3_030, 100.0);
    assert_eq!(power.watts(), Some(90.0));
    add(&mut power, 3_060, 110.0);
    assert_eq!(power.watts(), Some(100.0));
    // A counter that stands still, then returns.
    add(&mut power, 3_061, 0.0);
    assert_eq!(power.watts(), Some(100.0));
    for minute in 4_000..10_000 {
        add(&mut power, minute, 80.0);
    }
    assert!(power.parts.len() <= IDLE_PARTS as usize);
}

#[test]
fn unobserved_time_is_lost_in_proportion_and_without_any_observed_time_all_is() {
    let mut device = Device::new();
    device.run_unobserved(25, 200.0);
    device.read();
    assert_eq!(device.parts(), Parts { users: [0.0; 3], idle: 0.0, reasons: [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1_000.0] });
    device.run(50, 5, &[]);
    // A quarter of an interval is not observed; the idle part is that of all of it.
    device.run(15, 100, &[(A, 1.0)]);
    device.run_unobserved(5, IDLE_WATTS + BUSY_WATTS);
    device.read();
    let parts = device.parts();
    near(parts.users[0], 900.0);
    near(parts.lost(), 1_000.0 + 300.0);
    near(parts.idle, IDLE_WATTS * 14.0);
}

#[test]
fn energy_that_idle_time_does_not_explain_is_idle_where_nothing_was_busy() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    // Power falls seconds after the end of work.
    device.joules += 120.0;
    // The samples name a user, and no busy time.
    device.run(5, 5, &[(A, 0.0)]);
    let parts = device.parts();
    near(parts.idle, 11.0 * IDLE_WATTS + 120.0);
    near(parts.sum(), parts.idle);
}

#[test]
fn a_counter_that_begins_again_counts_from_zero() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    device.joules = 0.0;
    device.run(5, 5, &[(A, 1.0)]);
    device.run(5, 5, &[(A, 1.0)]);
    let parts = device.parts();
    near(parts.users[0], 2.0 * 300.0);
    near(parts.idle, 12.0 * IDLE_WATTS);
    // Reset in an idle time: its energy does not show the idle power.
    (device.joules, device.at) = (60.0, device.at.plus(60 * SECOND));
    device.account.covered(device.at);
    device.account.idle(device.at, 60.0 * SECOND as f64, 60.0 * SECOND as f64);
    device.read();
    device.run(5, 5, &[(A, 1.0)]);
    near(device.parts().users[0], 3.0 * 300.0);
}

#[test]
fn values_that_no_counter_can_have_are_left_out() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    for wrong in [f64::NAN, f64::INFINITY, -1.0] {
        device.account.read(device.at.plus(1), Some(wrong));
    }
    device.account.read(device.at.plus(2), None);
    device.run(5, 5, &[(A, 1.0)]);
    near(device.parts().users[0], 300.0);
    // A jump is not energy; the next increase is.
    device.joules += 1e9;
    device.run(5, 5, &[(A, 1.0)]);
    device.run(5, 5, &[(A, 1.0)]);
    let parts = device.parts();
    near(parts.users[0], 600.0);
    near(parts.sum(), 10.0 * IDLE_WATTS + 2.0 * 380.0);
    // The same reading again.
    device.read();
    assert_eq!(device.parts(), parts);
}

#[test]
fn without_a_counter_there_is_no_energy() {
    let mut account = EnergyAccount::default();
    account.read(BootNs(SECOND), None);
    account.idle(BootNs(2 * SECOND), SECOND as f64, SECOND as f64);
    account.settle(BootNs(u64::MAX));
    account.end();
    assert_eq!((account.unattributed(), account.of_container(ContainerKey(1))), (None, None));
    account.read(BootNs(3 * SECOND), Some(4.0));
    assert_eq!((account.unattributed(), account.of_container(ContainerKey(1))), (Some(UnattributedEnergy::default()), Some(0.0)));
}

#[test]
fn energy_while_the_device_is_gone_is_not_counted() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    device.run(7, 5, &[(A, 1.0)]);
    device.account.end();
    device.joules += 5_000.0;
    device.at = device.at.plus(60 * SECOND);
    device.read();
    device.run(5, 5, &[(A, 1.0)]);
    let parts = device.parts();
    near(parts.users[0], 600.0);
    near(parts.sum(), 10.0 * IDLE_WATTS + 2.0 * 380.0);
}

#[test]
fn energy_outside_the_range_is_not_counted() {
    let range = Range { after: BootNs(20 * SECOND), to: BootNs(30 * SECOND + SECOND / 2) };
    let mut device = Device { account: EnergyAccount::new(range), ..Device::default() };
    device.read();
    device.run(100, 5, &[]);
    device.run(25, 5, &[]);
    device.run(25, 5, &[(A, 1.0)]);
    device.run(5, 5, &[(A, 1.0)]);
    device.run(25, 5, &[]);
    let parts = device.parts();
    near(parts.idle, 10.5 * IDLE_WATTS);
    near(parts.users[0], 5.5 * BUSY_WATTS);
}

#[test]
fn a_forgotten_container_takes_its_energy_along_and_none_comes_later() {
    let mut device = Device::new();
    device.run(50, 5, &[]);
    device.run(50, 5, &[(A, 0.5), (B, 0.5)]);
    device.parts();
    device.run(5, 5, &[(A, 0.5), (B, 0.5)]);
    device.account.forget(|key| *key == ContainerKey(1));
    let parts = device.parts();
    near(parts.users[0], 0.0);
    near(parts.users[1], 1_500.0 + 150.0);
    near(parts.lost(), 150.0);
    assert_eq!(device.account.sums.unwrap().by_container.len(), 1);
}

#[test]
fn intervals_that_wait_are_bounded_and_their_energy_is_kept() {
    let mut device = Device::new();
    device.run(10 * MAX_PENDING as u64, 1, &[(A, 1.0)]);
    assert_eq!(device.account.pending.len(), MAX_PENDING);
    near(parts(&device.account).sum(), 9.0 * MAX_PENDING as f64 * seconds(SAMPLE_NS) * 380.0);
    near(device.parts().sum(), 10.0 * MAX_PENDING as f64 * seconds(SAMPLE_NS) * 380.0);
}

#[derive(Clone, Debug)]
enum EnergyStep {
    Span { ms: u64, idle: f64, user: u64, late: bool },
    Unobserved { ms: u64 },
    Read { joules: f64 },
    Reset { joules: f64 },
    Settle { behind_ms: u64 },
    End,
}

fn step() -> impl Strategy<Value = EnergyStep> {
    prop_oneof![
        8 => (1..700u64, 0.0..1.0, 1..12u64, any::<bool>())
            .prop_map(|(ms, idle, user, late)| EnergyStep::Span { ms, idle, user, late }),
        2 => (1..3_000u64).prop_map(|ms| EnergyStep::Span { ms, idle: 1.0, user: 1, late: false }),
        1 => (1..20_000u64).prop_map(|ms| EnergyStep::Unobserved { ms }),
        6 => (0.0..700.0).prop_map(|joules| EnergyStep::Read { joules }),
        1 => (0.0..50.0).prop_map(|joules| EnergyStep::Reset { joules }),
        6 => (0..20_000u64).prop_map(|behind_ms| EnergyStep::Settle { behind_ms }),
        1 => Just(EnergyStep::End),
    ]
}

proptest! {
    /// Over any history the parts sum to the counter's increase, and none decreases.
    #[test]
    fn the_parts_sum_to_the_increase_of_the_counter(steps in prop::collection::vec(step(), 1..300)) {
        let (mut account, mut at, mut counter) = (EnergyAccount::default(), BootNs(SECOND), 1_000.0);
        let (mut read_at, mut waiting) = (Some(at), Vec::new());
        account.read(at, Some(counter));
        let (mut expected, mut last): (f64, Vec<f64>) = (0.0, Vec::new());
        for step in steps {
            match step {
                EnergyStep::Span { ms, idle, user, late } => {
                    let span_ns = (ms * 1_000_000) as f64;
                    at = at.plus(ms * 1_000_000);
                    account.covered(at);
                    account.idle(at, span_ns, span_ns * idle);
                    let user = match user {
                        1..=3 => User::Container(ContainerKey(user)),
                        4 => User::Host(crate::fact::HostProcess { pid: 7, start: BootNs(0) }),
                        n => User::Unattributed(Reason::VARIANTS[n as usize - 5]),
                    };
                    let booked = Booked { at, span_ns, user, ns: span_ns * (1.0 - idle) };
                    if late { waiting.push(booked) } else { account.credited(&booked) }
                }
                EnergyStep::Unobserved { ms } => {
                    at = at.plus(ms * 1_000_000);
                    account.covered(at);
                    account.unobserved(at, (ms * 1_000_000) as f64);
                }
                EnergyStep::Read { joules } | EnergyStep::Reset { joules } => {
                    if read_at == Some(at) {
                        continue;
                    }
                    // Small enough for the time, so that it counts.
                    let most = read_at.map_or(joules, |last| 0.9 * MAX_WATTS * seconds(at.saturating_since(last)));
                    let joules = joules.min(most);
                    let is_reset = matches!(step, EnergyStep::Reset { .. }) && joules < counter;
                    counter = if is_reset { joules } else { counter + joules };
                    if read_at.is_some() {
                        expected += joules;
                    }
                    account.read(at, Some(counter));
                    read_at = Some(at);
                }
                EnergyStep::Settle { behind_ms } => {
                    let until = at.minus(behind_ms * 1_000_000);
                    let (due, later): (Vec<Booked>, _) = waiting.into_iter().partition(|booked: &Booked| booked.at <= until.plus(SECOND));
                    waiting = later;
                    due.iter().for_each(|booked| account.credited(booked));
                    account.settle(until);
                }
                EnergyStep::End => {
                    account.end();
                    (read_at, waiting) = (None, Vec::new());
                }
            }
            let parts = parts(&account);
            let all: Vec<f64> = parts.users.into_iter().chain(parts.reasons).chain([parts.idle]).collect();
            prop_assert!(all.iter().all(|joules| joules.is_finite() && *joules >= 0.0), "{all:?}");
            prop_assert!(last.iter().zip(&all).all(|(before, now)| now >= before), "{last:?} {all:?}");
            prop_assert!(account.pending.len() <= MAX_PENDING);
            last = all;
        }
        account.end();
        let sum = parts(&account).sum();
        prop_assert!((sum - expected).abs() < 1e-6 * expected.max(1.0), "{sum} instead of {expected}");
    }
}
