//! NVML access with one thread per GPU, because a driver call may block for long. A GPU that hangs stalls only its own samples.
//!
//! ```text
//!  gpu-watch   opens the library (a generation), lists GPUs every 5 s, starts and ends pollers, reopens the library after a driver change
//!  gpu-open    opens GPUs for gpu-watch, which abandons it if it hangs
//!  gpu-N       one GPU and its MIG devices: sample rings, process samples, process lists, readings, within its budget
//!  gpu-events  XID errors of all GPUs
//!  gpu-pids    determines whether the driver's PIDs are this machine's
//! ```
//! A generation stays open while any thread uses it. Threads that hang keep theirs; no other thread waits for them.

mod budget;
mod calls;
mod context;
mod device_nodes;
mod diagnosis;
mod error;
mod events;
mod fields;
mod gpm;
mod gpu_health;
mod inspect;
mod latch;
mod library;
mod library_search;
mod list_entries;
mod mig;
mod nvml_caller;
mod opener;
mod pid_space;
mod poll_interval;
mod poller;
mod process_calls;
mod readings;
mod release;
mod retry;
mod ring;
mod rm;
mod sample_buffer;
mod slots;
mod source;
mod watch;
mod xids;

pub use self::context::Context;
pub use self::diagnosis::Diagnosis;
pub use self::error::GpuError;
pub use self::inspect::inspect;
#[cfg(test)]
pub use self::release::channel as release_channel;
pub use self::release::{DEFAULT_SECONDS, GpuSelector, MOST_SECONDS, ReleaseError, ReleaseSender, Released};
pub use self::watch::start;
