//! What the agent may do: the capabilities that it needs, and no system call that it never makes.
//!
//! Everything else is given up before the first thread starts, for the rest of its life: neither the driver's library nor a mistake of the
//! agent starts a program, loads a module, mounts or enters another namespace. That is not a sandbox for hostile code: who controls a
//! process with CAP_SYS_PTRACE can write to others through /proc, and as root to files of root. The needed capabilities were found by removing one at a
//! time; docs/security.md says what each is for.

use std::collections::BTreeMap;
use std::fmt;

use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule};

use crate::error::display_chain;

/// A capability that the agent uses, and what it cannot do without it.
pub struct NeededCapability {
    pub capability: Capability,
    pub without: &'static str,
}

const fn needed(capability: Capability, without: &'static str) -> NeededCapability {
    NeededCapability { capability, without }
}

pub const NEEDED: [NeededCapability; 5] = [
    needed(Capability::CAP_BPF, "kernel events: kernel mode inotify"),
    needed(Capability::CAP_PERFMON, "kernel events: kernel mode inotify"),
    needed(Capability::CAP_SYS_PTRACE, "namespaces, device nodes and environments of other users' processes"),
    needed(Capability::CAP_DAC_READ_SEARCH, "files of runtimes and the kubelet that belong to other users"),
    needed(Capability::CAP_SYS_RESOURCE, "memory for kernel events before Linux 5.11, and a higher limit of open files"),
];

/// Capabilities by number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CapabilitySet(u64);

impl CapabilitySet {
    const ALL: Self = Self(u64::MAX);

    fn insert(&mut self, capability: Capability) {
        self.0 |= 1 << capability.index();
    }

    fn contains(self, capability: Capability) -> bool {
        self.0 & (1 << capability.index()) != 0
    }
}

/// Names without their prefix, such as `bpf perfmon`.
impl fmt::Display for CapabilitySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = caps::all().into_iter().filter(|capability| self.contains(*capability)).map(|capability| {
            let name = capability.to_string();
            name.strip_prefix("CAP_").unwrap_or(&name).to_lowercase()
        });
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        f.write_str(&names.join(" "))
    }
}

/// The capabilities with these names. `Err` is a name that is not one.
pub fn kept<'a>(names: impl Iterator<Item = &'a str>) -> Result<CapabilitySet, String> {
    let mut set = CapabilitySet::default();
    for name in names {
        if name == "all" {
            return Ok(CapabilitySet::ALL);
        }
        let full = name.to_uppercase();
        let full = if full.starts_with("CAP_") { full } else { format!("CAP_{full}") };
        set.insert(full.parse::<Capability>().map_err(|_| name.to_owned())?);
    }
    Ok(set)
}

/// What [`restrict`] did.
#[derive(Debug)]
pub struct Restricted {
    pub capabilities: CapabilitySet,
    pub has_filter: bool,
    problems: Vec<String>,
}

impl Restricted {
    pub fn log(&self) {
        let (capabilities, seccomp) = (self.capabilities.to_string(), self.has_filter);
        tracing::info!(capabilities, seccomp, "privileges are restricted");
        for problem in &self.problems {
            tracing::warn!("some privileges are kept: {problem}");
        }
    }
}

/// Gives up what is not needed or kept, in this thread and those that it starts. What the kernel refuses is reported, not fatal.
pub fn restrict(kept: CapabilitySet, seccomp: bool) -> Restricted {
    let mut problems = Vec::new();
    if kept != CapabilitySet::ALL {
        drop_capabilities(kept, &mut problems);
    }
    let capabilities = present().unwrap_or_else(|error| {
        problems.push(format!("capabilities cannot be read: {}", display_chain(&error)));
        CapabilitySet::ALL
    });
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        problems.push(format!("no_new_privs cannot be set: {error}"));
    }
    let filtered = if seccomp { filter_system_calls() } else { Ok(()) };
    let has_filter = seccomp && filtered.is_ok();
    if let Err(error) = filtered {
        problems.push(format!("no seccomp filter: {}; --seccomp false omits it", display_chain(&*error)));
    }
    Restricted { capabilities, has_filter, problems }
}

/// Capabilities that the process has now.
fn present() -> Result<CapabilitySet, caps::errors::CapsError> {
    let mut set = CapabilitySet::default();
    caps::read(None, CapSet::Effective)?.into_iter().for_each(|capability| set.insert(capability));
    Ok(set)
}

/// Those of [`NEEDED`] that are missing. Not `CAP_SYS_RESOURCE`: where the kernel needs it, loading the program fails and says so.
/// `CAP_SYS_ADMIN` includes what the kernel later gave to `CAP_BPF` and `CAP_PERFMON`.
pub fn missing(present: CapabilitySet) -> impl Iterator<Item = &'static NeededCapability> {
    let is_bpf = |capability| matches!(capability, Capability::CAP_BPF | Capability::CAP_PERFMON);
    let has =
        move |capability| present.contains(capability) || (is_bpf(capability) && present.contains(Capability::CAP_SYS_ADMIN));
    let is_required = |needed: &&NeededCapability| needed.capability != Capability::CAP_SYS_RESOURCE;
    NEEDED.iter().filter(is_required).filter(move |needed| !has(needed.capability))
}

fn drop_capabilities(kept: CapabilitySet, problems: &mut Vec<String>) {
    let permitted = match caps::read(None, CapSet::Permitted) {
        Ok(permitted) => permitted,
        Err(error) => return problems.push(format!("all capabilities stay: {}", display_chain(&error))),
    };
    let mut wanted = kept;
    NEEDED.iter().for_each(|needed| wanted.insert(needed.capability));
    // Kernels before 5.8 and some engines do not know the two that it was divided into.
    if !permitted.contains(&Capability::CAP_BPF) || !permitted.contains(&Capability::CAP_PERFMON) {
        wanted.insert(Capability::CAP_SYS_ADMIN);
    }
    reduce_to(wanted, &permitted, problems);
}

/// Each step is tried, whatever the result of the others.
fn reduce_to(wanted: CapabilitySet, permitted: &CapsHashSet, problems: &mut Vec<String>) {
    let mut report = |what: &str, result: Result<(), caps::errors::CapsError>| {
        if let Err(error) = result {
            problems.push(format!("{what} capabilities stay: {}", display_chain(&error)));
        }
    };
    let remaining: CapsHashSet = permitted.iter().copied().filter(|capability| wanted.contains(*capability)).collect();
    // Without CAP_SETPCAP the bounding set stays; a process without other privileges gains nothing from it.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        let bounding = caps::runtime::thread_all_supported().into_iter().filter(|capability| !remaining.contains(capability));
        let dropped: Result<Vec<()>, _> = bounding.map(|capability| caps::drop(None, CapSet::Bounding, capability)).collect();
        report("bounding", dropped.map(drop));
    }
    if caps::runtime::ambient_set_supported().is_ok() {
        report("ambient", caps::clear(None, CapSet::Ambient));
    }
    report("inheritable", caps::set(None, CapSet::Inheritable, &CapsHashSet::new()));
    report("effective", caps::set(None, CapSet::Effective, &remaining));
    report("permitted", caps::set(None, CapSet::Permitted, &remaining));
}

/// The helper that makes sockets in network namespaces cannot give up what it does not need.
#[derive(Debug, thiserror::Error)]
#[error("the helper for network namespaces keeps privileges that it does not need: {0}")]
pub struct HelperError(String);

/// Gives up everything but entering network namespaces and making sockets, of a process with one thread. Unlike with [`restrict`], what the
/// kernel refuses is an error.
pub fn restrict_socket_helper(seccomp: bool) -> Result<(), HelperError> {
    let mut problems = Vec::new();
    let mut wanted = CapabilitySet::default();
    wanted.insert(Capability::CAP_SYS_ADMIN);
    match caps::read(None, CapSet::Permitted) {
        Ok(permitted) => reduce_to(wanted, &permitted, &mut problems),
        Err(error) => problems.push(format!("capabilities cannot be read: {}", display_chain(&error))),
    }
    if let Err(error) = rustix::thread::set_no_new_privs(true) {
        problems.push(format!("no_new_privs cannot be set: {error}"));
    }
    if seccomp && let Err(error) = allow_system_calls_of_helper() {
        problems.push(format!("no seccomp filter: {}; seccomp = false omits it", display_chain(&*error)));
    }
    if problems.is_empty() { Ok(()) } else { Err(HelperError(problems.join("; "))) }
}

/// What the helper may call: its messages, the calls that it exists for, and what memory, messages on standard error and the end of a
/// process need. All others fail with EPERM.
const OF_HELPER: &[libc::c_long] = &[
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_socket,
    libc::SYS_close,
    libc::SYS_write,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn allow_system_calls_of_helper() -> Result<(), Box<dyn std::error::Error>> {
    let mut rules: BTreeMap<_, _> = OF_HELPER.iter().map(|number| (*number, Vec::new())).collect();
    let network = u64::from(libc::CLONE_NEWNET.unsigned_abs());
    let enters_network = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, network)?;
    rules.insert(libc::SYS_setns, vec![SeccompRule::new(vec![enters_network])?]);
    let (arch, refused) = (std::env::consts::ARCH.try_into()?, SeccompAction::Errno(libc::EPERM.unsigned_abs()));
    let filter: BpfProgram = SeccompFilter::new(rules, refused, SeccompAction::Allow, arch)?.try_into()?;
    seccompiler::apply_filter(&filter)?;
    Ok(())
}

/// System calls that fail with EPERM: the agent starts no program, loads no module, mounts nothing, changes neither the clock nor another
/// process, and stays in its namespaces and its user.
const REFUSED: &[libc::c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_pidfd_getfd,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_quotactl_fd,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_quotactl,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_userfaultfd,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// The ABI of 32-bit pointers, which few kernels have: its numbers have this bit, and some calls have others in this range.
#[cfg(target_arch = "x86_64")]
const X32: libc::c_long = 0x4000_0000;
#[cfg(target_arch = "x86_64")]
const OWN_OF_X32: std::ops::RangeInclusive<libc::c_long> = 512..=547;

/// Flags of `clone` with which a new process is in new namespaces.
const NEW_NAMESPACES: [libc::c_int; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];

fn filter_system_calls() -> Result<(), Box<dyn std::error::Error>> {
    let refused = REFUSED.iter().copied();
    #[cfg(target_arch = "x86_64")]
    let refused = refused.chain(REFUSED.iter().copied().chain(OWN_OF_X32).map(|number| number | X32));
    let mut rules: BTreeMap<_, _> = refused.map(|number| (number, Vec::new())).collect();
    let with_flag = |flag: &libc::c_int| {
        let flag = u64::from(flag.unsigned_abs());
        let is_set = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(flag), flag)?;
        SeccompRule::new(vec![is_set])
    };
    rules.insert(libc::SYS_clone, NEW_NAMESPACES.iter().map(with_flag).collect::<Result<_, _>>()?);
    apply(rules, libc::EPERM)?;
    // Its flags are in memory, which a filter cannot read; the C library then uses clone.
    apply(BTreeMap::from([(libc::SYS_clone3, Vec::new())]), libc::ENOSYS)
}

fn apply(rules: BTreeMap<libc::c_long, Vec<SeccompRule>>, errno: libc::c_int) -> Result<(), Box<dyn std::error::Error>> {
    let (arch, errno) = (std::env::consts::ARCH.try_into()?, SeccompAction::Errno(errno.unsigned_abs()));
    let filter: BpfProgram = SeccompFilter::new(rules, SeccompAction::Allow, errno, arch)?.try_into()?;
    seccompiler::apply_filter(&filter)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_named_with_and_without_their_prefix() {
        let kept = |names: &[&str]| kept(names.iter().copied()).map(|set| set.to_string());
        assert_eq!(kept(&["sys_admin", "CAP_MKNOD"]), Ok("mknod sys_admin".into()));
        assert_eq!(kept(&[]), Ok(String::new()));
        assert_eq!(kept(&["bpf", "root"]), Err("root".into()));
        assert!(super::kept(["all"].into_iter()).unwrap().contains(Capability::CAP_SYS_BOOT));
    }

    #[test]
    fn sys_admin_stands_for_bpf_and_perfmon() {
        let missing = |names: &[&str]| {
            let set = kept(names.iter().copied()).unwrap();
            missing(set).map(|needed| needed.capability).collect::<Vec<_>>()
        };
        let others = ["sys_ptrace", "dac_read_search", "sys_resource"];
        assert_eq!(missing(&[&others[..], &["sys_admin"]].concat()), []);
        assert_eq!(missing(&[&others[..], &["bpf"]].concat()), [Capability::CAP_PERFMON]);
    }

    #[test]
    fn the_filter_of_the_helper_allows_sockets_and_no_files() {
        // Only this thread is restricted.
        let tried = std::thread::spawn(|| {
            allow_system_calls_of_helper().unwrap();
            let flags = rustix::net::SocketFlags::CLOEXEC;
            let socket = rustix::net::socket_with(rustix::net::AddressFamily::INET, rustix::net::SocketType::STREAM, flags, None)
                .map(drop);
            (socket, std::fs::File::open("/dev/null").map(drop).map_err(|error| error.kind()))
        });
        assert_eq!(tried.join().unwrap(), (Ok(()), Err(std::io::ErrorKind::PermissionDenied)));
    }

    #[test]
    fn a_restricted_thread_starts_no_program() {
        // Only this thread is restricted.
        let restricted = std::thread::spawn(|| {
            let restricted = restrict(CapabilitySet::ALL, true);
            (restricted.has_filter, std::process::Command::new("/bin/true").status())
        });
        let (has_filter, started) = restricted.join().unwrap();
        assert!(has_filter);
        assert_eq!(started.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        assert!(std::process::Command::new("/bin/true").status().unwrap().success());
    }
}
