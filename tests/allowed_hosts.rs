//! An agent on loopback behind a proxy that keeps the Host of its clients, as kube-rbac-proxy and oauth2-proxy do.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use gpu_sampler_tests::{Agent, Sim};

/// The response to a request as a proxy passes it on; its first line ends before the first line break.
fn passed_on(agent: &Agent, request: &str, host: &str, origin: Option<&str>) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", agent.port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let origin = origin.map(|origin| format!("Origin: {origin}\r\n")).unwrap_or_default();
    let length = if request.starts_with("POST") { "Content-Length: 0\r\n" } else { "" };
    let head =
        format!("{request} HTTP/1.1\r\nHost: {host}\r\n{origin}{length}X-Forwarded-Host: {host}\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes())?;
    let mut response = Vec::new();
    stream.read_to_end(&mut response)?;
    Ok(String::from_utf8_lossy(&response).into_owned())
}

#[test]
fn allowed_hosts_are_served_behind_a_proxy_and_other_sites_are_not() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let mut command = Agent::command(Some(&sim))?;
    // As a variable: a list with commas.
    command.env("GPU_SAMPLER_ALLOWED_HOST", "gpu.example.com,fd00::7");
    let allowing = Agent::start_as(gpu_sampler_tests::kernel::Layout::Machine, command, &[])?;
    let plain = Agent::start(Some(&sim), &[])?;
    let repeated = Agent::start(Some(&sim), &["--allowed-host", "gpu.example.com", "--allowed-host", "fd00::7"])?;
    let (get, post) = ("GET /metrics", "POST /api/v1/sessions");
    for (request, host, origin, expect, expect_of_plain) in [
        (get, "localhost", None, 200, 200),
        (get, "gpu.example.com", None, 200, 403),
        (get, "GPU.Example.com:8443", None, 200, 403),
        (get, "[fd00:0:0::7]:8443", None, 200, 403),
        (get, "evil.example", None, 403, 403),
        (get, "gpu.example.com.evil.example", None, 403, 403),
        (get, "gpu.example.com", Some("https://evil.example"), 403, 403),
        (get, "gpu.example.com", Some("https://gpu.example.com"), 200, 403),
        (get, "localhost", Some("https://gpu.example.com"), 403, 403),
        // Accepted and then refused because of its body.
        (post, "gpu.example.com", Some("https://gpu.example.com"), 400, 403),
        (post, "gpu.example.com", Some("https://gpu.example.com:8443"), 403, 403),
        (post, "gpu.example.com", Some("https://evil.example"), 403, 403),
        ("GET /healthz", "gpu.example.com", None, 200, 200),
        ("GET /healthz", "10.0.0.9:9836", None, 200, 200),
        ("GET /readyz", "evil.example", None, 200, 200),
    ] {
        for (name, agent, expect) in
            [("variable", &allowing, expect), ("flags", &repeated, expect), ("none", &plain, expect_of_plain)]
        {
            let response = passed_on(agent, request, host, origin)?;
            let case = format!("{request} Host {host} Origin {origin:?} allowed by {name}");
            ensure!(response.starts_with(&format!("HTTP/1.1 {expect} ")), "{case}: expected {expect}: {response}");
        }
    }
    let refused = passed_on(&plain, get, "gpu.example.com:8443", None)?;
    ensure!(refused.contains("--allowed-host gpu.example.com\n"), "the remedy is missing: {refused}");
    Ok(())
}
