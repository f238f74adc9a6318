//! A real server of the S3 protocol: moto, from PyPI.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::{Running, clients, local, wait_for};

pub const BUCKET: &str = "sessions";

/// Its objects are lost when it ends.
pub struct S3Server {
    port: u16,
    _process: Running,
}

impl S3Server {
    /// With the bucket [`BUCKET`].
    pub fn start(port: u16) -> Result<Self> {
        let server = Self::launch(port, None)?;
        server.put("", &[])?;
        Ok(server)
    }

    /// Refuses every credential.
    pub fn refusing(port: u16) -> Result<Self> {
        Self::launch(port, Some("0"))
    }

    /// `unchecked`: requests before credentials are checked; `None` for all.
    fn launch(port: u16, unchecked: Option<&str>) -> Result<Self> {
        let bin = clients::venv(&devkit::S3_PACKAGES)?;
        let mut command = Command::new(bin.join("moto_server"));
        command.args(["--host", "127.0.0.1", "--port", &port.to_string()]).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(requests) = unchecked {
            command.env("INITIAL_NO_AUTH_ACTION_COUNT", requests);
        }
        let server = Self { port, _process: Running(command.spawn().context("starting moto_server")?) };
        wait_for("the S3 server is ready", Duration::from_secs(60), || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port)).ok())
        })?;
        Ok(server)
    }

    /// Requests are not checked for credentials, except by [`S3Server::refusing`].
    pub fn get(&self, key: &str) -> Result<Vec<u8>> {
        local(self.port).get(&format!("/{BUCKET}{key}"))?.ok()
    }

    /// Stores an object; without a key, creates the bucket.
    pub fn put(&self, key: &str, content: &[u8]) -> Result<()> {
        local(self.port).request("PUT", &format!("/{BUCKET}{key}"), "application/octet-stream", content)?.ok().map(|_| ())
    }
}

/// What a client of the server on this port has in its environment.
pub fn environment(port: u16) -> [(&'static str, String); 5] {
    [
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
        ("AWS_ACCESS_KEY_ID", "test-key".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test-secret".to_owned()),
    ]
}
