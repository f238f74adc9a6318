//! The account of one engine: its busy time by user, with standard errors.
//!
//! ```text
//!  busy sample with a pid             -> credited to the user of that pid at once
//!  busy sample, pid-less or unqueried -> waits for later neighbours, 10 s at most; then divided over its neighbours (`divide`);
//!                                        without neighbours, credited to the only listed holder of the device, or divided over
//!                                        clients, or `no_pid`
//! ```
//! Busy time and its credits are booked together, so their sums agree at every instant. Time that waits is in no state yet.

use std::collections::VecDeque;

use foldhash::HashMap;
use strum::EnumCount as _;

use super::divide::{Basis, NamedSample, Neighbours, Presence, Sample, WAIT_NS, partly_ns};
use super::exits::{Exits, NamedUser};
use super::naming::Naming;
use super::settings::Range;
use super::standard_error::{SampleHistory, StandardError};
use crate::device::Reason;
use crate::fact::User;
use crate::units::BootNs;

#[derive(Clone, Copy, Debug)]
pub struct PendingSample {
    pub sample: Sample,
    pub named: Option<NamedUser>,
    /// The user if no process is named around the sample.
    pub otherwise: User,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    pub ns: f64,
    pub samples: u64,
    /// Variance of `ns` by chance, without `one_more`.
    sum_of_variances: f64,
    /// Variance of one additional sample: the number of named samples is itself uncertain, which matters if they are few.
    one_more: f64,
    /// Error by the unknown distribution of the work (`naming`); it does not average out.
    distribution_ns: f64,
}

impl Credit {
    /// Variance of `ns`.
    pub fn variance(&self) -> f64 {
        self.sum_of_variances + self.one_more + self.distribution_ns.powi(2)
    }
}

/// Busy time of a sample that was booked for a user.
#[derive(Clone, Copy, Debug)]
pub struct Booked {
    /// The end of the sample's span.
    pub at: BootNs,
    pub span_ns: f64,
    pub user: User,
    pub ns: f64,
}

#[derive(Debug, Default)]
pub struct EngineAccount {
    range: Range,
    pub busy_ns: f64,
    pub unattributed: [f64; Reason::COUNT],
    /// By user. Time without a container is also in `unattributed`, that of host processes under [`Reason::Host`].
    credits: HashMap<User, Credit>,
    neighbours: Neighbours,
    waiting: VecDeque<PendingSample>,
    history: SampleHistory,
    standard_errors: HashMap<User, StandardError>,
    /// Number and sum of squared weights of the samples that are not in the variances yet.
    unsettled: HashMap<User, (u64, f64)>,
    naming: Naming,
    /// Queried busy samples, and whether they name a process, until all ends around them are known.
    evidence: VecDeque<(Sample, bool)>,
    /// Partly busy time since the errors were last settled: the busy time of each sample times the idle part of its period.
    partly_ns: f64,
}

impl EngineAccount {
    pub fn new(range: Range) -> Self {
        Self { range, ..Self::default() }
    }

    pub fn credits(&self) -> &HashMap<User, Credit> {
        &self.credits
    }

    pub fn standard_error(&self, user: User) -> Option<StandardError> {
        self.standard_errors.get(&user).copied()
    }

    /// Adds a sample; samples are added in order.
    pub fn add_sample(&mut self, pending: PendingSample, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        if !pending.sample.queried {
            self.history.unqueried(pending.sample.at);
        }
        if pending.sample.busy_ns > 0.0 && pending.sample.queried {
            self.neighbours.add_queried(&pending.sample);
            self.evidence.push_back((pending.sample, pending.named.is_some()));
        }
        if self.range.has(pending.sample.at) {
            self.partly_ns += partly_ns(pending.sample.busy_ns, pending.sample.busy_ratio());
        }
        match pending.named {
            Some(named) => self.credit_named(&pending.sample, named, booked),
            None if pending.sample.busy_ns > 0.0 => self.waiting.push_back(pending),
            None => {}
        }
        self.decide(pending.sample.at, presence, booked);
        self.neighbours.forget_before(pending.sample.at);
    }

    fn credit_named(&mut self, sample: &Sample, named: NamedUser, booked: &mut Vec<Booked>) {
        self.book(sample, named.user, sample.busy_ns, 1, booked);
        if self.range.has(sample.at) {
            let unsettled = self.unsettled.entry(named.user).or_default();
            *unsettled = (unsettled.0 + 1, unsettled.1 + sample.busy_ns * sample.busy_ns);
        }
        self.neighbours.add_named(NamedSample::new(sample.at, named, sample.busy_ratio(), sample.busy_ns));
        self.history.add(sample.at, named);
    }

    /// Divides the samples that have waited long enough at `now`, a time up to which all samples are known.
    pub fn decide(&mut self, now: BootNs, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        // Under either rule a sample around the end of a process may lack a pid.
        while let Some((sample, is_named)) = self.evidence.pop_front_if(|(sample, _)| now.saturating_since(sample.at) >= WAIT_NS)
        {
            let (from, to) = sample.until_read();
            if !presence.exits.any_between(from, to) {
                self.naming.add(sample.busy_ratio(), is_named);
            }
        }
        while let Some(pending) = self.waiting.pop_front_if(|pending| self.neighbours.is_decided(&pending.sample, now)) {
            self.divide(&pending, presence, booked);
        }
    }

    /// The start of the oldest span that waits to be divided.
    pub fn waits_since(&self) -> Option<BootNs> {
        self.waiting.front().map(|pending| pending.sample.at.minus(pending.sample.span_ns as u64))
    }

    fn divide(&mut self, pending: &PendingSample, presence: Presence<'_>, booked: &mut Vec<Booked>) {
        let Sample { at, span_ns, busy_ns, queried } = pending.sample;
        let busy_ratio = pending.sample.busy_ratio();
        let mut parts = if queried && self.naming.only_ended_are_unnamed(busy_ratio) {
            // A driver that names no process at all does not name those that live either.
            let has_clients = self.naming.names_the_last() || self.neighbours.has_named();
            self.neighbours.of_ended(&pending.sample, presence, has_clients)
        } else {
            Vec::new()
        };
        if parts.is_empty() {
            parts = self.neighbours.divide(&pending.sample, presence);
        }
        if parts.is_empty() && queried && !pending.otherwise.is_known() {
            parts = Neighbours::of_clients(&pending.sample, presence);
        }
        if parts.is_empty() {
            // The process list may be younger than the sample.
            let existed = presence.lifetimes.may_have_existed(pending.otherwise, at, span_ns);
            let user = if existed { pending.otherwise } else { User::Unattributed(Reason::NoPid) };
            self.book(&pending.sample, user, busy_ns, 0, booked);
        }
        let mut of_clients: HashMap<User, f64> = HashMap::default();
        for (basis, part) in parts {
            let ns = busy_ns * part;
            match basis {
                Basis::Named(n) => {
                    let Some(neighbour) = self.neighbours.get_mut(n) else { continue };
                    let user = neighbour.named.user;
                    let before = neighbour.weight_ns;
                    neighbour.weight_ns += ns;
                    let squares = neighbour.weight_ns.powi(2) - before.powi(2);
                    if self.range.has(at) {
                        self.unsettled.entry(user).or_default().1 += squares;
                    }
                    self.book(&pending.sample, user, ns, 0, booked);
                }
                Basis::Client(client) => {
                    self.book(&pending.sample, client.user, ns, 0, booked);
                    *of_clients.entry(client.user).or_default() += part;
                }
            }
        }
        for (user, part) in of_clients {
            if let Some(credit) = self.credits.get_mut(&user).filter(|_| self.range.has(at)) {
                // One of the users had all of the sample.
                credit.sum_of_variances += busy_ns.powi(2) * part * (1.0 - part).max(0.0);
            }
        }
    }

    /// Books busy time of a sample for a known user.
    pub fn book(&mut self, sample: &Sample, user: User, ns: f64, samples: u64, booked: &mut Vec<Booked>) {
        if self.range.has(sample.at) {
            self.credit(user, ns, samples);
            booked.push(Booked { at: sample.at, span_ns: sample.span_ns, user, ns });
        }
    }

    fn credit(&mut self, user: User, ns: f64, samples: u64) {
        self.busy_ns += ns;
        if let Some(reason_ns) = user.reason().and_then(|reason| self.unattributed.get_mut(reason as usize)) {
            *reason_ns += ns;
        }
        let credit = self.credits.entry(user).or_default();
        credit.ns += ns;
        credit.samples += samples;
    }

    /// Adds the samples since the last call to the variances; called every few seconds. For `n` independent samples of share `s` the
    /// variance is `n s (1 - s)`. The `n s` samples that named the user are counted, so the factor `1 - s` remains.
    ///
    /// Where few samples are queried, one of `holders` that no sample has named may still have used the device.
    pub fn settle_variance(&mut self, now: BootNs, exits: &Exits, holders: impl Iterator<Item = User>) {
        let before = self.history.cut(now, |named, at| exits.was_present(named, at));
        self.standard_errors = self.history.standard_errors();
        let unseen_share = self.history.unseen_share();
        if unseen_share > 0.0 {
            let all: f64 = self.unsettled.values().map(|(_, squares)| squares).sum();
            for user in holders.filter(|user| !before.contains_key(user)) {
                let error = *self.standard_errors.entry(user).or_insert(StandardError::unnamed(unseen_share));
                if error.share == 0.0 && all > 0.0 {
                    self.credits.entry(user).or_default().sum_of_variances += all * error.variance();
                }
            }
        }
        let partly_ns = std::mem::take(&mut self.partly_ns);
        for (user, error) in &self.standard_errors {
            if let Some(credit) = self.credits.get_mut(user) {
                credit.distribution_ns += self.naming.distribution_error_ns(error.share, partly_ns);
            }
        }
        for (user, (samples, squares)) in std::mem::take(&mut self.unsettled) {
            // The samples of a user that disappeared are cut off; its error is the one from before the cut.
            let error = self.standard_errors.get(&user).or(before.get(&user));
            let (Some(credit), Some(error)) = (self.credits.get_mut(&user), error) else { continue };
            let others = error.others() * error.factor;
            credit.sum_of_variances += squares * others;
            if samples > 0 {
                credit.one_more = squares / samples as f64 * others;
            }
        }
    }

    /// Variance of samples with that sum of squared weights and that partly busy time.
    pub fn variance_of(&self, user: User, squares: f64, partly_ns: f64) -> f64 {
        let distribution = |share| self.naming.distribution_error_ns(share, partly_ns).powi(2);
        self.standard_error(user).map_or(0.0, |error| squares * error.variance() + distribution(error.share))
    }

    /// A new sample buffer and clock: waiting samples are booked for the user without named neighbours, as no process can be named for them
    /// any more.
    pub fn restart(&mut self, booked: &mut Vec<Booked>) {
        for pending in std::mem::take(&mut self.waiting) {
            self.book(&pending.sample, pending.otherwise, pending.sample.busy_ns, 0, booked);
        }
        self.neighbours.clear();
        self.evidence.clear();
        self.history.clear();
        self.standard_errors.clear();
    }

    pub fn forget(&mut self, gone: impl Fn(&User) -> bool) {
        self.credits.retain(|user, _| !gone(user));
    }
}

#[cfg(test)]
mod tests {
    use super::super::clients::Clients;
    use super::super::exits::Lifetimes;
    use super::*;
    use crate::units::ContainerKey;

    #[test]
    fn a_holder_that_no_sample_has_named_has_the_same_error_as_the_named_user() {
        let (seen, unseen) = (User::Container(ContainerKey(1)), User::Container(ContainerKey(2)));
        let (exits, lifetimes, clients) = (Exits::default(), Lifetimes::default(), Clients::default());
        let presence = Presence { exits: &exits, lifetimes: &lifetimes, clients: Some(&clients) };
        let errors = |one_queried_in: u64| {
            let mut account = EngineAccount::default();
            for n in 0..100 {
                let (at, queried) = (BootNs(n * 167_000_000), n % one_queried_in == 0);
                let sample = Sample { at, span_ns: 167e6, busy_ns: 167e6, queried };
                let named = queried.then_some(NamedUser { user: seen, pid: 1, since: BootNs(0) });
                account.add_sample(PendingSample { sample, named, otherwise: seen }, presence, &mut Vec::new());
            }
            account.decide(BootNs(u64::MAX), presence, &mut Vec::new());
            account.settle_variance(BootNs(100 * 167_000_000), &exits, [seen, unseen].into_iter());
            [seen, unseen].map(|user| account.credits().get(&user).map_or(0.0, |credit| credit.variance().sqrt() * 1e-9))
        };
        assert_eq!(errors(1), [0.0, 0.0]);
        // 12 samples, each for 1.3 s, that could have missed a share of 0.5 / 13.
        let [seen_error, unseen_error] = errors(8);
        assert!((0.8..1.0).contains(&unseen_error), "{unseen_error}");
        assert!((seen_error / unseen_error - 1.0).abs() < 0.1, "{seen_error} and {unseen_error}");
    }
}
