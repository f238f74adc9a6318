//! Ids of cgroups as the kernel compares them, from their directories.
//!
//! From Linux 5.5 on, the id of a cgroup on a 64-bit machine is the inode number of its directory. Before, the kernel's id has a
//! generation in its upper half, which the inode number lacks: cgroups that a walk finds would match no event. The file handle of a
//! directory is the kernel's id in both cases, and costs one more system call. So the first directory that is asked for decides which of
//! the two is used.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::OnceLock;

/// The inode number of the root cgroup of every hierarchy.
pub const ROOT_INODE: u64 = 1;
/// The root's id where ids have generations, of which it has the first.
const ROOT_WITH_GENERATION: u64 = 1 << 32 | ROOT_INODE;
const HANDLE_BYTES: usize = 8;

/// A property of the running kernel, so there is one per process.
static KIND: OnceLock<IdKind> = OnceLock::new();

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdKind {
    Inode,
    /// The inode number and a generation.
    Handle,
}

impl IdKind {
    /// `handle`: the id in the file handle of the directory with this inode number, if it can be read.
    fn of(handle: Option<u64>, inode: u64) -> Self {
        match handle {
            Some(handle) if handle != inode && handle & u64::from(u32::MAX) == inode => Self::Handle,
            // Another file system than cgroupfs has other handles; then inode numbers are as good as any.
            _ => Self::Inode,
        }
    }

    fn root(self) -> u64 {
        match self {
            Self::Inode => ROOT_INODE,
            Self::Handle => ROOT_WITH_GENERATION,
        }
    }
}

/// How this kernel identifies cgroups, determined from the directory if it is not known yet.
fn kind_by(directory: &Path, meta: &Metadata) -> IdKind {
    *KIND.get_or_init(|| {
        // Without handles (an old kernel, or a seccomp filter), inode numbers are what remains.
        let kind = IdKind::of(handle(directory).ok(), meta.ino());
        if kind == IdKind::Handle {
            tracing::info!("cgroup ids of this kernel have generations: they are read from file handles");
        }
        kind
    })
}

/// The id of the cgroup with this directory.
pub fn of(directory: &Path) -> io::Result<u64> {
    of_known(directory, &fs::metadata(directory)?)
}

/// As [`of`], for a directory with known metadata.
pub fn of_known(directory: &Path, meta: &Metadata) -> io::Result<u64> {
    match kind_by(directory, meta) {
        IdKind::Inode => Ok(meta.ino()),
        IdKind::Handle => handle(directory),
    }
}

/// The id of the root of a hierarchy that is not mounted.
pub fn of_root() -> u64 {
    KIND.get().map_or(ROOT_INODE, |kind| kind.root())
}

/// `struct file_handle` with room for 8 bytes.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    id: [u8; HANDLE_BYTES],
}

/// The 8 bytes of the file handle of a directory of cgroupfs: its id.
fn handle(directory: &Path) -> io::Result<u64> {
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    let mut handle = FileHandle { bytes: HANDLE_BYTES as u32, kind: 0, id: [0; HANDLE_BYTES] };
    let mut mount = 0_i32;
    // SAFETY: the path ends with a zero byte, the kernel writes at most `bytes` bytes after the header, and all three outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path.as_ptr(), &raw mut handle, &raw mut mount, 0) };
    match result {
        0 if handle.bytes as usize == HANDLE_BYTES => Ok(u64::from_ne_bytes(handle.id)),
        0 => Err(io::Error::other("the file handle is shorter than the id of a cgroup")),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_with_a_generation_is_recognized() {
        for (handle, inode, expect) in [
            (Some(7), 7, IdKind::Inode),
            (Some(1 << 32 | 1), 1, IdKind::Handle),
            (Some(5 << 32 | 4_711), 4_711, IdKind::Handle),
            // 64-bit inode numbers.
            (Some(3 << 32 | 9), 3 << 32 | 9, IdKind::Inode),
            (Some(8), 7, IdKind::Inode),
            (None, 7, IdKind::Inode),
        ] {
            assert_eq!(IdKind::of(handle, inode), expect, "{handle:?} {inode}");
        }
        assert_eq!((IdKind::Inode.root(), IdKind::Handle.root()), (1, 0x1_0000_0001));
    }

    /// Where cgroup2 is mounted, which every machine that runs the privileged tests has.
    #[test]
    fn the_file_handle_of_a_cgroup_is_its_id() {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
        let Some(mount) = mount.and_then(|line| line.split(' ').nth(1)) else {
            println!("no cgroup2 is mounted");
            return;
        };
        let handle = handle(Path::new(mount)).unwrap();
        assert_eq!(handle & u64::from(u32::MAX), fs::metadata(mount).unwrap().ino() & u64::from(u32::MAX));
        assert_eq!(of(Path::new(mount)).unwrap(), handle);
    }
}
