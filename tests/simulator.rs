//! The simulated driver seen through a client that is not ours: nvidia-ml-py.

use std::process::Command;

use anyhow::{Result, ensure};
use gpu_sampler_tests::{Running, Sim};

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

#[test]
fn nvidia_ml_py_reads_it() -> Result<()> {
    let venv = tempfile::tempdir()?;
    ensure!(Command::new("python3").args(["-m", "venv"]).arg(venv.path()).status()?.success(), "python3 -m venv failed");
    let pip = Command::new(venv.path().join("bin/pip")).args(["install", "--quiet", "nvidia-ml-py==13.580.82"]).status()?;
    ensure!(pip.success(), "pip install nvidia-ml-py failed");
    let sim = Sim::new("[[gpus]]\n[[gpus]]")?;
    let process = Running(Command::new("sleep").arg("60").spawn()?);
    let _load = sim.load(process.0.id(), 0, 0.9, &[])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let python = Command::new(venv.path().join("bin/python"))
        .args(["-c", SCRIPT, &process.0.id().to_string()])
        .env("LD_LIBRARY_PATH", sim.dir.path().join("lib"))
        .output()?;
    let told = format!("{}{}", String::from_utf8_lossy(&python.stdout), String::from_utf8_lossy(&python.stderr));
    ensure!(python.status.success() && told.contains("ok"), "{told}");
    Ok(())
}
