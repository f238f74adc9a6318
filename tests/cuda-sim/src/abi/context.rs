//! Contexts: each makes the process a client of its GPU.

use std::ffi::{c_int, c_uint, c_void};

use super::{CONTEXT, CallResult, INVALID_CONTEXT, INVALID_DEVICE, OUT_OF_MEMORY, cuda, default_queue, failed, initialized, put};
use crate::process::{Handle, Process};

fn create(process: &Process, context: *mut *mut c_void, device: c_int) -> CallResult {
    let gpu = usize::try_from(device).ok().and_then(|index| process.gpus.get(index)).ok_or(INVALID_DEVICE)?;
    let handle = process.create_context(gpu).map_err(failed)?.ok_or(OUT_OF_MEMORY)?;
    CONTEXT.set(handle);
    put(context, handle as *mut c_void)
}

fn destroy(process: &Process, context: *mut c_void) -> CallResult {
    let handle = context as Handle;
    if CONTEXT.get() == handle {
        CONTEXT.set(0);
    }
    if process.destroy_context(handle).map_err(failed)? { Ok(()) } else { Err(INVALID_CONTEXT) }
}

cuda! {
    fn cuCtxCreate(context: *mut *mut c_void, _flags: c_uint, device: c_int) {
        initialized(|process| create(process, context, device))
    }
    fn cuCtxCreate_v2(context: *mut *mut c_void, _flags: c_uint, device: c_int) {
        initialized(|process| create(process, context, device))
    }
    fn cuCtxDestroy(context: *mut c_void) {
        initialized(|process| destroy(process, context))
    }
    fn cuCtxDestroy_v2(context: *mut c_void) {
        initialized(|process| destroy(process, context))
    }
    fn cuCtxSetCurrent(context: *mut c_void) {
        initialized(|process| {
            let handle = context as Handle;
            // NULL unbinds the current context.
            let known = handle == 0 || process.handles().contexts.contains_key(&handle);
            CONTEXT.set(if known { handle } else { CONTEXT.get() });
            if known { Ok(()) } else { Err(INVALID_CONTEXT) }
        })
    }
    fn cuCtxGetCurrent(context: *mut *mut c_void) {
        initialized(|_| put(context, CONTEXT.get() as *mut c_void))
    }
    fn cuCtxSynchronize() {
        initialized(|process| {
            let queue = default_queue(process)?;
            process.blocking(queue.gpu, || process.wait(&process.ends(queue, true))).map_err(failed)
        })
    }
}
