//! The scrapers of `/metrics`: each has to see every counter begin at 0 and every last value, however many there are.
//!
//! A scrape has a number. A series is born with the number of the scrape that first exposes it, to any scraper. A scraper is described by
//! the numbers of its last scrapes alone, so it costs a few words, and a series costs none for it:
//! - a series starts at 0 in a scrape if it was born after this scraper's previous one;
//! - a last value is delivered when every scraper has scraped it twice, not counting a start at 0.
//!
//! In the first scrape of a scraper series have their true values: the time before belongs to none of its intervals.
//!
//! Scrapers are distinguished by peer, user agent and query, and those that agree in all of them (two Prometheus servers behind one address)
//! by their connections, which Prometheus keeps between scrapes. A scraper that connects again is taken for the one that was due.

use std::cmp::Reverse;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// More scrapers than a node has; beyond that one is forgotten.
const MOST: usize = 64;
/// A scraper that was not seen for this long no longer delays the end of a series: one that missed two scrapes, or one that scraped once,
/// such as a person with curl, in a time that is longer than intervals are. Prometheus calls a series stale after five minutes.
const ACTIVE_INTERVALS: u32 = 3;
const ACTIVE_LEAST: Duration = Duration::from_secs(30);
const ACTIVE_ONCE: Duration = Duration::from_secs(150);
const ACTIVE_MOST: Duration = Duration::from_secs(300);
/// A scraper is forgotten after this time: a later scrape is the first of a new one.
const KEEP: Duration = Duration::from_secs(600);
/// No scraper scrapes at a shorter interval. A request that follows another one of the same client faster, on a new connection, is made by
/// another scraper.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(2);

/// The number of a scrape; the first is 1.
pub type ScrapeNumber = u64;

/// A connection of the HTTP server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrapeClient {
    peer: IpAddr,
    /// Hash of user agent and query, which may be long.
    request: u64,
}

impl ScrapeClient {
    pub fn new(peer: IpAddr, user_agent: &str, query: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        (user_agent, query).hash(&mut hasher);
        Self { peer, request: hasher.finish() }
    }
}

#[derive(Debug)]
struct Scraper {
    client: ScrapeClient,
    /// `None` once it is closed.
    connection: Option<ConnectionId>,
    at: Instant,
    /// The last time between two scrapes, and the smaller one of the last two: one scrape may have been missed.
    gap: Option<Duration>,
    interval: Option<Duration>,
    history: ScrapeHistory,
}

/// The last scrapes of a scraper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrapeHistory {
    last: ScrapeNumber,
    previous: Option<ScrapeNumber>,
    before_previous: Option<ScrapeNumber>,
}

impl ScrapeHistory {
    fn add(&mut self, number: ScrapeNumber) {
        let was = (self.last > 0).then_some(self.last);
        *self = Self { last: number, previous: was, before_previous: self.previous };
    }

    /// Whether a series that was born in this scrape starts at 0 in the last one.
    pub fn is_start(self, born: ScrapeNumber) -> bool {
        self.previous.is_some_and(|previous| born > previous)
    }

    /// Whether the last two scrapes had the value that a series has had since the scrape `changed`.
    fn has_twice(self, born: ScrapeNumber, changed: ScrapeNumber) -> bool {
        let was_start = self.before_previous.is_some_and(|before| born > before);
        self.previous.is_some_and(|previous| previous >= changed.max(born) && !was_start)
    }
}

impl Scraper {
    fn is_active(&self, now: Instant) -> bool {
        let for_interval = |interval: Duration| (interval * ACTIVE_INTERVALS).max(ACTIVE_LEAST);
        now.saturating_duration_since(self.at) < self.interval.map_or(ACTIVE_ONCE, for_interval).min(ACTIVE_MOST)
    }

    /// How many of these agree with it: as clients, and in their address.
    fn alike(&self, all: &[Self]) -> (usize, usize) {
        let count = |is_alike: &dyn Fn(&Self) -> bool| all.iter().filter(|other| is_alike(other)).count();
        (count(&|other| other.client == self.client), count(&|other| other.client.peer == self.client.peer))
    }
}

#[derive(Debug, Default)]
pub struct Scrapers {
    scrapers: Vec<Scraper>,
    number: ScrapeNumber,
}

impl Scrapers {
    /// Begins a scrape. Returns its number, and its scraper's history with it.
    pub fn begin(&mut self, client: &ScrapeClient, connection: ConnectionId, now: Instant) -> (ScrapeNumber, ScrapeHistory) {
        self.number += 1;
        self.scrapers.retain(|scraper| now.saturating_duration_since(scraper.at) < KEEP);
        let at = self.find(client, connection, now).unwrap_or_else(|| self.add(client, now));
        let scraper = &mut self.scrapers[at];
        let since = now.saturating_duration_since(scraper.at);
        if scraper.history.last > 0 && since >= SHORTEST_INTERVAL {
            scraper.interval = Some(scraper.gap.replace(since).map_or(since, |gap| gap.min(since)));
        }
        scraper.history.add(self.number);
        (scraper.connection, scraper.at) = (Some(connection), now);
        (self.number, scraper.history)
    }

    fn find(&self, client: &ScrapeClient, connection: ConnectionId, now: Instant) -> Option<usize> {
        let of_client = || self.scrapers.iter().enumerate().filter(|(_, scraper)| scraper.client == *client);
        let same = of_client().find(|(_, scraper)| scraper.connection == Some(connection));
        let since = |scraper: &Scraper| now.saturating_duration_since(scraper.at);
        // One that is due by its interval, then one with an unknown interval, then one that is late; in doubt the one that waits the longest.
        let preference = |scraper: &Scraper| {
            let Some(interval) = scraper.interval else { return (1, Duration::ZERO, scraper.at) };
            let off = since(scraper).abs_diff(interval);
            (if off <= interval / 4 { 0 } else { 2 }, off, scraper.at)
        };
        // One that comes much too early or too late is another: the series that it saw first would have no start for this one.
        let times = |scraper: &Scraper| match scraper.interval {
            Some(interval) => interval * 3 / 4..=interval * ACTIVE_INTERVALS,
            None => SHORTEST_INTERVAL..=ACTIVE_ONCE,
        };
        let waits = |scraper: &Scraper| scraper.connection.is_none() && times(scraper).contains(&since(scraper));
        let due = || of_client().filter(|(_, scraper)| waits(scraper)).min_by_key(|(_, scraper)| preference(scraper));
        same.or_else(due).map(|(at, _)| at)
    }

    fn add(&mut self, client: &ScrapeClient, now: Instant) -> usize {
        // Requests in quick succession, each on a connection of its own, are those of one that waits for something: one of them may scrape
        // again.
        let scraped_once = |scraper: &Scraper| scraper.connection.is_none() && scraper.interval.is_none();
        self.scrapers.retain(|scraper| scraper.client != *client || !scraped_once(scraper));
        if self.scrapers.len() >= MOST {
            // The oldest of the client or the address that has the most, so that one that asks too often displaces itself.
            let of_most = |(_, scraper): &(usize, &Scraper)| (scraper.alike(&self.scrapers), Reverse(scraper.at));
            let displaced = self.scrapers.iter().enumerate().max_by_key(of_most).map(|(at, _)| at);
            displaced.map(|at| self.scrapers.swap_remove(at));
        }
        let (client, history) = (*client, ScrapeHistory::default());
        self.scrapers.push(Scraper { client, connection: None, at: now, gap: None, interval: None, history });
        self.scrapers.len() - 1
    }

    pub fn closed(&mut self, connection: ConnectionId) {
        for scraper in self.scrapers.iter_mut().filter(|scraper| scraper.connection == Some(connection)) {
            scraper.connection = None;
        }
    }

    /// Whether every active scraper has twice scraped the value that a series has had since the scrape `changed`. False without scrapers.
    pub fn have_twice(&self, born: ScrapeNumber, changed: ScrapeNumber, now: Instant) -> bool {
        let active = || self.scrapers.iter().filter(|scraper| scraper.is_active(now));
        active().next().is_some() && active().all(|scraper| scraper.history.has_twice(born, changed))
    }
}

#[cfg(test)]
pub mod tests {
    use super::super::series_starts::SeriesStarts;
    use super::*;

    /// Begins the next scrape of the only scraper.
    pub fn scrape(starts: &mut SeriesStarts) {
        let number = starts.number + 1;
        let previous = (number > 1).then(|| number - 1);
        starts.begin_scrape(number, ScrapeHistory { last: number, previous, before_previous: None });
    }

    const FIRST: ConnectionId = ConnectionId(1);
    const SECOND: ConnectionId = ConnectionId(2);
    const THIRD: ConnectionId = ConnectionId(3);

    fn client(query: &str) -> ScrapeClient {
        ScrapeClient::new(IpAddr::from([127, 0, 0, 1]), "Prometheus/2", query)
    }

    struct Scene {
        scrapers: Scrapers,
        zero: Instant,
    }

    impl Scene {
        fn new() -> Self {
            Self { scrapers: Scrapers::default(), zero: Instant::now() }
        }

        fn at(&self, second: u64) -> Instant {
            self.zero + Duration::from_secs(second)
        }

        /// Whether a series that was born in scrape `born`, by default this one, starts in it.
        fn starts(&mut self, second: u64, query: &str, connection: ConnectionId, born: Option<u64>) -> bool {
            let (number, history) = self.scrapers.begin(&client(query), connection, self.at(second));
            history.is_start(born.unwrap_or(number))
        }
    }

    #[test]
    fn each_scraper_sees_a_series_start_once_and_not_in_its_own_first_scrape() {
        let mut scene = Scene::new();
        assert!(!scene.starts(0, "", FIRST, None));
        assert!(!scene.starts(3, "", SECOND, None));
        // Born in the third scrape: a start for both, once.
        assert!(scene.starts(15, "", FIRST, None));
        assert!(scene.starts(18, "", SECOND, Some(3)));
        assert!(!scene.starts(30, "", FIRST, Some(3)));
        assert!(!scene.starts(33, "", SECOND, Some(3)));
        // A late one.
        assert!(!scene.starts(34, "", THIRD, Some(3)));
        assert!(!scene.starts(49, "", THIRD, Some(3)));
        assert!(scene.starts(64, "", THIRD, None));
        // Another query is another scraper.
        assert!(!scene.starts(65, "collect[]=gpus", THIRD, None));
    }

    #[test]
    fn one_that_connects_again_is_the_one_that_was_due() {
        let mut scene = Scene::new();
        for (second, connection) in [(0, 1), (1, 2), (15, 3), (16, 4), (30, 5)] {
            scene.starts(second, "", ConnectionId(connection), None);
            scene.scrapers.closed(ConnectionId(connection));
        }
        assert_eq!(scene.scrapers.scrapers.len(), 2);
        // The fifth scrape was the third of the first scraper; the second one has not seen its series.
        assert!(scene.starts(34, "", ConnectionId(6), Some(5)));
        scene.scrapers.closed(ConnectionId(6));
        assert!(!scene.starts(45, "", ConnectionId(7), Some(5)));
        // Two requests in quick succession are of two scrapers.
        scene.scrapers.closed(ConnectionId(7));
        assert!(!scene.starts(45, "", ConnectionId(8), None));
        assert_eq!(scene.scrapers.scrapers.len(), 3);
    }

    #[test]
    fn after_many_requests_in_quick_succession_a_value_is_seen_by_the_second_one() {
        let mut scene = Scene::new();
        for n in 0..20 {
            scene.starts(n / 10, "", ConnectionId(n), None);
            scene.scrapers.closed(ConnectionId(n));
        }
        let starts = [40, 41].map(|n| {
            let starts = scene.starts(12, "", ConnectionId(n), Some(21));
            scene.scrapers.closed(ConnectionId(n));
            starts
        });
        assert_eq!(starts, [true, false]);
    }

    #[test]
    fn a_scrape_that_was_missed_does_not_change_the_interval() {
        let mut scene = Scene::new();
        // The one at 30 s was missed.
        for (n, second) in [0, 15, 45, 60, 75].into_iter().enumerate() {
            scene.starts(second, "", ConnectionId(n as u64), None);
            scene.scrapers.closed(ConnectionId(n as u64));
        }
        assert_eq!(scene.scrapers.scrapers.len(), 1);
    }

    #[test]
    fn a_last_value_is_delivered_when_each_scraper_had_it_twice() {
        let mut scene = Scene::new();
        assert!(!scene.scrapers.have_twice(0, 0, scene.at(0)));
        scene.starts(0, "", FIRST, None);
        scene.starts(1, "", SECOND, None);
        // Born and last changed in scrape 3: a start at 0 does not count.
        let mut delivered = |second, connection| {
            scene.starts(second, "", connection, None);
            scene.scrapers.have_twice(3, 3, scene.at(second))
        };
        let scrapes = [(15, FIRST), (16, SECOND), (30, FIRST), (31, SECOND), (45, FIRST), (46, SECOND)];
        assert_eq!(scrapes.map(|(second, connection)| delivered(second, connection)), [false, false, false, false, false, true]);
        // One that no longer scrapes does not count.
        scene.starts(400, "", FIRST, None);
        assert!(!scene.scrapers.have_twice(3, 9, scene.at(400)));
        scene.starts(415, "", FIRST, None);
        assert!(scene.scrapers.have_twice(3, 9, scene.at(415)));
    }

    #[test]
    fn their_number_is_bounded_and_those_that_ask_too_often_displace_themselves() {
        let mut scene = Scene::new();
        let other = ScrapeClient { peer: IpAddr::from([10, 0, 0, 1]), ..client("") };
        scene.scrapers.begin(&other, THIRD, scene.zero);
        for n in 0..3 * MOST as u64 {
            scene.starts(n / 100, &n.to_string(), ConnectionId(n), None);
        }
        assert_eq!(scene.scrapers.scrapers.len(), MOST);
        assert!(scene.scrapers.scrapers.iter().any(|scraper| scraper.client == other));
        scene.starts(1_000, "", FIRST, None);
        assert_eq!(scene.scrapers.scrapers.len(), 1);
    }
}
