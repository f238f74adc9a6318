//! Hooks of cgroup mkdir, rmdir and rename, in every hierarchy.

use aya_ebpf::{
    helpers::{bpf_ktime_get_boot_ns, generated::bpf_probe_read_kernel_str},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use sampler_common::{CgroupEvent, NAME_BYTES, kind};

use crate::{
    maps::{CGROUP_EVENTS, OFFSETS, lost},
    read::{Kernel, cgroup_id, field},
};

#[inline(always)]
fn report(kind: u32, cgroup: Kernel) -> i32 {
    if try_report(kind, cgroup).is_err() {
        lost(kind);
    }
    0
}

#[inline(always)]
fn try_report(kind: u32, cgroup: Kernel) -> Result<(), i32> {
    let o = OFFSETS.load();
    let kn: Kernel = field(cgroup, o.cgroup_kn)?;
    let id: u64 = field(kn, o.kn_id)?;
    let name: Kernel = field(kn, o.kn_name)?;
    let root: Kernel = field(cgroup, o.cgroup_root)?;
    let hierarchy: u32 = field(root, o.root_hierarchy_id)?;
    // `cgroup.self` is the first member of struct cgroup; its `parent` is the css of the parent.
    let parent_css: Kernel = field(cgroup, o.css_parent)?;
    let parent_id = if parent_css.is_null() { 0 } else { cgroup_id(field(parent_css, o.css_cgroup)?, &o)? };
    let Some(mut entry) = CGROUP_EVENTS.reserve::<CgroupEvent>(0) else {
        return Err(-1);
    };
    let e = entry.as_mut_ptr();
    // SAFETY: `e` points to reserved ring memory of this size; every field is written before the submit.
    unsafe {
        (*e).kind = kind;
        (*e).hierarchy = hierarchy;
        (*e).id = id;
        (*e).parent_id = parent_id;
        (*e).at_ns = bpf_ktime_get_boot_ns();
        (*e).pad = 0;
        let n = bpf_probe_read_kernel_str((&raw mut (*e).name).cast(), NAME_BYTES as u32, name.cast());
        (*e).name_len = if n > 0 { (n - 1) as u32 } else { 0 };
    }
    entry.submit(0);
    Ok(())
}

#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn cgroup_mkdir(ctx: RawTracePointContext) -> i32 {
    report(kind::MKDIR, ctx.arg(0))
}

#[raw_tracepoint(tracepoint = "cgroup_rmdir")]
pub fn cgroup_rmdir(ctx: RawTracePointContext) -> i32 {
    report(kind::RMDIR, ctx.arg(0))
}

#[raw_tracepoint(tracepoint = "cgroup_rename")]
pub fn cgroup_rename(ctx: RawTracePointContext) -> i32 {
    report(kind::RENAME, ctx.arg(0))
}
