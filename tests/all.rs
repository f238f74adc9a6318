//! The privileged tests: the real agent on the real kernel, real Docker Engines, a real Prometheus, the simulated driver.

mod accuracy;
mod bad_input;
mod behaviours;
mod contention;
mod demo;
mod docker;
mod doubles;
mod engines;
mod estimator;
mod explain;
mod faults;
mod gpu_recording;
mod labels;
mod lives;
mod losses;
mod matrix;
mod modes;
mod pid_space;
mod places;
mod pressure;
mod prometheus;
mod quirks;
mod sessions;
mod simulator;
mod survival;
mod web;
