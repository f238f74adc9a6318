//! A long run of the agent with faults, against the simulator's record.
//!
//! ```text
//! soak [--for 30m] [--seed N] [--faults NAME,..]
//! ```
//! Prints a line for each fault and a table of figures; exits with 1 if an invariant was violated, and names each with the seed that
//! repeats the run. `cargo xtask soak` builds and runs it. Needs root.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use gpu_sampler_tests::soak::{inject::storm_parent, interrupt, options::SoakOptions, soak};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [verb, lives] = &args[..]
        && verb == "storm"
        && let Ok(lives) = lives.parse()
    {
        storm_parent(lives);
        return ExitCode::SUCCESS;
    }
    interrupt::catch();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_secs());
    match SoakOptions::parse(&args, seed).and_then(|options| soak(&options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            interrupt::caught().map_or(ExitCode::FAILURE, |signal| ExitCode::from(128 + signal as u8))
        }
    }
}
