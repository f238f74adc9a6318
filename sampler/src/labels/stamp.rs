//! Identity of what is at a path.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Tells one thing at a path from another that took its place, even with the same inode number.
pub type Stamp = (u64, u64, i64, i64);

/// `None` where nothing is. A change of its mode or owner is taken for a replacement, which does no harm.
pub fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino(), m.ctime(), m.ctime_nsec()))
}
