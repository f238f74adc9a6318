//! The privileged tests: the real agent on the real kernel, real Docker Engines, a real Prometheus, the simulated driver.

mod accuracy;
mod bad_input;
mod behaviours;
mod demo;
mod docker;
mod doubles;
mod engines;
mod explain;
mod faults;
mod labels;
mod lives;
mod losses;
mod modes;
mod places;
mod prometheus;
mod simulator;
