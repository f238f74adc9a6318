//! The pages of a busy node in both formats, through promtool and the reference parser of OpenMetrics.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::kernel::{Actor, CgroupTree};
use gpu_sampler_tests::labels::{UID, bundle};
use gpu_sampler_tests::{Agent, Running, Sample, Sim, clients, get, get_accepting, parse, sum, wait_for};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");
/// A driver that samples all engines.
const WORLD: &str = "driver_version = '550.54.14'\n[[gpus]]";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0";
const PAGES: [(&str, &str); 3] = [
    ("default", "/metrics"),
    ("all", "/metrics?collect%5B%5D=all"),
    ("created", "/metrics?collect%5B%5D=all&collect%5B%5D=created"),
];
/// Prints the numbers of [`Parsed`].
const PARSER: &str = r#"
import sys
from prometheus_client.openmetrics.parser import text_string_to_metric_families
families = list(text_string_to_metric_families(sys.stdin.read()))
samples = [sample for family in families for sample in family.samples]
created = [sample.value for sample in samples if sample.name.endswith("_created")]
units = [family.unit for family in families if family.unit]
print(len(families), len(samples), len(created), len(units))
"#;

/// A container with work on two engines, next to another one.
struct BusyNode {
    agent: Agent,
    sim: Sim,
    _loads: Vec<Running>,
    _actors: Vec<Actor>,
    _root: tempfile::TempDir,
    _tree: CgroupTree,
}

impl BusyNode {
    fn start() -> Result<Self> {
        let (sim, root, tree) = (Sim::new(WORLD)?, tempfile::tempdir()?, CgroupTree::new("exposition")?);
        let (mut actors, mut loads) = (Vec::new(), Vec::new());
        for n in 1..=2 {
            let (id, dir) = tree.container(n)?;
            bundle(root.path(), &id, &format!("trainer-{n}"), UID)?;
            let mut actor = Actor::start(ACTOR, &["in", &dir.to_string_lossy(), "--", "sleep", "300"])?;
            loads.push(sim.load(actor.pid()?, 0, 0.7, &["--enc", "0.3"])?);
            actors.push(actor);
        }
        let path = root.path().to_string_lossy().into_owned();
        let agent = Agent::start(Some(&sim), &["--path-rootfs", &path, "--label-sources", "bundle"])?;
        let node = Self { agent, sim, _loads: loads, _actors: actors, _root: root, _tree: tree };
        node.shows(&[
            "container_gpu_engine_seconds_total",
            "container_gpu_window_share_ratio_count",
            "container_gpu_contention_seconds_total",
        ])?;
        // Not before: an error from before the agent registered for them is not reported.
        node.sim.inject("xid", &["--gpu", "0", "--xid", "79"])?;
        node.shows(&["gpu_xid_errors_total"])?;
        Ok(node)
    }

    /// Waits until the page has these series.
    fn shows(&self, names: &[&str]) -> Result<()> {
        wait_for(&format!("series of {names:?}"), Duration::from_secs(90), || {
            let samples = self.agent.scrape()?;
            Ok(names.iter().all(|name| sum(&samples, name, &[]).is_some()).then_some(()))
        })
    }

    fn openmetrics(&self, path: &str) -> Result<String> {
        get_accepting(self.agent.port, path, OPENMETRICS)
    }
}

/// The status and both outputs of a program that reads `input`.
fn run(mut command: Command, input: &str) -> Result<(bool, String)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // Written from another thread: the program may write before it has read everything.
    let (mut stdin, input) = (child.stdin.take().context("stdin")?, input.to_owned());
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    ensure!(writer.join().is_ok_and(|written| written.is_ok()), "the program did not read its input");
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    Ok((output.status.success(), text))
}

fn promtool(page: &str) -> Result<(bool, String)> {
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]);
    run(promtool, page)
}

/// What the reference parser counts.
#[derive(Debug, PartialEq)]
struct Parsed {
    families: usize,
    samples: usize,
    created: usize,
    units: usize,
}

fn reference_parser(python: &Path, page: &str) -> Result<Parsed> {
    let mut command = Command::new(python);
    command.args(["-c", PARSER]);
    let (is_accepted, output) = run(command, page)?;
    ensure!(is_accepted, "{output}");
    let numbers: Vec<usize> = output.split_whitespace().map(str::parse).collect::<Result<_, _>>().context(output.clone())?;
    let [families, samples, created, units] = numbers[..] else { anyhow::bail!("unexpected output: {output}") };
    Ok(Parsed { families, samples, created, units })
}

fn created_times(page: &str) -> BTreeMap<String, f64> {
    let named = |sample: Sample| {
        sample.name.ends_with("_created").then(|| (format!("{} {:?}", sample.name, sample.labels), sample.value))
    };
    parse(page).into_iter().filter_map(named).collect()
}

#[test]
fn promtool_and_the_reference_parser_accept_all_pages() -> Result<()> {
    let python = clients::venv(&["prometheus-client==0.22.1"])?.join("python");
    let node = BusyNode::start()?;
    let mut before: Option<Parsed> = None;
    for (name, path) in PAGES {
        let text = get(node.agent.port, path)?;
        ensure!(!text.contains("_created") && !text.contains("# EOF"), "{name} in the text format");
        let (is_accepted, output) = promtool(&text)?;
        ensure!(is_accepted && output.is_empty(), "promtool on {name}: {output}");
        let page = node.openmetrics(path)?;
        ensure!(page.ends_with("# EOF\n"), "{name} in OpenMetrics");
        // It reads every page in the text format, in which the help of a counter is that of another name.
        let (_, output) = promtool(&page)?;
        let is_of_format = |line: &str| ["_total no help text", "_created no help text"].iter().any(|end| line.ends_with(end));
        let complaints: Vec<&str> = output.lines().filter(|line| !is_of_format(line)).collect();
        ensure!(complaints.is_empty(), "promtool on {name} in OpenMetrics: {complaints:?}");
        let parsed = reference_parser(&python, &page).with_context(|| format!("{name} in OpenMetrics"))?;
        println!("{name}: {parsed:?}");
        ensure!(parsed.units > 10 && parsed.samples == parse(&page).len(), "{parsed:?}");
        ensure!((parsed.created > 0) == (name == "created"), "{name}: {parsed:?}");
        ensure!(before.is_none_or(|before| before.samples < parsed.samples), "{name}: {parsed:?}");
        before = Some(parsed);
    }
    Ok(())
}

#[test]
fn created_times_are_unix_seconds_that_stay_the_same() -> Result<()> {
    let from = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    let node = BusyNode::start()?;
    let (_, path) = PAGES[2];
    let first = created_times(&node.openmetrics(path)?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    ensure!(first.len() > 100, "{first:?}");
    for (series, at) in &first {
        ensure!((from - 0.001..=now).contains(at), "{series}: {at} is not from {from} to {now}");
    }
    std::thread::sleep(Duration::from_secs(3));
    let second = created_times(&node.openmetrics(path)?);
    let changed: Vec<_> = first.iter().filter(|(series, at)| second.get(*series) != Some(at)).collect();
    ensure!(changed.is_empty(), "{changed:?}");
    Ok(())
}
