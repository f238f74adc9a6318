//! The web page as users see it: a real Chromium, the real agent and simulated GPUs.

use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result};
use gpu_sampler_tests::browser::Browser;
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::labels::{UID, bundle};
use gpu_sampler_tests::{Agent, Running, Sim, free_port, get, run_cli, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
const ROW: &str = "#users tbody tr";

/// Two containers on one GPU; the first one's pod has a name that contains markup.
struct WebScene {
    // Dropped in this order: a load is written into the simulator's folder, an actor is inside the tree.
    _loads: Vec<Running>,
    _actors: Vec<Actor>,
    sim: Sim,
    root: tempfile::TempDir,
    ids: [String; 2],
    _tree: CgroupTree,
}

impl WebScene {
    fn new(name: &str) -> Result<Self> {
        let (sim, root, tree) = (Sim::new("seed = 5\n[[gpus]]")?, tempfile::tempdir()?, CgroupTree::new(name)?);
        let (mut loads, mut actors) = (Vec::new(), Vec::new());
        let ids = [tree.container(1)?, tree.container(2)?];
        for ((id, dir), (pod, demand)) in ids.iter().zip([("<i>trainer</i>", 0.7), ("inference", 0.6)]) {
            bundle(root.path(), id, pod, UID)?;
            let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
            loads.push(sim.load(actor.pid()?, 0, demand, &[])?);
            actors.push(actor);
        }
        let ids = ids.map(|(id, _)| id);
        Ok(Self { sim, root, ids, _loads: loads, _actors: actors, _tree: tree })
    }

    fn args(&self) -> [String; 4] {
        let root = self.root.path().to_string_lossy().into_owned();
        ["--path-rootfs".into(), root, "--label-sources".into(), "bundle".into()]
    }

    fn agent(&self) -> Result<Agent> {
        let args = self.args();
        Agent::start(Some(&self.sim), &args.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

fn live(agent: &Agent) -> Result<Value> {
    Ok(serde_json::from_str(&get(agent.port, "/api/v1/live")?)?)
}

#[test]
fn the_live_table_shows_the_load_and_reports_an_agent_that_is_away() -> Result<()> {
    let scene = WebScene::new("web-live")?;
    let mut agent = scene.agent()?;
    let browser = Browser::start(1280, 1000)?;
    browser.open(&format!("http://127.0.0.1:{}/", agent.port))?;
    browser.shows("#users", &["prod/<i>trainer</i>/main", "prod/inference/main", "1.0 GiB"])?;
    assert_eq!(browser.script("return document.querySelectorAll('#users i').length")?, 0, "names are text");
    browser.shows("#gpus", &["GPU 0", "Tesla V100", "100 %"])?;
    browser.shows("#state", &["live"])?;
    // After some seconds both lines have a shape.
    wait_for("the lines grow", Duration::from_secs(20), || {
        let longest = browser.script(
            "return Math.min(...[...document.querySelectorAll('#users path.line')].map((p) => p.getAttribute('d').length))",
        )?;
        Ok(longest.as_f64().filter(|length| *length > 60.0))
    })?;
    // Their demands sum to 1.3.
    browser.shows("#users", &["s/s"])?;
    // The same document, in the terminal.
    let url = format!("http://127.0.0.1:{}", agent.port);
    let (code, out, err) = run_cli(&["top", "--once", "--agent", &url])?;
    assert!(code == Some(0) && out.contains("prod/inference/main") && out.contains("GPU 0 GPU-"), "{out}{err}");
    let (_, out, _) = run_cli(&["top", "--once", "--json", "--agent", &url])?;
    let document: Value = serde_json::from_str(&out)?;
    assert!(document["users"].as_array().is_some_and(|users| users.len() >= 2), "{document}");
    let (code, _, err) = run_cli(&["top", "--agent", &url])?;
    assert!(code == Some(1) && err.contains("--once"), "{err}");

    browser.enter("#filter", "inference")?;
    wait_for("the filter is applied", Duration::from_secs(5), || {
        Ok((browser.script(&format!("return document.querySelectorAll('{ROW}').length"))? == 1).then_some(()))
    })?;
    browser.enter("#filter", "no such words")?;
    browser.shows("#users-empty", &["No user matches the filter"])?;
    browser.enter("#filter", "prod")?;
    browser.click("th[data-sort=name] button")?;
    browser.shows(ROW, &["prod/<i>trainer</i>"])?;
    assert_eq!(browser.script("return document.querySelector('th[data-sort=name]').getAttribute('aria-sort')")?, "ascending");
    browser.assert_no_errors()?;

    agent.process.ends_with(libc::SIGTERM)?;
    browser.shows("#banners", &["does not respond", "This page retries"])?;
    browser.shows("#state", &["unreachable"])?;
    let (code, _, err) = run_cli(&["top", "--once", "--agent", &url])?;
    assert!(code == Some(1) && err.contains("start `gpu-sampler run`"), "{err}");
    Ok(())
}

#[test]
fn a_narrow_window_does_not_scroll_sideways() -> Result<()> {
    let scene = WebScene::new("web-narrow")?;
    let agent = scene.agent()?;
    let browser = Browser::start(500, 900)?;
    browser.open(&format!("http://127.0.0.1:{}/", agent.port))?;
    browser.shows("#users", &["prod/inference/main", "Contention with"])?;
    let over = browser.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")?;
    assert_eq!(over, 0);
    Ok(())
}

#[test]
fn beyond_loopback_the_page_requires_the_token() -> Result<()> {
    let scene = WebScene::new("web-token")?;
    let file = scene.root.path().join("token");
    std::fs::write(&file, "open sesame\n")?;
    let port = free_port()?;
    let mut command = Agent::command(Some(&scene.sim))?;
    command.args(["--listen", &format!("0.0.0.0:{port}"), "--token-file", &file.to_string_lossy()]).args(scene.args());
    let _agent = Running(command.stderr(std::process::Stdio::null()).spawn()?);
    wait_for("the agent listens", Duration::from_secs(20), || Ok(TcpStream::connect(("127.0.0.1", port)).ok()))?;
    // No data without the token.
    assert!(!get(port, "/")?.contains("prod"));
    let refused = get(port, "/api/v1/live").err().context("a request without the token")?;
    assert!(refused.to_string().contains("401"), "{refused}");

    let browser = Browser::start(1280, 1000)?;
    browser.open(&format!("http://127.0.0.1:{port}/"))?;
    browser.shows("#login", &["This agent requires a token"])?;
    browser.enter("#token", "wrong")?;
    browser.click("#login button")?;
    browser.shows("#login", &["rejected this token"])?;
    browser.enter("#token", "open sesame")?;
    browser.click("#login button")?;
    browser.shows("#users", &["prod/inference/main"])?;
    assert!(!browser.is_visible("#login")?);
    // The token survives a reload, but not the end of the tab.
    browser.open(&format!("http://127.0.0.1:{port}/"))?;
    browser.shows("#users", &["prod/inference/main"])?;
    Ok(())
}

#[test]
fn a_session_can_be_started_watched_stopped_and_opened() -> Result<()> {
    let scene = WebScene::new("web-record")?;
    let dir = tempfile::tempdir()?;
    let args = scene.args();
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    let sessions = dir.path().to_string_lossy().into_owned();
    args.extend(["--session-dir", &sessions]);
    let agent = Agent::start(Some(&scene.sim), &args)?;
    let browser = Browser::start(1280, 1200)?;
    browser.open(&format!("http://127.0.0.1:{}/", agent.port))?;
    browser.shows("#users", &["prod/inference/main"])?;
    browser.shows("#sessions-empty", &["No sessions yet"])?;

    // An invalid request is explained in text.
    browser.enter("#trigger", "nonsense>1")?;
    browser.click("#start")?;
    browser.shows("#record-problem", &["nonsense"])?;
    browser.enter("#trigger", "")?;
    browser.enter("#duration", "120")?;
    browser.enter("#lookback", "5")?;
    browser.click("#start")?;
    browser.shows("#sessions", &["recording", "of 120 s", "Stop"])?;
    assert!(!browser.is_visible("#record-problem")?);
    let elapsed = || -> Result<f64> {
        let all: Value = serde_json::from_str(&get(agent.port, "/api/v1/sessions")?)?;
        all[0]["elapsed_seconds"].as_f64().context("elapsed_seconds")
    };
    let before = elapsed()?;
    wait_for("the session continues", Duration::from_secs(20), || Ok((elapsed()? > before + 2.0).then_some(())))?;
    let width = browser.script("return parseFloat(document.querySelector('#sessions .meter span').style.width)")?;
    assert!(width.as_f64().is_some_and(|width| width > 0.0 && width < 100.0), "{width}");

    browser.click("#sessions .actions button")?;
    let shown = browser.shows("#sessions", &["finished", "Report", "Download", "Delete"])?;
    assert!(!shown.contains("Stop"), "{shown}");
    let href = browser.script("return document.querySelector('#sessions a[download]').getAttribute('href')")?;
    let href = href.as_str().context("a link")?.to_owned();
    assert!(href.ends_with("/file"), "{href}");
    let first = browser.windows()?;
    browser.click("#sessions a[target=_blank]")?;
    let report = wait_for("the report is opened", Duration::from_secs(10), || {
        Ok(browser.windows()?.into_iter().find(|window| !first.contains(window)))
    })?;
    browser.switch_to(&report)?;
    browser.shows("body", &["inference"])?;
    assert!(live(&agent)?["users"].as_array().is_some_and(|users| users.len() >= scene.ids.len()));
    browser.switch_to(&first[0])?;

    browser.click("#sessions .actions button:last-child")?;
    browser.shows("#sessions .actions", &["Confirm"])?;
    browser.click("#sessions .actions button:last-child")?;
    browser.shows("#sessions-empty", &["No sessions yet"])?;
    Ok(())
}
