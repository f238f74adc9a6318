//! The C ABI: the symbols that NVML clients use. No panic crosses it; every pointer is checked for NULL.
//!
//! The signatures are nvml.h's; layouts come from nvml-wrapper-sys. Functions that a V100 lacks return NOT_SUPPORTED.
//! Every wait is without the lock: a stalled GPU must not stop calls on another.

mod accounting;
mod cost;
mod device;
mod events;
mod fields;
mod gpm;
mod mig;
mod processes;
mod rm;
mod system;
#[cfg(test)]
mod tests;
mod usage;

use std::collections::HashMap;
use std::ffi::{CStr, OsStr, c_char, c_uint};
use std::os::unix::ffi::OsStrExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlReturn_t};

use crate::driver::Driver;
use crate::faults::{Effect, GPU_IS_LOST};
use crate::kernel_files::OpenNodes;
use crate::world::Unit;

const UNINITIALIZED: nvmlReturn_t = 1;
const INVALID_ARGUMENT: nvmlReturn_t = 2;
const NOT_SUPPORTED: nvmlReturn_t = 3;
const NO_PERMISSION: nvmlReturn_t = 4;
const NOT_FOUND: nvmlReturn_t = 6;
const INSUFFICIENT_SIZE: nvmlReturn_t = 7;
const DRIVER_NOT_LOADED: nvmlReturn_t = 9;
const TIMEOUT: nvmlReturn_t = 10;
const LIB_RM_VERSION_MISMATCH: nvmlReturn_t = 18;
const ARGUMENT_VERSION_MISMATCH: nvmlReturn_t = 25;
const UNKNOWN: nvmlReturn_t = 999;

/// Interval at which a stalled call checks whether it may continue.
const STALL_CHECKS: Duration = Duration::from_millis(10);

type CallResult = Result<(), nvmlReturn_t>;

struct State {
    references: u64,
    driver: Driver,
    /// When the first init opened the driver.
    opened_us: u64,
    /// The indices of the GPUs that exist, in NVML's order; determined at each init.
    present: Vec<usize>,
    sets: HashMap<usize, events::Set>,
    samples: HashMap<usize, Option<gpm::Sample>>,
    nodes: OpenNodes,
    /// The newest handle of a set or a sample.
    last_handle: usize,
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

impl State {
    fn new_handle(&mut self) -> usize {
        self.last_handle += 1;
        self.last_handle
    }

    /// Fails for an instance from before a reload.
    fn still_loaded(&self) -> CallResult {
        let reloaded = self.driver.log.faults.reloaded(self.opened_us, self.driver.now());
        if reloaded { Err(LIB_RM_VERSION_MISMATCH) } else { Ok(()) }
    }

    /// The GPU's index in NVML.
    fn index(&self, gpu: usize) -> Option<usize> {
        self.present.iter().position(|present| *present == gpu)
    }
}

fn guard(f: impl FnOnce() -> CallResult) -> nvmlReturn_t {
    let _cost = cost::Cost::begin();
    match catch_unwind(AssertUnwindSafe(f)) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(_) => UNKNOWN,
    }
}

fn locked<T>(f: impl FnOnce(&mut State) -> Result<T, nvmlReturn_t>) -> Result<T, nvmlReturn_t> {
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    f(state.as_mut().ok_or(UNINITIALIZED)?)
}

/// Handles of GPUs are at most this; those of MIG devices are above: their number plus one, followed by their GPU's handle.
const MIG_HANDLE_BELOW: usize = 0xffff;

fn handle(unit: Unit) -> nvmlDevice_t {
    ((unit.gpu + 1) + unit.mig.map_or(0, |mig| (mig + 1) * (MIG_HANDLE_BELOW + 1))) as nvmlDevice_t
}

/// Handles are the index in the world plus one, so NULL is not a handle.
fn unit(device: nvmlDevice_t) -> Result<Unit, nvmlReturn_t> {
    let (gpu, mig) = (device as usize & MIG_HANDLE_BELOW, device as usize / (MIG_HANDLE_BELOW + 1));
    let gpu = gpu.checked_sub(1).ok_or(INVALID_ARGUMENT)?;
    let unit = Unit { gpu, mig: mig.checked_sub(1) };
    let known = locked(|s| Ok(gpu < s.driver.world.gpus.len() && (mig == 0 || s.driver.world.mig(unit).is_some())))?;
    if known { Ok(unit) } else { Err(INVALID_ARGUMENT) }
}

/// Locked for a call's latency in a world with `one_lock`.
static DRIVER_LOCK: Mutex<()> = Mutex::new(());

/// A call in progress, by its symbol.
#[derive(Clone, Copy)]
struct Call(&'static str);

impl Call {
    /// Waits for the latency and for faults. Returns the faults' error.
    fn enter(self, gpu: Option<usize>) -> CallResult {
        let mut slept = false;
        loop {
            let (effect, latency, one_lock) = locked(|s| {
                let world = &s.driver.world;
                let latency = if self.0.contains("RunningProcess") { world.list_us } else { world.call_us };
                let one_lock = world.one_lock;
                let effect = s.driver.effect(self.0, gpu).map_err(failed)?;
                s.still_loaded()?;
                Ok((effect, latency, one_lock))
            })?;
            let wait_us = effect.slow_us + latency;
            if !slept && wait_us > 0 {
                let _one_at_a_time = one_lock.then(|| DRIVER_LOCK.lock().unwrap_or_else(PoisonError::into_inner));
                std::thread::sleep(Duration::from_micros(wait_us));
                slept = true;
            } else if effect.stalled {
                std::thread::sleep(STALL_CHECKS);
            } else {
                return effect.error.map_or(Ok(()), Err);
            }
        }
    }

    /// A call on the library.
    fn on_library<T>(self, f: impl FnOnce(&mut State) -> Result<T, nvmlReturn_t>) -> Result<T, nvmlReturn_t> {
        self.enter(None)?;
        locked(f)
    }

    /// A call on a GPU or a MIG device.
    fn on_unit<T>(
        self,
        device: nvmlDevice_t,
        f: impl FnOnce(&mut State, Unit) -> Result<T, nvmlReturn_t>,
    ) -> Result<T, nvmlReturn_t> {
        let unit = unit(device)?;
        self.enter(Some(unit.gpu))?;
        locked(|state| f(state, unit))
    }

    /// A call that MIG devices do not support.
    fn on<T>(
        self,
        device: nvmlDevice_t,
        f: impl FnOnce(&mut Driver, usize) -> Result<T, nvmlReturn_t>,
    ) -> Result<T, nvmlReturn_t> {
        self.on_unit(device, |state, unit| match unit.mig {
            None => f(&mut state.driver, unit.gpu),
            Some(_) => Err(NOT_SUPPORTED),
        })
    }

    /// A call that GPUs in MIG mode do not support either.
    fn on_whole<T>(
        self,
        device: nvmlDevice_t,
        f: impl FnOnce(&mut Driver, usize) -> Result<T, nvmlReturn_t>,
    ) -> Result<T, nvmlReturn_t> {
        self.on(device, |d, gpu| if d.world.gpus[gpu].mig.is_empty() { f(d, gpu) } else { Err(NOT_SUPPORTED) })
    }
}

fn put<T>(to: *mut T, value: T) -> CallResult {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes the caller pass memory for one T.
    unsafe { to.write(value) };
    Ok(())
}

fn get<T: Copy>(from: *const T) -> Result<T, nvmlReturn_t> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes the caller pass an initialised T.
    Ok(unsafe { from.read() })
}

/// Rejects a struct unless its first field is this version, which in nvml.h consists of the size and a number.
fn version_of(from: *const c_uint, version: c_uint) -> CallResult {
    if get(from)? == version { Ok(()) } else { Err(ARGUMENT_VERSION_MISMATCH) }
}

const fn struct_version<T>(number: c_uint) -> c_uint {
    size_of::<T>() as c_uint | number << 24
}

/// Writes a NUL-terminated string to a caller's buffer of `room` bytes.
fn put_text(to: *mut c_char, room: c_uint, text: &str) -> CallResult {
    if to.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    if text.len() + 1 > room as usize {
        return Err(INSUFFICIENT_SIZE);
    }
    for (i, byte) in text.bytes().chain([0]).enumerate() {
        // SAFETY: i < room, and the caller passes `room` bytes.
        unsafe { to.add(i).write(byte as c_char) };
    }
    Ok(())
}

fn text<'a>(from: *const c_char) -> Result<&'a str, nvmlReturn_t> {
    if from.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not NULL, and NVML's contract makes it NUL-terminated.
    unsafe { CStr::from_ptr(from) }.to_str().map_err(|_| INVALID_ARGUMENT)
}

fn put_all<T: Copy>(to: *mut T, count: *mut c_uint, items: &[T], when_small: c_uint) -> CallResult {
    if to.is_null() || (get(count)? as usize) < items.len() {
        put(count, when_small)?;
        return Err(INSUFFICIENT_SIZE);
    }
    for (i, item) in items.iter().enumerate() {
        // SAFETY: i < *count, and the caller passes that many elements.
        unsafe { to.add(i).write(*item) };
    }
    put(count, items.len() as c_uint)
}

fn failed(error: anyhow::Error) -> nvmlReturn_t {
    eprintln!("nvml-sim: {error:#}");
    UNKNOWN
}

/// NVML_SIM_DIR, or the folder of this library: DIR/lib/libnvidia-ml.so.1.
fn dir() -> Option<PathBuf> {
    #[cfg(test)]
    if let Some(dir) = tests::DIR.lock().unwrap_or_else(PoisonError::into_inner).clone() {
        return Some(dir);
    }
    if let Some(dir) = std::env::var_os("NVML_SIM_DIR").filter(|d| !d.is_empty()) {
        return Some(dir.into());
    }
    // SAFETY: all-zero is a valid Dl_info, and dladdr fills it for an address of this library.
    let info = unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        (libc::dladdr((&raw const STATE).cast(), &raw mut info) != 0).then_some(info)?
    };
    // SAFETY: dladdr's name is NUL-terminated and lives as long as the library.
    let path = unsafe { CStr::from_ptr(info.dli_fname) };
    let path = PathBuf::from(OsStr::from_bytes(path.to_bytes()));
    Some(path.parent()?.parent()?.to_owned())
}

fn open() -> Result<Driver, nvmlReturn_t> {
    Driver::open(&dir().ok_or(DRIVER_NOT_LOADED)?).map_err(|error| {
        eprintln!("nvml-sim: {error:#}");
        DRIVER_NOT_LOADED
    })
}

/// Conditions of an init at one moment.
struct InitConditions {
    effect: Effect,
    reloading: bool,
    now_us: u64,
    latency_us: u64,
    present: Vec<usize>,
}

fn init_conditions(call: Call, driver: &mut Driver) -> Result<InitConditions, nvmlReturn_t> {
    let effect = driver.effect(call.0, None).map_err(failed)?;
    let (now_us, present) = (driver.now(), driver.present().map_err(failed)?);
    let (reloading, latency_us) = (driver.log.faults.reloading(now_us), driver.world.call_us);
    Ok(InitConditions { effect, reloading, now_us, latency_us, present })
}

/// Opens the driver, or updates the list of devices; fails while the driver is being reloaded.
fn init(call: Call) -> CallResult {
    // The first init waits for faults before there is a state; the driver it opens becomes the state, unless another init was faster.
    let mut opened = None;
    let conditions = loop {
        let current = match locked(|s| init_conditions(call, &mut s.driver)) {
            Err(UNINITIALIZED) => {
                let driver = opened.take().map_or_else(open, Ok)?;
                init_conditions(call, opened.insert(driver))?
            }
            other => other?,
        };
        match current.effect {
            _ if current.reloading => return Err(DRIVER_NOT_LOADED),
            effect if effect.stalled => std::thread::sleep(STALL_CHECKS),
            effect => {
                std::thread::sleep(Duration::from_micros(effect.slow_us + current.latency_us));
                match effect.error {
                    Some(code) => return Err(code),
                    None => break current,
                }
            }
        }
    };
    let (opened_us, present) = (conditions.now_us, conditions.present);
    let mut state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    match &mut *state {
        Some(state) => (state.references, state.present) = (state.references + 1, present),
        None => {
            let driver = opened.map_or_else(open, Ok)?;
            let (sets, samples) = (HashMap::new(), HashMap::new());
            let mut nodes = OpenNodes::default();
            nodes.control(&driver.world, &driver.dir)?;
            *state = Some(State { references: 1, driver, opened_us, present, sets, samples, nodes, last_handle: 0 });
        }
    }
    Ok(())
}

fn shutdown() -> CallResult {
    let mut held = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    let state = held.as_mut().ok_or(UNINITIALIZED)?;
    state.references -= 1;
    if state.references == 0 {
        *held = None;
    }
    Ok(())
}

/// The handle of the first matching unit that exists; GPU_IS_LOST for a lost GPU.
fn find(call: Call, to: *mut nvmlDevice_t, which: impl Fn(&State, Unit) -> bool) -> CallResult {
    let unit = call.on_library(|s| {
        let units = s.driver.world.units().into_iter().filter(|u| s.index(u.gpu).is_some());
        let unit = units.into_iter().find(|unit| which(s, *unit)).ok_or(NOT_FOUND)?;
        let now = s.driver.now();
        if s.driver.log.faults.lost(unit.gpu, now) || s.driver.log.faults.absent(unit.gpu, now) {
            return Err(GPU_IS_LOST);
        }
        s.nodes.gpu(&s.driver.world, &s.driver.dir, unit.gpu)?;
        Ok(unit)
    })?;
    put(to, handle(unit))
}

/// The first word of each function is the name of its call in the body.
macro_rules! nvml {
    ($(fn $name:ident($call:ident $(, $arg:ident: $type:ty)*) $body:block)*) => {$(
        /// As in nvml.h.
        /// # Safety
        /// Pointers are NULL or point to what nvml.h requires.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $type),*) -> nvmlReturn_t {
            let $call = Call(stringify!($name));
            guard(|| $body)
        }
    )*};
}
use nvml;
