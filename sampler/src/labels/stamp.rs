//! Identity of the file at a path.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Device, inode and change time; distinguishes a file from a replacement, even one with the same inode number.
pub type Stamp = (u64, u64, i64, i64);

/// `None` if nothing is at the path. A change of mode or owner counts as a replacement, which is harmless.
pub fn stamp(path: &Path) -> Option<Stamp> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino(), m.ctime(), m.ctime_nsec()))
}
