//! Starts the agent for the verbs that show it.

use crate::{
    http, sys,
    tools::{self, Running, say, tail},
};
use anyhow::{Result, bail};
use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// From its start to the first merged scan; usually under a second.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// Waits for the first merged scan.
pub fn start(verb: &str, mut command: Command, tmp: &Path) -> Result<(Running, SocketAddr, PathBuf)> {
    // Free a moment ago; should another take it in between, the agent says so and the demo fails.
    let server = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let log = tmp.join("agent.log");
    command
        .args(["--listen", &server.to_string()])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(fs::OpenOptions::new().append(true).open(&log)?);
    // Out of the terminal's group: on Ctrl-C it has to answer once more.
    sys::own_session(&mut command);
    let mut agent = Running::start("the agent", tools::forget_cargo(&mut command))?;
    let from = Instant::now();
    loop {
        if let Some(status) = agent.ended()? {
            bail!("the agent ended ({status}):\n{}", tail(&log));
        }
        if http::get(server, "/readyz").is_ok_and(|answer| answer.status == 200) {
            break;
        }
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        if from.elapsed() > READY_PATIENCE {
            bail!("the agent is not ready after {READY_PATIENCE:?}:\n{}", tail(&log));
        }
        thread::sleep(Duration::from_millis(20));
    }
    say(format_args!("{verb}: the agent is ready after {} ms", from.elapsed().as_millis()));
    Ok((agent, server, log))
}
