//! Functions of the library: init, devices, versions, texts of errors.

use std::ffi::{CStr, c_char, c_int, c_uint};

use super::{
    INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, NO_DEVICE, NOT_INITIALIZED, NOT_READY, OUT_OF_MEMORY,
    SYSTEM_NOT_READY, UNKNOWN, cuda, guard, init, initialized, put,
};

/// CUDA 12.4.
const VERSION: c_int = 12_040;

/// The texts are the real driver's.
const TEXTS: [(c_int, &CStr); 11] = [
    (0, c"no error"),
    (INVALID_VALUE, c"invalid argument"),
    (OUT_OF_MEMORY, c"out of memory"),
    (NOT_INITIALIZED, c"initialization error"),
    (NO_DEVICE, c"no CUDA-capable device is detected"),
    (INVALID_DEVICE, c"invalid device ordinal"),
    (INVALID_CONTEXT, c"invalid device context"),
    (INVALID_HANDLE, c"invalid resource handle"),
    (NOT_READY, c"device not ready"),
    (SYSTEM_NOT_READY, c"system not yet initialized"),
    (UNKNOWN, c"unknown error"),
];

cuda! {
    fn cuInit(flags: c_uint) {
        guard(|| if flags == 0 { init() } else { Err(INVALID_VALUE) })
    }
    fn cuDriverGetVersion(version: *mut c_int) {
        guard(|| put(version, VERSION))
    }
    fn cuDeviceGetCount(count: *mut c_int) {
        initialized(|process| put(count, process.gpus.len() as c_int))
    }
    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) {
        initialized(|process| {
            let known = usize::try_from(ordinal).is_ok_and(|index| index < process.gpus.len());
            if known { put(device, ordinal) } else { Err(INVALID_DEVICE) }
        })
    }
    fn cuGetErrorString(error: c_int, text: *mut *const c_char) {
        guard(|| match TEXTS.iter().find(|(code, _)| *code == error) {
            Some((_, known)) => put(text, known.as_ptr()),
            None => put(text, std::ptr::null()).and(Err(INVALID_VALUE)),
        })
    }
}
