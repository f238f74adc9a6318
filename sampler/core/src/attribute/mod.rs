//! Attribution of samples to users: observations of GPUs in, [`Fact`](crate::fact::Fact)s out.
//!
//! ```text
//!  poll -> samples wait until late process samples are read -> sample + its process samples -> identity as of its time -> Fact
//!  no poll for longer than the driver's sample buffer holds -> unobserved
//! ```
//! Attribution does not depend on how facts are used, and nothing downstream of it needs identity: aggregation is the same live and in a
//! replay.

mod clock;
mod device;
mod process_attribution;
mod timeline;

pub use device::DeviceAttribution;
