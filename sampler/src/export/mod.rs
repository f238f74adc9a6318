//! What people and Prometheus get: the ledger joins GPU time with labels, families encode it, http serves it.

mod access;
mod assigned;
mod driver;
mod encode;
mod explain;
mod families;
mod gpus;
pub mod http;
mod ledger;
pub mod live;
mod others;
mod page;
mod pressure;
mod sessions;
pub mod state;
mod web;
