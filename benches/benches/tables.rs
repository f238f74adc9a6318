//! The identity tables under a counting allocator: their own size figures against the allocated memory, and the cost of a storm.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use gpu_sampler_benches::{line, wanted};
use sampler_core::identity::{EXITED_BYTES, Identity};
use sampler_core::observation::{CgroupChange, CgroupFact, CgroupMembership, ProcessChange, ProcessFact};
use sampler_core::units::{BootNs, CgroupKey, Tgid};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: delegates everything to the system's allocator; the counting touches no memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's guarantee is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let now = NOW.fetch_add(size, Ordering::Relaxed) + size - layout.size();
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller's guarantee is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's guarantee is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: f64 = (1 << 20) as f64;
const SECOND: u64 = 1_000_000_000;

fn fact(change: ProcessChange, tgid: u32, start: u64, at: u64, v2_id: u64) -> ProcessFact {
    let membership = CgroupMembership { v2_id, ..CgroupMembership::default() };
    ProcessFact { change, tgid: Tgid(tgid), start: BootNs(start), at: BootNs(at), membership }
}

/// 50 containers, ids 10 to 59; 1 is the root.
fn identity() -> Identity {
    let mut identity = Identity::default();
    let key = |id| CgroupKey { hierarchy: 0, id };
    let mut cgroup = |id, parent: Option<u64>, name: String| {
        let (key, parent, at) = (key(id), parent.map(key), BootNs(1));
        identity.cgroup(&CgroupFact { change: CgroupChange::Seen, key, parent, name, at });
    };
    cgroup(1, None, String::new());
    for id in 10..60 {
        cgroup(id, Some(1), format!("{id:064x}"));
    }
    identity
}

fn living() {
    let before = NOW.load(Ordering::Relaxed);
    let mut identity = identity();
    for n in 0..65_536 {
        identity.process(&fact(ProcessChange::Fork { parent: Tgid(1) }, n, SECOND, SECOND, 10 + u64::from(n % 50)));
    }
    let held = NOW.load(Ordering::Relaxed) - before;
    let size = identity.processes.size();
    line("65,536 living: reported size", size.living_bytes as f64 / MIB, "MiB", Some(16.0));
    line("    allocated, cgroups included", held as f64 / MIB, "MiB", Some(16.0));
}

/// 10,000 exits a second for 60 s, a tenth of them in containers.
fn exits() {
    let before = NOW.load(Ordering::Relaxed);
    let mut identity = identity();
    MOST.store(before, Ordering::Relaxed);
    let (lives, from) = (600_000u64, Instant::now());
    let mut most_reported = 0;
    for n in 0..lives {
        let (pid, at) = (300 + (n % 32_000) as u32, SECOND + n * SECOND / 10_000);
        let cgroup = if n % 10 == 0 { 10 + n % 50 } else { 1 };
        identity.process(&fact(ProcessChange::Fork { parent: Tgid(1) }, pid, at, at, cgroup));
        identity.process(&fact(ProcessChange::Exec, pid, at, at + 10, cgroup));
        identity.process(&fact(ProcessChange::Exit, pid, at, at + 1_000, cgroup));
        if n % 2_500 == 0 {
            identity.expire(BootNs(at), |_| false);
            most_reported = most_reported.max(identity.processes.size().exited_bytes);
        }
    }
    let ns = from.elapsed().as_nanos() as f64 / (3 * lives) as f64;
    let bound = EXITED_BYTES as f64 / MIB;
    line("10,000 exits/s for 60 s: largest reported size of exited", most_reported as f64 / MIB, "MiB", Some(bound));
    line("    most allocated by all tables", (MOST.load(Ordering::Relaxed) - before) as f64 / MIB, "MiB", None);
    line("    evicted before their time", identity.processes.size().evicted as f64, "", None);
    line("    per event", ns, "ns", Some(150.0));
}

fn main() {
    for (name, run) in [("tables-living", living as fn()), ("tables-exits", exits)] {
        if wanted(name) {
            println!("\n{name}");
            run();
        }
    }
}
