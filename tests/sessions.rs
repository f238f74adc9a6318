//! Sessions over every path: the API, `record`, triggers, crashes, full disks, damaged files; and that a report agrees with the metrics.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, free_port, get, run_cli, sum, var, wait_for};
use serde_json::{Value, json};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// Time for a session to end: it waits up to 12 s for late facts.
const ENDS: Duration = Duration::from_secs(15);
/// Time until a sample of a process is credited; a poll may report it late.
const SEEN: Duration = Duration::from_secs(15);
/// Length of the windows of coactivity.
const WINDOW: Duration = Duration::from_secs(1);
/// Both numbers sum the same terms in the same order, except for where the sum began.
const ROUNDING: f64 = 1e-6;

/// Two containers with an idle process each, and a folder for sessions.
struct SessionScene {
    // Dropped in this order: an actor is inside the tree.
    _actors: Vec<Actor>,
    pids: [u32; 2],
    /// Ids of the containers, and the paths of their cgroups.
    ids: [String; 2],
    paths: [String; 2],
    sim: Sim,
    dir: tempfile::TempDir,
    _tree: CgroupTree,
}

impl SessionScene {
    fn new(name: &str) -> Result<Self> {
        let (sim, dir, tree) = (Sim::new("seed = 7\n[[gpus]]")?, tempfile::tempdir()?, CgroupTree::new(name)?);
        let mut actors = Vec::new();
        let mut start = |n| {
            let (id, cgroup) = tree.container(n)?;
            let mut actor = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "300"])?;
            let pid = actor.pid()?;
            actors.push(actor);
            anyhow::Ok((pid, id, tree.path_of(&cgroup)))
        };
        let ((pid, id, path), (other_pid, other_id, other_path)) = (start(1)?, start(2)?);
        let (pids, ids, paths) = ([pid, other_pid], [id, other_id], [path, other_path]);
        Ok(Self { _actors: actors, pids, ids, paths, sim, dir, _tree: tree })
    }

    /// Folder in which the agent keeps its sessions.
    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn agent(&self) -> Result<Agent> {
        self.agent_in(&self.store())
    }

    fn agent_in(&self, store: &Path) -> Result<Agent> {
        Agent::start(Some(&self.sim), &["--session-dir", &store.to_string_lossy(), "--label-sources", "bundle"])
    }

    fn load(&self, n: usize, demand: f64, lasts: &str) -> Result<Running> {
        self.sim.load(self.pids[n], 0, demand, &["--for", lasts])
    }

    /// A path for a file of the test.
    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Records a session of 2 s with lookback, with a load in the first container, to a file.
    fn recorded(&self) -> Result<String> {
        let agent = self.agent()?;
        let _load = self.load(0, 0.8, "60s")?;
        self.wait_until_credited(&agent, 0)?;
        let file = self.file("session.gpus");
        record(&["--duration", "2s", "--lookback", "1s", "-o", &file, "--agent", &url(&agent)])?;
        Ok(file)
    }

    fn wait_until_credited(&self, agent: &Agent, n: usize) -> Result<()> {
        wait_for("the container is credited", SEEN, || {
            let seconds = sum(&agent.scrape()?, "container_gpu_seconds_total", &[("container_id", &self.ids[n])]);
            Ok(seconds.filter(|seconds| *seconds > 0.2).map(|_| ()))
        })
    }

    /// A container's entry in a report; `Null` if there is none.
    fn usage(&self, report: &Value, n: usize) -> Value {
        let all = report["users"].as_array().map_or(&[][..], Vec::as_slice);
        all.iter().find(|c| c["id"] == self.paths[n]).map_or(Value::Null, |container| container["gpus"][0].clone())
    }
}

fn url(agent: &Agent) -> String {
    format!("http://127.0.0.1:{}", agent.port)
}

/// Runs `record`, which has to succeed. Returns both output streams.
fn record(args: &[&str]) -> Result<(String, String)> {
    let (code, out, err) = run_cli(&[&["record"], args].concat())?;
    ensure!(code == Some(0), "gpu-sampler record {args:?}: {code:?}: {out}{err}");
    Ok((out, err))
}

/// The report of a file, and the warnings on standard error.
fn report(file: &str) -> Result<(Value, String)> {
    let (code, out, err) = run_cli(&["report", file, "--format", "json"])?;
    ensure!(code == Some(0), "gpu-sampler report: {code:?}: {err}");
    Ok((serde_json::from_str(&out).context("the report is JSON")?, err))
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("{key} of {value}"))
}

fn close(what: &str, got: f64, expect: f64, within: f64) {
    assert!((got - expect).abs() <= within, "{what}: {got} instead of {expect}");
}

/// The value of a container's series in `/metrics`; 0 if there is none yet.
fn counted(page: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    sum(page, name, labels).unwrap_or_default()
}

#[test]
fn a_report_agrees_with_the_metrics_of_the_same_time() -> Result<()> {
    let scene = SessionScene::new("agree")?;
    let agent = scene.agent()?;
    let before = agent.scrape()?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    // Of the window in which it began, a session has the later part only: it ends without a load.
    std::thread::sleep(WINDOW);
    let mut loads = [scene.load(0, 0.8, "7s")?, scene.load(1, 0.5, "6s")?];
    // Until unnamed time is divided and the last window is closed. A series begins at 0 with its first scrape.
    let until = Instant::now() + Duration::from_secs(24);
    let mut after = agent.scrape()?;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_secs(1));
        after = agent.scrape()?;
    }
    for load in &mut loads {
        ensure!(load.0.try_wait()?.is_some_and(|status| status.success()), "nvml-sim load failed, or still runs");
    }
    agent.stop(&id)?;
    let file = scene.file("agree.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    let (report, warnings) = report(&file)?;
    assert_eq!((&report["truncated"], &*warnings), (&json!(false), ""));

    for n in [0, 1] {
        let usage = scene.usage(&report, n);
        let (own, other) = (&*scene.ids[n], &*scene.ids[1 - n]);
        let grew = |name: &str, more: &[(&str, &str)]| {
            let labels = [&[("container_id", own)], more].concat();
            counted(&after, name, &labels) - counted(&before, name, &labels)
        };
        let agrees = |name: &str, reported: f64| {
            let grew = grew(name, &[]);
            println!("container {n}: {name}: {grew} and {reported}");
            close(&format!("container {n}: {name}, live and replayed"), reported, grew, ROUNDING);
            grew
        };
        let seconds = agrees("container_gpu_seconds_total", number(&usage, "gpu_seconds")?);
        // With so few samples, how many of them name one of two users is chance.
        assert!(seconds > 0.1, "{seconds}");
        agrees("container_gpu_samples_total", number(&usage, "samples")?);
        assert!(agrees("container_gpu_coactive_seconds_total", number(&usage, "coactive_seconds")?) > 0.5);
        let contenders = usage["contenders"].as_array().context("contenders")?;
        let contender =
            contenders.iter().find(|c| c["id"] == scene.paths[1 - n]).context("the other container is a contender")?;
        let contention = grew("container_gpu_contention_seconds_total", &[("other_container_id", other)]);
        close("contention", number(contender, "saturated_gpu_seconds")?, contention, ROUNDING);
        // Their demands sum to 1.3.
        assert!(contention > 0.1, "{contention}");
    }
    let gpu = &report["gpus"][0];
    for state in ["busy", "idle", "unobserved"] {
        let key = format!("{state}_seconds");
        println!("gpu: {key}: {}", number(gpu, &key)?);
    }
    let busy = |page: &[Sample]| counted(page, "gpu_time_seconds_total", &[("state", "busy")]);
    close("busy, live and replayed", number(gpu, "busy_seconds")?, busy(&after) - busy(&before), ROUNDING);
    Ok(())
}

#[test]
fn record_fetches_a_session_with_lookback_from_a_running_agent() -> Result<()> {
    let scene = SessionScene::new("record")?;
    let agent = scene.agent()?;
    // Gives the lookback something to contain.
    std::thread::sleep(Duration::from_secs(2));
    // Samples of the other process soon settle which process the last samples of this one belong to.
    let _other_load = scene.load(1, 0.1, "60s")?;
    let mut load = scene.load(0, 0.9, "1500ms")?;
    ensure!(load.0.wait()?.success(), "nvml-sim load failed");
    let file = scene.file("recorded.gpus");
    let (out, _) = record(&["--duration", "4s", "--lookback", "3s", "-o", &file, "--agent", &url(&agent)])?;
    assert!(out.contains(&file) && out.contains("Next: gpu-sampler report"), "{out}");
    let (summary, warnings) = report(&file)?;
    assert_eq!((&summary["truncated"], &*warnings), (&json!(false), ""));
    close("duration", number(&summary, "duration_seconds")?, 7.0, 1.0);
    let seconds = number(&scene.usage(&summary, 0), "gpu_seconds")?;
    // True value: 1.35 s, measured with samples of a sixth of a second.
    assert!((0.3..=1.6).contains(&seconds), "lookback: {seconds}");
    let formats: [(&str, &[&str]); 5] = [
        ("text", &["Tesla V100"]),
        ("json", &["\"gpu_seconds\""]),
        ("html", &["<html", "</html>"]),
        ("perfetto", &["traceEvents"]),
        ("csv", &["gpu_seconds"]),
    ];
    for (format, words) in formats {
        let (code, out, err) = run_cli(&["report", &file, "--format", format])?;
        assert_eq!(code, Some(0), "{format}: {err}");
        words.iter().for_each(|word| assert!(out.contains(word), "{format} has no {word:?}: {out}"));
    }
    assert_eq!(agent.sessions()?, Vec::<Value>::new(), "a fetched session is removed");

    let kept = scene.file("kept.gpus");
    record(&["--duration", "1s", "-o", &kept, "--agent", &url(&agent), "--keep"])?;
    let listed = agent.sessions()?;
    assert_eq!(listed.len(), 1);
    assert_eq!((&listed[0]["state"], &listed[0]["error"]), (&json!("finished"), &Value::Null));
    let mut left: Vec<String> = std::fs::read_dir(scene.dir.path())?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into()))
        .collect::<Result<_>>()?;
    left.sort();
    assert_eq!(left, ["kept.gpus", "recorded.gpus", "store"]);
    Ok(())
}

#[test]
fn record_samples_by_itself_where_no_agent_runs() -> Result<()> {
    let scene = SessionScene::new("alone")?;
    let _load = scene.load(0, 0.9, "60s")?;
    let file = scene.file("alone.gpus");
    let mut command = Command::new(var("GPU_SAMPLER_BIN")?);
    command.args([
        "record",
        "--duration",
        "3s",
        "--lookback",
        "2s",
        "-o",
        &file,
        "--gpu-budget-percent",
        "50",
        "--gpu-wait-percent",
        "50",
    ]);
    // No agent listens at this port, whatever else runs on this machine.
    command.args(["--listen", &format!("127.0.0.1:{}", free_port()?), "--docker-endpoint", &var("DOCKER_HOST")?]);
    command.arg("--nvml-lib").arg(scene.sim.library()).env("NVML_SIM_DIR", scene.sim.dir.path());
    let output = command.output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("No agent runs at") && stderr.contains("--lookback has no effect"), "{stderr}");
    let (summary, _) = report(&file)?;
    assert_eq!(summary["truncated"], json!(false));
    let duration = number(&summary, "duration_seconds")?;
    assert!((3.0..8.0).contains(&duration), "{duration}");
    let seconds = number(&scene.usage(&summary, 0), "gpu_seconds")?;
    assert!((1.5..=duration).contains(&seconds), "{seconds}");
    for format in ["text", "html", "perfetto", "csv"] {
        let (code, out, err) = run_cli(&["report", &file, "--format", format])?;
        assert!(code == Some(0) && !out.is_empty(), "{format}: {err}");
    }
    let left = std::fs::read_dir(scene.dir.path())?.count();
    assert_eq!(left, 1, "only the file is left");
    Ok(())
}

#[test]
fn a_session_of_a_killed_agent_is_readable_and_listed() -> Result<()> {
    let scene = SessionScene::new("killed")?;
    let mut agent = scene.agent()?;
    let _load = scene.load(0, 0.9, "60s")?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(4));
    agent.process.ends_with(libc::SIGKILL)?;
    let part = scene.store().join(format!("{id}.gpus.part"));
    let (summary, warnings) = report(&part.to_string_lossy())?;
    assert_eq!((&summary["truncated"], &summary["damage"]), (&json!(true), &json!([])));
    assert!(warnings.contains("the file ends before the session did"), "{warnings}");
    let seconds = number(&scene.usage(&summary, 0), "gpu_seconds")?;
    assert!(seconds > 1.0, "{seconds} of 4 s");
    let (code, words, _) = run_cli(&["report", &part.to_string_lossy()])?;
    assert!(code == Some(0) && words.contains("INCOMPLETE: the file ends before the session did"), "{words}");

    let next = scene.agent()?;
    let listed = next.sessions()?;
    assert_eq!((listed.len(), &listed[0]["id"], &listed[0]["state"]), (1, &json!(id), &json!("interrupted")));
    let served: Value = serde_json::from_str(&get(next.port, &format!("/api/v1/sessions/{id}/report?format=json"))?)?;
    assert_eq!(served["users"], summary["users"]);
    assert_eq!(served["truncated"], json!(true));
    // A second session next to it.
    let second = next.record(Duration::from_secs(1), Duration::ZERO)?;
    next.session_is(&second, "finished", ENDS)?;
    assert_eq!(next.sessions()?.len(), 2);
    Ok(())
}

/// A small disk.
struct Disk(PathBuf);

impl Disk {
    fn new(at: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir(at)?;
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(at).status()?;
        ensure!(status.success(), "mount -t tmpfs failed");
        Ok(Self(at.to_owned()))
    }

    fn resize(&self, options: &str) -> Result<()> {
        let status = Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0).status()?;
        ensure!(status.success(), "mount -o remount failed");
        Ok(())
    }

    /// Takes all the space that is left.
    fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.0.join("filler"))?;
        match std::io::copy(&mut std::io::repeat(1), &mut file) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(()),
            other => other.map(|_| ()).context("the disk does not fill up"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // An agent may still use it.
        let status = Command::new("umount").arg("--lazy").arg(&self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_ends_a_session_with_a_reason_and_keeps_the_part_written() -> Result<()> {
    let scene = SessionScene::new("full")?;
    let disk = Disk::new(&scene.store(), "size=256k")?;
    let agent = scene.agent_in(&disk.0)?;
    let _load = scene.load(0, 0.9, "60s")?;
    let refused = agent.record(Duration::from_secs(60), Duration::ZERO).err().context("there is hardly any space")?;
    assert!(refused.to_string().contains(" 507 ") && refused.to_string().contains("no room left"), "{refused}");
    assert_eq!(agent.sessions()?, Vec::<Value>::new());

    disk.resize("size=2m")?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.session(&id)?["state"], json!("recording"));
    disk.fill()?;
    let failed = agent.session_is(&id, "failed", ENDS)?;
    let reason = failed["error"].as_str().context("a reason is given")?;
    assert!(reason.contains("No space left on device") && reason.contains("can be read"), "{reason}");
    let file = scene.file("full.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    let (summary, _) = report(&file)?;
    assert_eq!((&summary["truncated"], &summary["damage"]), (&json!(true), &json!([])));
    let seconds = number(&scene.usage(&summary, 0), "gpu_seconds")?;
    assert!(seconds > 1.0, "{seconds} of 4 s");
    // The agent continues, and can record again once there is space.
    std::fs::remove_file(disk.0.join("filler"))?;
    let second = agent.record(Duration::from_secs(1), Duration::ZERO)?;
    agent.session_is(&second, "finished", ENDS)?;
    Ok(())
}

#[test]
fn a_triggered_session_waits_for_its_condition_and_contains_the_lookback() -> Result<()> {
    let scene = SessionScene::new("trigger")?;
    let agent = scene.agent()?;
    for (wrong, words) in [
        ("bussy>0.5", "unknown measure \"bussy\": choose from coactive, busy"),
        ("busy", "invalid condition \"busy\""),
        ("busy>much", "invalid threshold \"much\""),
        ("busy>0.5:at=3", "invalid qualifier \"at=3\""),
        ("busy>0.5 for ever", "invalid duration \"ever\""),
    ] {
        let wanted = json!({"duration_seconds": 1, "trigger": wrong});
        let refused = agent.record_as(&wanted).err().with_context(|| format!("{wrong} is accepted"))?.to_string();
        assert!(refused.contains(" 400 ") && refused.replace('\\', "").contains(words), "{wrong}: {refused}");
    }
    assert_eq!(agent.sessions()?, Vec::<Value>::new());

    let id = agent.record_as(&json!({"duration_seconds": 2, "lookback_seconds": 8, "trigger": "busy>0.5"}))?;
    std::thread::sleep(Duration::from_secs(3));
    let armed = agent.session(&id)?;
    assert_eq!((&armed["state"], &armed["size_bytes"], &armed["started"]), (&json!("armed"), &json!(0), &Value::Null));
    let begun = Instant::now();
    let _load = scene.load(0, 1.0, "60s")?;
    agent.session_is(&id, "recording", SEEN)?;
    let met = begun.elapsed();
    let finished = agent.session_is(&id, "finished", ENDS)?;
    let looked_back = number(&finished, "lookback_seconds")?;
    println!("met after {met:?}, looks back {looked_back} s");
    let file = scene.file("trigger.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    let (summary, _) = report(&file)?;
    close("duration", number(&summary, "duration_seconds")?, 2.0 + looked_back, 1.0);
    let seconds = number(&scene.usage(&summary, 0), "gpu_seconds")?;
    // Before the session began, half of ten seconds, or of the time that there was, had to be busy.
    assert!(seconds > 2.0 + 1.5, "the lookback is missing: {seconds}");
    let (idle, duration) = (number(&summary["gpus"][0], "idle_seconds")?, number(&summary, "duration_seconds")?);
    assert!(idle > 0.5 && idle < duration, "the lookback contains the time before the load: {idle}");

    let never = agent.record_as(&json!({"duration_seconds": 2, "trigger": "temperature>500"}))?;
    agent.stop(&never)?;
    let stopped = agent.session(&never)?;
    assert_eq!((&stopped["state"], &stopped["error"]), (&json!("failed"), &json!("stopped before its condition was met")));
    Ok(())
}

#[test]
fn damage_is_reported_and_the_rest_is_read() -> Result<()> {
    let scene = SessionScene::new("damage")?;
    let file = scene.recorded()?;
    let whole = std::fs::read(&file)?;
    let (sound, warnings) = report(&file)?;
    assert_eq!((&sound["truncated"], &sound["damage"], &*warnings), (&json!(false), &json!([]), ""));
    let hurt = scene.file("hurt.gpus");
    for tenths in [4, 5, 6, 7] {
        let mut bytes = whole.clone();
        let at = bytes.len() * tenths / 10;
        bytes[at] ^= 0x10;
        std::fs::write(&hurt, &bytes)?;
        let (summary, warnings) = report(&hurt)?;
        let damage = summary["damage"].as_array().context("damage")?;
        assert!(summary["truncated"] == json!(true) && !damage.is_empty(), "byte {at}: {damage:?}");
        assert!(warnings.contains("is damaged: ") && warnings.contains("cannot be read"), "byte {at}: {warnings}");
        let (code, words, _) = run_cli(&["report", &hurt])?;
        assert!(code == Some(0) && words.contains("DAMAGED: parts of the file cannot be read"), "byte {at}: {words}");
    }
    let none = scene.file("none.gpus");
    for (bytes, words) in [
        (&b"no session at all, whatever its name"[..], "not a session file"),
        (&[], "not a session file"),
        (&whole[..20], "not a session file"),
    ] {
        std::fs::write(&none, bytes)?;
        let (code, out, err) = run_cli(&["report", &none, "--format", "json"])?;
        assert_eq!((code, &*out), (Some(1), ""), "{err}");
        assert!(err.contains("none.gpus cannot be read as a session") && err.contains(words), "{err}");
    }
    let (code, _, err) = run_cli(&["report", &scene.file("absent.gpus")])?;
    assert!(code == Some(1) && err.contains("cannot read") && err.contains("No such file"), "{err}");
    Ok(())
}

#[test]
fn one_sample_of_a_session_is_explained() -> Result<()> {
    let scene = SessionScene::new("sample")?;
    let file = scene.recorded()?;
    let explain = |time: &str, gpu: &str| run_cli(&["explain", "--sample", time, "--gpu", gpu, "--file", &file, "--json"]);
    let (mut named, mut at) = (0, None);
    for tenth in 3..28 {
        let (code, out, err) = explain(&format!("{}ms", tenth * 100), "0")?;
        assert_eq!(code, Some(0), "{err}");
        let sample: Value = serde_json::from_str(&out)?;
        let row = &sample["rows"][0];
        if row.is_object() {
            assert_eq!((&row["pid"], &row["user"]["kind"]), (&json!(scene.pids[0]), &json!("container")), "{sample}");
            assert_eq!((&row["user"]["id"], &row["user"]["container_id"]), (&json!(scene.paths[0]), &json!(scene.ids[0])));
            named += 1;
            at = sample["time"].as_str().map(str::to_owned);
        }
    }
    // The demand is 0.8; each sample is requested once or twice.
    assert!(named > 6, "{named} of 25 name the process");
    let at = at.context("a time")?;
    let (code, out, err) = run_cli(&["explain", "--sample", &at, "--gpu", "0", "--file", &file])?;
    assert_eq!(code, Some(0), "{err}");
    for words in [format!("pid {}, ", scene.pids[0]), scene.paths[0].clone(), "the process of the sample".into()] {
        assert!(out.contains(&words), "{words:?} in {out}");
    }
    for (time, gpu, words) in [
        ("1h", "0", "no sample of GPU GPU-"),
        ("2020-01-01T00:00:00Z", "0", "no sample of GPU GPU-"),
        ("1s", "3", "the session has no GPU \"3\"; it has 0 (GPU-"),
        ("soon", "0", "\"soon\" is not a time"),
    ] {
        let (code, out, err) = explain(time, gpu)?;
        assert_eq!((code, &*out), (Some(1), ""), "{time}: {err}");
        assert!(err.contains(words), "{time}: {err}");
    }
    Ok(())
}
