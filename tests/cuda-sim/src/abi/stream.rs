//! Streams and kernels.

use std::ffi::{c_uint, c_void};

use super::{
    CallResult, INVALID_HANDLE, NOT_READY, NullStream, OUT_OF_MEMORY, cuda, current_gpu, failed, initialized, kernel_ns, put,
    queue,
};
use crate::process::{Handle, Process};

fn create(process: &Process, stream: *mut *mut c_void) -> CallResult {
    let gpu = current_gpu(process)?.index;
    let queue = process.open_stream(gpu).map_err(failed)?.ok_or(OUT_OF_MEMORY)?;
    let mut handles = process.handles();
    let handle = handles.new_handle();
    handles.streams.insert(handle, queue);
    put(stream, handle as *mut c_void)
}

/// Returns at once; queued work is still done.
fn destroy(process: &Process, stream: *mut c_void) -> CallResult {
    let queue = process.handles().streams.remove(&(stream as Handle)).ok_or(INVALID_HANDLE)?;
    let gpu = process.gpu(queue).ok_or(INVALID_HANDLE)?;
    gpu.with(|schedule| schedule.close_stream(queue.client, queue.stream)).map_err(failed)
}

fn synchronize(process: &Process, stream: *mut c_void, default: NullStream) -> CallResult {
    let queue = queue(process, stream, default)?;
    process.blocking(queue.gpu, || process.wait(&process.ends(queue, false))).map_err(failed)
}

fn query(process: &Process, stream: *mut c_void, default: NullStream) -> CallResult {
    let queue = queue(process, stream, default)?;
    for mark in process.ends(queue, false) {
        if !process.is_reached(mark).map_err(failed)? {
            return Err(NOT_READY);
        }
    }
    Ok(())
}

fn launch(process: &Process, stream: *mut c_void, parameters: *const *const c_void, default: NullStream) -> CallResult {
    let (length_ns, queue) = (kernel_ns(parameters)?, queue(process, stream, default)?);
    process.submit(queue, length_ns).map_err(failed)?.map(|_mark| ()).ok_or(INVALID_HANDLE)
}

cuda! {
    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) {
        initialized(|process| create(process, stream))
    }
    fn cuStreamDestroy_v2(stream: *mut c_void) {
        initialized(|process| destroy(process, stream))
    }
    fn cuStreamSynchronize(stream: *mut c_void) {
        initialized(|process| synchronize(process, stream, NullStream::Legacy))
    }
    fn cuStreamSynchronize_ptsz(stream: *mut c_void) {
        initialized(|process| synchronize(process, stream, NullStream::PerThread))
    }
    fn cuStreamQuery(stream: *mut c_void) {
        initialized(|process| query(process, stream, NullStream::Legacy))
    }
    fn cuStreamQuery_ptsz(stream: *mut c_void) {
        initialized(|process| query(process, stream, NullStream::PerThread))
    }
    fn cuLaunchKernel(
        _function: *mut c_void, _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint, _block_x: c_uint, _block_y: c_uint,
        _block_z: c_uint, _shared_bytes: c_uint, stream: *mut c_void, parameters: *const *const c_void, _extra: *const *const c_void
    ) {
        initialized(|process| launch(process, stream, parameters, NullStream::Legacy))
    }
    fn cuLaunchKernel_ptsz(
        _function: *mut c_void, _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint, _block_x: c_uint, _block_y: c_uint,
        _block_z: c_uint, _shared_bytes: c_uint, stream: *mut c_void, parameters: *const *const c_void, _extra: *const *const c_void
    ) {
        initialized(|process| launch(process, stream, parameters, NullStream::PerThread))
    }
}
