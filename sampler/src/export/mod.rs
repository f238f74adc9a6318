//! What people and Prometheus get: the ledger joins GPU time with labels, families encode it, http serves it.

mod encode;
mod families;
pub mod http;
mod ledger;
mod page;
