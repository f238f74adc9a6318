//! From a cgroup path to labels.

mod path;

pub use path::{CgroupIdentity, Kind, Runtime, parse};
