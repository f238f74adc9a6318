//! Keeps a GPU busy for a share of the time and records its time slices:
//! `cuda-load --gpu 0 --duty 0.6 --for 20 [--slices DIR]`. Exits with 3 where there is no CUDA driver.
//!
//! One thread of one block reads the GPU's timer continuously: the engine is busy all the time, at very low power. A larger gap between two
//! readings means that another context had the engine in between, so the kernel detects its own time slices; it ends when they sum to the
//! requested work. DIR/PID.csv gets a line `s,BEGIN,END` for each, in ns of that timer, and before them `clock,NS`, by which the timer is
//! ahead of the wall clock.
//!
//! Pauses are random: a load of constant period is in step with a sampling grid that is a multiple of that period, and then every sample
//! meets it at the same phase.
//!
//! The driver's library is loaded at run time, so this builds everywhere.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use devkit::Random;

/// Work and pause together, on average: far below the driver's sampling grid, far above the duration of a launch.
const PERIOD: Duration = Duration::from_millis(20);
/// Largest gap between two readings within one slice; a context switch takes longer.
const APART_NS: u64 = 30_000;
/// Slices that one kernel records.
const SLICES: usize = 256;
/// Launches of an empty kernel between two readings of the wall clock; the shortest one counts.
const CLOCK_READINGS: usize = 50;
/// cuCtxSynchronize sleeps instead of spinning.
const BLOCKING_SYNC: c_uint = 4;
const NO_CUDA: u8 = 3;

/// PTX versions and targets, oldest first: newer drivers compile for newer cards, until they drop an old target.
const TARGETS: [(&str, &str); 3] = [("5.0", "sm_50"), ("6.3", "sm_75"), ("7.8", "sm_90")];

/// `notes`: the number of slices, then begin and end of each.
const KERNEL: &str = "
.address_size 64
.visible .entry spin(.param .u64 notes, .param .u64 work, .param .u64 apart, .param .u64 room)
{
    .reg .pred %more, %same, %fits;
    .reg .u64 %notes, %place, %work, %apart, %room, %now, %before, %passed, %begin, %done, %count;
    ld.param.u64 %notes, [notes];
    ld.param.u64 %work, [work];
    ld.param.u64 %apart, [apart];
    ld.param.u64 %room, [room];
    cvta.to.global.u64 %notes, %notes;
    mov.u64 %done, 0;
    mov.u64 %count, 0;
    mov.u64 %begin, %globaltimer;
    mov.u64 %before, %begin;
READ:
    mov.u64 %now, %globaltimer;
    sub.u64 %passed, %now, %before;
    max.s64 %passed, %passed, 0;
    setp.le.u64 %same, %passed, %apart;
    @%same bra ON;
    mad.lo.u64 %place, %count, 16, %notes;
    setp.lt.u64 %fits, %count, %room;
    @%fits st.global.u64 [%place+8], %begin;
    @%fits st.global.u64 [%place+16], %before;
    add.u64 %count, %count, 1;
    mov.u64 %begin, %now;
    mov.u64 %passed, 0;
ON:
    add.u64 %done, %done, %passed;
    mov.u64 %before, %now;
    setp.lt.u64 %more, %done, %work;
    @%more bra READ;
    mad.lo.u64 %place, %count, 16, %notes;
    setp.lt.u64 %fits, %count, %room;
    @%fits st.global.u64 [%place+8], %begin;
    @%fits st.global.u64 [%place+16], %before;
    add.u64 %count, %count, 1;
    st.global.u64 [%notes], %count;
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

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::Call(format!("cannot write the slices: {error}"))
    }
}

/// The library of the driver API; it stays loaded until the process ends.
struct Cuda(Handle);

impl Cuda {
    fn load() -> Result<Self> {
        // SAFETY: a NUL-terminated name; the library's own initialization is the driver's.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return Err(Failure::NoDriver("cannot load libcuda.so.1".into()));
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

/// Looks a symbol up as a function of that type and calls it; any result but CUDA_SUCCESS is a failure.
macro_rules! cuda {
    ($library:expr, $name:literal: fn($($type:ty),*), $($arg:expr),*) => {{
        let symbol = $library.symbol($name)?;
        // SAFETY: cuda.h gives the symbol this signature.
        let function: unsafe extern "C" fn($($type),*) -> c_int = unsafe { std::mem::transmute(symbol) };
        // SAFETY: every pointer is to a live local of the type that cuda.h requires.
        match unsafe { function($($arg),*) } {
            0 => Ok(()),
            // CUDA_ERROR_NO_DEVICE, and the codes of a driver that does not work here.
            code @ (100 | 34 | 803) => Err(Failure::NoDriver(format!("{} returned {code}", $name.to_string_lossy()))),
            code => Err(Failure::Call(format!("{} returned {code}", $name.to_string_lossy()))),
        }
    }};
}

/// The kernel, ready to be launched, and the memory for its slices.
struct Spinner {
    cuda: Cuda,
    launch: Launch,
    function: Handle,
    /// Memory that the GPU writes and this process reads.
    notes: *mut u64,
    apart_ns: u64,
}

impl Spinner {
    fn new(gpu: c_int) -> Result<Self> {
        let cuda = Cuda::load()?;
        let none = std::ptr::null_mut();
        let (mut device, mut context, mut function, mut notes) = (0, none, none, none);
        cuda!(cuda, c"cuInit": fn(c_uint), 0)?;
        cuda!(cuda, c"cuDeviceGet": fn(*mut c_int, c_int), &raw mut device, gpu)?;
        cuda!(cuda, c"cuCtxCreate_v2": fn(*mut Handle, c_uint, c_int), &raw mut context, BLOCKING_SYNC, device)?;
        let module = Self::module(&cuda)?;
        cuda!(cuda, c"cuModuleGetFunction": fn(*mut Handle, Handle, *const c_char), &raw mut function, module, c"spin".as_ptr())?;
        let bytes = (1 + 2 * SLICES) * size_of::<u64>();
        // Addresses of such memory are the same on the GPU.
        cuda!(cuda, c"cuMemAllocHost_v2": fn(*mut *mut c_void, usize), &raw mut notes, bytes)?;
        // SAFETY: cuda.h gives cuLaunchKernel this signature.
        let launch: Launch = unsafe { std::mem::transmute(cuda.symbol(c"cuLaunchKernel")?) };
        Ok(Self { cuda, launch, function, notes: notes.cast(), apart_ns: APART_NS })
    }

    fn module(cuda: &Cuda) -> Result<Handle> {
        let mut refused = Ok(());
        for (version, target) in TARGETS {
            let text = format!(".version {version}\n.target {target}{KERNEL}");
            let text = CString::new(text).map_err(|error| Failure::Call(error.to_string()))?;
            let mut module = std::ptr::null_mut();
            match cuda!(cuda, c"cuModuleLoadData": fn(*mut Handle, *const c_char), &raw mut module, text.as_ptr()) {
                Ok(()) => return Ok(module),
                // The first error is the relevant one.
                Err(error) => refused = refused.and(Err(error)),
            }
        }
        refused.map(|()| std::ptr::null_mut())
    }

    /// Occupies the engine for this time. Returns its slices.
    fn spin(&self, mut work_ns: u64) -> Result<Vec<(u64, u64)>> {
        let (mut notes, mut apart, mut room) = (self.notes, self.apart_ns, SLICES as u64);
        let mut arguments =
            [(&raw mut notes).cast::<c_void>(), (&raw mut work_ns).cast(), (&raw mut apart).cast(), (&raw mut room).cast()];
        let none = std::ptr::null_mut();
        // SAFETY: a kernel of four parameters, which `arguments` points to; the driver copies them before it returns.
        let code = unsafe { (self.launch)(self.function, 1, 1, 1, 1, 1, 1, 0, none, arguments.as_mut_ptr(), none.cast()) };
        if code != 0 {
            return Err(Failure::Call(format!("cuLaunchKernel returned {code}")));
        }
        cuda!(self.cuda, c"cuCtxSynchronize": fn(),)?;
        // SAFETY: the kernel has ended and nothing writes there; within what was allocated.
        let note = |n: usize| unsafe { self.notes.add(n).read_volatile() };
        let count = usize::try_from(note(0)).unwrap_or(SLICES).min(SLICES);
        Ok((0..count).map(|n| (note(1 + 2 * n), note(2 + 2 * n))).collect())
    }

    /// Returns the GPU's timer less the wall clock. Where the timer has coarse steps, the gap limit is raised above them.
    fn calibrate(&mut self) -> Result<i64> {
        let (mut tightest, mut ahead, mut step) = (u64::MAX, 0, u64::MAX);
        for _ in 0..CLOCK_READINGS {
            let before = wall_ns();
            let slices = self.spin(1)?;
            let after = wall_ns();
            let (Some((begin, _)), Some((_, end))) = (slices.first(), slices.last()) else { continue };
            step = step.min((end - begin).max(1));
            if after - before < tightest {
                tightest = after - before;
                ahead = u64::midpoint(*begin, *end) as i64 - u64::midpoint(before, after) as i64;
            }
        }
        if step != u64::MAX {
            self.apart_ns = self.apart_ns.max(step.saturating_mul(8));
        }
        Ok(ahead)
    }
}

fn wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

fn run(options: &LoadOptions) -> Result<()> {
    // Created first, so that a load that is killed early also leaves a file.
    let mut to = match &options.slices {
        Some(folder) => Some(BufWriter::new(File::create(folder.join(format!("{}.csv", std::process::id())))?)),
        None => None,
    };
    let mut spinner = Spinner::new(options.gpu)?;
    let ahead = spinner.calibrate()?;
    if let Some(to) = &mut to {
        writeln!(to, "clock,{ahead}")?;
        to.flush()?;
    }
    let work = PERIOD.mul_f64(options.duty);
    let mut random = Random(u64::from(std::process::id()));
    let begun = Instant::now();
    let mut next = begun;
    while begun.elapsed() < options.lasts {
        let slices = spinner.spin(work.as_nanos() as u64)?;
        if let Some(to) = &mut to {
            for (begin, end) in slices {
                writeln!(to, "s,{begin},{end}")?;
            }
            // The process may be killed at any time.
            to.flush()?;
        }
        // A pause from zero to twice the mean.
        next += work + (PERIOD - work).mul_f64(2.0 * random.unit());
        match next.checked_duration_since(Instant::now()) {
            Some(rest) => std::thread::sleep(rest),
            // Another context had the engine: lost time is not made up for.
            None => next = Instant::now(),
        }
    }
    Ok(())
}

struct LoadOptions {
    gpu: c_int,
    duty: f64,
    lasts: Duration,
    slices: Option<PathBuf>,
}

fn options() -> Option<LoadOptions> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (["--gpu", gpu, "--duty", duty, "--for", seconds], rest) = words.split_first_chunk::<6>()? else { return None };
    let slices = match rest {
        [] => None,
        ["--slices", folder] => Some(PathBuf::from(folder)),
        _ => return None,
    };
    let duty = duty.parse().ok().filter(|duty| *duty > 0.0 && *duty <= 1.0)?;
    Some(LoadOptions { gpu: gpu.parse().ok()?, duty, lasts: Duration::try_from_secs_f64(seconds.parse().ok()?).ok()?, slices })
}

fn main() -> ExitCode {
    let Some(options) = options() else {
        eprintln!("cuda-load --gpu N --duty 0..1 --for SECONDS [--slices DIR]");
        return ExitCode::from(2);
    };
    // SAFETY: takes no pointers; the load ends with its parent.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::NoDriver(error)) => {
            eprintln!("cuda-load: CUDA is not available: {error}");
            ExitCode::from(NO_CUDA)
        }
        Err(Failure::Call(error)) => {
            eprintln!("cuda-load: {error}");
            ExitCode::FAILURE
        }
    }
}
