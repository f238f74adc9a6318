//! A child that does nothing: born inside a cgroup, it waits to be killed.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, bail};

/// As in <linux/sched.h>; libc's constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const NS_LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
const PID_TRIES: u32 = 1000;

/// A directory on cgroup2.
pub struct Cgroup {
    pub name: String,
    directory: fs::File,
}

impl Cgroup {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .with_context(|| format!("--cgroup {name}: it must be a directory on cgroup2; make it with mkdir"))?;
        // SAFETY: all-zero is a valid statfs, and the descriptor is open.
        let kind = unsafe {
            let mut stat: libc::statfs = std::mem::zeroed();
            (libc::fstatfs(directory.as_raw_fd(), &raw mut stat) == 0).then_some(stat.f_type)
        };
        if kind != Some(libc::CGROUP2_SUPER_MAGIC) {
            bail!("--cgroup {name}: it must be a directory on cgroup2; `findmnt -t cgroup2` says where that is mounted");
        }
        Ok(Self { name, directory })
    }
}

/// A process that only waits to be killed, which is done at the latest when this is dropped.
pub struct Child {
    pub pid: u32,
    pub pidfd: OwnedFd,
    reaped: bool,
}

impl Child {
    /// It holds these files open.
    pub fn start(cgroup: &Cgroup, holds: &[CString]) -> anyhow::Result<Self> {
        let parent = std::process::id() as libc::pid_t;
        let mut pidfd: libc::c_int = -1;
        // SAFETY: integers: all-zero is valid.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.flags = CLONE_INTO_CGROUP | libc::CLONE_PIDFD as u64;
        how.pidfd = &raw mut pidfd as u64;
        how.exit_signal = libc::SIGCHLD as u64;
        how.cgroup = cgroup.directory.as_raw_fd() as u64;
        // SAFETY: no memory is shared and the stack is copied, as by fork; the child of this one thread calls only `wait_for_the_end`.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of::<libc::clone_args>()) };
        match pid {
            0 => wait_for_the_end(parent, holds),
            // SAFETY: a new descriptor that nobody else owns.
            1.. => Ok(Self { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, reaped: false }),
            _ => Err(io::Error::last_os_error()).with_context(|| format!("cannot start a process in {}", cgroup.name)),
        }
    }

    /// With this pid, which must be free. A child that got another one is killed and reaped at once.
    pub fn start_as(pid: u32, cgroup: &Cgroup, holds: &[CString]) -> anyhow::Result<Self> {
        for _ in 0..PID_TRIES {
            fs::write(NS_LAST_PID, (pid - 1).to_string())
                .with_context(|| format!("--reuse-pid: {NS_LAST_PID}: be root, on a kernel with CONFIG_CHECKPOINT_RESTORE"))?;
            let child = Child::start(cgroup, holds)?;
            if child.pid == pid {
                return Ok(child);
            }
        }
        bail!("--reuse-pid: in {PID_TRIES} tries no process got pid {pid}, another one must have it; run it again");
    }

    pub fn kill(&self) -> io::Result<()> {
        let (fd, no_info) = (self.pidfd.as_raw_fd(), std::ptr::null::<libc::siginfo_t>());
        // SAFETY: an open pidfd; no siginfo is given.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, libc::SIGKILL, no_info, 0) };
        if sent == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    pub fn reap(&mut self) -> io::Result<()> {
        let fd = self.pidfd.as_raw_fd() as libc::id_t;
        // SAFETY: integers and pointers: all-zero is valid.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        // SAFETY: an open pidfd and a siginfo_t that the call may fill.
        while unsafe { libc::waitid(libc::P_PIDFD, fd, &raw mut info, libc::WEXITED) } != 0 {
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        self.reaped = true;
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.reaped && self.kill().is_ok() {
            let _ = self.reap();
        }
    }
}

/// All that a child does. It is a copy of one thread of its parent: only async-signal-safe calls, nothing is allocated or returned to.
fn wait_for_the_end(parent: libc::pid_t, holds: &[CString]) -> ! {
    // SAFETY: system calls on numbers and on strings that were made before the fork.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        // Who died before that sends no signal.
        if libc::getppid() != parent {
            libc::_exit(0);
        }
        // The parent's pipes must end with the parent.
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
        for file in holds {
            libc::open(file.as_ptr(), libc::O_RDONLY);
        }
        loop {
            libc::pause();
        }
    }
}
