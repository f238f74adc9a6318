//! The host's file system as the label sources use it.

pub use crate::host_root::Root;
