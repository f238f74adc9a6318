//! HTTP interface: the ledger joins GPU time with labels, the families of the catalogue encode it, http serves it.

mod access;
mod assigned;
mod catalogue;
mod connections;
mod container_state;
mod contenders;
mod encode;
pub mod experiments;
mod explain;
pub mod exposition;
mod families;
pub mod gpu_holders;
mod gpus;
mod guard;
mod html_tables;
mod http;
mod json_request;
mod label_text;
pub mod ledger;
pub mod live;
mod nvml_families;
mod page_body;
mod pods;
mod pressure;
pub mod rejections;
pub mod release;
mod scrapers;
mod series_ids;
mod series_starts;
pub mod server;
pub mod sessions;
pub mod state;
mod timed_stream;
mod waits;
mod web;

#[cfg(test)]
mod tests;
