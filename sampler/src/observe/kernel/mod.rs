//! Kernel tracking: field offsets, loading and attaching, ring readers, scans, and fallbacks where eBPF programs cannot run.

mod btf;
pub mod cgroup_id;
pub mod cgroupfs;
pub mod layout;
mod load;
mod misses;
pub mod pid_namespace;
pub mod probe;
pub mod proc;
pub mod refusal;
pub mod rings;
pub mod scan;
mod tasks;
pub mod watch;

pub use load::{Program, load, log_loaded};

#[cfg(ebpf_object)]
pub(crate) static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sampler-ebpf.o")));
#[cfg(not(ebpf_object))]
pub(crate) static OBJECT: Option<&[u8]> = None;

use std::os::fd::{AsFd as _, BorrowedFd};

use thiserror::Error;

/// Why kernel tracking is not available. Each message names the remedy; the agent then runs degraded and reports it.
#[derive(Debug, Error)]
pub enum KernelError {
    #[error("this build does not contain the eBPF program; build it with `cargo xtask build`")]
    NoObject,
    #[error("cannot resolve kernel field offsets; use a kernel built with CONFIG_DEBUG_INFO_BTF")]
    Btf(#[from] btf::BtfError),
    #[error("the kernel refused to {what}; {remedy}")]
    Refused { what: String, remedy: refusal::Remedy, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the self-check of the eBPF program could not read kernel memory; {}", refusal::Remedy::Lockdown)]
    Lockdown,
    #[error(
        "the self-check of the eBPF program failed (mask {0:#x}): its offsets do not match this kernel; please report the kernel version"
    )]
    SelfCheck(u32),
    #[error("the eBPF program does not contain `{0}`: the build is inconsistent, run `cargo xtask build`")]
    Inconsistent(&'static str),
    #[error(transparent)]
    Misses(#[from] misses::MissesError),
    #[error(transparent)]
    Watch(watch::WatchError),
}

/// How processes and cgroups are tracked; names as in `gpu_sampler_kernel_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::EnumString, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Mode {
    RawTracepoint,
    Inotify,
    Procfs,
}

impl Mode {
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// What this mode cannot observe; empty for the mode without limitations.
    pub fn limitations(self) -> &'static str {
        match self {
            Mode::RawTracepoint => "",
            Mode::Inotify => {
                "processes are looked up in /proc when the driver reports them: a process that has exited by then is unattributed \
                 (pid_unknown), and an earlier move to another cgroup is not detected"
            }
            Mode::Procfs => {
                "cgroups and processes are scanned once a second and when the driver reports them: a container with a shorter \
                 lifetime may not be detected, a process that has exited by then is unattributed (pid_unknown), and an earlier move \
                 to another cgroup is not detected"
            }
        }
    }
}

/// The active mode, with its resources.
pub enum Tracker {
    RawTracepoint(Box<Program>),
    Inotify(watch::CgroupWatch),
    Procfs,
}

impl Tracker {
    pub fn mode(&self) -> Mode {
        match self {
            Tracker::RawTracepoint(_) => Mode::RawTracepoint,
            Tracker::Inotify(_) => Mode::Inotify,
            Tracker::Procfs => Mode::Procfs,
        }
    }

    /// The descriptors to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let fds = match self {
            Tracker::RawTracepoint(program) => [Some(program.rings.cgroups.as_fd()), Some(program.rings.processes.as_fd())],
            Tracker::Inotify(watch) => [Some(watch.fd()), None],
            Tracker::Procfs => [None, None],
        };
        fds.into_iter().flatten()
    }
}
