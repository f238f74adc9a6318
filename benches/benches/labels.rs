//! The label pipeline as a whole: the real agent, many containers, and failing sockets.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use devkit::process::processor_time;
use gpu_sampler_benches::{at_most, line, quantile, total, wanted};
use gpu_sampler_tests::crio::{Crio, CrioContainer, Pod};
use gpu_sampler_tests::kernel::CgroupTree;
use gpu_sampler_tests::proxy::{Fault, Proxy};
use gpu_sampler_tests::{Agent, Docker, Sample, get, wait_for};
use serde_json::{Value, json};

type LabelSection = fn() -> Result<()>;
/// Faults cannot be cloned, so each use makes its own.
type FaultRow = (&'static str, fn() -> Fault);

const POD: &str = "kubepods/pod8bb25662-de9a-11e9-84e7-f8f21e04010c";
const RESOLVE: &str = "gpu_sampler_resolve_seconds";

fn main() -> Result<()> {
    let sections: [(&str, LabelSection); 5] = [
        ("label-files", from_files),
        ("label-socket", from_a_socket),
        ("label-churn", unnamed_churn),
        ("label-faults", after_faults),
        ("label-scrapes", scrapes),
    ];
    for (name, run) in sections {
        if wanted(name) {
            println!("\n{name}");
            run()?;
        }
    }
    Ok(())
}

/// Writes a bundle as containerd does before it creates the cgroup.
fn bundle(root: &Path, id: &str) -> Result<()> {
    let folder = root.join("run/containerd/io.containerd.runtime.v2.task/k8s.io").join(id);
    fs::create_dir_all(&folder)?;
    let cri = |name: &str| format!("io.kubernetes.cri.{name}");
    let annotations = json!({cri("container-type"): "container", cri("container-name"): "main", cri("sandbox-name"): "p",
        cri("sandbox-namespace"): "n", cri("image-name"): "i:1"});
    // The rest of a bundle is parsed, too: mounts, capabilities, seccomp rules.
    let rest: Vec<String> = (0..300).map(|n| format!("a system call or a mount of no interest, number {n}")).collect();
    Ok(fs::write(folder.join("config.json"), json!({"rest": rest, "annotations": annotations}).to_string())?)
}

fn from_files() -> Result<()> {
    const N: usize = 500;
    let root = tempfile::tempdir()?;
    let agent = Agent::start(None, &["--path-rootfs", &root.path().to_string_lossy(), "--label-sources", "bundle"])?;
    let tree = CgroupTree::new("bench-labels")?;
    let from = Instant::now();
    for n in 0..N {
        let id = format!("{n:064x}");
        bundle(root.path(), &id)?;
        tree.make(&format!("{POD}/{id}"))?;
    }
    let took = from.elapsed();
    let page = all_complete(&agent, N)?;
    line("500 containers started", took.as_secs_f64() * 1e3, "ms", None);
    line("creation to complete, from files: p50 at most", at_most(&page, RESOLVE, 0.5)? * 1e3, "ms", None);
    line("                                  p99 at most", at_most(&page, RESOLVE, 0.99)? * 1e3, "ms", Some(100.0));
    Ok(())
}

/// With a double that implements the protocol, since no engine starts five hundred containers within seconds.
fn from_a_socket() -> Result<()> {
    const N: usize = 500;
    let (dir, tree) = (tempfile::tempdir()?, CgroupTree::new("bench-socket")?);
    let crio = Crio::start(dir.path())?;
    let pod = "f".repeat(64);
    crio.add_pod(&Pod::new(&pod, "n", "p", "8bb25662-de9a-11e9-84e7-f8f21e04010c"))?;
    let endpoint = format!("unix://{}", crio.socket().display());
    let agent = Agent::start(None, &["--cri-endpoint", &endpoint, "--label-sources", "cri"])?;
    for n in 0..N {
        let id = format!("{n:064x}");
        crio.serve(&CrioContainer::new(&id, &pod, "main", "i:1", 1));
        tree.make(&format!("{POD}/crio-{id}"))?;
    }
    let page = all_complete(&agent, N)?;
    line("creation to complete, over CRI: p50 at most", at_most(&page, RESOLVE, 0.5)? * 1e3, "ms", None);
    line("                                p99 at most", at_most(&page, RESOLVE, 0.99)? * 1e3, "ms", Some(1_500.0));
    Ok(())
}

fn all_complete(agent: &Agent, containers: usize) -> Result<Vec<Sample>> {
    let count = format!("{RESOLVE}_count");
    wait_for("all containers are complete", Duration::from_secs(30), || {
        let page = agent.scrape()?;
        Ok((total(&page, &count) >= containers as f64).then_some(page))
    })
}

fn unnamed_churn() -> Result<()> {
    const N: usize = 5_000;
    let (root, tree) = (tempfile::tempdir()?, CgroupTree::new("bench-churn")?);
    let crio = Crio::start(root.path())?;
    let endpoint = format!("unix://{}", crio.socket().display());
    for (what, sources) in [
        ("no source", "manifest"),
        ("files without any of them", "bundle,docker-file,crio-file"),
        ("a CRI without any of them", "cri"),
    ] {
        let rootfs = root.path().to_string_lossy();
        let agent = Agent::start(None, &["--path-rootfs", &rootfs, "--label-sources", sources, "--cri-endpoint", &endpoint])?;
        let pid = agent.process.0.id();
        std::thread::sleep(Duration::from_secs(1));
        let time = || processor_time(pid).context("the agent's processor time");
        let before = time()?.own;
        for n in 0..N {
            let dir = tree.make(&format!("{POD}/{n:064x}"))?;
            std::thread::sleep(Duration::from_micros(500));
            fs::remove_dir(dir)?;
        }
        // Until the agent gives the containers up.
        std::thread::sleep(Duration::from_secs(12));
        let each = (time()?.own - before) / N as f64 * 1e6;
        line(&format!("5,000 containers without a label source, {what}"), each, "us", None);
    }
    Ok(())
}

fn missing(agent: &Agent, id: &str) -> Result<bool> {
    let text = get(agent.port, &format!("/api/v1/explain?container={id}")).unwrap_or_else(|_| "{}".into());
    Ok(serde_json::from_str::<Value>(&text)?["missing"] != json!([]))
}

fn after_faults() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--label-sources", "docker"])?;
    let faults: [FaultRow; 6] = [
        ("refuses", || Fault::Refuse),
        ("hangs", || Fault::Hang),
        ("404", || Fault::Status(404)),
        ("500", || Fault::Status(500)),
        ("garbage", || Fault::Garbage),
        ("closes half way", || Fault::CloseHalfWay),
    ];
    for (name, fault) in faults {
        let mut took = Vec::new();
        for n in 0..5 {
            proxy.set(fault())?;
            let (id, _) = docker.run(&format!("{}-{n}", name.replace(' ', "-")), &json!({}), "300")?;
            std::thread::sleep(Duration::from_secs(5));
            ensure!(missing(&agent, &id)?, "{name} has no effect");
            proxy.set(Fault::Pass)?;
            let from = Instant::now();
            while missing(&agent, &id)? {
                std::thread::sleep(Duration::from_millis(2));
            }
            took.push(from.elapsed().as_secs_f64() * 1e3);
        }
        took.sort_by(f64::total_cmp);
        line(
            &format!("Docker fault '{name}' for 5 s: complete after its end, max of 5"),
            quantile(&took, 1.0),
            "ms",
            Some(2_000.0),
        );
    }
    Ok(())
}

fn scrapes() -> Result<()> {
    let (docker, dir) = (Docker::new()?, tempfile::tempdir()?);
    let front = dir.path().join("front.sock");
    let proxy = Proxy::start(docker.socket(), &front)?;
    let endpoint = format!("unix://{}", front.display());
    let (root, tree) = (tempfile::tempdir()?, CgroupTree::new("bench-scrapes")?);
    let rootfs = root.path().to_string_lossy().into_owned();
    let agent = Agent::start(None, &["--docker-endpoint", &endpoint, "--path-rootfs", &rootfs])?;
    let faults: [FaultRow; 3] = [("hangs", || Fault::Hang), ("100 MB response", || Fault::Huge), ("refuses", || Fault::Refuse)];
    for n in 0..500 {
        tree.make(&format!("{POD}/{n:064x}"))?;
    }
    for (name, fault) in faults {
        proxy.set(fault())?;
        let mut took = Vec::new();
        for _ in 0..300 {
            let from = Instant::now();
            agent.page()?;
            took.push(from.elapsed().as_secs_f64() * 1e3);
            std::thread::sleep(Duration::from_millis(10));
        }
        took.sort_by(f64::total_cmp);
        line(&format!("scrapes during Docker fault '{name}', 500 unnamed: p50"), quantile(&took, 0.5), "ms", None);
        line("                                              max of 300", quantile(&took, 1.0), "ms", Some(50.0));
    }
    Ok(())
}
