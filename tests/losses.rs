//! A storm over rings made tiny: losses are counted, a resync repairs, the tables end up as a fresh scan would have them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use gpu_sampler_tests::kernel::{Actor, CgroupTree, agent_table, proc_table};
use gpu_sampler_tests::{Agent, Sim, get, sum, wait_for};

const ACTOR: &str = env!("CARGO_BIN_EXE_actor");

#[test]
fn after_twenty_thousand_lives_over_tiny_rings_the_tables_equal_a_fresh_scan() -> Result<()> {
    let sim = Sim::new("[[gpus]]")?;
    let tree = CgroupTree::new("losses")?;
    let before: Vec<_> = (0..10).map(|n| tree.container(n)).collect::<Result<_>>()?;
    let agent = Agent::start(Some(&sim), &["--kernel-mode", "raw_tracepoint", "--kernel-ring-bytes", "4096"])?;
    let dirs: Vec<String> = before.iter().map(|(_, dir)| dir.to_string_lossy().into_owned()).collect();
    let mut args = vec!["storm", "20000", "100"];
    args.extend(dirs.iter().map(String::as_str));
    let mut storm = Actor::start(ACTOR, &args)?;
    // Containers come and go meanwhile.
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
    assert!(lost("fork") > 0.0 && lost("exit") > 0.0, "nothing was lost, so nothing is shown");
    assert!(all("gpu_sampler_resyncs_total") > 0.0 && all("gpu_sampler_resync_repairs_total") > 0.0);
    // Containers too: those that are there, and none that is gone.
    for (n, (id, dir)) in made.iter().enumerate() {
        let told = get(agent.port, &format!("/api/v1/explain?cgroup={}", tree.path_of(dir)));
        match told {
            Ok(told) => assert!(n >= 150 && told.contains(id), "{n}: {told}"),
            Err(error) => assert!(n < 150 && error.to_string().contains(" 404 "), "{n}: {error:#}"),
        }
    }
    Ok(())
}
