//! A real Chromium, driven through chromedriver's WebDriver: the calls that the tests of the page need.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{Running, free_port, http, wait_for};

/// The key of an element in WebDriver's responses.
const ELEMENT: &str = "element-6066-11e4-a52e-4f735466cecf";
/// For what a page does within a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// One browser with one session; both end when it is dropped, with all data that the browser stored.
pub struct Browser {
    port: u16,
    session: String,
    driver: Running,
    // Removed after the browser has ended.
    _profile: tempfile::TempDir,
}

/// chromedriver supports HTTP/1.1 only and keeps connections open: a response ends with the body that its head announces.
fn call(port: u16, method: &str, path: &str, body: &Value) -> Result<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let body = if method == "POST" { body.to_string() } else { String::new() };
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}");
    stream.write_all(format!("{head}\r\n\r\n{body}").as_bytes())?;
    let (mut response, mut buffer) = (Vec::new(), [0; 16 * 1024]);
    while !is_whole(&response) {
        match stream.read(&mut buffer)? {
            0 => bail!("{method} {path}: the response is cut short"),
            length => response.extend_from_slice(&buffer[..length]),
        }
    }
    let (status, body) = http::split(&response)?;
    let mut json: Value = serde_json::from_slice(body).with_context(|| format!("{method} {path}"))?;
    let value = json["value"].take();
    ensure!(status == 200, "{method} {path}: {status} {}: {}", value["error"], value["message"]);
    Ok(value)
}

fn is_whole(response: &[u8]) -> bool {
    let Some(end) = response.windows(4).position(|w| w == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&response[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    length.is_some_and(|length| response.len() >= end + 4 + length)
}

impl Browser {
    pub fn start(width: u32, height: u32) -> Result<Self> {
        let (port, profile) = (free_port()?, tempfile::tempdir()?);
        let driver = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("chromedriver; `cargo xtask setup` installs it")?;
        let driver = Running(driver);
        wait_for("chromedriver is ready", PATIENCE, || {
            Ok(call(port, "GET", "/status", &Value::Null).ok().filter(|status| status["ready"] == true))
        })?;
        // Tests run as root, for which Chromium has no sandbox; it opens only the project's own pages.
        let args = [
            "--headless=new".into(),
            "--no-sandbox".into(),
            "--disable-gpu".into(),
            "--disable-dev-shm-usage".into(),
            format!("--window-size={width},{height}"),
            format!("--user-data-dir={}", profile.path().display()),
        ];
        let wanted = json!({"goog:chromeOptions": {"args": args}, "goog:loggingPrefs": {"browser": "ALL"}});
        let made = call(port, "POST", "/session", &json!({"capabilities": {"alwaysMatch": wanted}}))?;
        let session = made["sessionId"].as_str().context("a session has an id")?.to_owned();
        Ok(Self { port, session, driver, _profile: profile })
    }

    fn command(&self, method: &str, what: &str, body: &Value) -> Result<Value> {
        call(self.port, method, &format!("/session/{}/{what}", self.session), body)
    }

    pub fn open(&self, url: &str) -> Result<()> {
        self.command("POST", "url", &json!({"url": url}))?;
        Ok(())
    }

    /// Runs the body of a JavaScript function in the page.
    pub fn script(&self, body: &str) -> Result<Value> {
        self.command("POST", "execute/sync", &json!({"script": body, "args": []}))
    }

    fn element(&self, css: &str) -> Result<String> {
        let found = self.command("POST", "element", &json!({"using": "css selector", "value": css}))?;
        Ok(found[ELEMENT].as_str().with_context(|| format!("{css}: {found}"))?.to_owned())
    }

    /// Clicks as a user does: the element has to be visible, with nothing in front of it.
    pub fn click(&self, css: &str) -> Result<()> {
        let id = self.element(css)?;
        self.command("POST", &format!("element/{id}/click"), &json!({})).with_context(|| css.to_owned())?;
        Ok(())
    }

    /// Replaces the text of an input.
    pub fn enter(&self, css: &str, text: &str) -> Result<()> {
        let id = self.element(css)?;
        self.command("POST", &format!("element/{id}/clear"), &json!({}))?;
        self.command("POST", &format!("element/{id}/value"), &json!({"text": text}))?;
        Ok(())
    }

    /// The visible text of an element.
    pub fn text(&self, css: &str) -> Result<String> {
        let id = self.element(css)?;
        let text = self.command("GET", &format!("element/{id}/text"), &Value::Null)?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    pub fn is_visible(&self, css: &str) -> Result<bool> {
        let id = self.element(css)?;
        Ok(self.command("GET", &format!("element/{id}/displayed"), &Value::Null)? == true)
    }

    /// Waits until the visible text contains these words. Returns the text.
    pub fn shows(&self, css: &str, words: &[&str]) -> Result<String> {
        let mut last = String::new();
        let shown = wait_for("the page shows the words", PATIENCE, || {
            last = self.text(css).unwrap_or_else(|error| format!("({error:#})"));
            Ok(words.iter().all(|word| last.contains(word)).then(|| last.clone()))
        });
        shown.with_context(|| format!("{words:?} in {css}, which contains\n{last}"))
    }

    pub fn windows(&self) -> Result<Vec<String>> {
        let all = self.command("GET", "window/handles", &Value::Null)?;
        Ok(all.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect())
    }

    pub fn switch_to(&self, window: &str) -> Result<()> {
        self.command("POST", "window", &json!({"handle": window}))?;
        Ok(())
    }

    /// Errors of scripts, the network and the content policy since the last call.
    pub fn console_errors(&self) -> Result<Vec<String>> {
        let all = self.command("POST", "se/log", &json!({"type": "browser"}))?;
        let severe = all.as_array().into_iter().flatten().filter(|entry| entry["level"] == "SEVERE");
        Ok(severe.map(|entry| entry["message"].as_str().unwrap_or_default().to_owned()).collect())
    }

    /// Fails if the browser has logged errors.
    pub fn assert_no_errors(&self) -> Result<()> {
        match &self.console_errors()?[..] {
            [] => Ok(()),
            some => bail!("the browser reports errors:\n{}", some.join("\n")),
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // Its windows end with the session; the driver can end afterwards.
        let _closed = call(self.port, "DELETE", &format!("/session/{}", self.session), &Value::Null);
        let _ended = self.driver.ends_with(libc::SIGTERM);
    }
}
