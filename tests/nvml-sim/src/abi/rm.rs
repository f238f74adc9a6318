//! The driver's private interface, as far as the agent uses it: ioctls of `nvidiactl` for the resource manager's own sample buffer.
//!
//! A client that has this library in LD_PRELOAD calls this `ioctl`. Every other ioctl goes to the kernel. The node may be a plain file
//! (`nodes = true`); it only has to be called `nvidiactl`. Numbers and layouts are those of NVIDIA's open kernel modules.

use std::collections::HashMap;
use std::ffi::{c_int, c_ulong, c_void};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nvml_wrapper_sys::bindings::nvmlReturn_t;

use super::{Call, NOT_FOUND, NOT_SUPPORTED, failed, locked};
use crate::driver::Driver;
use crate::model::{ENGINES, Engine};
use crate::world::RmSamples;

const TYPE: c_ulong = b'F' as c_ulong;
const CONTROL: c_ulong = 0x2a;
const ALLOC: c_ulong = 0x2b;
const CARD_INFO: c_ulong = 200;
const CLASS_CLIENT: u32 = 0x41;
const CLASS_DEVICE: u32 = 0x80;
const GET_ID_INFO: u32 = 0x205;
const GET_SAMPLES: u32 = 0x2080_2096;
/// Ids of GPUs are above this.
const GPU_IDS: u32 = 0x100;
const FIRST_CLIENT: u32 = 0xc1d0_0001;
const CARD_BYTES: usize = 72;
const MAX_CARDS: usize = 32;
const SLOTS: usize = 72;
const HEADER: usize = 16;
const NEXT_SLOT: usize = 12;
const NO_PROCESS: u32 = u32::MAX;
/// The buffer's stamps differ from NVML's by up to 0.8 ms (measured).
const LATER_NS: u64 = 766_000;

const OK: u32 = 0;
const INVALID_COMMAND: u32 = 0x24;
const INVALID_CLIENT: u32 = 0x23;
const INVALID_PARAM_STRUCT: u32 = 0x3a;
const REFUSED: u32 = 0x56;

/// Engines of a sample in the order of the buffer.
const ORDER: [Engine; ENGINES] = [Engine::Mem, Engine::Sm, Engine::Enc, Engine::Dec, Engine::Jpg, Engine::Ofa];

/// Engines, bytes of an engine and of a sample, from a driver version on.
const LAYOUTS: [(u32, usize, usize, usize); 3] = [(570, 6, 128, 776), (550, 6, 116, 704), (0, 4, 116, 472)];

/// The GPU of each client, once it has a device.
static CLIENTS: Mutex<Option<HashMap<u32, usize>>> = Mutex::new(None);

/// A struct of the caller.
#[derive(Clone, Copy)]
struct Params(*mut u8);

impl Params {
    fn get<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the request states the size of the struct, and all offsets here are within it.
        unsafe { self.0.add(offset).cast::<T>().read_unaligned() }
    }

    fn put<T>(self, offset: usize, value: T) {
        // SAFETY: as above.
        unsafe { self.0.add(offset).cast::<T>().write_unaligned(value) };
    }

    fn nested(self, offset: usize) -> Self {
        Self(self.get::<u64>(offset) as *mut u8)
    }
}

/// As in ioctl(2).
/// # Safety
/// `params` is what the request requires.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, params: *mut c_void) -> c_int {
    let node = || std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
    let is_node = |path: PathBuf| path.file_name().is_some_and(|name| name == "nvidiactl");
    if request >> 8 & 0xff != TYPE || params.is_null() || !is_node(node()) {
        // SAFETY: the arguments are the caller's.
        return unsafe { libc::syscall(libc::SYS_ioctl, fd, request, params) } as c_int;
    }
    let params = Params(params.cast());
    let done = match request & 0xff {
        CARD_INFO => cards(params),
        ALLOC => alloc(params),
        CONTROL => control(params),
        _ => Err(NOT_SUPPORTED),
    };
    if done.is_ok() {
        return 0;
    }
    // SAFETY: errno is the calling thread's.
    unsafe { *libc::__errno_location() = libc::EIO };
    -1
}

fn cards(params: Params) -> Result<(), nvmlReturn_t> {
    locked(|state| {
        let present = state.present.iter().take(MAX_CARDS);
        for (n, gpu) in present.enumerate() {
            let card = Params(params.0.wrapping_add(n * CARD_BYTES));
            let bus_id = &state.driver.world.gpus[*gpu].pci_bus_id;
            let mut parts = bus_id.split([':', '.']).map(|part| u32::from_str_radix(part, 16).unwrap_or_default());
            let mut next = || parts.next().unwrap_or_default();
            card.put(0, 1u8);
            card.put(4, next());
            card.put(8, next() as u8);
            card.put(9, next() as u8);
            card.put(16, GPU_IDS + *gpu as u32);
            card.put(56, *gpu as u32);
        }
        Ok(())
    })
}

/// Root, parent, object, class, pointer, size, status.
fn alloc(params: Params) -> Result<(), nvmlReturn_t> {
    let (client, class) = (params.get::<u32>(0), params.get::<u32>(12));
    let mut clients = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner);
    let clients = clients.get_or_insert_default();
    match class {
        CLASS_CLIENT => {
            let handle = FIRST_CLIENT + clients.len() as u32;
            clients.insert(handle, usize::MAX);
            params.put(8, handle);
        }
        CLASS_DEVICE => {
            let instance = params.nested(16).get::<u32>(0) as usize;
            clients.insert(client, instance);
        }
        _ => {}
    }
    params.put(28, OK);
    Ok(())
}

/// Client, object, command, flags, pointer, size, status.
fn control(params: Params) -> Result<(), nvmlReturn_t> {
    let (client, command, size) = (params.get::<u32>(0), params.get::<u32>(8), params.get::<u32>(24) as usize);
    let known = CLIENTS.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|all| all.get(&client).copied());
    let status = match (command, known) {
        (_, None) => INVALID_CLIENT,
        (GET_ID_INFO, _) => {
            let info = params.nested(16);
            info.put(8, info.get::<u32>(0).saturating_sub(GPU_IDS));
            info.put(12, 0u32);
            OK
        }
        (GET_SAMPLES, Some(gpu)) => {
            Call("rmSamples").enter(Some(gpu))?;
            locked(|state| fill(&mut state.driver, gpu, params.nested(16), size))?
        }
        _ => INVALID_COMMAND,
    };
    params.put(28, status);
    Ok(())
}

/// Writes the samples. A full buffer has wrapped: the next slot to be written has the oldest sample.
fn fill(driver: &mut Driver, gpu: usize, to: Params, size: usize) -> Result<u32, nvmlReturn_t> {
    let kind = *driver.world.rm_samples(gpu);
    if kind == RmSamples::Refused || !driver.world.gpus.get(gpu).ok_or(NOT_FOUND)?.mig.is_empty() {
        return Ok(REFUSED);
    }
    let major: u32 = driver.world.driver_version.split('.').next().and_then(|major| major.parse().ok()).unwrap_or_default();
    let (_, engines, engine_size, sample_size) = LAYOUTS.into_iter().find(|layout| major >= layout.0).ok_or(NOT_FOUND)?;
    if size != HEADER + SLOTS * sample_size {
        return Ok(INVALID_PARAM_STRUCT);
    }
    driver.sync(gpu).map_err(failed)?;
    let ring = driver.rings.get(gpu).ok_or(NOT_FOUND)?;
    let newest = ring.iter().skip(ring.len().saturating_sub(SLOTS));
    let first = if newest.len() == SLOTS { (ring.back().map_or(0, |sample| sample.at_us) / 100_000) as usize % SLOTS } else { 0 };
    to.put(NEXT_SLOT, ((first + newest.len()) % SLOTS) as u32);
    for (n, sample) in newest.enumerate() {
        let slot = (first + n) % SLOTS;
        let at = HEADER + slot * sample_size;
        let util = driver.shown_util(gpu, sample);
        to.put(at, driver.stamp(gpu, sample.at_us) * 1_000 + LATER_NS);
        for (n, engine) in ORDER.into_iter().take(engines).enumerate() {
            let at = at + 8 + n * engine_size;
            let pid = driver.named(gpu, sample, engine as usize).map(|pid| if kind == RmSamples::Wrong { pid + 1 } else { pid });
            to.put(at, util[engine as usize] * 100);
            to.put(at + 8, pid.unwrap_or(NO_PROCESS));
        }
    }
    Ok(OK)
}
