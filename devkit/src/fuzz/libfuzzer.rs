//! libFuzzer, which crates.io's `libfuzzer-sys` has as C++ source. Its Rust side is not used, because it defines a program of its own;
//! here the program is that of the unit tests.

use libfuzzer_sys as _;
use std::{
    cell::RefCell,
    ffi::{CString, c_char, c_int},
    panic::{AssertUnwindSafe, catch_unwind},
    process, slice,
};

unsafe extern "C" {
    fn LLVMFuzzerRunDriver(
        count: *mut c_int,
        arguments: *mut *mut *mut c_char,
        run_one: extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

thread_local! {
    static HARNESS: RefCell<Option<Box<dyn Fn(&[u8])>>> = const { RefCell::new(None) };
}

/// Runs until libFuzzer ends the process: after the time in its arguments, which are separated by line breaks, or with the first finding.
pub fn run(arguments: &str, harness: impl Fn(&[u8]) + 'static) -> ! {
    HARNESS.set(Some(Box::new(harness)));
    let words = ["fuzz"].into_iter().chain(arguments.lines());
    let mut words: Vec<*mut c_char> = words.map(|word| CString::new(word).unwrap_or_default().into_raw()).collect();
    let mut count = c_int::try_from(words.len()).unwrap_or(c_int::MAX);
    words.push(std::ptr::null_mut());
    let mut arguments = words.as_mut_ptr();
    // SAFETY: `count` strings that are never freed, and a null pointer after them; all outlive the call, which does not return to other
    // users of them.
    let status = unsafe { LLVMFuzzerRunDriver(&raw mut count, &raw mut arguments, run_one) };
    process::exit(status);
}

extern "C" fn run_one(bytes: *const u8, length: usize) -> c_int {
    // SAFETY: libFuzzer passes a valid input, also an empty one, that it does not change during the call.
    let input = if length == 0 { &[] } else { unsafe { slice::from_raw_parts(bytes, length) } };
    let run = || HARNESS.with_borrow(|harness| harness.as_ref().map(|harness| harness(input)));
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        // The message was printed. libFuzzer writes the input to a file.
        process::abort();
    }
    0
}
