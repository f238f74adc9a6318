//! Tests of the symbols as clients call them, where several calls, or time, are involved. There is one instance, so one test at a time.

#![expect(clippy::undocumented_unsafe_blocks, reason = "all pass NULL or values on the stack of the test")]

use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nvml_wrapper_sys::bindings::{nvmlDevice_t, nvmlEventData_t, nvmlProcessUtilizationSample_t};

use super::device::*;
use super::events::*;
use super::mig::*;
use super::system::*;
use super::usage::*;
use crate::faults::{Clear, Fault, FaultKind};
use crate::loads::{self, Log};
use crate::symbols::hide;
use crate::{faults, world};

pub static DIR: Mutex<Option<PathBuf>> = Mutex::new(None);
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct AbiSim {
    dir: tempfile::TempDir,
    _only: MutexGuard<'static, ()>,
}

impl AbiSim {
    /// A world that began this long before now.
    fn new(began_us: u64, keys: &str) -> Self {
        let only = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let begun = loads::now_us() - began_us;
        std::fs::write(dir.path().join(world::FILE), format!("begun_us = {begun}\n{keys}")).unwrap();
        // One busy process, this one.
        let (pid, born) = (std::process::id(), devkit::process::start_time(std::process::id()).unwrap());
        let load = format!(
            "{{\"begin\":{{\"id\":1,\"pid\":{pid},\"start_time\":{born},\"gpu\":0,\"demand\":0.9,\"memory_bytes\":5,\"begin_us\":{begun}}}}}\n"
        );
        std::fs::write(dir.path().join(loads::FILE), load).unwrap();
        *DIR.lock().unwrap() = Some(dir.path().to_owned());
        Self { dir, _only: only }
    }

    fn log(&self) -> Log {
        Log::open(self.dir.path()).unwrap()
    }

    fn fault(&self, kind: FaultKind, gpu: Option<usize>, call: Option<&str>, lasts_ms: Option<u64>) {
        let call = call.map(str::to_owned);
        let fault = Fault { gpu, call, error: 20, micros: 300_000, reasons: 4, ..Fault::of_kind(kind) };
        self.log().fault(fault, lasts_ms.map(|ms| ms * 1_000)).unwrap();
    }

    fn clear(&self) {
        self.log().clear(Clear { gpu: None, kind: None, at_us: 0 }).unwrap();
    }
}

impl Drop for AbiSim {
    fn drop(&mut self) {
        while unsafe { nvmlShutdown() } == 0 {}
        *DIR.lock().unwrap() = None;
    }
}

fn init() -> u32 {
    unsafe { nvmlInit_v2() }
}

fn count() -> u32 {
    let mut n = 99;
    assert_eq!(unsafe { nvmlDeviceGetCount_v2(&raw mut n) }, 0);
    n
}

fn device(index: u32) -> Result<nvmlDevice_t, u32> {
    let mut device: nvmlDevice_t = null_mut();
    let code = unsafe { nvmlDeviceGetHandleByIndex_v2(index, &raw mut device) };
    if code == 0 { Ok(device) } else { Err(code) }
}

fn power(device: nvmlDevice_t) -> u32 {
    let mut mw = 0;
    unsafe { nvmlDeviceGetPowerUsage(device, &raw mut mw) }
}

/// Result code and count of a read of process samples with this room.
fn process_samples(device: nvmlDevice_t, room: u32) -> (u32, u32) {
    let mut samples = vec![
        nvmlProcessUtilizationSample_t { pid: 0, timeStamp: 0, smUtil: 0, memUtil: 0, encUtil: 0, decUtil: 0 };
        room as usize
    ];
    let mut count = room;
    let code = unsafe { nvmlDeviceGetProcessUtilization(device, samples.as_mut_ptr(), &raw mut count, 0) };
    (code, count)
}

fn took(f: impl FnOnce()) -> Duration {
    let from = Instant::now();
    f();
    from.elapsed()
}

#[test]
fn the_size_query_returns_a_capacity_and_answers_may_grow() {
    let check = |keys: &str, reads: &[(u32, (u32, u32))]| {
        let _sim = AbiSim::new(5_000_000, &format!("{keys}\n[[gpus]]"));
        assert_eq!(init(), 0);
        for (room, expect) in reads {
            assert_eq!(process_samples(device(0).unwrap(), *room), *expect, "{keys} with room for {room}");
        }
    };
    check("", &[(0, (7, 100)), (1, (0, 1)), (100, (0, 1))]);
    check("row_probe = 4096", &[(0, (7, 4096)), (4096, (0, 1))]);
    check("rows_grow = true", &[(0, (7, 100)), (100, (7, 101)), (101, (0, 1))]);
    check("garbage = ['zombies']", &[(0, (7, 100)), (100, (7, 301)), (301, (0, 301))]);
}

#[test]
fn errors_affect_the_calls_that_they_name() {
    let sim = AbiSim::new(5_000_000, "[[gpus]]\n[[gpus]]");
    assert_eq!(init(), 0);
    let (first, second) = (device(0).unwrap(), device(1).unwrap());
    sim.fault(FaultKind::Error, Some(0), Some("nvmlDeviceGetPowerUsage"), None);
    assert_eq!((power(first), power(second), process_samples(first, 9).0), (20, 0, 0));
    sim.clear();
    sim.fault(FaultKind::Error, Some(1), None, Some(900));
    assert_eq!((power(first), power(second), process_samples(second, 9).0), (0, 20, 20));
    std::thread::sleep(Duration::from_millis(920));
    assert_eq!(power(second), 0);
    sim.fault(FaultKind::Error, None, Some("nvmlInit_v2"), None);
    assert_eq!((init(), power(first)), (20, 0));
    sim.clear();
    sim.fault(FaultKind::Lost, Some(0), None, None);
    assert_eq!((power(first), device(0), device(1)), (faults::GPU_IS_LOST, Err(faults::GPU_IS_LOST), Ok(second)));
}

#[test]
fn a_stall_blocks_only_its_gpu_and_slow_calls_are_slow() {
    let sim = AbiSim::new(5_000_000, "[[gpus]]\n[[gpus]]");
    assert_eq!(init(), 0);
    let (first, second) = (device(0).unwrap(), device(1).unwrap() as usize);
    sim.fault(FaultKind::Stall, Some(0), None, Some(1_000));
    let other = std::thread::spawn(move || took(|| assert_eq!(power(second as nvmlDevice_t), 0)));
    let stalled = took(|| assert_eq!(power(first), 0));
    assert!(stalled > Duration::from_millis(900) && other.join().unwrap() < Duration::from_millis(700), "{stalled:?}");
    sim.fault(FaultKind::Slow, Some(0), None, None);
    assert!(took(|| assert_eq!(power(first), 0)) >= Duration::from_millis(300));
    sim.clear();
    assert!(took(|| assert_eq!(power(first), 0)) < Duration::from_millis(250));
}

#[test]
fn process_lists_take_the_worlds_latency_and_block_no_other_call() {
    let _sim = AbiSim::new(5_000_000, "list_us = 900000\n[[gpus]]");
    assert_eq!(init(), 0);
    let device = device(0).unwrap() as usize;
    let list = std::thread::spawn(move || {
        let mut n: c_uint = 0;
        let call = || unsafe {
            super::processes::nvmlDeviceGetComputeRunningProcesses_v3(device as nvmlDevice_t, &raw mut n, null_mut())
        };
        let from = Instant::now();
        assert_eq!({ call }(), 7);
        (from.elapsed(), n)
    });
    assert!(took(|| assert_eq!(power(device as nvmlDevice_t), 0)) < Duration::from_millis(700));
    let (long, n) = list.join().unwrap();
    assert!(long >= Duration::from_millis(900) && n == 1);
}

#[test]
fn a_reloaded_driver_requires_a_new_instance() {
    let sim = AbiSim::new(5_000_000, "[[gpus]]");
    assert_eq!(init(), 0);
    let first = device(0).unwrap();
    sim.fault(FaultKind::Reload, None, None, Some(900));
    assert_eq!((power(first), init()), (18, 9));
    std::thread::sleep(Duration::from_millis(920));
    // The old instance stays invalid.
    assert_eq!((init(), power(first)), (0, 18));
    unsafe { (nvmlShutdown(), nvmlShutdown()) };
    assert_eq!((power(first), init(), power(first)), (1, 0, 0));
}

#[test]
fn the_list_of_devices_is_updated_at_each_init() {
    let keys = "[[gpus]]\n[[gpus]]\n[[gpus]]\n[[faults]]\nkind = 'absent'\ngpu = 1\nfrom = '0s'\nlasts = '5.9s'";
    let sim = AbiSim::new(5_000_000, keys);
    assert_eq!((init(), count()), (0, 2));
    let last = device(1).unwrap();
    let mut index = 9;
    assert_eq!((unsafe { nvmlDeviceGetIndex(last, &raw mut index) }, index), (0, 1));
    std::thread::sleep(Duration::from_millis(950));
    assert_eq!(count(), 2);
    // Handles stay valid, indices do not.
    assert_eq!((init(), count(), device(2)), (0, 3, Ok(last)));
    sim.fault(FaultKind::Absent, Some(2), None, None);
    assert_eq!((power(last), count()), (faults::GPU_IS_LOST, 3));
    assert_eq!((init(), count(), device(2)), (0, 2, Err(2)));
}

#[test]
fn xids_reach_each_set_once_and_in_order() {
    let sim = AbiSim::new(
        5_000_000,
        "[[gpus]]\n[[gpus]]\n[[xids]]\ngpu = 0\nat = '1s'\nxid = 13\n[[xids]]\ngpu = 1\nat = '6s'\nxid = 31\ncount = 2",
    );
    assert_eq!(init(), 0);
    let sets: Vec<usize> = (0..2)
        .map(|_| {
            let mut set: *mut c_void = null_mut();
            assert_eq!(unsafe { nvmlEventSetCreate(&raw mut set) }, 0);
            set as usize
        })
        .collect();
    let register = |gpu: u32, set: usize| unsafe { nvmlDeviceRegisterEvents(device(gpu).unwrap(), 8, set as *mut c_void) };
    assert_eq!((register(0, sets[0]), register(1, sets[0]), register(0, sets[1])), (0, 0, 0));
    sim.log().xid(0, 79, 1).unwrap();
    let wait = |set: usize, ms: u32| {
        let mut data: nvmlEventData_t = unsafe { std::mem::zeroed() };
        let code = unsafe { nvmlEventSetWait_v2(set as *mut c_void, &raw mut data, ms) };
        if code == 0 { Ok((data.device, data.eventData)) } else { Err(code) }
    };
    let (zero, one) = (device(0).unwrap(), device(1).unwrap());
    assert_eq!([wait(sets[0], 900), wait(sets[0], 3_000), wait(sets[0], 0)], [Ok((zero, 79)), Ok((one, 31)), Ok((one, 31))]);
    assert_eq!(
        [wait(sets[1], 0), wait(sets[1], 0), wait(sets[0], 30), wait(7777, 0)],
        [Ok((zero, 79)), Err(10), Err(10), Err(2)]
    );
}

#[test]
fn a_throttled_gpu_returns_its_reasons() {
    let sim = AbiSim::new(5_000_000, "[[gpus]]\n[[gpus]]");
    assert_eq!(init(), 0);
    sim.fault(FaultKind::Throttle, Some(0), None, None);
    let reasons = |gpu| {
        let mut bits = 0;
        assert_eq!(unsafe { nvmlDeviceGetCurrentClocksEventReasons(device(gpu).unwrap(), &raw mut bits) }, 0);
        bits
    };
    assert_eq!((reasons(0), reasons(1)), (4, 1));
}

#[test]
fn a_gpu_in_mig_mode_has_no_utilization_but_its_devices_have_identities() {
    let _sim = AbiSim::new(5_000_000, "[[gpus]]\n[[gpus]]\nmig = ['MIG-a', { uuid = 'MIG-b', gi = 9, ci = 2, slices = 3 }]");
    assert_eq!(init(), 0);
    let gpu = device(1).unwrap();
    assert_eq!(process_samples(gpu, 9).0, 3);
    let mut mig: nvmlDevice_t = null_mut();
    assert_eq!(unsafe { nvmlDeviceGetHandleByUUID(c"MIG-b".as_ptr(), &raw mut mig) }, 0);
    let number = |f: unsafe extern "C" fn(nvmlDevice_t, *mut c_uint) -> u32, device| {
        let mut n = 99;
        let code = unsafe { f(device, &raw mut n) };
        if code == 0 { Ok(n) } else { Err(code) }
    };
    assert_eq!((number(nvmlDeviceIsMigDeviceHandle, mig), number(nvmlDeviceIsMigDeviceHandle, gpu)), (Ok(1), Ok(0)));
    assert_eq!((number(nvmlDeviceGetGpuInstanceId, mig), number(nvmlDeviceGetGpuInstanceId, gpu)), (Ok(9), Err(3)));
    assert_eq!((number(nvmlDeviceGetComputeInstanceId, mig), number(nvmlDeviceGetIndex, mig)), (Ok(2), Ok(1)));
    assert_eq!((process_samples(mig, 9).0, number(nvmlDeviceGetMinorNumber, mig)), (3, Err(3)));
    let mut parent: nvmlDevice_t = null_mut();
    assert_eq!((unsafe { nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig, &raw mut parent) }, parent), (0, gpu));
    let mut name = [0 as c_char; 96];
    assert_eq!(unsafe { nvmlDeviceGetName(mig, name.as_mut_ptr(), 96) }, 0);
    assert_eq!(unsafe { CStr::from_ptr(name.as_ptr()) }.to_str(), Ok("Tesla V100-SXM2-16GB MIG 3g.6gb"));
}

#[test]
fn hidden_symbols_are_not_found_and_their_neighbours_are() {
    // Cargo puts the library next to the tests.
    let built = std::env::current_exe().unwrap().with_file_name("libnvidia_ml_sim.so");
    let mut image = std::fs::read(&built).unwrap();
    let hidden = ["nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetSamples"].map(str::to_owned);
    hide(&mut image, &hidden).unwrap();
    assert!(hide(&mut image, &hidden).unwrap_err().to_string().contains("no symbol nvmlDeviceGetCompute"));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lib.so");
    std::fs::write(&path, image).unwrap();
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let library = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
    assert!(!library.is_null());
    let found = |name: &std::ffi::CStr| unsafe { !libc::dlsym(library, name.as_ptr()).is_null() };
    assert!(!found(c"nvmlDeviceGetComputeRunningProcesses") && !found(c"nvmlDeviceGetSamples"));
    assert!(found(c"nvmlDeviceGetComputeRunningProcesses_v2") && found(c"nvmlDeviceGetProcessUtilization"));
}
