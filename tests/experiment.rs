//! Freezing experiments: the judgement of contending and of separate users, refusals, and that whatever is killed, the suspect runs again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use devkit::Random;
use gpu_sampler_tests::kernel::{Actor, CgroupTree, attach};
use gpu_sampler_tests::leftovers::kill;
use gpu_sampler_tests::{Agent, Running, Sim, get, run_cli, var, wait_for};
use serde_json::Value;

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// The bound of the product, from the death of a process to the thaw.
const THAWS_WITHIN: Duration = Duration::from_secs(1);
/// Until a new cgroup is known to the agent, or a load is credited.
const SEEN: Duration = Duration::from_secs(15);
/// Until the first freeze of an experiment: start of the session and of the guard, and the lead of the schedule.
const FREEZES_WITHIN: Duration = Duration::from_secs(20);
/// Much longer than a test needs, so that only what the test does can end a freeze.
const LONG_FREEZE: &str = "10s";

/// Where the suspect is frozen.
#[derive(Clone, Copy, PartialEq)]
enum Freezer {
    V2,
    /// The suspect is in the hierarchies of `pids` and `freezer`, and in the root of cgroup v2.
    V1,
}

/// Two containers with an idle process each, an agent, and the runtime folder of this test.
struct ExperimentScene {
    // Dropped in this order: an actor is inside the trees.
    agent: Option<Agent>,
    _actors: Vec<Running>,
    outer: Vec<Actor>,
    pids: [u32; 2],
    ids: [String; 2],
    sim: Sim,
    dir: tempfile::TempDir,
    /// The file that freezes the second container, with the content while it is thawed and while it is frozen.
    file: PathBuf,
    states: [&'static str; 2],
    freezer: Freezer,
    tree: CgroupTree,
    _freezers: Option<CgroupTree>,
}

impl ExperimentScene {
    fn new(name: &str, world: &str, freezer: Freezer) -> Result<Self> {
        let (sim, dir) = (Sim::new(world)?, tempfile::tempdir()?);
        let tree = if freezer == Freezer::V2 { CgroupTree::new(name)? } else { CgroupTree::v1(name)? };
        let freezers = if freezer == Freezer::V1 { Some(CgroupTree::with_controller("freezer", name)?) } else { None };
        let (mut actors, mut outer, mut pids, mut ids, mut file) = (Vec::new(), Vec::new(), [0; 2], Vec::new(), PathBuf::new());
        for n in [0, 1] {
            let (id, cgroup) = tree.container(n + 1)?;
            pids[n] = match &freezers {
                None => {
                    let mut actor = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "600"])?;
                    let pid = actor.pid()?;
                    outer.push(actor);
                    file = cgroup.join("cgroup.freeze");
                    pid
                }
                Some(freezers) => {
                    let process = Running(Command::new("sleep").arg("600").stdin(Stdio::null()).spawn()?);
                    let pid = process.0.id();
                    actors.push(process);
                    attach(pid, &cgroup)?;
                    let (_, own) = freezers.container(n + 1)?;
                    attach(pid, &own)?;
                    file = own.join("freezer.state");
                    pid
                }
            };
            ids.push(id);
        }
        let ids: [String; 2] = ids.try_into().ok().context("two containers")?;
        let states = if freezer == Freezer::V2 { ["0", "1"] } else { ["THAWED", "FROZEN"] };
        let mut scene =
            Self { agent: None, _actors: actors, outer, pids, ids, sim, dir, file, states, freezer, tree, _freezers: freezers };
        scene.start_agent()?;
        Ok(scene)
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    fn start_agent(&mut self) -> Result<()> {
        let (sessions, runtime) = (self.path("sessions"), self.path("run"));
        let args = ["--session-dir", &sessions, "--runtime-dir", &runtime, "--label-sources", "bundle"];
        self.agent = Some(Agent::start(Some(&self.sim), &args)?);
        Ok(())
    }

    fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().context("the agent was killed")
    }

    /// The arguments of the command that freezes the second container.
    fn args(&self, more: &[&str]) -> Result<Vec<String>> {
        let url = format!("http://127.0.0.1:{}", self.agent()?.port);
        let (runtime, output) = (self.path("run"), self.path("experiment.gpus"));
        let all = ["experiment", "--victim", &self.ids[0], "--agent", &url, "--runtime-dir", &runtime, "-o", &output];
        Ok(all.iter().chain(more).map(|arg| (*arg).to_owned()).collect())
    }

    /// Runs the command to its end.
    fn run(&self, more: &[&str]) -> Result<(Option<i32>, String, String)> {
        let args = self.args(more)?;
        run_cli(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Starts the command, which would freeze the second container for a long time.
    fn start(&self) -> Result<Running> {
        self.start_with(&["--freeze", LONG_FREEZE])
    }

    fn start_with(&self, more: &[&str]) -> Result<Running> {
        self.start_as(Command::new(var("GPU_SAMPLER_BIN")?), more)
    }

    /// `command`: what runs the program.
    fn start_as(&self, mut command: Command, more: &[&str]) -> Result<Running> {
        let own = ["--suspect", &self.ids[1], "--i-may-freeze", "--bursts", "6"];
        let args = self.args(&[&own, more].concat())?;
        let errors = fs::File::create(self.path("stderr"))?;
        command.args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        Ok(Running(command.spawn()?))
    }

    fn errors(&self) -> String {
        fs::read_to_string(self.path("stderr")).unwrap_or_default()
    }

    fn state(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.file)?.trim().to_owned())
    }

    fn is_thawed(&self) -> Result<bool> {
        Ok(self.state()? == self.states[0])
    }

    /// The guard of this test.
    fn guard(&self) -> Result<Option<u32>> {
        let runtime = self.path("run");
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let mut words = command.split(|b| *b == 0);
            if words.clone().any(|word| word == b"freeze-guard") && words.any(|word| word == runtime.as_bytes()) {
                return Ok(Some(pid));
            }
        }
        Ok(None)
    }

    fn wait_for_guard(&self) -> Result<u32> {
        wait_for("the guard runs", FREEZES_WITHIN, || self.guard()).with_context(|| self.errors())
    }

    /// Returns as soon as the second container is being frozen.
    fn wait_until_frozen(&self) -> Result<()> {
        let from = Instant::now();
        while self.is_thawed()? {
            ensure!(from.elapsed() < FREEZES_WITHIN, "not frozen within {FREEZES_WITHIN:?}: {}", self.errors());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The second container is thawed in time and stays so, and no guard is left.
    fn check_thawed(&self, what: &str) -> Result<()> {
        let from = Instant::now();
        while !self.is_thawed()? {
            ensure!(from.elapsed() < THAWS_WITHIN, "{what}: still {} after {THAWS_WITHIN:?}: {}", self.state()?, self.errors());
            std::thread::sleep(Duration::from_millis(1));
        }
        println!("{what}: thawed after {:?}", from.elapsed());
        let left = THAWS_WITHIN.saturating_sub(from.elapsed());
        wait_for("the guard has ended", left, || Ok(self.guard()?.is_none().then_some(())))?;
        // Longer than the lead of a schedule: nothing freezes it again.
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            ensure!(self.is_thawed()?, "{what}: frozen again");
            std::thread::sleep(Duration::from_millis(10));
        }
        ensure!(!Path::new(&self.path("run/frozen.json")).exists(), "{what}: the file of the guard is left");
        Ok(())
    }

    fn wait_until_credited(&self) -> Result<()> {
        self.agent()?.wait_until_credited(&self.ids.each_ref().map(String::as_str), SEEN)
    }

    /// Runs an experiment of eight freezes with a load of this demand on each container's GPU. Returns the report of its session.
    fn judged(&self, gpus: [usize; 2]) -> Result<(Value, String)> {
        let mut loads = Vec::new();
        for (n, gpu) in gpus.into_iter().enumerate() {
            loads.push(self.sim.load(self.pids[n], gpu, 1.0, &["--stops-while-frozen"])?);
        }
        self.wait_until_credited()?;
        let args = ["--suspect", &self.ids[1], "--i-may-freeze", "--bursts", "8", "--pause", "500ms", "--seed", "11"];
        let (code, out, err) = self.run(&args)?;
        ensure!(code == Some(0), "{code:?}: {out}{err}");
        ensure!(self.is_thawed()? && self.guard()?.is_none(), "the suspect is thawed and no guard is left");
        ensure!(self.agent()?.sessions()?.is_empty(), "a fetched session is removed");
        let (code, report, err) = run_cli(&["report", &self.path("experiment.gpus"), "--format", "json"])?;
        ensure!(code == Some(0), "{err}");
        Ok((serde_json::from_str(&report)?, out))
    }
}

/// The program in this cgroup.
fn program_in(cgroup: &Path) -> Result<Command> {
    let line = format!("echo $$ > {} && exec \"$@\"", cgroup.join("cgroup.procs").display());
    let mut command = Command::new("sh");
    command.args(["-c", &line, "sh", &var("GPU_SAMPLER_BIN")?]);
    Ok(command)
}

fn confirmed_by_an_experiment(name: &str, freezer: Freezer) -> Result<()> {
    let scene = ExperimentScene::new(name, "seed = 5\n[[gpus]]", freezer)?;
    let (report, out) = scene.judged([0, 0])?;
    assert!(out.contains("experiment-confirmed"), "{out}");
    let experiment = &report["experiments"][0];
    assert_eq!((&experiment["planned_bursts"], &experiment["seed"]), (&8.into(), &11.into()), "{experiment}");
    assert!(experiment["consent"] == "operator" && out.contains("consent by --i-may-freeze"), "{experiment}: {out}");
    let users = report["users"].as_array().context("users")?;
    let victim = users.iter().find(|user| user["container_id"] == scene.ids[0]).context("the victim")?;
    let contenders = victim["gpus"][0]["contenders"].as_array().context("contenders")?;
    let suspect = contenders.iter().find(|other| other["evidence"] == "experiment-confirmed").context("the suspect")?;
    let effect = &suspect["experiment"][0];
    assert_eq!((&effect["outcome"], &effect["unit"]), (&"gpu-seconds".into(), &"GPU-seconds per second".into()), "{effect}");
    println!("{effect}");
    // Two users of equal demand share the GPU equally; alone, the victim has all of it. The bounds are more than five standard errors.
    let number = |key: &str| effect[key].as_f64().with_context(|| key.to_owned());
    assert!((0.25..=0.75).contains(&number("effect")?) && number("p_value")? < 0.01, "{effect}");
    assert!(report["findings"][0]["evidence"] == "experiment-confirmed", "{}", report["findings"]);
    Ok(())
}

#[test]
fn an_experiment_with_two_contending_containers_is_confirmed() -> Result<()> {
    confirmed_by_an_experiment("experiment", Freezer::V2)
}

#[test]
fn an_experiment_with_the_freezer_of_version_1_is_confirmed() -> Result<()> {
    confirmed_by_an_experiment("experiment-v1", Freezer::V1)
}

#[test]
fn an_experiment_with_containers_on_different_gpus_is_not_confirmed() -> Result<()> {
    let scene = ExperimentScene::new("experiment-apart", "seed = 6\n[[gpus]]\n[[gpus]]", Freezer::V2)?;
    let (report, out) = scene.judged([0, 1])?;
    assert!(out.contains("not confirmed") && out.contains("the suspect has no sample on this GPU"), "{out}");
    assert!(!report.to_string().contains("experiment-confirmed"), "{report}");
    Ok(())
}

#[test]
fn an_experiment_refuses_what_must_not_be_frozen() -> Result<()> {
    let scene = ExperimentScene::new("experiment-refused", "seed = 7\n[[gpus]]", Freezer::V2)?;
    let check = |args: &[&str], words: &str| {
        let (code, out, err) = scene.run(args)?;
        assert!(code == Some(1) && out.is_empty() && err.contains(words), "{args:?}: {code:?}: {out}{err}");
        assert!(scene.is_thawed()? && scene.guard()?.is_none(), "{args:?}");
        anyhow::Ok(())
    };
    let suspect = &*scene.ids[1];
    check(&["--suspect", suspect], "has no annotation or label gpu-sampler.io/may-freeze=true; add it, or repeat")?;
    check(&["--suspect", "no-such-container", "--i-may-freeze"], "no container has an id that begins with no-such-container")?;
    check(&["--suspect", &scene.ids[0], "--i-may-freeze"], "it is the victim, or one of them contains the other")?;
    check(&["--suspect", "/", "--i-may-freeze"], "--suspect /")?;
    let unit = scene.tree.path_of(&scene.tree.make("experiment.service")?);
    let port = scene.agent()?.port;
    let known = || Ok(get(port, &format!("/api/v1/explain?cgroup={unit}")).ok().map(|_| ()));
    wait_for("the unit is known", SEEN, known)?;
    check(&["--suspect", &unit, "--i-may-freeze"], "it is the systemd unit experiment.service")?;
    check(&["--suspect", suspect, "--i-may-freeze", "--whole-pod"], "is not in a pod; omit --whole-pod")?;

    // Another container inside of the suspect.
    let inner = scene.tree.make(&format!("{suspect}/docker/{:064x}", 77))?;
    check(&["--suspect", suspect, "--i-may-freeze"], "it contains another user")?;
    fs::remove_dir(&inner)?;
    fs::remove_dir(inner.parent().context("the folder of engines")?)?;

    fs::write(&scene.file, "1")?;
    let (code, _, err) = scene.run(&["--suspect", suspect, "--i-may-freeze"])?;
    assert!(code == Some(1) && err.contains("is frozen already"), "{err}");
    fs::write(&scene.file, "0")?;

    // The command itself is inside.
    let args = scene.args(&["--suspect", suspect, "--i-may-freeze"])?;
    let output = program_in(scene.file.parent().context("the cgroup")?)?.args(args).output()?;
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && err.contains("it contains this command"), "{err}");
    assert!(scene.agent()?.sessions()?.is_empty(), "a refused experiment starts no session");
    Ok(())
}

#[test]
fn an_experiment_freezes_all_containers_of_a_pod_when_asked_and_thaws_them_all() -> Result<()> {
    let mut scene = ExperimentScene::new("experiment-pod", "seed = 8\n[[gpus]]", Freezer::V2)?;
    let path = "kubepods/burstable/pod8bb25662-de9a-11e9-84e7-f8f21e04010c";
    let pod = scene.tree.make(path)?;
    let mut containers = Vec::new();
    for n in [3, 4] {
        let (id, cgroup) = scene.tree.container_in(path, n)?;
        let mut actor = Actor::start(ACTOR, &["in", &cgroup.to_string_lossy(), "--", "sleep", "600"])?;
        actor.pid()?;
        scene.outer.push(actor);
        containers.push((id, cgroup));
    }
    let known = |id: &String| Ok(get(scene.agent()?.port, &format!("/api/v1/explain?container={id}")).ok().map(|_| ()));
    for (id, _) in &containers {
        wait_for("the container is known", SEEN, || known(id))?;
    }
    let path = scene.tree.path_of(&pod);
    let (code, out, err) = scene.run(&["--suspect", &path, "--i-may-freeze"])?;
    assert!(code == Some(1) && err.contains("it is a pod: --whole-pod freezes all of its containers"), "{code:?}: {out}{err}");

    scene.file = pod.join("cgroup.freeze");
    scene.ids[1].clone_from(&containers[0].0);
    let mut command = scene.start_with(&["--freeze", LONG_FREEZE, "--whole-pod"])?;
    scene.wait_until_frozen()?;
    for (id, cgroup) in &containers {
        let is_frozen = || Ok(fs::read_to_string(cgroup.join("cgroup.events"))?.contains("frozen 1").then_some(()));
        wait_for(&format!("{id} is frozen"), THAWS_WITHIN, is_frozen)?;
    }
    command.ends_with(libc::SIGKILL)?;
    scene.check_thawed("kill -9 of the command that froze a pod")?;
    for (id, cgroup) in &containers {
        ensure!(fs::read_to_string(cgroup.join("cgroup.events"))?.contains("frozen 0"), "{id} is still frozen");
    }
    Ok(())
}

#[test]
fn an_experiment_accepts_the_annotation_of_a_bundle_and_runs_once_on_a_machine() -> Result<()> {
    let scene = ExperimentScene::new("experiment-consent", "seed = 8\n[[gpus]]", Freezer::V2)?;
    let root = scene.dir.path().join("root");
    let bundle = root.join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(&scene.ids[1]);
    fs::create_dir_all(&bundle)?;
    fs::write(bundle.join("config.json"), r#"{"annotations":{"gpu-sampler.io/may-freeze":"true"}}"#)?;
    let root = root.to_string_lossy();
    let running = scene.start()?;
    scene.wait_for_guard()?;
    // Consent is checked before the lock.
    let (code, _, err) = scene.run(&["--suspect", &scene.ids[1], "--path-rootfs", &root])?;
    assert!(code == Some(1) && err.contains("another experiment runs on this machine"), "{err}");
    drop(running);
    scene.check_thawed("SIGTERM of the command")
}

/// When something is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Before,
    At,
    Within,
}

impl Moment {
    fn wait(self, scene: &ExperimentScene) -> Result<u32> {
        let guard = scene.wait_for_guard()?;
        match self {
            Moment::Before => {}
            Moment::At => scene.wait_until_frozen()?,
            Moment::Within => {
                scene.wait_until_frozen()?;
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        Ok(guard)
    }
}

const MOMENTS: [Moment; 3] = [Moment::Before, Moment::At, Moment::Within];

/// Checks that the command ended with an error.
fn failed(mut command: Running) -> Result<()> {
    let status = wait_for("the command has ended", Duration::from_secs(15), || Ok(command.0.try_wait()?))?;
    ensure!(status.code() == Some(1), "{status}");
    Ok(())
}

#[test]
fn an_experiment_with_a_killed_command_ends_thawed() -> Result<()> {
    let scene = ExperimentScene::new("experiment-command", "seed = 9\n[[gpus]]", Freezer::V2)?;
    for moment in MOMENTS {
        let mut command = scene.start()?;
        moment.wait(&scene)?;
        command.ends_with(libc::SIGKILL)?;
        scene.check_thawed(&format!("kill -9 of the command, {moment:?}"))?;
    }
    Ok(())
}

#[test]
fn an_experiment_with_a_killed_guard_ends_thawed() -> Result<()> {
    let scene = ExperimentScene::new("experiment-guard", "seed = 9\n[[gpus]]", Freezer::V2)?;
    for moment in MOMENTS {
        let command = scene.start()?;
        kill(moment.wait(&scene)?, libc::SIGKILL);
        scene.check_thawed(&format!("kill -9 of the guard, {moment:?}"))?;
        failed(command)?;
        let errors = scene.errors();
        // It is a process before it is ready.
        let says = ["the guard has ended", "the guard ended before it was ready"];
        assert!(says.iter().any(|words| errors.contains(words)), "{errors}");
    }
    Ok(())
}

#[test]
fn an_experiment_with_a_killed_agent_ends_thawed() -> Result<()> {
    let mut scene = ExperimentScene::new("experiment-agent", "seed = 9\n[[gpus]]", Freezer::V2)?;
    for moment in MOMENTS {
        let command = scene.start()?;
        moment.wait(&scene)?;
        scene.agent.take().context("the agent")?.process.ends_with(libc::SIGKILL)?;
        scene.check_thawed(&format!("kill -9 of the agent, {moment:?}"))?;
        failed(command)?;
        scene.start_agent()?;
    }
    Ok(())
}

#[test]
fn an_experiment_with_a_killed_command_and_guard_is_thawed_by_the_agent() -> Result<()> {
    let mut scene = ExperimentScene::new("experiment-both", "seed = 9\n[[gpus]]", Freezer::V2)?;
    for agent_too in [false, true] {
        let mut command = scene.start()?;
        let guard = Moment::Within.wait(&scene)?;
        // A stopped guard cannot thaw before it is killed.
        kill(guard, libc::SIGSTOP);
        if agent_too {
            scene.agent.take().context("the agent")?.process.ends_with(libc::SIGKILL)?;
        }
        command.ends_with(libc::SIGKILL)?;
        if !agent_too {
            let (code, _, err) = scene.run(&["--suspect", &scene.ids[1], "--i-may-freeze"])?;
            assert!(code == Some(1) && err.contains("another experiment runs on this machine, or its guard does"), "{err}");
        }
        kill(guard, libc::SIGKILL);
        if agent_too {
            std::thread::sleep(Duration::from_secs(2));
            ensure!(!scene.is_thawed()?, "no process is left that could thaw it");
            scene.start_agent()?;
        }
        scene.check_thawed(if agent_too { "all killed, the agent started again" } else { "command and guard killed" })?;
        let log = scene.agent()?.log()?;
        assert!(log.contains("thawed a cgroup that an experiment had left frozen"), "{log}");
    }
    Ok(())
}

/// Kills the command, its guard or the agent at random moments of short experiments.
fn killed_at_any_moment(name: &str, freezer: Freezer, experiments: usize, seed: u64) -> Result<()> {
    let (mut scene, mut random) = (ExperimentScene::new(name, "seed = 9\n[[gpus]]", freezer)?, Random(seed));
    for n in 0..experiments {
        // Longer than the bound: most freezes do not end by themselves within it.
        let mut command = scene.start_with(&["--freeze", "3s", "--pause", "300ms"])?;
        let guard = scene.wait_for_guard()?;
        // The first window begins two seconds after the start; the range ends in the second burst of six.
        let after = Duration::from_millis(1_500 + random.below(9_000));
        std::thread::sleep(after);
        let what = match n % 3 {
            0 => {
                command.ends_with(libc::SIGKILL)?;
                "the command"
            }
            1 => {
                kill(guard, libc::SIGKILL);
                "the guard"
            }
            _ => {
                scene.agent.take().context("the agent")?.process.ends_with(libc::SIGKILL)?;
                "the agent"
            }
        };
        scene.check_thawed(&format!("kill -9 of {what} after {after:?}"))?;
        drop(command);
        if scene.agent.is_none() {
            scene.start_agent()?;
        }
    }
    Ok(())
}

#[test]
fn an_experiment_that_is_killed_at_any_moment_ends_thawed() -> Result<()> {
    killed_at_any_moment("experiment-moments", Freezer::V2, 6, 21)
}

#[test]
fn an_experiment_with_version_1_that_is_killed_at_any_moment_ends_thawed() -> Result<()> {
    killed_at_any_moment("experiment-moments-v1", Freezer::V1, 3, 22)
}

/// As an out-of-memory daemon does, or the end of a login session.
#[test]
fn an_experiment_in_a_cgroup_that_is_killed_ends_thawed() -> Result<()> {
    let scene = ExperimentScene::new("experiment-cgroup", "seed = 9\n[[gpus]]", Freezer::V2)?;
    let cgroup = scene.tree.make("terminal")?;
    let command = scene.start_as(program_in(&cgroup)?, &["--freeze", LONG_FREEZE])?;
    let guard = Moment::Within.wait(&scene)?;
    let of_guard = |file: &str| fs::read_to_string(format!("/proc/{guard}/{file}"));
    let (cgroups, spared) = (of_guard("cgroup")?, of_guard("oom_score_adj")?);
    let is_root = |line: &str| line.ends_with(":/");
    // Without CAP_SYS_RESOURCE the kernel refuses it, and the guard says so.
    let is_spared = spared.trim() == "-1000" || scene.errors().contains("may end the guard when memory is short");
    ensure!(cgroups.lines().all(is_root) && is_spared, "the guard is in {cgroups:?}, {spared}: {}", scene.errors());
    fs::write(cgroup.join("cgroup.kill"), "1")?;
    scene.check_thawed("the cgroup of the command was killed")?;
    ensure!(!scene.errors().contains("will not thaw"), "the agent could have thawed it, too: {}", scene.errors());
    let log = scene.agent()?.log()?;
    ensure!(!log.contains("thawed a cgroup that an experiment had left frozen"), "the agent had to thaw it: {log}");
    drop(command);
    Ok(())
}

#[test]
fn an_experiment_leaves_frozen_what_another_program_has_frozen() -> Result<()> {
    let scene = ExperimentScene::new("experiment-paused", "seed = 9\n[[gpus]]", Freezer::V2)?;
    let [thawed, frozen] = scene.states;
    let stays = |what: &str| {
        ensure!(scene.state()? == frozen, "{what}: another program's freeze was ended: {}", scene.errors());
        fs::write(&scene.file, thawed)?;
        anyhow::Ok(())
    };
    let mut command = scene.start_with(&["--freeze", "1s", "--pause", "2s"])?;
    let guard = scene.wait_for_guard()?;
    fs::write(&scene.file, frozen)?;
    let reported = || Ok(scene.errors().contains("another program has frozen").then_some(()));
    wait_for("the burst without a freeze is reported", FREEZES_WITHIN, reported)?;
    kill(guard, libc::SIGKILL);
    let ended = || Ok(command.0.try_wait()?);
    wait_for("the command has ended", FREEZES_WITHIN, ended)?;
    stays("the guard was killed")
}

#[test]
fn an_experiment_reports_a_freeze_that_another_program_has_ended() -> Result<()> {
    let scene = ExperimentScene::new("experiment-thawed", "seed = 9\n[[gpus]]", Freezer::V2)?;
    let command = scene.start()?;
    Moment::Within.wait(&scene)?;
    fs::write(&scene.file, scene.states[0])?;
    let reported = || Ok(scene.errors().contains("another program has thawed it").then_some(()));
    wait_for("the end of the freeze is reported", THAWS_WITHIN, reported)?;
    kill(command.0.id(), libc::SIGINT);
    scene.check_thawed("thawed by another program")?;
    failed(command)
}

#[test]
fn an_experiment_that_is_interrupted_thaws_and_signals_of_a_terminal_do_not_reach_the_guard() -> Result<()> {
    let scene = ExperimentScene::new("experiment-signal", "seed = 9\n[[gpus]]", Freezer::V2)?;
    let command = scene.start()?;
    let guard = Moment::Within.wait(&scene)?;
    for signal in [libc::SIGINT, libc::SIGHUP] {
        kill(guard, signal);
    }
    std::thread::sleep(Duration::from_millis(500));
    ensure!(!scene.is_thawed()? && scene.guard()? == Some(guard), "the guard ignores SIGINT and SIGHUP");
    kill(command.0.id(), libc::SIGINT);
    scene.check_thawed("SIGINT of the command")?;
    failed(command)?;
    assert!(scene.errors().contains("interrupted") && scene.freezer == Freezer::V2, "{}", scene.errors());
    Ok(())
}
