//! A real Chromium, driven through chromedriver's WebDriver: the calls that the tests of the page need, each of which blocks.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use fantoccini::elements::Element;
use fantoccini::error::CmdError;
use fantoccini::wd::{WebDriverCompatibleCommand, WindowHandle};
use fantoccini::{Client, ClientBuilder, Locator};
use hyper::Method;
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use url::{ParseError, Url};

use crate::{Running, free_port, get, wait_for};

/// For what a page does within a second.
const PATIENCE: Duration = Duration::from_secs(20);
/// Limit for one command.
const COMMAND: Duration = Duration::from_secs(60);

/// One browser with one session; both end when it is dropped, with all data that the browser stored.
pub struct Browser {
    client: Client,
    // The client's task runs in it while a command does.
    runtime: Runtime,
    driver: Running,
    // Removed after the browser has ended.
    _profile: tempfile::TempDir,
}

/// The log of the browser since the last request: an extension of chromedriver.
#[derive(Debug)]
struct BrowserLog;

impl WebDriverCompatibleCommand for BrowserLog {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!("session/{}/se/log", session.unwrap_or_default()))
    }

    fn method_and_body(&self, _: &Url) -> (Method, Option<String>) {
        (Method::POST, Some(json!({"type": "browser"}).to_string()))
    }
}

/// Waits for a command in the browser's runtime.
fn wait<T, E>(runtime: &Runtime, command: impl Future<Output = Result<T, E>>) -> Result<T>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let limited = async { tokio::time::timeout(COMMAND, command).await };
    Ok(runtime.block_on(limited).with_context(|| format!("no response of chromedriver within {COMMAND:?}"))??)
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
            let status = get(port, "/status").and_then(|text| Ok(serde_json::from_str::<Value>(&text)?));
            Ok(status.ok().filter(|status| status["value"]["ready"] == true))
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
        let Value::Object(wanted) = wanted else { bail!("capabilities are an object") };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let mut builder = ClientBuilder::new(HttpConnector::new());
        builder.capabilities(wanted);
        let client = wait(&runtime, builder.connect(&format!("http://127.0.0.1:{port}")))?;
        Ok(Self { client, runtime, driver, _profile: profile })
    }

    fn wait<T>(&self, command: impl Future<Output = Result<T, CmdError>>) -> Result<T> {
        wait(&self.runtime, command)
    }

    /// Runs a command on the first element that the selector finds.
    fn with<T>(&self, css: &str, command: impl AsyncFnOnce(Element) -> Result<T, CmdError>) -> Result<T> {
        let done = self.wait(async { command(self.client.find(Locator::Css(css)).await?).await });
        done.with_context(|| css.to_owned())
    }

    pub fn open(&self, url: &str) -> Result<()> {
        self.wait(self.client.goto(url))
    }

    /// Runs the body of a JavaScript function in the page.
    pub fn script(&self, body: &str) -> Result<Value> {
        self.wait(self.client.execute(body, Vec::new()))
    }

    /// Clicks as a user does: the element has to be visible, with nothing in front of it.
    pub fn click(&self, css: &str) -> Result<()> {
        self.with(css, async |element| element.click().await)
    }

    /// Replaces the text of an input.
    pub fn enter(&self, css: &str, text: &str) -> Result<()> {
        self.with(css, async |element| {
            element.clear().await?;
            element.send_keys(text).await
        })
    }

    /// The visible text of an element.
    pub fn text(&self, css: &str) -> Result<String> {
        self.with(css, async |element| element.text().await)
    }

    pub fn is_visible(&self, css: &str) -> Result<bool> {
        self.with(css, async |element| element.is_displayed().await)
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

    pub fn windows(&self) -> Result<Vec<WindowHandle>> {
        self.wait(self.client.windows())
    }

    pub fn switch_to(&self, window: &WindowHandle) -> Result<()> {
        self.wait(self.client.switch_to_window(window.clone()))
    }

    /// Errors of scripts, the network and the content policy since the last call.
    pub fn console_errors(&self) -> Result<Vec<String>> {
        let all = self.wait(self.client.issue_cmd(BrowserLog))?;
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
        let _closed = self.wait(self.client.clone().close());
        let _ended = self.driver.ends_with(libc::SIGTERM);
    }
}
