//! Events: marks in streams.

use std::ffi::{c_uint, c_void};

use super::{CallResult, INVALID_HANDLE, NOT_READY, NullStream, cuda, current_gpu, failed, initialized, put, queue};
use crate::process::{Handle, Mark, Process};

fn record(process: &Process, event: *mut c_void, stream: *mut c_void, default: NullStream) -> CallResult {
    let queue = queue(process, stream, default)?;
    let mark = process.ends(queue, false).first().copied();
    *process.handles().events.get_mut(&(event as Handle)).ok_or(INVALID_HANDLE)? = mark;
    Ok(())
}

/// The mark of an event; one without is reached, as with the driver.
fn mark(process: &Process, event: *mut c_void) -> Result<Option<Mark>, i32> {
    process.handles().events.get(&(event as Handle)).copied().ok_or(INVALID_HANDLE)
}

cuda! {
    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
        initialized(|process| {
            current_gpu(process)?;
            let mut handles = process.handles();
            let handle = handles.new_handle();
            handles.events.insert(handle, None);
            put(event, handle as *mut c_void)
        })
    }
    fn cuEventDestroy_v2(event: *mut c_void) {
        initialized(|process| process.handles().events.remove(&(event as Handle)).map(|_mark| ()).ok_or(INVALID_HANDLE))
    }
    fn cuEventRecord(event: *mut c_void, stream: *mut c_void) {
        initialized(|process| record(process, event, stream, NullStream::Legacy))
    }
    fn cuEventRecord_ptsz(event: *mut c_void, stream: *mut c_void) {
        initialized(|process| record(process, event, stream, NullStream::PerThread))
    }
    fn cuEventSynchronize(event: *mut c_void) {
        initialized(|process| {
            let mark = mark(process, event)?;
            let gpu = mark.map_or_else(|| current_gpu(process).map(|gpu| gpu.index), |mark| Ok(mark.queue.gpu))?;
            process.blocking(gpu, || process.wait(mark.as_slice())).map_err(failed)
        })
    }
    fn cuEventQuery(event: *mut c_void) {
        initialized(|process| match mark(process, event)? {
            Some(mark) if !process.is_reached(mark).map_err(failed)? => Err(NOT_READY),
            _ => Ok(()),
        })
    }
}
