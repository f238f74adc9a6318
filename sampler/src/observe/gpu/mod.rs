//! NVML: one thread per GPU, because a driver call may block for long; a hung GPU stalls its own samples and nothing else.
//!
//! ```text
//!  gpu-watch   opens the library (a generation), lists GPUs every 5 s, starts and ends pollers, opens anew when the driver was replaced
//!  gpu-open    opens GPUs for gpu-watch, which leaves it behind where it hangs
//!  gpu-N       one GPU and its MIG devices: rings, rows, lists, readings, as its budget allows
//!  gpu-events  XID errors of all GPUs
//!  gpu-pids    settles whether the driver's pids are this machine's
//! ```
//! A generation lives as long as anyone uses it. Threads that hang keep theirs, and are waited for by nobody.

mod budget;
mod calls;
mod context;
mod device_nodes;
mod error;
mod events;
mod gpm;
mod gpu_health;
mod inspect;
mod library;
mod mig;
mod nvml_caller;
mod pid_space;
mod poll_interval;
mod poller;
mod readings;
mod ring;
mod slots;
mod watch;
mod xids;

pub use self::context::Context;
pub use self::error::GpuError;
pub use self::inspect::inspect;
pub use self::watch::start;
