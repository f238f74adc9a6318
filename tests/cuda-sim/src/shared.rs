//! A GPU's schedule in a file that processes map shared, and the lock on it.
//!
//! The lock is a record lock of POSIX: it belongs to a process, the kernel releases it when the process ends in any way, and a forked child
//! neither inherits it nor releases it. Threads of one process exclude each other by a mutex. A writer that is killed inside leaves at most
//! one slice half recorded: every step of the schedule is valid by itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::error::{Error, at};
use crate::schedule::{DEFAULT_SLICE_NS, Schedule};

/// Changes with the layout of the file.
const LAYOUT: u64 = 0x6375_6461_0000_0001;

/// Pause before another attempt after EDEADLK.
const DEADLOCK_PAUSE: Duration = Duration::from_micros(50);

pub struct Shared {
    path: PathBuf,
    file: File,
    schedule: NonNull<Schedule>,
    threads: Mutex<()>,
}

// SAFETY: the schedule is reached only through `Locked`, which holds the mutex and the record lock.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Creates the file, or changes the slice of an existing one.
    pub fn create(path: &Path, slice_ns: Option<u64>) -> Result<(), Error> {
        let shared = Self::map(path, OpenOptions::new().read(true).write(true).create(true).truncate(false))?;
        let mut schedule = shared.lock()?;
        if schedule.layout == 0 {
            (schedule.layout, schedule.slice_ns) = (LAYOUT, DEFAULT_SLICE_NS);
        }
        if let Some(slice_ns) = slice_ns {
            schedule.slice_ns = slice_ns.max(1);
        }
        shared.checked(&schedule)
    }

    pub fn open(path: &Path) -> Result<Self, Error> {
        let shared = Self::map(path, OpenOptions::new().read(true).write(true))?;
        let checked = shared.lock().and_then(|schedule| shared.checked(&schedule));
        checked.map(|()| shared)
    }

    fn checked(&self, schedule: &Schedule) -> Result<(), Error> {
        if schedule.layout == LAYOUT { Ok(()) } else { Err(Error::Layout { path: self.path.clone() }) }
    }

    fn map(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let file = options.open(path).map_err(at(path, "open"))?;
        let bytes = size_of::<Schedule>();
        if file.metadata().map_err(at(path, "read"))?.len() < bytes as u64 {
            // New bytes are zero, which is a valid schedule.
            file.set_len(bytes as u64).map_err(at(path, "extend"))?;
        }
        let (read_write, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a new mapping of an open file that is at least as long.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, read_write, libc::MAP_SHARED, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(at(path, "map")(io::Error::last_os_error()));
        }
        let schedule = NonNull::new(address.cast()).ok_or_else(|| at(path, "map")(io::ErrorKind::OutOfMemory.into()))?;
        Ok(Self { path: path.to_owned(), file, schedule, threads: Mutex::new(()) })
    }

    pub fn lock(&self) -> Result<Locked<'_>, Error> {
        let threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        self.record_lock(libc::F_WRLCK).map_err(at(&self.path, "lock"))?;
        Ok(Locked { shared: self, _threads: threads })
    }

    fn record_lock(&self, kind: libc::c_int) -> io::Result<()> {
        // SAFETY: integers: all-zero is valid, and means the whole file.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence) = (kind as libc::c_short, libc::SEEK_SET as libc::c_short);
        loop {
            // SAFETY: an open descriptor and a lock that lives during the call.
            if unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_SETLKW, &raw const lock) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // The kernel sees a cycle of processes, but each thread holds one lock at most and releases it without another.
                Some(libc::EDEADLK) => std::thread::sleep(DEADLOCK_PAUSE),
                _ => return Err(error),
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size, and nothing borrows it any more.
        unsafe { libc::munmap(self.schedule.as_ptr().cast(), size_of::<Schedule>()) };
    }
}

/// The schedule, of this thread of this process alone.
pub struct Locked<'a> {
    shared: &'a Shared,
    _threads: MutexGuard<'a, ()>,
}

impl Deref for Locked<'_> {
    type Target = Schedule;

    fn deref(&self) -> &Schedule {
        // SAFETY: the mapping is valid for a schedule, and both locks are held.
        unsafe { self.shared.schedule.as_ref() }
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Schedule {
        // SAFETY: as above, and this borrow is unique.
        unsafe { self.shared.schedule.clone().as_mut() }
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.shared.record_lock(libc::F_UNLCK) {
            eprintln!("cuda-sim: {}: cannot unlock: {error}", self.shared.path.display());
        }
    }
}
