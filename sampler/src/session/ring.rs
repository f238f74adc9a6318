//! Keeps the last minutes in memory, as frames. A session with a lookback begins with them.

use std::collections::VecDeque;
use std::sync::Arc;

use sampler_core::units::BootNs;
use sampler_session::Frame;

use super::request::MAX_LOOKBACK_S;

/// Files begin this long before the counted span: samples without a process are divided according to their neighbours, and standard
/// errors depend on the last minutes.
pub const CONTEXT_NS: u64 = 40_000_000_000;
/// Older sections are dropped even if there is room: no session looks back further.
const MAX_AGE_NS: u64 = MAX_LOOKBACK_S as u64 * 1_000_000_000 + CONTEXT_NS + 60_000_000_000;
/// Memory overhead of a frame.
const FRAME_COST: usize = 64;

/// The frames from one State to the next.
#[derive(Debug)]
struct Section {
    from: BootNs,
    state: Vec<Arc<Frame>>,
    /// `None` for lost facts.
    facts: Vec<Option<Arc<Frame>>>,
    bytes: usize,
}

#[derive(Debug)]
pub struct SessionRing {
    sections: VecDeque<Section>,
    bytes: usize,
    max_bytes: usize,
}

/// A part of the ring that a file takes over.
#[derive(Debug, PartialEq)]
pub enum Piece<T> {
    /// A new section, preceded by the header.
    State(Vec<T>),
    Facts(T),
    Lost,
}

impl SessionRing {
    pub fn new(max_bytes: usize) -> Self {
        Self { sections: VecDeque::new(), bytes: 0, max_bytes }
    }

    /// Whether the last section is so large that it should end, because whole sections are dropped.
    pub fn is_section_full(&self) -> bool {
        self.sections.back().is_some_and(|last| last.bytes >= self.max_bytes / 8)
    }

    pub fn begin(&mut self, now: BootNs, state: Vec<Arc<Frame>>) {
        let bytes = state.iter().map(|frame| frame.bytes() + FRAME_COST).sum();
        self.sections.push_back(Section { from: now, state, facts: Vec::new(), bytes });
        self.bytes += bytes;
        self.shrink(now);
    }

    /// Adds facts, or `None` if some were lost.
    pub fn push(&mut self, now: BootNs, facts: Option<Arc<Frame>>) {
        let Some(last) = self.sections.back_mut() else { return };
        let bytes = FRAME_COST + facts.as_ref().map_or(0, |frame| frame.bytes());
        last.facts.push(facts);
        last.bytes += bytes;
        self.bytes += bytes;
        self.shrink(now);
    }

    fn shrink(&mut self, now: BootNs) {
        // The facts of a section extend to the beginning of the next one.
        let too_old = |sections: &VecDeque<Section>| sections.get(1).is_some_and(|next| next.from.plus(MAX_AGE_NS) < now);
        while self.sections.len() > 1 && (self.bytes > self.max_bytes || too_old(&self.sections)) {
            self.bytes -= self.sections.pop_front().map_or(0, |oldest| oldest.bytes);
        }
    }

    /// The time of the oldest facts.
    pub fn since(&self) -> Option<BootNs> {
        self.sections.front().map(|first| first.from)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The parts from the last section that begins at or before `from`, or else from the first section.
    pub fn from(&self, from: BootNs) -> impl Iterator<Item = Piece<Arc<Frame>>> {
        let begin = self.sections.partition_point(|section| section.from <= from).saturating_sub(1);
        self.sections.iter().skip(begin).flat_map(|section| {
            let facts = section.facts.iter().map(|facts| facts.clone().map_or(Piece::Lost, Piece::Facts));
            std::iter::once(Piece::State(section.state.clone())).chain(facts)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sampler_session::Packer;

    #[test]
    fn whole_sections_are_dropped() {
        let mut packer = Packer::new().unwrap();
        let state = Arc::new(packer.state(&[]).unwrap().remove(0));
        let mut ring = SessionRing::new(9 * (state.bytes() + FRAME_COST));
        for second in 0..20 {
            let now = BootNs(second * 1_000_000_000);
            if second % 3 == 0 {
                ring.begin(now, vec![Arc::clone(&state)]);
            }
            ring.push(now, None);
        }
        assert_eq!(ring.since(), Some(BootNs(12_000_000_000)));
        let all: Vec<_> = ring.from(BootNs(0)).collect();
        let states = all.iter().filter(|piece| matches!(piece, Piece::State(_))).count();
        assert_eq!((states, all.len()), (3, 3 + 8));
        assert_eq!(ring.from(BootNs(15_500_000_000)).count(), 2 + 3 + 2);
        assert_eq!(ring.from(BootNs(u64::MAX)).count(), 1 + 2);
        ring.push(BootNs(MAX_AGE_NS + 100_000_000_000), None);
        assert_eq!(ring.since(), Some(BootNs(18_000_000_000)), "the last section stays");
    }
}
