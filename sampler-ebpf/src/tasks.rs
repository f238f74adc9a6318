//! Task iterator for scans: every living process with exact start time and cgroups, independent of any file system. Reading the iterator
//! runs the program.

use core::ffi::c_void;

use aya_ebpf::{bindings::seq_file, helpers::generated::bpf_seq_write};
use sampler_common::{Offsets, ProcessEvent, kind};

use crate::{
    maps::OFFSETS,
    process::describe,
    read::{Kernel, field},
};

/// `PF_EXITING` of `task_struct.flags`.
const EXITING: u32 = 4;

/// The used part of the kernel's `struct bpf_iter_meta`.
#[repr(C)]
pub struct Meta {
    seq: *mut seq_file,
}

/// The kernel's `struct bpf_iter__task`.
#[repr(C)]
pub struct Context {
    meta: *const Meta,
    task: *const c_void,
}

#[unsafe(no_mangle)]
#[unsafe(link_section = "iter/task")]
pub extern "C" fn tasks(ctx: *const Context) -> i32 {
    // SAFETY: the kernel passes a valid context; `task` is null in the last call.
    let (meta, task) = unsafe { ((*ctx).meta, (*ctx).task) };
    if task.is_null() {
        return 0;
    }
    if let Ok(Some(event)) = living(task.cast(), &OFFSETS.load()) {
        // SAFETY: the sequence file is that of the context; the record is complete and on this stack. When the file is full, the kernel
        // calls the program again for this task.
        unsafe { bpf_seq_write((*meta).seq, (&raw const event).cast_mut().cast(), size_of::<ProcessEvent>() as u32) };
    }
    0
}

/// One record for each thread group: that of the leader, or, if the leader has ended, one for each living thread.
#[inline(always)]
fn living(task: Kernel, o: &Offsets) -> Result<Option<ProcessEvent>, i32> {
    let flags: u32 = field(task, o.task_flags)?;
    if flags & EXITING != 0 {
        return Ok(None);
    }
    let pid: u32 = field(task, o.task_pid)?;
    let tgid: u32 = field(task, o.task_tgid)?;
    if pid != tgid {
        let leader: Kernel = field(task, o.task_group_leader)?;
        let leader_flags: u32 = field(leader, o.task_flags)?;
        if leader_flags & EXITING == 0 {
            return Ok(None);
        }
    }
    describe(kind::SEEN, task, 0, o).map(Some)
}
