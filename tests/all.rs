//! The privileged tests: the real agent on the real kernel, a real Docker Engine, a real Prometheus, the simulated driver.

mod accuracy;
mod bad_input;
mod demo;
mod docker;
mod prometheus;
mod simulator;
