//! Loads the eBPF program, verifies its offsets and attaches it. Nothing is pinned: however the agent ends, the kernel drops programs
//! and maps with its file descriptors.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::path::Path;

use aya::maps::{Array, PerCpuArray, RingBuf};
use aya::programs::{RawTracePoint, RawTracePointRunOptions, TestRun as _};
use aya::{Btf as KernelTypes, Ebpf, EbpfLoader, Endianness};
use sampler_common::{Offsets, kind, self_check};
use sampler_core::observation::ProcessSeen;

use super::btf::{Btf, BtfError};
use super::misses::{Misses, MissesError};
use super::refusal::Remedy;
use super::rings::Rings;
use super::tasks::TasksError;
use super::{KernelError, OBJECT, tasks};
use crate::allocator;
use crate::config::MIN_KERNEL_RING_BYTES;
use crate::health::Lost;

/// Programs, named after their tracepoints, each with the kind of event that it reports.
const PROGRAMS: [(&str, u32); kind::COUNT as usize] = [
    ("cgroup_mkdir", kind::MKDIR),
    ("cgroup_rmdir", kind::RMDIR),
    ("cgroup_rename", kind::RENAME),
    ("cgroup_attach_task", kind::ATTACH),
    ("sched_process_fork", kind::FORK),
    ("sched_process_exec", kind::EXEC),
    ("sched_process_exit", kind::EXIT),
];

/// The attached program; dropping it detaches.
pub struct Program {
    ebpf: Ebpf,
    v1_hierarchy: Option<u32>,
    pub rings: Rings,
    lost: PerCpuArray<aya::maps::MapData, u64>,
    misses: Misses,
}

impl Program {
    /// Every living process, from the task iterator.
    pub fn tasks(&mut self) -> Result<Vec<ProcessSeen>, TasksError> {
        tasks::read(&mut self.ebpf, self.v1_hierarchy)
    }

    /// Events not delivered so far, per kind: the ring was full, a field could not be read, or the kernel skipped the program. If the
    /// skip counts cannot be read, returns the other losses and the error.
    pub fn lost(&self) -> (Lost, Option<MissesError>) {
        let counted = |k| self.lost.get(&(k as u32), 0).map_or(0, |per_cpu| per_cpu.iter().sum());
        let mut lost = Lost { of_kind: std::array::from_fn(counted), skipped: 0 };
        match self.misses.read() {
            Ok(missed) => {
                lost.of_kind.iter_mut().zip(missed).for_each(|(lost, missed)| *lost += missed);
                lost.skipped = missed.iter().sum();
                (lost, None)
            }
            Err(error) => (lost, Some(error)),
        }
    }
}

fn offsets(v1: Option<(&str, u32)>, path: &Path) -> Result<Offsets, BtfError> {
    let bytes = std::fs::read(path).map_err(|source| BtfError::Read { path: path.to_owned(), source })?;
    let btf = Btf::parse(&bytes)?;
    let v1_subsys_index = match v1 {
        Some((name, _)) => btf.enum_value("cgroup_subsys_id", &format!("{name}_cgrp_id"))?,
        None => u32::MAX,
    };
    Ok(Offsets {
        task_pid: btf.offset("task_struct", "pid")?,
        task_tgid: btf.offset("task_struct", "tgid")?,
        task_group_leader: btf.offset("task_struct", "group_leader")?,
        task_start_boottime: btf.offset("task_struct", "start_boottime")?,
        task_cgroups: btf.offset("task_struct", "cgroups")?,
        task_signal: btf.offset("task_struct", "signal")?,
        task_flags: btf.offset("task_struct", "flags")?,
        signal_live: btf.offset("signal_struct", "live")?,
        css_set_subsys: btf.offset("css_set", "subsys")?,
        css_set_dfl_cgrp: btf.offset("css_set", "dfl_cgrp")?,
        css_cgroup: btf.offset("cgroup_subsys_state", "cgroup")?,
        css_parent: btf.offset("cgroup_subsys_state", "parent")?,
        cgroup_kn: btf.offset("cgroup", "kn")?,
        cgroup_root: btf.offset("cgroup", "root")?,
        kn_id: btf.offset("kernfs_node", "id")?,
        kn_name: btf.offset("kernfs_node", "name")?,
        root_hierarchy_id: btf.offset("cgroup_root", "hierarchy_id")?,
        v1_subsys_index,
        v1_hierarchy: v1.map_or(0, |(_, hierarchy)| hierarchy),
    })
}

fn refused<E: std::error::Error + Send + Sync + 'static>(what: impl Into<String>) -> impl FnOnce(E) -> KernelError {
    let what = what.into();
    move |source| KernelError::Refused { what, remedy: Remedy::Capabilities, source: Box::new(source) }
}

fn tracepoint<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut RawTracePoint, KernelError> {
    let program = ebpf.program_mut(name).ok_or(KernelError::Inconsistent(name))?;
    let program: &mut RawTracePoint = program.try_into().map_err(|_| KernelError::Inconsistent(name))?;
    program.load().map_err(refused(format!("load the eBPF program `{name}`")))?;
    Ok(program)
}

/// `v1`: the controller name and id of the v1 hierarchy to follow in addition to v2. The ring of process events has `ring_bytes`.
pub fn load(v1: Option<(&str, u32)>, btf: &Path, ring_bytes: u32) -> Result<Program, KernelError> {
    let object = OBJECT.ok_or(KernelError::NoObject)?;
    let offsets = offsets(v1, btf)?;
    let level = aya_log::Level::Info as u8;
    let types = KernelTypes::parse_file(btf, Endianness::default()).map_err(refused("have its BTF parsed"))?;
    let mut ebpf = EbpfLoader::new()
        .btf(Some(&types))
        .override_global("OFFSETS", &offsets, true)
        .override_global(aya_log::LEVEL, &level, false)
        .map_max_entries("CGROUP_EVENTS", (ring_bytes / 2).max(MIN_KERNEL_RING_BYTES))
        .map_max_entries("PROCESS_EVENTS", ring_bytes)
        .load(object)
        .map_err(refused("load the eBPF object"))?;
    check(&mut ebpf)?;
    tasks::load(&mut ebpf, &types).map_err(refused("load the eBPF program `tasks`"))?;
    for (name, _) in PROGRAMS {
        tracepoint(&mut ebpf, name)?.attach(name).map_err(refused(format!("attach to the tracepoint {name}")))?;
    }
    let mut ring = |name| {
        let map = ebpf.take_map(name).ok_or(KernelError::Inconsistent(name))?;
        RingBuf::try_from(map).map_err(refused(format!("open the ring {name}")))
    };
    let rings = Rings::new(ring("CGROUP_EVENTS")?, ring("PROCESS_EVENTS")?, v1.map(|(_, id)| id));
    let lost = ebpf.take_map("LOST").ok_or(KernelError::Inconsistent("LOST"))?;
    let lost = PerCpuArray::try_from(lost).map_err(refused("open the map LOST"))?;
    let misses = misses(&ebpf)?;
    log_loaded(&ebpf, &[]);
    drop(types);
    // The parsed BTF is by far the largest allocation of this process.
    allocator::trim();
    Ok(Program { ebpf, v1_hierarchy: v1.map(|(_, id)| id), rings, lost, misses })
}

/// Logs the kernel's number of each loaded program, and of `others`, for `cargo xtask matrix`.
pub fn log_loaded(ebpf: &Ebpf, others: &[(&str, BorrowedFd<'_>)]) {
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    // Those that are not loaded have no descriptor.
    let loaded = ebpf.programs().filter_map(|(name, program)| Some((name, program.fd().ok()?.as_fd())));
    for (name, fd) in loaded.chain(others.iter().copied()) {
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).unwrap_or_default();
        let id = info.lines().find_map(|line| line.strip_prefix("prog_id:")).map_or("unknown", str::trim);
        tracing::debug!("program {name} is loaded with id {id}");
    }
}

fn misses(ebpf: &Ebpf) -> Result<Misses, KernelError> {
    let fd = |(name, kind): (&'static str, u32)| -> Result<(u32, BorrowedFd<'_>), KernelError> {
        let program = ebpf.program(name).ok_or(KernelError::Inconsistent(name))?;
        Ok((kind, program.fd().map_err(refused(format!("provide the descriptor of the eBPF program `{name}`")))?.as_fd()))
    };
    let programs = PROGRAMS.into_iter().map(fd).collect::<Result<Vec<_>, _>>()?;
    let misses = Misses::open(programs.into_iter())?;
    if !misses.counted()? {
        tracing::info!("this kernel does not count skipped eBPF programs; Linux 5.12 and newer do");
    }
    Ok(misses)
}

/// Runs the self-check program once in this process. aya-log reports the result as text, a map as bits.
fn check(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    let mut logger = aya_log::EbpfLogger::init(ebpf).map_err(refused("open the log ring"))?;
    tracepoint(ebpf, "self_check")?
        .test_run(RawTracePointRunOptions::new())
        .map_err(refused("run the self-check, which requires Linux 5.10"))?;
    logger.flush();
    let map = ebpf.map("SELF_CHECK").ok_or(KernelError::Inconsistent("SELF_CHECK"))?;
    let map: Array<_, u32> = Array::try_from(map).map_err(refused("open the map SELF_CHECK"))?;
    match map.get(&0, 0).map_err(refused("read the map SELF_CHECK"))? {
        self_check::RAN => Ok(()),
        other => Err(KernelError::SelfCheck(other)),
    }
}
