//! Starts the agent for verbs that show its results.

use crate::{
    sys,
    tools::{self, Running, progress, tail},
};
use anyhow::{Result, bail};
use devkit::http::Server;
use std::{
    fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Limit from the start to the first merged scan; usually it takes less than a second.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// Starts the agent and waits for its first merged scan.
pub fn start(verb: &str, mut command: Command, tmp: &Path) -> Result<(Running, SocketAddr, PathBuf)> {
    // The port was free a moment ago; if another process takes it meanwhile, the agent reports that and ends.
    let server = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let log = tmp.join("agent.log");
    command
        .args(["--listen", &server.to_string()])
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(fs::OpenOptions::new().append(true).open(&log)?);
    // Outside the terminal's process group: after Ctrl-C it is scraped once more.
    sys::own_session(&mut command);
    let mut agent = Running::start("the agent", tools::forget_cargo(&mut command))?;
    let from = Instant::now();
    loop {
        if let Some(status) = agent.ended()? {
            bail!("the agent ended ({status}):\n{}", tail(&log));
        }
        if Server::tcp(server).get("/readyz").is_ok_and(|response| response.status == 200) {
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
    progress(format_args!("{verb}: the agent is ready after {} ms", from.elapsed().as_millis()));
    Ok((agent, server, log))
}
