//! One GET request to a running agent.

use anyhow::{Context as _, bail};
use hyper::Method;
use serde::de::DeserializeOwned;

use super::access::AgentAccess;
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

/// `remedy` is part of the error if the server is not an agent.
pub fn get(agent: &AgentAccess, path_and_query: &str, remedy: &str) -> anyhow::Result<AgentResponse> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the IO runtime")?;
    runtime.block_on(get_within(agent, path_and_query, remedy))
}

/// As [`get`], within a runtime of the caller.
pub async fn get_within(agent: &AgentAccess, path_and_query: &str, remedy: &str) -> anyhow::Result<AgentResponse> {
    let client = Client::new(agent)?;
    let sent = client.send(Method::GET, path_and_query, Vec::new()).await;
    let mut reply = match sent.with_context(|| format!("cannot query the agent; {remedy}"))? {
        Ok(reply) => reply,
        Err(error) => return Ok(AgentResponse::NoAgent(error.into())),
    };
    let (status, is_agent) = (reply.status(), reply.is_agent());
    let body = reply.body().await.with_context(|| format!("querying the agent at {}", agent.url))?;
    match status.as_u16() {
        200 => Ok(AgentResponse::Found(body)),
        404 if is_agent => Ok(AgentResponse::NotFound(error_message(&body))),
        _ if !is_agent => bail!("HTTP {status}: the server at {} is not a gpu-sampler agent; {remedy}", agent.url),
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
