//! A process storm over tiny rings: losses are counted, a resync repairs the tables, and they end up equal to a fresh scan. Also an entry
//! that no event and no counter explains: the check against /proc removes it.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, Layout, agent_table, lost_events, proc_table, skipped_runs};
use gpu_sampler_tests::{Agent, Running, Sim, get, sum, var, wait_for};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");

#[test]
fn after_twenty_thousand_processes_over_tiny_rings_the_tables_equal_a_fresh_scan() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let tree = CgroupTree::new("losses")?;
    let before: Vec<_> = (0..10).map(|n| tree.container(n)).collect::<Result<_>>()?;
    let agent = Agent::start(Some(&sim), &["--kernel-mode", "raw_tracepoint", "--kernel-ring-bytes", "4096"])?;
    let dirs: Vec<String> = before.iter().map(|(_, dir)| dir.to_string_lossy().into_owned()).collect();
    let mut args = vec!["storm", "20000", "100"];
    args.extend(dirs.iter().map(String::as_str));
    let mut storm = Actor::start(ACTOR, &args)?;
    // Containers are created and removed meanwhile.
    let made: Vec<_> = (10..310).map(|n| tree.container(n)).collect::<Result<_>>()?;
    for (_, dir) in &made[..150] {
        std::fs::remove_dir(dir)?;
    }
    let stayed: Vec<u32> = storm.line()?.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    assert!(stayed.len() > 150, "{} survivors", stayed.len());

    let from = Instant::now();
    let mount = gpu_sampler_tests::kernel::cgroup2()?;
    let mut differ = Vec::new();
    let same = wait_for("the tables equal a fresh scan", Duration::from_secs(10), || {
        let (ours, proc) = (agent_table(&agent)?, proc_table(&mount)?);
        differ = ours.symmetric_difference(&proc).copied().collect();
        Ok((ours == proc).then_some(ours))
    });
    let same = same.with_context(|| format!("{} differ, such as {:?}", differ.len(), &differ[..differ.len().min(10)]))?;
    println!("repaired {:?} after the storm's end", from.elapsed());
    assert!(stayed.iter().all(|pid| same.iter().any(|(p, ..)| *p == u64::from(*pid))));
    let page = agent.scrape()?;
    let lost = |kind| sum(&page, "gpu_sampler_kernel_events_lost_total", &[("kind", kind)]).unwrap_or_default();
    let all = |name| sum(&page, name, &[]).unwrap_or_default();
    println!(
        "lost: {} forks, {} exits, {} mkdirs; {} resyncs, {} repairs",
        lost("fork"),
        lost("exit"),
        lost("mkdir"),
        all("gpu_sampler_resyncs_total"),
        all("gpu_sampler_resync_repairs_total")
    );
    assert!(lost("fork") > 0.0 && lost("exit") > 0.0, "nothing was lost, so the test shows nothing");
    assert!(all("gpu_sampler_resyncs_total") > 0.0 && all("gpu_sampler_resync_repairs_total") > 0.0);
    // Also containers: those that exist are known, those removed are not.
    for (n, (id, dir)) in made.iter().enumerate() {
        let response = get(agent.port, &format!("/api/v1/explain?cgroup={}", tree.path_of(dir)));
        match response {
            Ok(text) => assert!(n >= 150 && text.contains(id), "{n}: {text}"),
            Err(error) => assert!(n < 150 && error.to_string().contains(" 404 "), "{n}: {error:#}"),
        }
    }
    Ok(())
}

/// Covers a process's folder in /proc, in the mount namespace of another process only: with nothing, or with the content that /proc shows
/// for a process that has ended.
fn cover(pid: u64, content: &str, seen_by: u32) -> Result<()> {
    const SCRIPT: &str = r#"
        set -e
        stat=$(sed 's/) S /) Z /' "/proc/$1/stat")
        status=$(sed 's/^State:.*/State:\tZ (zombie)/' "/proc/$1/status")
        mount -t tmpfs none "/proc/$1"
        [ "$2" = ended ] || exit 0
        echo "$stat" > "/proc/$1/stat"
        echo "$status" > "/proc/$1/status""#;
    let space = format!("--mount=/proc/{seen_by}/ns/mnt");
    let covered = Command::new("nsenter").args([&space, "sh", "-c", SCRIPT, "sh", &pid.to_string(), content]).status()?;
    anyhow::ensure!(covered.success(), "covering /proc/{pid} failed ({covered})");
    Ok(())
}

/// For the agent, a process that /proc shows as ended is one with an end that no event reported. One that /proc does not show at all, as
/// with hidepid, lives as long as its pid is in use.
#[test]
fn an_entry_that_proc_contradicts_is_removed_and_counted() -> Result<()> {
    let sleep = || Command::new("sleep").arg("600").spawn().map(Running);
    let (mut ended, hidden) = (sleep()?, sleep()?);
    let (pid, hidden_pid) = (u64::from(ended.0.id()), u64::from(hidden.0.id()));
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", &var("GPU_SAMPLER_BIN")?, "run"]);
    let agent = Agent::start_as(Layout::Machine, command, &["--kernel-mode", "raw_tracepoint"])?;
    let has = |pid: u64| Ok::<_, anyhow::Error>(agent_table(&agent)?.iter().any(|(p, ..)| *p == pid));
    assert!(has(pid)? && has(hidden_pid)?, "both processes are known");
    cover(hidden_pid, "nothing", agent.process.0.id())?;
    cover(pid, "ended", agent.process.0.id())?;

    // A round of checks takes two minutes; this entry may just have been checked.
    wait_for("the entry is removed", Duration::from_secs(250), || Ok((!has(pid)?).then_some(())))?;
    assert!(ended.0.try_wait()?.is_none(), "no exit event removed it");
    assert!(has(u64::from(std::process::id()))?, "an entry that /proc shows is kept");
    // By then a whole round of checks is over, with the second check of its suspects.
    std::thread::sleep(Duration::from_secs(125));
    assert!(has(hidden_pid)?, "an entry that /proc hides is kept");
    let repairs = wait_for("the repair is exported", Duration::from_secs(5), || {
        let repairs = sum(&agent.scrape()?, "gpu_sampler_liveness_repairs_total", &[]).context("the family is exposed")?;
        Ok((repairs > 0.0).then_some(repairs))
    })?;
    assert_eq!(repairs, 1.0);
    // Where tracepoint programs can be preempted, the kernel may skip some runs at any time. Its count is read last.
    let lost = lost_events(&agent)?;
    let skipped = skipped_runs(agent.process.0.id())?.unwrap_or_default();
    assert!(lost.values().sum::<u64>() <= skipped, "{lost:?} lost, of which the kernel skipped {skipped}");
    assert_eq!(agent.log()?.matches("gpu_sampler_liveness_repairs_total").count(), 1, "logged once");
    Ok(())
}
