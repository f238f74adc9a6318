//! What people and Prometheus get: the ledger joins GPU time with labels, families encode it, http serves it.

mod access;
mod assigned;
mod contenders;
mod encode;
mod explain;
mod families;
mod gpus;
mod html_tables;
pub mod http;
mod ledger;
pub mod live;
mod nvml_families;
mod pressure;
mod sessions;
pub mod state;
mod web;
