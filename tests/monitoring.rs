//! The shipped dashboards and rules against a real agent and a real Prometheus: every query has data, every label exists, alerts fire and
//! clear. Grafana itself is not run; the dashboards are compared with Grafana Labs' own model.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use devkit::promql::{Reference, labels_of_template, references};
use gpu_sampler_tests::kernel::{CgroupTree, sleeper};
use gpu_sampler_tests::prometheus::PrometheusServer;
use gpu_sampler_tests::{Agent, Docker, Sample, Sim, clients, sum, wait_for};
use serde_json::{Value, json};

const RULES: &str = include_str!("../deploy/prometheus/rules.yml");
const MIGRATION: &str = include_str!("../docs/migration.md");
/// The types of Grafana's dashboards, and the compiler that checks them.
const NPM: [&str; 2] = ["@grafana/schema@13.2.3", "typescript@5.9.3"];
const SDK: &str = "grafana-foundation-sdk==1769699379!11.6.0";
/// Families that an agent without TLS does not have.
const ABSENT: [&str; 1] = ["gpu_sampler_web_certificate_expiry_timestamp_seconds"];
/// Set by Prometheus, as are the families about a scrape.
const TARGET_LABELS: [&str; 2] = ["instance", "job"];
const PLENTY: [&str; 2] = ["--kernel-mode", "raw_tracepoint"];

/// Alerts that this world does not fire, each with the reason. Their families must have series all the same, but for those that are about
/// missing series.
const NOT_FIRING: [(&str, &str); 14] = [
    ("GpuSamplerForeignPids", "a state of the whole machine, which excludes attribution; tests/pid_space.rs has it"),
    ("GpuSamplerPidsUnsettled", "the same"),
    ("GpuSamplerFewSamplesQueried", "tests give the agent a large budget"),
    ("GpuSamplerBudgetReached", "the same"),
    ("GpuSamplerOverBudget", "the same"),
    ("GpuSamplerSamplesLost", "the simulated buffer does not wrap unless the agent is stopped for 10 s"),
    ("GpuSamplerKernelEventsLost", "the kernel delivers all events"),
    ("GpuSamplerEccUncorrected", "the simulated count is constant; tests/hardware.rs has it"),
    ("GpuSamplerAgentDown", "the agent is scraped"),
    ("GpuSamplerNoAgents", "the same"),
    ("GpuSamplerScrapeSlow", "the agent responds within milliseconds"),
    ("GpuSamplerDegraded", "its conditions limit the whole agent"),
    ("GpuSamplerCertificateExpires", "the agent has no TLS here"),
    ("GpuSamplerSessionsNotUploaded", "no session is removed"),
];

const HANGING: &str = "GpuSamplerDriverStalled";

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)
}

struct Query {
    place: String,
    expr: String,
    legend: String,
}

fn dashboards() -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder("deploy/grafana"))?.collect::<std::io::Result<Vec<_>>>()?;
    Ok(entries.into_iter().map(|entry| entry.path()).collect())
}

/// The expression with ranges of 20 s in place of its own.
fn short_ranges(expr: &str) -> String {
    let mut parts = expr.split('[');
    let mut short = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(']') {
            Some((range, rest)) if range.ends_with(['m', 'h']) => short.push_str(&format!("[20s]{rest}")),
            _ => short.push_str(&format!("[{part}")),
        }
    }
    short
}

/// The queries of all panels, with every variable set to all values, over short ranges.
fn queries() -> Result<Vec<Query>> {
    let mut queries = Vec::new();
    for file in dashboards()? {
        let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(&file)?)?;
        let variables = dashboard["templating"]["list"].as_array().context("variables")?;
        let names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
        for panel in dashboard["panels"].as_array().context("panels")? {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let mut expr = target["expr"].as_str().context("an expression")?.to_owned();
                expr = expr.replace("$__rate_interval", "20s").replace("$__range", "40s").replace(" or vector(0)", "");
                for name in &names {
                    expr = expr.replace(&format!("\"${name}\""), "\".*\"");
                }
                ensure!(!expr.contains('$'), "{expr}: a variable that the dashboard does not have");
                let place = format!("{}: {}", dashboard["uid"].as_str().unwrap_or_default(), panel["title"]);
                queries.push(Query { place, expr, legend: target["legendFormat"].as_str().unwrap_or_default().to_owned() });
            }
        }
    }
    ensure!(queries.len() > 100, "only {} queries", queries.len());
    // The last column of the tables that map other exporters' metrics to queries.
    let rows = MIGRATION.lines().filter_map(|line| line.strip_suffix("` |")?.rsplit_once("| `"));
    let counterparts: Vec<Query> =
        rows.map(|(row, expr)| Query { place: row.to_owned(), expr: short_ranges(expr), legend: String::new() }).collect();
    ensure!(counterparts.len() > 30, "only {} rows in docs/migration.md", counterparts.len());
    queries.extend(counterparts);
    Ok(queries)
}

/// The rules with ranges of seconds in place of minutes and hours: `for` is 2 s.
fn compressed() -> Result<String> {
    let mut compressed = String::new();
    for line in RULES.lines() {
        let mut line = line.to_owned();
        if let Some(at) = line.find("for: ").filter(|at| line[..*at].trim().is_empty()) {
            line.replace_range(at.., "for: 2s");
        }
        compressed.push_str(&short_ranges(&line).replace("offset 15m", "offset 20s"));
        compressed.push('\n');
    }
    ensure!(compressed.matches("[20s]").count() > 10 && !compressed.contains("m]"), "{compressed}");
    Ok(compressed)
}

fn labels_by_name(page: &[Sample]) -> BTreeMap<&str, BTreeSet<&str>> {
    let mut found: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for sample in page {
        found.entry(&sample.name).or_default().extend(sample.labels.keys().map(String::as_str));
    }
    found
}

/// The labels that an expression matches, groups by or shows, and that no series of the scrape has.
fn unknown_labels(expr: &str, legend: &str, scraped: &BTreeMap<&str, BTreeSet<&str>>) -> Vec<String> {
    let found = references(expr);
    let mut known = BTreeSet::from(TARGET_LABELS);
    for reference in &found {
        if let Reference::Metric(name) = reference {
            known.extend(scraped.get(name.as_str()).into_iter().flatten());
        }
    }
    let used = found.into_iter().filter_map(|reference| match reference {
        Reference::Matcher { label, .. } | Reference::Listed(label) => Some(label),
        Reference::Metric(_) => None,
    });
    used.chain(labels_of_template(legend)).filter(|label| !known.contains(label.as_str())).collect()
}

/// GPUs with every kind of trouble that the simulated driver has.
const WORLD: &str = "driver_version = '580.95.05'\nseed = 41\nenergy = true\n\
    [[gpus]]\nminor = 0\necc_errors = [12, 1]\nremapped_rows = [3, 2, 1, 1]\nrecovery_action = 'drain_and_reset'\n\
    nvlink_bytes_per_second = 6000000000\npcie_bytes_per_second = 1000000000\n\
    [[gpus]]\nminor = 1\ngarbage = ['util', 'zombies']\n\
    [[gpus]]\nminor = 2\nenergy = false\n\
    [[gpus]]\nminor = 3\n[[gpus]]\nminor = 4\ngpm = true\nmig = ['MIG-1', 'MIG-2']\n\
    [[gpus]]\nminor = 5\n[[gpus]]\nminor = 6\n[[gpus]]\nminor = 7\n[[gpus]]\nminor = 8\n\
    [[faults]]\ngpu = 5\nkind = 'error'\nfrom = '0s'\nerror = 'UNKNOWN'\ncall = 'nvmlDeviceGetSamples'\n";
const FAULTS: [(&str, &[&str]); 4] = [
    ("fault", &["--gpu", "0", "--kind", "throttle", "--reasons", "hw_thermal,sw_power_cap"]),
    ("fault", &["--gpu", "2", "--kind", "latch"]),
    ("fault", &["--gpu", "3", "--kind", "lost"]),
    ("xid", &["--gpu", "0", "--xid", "13"]),
];

#[test]
fn every_query_of_dashboards_and_rules_has_data_and_every_label_exists() -> Result<()> {
    let sim = Sim::new(WORLD)?;
    let (docker, tree) = (Docker::new()?, CgroupTree::new("monitoring")?);
    // A source that is configured and does not respond.
    let absent = ["--cri-endpoint", "unix:///run/gpu-sampler-tests-none.sock"];
    let store = tempfile::tempdir()?;
    let store = format!("file://{}", store.path().display());
    let agent = Agent::start(Some(&sim), &[&PLENTY[..], &absent, &["--session-store", &store]].concat())?;
    let server = PrometheusServer::with_rules(agent.port, "1s", "/metrics", "all", &compressed()?)?;
    docker.with_device("with-gpu", "/dev/null", "nvidia0")?;
    let pods = ["trainer-0", "server-0", "notebook-0", "idle-0"].map(|pod| docker.pod("ml", pod, 300).map(|(_, pid)| pid));
    let [trainer, inference, notebook, idle] = pods;
    let (trainer, inference, notebook) = (trainer?, inference?, notebook?);
    let cgroups = [tree.make("system.slice/slurmstepd.scope/job_7/step_0/user/task_0")?, tree.make("system.slice/vllm.service")?];
    let users = [sleeper(&cgroups[0])?, sleeper(&cgroups[1])?];
    // A container that no source knows.
    let unlabelled = sleeper(&tree.container(1)?.1)?;
    let mut loads = vec![
        sim.load(trainer, 0, 0.9, &["--enc", "0.3"])?,
        sim.load(inference, 0, 0.8, &[])?,
        sim.load(users[0].0.id(), 1, 0.9, &["--dec", "0.3"])?,
        sim.load(users[1].0.id(), 1, 0.9, &[])?,
        sim.loads(idle?, 0, &["--mem", "1GiB"])?,
        sim.load(notebook, 4, 0.5, &["--mig", "0"])?,
        sim.load(trainer, 6, 0.5, &["--mps"])?,
        sim.load(notebook, 6, 0.5, &["--mps"])?,
    ];
    wait_for("users in Prometheus", Duration::from_secs(30), || Ok(server.query("gpu_user_seconds_total > 0")?.pop()))?;
    // The alert compares with a time at which the GPU was there.
    wait_for("scrapes with the GPU", Duration::from_secs(30), || {
        Ok(server.query("count_over_time(gpu_info{index=\"8\"}[1m]) >= 12")?.pop())
    })?;
    // While another GPU is lost, one that is gone counts as lost, too.
    sim.inject("fault", &["--gpu", "8", "--kind", "absent"])?;
    wait_for("the GPU is gone", Duration::from_secs(20), || {
        let is_there = |s: &Sample| s.name == "gpu_info" && s.labels["index"] == "8";
        Ok((!agent.scrape()?.iter().any(is_there)).then_some(()))
    })?;
    // The error that a loss begins with. After a loss the library is opened again, and what the driver reports meanwhile is not heard, so
    // it is repeated.
    wait_for("the XID error is heard", Duration::from_secs(20), || {
        sim.inject("xid", &["--gpu", "3", "--xid", "79"])?;
        let is_heard = |s: &Sample| s.name == "gpu_xid_errors_total" && s.labels["xid"] == "79";
        Ok(agent.scrape()?.iter().any(is_heard).then_some(()))
    })?;
    wait_for("the XID error is in Prometheus", Duration::from_secs(30), || {
        Ok(server.query("increase(gpu_xid_errors_total{xid=\"79\"}[1m]) > 0")?.pop())
    })?;
    for (verb, args) in FAULTS {
        sim.inject(verb, args)?;
    }

    let mut open: Vec<Query> = queries()?;
    let alerts = server.rules()?.into_iter().filter(|rule| rule["type"] == "alerting");
    let name_of = |rule: &Value| rule["name"].as_str().unwrap_or_default().to_owned();
    let mut silent: BTreeSet<String> = alerts.map(|rule| name_of(&rule)).collect();
    for (name, _) in NOT_FIRING {
        ensure!(silent.remove(name), "{name} is not an alert");
    }
    // At the end: no new GPU is looked for while a call hangs.
    ensure!(silent.remove(HANGING), "{HANGING} is not an alert");
    // Since the start: some fire for seconds.
    let fired = || -> Result<BTreeSet<String>> {
        let alerts = server.query("count by (alertname) (max_over_time(ALERTS{alertstate=\"firing\"}[5m]))")?;
        Ok(alerts.iter().filter_map(|alert| alert["metric"]["alertname"].as_str()).map(str::to_owned).collect())
    };
    let recorded =
        || -> Result<Vec<Value>> { Ok(server.rules()?.into_iter().filter(|rule| rule["type"] == "recording").collect()) };
    open.extend(recorded()?.iter().map(|rule| Query { place: name_of(rule), expr: name_of(rule), legend: String::new() }));
    let (total, from) = (open.len(), Instant::now());
    // A panel about errors has data while they are recent: each query must have had data once.
    let complete = wait_for("data of every query, and every alert", Duration::from_secs(90), || {
        let mut still = Vec::new();
        for query in open.drain(..) {
            if server.query(&query.expr).with_context(|| format!("{}: {}", query.place, query.expr))?.is_empty() {
                still.push(query);
            }
        }
        open = still;
        let fired = fired()?;
        silent.retain(|name| !fired.contains(name));
        std::thread::sleep(Duration::from_secs(1));
        Ok((open.is_empty() && silent.is_empty()).then_some(()))
    });
    let shown: Vec<String> = open.iter().map(|query| format!("{}: {}", query.place, query.expr)).collect();
    complete.with_context(|| format!("without data:\n{}\nnot firing: {silent:?}", shown.join("\n")))?;
    println!("{total} queries have data after {:?}", from.elapsed());
    sim.inject("fault", &["--gpu", "7", "--kind", "stall"])?;
    wait_for(HANGING, Duration::from_secs(30), || Ok(fired()?.contains(HANGING).then_some(())))?;

    let page = agent.scrape()?;
    let mut scraped = labels_by_name(&page);
    scraped.extend(["up", "scrape_duration_seconds", "scrape_samples_scraped"].map(|name| (name, BTreeSet::new())));
    let mut problems = Vec::new();
    for Query { place, expr, legend } in queries()? {
        problems.extend(unknown_labels(&expr, &legend, &scraped).into_iter().map(|label| format!("{place}: no label {label}")));
    }
    for rule in server.rules()? {
        let expr = rule["query"].as_str().context("an expression")?;
        let is_recorded =
            references(expr).iter().any(|reference| matches!(reference, Reference::Metric(name) if name.contains(':')));
        if !is_recorded {
            let unknown = unknown_labels(expr, "", &scraped);
            problems.extend(unknown.into_iter().map(|label| format!("{}: no label {label}", rule["name"])));
        }
        // Also those that do not fire here are about series that exist.
        for reference in references(expr) {
            if let Reference::Metric(name) = reference
                && !ABSENT.contains(&name.as_str())
                && server.query(&format!("count({name})"))?.is_empty()
            {
                problems.push(format!("{}: {name} has no series", rule["name"]));
            }
        }
        ensure!(rule["health"] == "ok", "{rule}");
    }
    ensure!(problems.is_empty(), "{}", problems.join("\n"));
    drop((unlabelled, users));
    loads.clear();
    Ok(())
}

#[test]
fn alerts_on_blank_labels_contention_and_a_source_fire_and_clear() -> Result<()> {
    let sim = Sim::new("seed = 43\n[[gpus]]")?;
    let (docker, tree) = (Docker::new()?, CgroupTree::new("alerts")?);
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("docker.sock");
    std::os::unix::fs::symlink(docker.socket(), &socket)?;
    let engine = format!("unix://{}", socket.display());
    let agent = Agent::start(Some(&sim), &[PLENTY[0], PLENTY[1], "--docker-endpoint", &engine])?;
    let (_, first) = docker.pod("ml", "trainer-0", 300)?;
    let (_, second) = docker.pod("ml", "server-0", 300)?;
    let server = PrometheusServer::with_rules(agent.port, "1s", "/metrics", "default, contenders", &compressed()?)?;
    let firing = |name: &str| -> Result<Vec<Value>> {
        let rules = server.rules()?;
        let rule = rules.iter().find(|rule| rule["name"] == name).with_context(|| name.to_owned())?;
        let alerts = rule["alerts"].as_array().context("alerts")?;
        Ok(alerts.iter().filter(|alert| alert["state"] == "firing").cloned().collect())
    };
    let await_firing =
        |name: &str| wait_for(&format!("{name} fires"), Duration::from_secs(45), || Ok(firing(name)?.into_iter().next()));
    let await_clear =
        |name: &str| wait_for(&format!("{name} clears"), Duration::from_secs(60), || Ok(firing(name)?.is_empty().then_some(())));
    let mut names = vec!["GpuSamplerContention", "GpuSamplerSourceDown", "GpuSamplerLabelsMissing"];
    wait_for("the first scrape", Duration::from_secs(20), || Ok(server.query("gpu_sampler_build_info")?.pop()))?;
    std::thread::sleep(Duration::from_secs(5));
    if sum(&agent.scrape()?, "gpu_sampler_label_missing", &[]).is_some_and(|missing| missing > 0.0) {
        names.pop();
        println!("containers of others without labels are on this machine, so their alert has to fire, not to clear");
    }
    for name in &names {
        assert_eq!(firing(name)?, Vec::<Value>::new());
    }

    let alone = sim.load(first, 0, 0.9, &[])?;
    let contender = sim.load(second, 0, 0.9, &[])?;
    let unlabelled = sleeper(&tree.container(1)?.1)?;
    let contention = await_firing("GpuSamplerContention")?;
    assert_eq!(contention["labels"]["namespace"], "ml", "{contention}");
    assert_eq!(contention["labels"]["severity"], "info");
    let missing = await_firing("GpuSamplerLabelsMissing")?;
    assert_eq!(missing["annotations"]["runbook_url"], "docs/runbooks/GpuSamplerLabelsMissing.md");
    std::fs::remove_file(&socket)?;
    let down = await_firing("GpuSamplerSourceDown")?;
    assert_eq!((&down["labels"]["source"], &down["labels"]["endpoint"]), (&json!("docker"), &json!(engine)));

    drop((contender, unlabelled));
    drop(tree);
    std::os::unix::fs::symlink(docker.socket(), &socket)?;
    for name in names {
        await_clear(name)?;
    }
    drop(alone);
    Ok(())
}

#[test]
fn dashboards_consist_of_what_grafanas_own_model_has() -> Result<()> {
    let python = clients::venv(&[SDK])?.join("python");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("grafana_model.py");
    let check = |files: &[PathBuf]| -> Result<String> {
        let output = Command::new(&python).arg(&script).args(files).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    };
    let files = dashboards()?;
    assert_eq!(check(&files)?, "");
    // A key that no Grafana reads is found, in options of a panel, too.
    let text = std::fs::read_to_string(&files[0])?;
    let folder = tempfile::tempdir()?;
    for key in ["\"graphTooltip\"", "\"legendFormat\"", "\"colorMode\"", "\"showPoints\""] {
        let planted = folder.path().join("planted.json");
        std::fs::write(&planted, text.replacen(key, "\"planted\"", 1))?;
        assert!(check(&[planted])?.contains("planted is not in the model"), "{key}");
    }
    Ok(())
}

/// The JSON as a TypeScript value of Grafana's own type: unknown keys and wrong types are errors. A value of an enum is a string in JSON.
#[test]
fn dashboards_have_the_types_of_grafanas_own_schema() -> Result<()> {
    let (node, modules) = clients::npm(&NPM)?;
    let folder = tempfile::tempdir()?;
    std::os::unix::fs::symlink(modules.canonicalize()?, folder.path().join("node_modules"))?;
    let head = "import type { Dashboard } from './node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen';\n\
        type Json<T> = T extends string ? `${T}` : T extends number ? number : T extends Array<infer U> ? Array<Json<U>> :\n\
        \x20 T extends object ? { [K in keyof T]: Json<T[K]> } : T;\nexport const dashboard: Json<Dashboard> = ";
    let check = |texts: &[String]| -> Result<String> {
        let options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext"];
        let mut compiler = Command::new(&node);
        compiler.current_dir(folder.path()).arg("node_modules/typescript/bin/tsc").args(options).args(["--target", "es2022"]);
        for (n, text) in texts.iter().enumerate() {
            let file = folder.path().join(format!("dashboard{n}.ts"));
            std::fs::write(&file, format!("{head}{text}"))?;
            compiler.arg(file);
        }
        let output = compiler.output()?;
        let printed = String::from_utf8(output.stdout)?;
        ensure!(output.status.success() == printed.is_empty(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
        Ok(printed)
    };
    let texts = dashboards()?.iter().map(std::fs::read_to_string).collect::<std::io::Result<Vec<String>>>()?;
    assert_eq!(check(&texts)?, "");
    for (from, to, error) in [
        ("\"graphTooltip\": 1", "\"graphTooltip\": \"x\"", "not assignable to type 'number'"),
        ("\"gridPos\"", "\"planted\"", "planted"),
        ("\"absolute\"", "\"planted\"", "planted"),
    ] {
        let planted = texts[0].replacen(from, to, 1);
        assert!(planted != texts[0] && check(&[planted])?.contains(error), "{from}");
    }
    Ok(())
}
