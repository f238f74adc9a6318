//! The README's first command, run as a new user runs it, and a check that nothing is left when it is stopped or killed.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use gpu_sampler_tests::{Running, var, wait_for};

const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io";
const PODS: [&str; 3] = ["trainer-0", "notebook-7", "inference-2"];

/// Everything that a demo creates, by location.
fn made() -> Vec<String> {
    let mut found = Vec::new();
    // Other bundles come and go on a machine with other pods.
    let is_of_demo = |name: &str| {
        let config = fs::read_to_string(format!("{BUNDLES}/{name}/config.json")).unwrap_or_default();
        PODS.iter().any(|pod| config.contains(&format!("\"{pod}\"")))
    };
    for folder in ["/sys/fs/cgroup/pids", "/sys/fs/cgroup", "/sys/fs/cgroup/unified", BUNDLES] {
        let names = fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.file_name().to_string_lossy().into_owned());
        let is_made = |name: &String| name == "kubepods" || (name.len() == 64 && (folder != BUNDLES || is_of_demo(name)));
        found.extend(names.filter(is_made).map(|n| format!("{folder}/{n}")));
    }
    let temporary = fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten();
    found.extend(temporary.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n.starts_with("gpu-sampler-demo")));
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let words = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
        if words.contains("gpu-sampler-demo")
            || words.starts_with("/bin/sleep\x001000000")
            || words.starts_with("/usr/bin/sleep\x001000000")
        {
            found.push(words.replace('\0', " "));
        }
    }
    found.sort();
    found
}

fn demo(lasts: &str) -> Result<Command> {
    let mut command = Command::new(var("XTASK_BIN")?);
    command.args(["demo", "--sim", "--for", lasts]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

#[test]
fn the_table_lists_every_workload() -> Result<()> {
    let before = made();
    let output = demo("20s")?.output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{table}{}", String::from_utf8_lossy(&output.stderr));
    for row in [["default", "trainer-0", "train"], ["default", "notebook-7", "jupyter"], ["prod", "inference-2", "server"]] {
        let matches = |line: &str| line.split_whitespace().take(3).eq(row);
        assert!(table.lines().any(matches), "{row:?} is not in\n{table}");
    }
    assert_eq!(made(), before);
    Ok(())
}

#[test]
fn a_stopped_or_killed_demo_leaves_nothing() -> Result<()> {
    let before = made();
    for signal in [libc::SIGINT, libc::SIGKILL] {
        let sleeping = |made: &[String]| made.iter().filter(|made| made.contains("sleep")).count();
        let mut demo = Running(demo("120s")?.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        wait_for("all three workloads run", Duration::from_secs(60), || {
            Ok((sleeping(&made()) >= sleeping(&before) + PODS.len()).then_some(()))
        })?;
        assert!(!demo.ends_with(signal)?.success());
        wait_for("everything is removed", Duration::from_secs(20), || Ok((made() == before).then_some(())))?;
    }
    Ok(())
}
