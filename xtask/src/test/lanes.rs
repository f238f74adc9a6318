//! Runs privileged tests, each in a process of its own: a few at once, and those that measure time alone.

use crate::{
    janitor::{Cleanup, Leftover},
    sys,
    test::outcome::{self, CpuTime, Outcome},
    tools::{self, progress},
};
use anyhow::{Context, Result, bail};
use devkit::process::start_time;
use std::{
    collections::VecDeque,
    fs,
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

/// Tests that run at once. Most wait for the simulated driver most of the time.
const LANES: usize = 2;
/// Modules of tests that measure time, keep the processors busy or observe all containers of the machine: nothing else runs then.
const ALONE: [&str; 19] = [
    "accuracy",
    "behaviours",
    "contention",
    "demo",
    "doubles",
    "explain",
    "faults",
    "gpu_recording",
    "image",
    "labels",
    "latency",
    "lives",
    "modes",
    "monitoring",
    "places",
    "pressure",
    "prometheus",
    "web",
    "web_config",
];
/// A test that takes longer hangs.
const LIMIT: Duration = Duration::from_mins(15);
/// Tests that are named at the end, with their times.
const SLOWEST: usize = 10;

pub struct Lanes<'a> {
    program: PathBuf,
    command: &'a (dyn Fn(&Path) -> Command + Sync),
    cleanup: Mutex<&'a mut Cleanup>,
    outputs: PathBuf,
}

impl<'a> Lanes<'a> {
    /// `command` makes a command of the program of all tests, with the environment of tests.
    pub fn new(program: PathBuf, command: &'a (dyn Fn(&Path) -> Command + Sync), cleanup: &'a mut Cleanup) -> Result<Self> {
        let outputs = cleanup.temporary("gpu-sampler-test-output")?;
        Ok(Self { program, command, cleanup: Mutex::new(cleanup), outputs })
    }

    /// The tests with one of these words in their names; all, if there are no words.
    pub fn find(&self, words: &[String]) -> Result<Vec<String>> {
        let mut command = (self.command)(&self.program);
        let output = command.args(["--list", "--format", "terse"]).args(words).output()?;
        if !output.status.success() {
            bail!("`{}` failed ({})", tools::shown(&command), output.status);
        }
        let list = String::from_utf8(output.stdout)?;
        Ok(list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
    }

    /// Runs these tests and prints how each ended. An error is one of the runner itself.
    pub fn run(&self, names: &[String]) -> Result<Vec<Outcome>> {
        let (alone, shared): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| runs_alone(name));
        let mut outcomes = self.run_lanes(LANES, shared)?;
        outcomes.extend(self.run_lanes(1, alone)?);
        Ok(outcomes)
    }

    /// Like [`run`](Self::run), one after the other.
    pub fn run_alone(&self, names: &[String]) -> Result<Vec<Outcome>> {
        self.run_lanes(1, names.iter().collect())
    }

    fn run_lanes(&self, lanes: usize, names: Vec<&String>) -> Result<Vec<Outcome>> {
        let (queue, outcomes) = (Mutex::new(VecDeque::from(names)), Mutex::new(Vec::new()));
        let lane = || -> Result<()> {
            while sys::interrupted().is_none() {
                let next = lock(&queue).pop_front();
                let Some(name) = next else { break };
                let outcome = self.run_one(name).with_context(|| name.clone())?;
                lock(&outcomes).push(outcome);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let lanes: Vec<_> = (0..lanes).map(|_| scope.spawn(lane)).collect();
            lanes.into_iter().try_for_each(|lane| lane.join().unwrap_or_else(|_| bail!("a lane of tests panicked")))
        })?;
        if let Some(signal) = sys::interrupted() {
            bail!("interrupted by signal {signal}");
        }
        Ok(outcomes.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn run_one(&self, name: &str) -> Result<Outcome> {
        let path = self.outputs.join(name.replace("::", "-"));
        let file = File::create(&path).with_context(|| path.display().to_string())?;
        let mut command = (self.command)(&self.program);
        command.args(["--exact", name, "--show-output"]);
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        sys::own_session(sys::dies_with_us(&mut command, libc::SIGKILL));
        let (since, cpu) = (Instant::now(), CpuTime::now());
        let mut child = command.spawn().with_context(|| tools::shown(&command))?;
        let pid = child.id();
        lock(&self.cleanup).will_remove(&Leftover::Group { pid, start: start_time(pid).unwrap_or_default() })?;
        let ended = wait(&mut child, since)?;
        // What the test left of its process group would disturb the next one.
        sys::kill(-(pid as i32), libc::SIGKILL);
        let stolen = cpu.zip(CpuTime::now()).and_then(|(before, now)| now.stolen_since(before));
        let output = String::from_utf8_lossy(&fs::read(&path)?).into_owned();
        fs::remove_file(&path)?;
        let failure = match ended {
            Some(true) if output.contains("test result: ok. 1 passed") => None,
            Some(_) => Some(outcome::message(name, &output)),
            None => {
                let mut message = outcome::message(name, &output);
                message.push(format!("killed: it did not end within {} min", LIMIT.as_secs() / 60));
                Some(message)
            }
        };
        let outcome = Outcome { name: name.to_owned(), took: since.elapsed(), failure, stolen };
        print(&outcome, &output);
        Ok(outcome)
    }
}

/// Whether it ended with success; `None` if it was killed, because it did not end.
fn wait(child: &mut Child, since: Instant) -> Result<Option<bool>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.success()));
        }
        if since.elapsed() > LIMIT || sys::interrupted().is_some() {
            super::end_group(child)?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn runs_alone(name: &str) -> bool {
    name.split_once("::").is_some_and(|(module, _)| ALONE.contains(&module))
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One write per test, since several end at once.
fn print(outcome: &Outcome, output: &str) {
    let (name, seconds) = (&outcome.name, outcome.took.as_secs_f64());
    let mut text = format!("test {name} ... {}, {seconds:.1} s\n", if outcome.failure.is_some() { "FAILED" } else { "ok" });
    let lines = if outcome.failure.is_some() { output.lines().collect() } else { outcome::printed(name, output) };
    lines.iter().for_each(|line| text.extend(["    ", line, "\n"]));
    print!("{text}");
}

/// Says what took long.
pub fn report_slowest(outcomes: &[Outcome]) {
    let mut slowest: Vec<&Outcome> = outcomes.iter().collect();
    slowest.sort_by_key(|outcome| std::cmp::Reverse(outcome.took));
    for outcome in slowest.iter().take(SLOWEST) {
        progress(format_args!("{:6.1} s {}", outcome.took.as_secs_f64(), outcome.name));
    }
}
