//! Copies between host and device. They wait for the work before them; they take no time of the GPU and move no data.

use std::ffi::c_void;

use super::{CallResult, NullStream, cuda, default_queue, failed, initialized, queue, thread_queue};
use crate::process::{Process, Queue};

type DevicePointer = u64;

/// A synchronous copy waits for the stream; in the legacy default stream for all streams of the process.
fn copy(process: &Process, queue: Queue, default: NullStream) -> CallResult {
    let all_streams = default == NullStream::Legacy;
    process.blocking(queue.gpu, || process.wait(&process.ends(queue, all_streams))).map_err(failed)
}

cuda! {
    fn cuMemcpyDtoH_v2(_to: *mut c_void, _from: DevicePointer, _bytes: usize) {
        initialized(|process| copy(process, default_queue(process)?, NullStream::Legacy))
    }
    fn cuMemcpyHtoD_v2(_to: DevicePointer, _from: *const c_void, _bytes: usize) {
        initialized(|process| copy(process, default_queue(process)?, NullStream::Legacy))
    }
    fn cuMemcpyDtoH_v2_ptds(_to: *mut c_void, _from: DevicePointer, _bytes: usize) {
        initialized(|process| copy(process, thread_queue(process)?, NullStream::PerThread))
    }
    fn cuMemcpyHtoD_v2_ptds(_to: DevicePointer, _from: *const c_void, _bytes: usize) {
        initialized(|process| copy(process, thread_queue(process)?, NullStream::PerThread))
    }
    fn cuMemcpyDtoHAsync_v2(_to: *mut c_void, _from: DevicePointer, _bytes: usize, stream: *mut c_void) {
        initialized(|process| queue(process, stream, NullStream::Legacy).map(|_queue| ()))
    }
    fn cuMemcpyDtoHAsync_v2_ptsz(_to: *mut c_void, _from: DevicePointer, _bytes: usize, stream: *mut c_void) {
        initialized(|process| queue(process, stream, NullStream::PerThread).map(|_queue| ()))
    }
}
