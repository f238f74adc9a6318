//! How long the entries of an answer are, from what was written over a pattern.

use serde::{Deserialize, Serialize};

/// In every byte of the buffer before the call.
pub const PATTERN: u8 = 0xa5;
/// Lengths that are tried; all entries have a number of 8 bytes, so their length is a multiple of that.
const LENGTHS: std::ops::RangeInclusive<usize> = 16..=64;
const ALIGNMENT: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stride {
    pub entries: usize,
    /// Up to the last byte that is not the pattern.
    pub bytes_written: usize,
    /// As the agent has it.
    pub assumed: usize,
    /// Of one entry; `None` where no length fits what was written.
    pub length: Option<usize>,
    /// Entries with the pid of a process that lives on this machine, read with that length.
    pub pids_live: usize,
}

impl Stride {
    /// Of a buffer with that many entries, each with a pid at `pid_at`.
    pub fn of(bytes: &[u8], entries: usize, pid_at: usize, assumed: usize, lives: impl Fn(u32) -> bool) -> Self {
        let bytes_written = bytes.iter().rposition(|byte| *byte != PATTERN).map_or(0, |last| last + 1);
        let pid = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let live = |length: usize| (0..entries).filter(|n| pid(n * length + pid_at).is_some_and(&lives)).count();
        // Nothing was written beyond the last entry, and of it all but padding.
        let is_filled = |length: &usize| (bytes_written..bytes_written + ALIGNMENT).contains(&(length * entries));
        let mut lengths = LENGTHS.step_by(ALIGNMENT);
        // A driver may leave more of an entry alone: then pids that live show its length.
        let filled = lengths.clone().find(is_filled);
        let length = filled.or_else(|| lengths.find(|length| entries > 1 && live(*length) == entries));
        let length = length.filter(|_| entries > 0);
        Self { entries, bytes_written, assumed, length, pids_live: length.map_or(0, live) }
    }

    /// `None` where there was no entry.
    pub fn agrees(&self) -> Option<bool> {
        (self.entries > 0).then_some(self.length == Some(self.assumed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries of that length, each with its pid first and `written` bytes of it not the pattern.
    fn answer(pids: &[u32], length: usize, written: usize) -> Vec<u8> {
        let mut bytes = vec![PATTERN; 4_096];
        for (n, pid) in pids.iter().enumerate() {
            bytes[n * length..n * length + written].fill(0);
            bytes[n * length..n * length + 4].copy_from_slice(&pid.to_ne_bytes());
        }
        bytes
    }

    fn stride(pids: &[u32], length: usize, written: usize) -> Stride {
        Stride::of(&answer(pids, length, written), pids.len(), 0, 24, |pid| (100..200).contains(&pid))
    }

    #[test]
    fn the_length_is_found() {
        for pids in [&[101][..], &[101, 102], &[101, 102, 103], &[7, 102, 5_000_000]] {
            for (length, agrees) in [(16, false), (24, true), (32, false), (40, false)] {
                let found = stride(pids, length, length);
                assert_eq!((found.length, found.agrees()), (Some(length), Some(agrees)), "{pids:?} {length}");
                assert_eq!(found.pids_live, pids.iter().filter(|pid| (100..200).contains(*pid)).count());
            }
            // The last bytes of an entry are padding.
            assert_eq!(stride(pids, 40, 36).length, Some(40));
        }
        assert_eq!((stride(&[], 24, 24).length, stride(&[], 24, 24).agrees()), (None, None));
    }

    #[test]
    fn pids_show_it_where_much_of_an_entry_is_left_alone() {
        assert_eq!(stride(&[101, 102, 103], 32, 20).length, Some(32));
        assert_eq!(stride(&[101, 7, 103], 32, 20).length, None);
        assert_eq!(stride(&[101, 7, 103], 32, 20).agrees(), Some(false));
    }
}
