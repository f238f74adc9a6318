//! The entries of a process list, of any size.
//!
//! NVML's `_v2` and `_v3` lists have entries of 24 bytes, but some drivers write others: 32 bytes in 535.43 to 535.86, with a field for
//! confidential computing (nvitop issue 79), and 16 bytes in 550.127 (nvitop issue 226). Neither a version nor a count shows it. So the
//! buffer has room for the widest entries and is filled before the call, and the size follows from how far the driver has written. PID
//! and memory are at the same place in all of them.

/// Words of 8 bytes.
const WIDEST: usize = 4;
/// 24 bytes first: where several sizes explain what was written, it is the documented one.
const SIZES: [usize; 3] = [3, 2, WIDEST];
/// No PID, and no size of memory.
const UNWRITTEN: u64 = 0xa5a5_a5a5_a5a5_a5a5;

/// A buffer for a list.
#[derive(Default)]
pub struct EntryBuffer(Vec<u64>);

impl EntryBuffer {
    /// Room for this many entries of any size.
    pub fn prepare(&mut self, entries: usize) {
        self.0.clear();
        self.0.resize(entries * WIDEST, UNWRITTEN);
    }

    pub fn as_mut_ptr(&mut self) -> *mut u64 {
        self.0.as_mut_ptr()
    }

    /// (PID, bytes of memory) of each of the entries that the driver counts.
    pub fn entries(&self, count: usize) -> Vec<(u32, u64)> {
        let count = count.min(self.0.len() / WIDEST);
        let written = self.0.iter().rposition(|word| *word != UNWRITTEN).map_or(0, |last| last + 1);
        // The last field of the last entry may be unwritten.
        let explains = |size: &usize| written <= count * size && written + 1 >= count * size;
        let size = SIZES.into_iter().find(explains).unwrap_or(SIZES[0]);
        self.0.chunks_exact(size).take(count).map(|entry| (entry[0] as u32, entry[1])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A driver that writes entries of this many words; the last `unwritten` words of each are left out.
    fn check(size: usize, unwritten: usize, pids: &[u32]) {
        let mut buffer = EntryBuffer::default();
        // The content of an earlier, longer list is not that of this one.
        buffer.prepare(8);
        buffer.0.fill(7);
        buffer.prepare(8);
        for (n, pid) in pids.iter().enumerate() {
            let fields = [u64::from(*pid) | 0xa5a5_a5a5 << 32, 1 << 30, u64::MAX, 0];
            for (word, field) in fields.iter().enumerate().take(size - unwritten) {
                buffer.0[n * size + word] = *field;
            }
        }
        let expect: Vec<(u32, u64)> = pids.iter().map(|pid| (*pid, 1 << 30)).collect();
        assert_eq!(buffer.entries(pids.len()), expect, "{size} words, {unwritten} of them unwritten");
    }

    #[test]
    fn entries_of_every_size_are_read() {
        for pids in [&[][..], &[7], &[7, 8], &[1, 2, 3, 4, 5, 6, 7, 8]] {
            for size in [2, 3, 4] {
                check(size, 0, pids);
            }
            check(3, 1, pids);
            check(4, 1, pids);
        }
    }

    #[test]
    fn a_wrong_count_is_bounded() {
        let mut buffer = EntryBuffer::default();
        buffer.prepare(2);
        assert_eq!(buffer.entries(1 << 20).len(), 2);
        assert_eq!(EntryBuffer::default().entries(3), []);
    }

    /// Any list of processes that a driver writes, with any count.
    #[test]
    fn fuzz_process_list() {
        devkit::fuzz(file!(), "process_list", move |bytes| {
            let [room, count, content @ ..] = bytes else { return };
            let mut buffer = EntryBuffer::default();
            buffer.prepare((*room).into());
            for (word, written) in buffer.0.iter_mut().zip(content.chunks_exact(8)) {
                *word = u64::from_le_bytes(written.try_into().unwrap());
            }
            let entries = buffer.entries((*count).into());
            assert_eq!(entries.len(), usize::from((*count).min(*room)));
            assert!(
                entries.iter().all(|(pid, memory)| buffer.0.windows(2).any(|two| (two[0] as u32, two[1]) == (*pid, *memory)))
            );
        });
    }
}
