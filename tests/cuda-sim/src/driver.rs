//! The CUDA driver as a program sees it: a library that is opened by its path, and functions that return codes.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::null_mut;

use anyhow::{Context as _, bail};

pub const NOT_INITIALIZED: c_int = 3;
pub const NOT_READY: c_int = 600;

type Pointer = *mut c_void;

/// A handle that the driver returned.
#[derive(Clone, Copy, Debug)]
pub struct Object(usize);

/// As CUDA_KERNEL_NODE_PARAMS_v1.
#[repr(C)]
struct KernelParameters {
    function: Pointer,
    sizes: [c_uint; 7],
    parameters: *const *const c_void,
    extra: *const *const c_void,
}

pub struct Cuda {
    library: usize,
}

fn loader_error() -> String {
    // SAFETY: dlerror returns NULL or a string that lives until this thread's next call.
    let text = unsafe { libc::dlerror() };
    // SAFETY: as above.
    if text.is_null() { "unknown error".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() }
}

impl Cuda {
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let name = CString::new(path.as_os_str().as_bytes())?;
        // SAFETY: a NUL-terminated path; the library's initialisers are the simulator's.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if library.is_null() {
            bail!("cannot load {}: {}; run `cuda-work install --dir DIR`", path.display(), loader_error());
        }
        Ok(Self { library: library as usize })
    }

    fn symbol(&self, name: &CStr) -> anyhow::Result<Pointer> {
        // SAFETY: an open library and a NUL-terminated name.
        let address = unsafe { libc::dlsym(self.library as Pointer, name.as_ptr()) };
        if address.is_null() { bail!("the CUDA library has no {}", name.to_string_lossy()) } else { Ok(address) }
    }

    /// Calls a function with up to four arguments of the size of a pointer, which is how C passes integers, too.
    fn call(&self, name: &CStr, arguments: [usize; 4]) -> anyhow::Result<c_int> {
        let address = self.symbol(name)?;
        // SAFETY: the caller names a function of these arguments; further ones are ignored by the C ABI of 64-bit Linux.
        let function: extern "C" fn(usize, usize, usize, usize) -> c_int = unsafe { std::mem::transmute(address) };
        let [a, b, c, d] = arguments;
        Ok(function(a, b, c, d))
    }

    fn checked(&self, name: &CStr, arguments: [usize; 4]) -> anyhow::Result<()> {
        let code = self.call(name, arguments)?;
        self.check(name, code)
    }

    fn check(&self, name: &CStr, code: c_int) -> anyhow::Result<()> {
        if code == 0 { Ok(()) } else { bail!("{} failed: {} ({code})", name.to_string_lossy(), self.error_text(code)?) }
    }

    fn error_text(&self, code: c_int) -> anyhow::Result<String> {
        let mut text: *const c_char = std::ptr::null();
        self.call(c"cuGetErrorString", [code as usize, (&raw mut text) as usize, 0, 0])?;
        // SAFETY: the driver set it to NULL or to a constant string.
        Ok(if text.is_null() { "unknown".into() } else { unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned() })
    }

    pub fn init(&self) -> anyhow::Result<()> {
        self.checked(c"cuInit", [0; 4])
    }

    /// The code that a call returns when nothing was initialised.
    pub fn count_code(&self) -> anyhow::Result<c_int> {
        let mut count: c_int = 0;
        self.call(c"cuDeviceGetCount", [(&raw mut count) as usize, 0, 0, 0])
    }

    /// A new object; `make` gets the address of its handle.
    fn object(&self, name: &CStr, rest: [usize; 3]) -> anyhow::Result<Object> {
        let mut handle: Pointer = null_mut();
        self.checked(name, [(&raw mut handle) as usize, rest[0], rest[1], rest[2]])?;
        Ok(Object(handle as usize))
    }

    pub fn create_context(&self, gpu: usize) -> anyhow::Result<Object> {
        let mut device: c_int = 0;
        self.checked(c"cuDeviceGet", [(&raw mut device) as usize, gpu, 0, 0]).with_context(|| format!("--gpu {gpu}"))?;
        self.object(c"cuCtxCreate_v2", [0, device as usize, 0])
    }

    pub fn destroy_context(&self, context: Object) -> anyhow::Result<()> {
        self.checked(c"cuCtxDestroy_v2", [context.0, 0, 0, 0])
    }

    pub fn use_context(&self, context: Object) -> anyhow::Result<()> {
        self.checked(c"cuCtxSetCurrent", [context.0, 0, 0, 0])
    }

    pub fn create_stream(&self) -> anyhow::Result<Object> {
        self.object(c"cuStreamCreate", [0; 3])
    }

    pub fn create_event(&self) -> anyhow::Result<Object> {
        self.object(c"cuEventCreate", [0; 3])
    }

    /// An executable graph of one kernel.
    pub fn create_graph(&self, length_us: u64) -> anyhow::Result<Object> {
        let graph = self.object(c"cuGraphCreate", [0; 3])?;
        let parameters = [(&raw const length_us).cast::<c_void>()];
        let kernel =
            KernelParameters { function: null_mut(), sizes: [1; 7], parameters: parameters.as_ptr(), extra: std::ptr::null() };
        let add = c"cuGraphAddKernelNode";
        // SAFETY: the signature of cuda.h.
        let function: extern "C" fn(*mut Pointer, usize, Pointer, usize, *const KernelParameters) -> c_int =
            unsafe { std::mem::transmute(self.symbol(add)?) };
        let mut node: Pointer = null_mut();
        self.check(add, function(&raw mut node, graph.0, null_mut(), 0, &raw const kernel))?;
        self.object(c"cuGraphInstantiateWithFlags", [graph.0, 0, 0])
    }

    pub fn launch(&self, stream: Object, length_us: u64) -> anyhow::Result<()> {
        type Launch = extern "C" fn(
            Pointer,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            usize,
            *const *const c_void,
            *const *const c_void,
        ) -> c_int;
        let name = c"cuLaunchKernel";
        // SAFETY: the signature of cuda.h.
        let function: Launch = unsafe { std::mem::transmute(self.symbol(name)?) };
        let parameters = [(&raw const length_us).cast::<c_void>()];
        self.check(name, function(null_mut(), 1, 1, 1, 1, 1, 1, 0, stream.0, parameters.as_ptr(), std::ptr::null()))
    }

    pub fn launch_graph(&self, graph: Object, stream: Object) -> anyhow::Result<()> {
        self.checked(c"cuGraphLaunch", [graph.0, stream.0, 0, 0])
    }

    pub fn record(&self, event: Object, stream: Object) -> anyhow::Result<()> {
        self.checked(c"cuEventRecord", [event.0, stream.0, 0, 0])
    }

    pub fn synchronize_stream(&self, stream: Object) -> anyhow::Result<()> {
        self.checked(c"cuStreamSynchronize", [stream.0, 0, 0, 0])
    }

    pub fn synchronize_event(&self, event: Object) -> anyhow::Result<()> {
        self.checked(c"cuEventSynchronize", [event.0, 0, 0, 0])
    }

    pub fn synchronize_context(&self) -> anyhow::Result<()> {
        self.checked(c"cuCtxSynchronize", [0; 4])
    }

    pub fn copy_to_host(&self, to: &mut [u8]) -> anyhow::Result<()> {
        self.checked(c"cuMemcpyDtoH_v2", [to.as_mut_ptr() as usize, 0, to.len(), 0])
    }

    /// Whether the stream has no more work.
    pub fn is_done(&self, stream: Object) -> anyhow::Result<bool> {
        let name = c"cuStreamQuery";
        match self.call(name, [stream.0, 0, 0, 0])? {
            NOT_READY => Ok(false),
            code => self.check(name, code).map(|()| true),
        }
    }
}

/// Forks: `None` in the child, which has this thread only.
pub fn fork() -> std::io::Result<Option<libc::pid_t>> {
    // SAFETY: the child continues with this thread; the C library makes its allocator usable there.
    match unsafe { libc::fork() } {
        0 => Ok(None),
        -1 => Err(std::io::Error::last_os_error()),
        child => Ok(Some(child)),
    }
}

/// Waits for the end of a child. Returns whether it succeeded.
pub fn wait_for(child: libc::pid_t) -> std::io::Result<bool> {
    let mut status = 0;
    // SAFETY: a child of this process, and memory for its status.
    if unsafe { libc::waitpid(child, &raw mut status, 0) } == child {
        return Ok(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
    }
    Err(std::io::Error::last_os_error())
}
