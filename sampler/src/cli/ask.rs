//! One GET to a running agent.

use std::time::Duration;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(5);
const MAX_BODY_BYTES: usize = 64 << 20;

/// What came of asking.
pub enum Answer {
    Found(Vec<u8>),
    /// The agent does not know the thing; its own words.
    NotFound(String),
    /// Nobody listens there.
    NoAgent(anyhow::Error),
}

/// `agent` is `http://HOST:PORT`. `remedy` is what to do where no agent is what answers there.
pub fn get(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<Answer> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    runtime.block_on(get_within(agent, path_and_query, token, remedy))
}

/// As [`get`], for who has a runtime.
pub async fn get_within(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<Answer> {
    match tokio::time::timeout(TIMEOUT, try_get(agent, path_and_query, token, remedy)).await {
        Ok(answer) => answer.with_context(|| format!("asking the agent at {agent}")),
        Err(_) => bail!(
            "the agent at {agent} did not answer within {} s: it hangs, or something else listens there; {remedy}",
            TIMEOUT.as_secs()
        ),
    }
}

async fn try_get(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<Answer> {
    let Some(authority) = agent.strip_prefix("http://").map(|rest| rest.trim_end_matches('/')) else {
        bail!("{agent:?} is not the address of an agent; give http://HOST:PORT");
    };
    let stream = match TcpStream::connect(authority).await {
        Ok(stream) => stream,
        Err(error) => return Ok(Answer::NoAgent(error.into())),
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let mut request = hyper::Request::get(path_and_query).header("Host", authority);
    if let Some(token) = token {
        request = request.header("Authorization", format!("Bearer {token}"));
    }
    let response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
    let status = response.status();
    let ours = response.headers().get("Server").is_some_and(|s| s.as_bytes().starts_with(b"gpu-sampler"));
    let body = Limited::new(response.into_body(), MAX_BODY_BYTES).collect().await.map_err(|error| anyhow::anyhow!(error))?;
    connection.abort();
    let body = body.to_bytes().to_vec();
    // What answers may be anything; a page of it is no message.
    let words = || String::from_utf8_lossy(&body).trim().lines().next().unwrap_or_default().chars().take(200).collect::<String>();
    match status.as_u16() {
        200 => Ok(Answer::Found(body)),
        404 if ours => Ok(Answer::NotFound(words())),
        _ if !ours => {
            bail!("HTTP {status}: that is no gpu-sampler agent; {remedy}")
        }
        _ => bail!("HTTP {status}: {}", words()),
    }
}
