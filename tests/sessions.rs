//! Sessions by all their ways: the API, `record`, triggers, crashes, full disks, damage; and that a report says what the metrics said.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, free_port, get, sum, told, var, wait_for};
use serde_json::{Value, json};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// To end: what is told late is waited for, 12 s at most.
const ENDS: Duration = Duration::from_secs(15);
/// A sample of a process, told late by a poll.
const SEEN: Duration = Duration::from_secs(15);
/// Both numbers are the sum of the same, in the same order but for where the sum began.
const ROUNDING: f64 = 1e-6;

/// Two containers with a process each, that want nothing of the GPU yet; and a folder for sessions.
struct SessionScene {
    // In the order in which they may end: an actor is inside the tree.
    _actors: Vec<Actor>,
    pids: [u32; 2],
    /// Of the containers, and their cgroups' paths.
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
        let mut one = |n| {
            let (id, cgroup) = tree.container(n)?;
            let mut actor = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "300"])?;
            let pid = actor.pid()?;
            actors.push(actor);
            anyhow::Ok((pid, id, tree.path_of(&cgroup)))
        };
        let ((pid, id, path), (other_pid, other_id, other_path)) = (one(1)?, one(2)?);
        let (pids, ids, paths) = ([pid, other_pid], [id, other_id], [path, other_path]);
        Ok(Self { _actors: actors, pids, ids, paths, sim, dir, _tree: tree })
    }

    /// Where the agent keeps its sessions.
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

    /// A session of 2 s and what was before, of the first container, recorded to a file.
    fn recorded(&self) -> Result<String> {
        let agent = self.agent()?;
        let _load = self.load(0, 0.8, "60s")?;
        self.is_credited(&agent, 0)?;
        let file = self.file("session.gpus");
        record(&["--duration", "2s", "--lookback", "1s", "-o", &file, "--agent", &url(&agent)])?;
        Ok(file)
    }

    fn is_credited(&self, agent: &Agent, n: usize) -> Result<()> {
        wait_for("it is credited", SEEN, || {
            let seconds = sum(&agent.scrape()?, "container_gpu_seconds_total", &[("container_id", &self.ids[n])]);
            Ok(seconds.filter(|seconds| *seconds > 0.2).map(|_| ()))
        })
    }

    /// What a report says of a container; `Null` if nothing.
    fn usage(&self, report: &Value, n: usize) -> Value {
        let all = report["users"].as_array().map_or(&[][..], Vec::as_slice);
        all.iter().find(|c| c["id"] == self.paths[n]).map_or(Value::Null, |container| container["gpus"][0].clone())
    }
}

fn url(agent: &Agent) -> String {
    format!("http://127.0.0.1:{}", agent.port)
}

/// `record` that is to succeed: what it said on both streams.
fn record(args: &[&str]) -> Result<(String, String)> {
    let (code, out, err) = told(&[&["record"], args].concat())?;
    ensure!(code == Some(0), "gpu-sampler record {args:?}: {code:?}: {out}{err}");
    Ok((out, err))
}

/// The report, and what was said beside it.
fn report(file: &str) -> Result<(Value, String)> {
    let (code, out, err) = told(&["report", file, "--format", "json"])?;
    ensure!(code == Some(0), "gpu-sampler report: {code:?}: {err}");
    Ok((serde_json::from_str(&out).context("the report is JSON")?, err))
}

fn number(value: &Value, key: &str) -> Result<f64> {
    value[key].as_f64().with_context(|| format!("{key} of {value}"))
}

fn close(what: &str, got: f64, expect: f64, within: f64) {
    assert!((got - expect).abs() <= within, "{what}: {got} instead of {expect}");
}

/// Of a container, as `/metrics` has it by now; none is none yet.
fn counted(page: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    sum(page, name, labels).unwrap_or_default()
}

#[test]
fn a_report_says_what_the_metrics_said_meanwhile() -> Result<()> {
    let scene = SessionScene::new("agree")?;
    let agent = scene.agent()?;
    let before = agent.scrape()?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    let mut loads = [scene.load(0, 0.8, "7s")?, scene.load(1, 0.5, "6s")?];
    // Until time that names nobody is divided and the last window is closed. A series begins at 0 with its first scrape.
    let until = Instant::now() + Duration::from_millis(20_800);
    let mut after = agent.scrape()?;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_secs(1));
        after = agent.scrape()?;
    }
    for load in &mut loads {
        ensure!(load.0.try_wait()?.is_some_and(|status| status.success()), "nvml-sim load failed, or goes on");
    }
    agent.stop(&id)?;
    let file = scene.file("agree.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    let (report, said) = report(&file)?;
    assert_eq!((&report["truncated"], &*said), (&json!(false), ""));

    for n in [0, 1] {
        let usage = scene.usage(&report, n);
        let (own, other) = (&*scene.ids[n], &*scene.ids[1 - n]);
        let grew = |name: &str, more: &[(&str, &str)]| {
            let labels = [&[("container_id", own)], more].concat();
            counted(&after, name, &labels) - counted(&before, name, &labels)
        };
        let agrees = |name: &str, told: f64| {
            let grew = grew(name, &[]);
            println!("container {n}: {name}: {grew} and {told}");
            close(&format!("container {n}: {name}, live and replayed"), told, grew, ROUNDING);
            grew
        };
        let seconds = agrees("container_gpu_seconds_total", number(&usage, "gpu_seconds")?);
        // A few samples only: how many of them name one of two is chance.
        assert!(seconds > 0.1, "{seconds}");
        agrees("container_gpu_samples_total", number(&usage, "samples")?);
        assert!(agrees("container_gpu_coactive_seconds_total", number(&usage, "coactive_seconds")?) > 0.5);
        let contenders = usage["contenders"].as_array().context("contenders")?;
        let contender = contenders.iter().find(|c| c["id"] == scene.paths[1 - n]).context("the other contends")?;
        let contention = grew("container_gpu_contention_seconds_total", &[("other_container_id", other)]);
        close("contention", number(contender, "saturated_gpu_seconds")?, contention, ROUNDING);
        // They want 1.3 of it together.
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
fn record_fetches_from_a_running_agent_with_what_was_before() -> Result<()> {
    let scene = SessionScene::new("record")?;
    let agent = scene.agent()?;
    // There is something to look back to.
    std::thread::sleep(Duration::from_secs(2));
    // Samples of the other one tell soon whose the last samples of this one were.
    let _goes_on = scene.load(1, 0.4, "60s")?;
    let mut load = scene.load(0, 0.6, "1500ms")?;
    ensure!(load.0.wait()?.success(), "nvml-sim load failed");
    let file = scene.file("recorded.gpus");
    let (out, _) = record(&["--duration", "4s", "--lookback", "3s", "-o", &file, "--agent", &url(&agent)])?;
    assert!(out.contains(&file) && out.contains("Next: gpu-sampler report"), "{out}");
    let (told_of, said) = report(&file)?;
    assert_eq!((&told_of["truncated"], &*said), (&json!(false), ""));
    close("duration", number(&told_of, "duration_seconds")?, 7.0, 0.3);
    let seconds = number(&scene.usage(&told_of, 0), "gpu_seconds")?;
    // Its 0.9 s; samples of a sixth of a second say it roughly.
    assert!((0.3..=1.6).contains(&seconds), "what was before the recording: {seconds}");
    let formats: [(&str, &[&str]); 5] = [
        ("text", &["Tesla V100"]),
        ("json", &["\"gpu_seconds\""]),
        ("html", &["<html", "</html>"]),
        ("perfetto", &["traceEvents"]),
        ("csv", &["gpu_seconds"]),
    ];
    for (format, words) in formats {
        let (code, out, err) = told(&["report", &file, "--format", format])?;
        assert_eq!(code, Some(0), "{format}: {err}");
        words.iter().for_each(|word| assert!(out.contains(word), "{format} has no {word:?}: {out}"));
    }
    assert_eq!(agent.sessions()?, Vec::<Value>::new(), "it was fetched, so it is gone");

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
fn record_is_the_agent_itself_where_none_runs() -> Result<()> {
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
    // Whatever runs on this machine, nothing does here.
    command.args(["--listen", &format!("127.0.0.1:{}", free_port()?), "--docker-endpoint", &var("DOCKER_HOST")?]);
    command.arg("--nvml-lib").arg(scene.sim.library()).env("NVML_SIM_DIR", scene.sim.dir.path());
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("No agent runs at") && said.contains("nothing to look back to"), "{said}");
    let (told_of, _) = report(&file)?;
    assert_eq!(told_of["truncated"], json!(false));
    let duration = number(&told_of, "duration_seconds")?;
    assert!((3.0..5.3).contains(&duration), "{duration}");
    let seconds = number(&scene.usage(&told_of, 0), "gpu_seconds")?;
    assert!((1.5..=duration).contains(&seconds), "{seconds}");
    for format in ["text", "html", "perfetto", "csv"] {
        let (code, out, err) = told(&["report", &file, "--format", format])?;
        assert!(code == Some(0) && !out.is_empty(), "{format}: {err}");
    }
    let left = std::fs::read_dir(scene.dir.path())?.count();
    assert_eq!(left, 1, "the file alone is left");
    Ok(())
}

#[test]
fn a_session_of_an_agent_that_was_killed_is_readable_and_listed() -> Result<()> {
    let scene = SessionScene::new("killed")?;
    let mut agent = scene.agent()?;
    let _load = scene.load(0, 0.9, "60s")?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(4));
    agent.process.ends_with(libc::SIGKILL)?;
    let part = scene.store().join(format!("{id}.gpus.part"));
    let (told_of, said) = report(&part.to_string_lossy())?;
    assert_eq!((&told_of["truncated"], &told_of["damage"]), (&json!(true), &json!([])));
    assert!(said.contains("ends before its session did"), "{said}");
    let seconds = number(&scene.usage(&told_of, 0), "gpu_seconds")?;
    assert!(seconds > 1.0, "{seconds} of 4 s");
    let (code, words, _) = told(&["report", &part.to_string_lossy()])?;
    assert!(code == Some(0) && words.contains("INCOMPLETE: the file ends before the session did"), "{words}");

    let next = scene.agent()?;
    let listed = next.sessions()?;
    assert_eq!((listed.len(), &listed[0]["id"], &listed[0]["state"]), (1, &json!(id), &json!("interrupted")));
    let served: Value = serde_json::from_str(&get(next.port, &format!("/api/v1/sessions/{id}/report?format=json"))?)?;
    assert_eq!(served["users"], told_of["users"]);
    assert_eq!(served["truncated"], json!(true));
    // Another one beside it.
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

    /// Takes all the room there is left.
    fn fill(&self) -> Result<()> {
        let mut file = std::fs::File::create(self.0.join("filler"))?;
        match std::io::copy(&mut std::io::repeat(1), &mut file) {
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(()),
            other => other.map(|_| ()).context("the disk has no end"),
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // An agent may still be in it.
        let status = Command::new("umount").arg("--lazy").arg(&self.0).status();
        if !status.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0.display());
        }
    }
}

#[test]
fn a_full_disk_ends_a_session_with_a_reason_and_keeps_what_was_written() -> Result<()> {
    let scene = SessionScene::new("full")?;
    let disk = Disk::new(&scene.store(), "size=256k")?;
    let agent = scene.agent_in(&disk.0)?;
    let _load = scene.load(0, 0.9, "60s")?;
    let refused = agent.record(Duration::from_secs(60), Duration::ZERO).err().context("there is hardly any room")?;
    assert!(refused.to_string().contains(" 507 ") && refused.to_string().contains("no room left"), "{refused}");
    assert_eq!(agent.sessions()?, Vec::<Value>::new());

    disk.resize("size=2m")?;
    let id = agent.record(Duration::from_secs(60), Duration::ZERO)?;
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(agent.session(&id)?["state"], json!("recording"));
    disk.fill()?;
    let failed = agent.session_is(&id, "failed", ENDS)?;
    let why = failed["error"].as_str().context("it says why")?;
    assert!(why.contains("No space left on device") && why.contains("can be read"), "{why}");
    let file = scene.file("full.gpus");
    std::fs::write(&file, agent.session_file(&id, ENDS)?)?;
    let (told_of, _) = report(&file)?;
    assert_eq!((&told_of["truncated"], &told_of["damage"]), (&json!(true), &json!([])));
    let seconds = number(&scene.usage(&told_of, 0), "gpu_seconds")?;
    assert!(seconds > 1.0, "{seconds} of 4 s");
    // The agent lives on, and so does recording once there is room.
    std::fs::remove_file(disk.0.join("filler"))?;
    let second = agent.record(Duration::from_secs(1), Duration::ZERO)?;
    agent.session_is(&second, "finished", ENDS)?;
    Ok(())
}

#[test]
fn a_condition_is_waited_for_and_what_was_before_it_is_in() -> Result<()> {
    let scene = SessionScene::new("trigger")?;
    let agent = scene.agent()?;
    for (wrong, words) in [
        ("bussy>0.5", "\"bussy\" is nothing to watch: choose from coactive, busy"),
        ("busy", "\"busy\" is no condition"),
        ("busy>much", "\"much\" is no number"),
        ("busy>0.5:at=3", "\"at=3\" is no qualifier"),
        ("busy>0.5 for ever", "\"ever\" is no duration"),
    ] {
        let wanted = json!({"duration_seconds": 1, "trigger": wrong});
        let refused = agent.record_as(&wanted).err().with_context(|| format!("{wrong} is taken"))?.to_string();
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
    let (told_of, _) = report(&file)?;
    close("duration", number(&told_of, "duration_seconds")?, 2.0 + looked_back, 0.3);
    let seconds = number(&scene.usage(&told_of, 0), "gpu_seconds")?;
    // Half of ten seconds, or of as much as there has been, had to be busy before it began.
    assert!(seconds > 2.0 + 1.5, "the lookback is not in: {seconds}");
    let (idle, duration) = (number(&told_of["gpus"][0], "idle_seconds")?, number(&told_of, "duration_seconds")?);
    assert!(idle > 0.5 && idle < duration, "and the time before the load: {idle}");

    let never = agent.record_as(&json!({"duration_seconds": 2, "trigger": "temperature>500"}))?;
    agent.stop(&never)?;
    let stopped = agent.session(&never)?;
    assert_eq!((&stopped["state"], &stopped["error"]), (&json!("failed"), &json!("stopped before its condition was met")));
    Ok(())
}

#[test]
fn damage_is_told_and_the_rest_is_read() -> Result<()> {
    let scene = SessionScene::new("damage")?;
    let file = scene.recorded()?;
    let whole = std::fs::read(&file)?;
    let (sound, said) = report(&file)?;
    assert_eq!((&sound["truncated"], &sound["damage"], &*said), (&json!(false), &json!([]), ""));
    let hurt = scene.file("hurt.gpus");
    for tenths in [4, 5, 6, 7] {
        let mut bytes = whole.clone();
        let at = bytes.len() * tenths / 10;
        bytes[at] ^= 0x10;
        std::fs::write(&hurt, &bytes)?;
        let (told_of, said) = report(&hurt)?;
        let damage = told_of["damage"].as_array().context("damage")?;
        assert!(told_of["truncated"] == json!(true) && !damage.is_empty(), "byte {at}: {damage:?}");
        assert!(said.contains("is damaged: ") && said.contains("cannot be read"), "byte {at}: {said}");
        let (code, words, _) = told(&["report", &hurt])?;
        assert!(code == Some(0) && words.contains("DAMAGED: parts of the file cannot be read"), "byte {at}: {words}");
    }
    let none = scene.file("none.gpus");
    for (bytes, words) in [
        (&b"no session at all, whatever its name"[..], "this is no session file"),
        (&[], "this is no session file"),
        (&whole[..20], "this is no session file"),
    ] {
        std::fs::write(&none, bytes)?;
        let (code, out, err) = told(&["report", &none, "--format", "json"])?;
        assert_eq!((code, &*out), (Some(1), ""), "{err}");
        assert!(err.contains("none.gpus cannot be read as a session") && err.contains(words), "{err}");
    }
    let (code, _, err) = told(&["report", &scene.file("absent.gpus")])?;
    assert!(code == Some(1) && err.contains("cannot read") && err.contains("No such file"), "{err}");
    Ok(())
}

#[test]
fn one_sample_of_a_session_is_explained() -> Result<()> {
    let scene = SessionScene::new("sample")?;
    let file = scene.recorded()?;
    let ask = |time: &str, gpu: &str| told(&["explain", "--sample", time, "--gpu", gpu, "--file", &file, "--json"]);
    let (mut named, mut at) = (0, None);
    for tenth in 3..28 {
        let (code, out, err) = ask(&format!("{}ms", tenth * 100), "0")?;
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
    // Of a demand of 0.8; each sample is asked for once or twice.
    assert!(named > 8, "{named} of 25 name it");
    let at = at.context("a time")?;
    let (code, out, err) = told(&["explain", "--sample", &at, "--gpu", "0", "--file", &file])?;
    assert_eq!(code, Some(0), "{err}");
    for words in [format!("pid {}, ", scene.pids[0]), scene.paths[0].clone(), "the process of its row".into()] {
        assert!(out.contains(&words), "{words:?} in {out}");
    }
    for (time, gpu, words) in [
        ("1h", "0", "there is nothing of GPU GPU-"),
        ("2020-01-01T00:00:00Z", "0", "there is nothing of GPU GPU-"),
        ("1s", "3", "there is no GPU \"3\" in it; it has 0 (GPU-"),
        ("soon", "0", "\"soon\" is no time"),
    ] {
        let (code, out, err) = ask(time, gpu)?;
        assert_eq!((code, &*out), (Some(1), ""), "{time}: {err}");
        assert!(err.contains(words), "{time}: {err}");
    }
    Ok(())
}
