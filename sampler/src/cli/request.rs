//! One GET request to a running agent.

use anyhow::{Context as _, bail};
use hyper::Method;
use serde::de::DeserializeOwned;

use super::client::{Client, error_message};

/// Path of the live document.
pub const LIVE: &str = "/api/v1/live";

pub enum AgentResponse {
    Found(Vec<u8>),
    /// The agent has no such thing; its message.
    NotFound(String),
    /// The connection failed: no process listens at the address.
    NoAgent(anyhow::Error),
}

/// `agent` is `http://HOST:PORT`. `remedy` is part of the error if the server is not an agent.
pub fn get(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<AgentResponse> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    runtime.block_on(get_within(agent, path_and_query, token, remedy))
}

/// As [`get`], within a runtime of the caller.
pub async fn get_within(agent: &str, path_and_query: &str, token: Option<&str>, remedy: &str) -> anyhow::Result<AgentResponse> {
    let client = Client::new(agent, token)?;
    let sent = client.send(Method::GET, path_and_query, Vec::new()).await;
    let mut reply = match sent.with_context(|| format!("cannot query the agent; {remedy}"))? {
        Ok(reply) => reply,
        Err(error) => return Ok(AgentResponse::NoAgent(error.into())),
    };
    let (status, is_agent) = (reply.status(), reply.is_agent());
    let body = reply.body().await.with_context(|| format!("querying the agent at {agent}"))?;
    match status.as_u16() {
        200 => Ok(AgentResponse::Found(body)),
        404 if is_agent => Ok(AgentResponse::NotFound(error_message(&body))),
        _ if !is_agent => bail!("HTTP {status}: the server at {agent} is not a gpu-sampler agent; {remedy}"),
        _ => bail!("HTTP {status}: {}", error_message(&body)),
    }
}

/// The JSON document of a response body.
pub fn document<T: DeserializeOwned>(agent: &str, body: &[u8]) -> anyhow::Result<T> {
    serde_json::from_slice(body).with_context(|| format!("the server at {agent} is not a gpu-sampler agent"))
}

pub fn unreachable(agent: &str) -> String {
    format!("no agent is reachable at {agent}; start `gpu-sampler run`, or name an agent with --agent")
}
