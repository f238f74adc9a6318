//! gpu-sampler attributes GPU time to containers. Parses the command line, runs the command, prints the error chain.

mod agent;
mod allocator;
mod cli;
mod collectors;
mod config;
mod core_thread;
mod engine_rules;
mod error;
mod explain;
mod export;
mod freeze;
mod health;
mod host_name;
mod host_root;
mod inbox;
mod labels;
mod objects;
mod observe;
mod otlp;
mod privileges;
mod query;
mod reload;
mod security;
mod service_notify;
mod serving;
mod session;
mod wait_selector;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    allocator::configure();
    match cli::Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gpu-sampler: {}", error::display_chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}
