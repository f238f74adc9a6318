//! A child that only waits to be killed: started inside a cgroup, or launched into one as container runtimes do.

use std::ffi::CString;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};

/// As in <linux/sched.h>; libc's constant does not fit its type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const NS_LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";
const PID_TRIES: u32 = 1000;

/// The hidden verb that a launched child runs.
pub const REST: &std::ffi::CStr = c"rest";

/// A directory on cgroup2, or, if processes are moved to it, on a cgroup v1 hierarchy.
pub struct Cgroup {
    pub name: String,
    directory: fs::File,
}

impl Cgroup {
    /// `v1`: whether a directory on cgroup v1 is accepted, too.
    pub fn open(path: &Path, v1: bool) -> anyhow::Result<Self> {
        let name = path.display().to_string();
        let directory = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY)
            .open(path)
            .with_context(|| format!("--cgroup {name}: it must be a directory on cgroup2; create it with mkdir"))?;
        // SAFETY: all-zero is a valid statfs, and the descriptor is open.
        let kind = unsafe {
            let mut stat: libc::statfs = std::mem::zeroed();
            (libc::fstatfs(directory.as_raw_fd(), &raw mut stat) == 0).then_some(stat.f_type)
        };
        let fits = |kind| kind == libc::CGROUP2_SUPER_MAGIC || v1 && kind == libc::CGROUP_SUPER_MAGIC;
        if !kind.is_some_and(fits) {
            bail!(
                "--cgroup {name}: it must be a directory on cgroup2, or with --launch on cgroup v1; \
                 `findmnt -t cgroup2,cgroup` lists their mount points"
            );
        }
        Ok(Self { name, directory })
    }

    fn attach(&self, pid: u32) -> anyhow::Result<()> {
        let procs = Path::new(&self.name).join("cgroup.procs");
        fs::write(&procs, pid.to_string()).with_context(|| format!("{}: cannot move process {pid} there", procs.display()))
    }
}

/// A process that only waits to be killed; it is killed at the latest when this is dropped.
pub struct Child {
    pub pid: u32,
    pub pidfd: OwnedFd,
    reaped: bool,
}

impl Child {
    /// Starts a process inside the cgroup that holds these files open.
    pub fn start(cgroup: &Cgroup, holds: &[CString]) -> anyhow::Result<Self> {
        let parent = std::process::id() as libc::pid_t;
        let child = Self::fork(Some(cgroup)).with_context(|| format!("cannot start a process in {}", cgroup.name))?;
        Ok(child.unwrap_or_else(|| wait_for_the_end(parent, holds)))
    }

    /// Launches as container runtimes do: forks in this program's cgroup, moves the child to `cgroup` by writing `cgroup.procs`, then
    /// execs. `held` passes between fork and exec, half of it before the move. The child has called exec when this returns.
    pub fn launch(cgroup: &Cgroup, held: Duration, holds: &[CString]) -> anyhow::Result<Self> {
        let parent = std::process::id() as libc::pid_t;
        let (gate, mut open) = io::pipe()?;
        let (mut status, report) = io::pipe()?;
        let (gate_fd, report_fd) = (gate.as_raw_fd(), report.as_raw_fd());
        let child =
            Self::fork(None).context("cannot fork")?.unwrap_or_else(|| exec_when_released(parent, gate_fd, report_fd, holds));
        drop(report);
        std::thread::sleep(held / 2);
        cgroup.attach(child.pid)?;
        std::thread::sleep(held / 2);
        open.write_all(b"x")?;
        // The exec closes the child's end.
        let mut failed = Vec::new();
        status.read_to_end(&mut failed)?;
        if !failed.is_empty() {
            bail!("process {} in {} cannot exec this program; is /proc mounted?", child.pid, cgroup.name);
        }
        Ok(child)
    }

    /// Returns `None` in the child. The child is a copy of this one thread: it makes only async-signal-safe calls and does not allocate.
    fn fork(cgroup: Option<&Cgroup>) -> io::Result<Option<Self>> {
        let mut pidfd: libc::c_int = -1;
        // SAFETY: integers: all-zero is valid.
        let mut how: libc::clone_args = unsafe { std::mem::zeroed() };
        how.flags = libc::CLONE_PIDFD as u64;
        how.pidfd = &raw mut pidfd as u64;
        how.exit_signal = libc::SIGCHLD as u64;
        if let Some(cgroup) = cgroup {
            how.flags |= CLONE_INTO_CGROUP;
            how.cgroup = cgroup.directory.as_raw_fd() as u64;
        }
        // SAFETY: no memory is shared and the stack is copied, as by fork; the child of this one thread behaves as described above.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut how, size_of::<libc::clone_args>()) };
        match pid {
            0 => Ok(None),
            // SAFETY: a new descriptor without another owner.
            1.. => Ok(Some(Self { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) }, reaped: false })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Starts a process with this pid, which must be free. A child that got another pid is killed and reaped at once.
    pub fn start_as(pid: u32, cgroup: &Cgroup, holds: &[CString]) -> anyhow::Result<Self> {
        for _ in 0..PID_TRIES {
            fs::write(NS_LAST_PID, (pid - 1).to_string()).with_context(|| {
                format!("--reuse-pid: {NS_LAST_PID}: requires root and a kernel with CONFIG_CHECKPOINT_RESTORE")
            })?;
            let child = Child::start(cgroup, holds)?;
            if child.pid == pid {
                return Ok(child);
            }
        }
        bail!(
            "--reuse-pid: in {PID_TRIES} tries no process got pid {pid}, another process probably uses it; run the command again"
        );
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

/// The process dies with its parent, also after an exec.
fn die_with(parent: libc::pid_t) {
    // SAFETY: system calls on numbers only.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong);
        // A parent that died before sends no signal.
        if libc::getppid() != parent {
            libc::_exit(0);
        }
    }
}

/// Opens these files for the life of the process, also across an exec.
fn hold(files: &[CString]) {
    for file in files {
        // SAFETY: a string that was allocated before the fork.
        unsafe { libc::open(file.as_ptr(), libc::O_RDONLY) };
    }
}

/// The body of a child.
fn wait_for_the_end(parent: libc::pid_t, holds: &[CString]) -> ! {
    die_with(parent);
    // SAFETY: a system call on numbers only. The parent's pipes must end with the parent.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    hold(holds);
    rest()
}

/// Waits until it is killed.
pub fn rest() -> ! {
    loop {
        // SAFETY: takes nothing.
        unsafe { libc::pause() };
    }
}

/// Waits for a byte at the gate, then execs this program's verb [`REST`]. Writes a byte to `report` if that fails.
fn exec_when_released(parent: libc::pid_t, gate: libc::c_int, report: libc::c_int, holds: &[CString]) -> ! {
    die_with(parent);
    let mut byte = 0u8;
    // SAFETY: system calls on open descriptors and numbers. The parent's pipes must end with the parent.
    unsafe {
        libc::read(gate, (&raw mut byte).cast(), 1);
        libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    }
    hold(holds);
    let (program, none) = (c"/proc/self/exe".as_ptr(), std::ptr::null());
    // SAFETY: an open descriptor, and NUL-terminated strings in arrays that end with null.
    unsafe {
        libc::execve(program, [program, REST.as_ptr(), none].as_ptr(), [none].as_ptr());
        libc::write(report, (&raw const byte).cast(), 1);
        libc::_exit(127)
    }
}
