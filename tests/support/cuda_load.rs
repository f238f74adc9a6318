//! Keeps a GPU busy for a part of the time: `cuda-load --gpu 0 --duty 0.6 --for 20`. Ends with 3 where there is no CUDA driver.
//!
//! One thread of one block spins until the GPU's own timer has gone on far enough: all of the time the engine is busy, and next to no
//! power is used. The driver's library is looked for at run time, so this builds everywhere.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Far below the driver's sampling grid, far above what a launch takes.
const PERIOD: Duration = Duration::from_millis(20);
/// cuCtxSynchronize sleeps instead of spinning.
const BLOCKING_SYNC: c_uint = 4;
const NO_CUDA: u8 = 3;

/// The oldest language that has all it uses, for the oldest cards: newer drivers compile it for newer ones.
const PTX: &CStr = c"
.version 5.0
.target sm_50
.address_size 64
.visible .entry spin(.param .u64 ns)
{
    .reg .pred %more;
    .reg .u64 %begin, %now, %passed, %wanted;
    ld.param.u64 %wanted, [ns];
    mov.u64 %begin, %globaltimer;
AGAIN:
    mov.u64 %now, %globaltimer;
    sub.u64 %passed, %now, %begin;
    setp.lt.u64 %more, %passed, %wanted;
    @%more bra AGAIN;
    ret;
}
";

type Handle = *mut c_void;
type Launch = unsafe extern "C" fn(
    Handle,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    c_uint,
    Handle,
    *mut *mut c_void,
    *mut *mut c_void,
) -> c_int;

enum Failure {
    NoDriver(String),
    Call(String),
}

type Result<T> = std::result::Result<T, Failure>;

/// The driver API's library; it stays loaded until the process ends.
struct Cuda(Handle);

impl Cuda {
    fn load() -> Result<Self> {
        // SAFETY: a NUL-terminated name; what the library does when it is loaded is the driver's.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err(Failure::NoDriver("libcuda.so.1 cannot be loaded".into()));
        }
        Ok(Self(library))
    }

    fn symbol(&self, name: &CStr) -> Result<Handle> {
        // SAFETY: a library that was loaded, a NUL-terminated name.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if symbol.is_null() {
            Err(Failure::NoDriver(format!("libcuda.so.1 has no {}", name.to_string_lossy())))
        } else {
            Ok(symbol)
        }
    }
}

/// A symbol as a function of that type, called; anything but CUDA_SUCCESS is a failure.
macro_rules! cuda {
    ($library:expr, $name:literal: fn($($type:ty),*), $($arg:expr),*) => {{
        let symbol = $library.symbol($name)?;
        // SAFETY: cuda.h gives the symbol this signature.
        let function: unsafe extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(symbol) };
        // SAFETY: every pointer is to a live local of the type that cuda.h wants.
        match unsafe { function($($arg),*) } {
            0 => Ok(()),
            // CUDA_ERROR_NO_DEVICE and what a driver says that does not work here.
            code @ (100 | 34 | 803) => Err(Failure::NoDriver(format!("{} says {code}", $name.to_string_lossy()))),
            code => Err(Failure::Call(format!("{} says {code}", $name.to_string_lossy()))),
        }
    }};
}

fn spin(gpu: c_int, duty: f64, lasts: Duration) -> Result<()> {
    let cuda = Cuda::load()?;
    let (mut device, mut context, mut module, mut function) =
        (0, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
    cuda!(cuda, c"cuInit": fn(c_uint), 0)?;
    cuda!(cuda, c"cuDeviceGet": fn(*mut c_int, c_int), &raw mut device, gpu)?;
    cuda!(cuda, c"cuCtxCreate_v2": fn(*mut Handle, c_uint, c_int), &raw mut context, BLOCKING_SYNC, device)?;
    cuda!(cuda, c"cuModuleLoadData": fn(*mut Handle, *const c_char), &raw mut module, PTX.as_ptr())?;
    cuda!(cuda, c"cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char), &raw mut function, module, c"spin".as_ptr())?;
    // SAFETY: cuda.h gives cuLaunchKernel this signature.
    let launch: Launch = unsafe { std::mem::transmute(cuda.symbol(c"cuLaunchKernel")?) };
    let mut ns = PERIOD.mul_f64(duty).as_nanos() as u64;
    let begun = Instant::now();
    let mut next = begun;
    while begun.elapsed() < lasts {
        let mut arguments = [(&raw mut ns).cast::<c_void>()];
        let none = std::ptr::null_mut();
        // SAFETY: a kernel of one parameter, which `arguments` points to; the driver copies it before it returns.
        let code = unsafe { launch(function, 1, 1, 1, 1, 1, 1, 0, none, arguments.as_mut_ptr(), std::ptr::null_mut()) };
        if code != 0 {
            return Err(Failure::Call(format!("cuLaunchKernel says {code}")));
        }
        cuda!(cuda, c"cuCtxSynchronize": fn(),)?;
        next += PERIOD;
        match next.checked_duration_since(Instant::now()) {
            Some(rest) => std::thread::sleep(rest),
            // Another has the engine: what was lost is not made up for.
            None => next = Instant::now(),
        }
    }
    Ok(())
}

fn options() -> Option<(c_int, f64, Duration)> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ["--gpu", gpu, "--duty", duty, "--for", seconds] = words[..] else { return None };
    let duty = duty.parse().ok().filter(|duty| (0.0..=1.0).contains(duty))?;
    Some((gpu.parse().ok()?, duty, Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?))
}

fn main() -> ExitCode {
    let Some((gpu, duty, lasts)) = options() else {
        eprintln!("cuda-load --gpu N --duty 0..1 --for SECONDS");
        return ExitCode::from(2);
    };
    // SAFETY: takes no pointers; the load ends with whoever wanted it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    match spin(gpu, duty, lasts) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::NoDriver(told)) => {
            eprintln!("cuda-load: no CUDA here: {told}");
            ExitCode::from(NO_CUDA)
        }
        Err(Failure::Call(told)) => {
            eprintln!("cuda-load: {told}");
            ExitCode::FAILURE
        }
    }
}
