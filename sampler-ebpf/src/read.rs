//! Reads kernel structures through the offsets that user space resolved.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use sampler_common::Offsets;

/// A kernel address; only ever passed to `bpf_probe_read_kernel`.
pub type Kernel = *const u8;

#[inline(always)]
pub fn field<T>(base: Kernel, offset: u32) -> Result<T, i32> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(base.wrapping_add(offset as usize).cast::<T>()) }
}

#[inline(always)]
pub fn cgroup_id(cgroup: Kernel, o: &Offsets) -> Result<u64, i32> {
    field(field(cgroup, o.cgroup_kn)?, o.kn_id)
}

/// The task's cgroup ids in v2 and in the followed v1 hierarchy (0 for none).
#[inline(always)]
pub fn task_cgroups(task: Kernel, o: &Offsets) -> Result<(u64, u64), i32> {
    let css_set: Kernel = field(task, o.task_cgroups)?;
    let v2 = cgroup_id(field(css_set, o.css_set_dfl_cgrp)?, o)?;
    let mut v1 = 0;
    if o.v1_subsys_index != u32::MAX {
        let css: Kernel = field(css_set, o.css_set_subsys + 8 * o.v1_subsys_index)?;
        v1 = cgroup_id(field(css, o.css_cgroup)?, o)?;
    }
    Ok((v2, v1))
}
