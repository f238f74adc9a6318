//! The length of the entries in a response, from what was written over a pattern.

use serde::{Deserialize, Serialize};

/// The value of every byte of the buffer before the call.
pub const PATTERN: u8 = 0xa5;
/// Lengths that are tried; every entry contains an 8-byte number, so its length is a multiple of that.
const LENGTHS: std::ops::RangeInclusive<usize> = 16..=64;
const ALIGNMENT: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stride {
    pub entries: usize,
    /// Bytes up to the last one that differs from the pattern.
    pub bytes_written: usize,
    /// The length that the agent assumes.
    pub assumed: usize,
    /// Length of one entry; `None` where no length fits the bytes written.
    pub length: Option<usize>,
    /// Entries with the pid of a living process of this machine, when read with that length.
    pub pids_live: usize,
}

impl Stride {
    /// Measures a buffer with that many entries, each with a pid at `pid_at`.
    pub fn of(bytes: &[u8], entries: usize, pid_at: usize, assumed: usize, is_alive: impl Fn(u32) -> bool) -> Self {
        let bytes_written = bytes.iter().rposition(|byte| *byte != PATTERN).map_or(0, |last| last + 1);
        let pid = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_ne_bytes);
        let live = |length: usize| (0..entries).filter(|n| pid(n * length + pid_at).is_some_and(&is_alive)).count();
        // Nothing is written beyond the last entry, and all of it except padding.
        let is_filled = |length: &usize| (bytes_written..bytes_written + ALIGNMENT).contains(&(length * entries));
        let mut lengths = LENGTHS.step_by(ALIGNMENT);
        // A driver may leave more of an entry unwritten: then living pids show its length.
        let filled = lengths.clone().find(is_filled);
        let length = filled.or_else(|| lengths.find(|length| entries > 1 && live(*length) == entries));
        let length = length.filter(|_| entries > 0);
        Self { entries, bytes_written, assumed, length, pids_live: length.map_or(0, live) }
    }

    /// `None` if there was no entry.
    pub fn agrees(&self) -> Option<bool> {
        (self.entries > 0).then_some(self.length == Some(self.assumed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Entries of this length, each with its pid first and `written` bytes that differ from the pattern.
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
    fn the_length_is_found_from_the_bytes_written() {
        for pids in [&[101][..], &[101, 102], &[101, 102, 103], &[7, 102, 5_000_000]] {
            for (length, agrees) in [(16, false), (24, true), (32, false), (40, false)] {
                let found = stride(pids, length, length);
                assert_eq!((found.length, found.agrees()), (Some(length), Some(agrees)), "{pids:?} {length}");
                assert_eq!(found.pids_live, pids.iter().filter(|pid| (100..200).contains(*pid)).count());
            }
            // The last bytes of an entry may be padding.
            assert_eq!(stride(pids, 40, 36).length, Some(40));
        }
        assert_eq!((stride(&[], 24, 24).length, stride(&[], 24, 24).agrees()), (None, None));
    }

    #[test]
    fn living_pids_show_the_length_of_partly_written_entries() {
        assert_eq!(stride(&[101, 102, 103], 32, 20).length, Some(32));
        assert_eq!(stride(&[101, 7, 103], 32, 20).length, None);
        assert_eq!(stride(&[101, 7, 103], 32, 20).agrees(), Some(false));
    }
}
