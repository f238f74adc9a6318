//! Finds the segments of a path that may be relevant, from leaf to root.
//!
//! A path may have thousands of segments, most of them irrelevant, and a container chooses the names of its own cgroups. So 64 bytes are
//! examined at once, as one bit for each byte: the positions of the slashes determine the length of each segment, and only segments of a
//! relevant length are examined individually. No segment that [`super::segment`] recognizes is skipped; some that it does not recognize
//! are visited.

use std::ops::ControlFlow;

const BLOCK: usize = 64;

/// Calls `visit` with the bounds of each segment that may be relevant, until it breaks. The path begins with a slash.
pub(super) fn leaf_to_root(path: &[u8], mut visit: impl FnMut(usize, usize) -> ControlFlow<()>) {
    let (blocks, rest) = path.as_chunks::<BLOCK>();
    let mut last = [0; BLOCK];
    last[..rest.len()].copy_from_slice(rest);
    // The first slash after the block; the end of the path ends a segment like a slash.
    let mut next = path.len();
    for index in (0..=blocks.len()).rev() {
        let slashes = slashes_in(blocks.get(index).unwrap_or(&last));
        if slashes == 0 {
            continue;
        }
        let base = index * BLOCK;
        let mut due = relevant(path, base, slashes, next);
        while due != 0 {
            let bit = due.ilog2();
            due ^= 1 << bit;
            let start = base + bit as usize + 1;
            let later = (slashes >> bit) >> 1;
            let end = if later == 0 { next } else { start + later.trailing_zeros() as usize };
            if visit(start, end).is_break() {
                return;
            }
        }
        next = base + slashes.trailing_zeros() as usize;
    }
}

/// The slashes before relevant segments, one bit for each byte.
#[inline]
fn relevant(path: &[u8], base: usize, slashes: u64, next: usize) -> u64 {
    // The segment that extends beyond the block.
    let top = slashes.ilog2();
    let at = base + top as usize;
    let mut relevant = u64::from(is_relevant(path, at, next - at - 1)) << top;

    // The other segments. Bit i: at least n bytes follow before the next slash.
    let at_least_1 = !slashes >> 1;
    let at_least_2 = at_least_1 & at_least_1 >> 1;
    let at_least_4 = at_least_2 & at_least_2 >> 2;
    let at_least_8 = at_least_4 & at_least_4 >> 4;
    let at_least_3 = slashes & at_least_2 & at_least_1 >> 2;
    if at_least_3 == 0 {
        return relevant;
    }
    let at_least_5 = slashes & at_least_4 & at_least_1 >> 4;
    let at_least_6 = slashes & at_least_4 & at_least_2 >> 4;
    let at_least_7 = at_least_6 & at_least_1 >> 6;
    let at_least_11 = slashes & at_least_8 & at_least_4 >> 7;
    let at_least_13 = at_least_11 & at_least_2 >> 11;
    let at_least_24 = at_least_13 & at_least_8 >> 13 & at_least_4 >> 20;
    // Parents must have a child; a child after the last byte of the block is not visible here.
    let parents = |length: u32, at_least: u64| at_least & slashes >> (length + 1) & !(slashes >> (length + 2));
    relevant |= at_least_24
        | chosen::<3>(path, base, parents(3, at_least_3))
        | chosen::<5>(path, base, parents(5, at_least_5))
        | chosen::<6>(path, base, parents(6, at_least_6))
        | chosen::<7>(path, base, parents(7, at_least_7))
        | chosen::<11>(path, base, parents(11, at_least_11))
        | chosen::<13>(path, base, at_least_13 & !at_least_24 & !(1 << top));
    relevant
}

#[inline]
fn chosen<const LENGTH: usize>(path: &[u8], base: usize, mut among: u64) -> u64 {
    let mut chosen = 0;
    while among != 0 {
        let lowest = among & among.wrapping_neg();
        among ^= lowest;
        if is_relevant(path, base + lowest.trailing_zeros() as usize, LENGTH) {
            chosen |= lowest;
        }
    }
    chosen
}

/// Whether the segment after a slash may be relevant. Segments of 13 to 23 bytes are recognized by their prefix, shorter ones by their
/// whole name; `systemd-nspawn@N.service` is the shortest of the longer ones.
#[inline]
fn is_relevant(path: &[u8], slash: usize, length: usize) -> bool {
    let (above, rest) = path.split_at_checked(slash).unwrap_or_default();
    match length {
        24.. => true,
        13.. => {
            let machine = rest.starts_with(b"/machine-") && above.ends_with(b".slice");
            machine || rest.starts_with(b"/lxc.payload.")
        }
        11 => rest.starts_with(b"/lxc.payload"),
        7 => rest.starts_with(b"/default") && is_top(above),
        // Including the following slash it is one comparison of eight bytes.
        6 => {
            let childless = || rest.starts_with(b"/garden/good//") || rest.starts_with(b"/garden/bad//");
            (rest.starts_with(b"/garden/") && !childless()) || (rest.starts_with(b"/k8s.io/") && is_top(above))
        }
        5 => {
            let own = || rest.starts_with(b"/mesos/agent/") || rest.starts_with(b"/mesos/slave/");
            rest.starts_with(b"/mesos") && !own()
        }
        3 => rest.starts_with(b"/lxc"),
        _ => false,
    }
}

/// Whether it is the top, or the outermost part that a private cgroup namespace shows.
pub(super) fn is_top(above: &[u8]) -> bool {
    above.is_empty() || above.ends_with(b"/..")
}

/// The slashes of a block, one bit for each byte. Each byte becomes its own bit if it is a slash, else 0; a multiplication combines eight.
#[inline]
fn slashes_in(block: &[u8; BLOCK]) -> u64 {
    let mut bits = [0; BLOCK];
    for (at, byte) in block.iter().enumerate() {
        bits[at] = if *byte == b'/' { 1 << (at % 8) } else { 0 };
    }
    let mut mask = 0;
    for (index, eight) in bits.as_chunks().0.iter().enumerate() {
        mask |= u64::from_le_bytes(*eight).wrapping_mul(0x0101_0101_0101_0101) >> 56 << (8 * index);
    }
    mask
}
