//! uprobe_multi links (Linux 6.6 and newer): all probes of a library in one link, for one process. aya has no such links, so the two system
//! calls that they need are made here, with the instructions that aya's parser relocated.
//!
//! Unlike probes by perf events they need no CAP_SYS_ADMIN, and a link for a process leaves other processes of the library alone.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use std::collections::HashSet;
use std::ffi::CString;

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya_obj::Object;
use aya_obj::generated::bpf_insn;
use thiserror::Error;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_KPROBE: u32 = 2;
const BPF_TRACE_UPROBE_MULTI: u32 = 48;
const BPF_F_UPROBE_MULTI_RETURN: u32 = 1;
const LOG_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub enum MultiError {
    #[error("cannot relocate the eBPF program: {0}")]
    Relocate(String),
    #[error("the eBPF program does not contain `{0}`: the build is inconsistent, run `cargo xtask build`")]
    Missing(&'static str),
    #[error("the kernel refused to load `{name}`{log}")]
    Load { name: &'static str, log: String, source: io::Error },
    #[error("the kernel creates no uprobe_multi links")]
    Links(#[source] io::Error),
}

/// The part of the kernel's `union bpf_attr` that loading uses.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
}

/// The part that a link uses.
#[repr(C)]
struct LinkAttributes {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
    path: u64,
    offsets: u64,
    ref_ctr_offsets: u64,
    cookies: u64,
    count: u32,
    multi_flags: u32,
    pid: u32,
    pad: u32,
}

/// A call that returns a descriptor.
fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are a prefix of the kernel's union, their pointers are valid for the length of the call, and their size is
    // passed along.
    let returned = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    let fd = RawFd::try_from(returned).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: a new descriptor that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A program that uprobe_multi links accept.
pub struct MultiProgram(OwnedFd);

impl AsFd for MultiProgram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Detaches when it is dropped.
pub struct MultiLink(#[expect(dead_code, reason = "closing it detaches")] OwnedFd);

fn data(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data) | Map::HashMap(data) | Map::PerCpuArray(data) | Map::RingBuf(data) | Map::PerfEventArray(data) => {
            Some(data)
        }
        _ => None,
    }
}

/// Loads the programs with these names from the object, with the maps that `ebpf` has of it.
pub fn load<const N: usize>(object: &[u8], ebpf: &Ebpf, names: [&'static str; N]) -> Result<[MultiProgram; N], MultiError> {
    let relocate = |error: &dyn std::fmt::Display| MultiError::Relocate(error.to_string());
    let mut parsed = Object::parse(object).map_err(|error| relocate(&error))?;
    let sections: HashSet<usize> = parsed.functions.keys().map(|(section, _)| *section).collect();
    let kinds = std::mem::take(&mut parsed.maps);
    let maps = ebpf.maps().filter_map(|(name, map)| Some((name, data(map)?.fd().as_fd_number(), kinds.get(name)?)));
    parsed.relocate_maps(maps, &sections).map_err(|error| relocate(&error))?;
    parsed.relocate_calls(&sections).map_err(|error| relocate(&error))?;
    parsed.sanitize_functions(aya::features());
    let mut loaded = Vec::new();
    for name in names {
        let program = parsed.programs.get(name).ok_or(MultiError::Missing(name))?;
        let function = parsed.functions.get(&program.function_key()).ok_or(MultiError::Missing(name))?;
        loaded.push(load_program(name, &function.instructions, &program.license)?);
    }
    let loaded: [MultiProgram; N] = loaded.try_into().map_err(|_| MultiError::Missing("all programs"))?;
    match loaded.first().map(has_links) {
        Some(Err(error)) => Err(MultiError::Links(error)),
        Some(Ok(())) | None => Ok(loaded),
    }
}

/// A kernel that loads the programs may not have such links: before 6.6 it does not check what a program is to be attached to. One that has
/// them refuses a folder as not being a file.
fn has_links(program: &MultiProgram) -> io::Result<()> {
    match attach(program, Path::new("/"), &[0], false, 0) {
        Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(io::Error::other("the kernel attached a probe to a folder")),
    }
}

/// The number of a map's descriptor.
trait DescriptorNumber {
    fn as_fd_number(&self) -> RawFd;
}

impl DescriptorNumber for aya::maps::MapFd {
    fn as_fd_number(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

fn load_program(name: &'static str, instructions: &[bpf_insn], license: &CString) -> Result<MultiProgram, MultiError> {
    let mut log = vec![0u8; LOG_BYTES];
    let mut prog_name = [0; 16];
    prog_name.iter_mut().zip(name.bytes().take(15)).for_each(|(to, byte)| *to = byte);
    let mut attributes = LoadAttributes {
        prog_type: BPF_PROG_TYPE_KPROBE,
        insn_cnt: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buf: 0,
        kern_version: 0,
        prog_flags: 0,
        prog_name,
        prog_ifindex: 0,
        expected_attach_type: BPF_TRACE_UPROBE_MULTI,
    };
    if let Ok(fd) = bpf(BPF_PROG_LOAD, &attributes) {
        return Ok(MultiProgram(fd));
    }
    // Once more with a log, which costs memory.
    (attributes.log_level, attributes.log_size, attributes.log_buf) = (1, LOG_BYTES as u32, log.as_mut_ptr() as u64);
    match bpf(BPF_PROG_LOAD, &attributes) {
        Ok(fd) => Ok(MultiProgram(fd)),
        Err(source) => {
            let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
            let text = String::from_utf8_lossy(log.get(..end).unwrap_or_default());
            let last: Vec<&str> = text.lines().rev().filter(|line| !line.is_empty()).take(3).collect();
            let log = if last.is_empty() { String::new() } else { format!(": {}", last.join(" / ")) };
            Err(MultiError::Load { name, log, source })
        }
    }
}

/// Attaches at these offsets of the file; at the returns of the functions there, if `is_return`. `pid` 0: in all processes.
pub fn attach(program: &MultiProgram, file: &Path, offsets: &[u64], is_return: bool, pid: u32) -> io::Result<MultiLink> {
    let path = CString::new(file.as_os_str().as_bytes()).map_err(io::Error::other)?;
    let attributes = LinkAttributes {
        prog_fd: descriptor(&program.0),
        target_fd: 0,
        attach_type: BPF_TRACE_UPROBE_MULTI,
        flags: 0,
        path: path.as_ptr() as u64,
        offsets: offsets.as_ptr() as u64,
        ref_ctr_offsets: 0,
        cookies: 0,
        count: u32::try_from(offsets.len()).unwrap_or(u32::MAX),
        multi_flags: if is_return { BPF_F_UPROBE_MULTI_RETURN } else { 0 },
        pid,
        pad: 0,
    };
    bpf(BPF_LINK_CREATE, &attributes).map(MultiLink)
}

fn descriptor(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().cast_unsigned()
}
