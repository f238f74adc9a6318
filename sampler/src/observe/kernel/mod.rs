//! The kernel's side: offsets, load and attach, ring readers, the scan of what was there before.

mod btf;
mod load;
pub mod rings;
pub mod scan;

pub use load::{Program, load};

#[cfg(ebpf_object)]
pub(crate) static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sampler-ebpf.o")));
#[cfg(not(ebpf_object))]
pub(crate) static OBJECT: Option<&[u8]> = None;

use thiserror::Error;

/// Why kernel tracking is not there. Each names its remedy; the agent then runs degraded and says so.
#[derive(Debug, Error)]
pub enum KernelError {
    #[error("this build carries no kernel program; build it with `cargo xtask build`")]
    NoObject,
    #[error("cannot resolve kernel field offsets; use a kernel built with CONFIG_DEBUG_INFO_BTF")]
    Btf(#[from] btf::BtfError),
    #[error("the kernel refused to {what}; run as root or with CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN before 5.8)")]
    Refused { what: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error(
        "the kernel program's self-check failed (mask {0:#x}): its offsets do not fit this kernel; please report the kernel version"
    )]
    SelfCheck(u32),
    #[error("the kernel program lacks `{0}`: the build is inconsistent, run `cargo xtask build`")]
    Inconsistent(&'static str),
}
