//! The kernel's side: offsets, load and attach, ring readers, scans, and what to do where kernel programs cannot run.

mod btf;
pub mod cgroupfs;
pub mod layout;
mod load;
mod misses;
pub mod pid_namespace;
pub mod probe;
pub mod proc;
pub mod rings;
pub mod scan;
mod tasks;
pub mod watch;

pub use load::{Program, load};

#[cfg(ebpf_object)]
pub(crate) static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sampler-ebpf.o")));
#[cfg(not(ebpf_object))]
pub(crate) static OBJECT: Option<&[u8]> = None;

use std::os::fd::{AsFd as _, BorrowedFd};

use thiserror::Error;

/// Why kernel tracking is not there. Each names its remedy; the agent then runs degraded and says so.
#[derive(Debug, Error)]
pub enum KernelError {
    #[error("this build carries no kernel program; build it with `cargo xtask build`")]
    NoObject,
    #[error("cannot resolve kernel field offsets; use a kernel built with CONFIG_DEBUG_INFO_BTF")]
    Btf(#[from] btf::BtfError),
    #[error("the kernel refused to {what}; run as root or with CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN before 5.8)")]
    Refused { what: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "the kernel program's self-check failed (mask {0:#x}): its offsets do not fit this kernel; please report the kernel version"
    )]
    SelfCheck(u32),
    #[error("the kernel program lacks `{0}`: the build is inconsistent, run `cargo xtask build`")]
    Inconsistent(&'static str),
    #[error(transparent)]
    Misses(#[from] misses::MissesError),
    #[error(transparent)]
    Watch(watch::WatchError),
}

/// How processes and cgroups are followed; names as in `gpu_sampler_kernel_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    RawTracepoint,
    Inotify,
    Procfs,
}

impl Mode {
    pub fn named(name: &str) -> Option<Mode> {
        [Mode::RawTracepoint, Mode::Inotify, Mode::Procfs].into_iter().find(|mode| mode.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Mode::RawTracepoint => "raw_tracepoint",
            Mode::Inotify => "inotify",
            Mode::Procfs => "procfs",
        }
    }

    /// What this mode cannot know; blank for the one that knows everything.
    pub fn gives_up(self) -> &'static str {
        match self {
            Mode::RawTracepoint => "",
            Mode::Inotify => {
                "processes are looked up in /proc when the driver names them: one that has ended by then is unattributed \
                 (pid_unknown), and a move to another cgroup before that is not seen"
            }
            Mode::Procfs => {
                "cgroups and processes are looked at once a second and when the driver names them: a container that lives shorter \
                 may never be seen, a process that has ended by then is unattributed (pid_unknown), and a move to another cgroup \
                 before that is not seen"
            }
        }
    }
}

/// The mode that runs, with what it runs on.
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

    /// What to wait for.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let fds = match self {
            Tracker::RawTracepoint(program) => [Some(program.rings.cgroups.as_fd()), Some(program.rings.processes.as_fd())],
            Tracker::Inotify(watch) => [Some(watch.fd()), None],
            Tracker::Procfs => [None, None],
        };
        fds.into_iter().flatten()
    }
}
