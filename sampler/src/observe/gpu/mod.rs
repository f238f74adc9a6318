//! NVML: one thread per GPU, because a driver call may block for long; a hung GPU stalls its own samples and nothing else.

mod poller;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};
use sampler_core::observation::Observation;
use sampler_core::snapshot::GpuInfo;
use sampler_core::units::GpuUuid;
use thiserror::Error;

use crate::health::Health;
use crate::inbox::Outbox;
use crate::observe::clock::boot_now;

#[derive(Debug, Error)]
pub enum GpuError {
    #[error(
        "cannot use the NVIDIA driver library {path}; install the NVIDIA driver, or name its libnvidia-ml.so.1 with --nvml-lib"
    )]
    // Not a `source`: nvml-wrapper's message already repeats its own.
    Init { path: String, error: NvmlError },
    #[error("the NVIDIA driver does not list its GPUs")]
    List(#[source] NvmlError),
    #[error("cannot start the thread that polls GPU {index}")]
    Thread { index: u32, source: std::io::Error },
}

/// Loads the library and lists the GPUs.
pub fn open(lib: Option<&Path>) -> Result<Nvml, GpuError> {
    // The file name that the driver installs; `libnvidia-ml.so` alone exists only with the development files.
    let path = lib.map_or_else(|| std::ffi::OsStr::new("libnvidia-ml.so.1"), Path::as_os_str);
    Nvml::builder().lib_path(path).init().map_err(|error| GpuError::Init { path: path.to_string_lossy().into_owned(), error })
}

/// Starts one poller per GPU.
pub fn start(nvml: &'static Nvml, to: &Outbox, health: &Arc<Health>, stop: &Arc<AtomicBool>) -> Result<usize, GpuError> {
    let count = nvml.device_count().map_err(GpuError::List)?;
    let driver_version = nvml.sys_driver_version().unwrap_or_default();
    for index in 0..count {
        let device = match nvml.device_by_index(index) {
            Ok(device) => device,
            Err(error) => {
                health.degraded(&format!("gpu-{index}"), &format!("GPU {index} cannot be opened, it is not sampled: {error}"));
                continue;
            }
        };
        let uuid = device.uuid().unwrap_or_else(|_| format!("GPU-index-{index}"));
        let info = Arc::new(GpuInfo {
            uuid: GpuUuid(uuid.into()),
            index,
            minor: device.minor_number().ok(),
            mig_uuids: mig_uuids(&device),
            model: device.name().unwrap_or_default(),
            pci_bus_id: device.pci_info().map(|p| p.bus_id).unwrap_or_default(),
            driver_version: driver_version.clone(),
            mig_mode: match device.mig_mode() {
                Ok(mode) if mode.current == 1 => "enabled",
                Ok(_) => "disabled",
                Err(_) => "unsupported",
            },
        });
        let found = Observation::GpuFound { gpu: index as usize, info: Arc::clone(&info), at: boot_now() };
        if to.observe(found).is_err() {
            break;
        }
        let poller = poller::Poller::new(nvml, device, info, to.clone(), Arc::clone(health), Arc::clone(stop));
        std::thread::Builder::new()
            .name(format!("gpu-{index}"))
            .spawn(move || poller.run())
            .map_err(|source| GpuError::Thread { index, source })?;
    }
    Ok(count as usize)
}

/// None where the hardware or its mode has none.
fn mig_uuids(device: &Device<'_>) -> Vec<String> {
    let slots = device.mig_device_count().unwrap_or_default();
    // A slot may be empty.
    (0..slots).filter_map(|n| device.mig_device_by_index(n).ok()?.uuid().ok()).collect()
}
