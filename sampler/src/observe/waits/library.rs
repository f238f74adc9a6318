//! The CUDA driver library that a process maps, and where its blocking calls are in the file.
//!
//! A container chooses its files and can change them at any time, so: the file is opened once, is compared with what the process maps, and
//! every later step uses that descriptor. Offsets are kept for a file as long as neither its size nor its times change.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::read::ReadCache;
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _, SymbolKind};
use thiserror::Error;

/// Beginning of the library's file name; a version follows.
const NAME: &str = "libcuda.so";
/// The calls that return only when work on the GPU is done. Copies to and from memory that is not locked block too, and those of the
/// default stream of a thread have the suffix `_ptds` or `_ptsz`.
const BLOCKING: &[&str] = &[
    "cuCtxSynchronize",
    "cuCtxSynchronize_v2",
    "cuStreamSynchronize",
    "cuStreamSynchronize_ptsz",
    "cuEventSynchronize",
    "cuMemcpy",
    "cuMemcpy_ptds",
    "cuMemcpyDtoH",
    "cuMemcpyDtoH_v2",
    "cuMemcpyDtoH_v2_ptds",
    "cuMemcpyHtoD",
    "cuMemcpyHtoD_v2",
    "cuMemcpyHtoD_v2_ptds",
    "cuMemcpy2D_v2",
    "cuMemcpy2D_v2_ptds",
    "cuMemcpy3D_v2",
    "cuMemcpy3D_v2_ptds",
];
/// The first call of every client.
const FIRST: &str = "cuInit";
/// A file with more symbols is not the driver's library, which has some thousand.
const MAX_SYMBOLS: usize = 200_000;
/// Files of which the offsets are kept.
const MAX_FILES: usize = 64;

#[derive(Debug, Error)]
pub enum LibraryError {
    #[error("the process maps no {NAME}")]
    Absent,
    #[error("{path} was replaced after the process had mapped it; restart the process to probe it", path = path.display())]
    Replaced { path: PathBuf },
    #[error("cannot open {path}", path = path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is not a regular file", path = path.display())]
    NotRegular { path: PathBuf },
    #[error("{path} cannot be read as a library: {reason}", path = path.display())]
    Format { path: PathBuf, reason: String },
    #[error("{path} has none of the blocking calls, such as cuStreamSynchronize", path = path.display())]
    NoSymbols { path: PathBuf },
    #[error("cannot read what process {pid} maps")]
    Maps { pid: u32, source: io::Error },
}

/// Identifies a file as long as it does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileKey {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

/// Offsets in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallOffsets {
    pub blocking: Vec<u64>,
    pub first: Option<u64>,
}

/// The library of a process.
#[derive(Debug)]
pub struct Library {
    pub key: FileKey,
    pub calls: Arc<CallOffsets>,
    /// As the process sees it.
    pub path: PathBuf,
    file: File,
}

impl Library {
    /// A path that leads to the very file that was examined, while this exists.
    pub fn stable_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// The mapped file, from a line of /proc/PID/maps: its inode and its path.
fn mapped(line: &str) -> Option<(u64, &Path)> {
    let mut fields = line.splitn(6, ' ').map(str::trim_start);
    let (_range, permissions, _offset, _device) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    let (inode, path) = (fields.next()?, Path::new(fields.next()?));
    let is_library = path.is_absolute() && path.file_name()?.to_str()?.starts_with(NAME);
    (is_library && permissions.contains('x')).then_some((inode.parse().ok()?, path))
}

#[derive(Debug, Default)]
pub struct Libraries {
    known: HashMap<FileKey, Result<Arc<CallOffsets>, String>>,
}

impl Libraries {
    /// The first driver library that the process maps as code.
    pub fn of_process(&mut self, procfs: &Path, pid: u32) -> Result<Library, LibraryError> {
        let folder = procfs.join(pid.to_string());
        let maps = std::fs::read(folder.join("maps")).map_err(|source| LibraryError::Maps { pid, source })?;
        // A path can be any bytes; one that is not text is not the library's.
        let maps = String::from_utf8_lossy(&maps);
        let (inode, path) = maps.lines().find_map(mapped).ok_or(LibraryError::Absent)?;
        if let Some(removed) = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
            return Err(LibraryError::Replaced { path: removed.into() });
        }
        let beneath = folder.join("root").join(path.strip_prefix("/").unwrap_or(path));
        self.open(&beneath, path, inode)
    }

    fn open(&mut self, at: &Path, path: &Path, inode: u64) -> Result<Library, LibraryError> {
        let path = path.to_owned();
        // A named pipe in its place would block.
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(at);
        let (file, meta) = match opened.and_then(|file| Ok((file.metadata()?, file))) {
            Ok((meta, file)) => (file, meta),
            Err(source) => return Err(LibraryError::Open { path, source }),
        };
        if !meta.is_file() {
            return Err(LibraryError::NotRegular { path });
        }
        if meta.ino() != inode {
            return Err(LibraryError::Replaced { path });
        }
        let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
        let key = FileKey {
            device: meta.dev(),
            inode,
            size: meta.len(),
            modified_ns: ns(meta.mtime(), meta.mtime_nsec()),
            changed_ns: ns(meta.ctime(), meta.ctime_nsec()),
        };
        if self.known.len() >= MAX_FILES && !self.known.contains_key(&key) {
            self.known.clear();
        }
        let calls = self.known.entry(key).or_insert_with(|| call_offsets(&file).map(Arc::new)).clone();
        let calls = calls.map_err(|reason| LibraryError::Format { path: path.clone(), reason })?;
        if calls.blocking.is_empty() {
            return Err(LibraryError::NoSymbols { path });
        }
        Ok(Library { key, calls, path, file })
    }
}

fn call_offsets(file: &File) -> Result<CallOffsets, String> {
    let cache = ReadCache::new(file);
    offsets_in(&cache)
}

/// Of a library in memory; the interface of the fuzz harness.
#[cfg(test)]
fn offsets_of(bytes: &[u8]) -> Result<CallOffsets, String> {
    offsets_in(bytes)
}

fn offsets_in<'data, R: object::ReadRef<'data>>(data: R) -> Result<CallOffsets, String> {
    let elf = object::File::parse(data).map_err(|error| error.to_string())?;
    let segments: Vec<(u64, u64, u64)> = elf
        .segments()
        .map(|segment| {
            let (offset, size) = segment.file_range();
            (segment.address(), size, offset)
        })
        .collect();
    let offset = |address: u64| {
        let within = |(start, size, offset): &(u64, u64, u64)| {
            let distance = address.checked_sub(*start).filter(|distance| distance < size)?;
            offset.checked_add(distance)
        };
        segments.iter().find_map(within)
    };
    let mut found = CallOffsets { blocking: Vec::new(), first: None };
    for symbol in elf.dynamic_symbols().take(MAX_SYMBOLS) {
        if !symbol.is_definition() || symbol.kind() != SymbolKind::Text {
            continue;
        }
        let Ok(name) = symbol.name() else { continue };
        if name == FIRST {
            found.first = offset(symbol.address());
        } else if BLOCKING.contains(&name) {
            found.blocking.extend(offset(symbol.address()));
        }
    }
    // Names of one function with several versions.
    found.blocking.sort_unstable();
    found.blocking.dedup();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_the_driver_library_is_found_in_maps() {
        let line =
            |permissions: &str, path: &str| format!("7f00-7f10 {permissions} 00001000 fd:01 1234                       {path}");
        for (permissions, path, expect) in [
            ("r-xp", "/usr/lib/x86_64-linux-gnu/libcuda.so.580.95.05", true),
            ("r-xp", "/usr/local/cuda/compat/libcuda.so.1", true),
            ("r-xp", "/tmp/a b/libcuda.so.1 (deleted)", true),
            ("r--p", "/usr/lib/libcuda.so.1", false),
            ("r-xp", "/usr/lib/libcudart.so.12", false),
            ("r-xp", "libcuda.so.1", false),
            ("r-xp", "[vdso]", false),
        ] {
            let line = line(permissions, path);
            let found = mapped(&line);
            assert_eq!(found.is_some(), expect, "{line}");
            assert!(found.is_none_or(|found| found == (1234, Path::new(path))), "{line}");
        }
        assert_eq!(mapped("7f00-7f10 r-xp 00001000 00:00 0 "), None);
        assert_eq!(mapped(""), None);
    }

    #[test]
    fn a_file_that_is_not_a_library_is_an_error() {
        assert!(offsets_of(b"").is_err());
        assert!(offsets_of(b"\x7fELF\x02\x01\x01").is_err());
    }

    #[test]
    fn a_library_without_the_calls_has_no_offsets() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        assert_eq!(offsets_of(&own).unwrap(), CallOffsets { blocking: Vec::new(), first: None });
    }

    #[test]
    fn a_replaced_file_is_not_probed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda.so.1");
        std::fs::write(&path, "x").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let mut libraries = Libraries::default();
        let mut open = |inode| libraries.open(&path, &path, inode).unwrap_err();
        assert!(matches!(open(inode + 1), LibraryError::Replaced { .. }));
        assert!(matches!(open(inode), LibraryError::Format { .. }));
        let mut libraries = Libraries::default();
        assert!(matches!(libraries.open(folder.path(), &path, 1).unwrap_err(), LibraryError::NotRegular { .. }));
    }
}
