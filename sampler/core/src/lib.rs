//! The pure part of gpu-sampler: no IO, no clock, no threads, no unsafe code. Time arrives inside observations.
#![forbid(unsafe_code)]

pub mod aggregate;
pub mod attribute;
pub mod cgroup_path;
pub mod device;
pub mod experiment;
pub mod fact;
pub mod identity;
pub mod observation;
pub mod pid_space;
pub mod pipeline;
pub mod reconstruct;
pub mod snapshot;
pub mod units;
