//! The simulated driver seen through unmodified third-party clients: nvidia-ml-py, nvitop-exporter. `cargo xtask bench peers` also runs
//! all-smi.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gpu_sampler_tests::{Running, Sample, Sim, clients, free_port, get, parse, sum, wait_for};

const SCRIPT: &str = r#"
import sys, time, pynvml as n
n.nvmlInit()
pid = int(sys.argv[1])
assert n.nvmlDeviceGetCount() == 2
h = n.nvmlDeviceGetHandleByIndex(0)
assert "V100" in n.nvmlDeviceGetName(h)
assert n.nvmlDeviceGetUUID(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(h))) == n.nvmlDeviceGetUUID(h)
assert n.nvmlDeviceGetMemoryInfo(h).used > 1 << 30
assert [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(h)] == [pid]
time.sleep(2)
rows = n.nvmlDeviceGetProcessUtilization(h, 0)
assert [r.pid for r in rows] == [pid] and 60 <= rows[0].smUtil <= 100, rows
kind, samples = n.nvmlDeviceGetSamples(h, n.NVML_GPU_UTILIZATION_SAMPLES, 0)
assert len(samples) > 5 and n.nvmlDeviceGetUtilizationRates(h).gpu > 50
for call in (lambda: n.nvmlDeviceGetFanSpeed(h), lambda: n.nvmlDeviceGetMigMode(h)):
    try:
        call()
        raise SystemExit("supported")
    except n.NVMLError_NotSupported:
        pass
try:
    n.nvmlDeviceGetProcessUtilization(n.nvmlDeviceGetHandleByIndex(1), 0)
    raise SystemExit("idle GPU has rows")
except n.NVMLError_NotFound:
    pass
n.nvmlShutdown()
print("ok")
"#;

fn sleeper() -> Result<Running> {
    Ok(Running(Command::new("sleep").arg("120").spawn()?))
}

#[test]
fn nvidia_ml_py_reads_the_simulated_driver() -> Result<()> {
    let bin = clients::venv(&["nvidia-ml-py==13.580.82"])?;
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    let process = sleeper()?;
    let _load = sim.load(process.0.id(), 0, 0.9, &[])?;
    std::thread::sleep(Duration::from_millis(300));
    let python = sim.client(&bin.join("python")).args(["-c", SCRIPT, &process.0.id().to_string()]).output()?;
    let output = format!("{}{}", String::from_utf8_lossy(&python.stdout), String::from_utf8_lossy(&python.stderr));
    ensure!(python.status.success() && output.contains("ok"), "{output}");
    Ok(())
}

/// Old and new drivers, which have different structs and symbols.
const VERSIONS: [&str; 5] = ["470.256.02", "535.183.01", "550.54.14", "580.95.05", "610.43.03"];

/// Waits until a client's page meets the expectation; an error contains the last page.
fn wait_for_page(port: u16, page: &str, expect: impl Fn(&[Sample]) -> bool) -> Result<()> {
    let mut last = String::new();
    let found = wait_for("the client shows the GPUs and the process", Duration::from_secs(30), || {
        last = get(port, page).unwrap_or_default();
        Ok(expect(&parse(&last)).then_some(()))
    });
    found.with_context(|| last.lines().filter(|l| l.contains("gpu") && !l.starts_with('#')).collect::<Vec<_>>().join("\n"))
}

/// The values of a family, by the label that identifies the GPU.
fn values(samples: &[Sample], family: &str, label: &str) -> Vec<(String, f64)> {
    let of_family = samples.iter().filter(|s| s.name == family);
    of_family.map(|s| (s.labels.get(label).cloned().unwrap_or_default(), s.value)).collect()
}

#[test]
fn nvitop_exporter_reads_the_simulated_driver() -> Result<()> {
    let bin = clients::venv(&["nvitop-exporter==1.7.2", "nvitop==1.7.2", "nvidia-ml-py==13.580.82"])?;
    for version in VERSIONS {
        let sim = Sim::new(&format!("driver_version = '{version}'\n[[gpus]]\n[[gpus]]"))?;
        let process = sleeper()?;
        let _load = sim.load(process.0.id(), 0, 0.7, &["--enc", "0.3"])?;
        let (port, pid) = (free_port()?, process.0.id().to_string());
        let mut exporter = sim.client(&bin.join("python"));
        exporter.args(["-m", "nvitop_exporter", "--bind-address", "127.0.0.1", "--interval", "0.25", "--port"]);
        let _exporter = Running(exporter.arg(port.to_string()).spawn()?);
        wait_for_page(port, "/metrics", |page| {
            let of_process = |family: &str, expect: std::ops::RangeInclusive<f64>| {
                sum(page, family, &[("pid", &pid), ("index", "0")]).is_some_and(|value| expect.contains(&value))
            };
            let gpus = values(page, "gpu_utilization_Percentage", "index");
            let used = |index: &str, percent: f64| (40.0..=95.0).contains(&percent) == (index == "0");
            gpus.len() == 2
                && gpus.iter().all(|(index, percent)| used(index, *percent))
                && of_process("process_gpu_sm_utilization_Percentage", 40.0..=95.0)
                && of_process("process_gpu_encoder_utilization_Percentage", 5.0..=60.0)
                && of_process("process_gpu_memory_MiB", 1024.0..=1024.0)
        })
        .with_context(|| format!("driver {version}"))?;
    }
    Ok(())
}
