//! The CUDA driver library that a process maps, and where its blocking calls are in the file.
//!
//! A container chooses its files and can change them at any time, so: symlinks are resolved in the root of the process and never lead out of
//! it; the file is opened once, only if it is a regular one that the process maps (to open a device may have effects); every later step uses
//! that descriptor; and what is read of maps and of the file is bounded. Offsets are kept for a file as long as neither its size nor its
//! times change.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object::read::{ReadCache, ReadRef};
use object::{Object as _, ObjectSegment as _, ObjectSymbol as _, SymbolKind};
use thiserror::Error;

use super::root_path::open_in_root;

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
    "cuMemcpyAtoH_v2",
    "cuMemcpyAtoH_v2_ptds",
    "cuMemcpyHtoA_v2",
    "cuMemcpyHtoA_v2_ptds",
    "cuMemcpy2D_v2",
    "cuMemcpy2D_v2_ptds",
    "cuMemcpy2DUnaligned_v2",
    "cuMemcpy2DUnaligned_v2_ptds",
    "cuMemcpy3D_v2",
    "cuMemcpy3D_v2_ptds",
];
/// The first call of every client.
const FIRST: &str = "cuInit";
/// A file with more symbols is not the driver's library, which has some thousand.
const MAX_SYMBOLS: usize = 200_000;
/// Calls, and parts of the file that are mapped; the driver's library has a few of each.
const MAX_OFFSETS: usize = 64;
const MAX_SEGMENTS: usize = 64;
/// What is read of a file; of the driver's library these are some MiB.
const MAX_READ_BYTES: u64 = 64 << 20;
/// A string of the file costs at least the block that is read for it.
const STRING_BYTES: u64 = 256;
/// What is read of the maps of a process: some hundred bytes for each mapping.
const MAX_MAPS_BYTES: u64 = 64 << 20;
/// A longer line has a longer path than a file can have, with every byte of it escaped.
const MAX_LINE_BYTES: u64 = 32 << 10;
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
    #[error(
        "the library of process {pid} was not read within {seconds} s, since its file system hangs or is slow; it is not tried again"
    )]
    Late { pid: u32, seconds: u64 },
    #[error("{0} reads of libraries hang, of other processes; no other library is read until one returns")]
    Hanging(usize),
    #[error("cannot start the thread that reads libraries")]
    Thread(#[source] io::Error),
    #[error("the thread that reads libraries has ended while it read that of process {pid}")]
    ThreadEnded { pid: u32 },
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

/// The first driver library in maps; `None` if there is none in what is read of them.
fn mapped_library(maps: impl io::BufRead) -> io::Result<Option<(u64, PathBuf)>> {
    let mut maps = maps.take(MAX_MAPS_BYTES);
    let mut line = Vec::new();
    loop {
        line.clear();
        let length = (&mut maps).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if length == 0 {
            return Ok(None);
        }
        // A path can be any bytes; one that is not text is not the library's.
        let text = std::str::from_utf8(line.strip_suffix(b"\n").unwrap_or(&line)).ok();
        if let Some((inode, path)) = text.and_then(mapped) {
            return Ok(Some((inode, path.to_owned())));
        }
    }
}

/// Opens the very file for reading.
fn reopen(found: &File) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// Data of which a bounded number of bytes is read.
#[derive(Debug)]
struct BoundedData<'a, R> {
    data: R,
    left: &'a Cell<u64>,
}

impl<R: Copy> Clone for BoundedData<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Copy> Copy for BoundedData<'_, R> {}

impl<R> BoundedData<'_, R> {
    fn take(&self, bytes: u64) -> Result<(), ()> {
        self.left.set(self.left.get().checked_sub(bytes).ok_or(())?);
        Ok(())
    }
}

impl<'data, R: ReadRef<'data>> ReadRef<'data> for BoundedData<'_, R> {
    fn len(self) -> Result<u64, ()> {
        self.data.len()
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'data [u8], ()> {
        self.take(size)?;
        self.data.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'data [u8], ()> {
        self.take(STRING_BYTES)?;
        let text = self.data.read_bytes_at_until(range, delimiter)?;
        self.take(text.len() as u64)?;
        Ok(text)
    }
}

#[derive(Debug, Default)]
pub struct Libraries {
    known: HashMap<FileKey, Result<Arc<CallOffsets>, String>>,
}

impl Libraries {
    /// The first driver library that the process maps as code.
    pub fn of_process(&mut self, procfs: &Path, pid: u32) -> Result<Library, LibraryError> {
        let folder = procfs.join(pid.to_string());
        let maps = File::open(folder.join("maps")).and_then(|maps| mapped_library(BufReader::new(maps)));
        let found = maps.map_err(|source| LibraryError::Maps { pid, source })?;
        let (inode, path) = found.ok_or(LibraryError::Absent)?;
        if let Some(removed) = path.to_str().and_then(|path| path.strip_suffix(" (deleted)")) {
            return Err(LibraryError::Replaced { path: removed.into() });
        }
        self.open(&folder.join("root"), &path, inode)
    }

    fn open(&mut self, root: &Path, path: &Path, inode: u64) -> Result<Library, LibraryError> {
        let path = path.to_owned();
        let found = match open_in_root(root, &path) {
            Ok(found) => found,
            Err(source) => return Err(LibraryError::Open { path, source }),
        };
        let (file, meta) = match found.metadata() {
            Ok(meta) if !meta.is_file() => return Err(LibraryError::NotRegular { path }),
            Ok(meta) if meta.ino() != inode => return Err(LibraryError::Replaced { path }),
            Ok(meta) => match reopen(&found) {
                Ok(file) => (file, meta),
                Err(source) => return Err(LibraryError::Open { path, source }),
            },
            Err(source) => return Err(LibraryError::Open { path, source }),
        };
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

fn offsets_in<'data, R: ReadRef<'data>>(data: R) -> Result<CallOffsets, String> {
    let left = Cell::new(MAX_READ_BYTES);
    let elf = object::File::parse(BoundedData { data, left: &left }).map_err(|error| error.to_string())?;
    let segments: Vec<(u64, u64, u64)> = elf
        .segments()
        .take(MAX_SEGMENTS)
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
        if found.blocking.len() > MAX_OFFSETS {
            return Err(format!("it has more than {MAX_OFFSETS} symbols of blocking calls"));
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

    /// Programs call the version that they were linked with, so all versions of a call are probed.
    #[test]
    fn all_versions_of_a_call_are_found() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let text = "__asm__(\".symver old_sync,cuStreamSynchronize@CUDA_1\"); __asm__(\".symver new_sync,cuStreamSynchronize@@CUDA_2\");\n\
                    __asm__(\".symver other,cuInit@@CUDA_2\");\n\
                    int old_sync(void *s) { return s != 0; } int new_sync(void *s) { return s == 0; } int other(int n) { return n; }\n";
        std::fs::write(at("lib.c"), text).unwrap();
        std::fs::write(
            at("versions"),
            "CUDA_1 { global: cuStreamSynchronize; local: *; };\nCUDA_2 { global: cuInit; } CUDA_1;\n",
        )
        .unwrap();
        let script = format!("-Wl,--version-script={}", at("versions").display());
        let built = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libcuda.so.1", &script, "-o"])
            .args([at("libcuda.so.1"), at("lib.c")])
            .output()
            .unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let found = offsets_of(&std::fs::read(at("libcuda.so.1")).unwrap()).unwrap();
        assert_eq!((found.blocking.len(), found.first.is_some()), (2, true), "{found:?}");
        assert_ne!(found.blocking[0], found.blocking[1]);
    }

    #[test]
    fn a_replaced_file_is_not_probed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda.so.1");
        std::fs::write(&path, "x").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let mut libraries = Libraries::default();
        let mut open = |inode| libraries.open(folder.path(), Path::new("/libcuda.so.1"), inode).unwrap_err();
        assert!(matches!(open(inode + 1), LibraryError::Replaced { .. }));
        assert!(matches!(open(inode), LibraryError::Format { .. }));
    }

    #[test]
    fn symlinks_are_those_of_the_process_and_only_regular_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::write(at("real"), "x").unwrap();
        std::os::unix::fs::symlink("/real", at("inside")).unwrap();
        std::os::unix::fs::symlink("../../../../../../../etc/passwd", at("outside")).unwrap();
        std::os::unix::fs::symlink("/proc/self/exe", at("magic")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), rustix::fs::Mode::RUSR).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        let inode = |name: &str| std::fs::symlink_metadata(at(name)).unwrap().ino();
        let open = |name: &str, inode| {
            Libraries::default().open(folder.path(), &Path::new("/").join(name), inode).map(|_| ()).unwrap_err()
        };
        // It was read, and is not a library.
        assert!(matches!(open("inside", inode("real")), LibraryError::Format { .. }));
        assert!(matches!(open("outside", 1), LibraryError::Open { .. }));
        assert!(matches!(open("magic", 1), LibraryError::Open { .. }));
        assert!(matches!(open("pipe", inode("pipe")), LibraryError::NotRegular { .. }));
        assert!(matches!(open("folder", inode("folder")), LibraryError::NotRegular { .. }));
    }

    #[test]
    fn what_is_read_of_maps_and_of_a_file_is_bounded() {
        let library = "7f00-7f10 r-xp 00001000 fd:01 1234    /usr/lib/libcuda.so.1\n";
        let found = |before: u64| {
            let maps = io::BufReader::new(io::repeat(b'x').take(before)).chain(b"\n".as_slice()).chain(library.as_bytes());
            mapped_library(maps).unwrap()
        };
        assert_eq!(found(5), Some((1234, "/usr/lib/libcuda.so.1".into())));
        assert_eq!(found(3 * MAX_LINE_BYTES), Some((1234, "/usr/lib/libcuda.so.1".into())));
        assert_eq!(found(MAX_MAPS_BYTES), None);

        let left = Cell::new(10);
        let data = BoundedData { data: b"abc\0defghijklmnopqrstuvwxyz".as_slice(), left: &left };
        assert_eq!(data.read_bytes_at(0, 3), Ok(b"abc".as_slice()));
        assert_eq!(data.read_bytes_at(0, 8), Err(()));
        assert_eq!(data.read_bytes_at(0, 7).map(<[u8]>::len), Ok(7));
        assert_eq!(data.read_bytes_at_until(0..20, 0), Err(()));
    }

    /// A file of a terabyte, of which the section of symbols is nearly all.
    #[test]
    fn a_sparse_file_is_not_read() {
        let own = std::fs::read("/proc/self/exe").unwrap();
        let number =
            |at: usize, size: usize| own[at..at + size].iter().rev().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
        let (sections, size, n) = (number(40, 8) as usize, number(58, 2) as usize, number(60, 2) as usize);
        let dynamic = (0..n).map(|n| sections + n * size).find(|at| number(at + 4, 4) == 11).unwrap();
        let mut changed = own.clone();
        changed[dynamic + 32..dynamic + 40].copy_from_slice(&(1_u64 << 39).to_le_bytes());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("libcuda.so.1");
        std::fs::write(&path, changed).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(call_offsets(&file).is_err());
    }

    /// Whatever the file: no offset is beyond its end, and there are no more of them than names.
    #[test]
    fn fuzz_cuda_library() {
        devkit::fuzz(file!(), "cuda_library", |bytes| {
            let Ok(found) = offsets_of(bytes) else { return };
            assert!(found.blocking.len() <= MAX_SYMBOLS, "{} offsets", found.blocking.len());
            assert!(found.blocking.is_sorted(), "{found:?}");
        });
    }

    /// Whatever a process maps: only a library by its name is found.
    #[test]
    fn fuzz_maps() {
        devkit::fuzz(file!(), "maps", |bytes| {
            if let Ok(Some((_, path))) = mapped_library(bytes) {
                assert!(path.is_absolute() && path.to_string_lossy().contains(NAME), "{}", path.display());
            }
        });
    }
}
