//! Why the kernel refuses eBPF programs, from what it says about itself: capabilities are the reason only where they are missing.

use std::fmt;
use std::fs;
use std::path::Path;

use super::KernelError;

/// The maps of the default settings, with room for larger rings.
const LOCKED_BYTES: u64 = 16 << 20;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// What has to change so that the kernel accepts the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    Capabilities,
    Lockdown,
    /// `RLIMIT_MEMLOCK`, in bytes.
    MemoryLock(u64),
    /// None of the known reasons applies.
    Unknown,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capabilities => write!(f, "run as root or with CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN before 5.8)"),
            Self::Lockdown => write!(
                f,
                "kernel lockdown is `confidentiality`, which forbids every user, root included, to read kernel memory: boot with \
                 lockdown=integrity"
            ),
            Self::MemoryLock(bytes) => write!(
                f,
                "this kernel charges maps to RLIMIT_MEMLOCK, which is {} KiB: raise it to {} MiB (LimitMEMLOCK= of a unit, --ulimit \
                 memlock= of a container), or grant CAP_SYS_RESOURCE",
                bytes >> 10,
                LOCKED_BYTES >> 20
            ),
            Self::Unknown => write!(f, "the required capabilities are present, so the cause is the error itself"),
        }
    }
}

/// The state of the machine that decides what a refusal means.
#[derive(Clone, Copy, Debug)]
struct Restrictions {
    confidential: bool,
    /// Effective capabilities.
    capabilities: u64,
    /// The soft limit; `None` if it is unlimited or unknown.
    memory_lock: Option<u64>,
    /// Maps are charged to RLIMIT_MEMLOCK, not to the cgroup: before 5.11.
    charges_memory_lock: bool,
}

impl Restrictions {
    fn read(procfs: &Path, sysfs: &Path) -> Self {
        // Where a file cannot be read, the reason that it would show is not known.
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        Self {
            confidential: text(&sysfs.join("kernel/security/lockdown")).contains("[confidentiality]"),
            capabilities: capabilities(&text(&procfs.join("self/status"))),
            memory_lock: memory_lock(&text(&procfs.join("self/limits"))),
            charges_memory_lock: charges_memory_lock(&text(&procfs.join("sys/kernel/osrelease"))),
        }
    }

    fn has(self, capability: u32) -> bool {
        self.capabilities >> capability & 1 == 1
    }

    fn remedy(self) -> Remedy {
        if self.confidential {
            return Remedy::Lockdown;
        }
        let is_capable = self.has(CAP_SYS_ADMIN) || self.has(CAP_BPF) && self.has(CAP_PERFMON);
        if !is_capable {
            return Remedy::Capabilities;
        }
        match self.memory_lock {
            Some(bytes) if self.charges_memory_lock && bytes < LOCKED_BYTES && !self.has(CAP_SYS_RESOURCE) => {
                Remedy::MemoryLock(bytes)
            }
            _ => Remedy::Unknown,
        }
    }
}

/// `CapEff:` of a process's status.
fn capabilities(status: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    value.and_then(|value| u64::from_str_radix(value.trim(), 16).ok()).unwrap_or(u64::MAX)
}

/// `Max locked memory  SOFT  HARD  bytes` of a process's limits.
fn memory_lock(limits: &str) -> Option<u64> {
    limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?.split_whitespace().next()?.parse().ok()
}

/// The only use of a version: it selects the words of a remedy, and nothing that is tried.
fn charges_memory_lock(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    matches!((numbers.next(), numbers.next()), (Some(major), Some(minor)) if (major, minor) < (5, 11))
}

/// Adds the remedy to an error of loading the program.
pub fn explain(error: KernelError, procfs: &Path, sysfs: &Path) -> KernelError {
    let remedy = Restrictions::read(procfs, sysfs).remedy();
    match error {
        KernelError::Refused { what, source, .. } => KernelError::Refused { what, remedy, source },
        // Recent kernels load the program, and its reads fail.
        KernelError::SelfCheck(_) if remedy == Remedy::Lockdown => KernelError::Lockdown,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;
    const TWO: u64 = 1 << CAP_BPF | 1 << CAP_PERFMON;

    #[test]
    fn the_reason_of_a_refusal_is_what_restricts_this_process() {
        for (confidential, capabilities, memory_lock, charges_memory_lock, expect) in [
            (false, 0, None, false, Remedy::Capabilities),
            (false, 1 << CAP_BPF, Some(65_536), true, Remedy::Capabilities),
            (false, TWO, Some(8 << 20), true, Remedy::MemoryLock(8 << 20)),
            (false, 1 << CAP_SYS_ADMIN, Some(65_536), true, Remedy::MemoryLock(65_536)),
            (false, TWO | 1 << CAP_SYS_RESOURCE, Some(65_536), true, Remedy::Unknown),
            (false, TWO, Some(16 << 20), true, Remedy::Unknown),
            (false, TWO, None, true, Remedy::Unknown),
            (false, TWO, Some(65_536), false, Remedy::Unknown),
            (true, ALL, None, false, Remedy::Lockdown),
            (true, 0, Some(65_536), true, Remedy::Lockdown),
        ] {
            let restrictions = Restrictions { confidential, capabilities, memory_lock, charges_memory_lock };
            assert_eq!(restrictions.remedy(), expect, "{restrictions:?}");
        }
    }

    #[test]
    fn restrictions_are_read_below_the_given_paths() {
        let dir = tempfile::tempdir().unwrap();
        let lockdown = |state: &str| {
            for (path, text) in [
                ("sys/kernel/security/lockdown", state),
                ("proc/self/status", "Name:\tx\nCapEff:\t000000c000000000\n"),
                ("proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax locked memory  65536  65536  bytes\n"),
                ("proc/sys/kernel/osrelease", "5.10.0-30-amd64\n"),
            ] {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let source = std::io::Error::from_raw_os_error(libc::EPERM);
            let refused = KernelError::Refused { what: "x".into(), remedy: Remedy::Unknown, source: Box::new(source) };
            let read = |error| explain(error, &dir.path().join("proc"), &dir.path().join("sys")).to_string();
            (read(refused), read(KernelError::SelfCheck(3)))
        };
        let (refused, failed) = lockdown("none [integrity] confidentiality\n");
        assert!(refused.contains("RLIMIT_MEMLOCK, which is 64 KiB") && !refused.contains("root"), "{refused}");
        assert!(failed.contains("mask 0x3"), "{failed}");
        let (refused, failed) = lockdown("none integrity [confidentiality]\n");
        assert!(refused.contains("lockdown=integrity") && !refused.contains("run as root"), "{refused}");
        assert!(failed.contains("lockdown=integrity"), "{failed}");
    }

    #[test]
    fn kernels_that_charge_maps_to_the_limit_are_recognized() {
        for (release, expect) in [
            ("5.10.0-30-amd64", true),
            ("4.18.0-553.el8_10.x86_64", true),
            ("5.11.0", false),
            ("6.1.0", false),
            ("", false),
            ("x", false),
        ] {
            assert_eq!(charges_memory_lock(release), expect, "{release:?}");
        }
    }
}
