//! What people and Prometheus get: the ledger joins GPU time with labels, families encode it, http serves it.

mod assigned;
mod encode;
mod explain;
mod families;
pub mod http;
mod ledger;
mod page;
