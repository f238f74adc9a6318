//! One GET to a running agent.

use anyhow::{Context as _, bail};
use hyper::Method;

use super::client::{Client, words};

/// What came of asking.
pub enum AgentResponse {
    Found(Vec<u8>),
    /// The agent does not know the thing; its own words.
    NotFound(String),
    /// Nobody listens there.
    NoAgent(anyhow::Error),
}

/// `agent` is `http://HOST:PORT`. `remedy` is what to do where no agent is what answers there.
pub fn get(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<AgentResponse> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    runtime.block_on(get_within(agent, path_and_query, token, remedy))
}

/// As [`get`], for who has a runtime.
pub async fn get_within(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<AgentResponse> {
    let client = Client::new(agent, token)?;
    let sent = client.send(Method::GET, path_and_query, Vec::new()).await;
    let mut reply = match sent.with_context(|| format!("the agent cannot be asked; {remedy}"))? {
        Ok(reply) => reply,
        Err(error) => return Ok(AgentResponse::NoAgent(error.into())),
    };
    let (status, ours) = (reply.status(), reply.is_ours());
    let body = reply.body().await.with_context(|| format!("asking the agent at {agent}"))?;
    match status.as_u16() {
        200 => Ok(AgentResponse::Found(body)),
        404 if ours => Ok(AgentResponse::NotFound(words(&body))),
        _ if !ours => bail!("HTTP {status}: that is no gpu-sampler agent; {remedy}"),
        _ => bail!("HTTP {status}: {}", words(&body)),
    }
}
