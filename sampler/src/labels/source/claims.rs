//! Resource claims of NVIDIA's DRA driver: the kubelet's pod-resources names the CDI devices of a container's claims, and the checkpoint
//! that the driver keeps on the node has the UUID of each device that it has prepared, also of MIG devices that it has just made. Joined,
//! they give the GPU of a claim without the API server.
//!
//! The checkpoint: kubernetes-sigs/dra-driver-nvidia-gpu, `cmd/gpu-kubelet-plugin/checkpoint*.go` and `prepared.go`. Versions 1 and 2 write
//! the kubelet library's device with its Go names, version 3 with names of its own; a file may have all three, with the same claims.
//! Without the checkpoint the name of a whole GPU (`gpu-<minor>`) still says which it is; that of a MIG device does not.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use sampler_labels::{Assignment, AssignmentSource};
use serde::Deserialize;

use super::file;

pub const CLAIMS: &str = "plugins/gpu.nvidia.com/checkpoint.json";
pub const DRIVER: &str = "gpu.nvidia.com";
/// A claim is a few KiB.
const MAX_BYTES: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ClaimsError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: larger than {MAX_BYTES} bytes", path.display())]
    TooLarge { path: PathBuf },
    #[error("{}: not the checkpoint of a DRA driver", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
}

// Field numbers: kubernetes, `staging/src/k8s.io/kubelet/pkg/apis/podresources/v1/api.proto`.

#[derive(Clone, PartialEq, prost::Message)]
pub struct DynamicResource {
    #[prost(string, tag = "2")]
    pub claim_name: String,
    #[prost(string, tag = "3")]
    pub claim_namespace: String,
    #[prost(message, repeated, tag = "4")]
    pub claim_resources: Vec<ClaimResource>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct ClaimResource {
    #[prost(message, repeated, tag = "1")]
    pub cdi_devices: Vec<CdiDevice>,
    /// Empty before Kubernetes 1.34, as are the names below.
    #[prost(string, tag = "2")]
    pub driver_name: String,
    #[prost(string, tag = "3")]
    pub pool_name: String,
    #[prost(string, tag = "4")]
    pub device_name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct CdiDevice {
    #[prost(string, tag = "1")]
    pub name: String,
}

#[derive(Default, Deserialize)]
struct Checkpoint {
    v1: Option<Version>,
    v2: Option<Version>,
    v3: Option<Version>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Version {
    /// By the UID of the claim.
    prepared_claims: BTreeMap<String, PreparedClaim>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreparedClaim {
    /// Go writes an empty list as null.
    #[serde(default)]
    prepared_devices: Option<Vec<Option<DeviceGroup>>>,
}

#[derive(Deserialize)]
struct DeviceGroup {
    #[serde(default)]
    devices: Option<Vec<PreparedDevice>>,
}

#[derive(Deserialize)]
struct PreparedDevice {
    gpu: Option<PreparedPart>,
    mig: Option<PreparedPart>,
}

#[derive(Deserialize)]
struct PreparedPart {
    info: Option<Info>,
    /// A MIG device that the driver has made.
    concrete: Option<Concrete>,
    device: Option<KubeletDevice>,
}

#[derive(Deserialize)]
struct Info {
    uuid: String,
}

#[derive(Deserialize)]
struct Concrete {
    #[serde(rename = "migUUID")]
    uuid: String,
}

#[derive(Deserialize)]
struct KubeletDevice {
    #[serde(rename = "cdiDeviceIDs", alias = "CDIDeviceIDs", default)]
    cdi_ids: Option<Vec<String>>,
}

impl PreparedDevice {
    /// UUID and CDI ids.
    fn ids(self) -> Option<(String, Vec<String>)> {
        let part = self.gpu.or(self.mig)?;
        let uuid = part.concrete.map(|concrete| concrete.uuid).or(part.info.map(|info| info.uuid))?;
        Some((uuid, part.device.and_then(|device| device.cdi_ids).unwrap_or_default()))
    }
}

/// UUIDs of prepared devices, by CDI id.
#[derive(Debug, Default)]
pub struct PreparedClaims(BTreeMap<String, String>);

/// Empty if there is no checkpoint. Blocking.
pub fn read(root: &Path) -> Result<PreparedClaims, ClaimsError> {
    let path = root.join(CLAIMS);
    let text = match file::beginning(&path, MAX_BYTES + 1) {
        Ok(text) => text,
        Err(error) if file::is_absent(&error) => return Ok(PreparedClaims::default()),
        Err(source) => return Err(ClaimsError::Read { path, source }),
    };
    if text.len() as u64 > MAX_BYTES {
        return Err(ClaimsError::TooLarge { path });
    }
    parse(&text).map_err(|source| ClaimsError::Json { path, source })
}

fn parse(text: &[u8]) -> Result<PreparedClaims, serde_json::Error> {
    let checkpoint: Checkpoint = serde_json::from_slice(text)?;
    let latest = checkpoint.v3.or(checkpoint.v2).or(checkpoint.v1).unwrap_or_default();
    let groups = latest.prepared_claims.into_values().flat_map(|claim| claim.prepared_devices.unwrap_or_default());
    let devices = groups.flatten().flat_map(|group| group.devices.unwrap_or_default()).filter_map(PreparedDevice::ids);
    Ok(PreparedClaims(devices.flat_map(|(uuid, ids)| ids.into_iter().map(move |id| (id, uuid.clone()))).collect()))
}

impl PreparedClaims {
    /// The devices of one container that come from claims. `container` has its names.
    pub fn assignments(&self, container: &Assignment, resources: &[DynamicResource]) -> Vec<Assignment> {
        let claimed = resources.iter().flat_map(|resource| &resource.claim_resources);
        let mut ids: Vec<String> = claimed.filter_map(|resource| self.device_id(resource)).collect();
        ids.sort_unstable();
        ids.dedup();
        let resource = DRIVER.to_owned();
        let assignment = Assignment {
            resource,
            handed_out: ids.clone(),
            device_ids: ids,
            source: AssignmentSource::Claim,
            ..container.clone()
        };
        Some(assignment).filter(|assignment| !assignment.device_ids.is_empty()).into_iter().collect()
    }

    /// In a form that [`sampler_labels::device`] accepts.
    fn device_id(&self, resource: &ClaimResource) -> Option<String> {
        if let Some(uuid) = resource.cdi_devices.iter().find_map(|device| self.0.get(&device.name)) {
            return Some(uuid.clone());
        }
        // `k8s.gpu.nvidia.com/device=gpu-0`, `k8s.gpu.nvidia.com/claim=<uid>-gpu-0`.
        let of_driver = |name: &str| name.starts_with("k8s.gpu.nvidia.com/");
        let is_nvidia = resource.driver_name == DRIVER || resource.cdi_devices.iter().any(|device| of_driver(&device.name));
        let by_cdi = resource.cdi_devices.iter().find_map(|device| device.name.strip_prefix("k8s.gpu.nvidia.com/device="));
        let name = Some(resource.device_name.as_str()).filter(|name| !name.is_empty()).or(by_cdi)?;
        let minor: u32 = name.strip_prefix("gpu-").filter(|_| is_nvidia)?.parse().ok()?;
        Some(format!("nvidia{minor}"))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const CLAIM: &str = "3c8337ad-f366-4541-883d-30b9e99fd6be";

    fn prepared(text: &str) -> Result<PreparedClaims, ClaimsError> {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(CLAIMS);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text.replace("CLAIM", CLAIM)).unwrap();
        read(root.path())
    }

    fn resource(cdi: &[&str], device: &str) -> DynamicResource {
        let cdi_devices = cdi.iter().map(|name| CdiDevice { name: name.replace("CLAIM", CLAIM) }).collect();
        let driver_name = if device.is_empty() { String::new() } else { DRIVER.to_owned() };
        let claim = ClaimResource { cdi_devices, driver_name, pool_name: "node".into(), device_name: device.to_owned() };
        DynamicResource { claim_name: "gpu".into(), claim_namespace: "prod".into(), claim_resources: vec![claim] }
    }

    fn check(prepared: &PreparedClaims, resource: &DynamicResource, expect: &[&str]) {
        let container = Assignment { pod: Some("p".into()), container: "c".into(), ..Assignment::default() };
        let all = prepared.assignments(&container, std::slice::from_ref(resource));
        let ids: Vec<&str> = all.iter().flat_map(|assignment| &assignment.handed_out).map(String::as_str).collect();
        assert_eq!(ids, expect, "{resource:?}");
        assert!(all.iter().all(|a| (a.pod.as_deref(), &*a.container, a.source) == (Some("p"), "c", AssignmentSource::Claim)));
    }

    #[test]
    fn claims_are_the_prepared_devices_in_every_version() {
        let v2 = r#""v2":{"checksum":1,"preparedClaims":{"CLAIM":{"checkpointState":"PrepareCompleted","status":{},"preparedDevices":[
            {"devices":[{"gpu":{"info":{"uuid":"GPU-a","Health":"Healthy"},"device":{"Requests":["gpu"],"PoolName":"node","DeviceName":"gpu-0",
            "CDIDeviceIDs":["k8s.gpu.nvidia.com/device=gpu-0","k8s.gpu.nvidia.com/claim=CLAIM-gpu-0"]}}},
            {"mig":{"concrete":{"parentMinor":1,"giId":2,"ciId":0,"migUUID":"MIG-b","parentUUID":"GPU-b"},"device":{"DeviceName":
            "gpu-1-mig-1g10gb-19-0","CDIDeviceIDs":["k8s.gpu.nvidia.com/claim=CLAIM-gpu-1-mig-1g10gb-19-0"]}}}],"configState":{}}]},
            "started":{"checkpointState":"PrepareStarted","status":{}}}}"#;
        let v3 = v2.replace("v2", "v3").replace("CDIDeviceIDs", "cdiDeviceIDs").replace("DeviceName", "deviceName");
        let v1 = v2
            .replace("v2", "v1")
            .replace("\"concrete\":{\"parentMinor\":1,\"giId\":2,\"ciId\":0,\"migUUID\"", "\"info\":{\"uuid\"");
        for text in
            [format!("{{{v2}}}"), format!("{{{v3}}}"), format!("{{{v1}}}"), format!("{{\"checksum\":9,\"v1\":{{}},{v2}}}")]
        {
            let prepared = prepared(&text).unwrap();
            check(
                &prepared,
                &resource(&["k8s.gpu.nvidia.com/device=gpu-0", "k8s.gpu.nvidia.com/claim=CLAIM-gpu-0"], "gpu-0"),
                &["GPU-a"],
            );
            check(
                &prepared,
                &resource(&["k8s.gpu.nvidia.com/claim=CLAIM-gpu-1-mig-1g10gb-19-0"], "gpu-1-mig-1g10gb-19-0"),
                &["MIG-b"],
            );
        }
    }

    #[test]
    fn without_a_checkpoint_the_name_of_a_whole_gpu_suffices() {
        let none = PreparedClaims::default();
        check(&none, &resource(&["k8s.gpu.nvidia.com/device=gpu-3"], ""), &["nvidia3"]);
        check(&none, &resource(&[], "gpu-3"), &["nvidia3"]);
        check(&none, &resource(&["k8s.gpu.nvidia.com/claim=CLAIM-gpu-1-mig-1g10gb-19-0"], "gpu-1-mig-1g10gb-19-0"), &[]);
        check(&none, &resource(&["example.com/device=gpu-3"], ""), &[]);
        check(&none, &resource(&["k8s.compute-domain.nvidia.com/device=all"], ""), &[]);
    }

    #[test]
    fn other_files_are_errors_or_empty() {
        assert!(read(Path::new("/nowhere")).unwrap().0.is_empty());
        assert!(prepared("{}").unwrap().0.is_empty());
        assert!(prepared(r#"{"v2":{"preparedClaims":{"a":{"preparedDevices":null}}}}"#).unwrap().0.is_empty());
        for text in ["", "[]", r#"{"v2":7}"#, "{\"v2\":{"] {
            assert!(matches!(prepared(text), Err(ClaimsError::Json { .. })), "{text}");
        }
    }

    /// The checkpoint of a DRA driver: each CDI device in it is that of its UUID.
    #[test]
    fn fuzz_claims() {
        devkit::fuzz(file!(), "claims", move |bytes| {
            let Ok(prepared) = parse(bytes) else { return };
            for (id, uuid) in &prepared.0 {
                let mut claimed = resource(&[], "gpu-7");
                claimed.claim_resources[0].cdi_devices = vec![CdiDevice { name: id.clone() }];
                check(&prepared, &claimed, &[uuid]);
            }
        });
    }
}
