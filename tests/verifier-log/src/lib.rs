//! Preloaded into a program that loads eBPF programs: how many instructions the verifier of this kernel inspected of each, and how long its
//! log is. Each program is loaded once more, with a log, and dropped.
//!
//! ```text
//! LD_PRELOAD=/path/libverifier_log.so VERIFIER_LOG=programs.tsv gpu-sampler run
//! ```
//! A line of the file: the id of the program that stays, instructions, bytes of the log; separated by tabs. What is not known is `unknown`.

use std::ffi::{c_int, c_long};
use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::sync::atomic::{AtomicPtr, Ordering};

const FILE: &str = "VERIFIER_LOG";
const BPF_PROG_LOAD: usize = 5;
/// Every instruction on every path, with the state of its registers.
const WHOLE: u32 = 2;
/// The most that kernels before 5.2 accept.
const LOG_BYTES: usize = (u32::MAX >> 8) as usize;
/// More than kernels have of `union bpf_attr`.
const MOST_ATTRIBUTES: usize = 512;
/// The offsets of `log_level`, `log_size` and `log_buf`.
const LOG_FIELDS: (usize, usize, usize) = (24, 28, 32);

type Syscall = unsafe extern "C" fn(c_long, usize, usize, usize, usize, usize, usize) -> c_long;

/// In place of that of the C library, which the loader of programs calls.
///
/// # Safety
///
/// As of `syscall` of the C library. Arguments beyond those of the system call have any value.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn syscall(number: c_long, a: usize, b: usize, c: usize, d: usize, e: usize, f: usize) -> c_long {
    let Some(call) = original() else {
        // Nothing else could be returned that its caller understands.
        std::process::abort();
    };
    // SAFETY: the caller's arguments, unchanged.
    let returned = unsafe { call(number, a, b, c, d, e, f) };
    if number == libc::SYS_bpf
        && a == BPF_PROG_LOAD
        && let Ok(program) = c_int::try_from(returned)
        && program >= 0
        // SAFETY: the kernel has accepted these attributes.
        && let Err(problem) = unsafe { inspect(call, program, b, c) }
    {
        eprintln!("verifier-log: {problem}");
    }
    returned
}

/// The C library's `syscall`. A lock would call this one.
fn original() -> Option<Syscall> {
    static ORIGINAL: AtomicPtr<libc::c_void> = AtomicPtr::new(std::ptr::null_mut());
    let mut address = ORIGINAL.load(Ordering::Relaxed);
    if address.is_null() {
        // SAFETY: the name ends with a zero.
        address = unsafe { libc::dlsym(libc::RTLD_NEXT, c"syscall".as_ptr()) };
        ORIGINAL.store(address, Ordering::Relaxed);
    }
    // SAFETY: a function of this type is at this address, unless it is null, which is `None`.
    unsafe { std::mem::transmute::<*mut libc::c_void, Option<Syscall>>(address) }
}

/// Loads the program again and writes its line.
///
/// # Safety
///
/// `attributes` is the address of `bytes` bytes, with which the kernel has just loaded `program`.
unsafe fn inspect(call: Syscall, program: c_int, attributes: usize, bytes: usize) -> io::Result<()> {
    let Some(path) = std::env::var_os(FILE) else { return Ok(()) };
    let mut copy = [0_u8; MOST_ATTRIBUTES];
    let bytes = bytes.min(MOST_ATTRIBUTES);
    // SAFETY: as the caller states; the copy is at least as long.
    unsafe { std::ptr::copy_nonoverlapping(attributes as *const u8, copy.as_mut_ptr(), bytes) };
    let mut log = vec![0_u8; LOG_BYTES];
    let (level, size, buffer) = LOG_FIELDS;
    copy[level..level + 4].copy_from_slice(&WHOLE.to_ne_bytes());
    copy[size..size + 4].copy_from_slice(&(LOG_BYTES as u32).to_ne_bytes());
    copy[buffer..buffer + 8].copy_from_slice(&(log.as_mut_ptr() as u64).to_ne_bytes());
    // SAFETY: attributes that the kernel accepted before, with a log that lives until it returns.
    let again = unsafe { call(libc::SYS_bpf, BPF_PROG_LOAD, copy.as_ptr() as usize, bytes, 0, 0, 0) };
    let again = c_int::try_from(again).unwrap_or(-1);
    let (instructions, length) = if again < 0 {
        eprintln!("verifier-log: {}", io::Error::last_os_error());
        (None, None)
    } else {
        // SAFETY: a descriptor that nothing else has.
        unsafe { libc::close(again) };
        let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
        let text = String::from_utf8_lossy(&log[..end]);
        (inspected(&text), Some(end))
    };
    let about = fs::read_to_string(format!("/proc/self/fdinfo/{program}"))?;
    let id = about.lines().find_map(|line| line.strip_prefix("prog_id:")).unwrap_or_default().trim();
    let line = format!("{id}\t{}\t{}\n", shown(instructions), shown(length));
    File::options().create(true).append(true).open(path)?.write_all(line.as_bytes())
}

fn shown<N: Display>(number: Option<N>) -> String {
    number.map_or("unknown".to_owned(), |number| number.to_string())
}

/// The number of instructions in the log's last part.
fn inspected(log: &str) -> Option<u32> {
    let line = log.lines().rev().find_map(|line| line.strip_prefix("processed "))?;
    line.split_once(" insns")?.0.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_read_from_the_log() {
        let log =
            "0: (b7) r0 = 0 ; R0_w=0\nprocessed text\n1: (95) exit\nprocessed 2 insns (limit 1000000) max_states_per_insn 0";
        assert_eq!(inspected(log), Some(2));
        assert_eq!(inspected("0: (95) exit"), None);
    }

    #[test]
    fn calls_have_the_result_of_the_c_library() {
        // SAFETY: a call without arguments.
        let pid = unsafe { syscall(libc::SYS_getpid, 0, 0, 0, 0, 0, 0) };
        assert_eq!(u32::try_from(pid), Ok(std::process::id()));
    }
}
