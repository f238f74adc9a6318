//! Bounds for connections: of the server and of each peer. A new connection never waits: it takes the place of the one that has been idle
//! the longest, or of the one with the oldest request if none is idle, so that clients that only hold connections delay no scrape.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::scrapers::ConnectionId;

/// Of the server; each takes a file descriptor.
const MOST: usize = 512;
/// Of a peer. A Prometheus server keeps one or two connections.
const MOST_OF_PEER: usize = 64;

#[derive(Debug)]
struct OpenEntry {
    id: ConnectionId,
    peer: IpAddr,
    /// Requests that were received and have no response yet.
    requests: usize,
    /// The rules with which it was accepted, once they were chosen.
    generation: Option<u64>,
    /// Since when it has been idle or busy.
    since: Instant,
    end: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Table {
    connections: HashMap<ConnectionId, OpenEntry>,
    last_id: u64,
}

/// The open connections.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Mutex<Table>>);

/// An accepted connection; it leaves the table when it is dropped.
#[derive(Debug)]
pub struct OpenConnection {
    pub id: ConnectionId,
    pub peer: IpAddr,
    /// Notified when the connection has to give its place to another one.
    pub end: Arc<Notify>,
    table: Connections,
}

/// A request in progress: its connection is not idle.
#[derive(Debug)]
pub struct RequestInProgress {
    id: ConnectionId,
    table: Connections,
}

impl Connections {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn open(&self, peer: IpAddr, now: Instant) -> OpenConnection {
        let mut table = self.table();
        let of_peer = table.connections.values().filter(|entry| entry.peer == peer).count();
        if of_peer >= MOST_OF_PEER {
            table.end_one(|entry| entry.peer == peer);
        } else if table.connections.len() >= MOST {
            table.end_one(|_| true);
        }
        table.last_id += 1;
        let (id, end) = (ConnectionId(table.last_id), Arc::new(Notify::new()));
        let entry = OpenEntry { id, peer, requests: 0, generation: None, since: now, end: Arc::clone(&end) };
        table.connections.insert(id, entry);
        OpenConnection { id, peer, end, table: self.clone() }
    }

    pub fn set_generation(&self, id: ConnectionId, generation: u64) {
        if let Some(entry) = self.table().connections.get_mut(&id) {
            entry.generation = Some(generation);
        }
    }

    /// Ends those without a request that were accepted with other rules.
    pub fn end_idle(&self, present: u64) {
        self.table().connections.retain(|_, entry| {
            let ends = entry.requests == 0 && entry.generation.is_some_and(|generation| generation != present);
            if ends {
                entry.end.notify_one();
            }
            !ends
        });
    }

    pub fn begin_request(&self, id: ConnectionId) -> RequestInProgress {
        if let Some(entry) = self.table().connections.get_mut(&id) {
            entry.requests += 1;
            entry.since = Instant::now();
        }
        RequestInProgress { id, table: self.clone() }
    }
}

impl Table {
    /// Ends the connection that has been idle the longest, or the one with the oldest request.
    fn end_one(&mut self, may_end: impl Fn(&OpenEntry) -> bool) {
        let candidates = self.connections.values().filter(|entry| may_end(entry));
        let Some(id) = candidates.min_by_key(|entry| (entry.requests > 0, entry.since)).map(|entry| entry.id) else { return };
        if let Some(entry) = self.connections.remove(&id) {
            entry.end.notify_one();
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.table.table().connections.remove(&self.id);
    }
}

impl Drop for RequestInProgress {
    fn drop(&mut self) {
        if let Some(entry) = self.table.table().connections.get_mut(&self.id) {
            entry.requests = entry.requests.saturating_sub(1);
            entry.since = Instant::now();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn peer(n: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, n])
    }

    /// Whether the connection has to end.
    fn ends(connection: &OpenConnection) -> bool {
        let mut notified = std::pin::pin!(connection.end.notified());
        notified.as_mut().enable()
    }

    #[test]
    fn the_connection_of_a_peer_that_is_idle_the_longest_gives_its_place() {
        let (connections, zero) = (Connections::default(), Instant::now());
        let open = |n: usize| connections.open(peer(1), zero + Duration::from_secs(n as u64));
        let mut all: Vec<OpenConnection> = (0..MOST_OF_PEER).map(open).collect();
        let other = connections.open(peer(2), zero);
        let request = connections.begin_request(all[0].id);
        all.push(open(MOST_OF_PEER));
        // The first has a request; the other peer is not affected.
        assert_eq!(all.iter().chain([&other]).map(ends).collect::<Vec<_>>().iter().position(|ends| *ends), Some(1));
        drop(request);
        assert!(!ends(&all[0]));
    }

    #[test]
    fn with_requests_in_all_of_them_the_oldest_request_ends() {
        let (connections, zero) = (Connections::default(), Instant::now());
        let all: Vec<OpenConnection> = (0..MOST_OF_PEER).map(|_| connections.open(peer(1), zero)).collect();
        let _requests: Vec<RequestInProgress> = all.iter().rev().map(|open| connections.begin_request(open.id)).collect();
        let _new = connections.open(peer(1), zero);
        assert_eq!(all.iter().map(ends).collect::<Vec<_>>().iter().position(|ends| *ends), Some(MOST_OF_PEER - 1));
    }

    #[test]
    fn connections_with_other_rules_end_when_they_are_idle() {
        let connections = Connections::default();
        let all: Vec<OpenConnection> = (0..4).map(|_| connections.open(peer(1), Instant::now())).collect();
        for (open, generation) in all.iter().zip([0, 1, 0]) {
            connections.set_generation(open.id, generation);
        }
        let _request = connections.begin_request(all[2].id);
        connections.end_idle(1);
        assert_eq!(all.iter().map(ends).collect::<Vec<_>>(), [true, false, false, false]);
    }

    #[test]
    fn the_number_of_all_connections_is_bounded() {
        let (connections, zero) = (Connections::default(), Instant::now());
        let open = |n: usize| connections.open(peer((n / MOST_OF_PEER) as u8), zero + Duration::from_secs(n as u64));
        let all: Vec<OpenConnection> = (0..MOST).map(open).collect();
        let late = connections.open(peer(200), zero + Duration::from_secs(1 << 20));
        assert!(ends(&all[0]) && !ends(&all[1]) && !ends(&late));
        drop((all, late));
        assert_eq!(connections.table().connections.len(), 0);
    }
}
