//! Whose each sample is: observations of GPUs in, [`Fact`](crate::fact::Fact)s out.
//!
//! ```text
//!  poll -> ticks and rows wait until late rows are there -> tick + its rows -> identity, as of their time -> Fact
//!  no poll for longer than the driver's ring holds       -> unobserved
//! ```
//! Nothing here knows what becomes of the facts, and nothing behind it needs identity: aggregation is the same live and in a replay.

mod clock;
mod device;
mod process_attribution;
mod timeline;

pub use device::{DeviceAttribution, DeviceView};
