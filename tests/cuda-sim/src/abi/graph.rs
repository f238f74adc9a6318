//! Graphs of kernels. A graph is the sum of its kernels' lengths: they run one after the other.

use std::ffi::{c_uint, c_ulonglong, c_void};

use super::{CallResult, INVALID_HANDLE, NullStream, cuda, failed, get, initialized, kernel_ns, put, queue};
use crate::process::{Handle, Process};

/// CUDA_KERNEL_NODE_PARAMS_v1 and the begin of _v2.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct KernelNode {
    pub function: *mut c_void,
    pub grid: [c_uint; 3],
    pub block: [c_uint; 3],
    pub shared_bytes: c_uint,
    pub parameters: *const *const c_void,
    pub extra: *const *const c_void,
}

fn add_kernel(process: &Process, node: *mut *mut c_void, graph: *mut c_void, kernel: *const KernelNode) -> CallResult {
    let length_ns = kernel_ns(get(kernel)?.parameters)?;
    let mut handles = process.handles();
    let all_ns = handles.graphs_ns.get_mut(&(graph as Handle)).ok_or(INVALID_HANDLE)?;
    *all_ns = all_ns.saturating_add(length_ns);
    let handle = handles.new_handle();
    put(node, handle as *mut c_void)
}

fn launch(process: &Process, executable: *mut c_void, stream: *mut c_void, default: NullStream) -> CallResult {
    let length_ns = process.handles().launchable_ns.get(&(executable as Handle)).copied().ok_or(INVALID_HANDLE)?;
    let queue = queue(process, stream, default)?;
    process.submit(queue, length_ns).map_err(failed)?.map(|_mark| ()).ok_or(INVALID_HANDLE)
}

cuda! {
    fn cuGraphCreate(graph: *mut *mut c_void, _flags: c_uint) {
        initialized(|process| {
            let mut handles = process.handles();
            let handle = handles.new_handle();
            handles.graphs_ns.insert(handle, 0);
            put(graph, handle as *mut c_void)
        })
    }
    fn cuGraphAddKernelNode(
        node: *mut *mut c_void, graph: *mut c_void, _after: *const *mut c_void, _count: usize, kernel: *const KernelNode
    ) {
        initialized(|process| add_kernel(process, node, graph, kernel))
    }
    fn cuGraphAddKernelNode_v2(
        node: *mut *mut c_void, graph: *mut c_void, _after: *const *mut c_void, _count: usize, kernel: *const KernelNode
    ) {
        initialized(|process| add_kernel(process, node, graph, kernel))
    }
    fn cuGraphInstantiateWithFlags(executable: *mut *mut c_void, graph: *mut c_void, _flags: c_ulonglong) {
        initialized(|process| {
            let mut handles = process.handles();
            let length_ns = handles.graphs_ns.get(&(graph as Handle)).copied().ok_or(INVALID_HANDLE)?;
            let handle = handles.new_handle();
            handles.launchable_ns.insert(handle, length_ns);
            put(executable, handle as *mut c_void)
        })
    }
    fn cuGraphLaunch(executable: *mut c_void, stream: *mut c_void) {
        initialized(|process| launch(process, executable, stream, NullStream::Legacy))
    }
    fn cuGraphLaunch_ptsz(executable: *mut c_void, stream: *mut c_void) {
        initialized(|process| launch(process, executable, stream, NullStream::PerThread))
    }
    fn cuGraphExecDestroy(executable: *mut c_void) {
        initialized(|process| process.handles().launchable_ns.remove(&(executable as Handle)).map(|_| ()).ok_or(INVALID_HANDLE))
    }
    fn cuGraphDestroy(graph: *mut c_void) {
        initialized(|process| process.handles().graphs_ns.remove(&(graph as Handle)).map(|_| ()).ok_or(INVALID_HANDLE))
    }
}
