//! The privileged tests: the real agent on the real kernel, real Docker Engines, a real Prometheus, the simulated driver.

mod accuracy;
mod bad_input;
mod behaviours;
mod demo;
mod docker;
mod lives;
mod losses;
mod modes;
mod prometheus;
mod simulator;
