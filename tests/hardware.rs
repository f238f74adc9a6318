//! Errors, repairs and traffic of GPUs, as the fields of the driver have them.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Agent, Sample, Sim, parse, sum, wait_for};

/// Everything is reported; NVLink 5, and PCIe counters of 32 bits; nothing.
const WORLD: &str = "driver_version = '580.95.05'\n\
    [[gpus]]\necc_errors = [12, 1]\nremapped_rows = [3, 2, 1, 0]\nrecovery_action = 'drain_and_reset'\n\
    nvlink_bytes_per_second = 6000000000\npcie_bytes_per_second = 1000000000\n\
    [[gpus]]\nnvlink_bytes_per_second = 6000000000\nnvlink_fields = 'count'\npcie_bytes_per_second = 1000000000\n\
    pcie_counter_bits = 32\n\
    [[gpus]]\n";
const NVLINK_PER_SECOND: f64 = 6e9;
const PCIE_PER_SECOND: f64 = 1e9;
/// No label sources and no kernel events: these tests are about the driver.
const ARGS: [&str; 4] = ["--kernel-mode", "procfs", "--docker-endpoint", "unix:///run/gpu-sampler-tests-none.sock"];
const HARDWARE: [&str; 9] = [
    "gpu_ecc_errors_total",
    "gpu_remapped_rows_total",
    "gpu_row_remap_pending",
    "gpu_row_remap_failure",
    "gpu_recovery_action",
    "gpu_nvlink_transmit_bytes_total",
    "gpu_nvlink_receive_bytes_total",
    "gpu_pcie_transmit_bytes_total",
    "gpu_pcie_receive_bytes_total",
];

fn uuids(page: &[Sample]) -> Result<Vec<String>> {
    let of = |index: usize| {
        let info = page.iter().find(|s| s.name == "gpu_info" && s.labels["index"] == index.to_string());
        Ok(info.with_context(|| format!("GPU {index}"))?.labels["uuid"].clone())
    };
    (0..3).map(of).collect()
}

/// The field for one link has a sixth, the volatile errors are 0, and a counter of 32 bits loses 4 GiB at each wrap.
#[test]
fn hardware_is_exposed_where_the_driver_reports_it_and_absent_elsewhere() -> Result<()> {
    let before = Instant::now();
    let sim = Sim::new(WORLD)?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    std::thread::sleep(Duration::from_secs(20));
    let page = agent.scrape()?;
    // The counters began with the world, and were read at most 5 s ago.
    let most = before.elapsed().as_secs_f64();
    let least = 12.0;
    let gpus = uuids(&page)?;
    let value = |gpu: usize, name: &str, labels: &[(&str, &str)]| sum(&page, name, &[&[("uuid", &*gpus[gpu])], labels].concat());
    for (kind, count) in [("corrected", 12.0), ("uncorrected", 1.0)] {
        assert_eq!(value(0, "gpu_ecc_errors_total", &[("type", kind)]), Some(count));
    }
    for (kind, count) in [("correctable", 3.0), ("uncorrectable", 2.0)] {
        assert_eq!(value(0, "gpu_remapped_rows_total", &[("type", kind)]), Some(count));
    }
    assert_eq!((value(0, "gpu_row_remap_pending", &[]), value(0, "gpu_row_remap_failure", &[])), (Some(1.0), Some(0.0)));
    for (gpu, action) in [(0, "drain_and_reset"), (1, "none"), (2, "none")] {
        assert_eq!(value(gpu, "gpu_recovery_action", &[("action", action)]), Some(1.0), "GPU {gpu}");
        assert_eq!(value(gpu, "gpu_recovery_action", &[]), Some(1.0), "GPU {gpu}");
    }
    let is_near = |gpu: usize, name: &str, per_second: f64| -> Result<()> {
        let bytes = value(gpu, name, &[]).with_context(|| format!("GPU {gpu}: {name}"))?;
        ensure!((least * per_second..=most * per_second).contains(&bytes), "GPU {gpu}: {name} is {bytes} after {most} s");
        Ok(())
    };
    for gpu in [0, 1] {
        is_near(gpu, "gpu_nvlink_transmit_bytes_total", NVLINK_PER_SECOND)?;
        is_near(gpu, "gpu_nvlink_receive_bytes_total", NVLINK_PER_SECOND / 2.0)?;
    }
    is_near(0, "gpu_pcie_transmit_bytes_total", PCIE_PER_SECOND)?;
    is_near(0, "gpu_pcie_receive_bytes_total", PCIE_PER_SECOND / 2.0)?;
    // GPU 1 has counters of 32 bits, GPU 2 none of all these.
    let absent = HARDWARE.into_iter().filter(|name| *name != "gpu_recovery_action");
    for (gpu, name) in absent.map(|name| (2, name)).chain(HARDWARE[7..].iter().map(|name| (1, *name))) {
        assert_eq!(value(gpu, name, &[]), None, "GPU {gpu}: {name}");
    }
    let all = parse(&agent.page_with_all_families()?);
    let is_supported = |gpu: usize, call: &str| sum(&all, "gpu_sampler_nvml_supported", &[("uuid", &*gpus[gpu]), ("call", call)]);
    assert_eq!((is_supported(0, "GetFieldValues:nvlink"), is_supported(2, "GetFieldValues:nvlink")), (Some(1.0), Some(0.0)));
    // What is not known any more is absent.
    sim.inject("fault", &["--gpu", "0", "--kind", "lost"])?;
    wait_for("the end of the series of the lost GPU", Duration::from_secs(10), || {
        let page = agent.scrape()?;
        let is_gone = |name: &&str| sum(&page, name, &[("uuid", &gpus[0])]).is_none();
        Ok(HARDWARE.iter().all(is_gone).then_some(()))
    })
}

/// Driver branches that number the counters differently, a driver without counters, and one with counters that stand still.
const THROTTLED: [(&str, &str); 5] = [
    ("580.65.06", ""),
    ("580.95.05", ""),
    ("610.43.03", ""),
    ("535.183.01", "throttle_times = 'missing'"),
    ("580.95.05", "throttle_times = 'frozen'"),
];

/// Seconds of a reason that is in force for a fifth of each second, and of one that is always in force, and their truth.
fn throttled((version, keys): (&str, &str)) -> Result<[(f64, f64); 2]> {
    let sim = Sim::new(&format!("driver_version = '{version}'\n{keys}\n[[gpus]]"))?;
    let agent = Agent::start(Some(&sim), &ARGS)?;
    let seconds = |reason: &str| -> Result<f64> {
        let page = agent.scrape()?;
        sum(&page, "gpu_throttle_seconds_total", &[("reason", reason)]).with_context(|| format!("{version}: {reason}"))
    };
    wait_for("the first reading", Duration::from_secs(10), || Ok(seconds("hw_thermal_slowdown").ok()))?;
    sim.inject("fault", &["--kind", "throttle", "--reasons", "hw_thermal"])?;
    let always_from = Instant::now();
    let mut brief = Duration::ZERO;
    for _ in 0..12 {
        // Not in step with the readings, which are a second apart.
        std::thread::sleep(Duration::from_millis(870));
        let from = Instant::now();
        sim.inject("fault", &["--kind", "throttle", "--reasons", "sw_thermal", "--for", "200ms"])?;
        brief += Duration::from_millis(200);
        std::thread::sleep(Duration::from_millis(200).saturating_sub(from.elapsed()));
    }
    // The counters are read every 5 s.
    std::thread::sleep(Duration::from_secs(7));
    let always = always_from.elapsed();
    Ok([(seconds("sw_thermal_slowdown")?, brief.as_secs_f64()), (seconds("hw_thermal_slowdown")?, always.as_secs_f64())])
}

/// The reason that readings meet by chance is exact with counters. A counter under its former number stands still.
#[test]
fn throttling_is_exact_with_counters_and_counters_that_contradict_the_reasons_are_not_used() -> Result<()> {
    let runs = THROTTLED.map(|world| std::thread::spawn(move || throttled(world)));
    for (n, run) in runs.into_iter().enumerate() {
        let measured = run.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        let [(brief, of_brief), (always, of_always)] = measured;
        println!("{:?}: {measured:?}", THROTTLED[n]);
        // The last reading is at most 6 s old.
        ensure!((of_always - 7.0..=of_always + 1.5).contains(&always), "{:?}: {always} of {of_always} s", THROTTLED[n]);
        if THROTTLED[n].1.is_empty() {
            ensure!((brief - of_brief).abs() < 0.1 * of_brief, "{:?}: {brief} of {of_brief} s", THROTTLED[n]);
        }
    }
    Ok(())
}
