//! The library as a program sees it that opens it: codes of calls in order and out of order. One test, since the library has one state.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nvidia_ml_sim::{loads, world};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cuda-work");

struct Library(*mut c_void);

impl Library {
    /// Calls the function with six arguments of the size of a pointer; functions with less ignore the rest.
    fn call(&self, name: &CStr, arguments: &[usize]) -> c_int {
        let mut all = [0; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        // SAFETY: an open library; every function has at most six arguments, which are integers or pointers to values of this test.
        unsafe {
            let address = libc::dlsym(self.0, name.as_ptr());
            assert!(!address.is_null(), "{name:?}");
            let function: extern "C" fn(usize, usize, usize, usize, usize, usize) -> c_int = std::mem::transmute(address);
            function(all[0], all[1], all[2], all[3], all[4], all[5])
        }
    }

    fn launch(&self, stream: usize, parameters: *const *const u64) -> c_int {
        type Launch = extern "C" fn(usize, u32, u32, u32, u32, u32, u32, u32, usize, *const *const u64, usize) -> c_int;
        // SAFETY: the signature of cuda.h.
        let function: Launch = unsafe { std::mem::transmute(libc::dlsym(self.0, c"cuLaunchKernel".as_ptr())) };
        function(0, 1, 1, 1, 1, 1, 1, 0, stream, parameters, 0)
    }

    fn text(&self, code: c_int) -> String {
        let mut text: *const c_char = std::ptr::null();
        assert_eq!(self.call(c"cuGetErrorString", &[code as usize, &raw mut text as usize]), 0);
        // SAFETY: the library set it to a constant string.
        unsafe { CStr::from_ptr(text) }.to_str().unwrap().to_owned()
    }
}

fn open(dir: &Path) -> Library {
    fs::write(dir.join(world::FILE), format!("begun_us = {}\n[[gpus]]\n[[gpus]]\n", loads::now_us())).unwrap();
    fs::write(dir.join(loads::FILE), "").unwrap();
    let folder = Path::new(PROGRAM).parent().unwrap();
    let built = ["libcuda_sim.so", "deps/libcuda_sim.so"].map(|name| folder.join(name)).into_iter().find(|path| path.exists());
    let mut install = Command::new(PROGRAM);
    install.args(["install", "--dir"]).arg(dir).env("CUDA_SIM_LIBRARY", built.unwrap());
    assert!(install.status().unwrap().success());
    let path = CString::new(dir.join("lib/libcuda.so.1").as_os_str().as_bytes()).unwrap();
    // SAFETY: a path of the simulated library.
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null());
    Library(library)
}

#[test]
fn codes_are_those_of_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let cuda = open(dir.path());
    let (mut number, mut handle): (c_int, usize) = (0, 0);
    let (number_at, handle_at) = (&raw mut number as usize, &raw mut handle as usize);
    let new = |name: &CStr, rest: [usize; 2]| {
        let mut handle = 0usize;
        assert_eq!(cuda.call(name, &[&raw mut handle as usize, rest[0], rest[1]]), 0, "{name:?}");
        handle
    };
    // Before init.
    assert_eq!(cuda.call(c"cuDriverGetVersion", &[number_at]), 0);
    assert_eq!(cuda.call(c"cuDeviceGetCount", &[number_at]), 3);
    assert_eq!(cuda.call(c"cuCtxSynchronize", &[]), 3);
    assert_eq!(cuda.call(c"cuInit", &[1]), 1);
    assert_eq!((cuda.call(c"cuInit", &[0]), cuda.call(c"cuInit", &[0])), (0, 0));
    // Devices and contexts.
    assert_eq!((cuda.call(c"cuDeviceGetCount", &[number_at]), number), (0, 2));
    assert_eq!(cuda.call(c"cuDeviceGetCount", &[0]), 1);
    assert_eq!(cuda.call(c"cuDeviceGet", &[number_at, 2]), 101);
    assert_eq!(cuda.call(c"cuStreamCreate", &[handle_at, 0]), 201);
    assert_eq!(cuda.call(c"cuCtxCreate_v2", &[handle_at, 0, 7]), 101);
    let context = new(c"cuCtxCreate_v2", [0, 1]);
    // Kernels and streams.
    let (stream, event) = (new(c"cuStreamCreate", [0; 2]), new(c"cuEventCreate", [0; 2]));
    let length_us = 60_000u64;
    let parameters = [&raw const length_us];
    assert_eq!(cuda.launch(stream, std::ptr::null()), 1);
    assert_eq!(cuda.launch(0x5555, parameters.as_ptr()), 400);
    assert_eq!(cuda.call(c"cuEventQuery", &[event]), 0);
    let from = Instant::now();
    assert_eq!(cuda.launch(stream, parameters.as_ptr()), 0);
    assert_eq!(cuda.call(c"cuEventRecord", &[event, stream]), 0);
    assert_eq!((cuda.call(c"cuStreamQuery", &[stream]), cuda.call(c"cuEventQuery", &[event])), (600, 600));
    // Other streams have no work.
    assert_eq!((cuda.call(c"cuStreamSynchronize", &[0]), cuda.call(c"cuStreamSynchronize_ptsz", &[0])), (0, 0));
    assert_eq!((cuda.call(c"cuStreamQuery", &[2]), cuda.call(c"cuMemcpyDtoHAsync_v2", &[0, 0, 0, stream])), (0, 0));
    assert_eq!(cuda.call(c"cuMemcpyDtoH_v2_ptds", &[0, 0, 0]), 0);
    assert!(from.elapsed() < Duration::from_millis(60), "only the stream with work is waited for");
    assert_eq!((cuda.call(c"cuEventSynchronize", &[event]), cuda.call(c"cuStreamQuery", &[stream])), (0, 0));
    assert!(from.elapsed() >= Duration::from_millis(60));
    // Graphs.
    let graph = new(c"cuGraphCreate", [0; 2]);
    let kernel = [0, 1 << 32 | 1, 1 << 32 | 1, 1 << 32 | 1, 0, parameters.as_ptr() as usize, 0];
    assert_eq!(cuda.call(c"cuGraphAddKernelNode", &[handle_at, graph, 0, 0, kernel.as_ptr() as usize]), 0);
    let executable = new(c"cuGraphInstantiateWithFlags", [graph, 0]);
    let from = Instant::now();
    assert_eq!((cuda.call(c"cuGraphLaunch", &[executable, 0]), cuda.call(c"cuCtxSynchronize", &[])), (0, 0));
    assert!(from.elapsed() >= Duration::from_millis(60));
    assert_eq!((cuda.call(c"cuGraphDestroy", &[graph]), cuda.call(c"cuGraphExecDestroy", &[graph])), (0, 400));
    // Ends.
    assert_eq!((cuda.call(c"cuEventDestroy_v2", &[event]), cuda.call(c"cuEventSynchronize", &[event])), (0, 400));
    assert_eq!((cuda.call(c"cuStreamDestroy_v2", &[stream]), cuda.call(c"cuStreamSynchronize", &[stream])), (0, 400));
    assert_eq!((cuda.call(c"cuCtxDestroy_v2", &[context]), cuda.call(c"cuCtxDestroy_v2", &[context])), (0, 201));
    assert_eq!(cuda.call(c"cuCtxSynchronize", &[]), 201);
    assert_eq!([0, 3, 600].map(|code| cuda.text(code)), ["no error", "initialization error", "device not ready"]);
    assert_eq!(cuda.call(c"cuGetErrorString", &[12_345, handle_at]), 1);
}
