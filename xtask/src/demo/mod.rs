//! `demo`: runs a few containers on a GPU, the agent, and a table of GPU use.
//!
//! Everything except the GPU is real, and the GPU as well if the machine has one. Nothing is left behind: processes die with this one,
//! and the janitor removes the rest.

pub mod exposition;
mod table;
pub mod workloads;

use crate::{
    agent,
    build::{self, Built, Profile},
    janitor::Cleanup,
    setup, sys,
    tools::{self, Running, progress, run, tail},
};
use anyhow::{Context, Result, bail};
use devkit::http::{Response, Server};
use std::{
    io::{self, IsTerminal as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};
use table::{Screen, View};
use workloads::{ContainerHost, SPECS, Spec, Workload};

const DRIVER: &str = "/dev/nvidiactl";
const SCRAPE_PERIOD: Duration = Duration::from_secs(1);

struct DemoOptions {
    lasts: Option<Duration>,
    /// `None`: real if the machine has a driver.
    real: Option<bool>,
}

impl DemoOptions {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { lasts: None, real: None };
        let mut words = args.iter();
        while let Some(word) = words.next() {
            match word.split_once('=').unwrap_or((word, "")) {
                ("--for", "") => options.lasts = Some(tools::duration(words.next().map_or("", String::as_str))?),
                ("--for", value) => options.lasts = Some(tools::duration(value)?),
                ("--sim", "") if options.real.is_none() => options.real = Some(false),
                ("--real", "") if options.real.is_none() => options.real = Some(true),
                _ => return Err(tools::unknown(word)),
            }
        }
        Ok(options)
    }
}

pub fn verb(args: &[String]) -> Result<()> {
    let options = DemoOptions::parse(args)?;
    let driver = Path::new(DRIVER).exists();
    let real = options.real.unwrap_or(driver);
    if real && !driver {
        bail!("--real requires NVIDIA's driver, but {DRIVER} does not exist; --sim uses a simulated GPU");
    }
    if !sys::is_root() {
        bail!("the demo loads programs into the kernel and creates containers, which requires root");
    }
    setup::ensure(setup::Scope::Ebpf, false)?;
    let built = build::everything(if real { Profile::Release } else { Profile::Debug })?;

    sys::catch_signals();
    // Declared first, so dropped last: the processes end before their cgroups are removed.
    let mut cleanup = Cleanup::start()?;
    let tmp = cleanup.temporary("gpu-sampler-demo")?;
    let mut demo = if real { RunningDemo::real(&built, &tmp)? } else { RunningDemo::simulated(&built, &tmp, &mut cleanup)? };
    let from = Instant::now();
    demo.watch(options.lasts, from)?;
    let view = demo.scrape()?;
    if !io::stdout().is_terminal() {
        for line in view.lines(&demo.page()) {
            println!("{line}");
        }
    }
    if options.lasts.is_some()
        && let Some(signal) = sys::interrupted()
    {
        bail!("interrupted by signal {signal} before the time was over");
    }
    demo.verdict(&view)
}

/// Everything that the demo runs.
struct RunningDemo {
    workloads: Vec<Workload>,
    loads: Vec<Running>,
    agent: Running,
    log: PathBuf,
    server: SocketAddr,
    expected: &'static [Spec],
}

impl RunningDemo {
    fn simulated(built: &Built, tmp: &Path, cleanup: &mut Cleanup) -> Result<Self> {
        let dir = tmp.join("nvml");
        run(Command::new(&built.sim)
            .args(["init", "--gpus", "1", "--dir"])
            .arg(&dir)
            .env("NVML_SIM_LIBRARY", &built.sim_library))?;
        let host = ContainerHost::choose(cleanup, tmp)?;
        let (mut workloads, mut loads) = (Vec::new(), Vec::new());
        let mut begin = |spec: &Spec| -> Result<()> {
            let workload = host.start(spec, cleanup)?;
            loads.push(workloads::load(&workload, spec, &built.sim, &dir)?);
            progress(format_args!("demo: {} as pid {}, {} of GPU 0", workload.name, workload.pid, spec.demand));
            workloads.push(workload);
            Ok(())
        };
        // Some containers start before the agent, one while it runs: it has to attribute both kinds.
        let (last, before) = SPECS.split_last().context("there are workloads")?;
        for spec in before {
            begin(spec)?;
        }
        let mut agent = Command::new(&built.sampler);
        agent.env("NVML_SIM_DIR", &dir).arg("run").arg("--nvml-lib").arg(dir.join("lib/libnvidia-ml.so.1"));
        // The machine's own device nodes do not belong to the simulator.
        agent.arg("--path-devfs").arg(dir.join("dev"));
        let (agent, server, log) = agent::start("demo", agent, tmp)?;
        begin(last)?;
        Ok(Self { workloads, loads, agent, log, server, expected: &SPECS })
    }

    fn real(built: &Built, tmp: &Path) -> Result<Self> {
        progress(
            "demo: using the machine's NVIDIA driver; it starts no CUDA work, so the table shows existing users and the devices",
        );
        let mut agent = Command::new(&built.sampler);
        agent.arg("run");
        let (agent, server, log) = agent::start("demo", agent, tmp)?;
        Ok(Self { workloads: Vec::new(), loads: Vec::new(), agent, log, server, expected: &[] })
    }

    /// Runs until the time is over or a signal arrives; it is an error if a process that has to run ends.
    fn watch(&mut self, lasts: Option<Duration>, from: Instant) -> Result<()> {
        let live = io::stdout().is_terminal();
        let mut screen = Screen::default();
        progress(match lasts {
            Some(lasts) => format!("demo: running for {lasts:?}; {}", self.page()),
            None => format!("demo: running until Ctrl-C; {}", self.page()),
        });
        let mut drawn: Option<Instant> = None;
        while sys::interrupted().is_none() && lasts.is_none_or(|lasts| from.elapsed() < lasts) {
            self.check_processes()?;
            if drawn.is_none_or(|drawn| drawn.elapsed() >= SCRAPE_PERIOD) {
                drawn = Some(Instant::now());
                let view = self.scrape()?;
                if live {
                    screen.draw(&view.lines(&self.page()))?;
                }
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn check_processes(&mut self) -> Result<()> {
        if let Some(status) = self.agent.ended()? {
            bail!("the agent ended ({status}):\n{}", tail(&self.log));
        }
        for workload in &mut self.workloads {
            if !workload.is_alive()? {
                bail!("the workload {} (pid {}) ended", workload.name, workload.pid);
            }
        }
        for load in &mut self.loads {
            if let Some(status) = load.ended()? {
                bail!("{} ended ({status})", load.name);
            }
        }
        Ok(())
    }

    fn scrape(&mut self) -> Result<View> {
        let page = Server::tcp(self.server).get("/metrics").and_then(Response::ok);
        let page = match page {
            Ok(page) => page,
            Err(problem) => {
                // An ended process is a better explanation than "connection refused".
                self.check_processes()?;
                return Err(problem.context("reading /metrics"));
            }
        };
        Ok(View::new(&exposition::parse(&String::from_utf8_lossy(&page))))
    }

    fn page(&self) -> String {
        format!("metrics: http://{}/metrics", self.server)
    }

    fn verdict(&self, view: &View) -> Result<()> {
        if !view.has_devices() {
            bail!("the agent shows no GPU time:\n{}", tail(&self.log));
        }
        let missing = view.missing(self.expected);
        if missing.is_empty() {
            progress(format_args!("demo: {} workloads, all attributed with namespace, pod and container", self.expected.len()));
            return Ok(());
        }
        bail!("not every workload was attributed:\n  {}", missing.join("\n  "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_parsed_and_validated() {
        let parse = |words: &[&str]| DemoOptions::parse(&words.iter().map(|word| word.to_string()).collect::<Vec<_>>());
        assert_eq!(parse(&["--for", "5s", "--sim"]).unwrap().real, Some(false));
        assert_eq!(parse(&["--for=5s"]).unwrap().lasts, Some(Duration::from_secs(5)));
        assert!(parse(&["--sim", "--real"]).is_err());
        assert!(parse(&["--for"]).is_err());
        assert!(parse(&["x"]).is_err());
    }
}
