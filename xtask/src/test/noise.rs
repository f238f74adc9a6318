//! `test --noise`: other work of the machine while the tests run.

use crate::{
    build, sys,
    tools::{self, progress},
};
use anyhow::{Context as _, Result, bail};
use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

/// Its engine and its pods are removed within this time.
const ENDS_WITHIN: Duration = Duration::from_secs(30);

/// It ends when its standard input is closed, so also when this process is killed.
pub struct Noise(Child);

impl Noise {
    /// Returns once all of it runs. `command` makes a command with the environment of tests.
    pub fn start(command: &dyn Fn(&Path) -> Command) -> Result<Self> {
        let mut command = command(&build::debug_helper("noise")?);
        sys::own_session(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let mut child = command.spawn().with_context(|| tools::shown(&command))?;
        let out = child.stdout.take().context("the output of the noise")?;
        let noise = Self(child);
        let mut line = String::new();
        if BufReader::new(out).read_line(&mut line)? == 0 {
            bail!("the noise did not start");
        }
        progress(line.trim_end());
        Ok(noise)
    }

    /// Fails if it did not run until now.
    pub fn end(mut self) -> Result<()> {
        if let Some(status) = self.0.try_wait()? {
            bail!("the noise ended before the tests ({status})");
        }
        match self.stop()? {
            status if status.success() => Ok(()),
            status => bail!("the noise failed ({status})"),
        }
    }

    fn stop(&mut self) -> Result<ExitStatus> {
        drop(self.0.stdin.take());
        if tools::wait_until(ENDS_WITHIN, || !matches!(self.0.try_wait(), Ok(None))) {
            return Ok(self.0.wait()?);
        }
        self.0.kill()?;
        self.0.wait()?;
        bail!("the noise did not end within {} s and was killed", ENDS_WITHIN.as_secs())
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            progress(format_args!("{error:#}"));
        }
    }
}
