//! The checkpoint of the kubelet's device manager: which device ids it has given to which container, and what the device plugin replied.
//!
//! Layouts: `Entries` (1.8), `PodDeviceEntries` (1.9), the latter within `Data` (1.11, with a checksum), and device ids by NUMA node
//! (1.20). Invalid entries are skipped. The file is parsed while it is read, and only entries with NVIDIA devices are kept: with memory as
//! a resource it has tens of thousands of ids.
//!
//! Its checksum is not verified: it is a hash over Go's printed form of the structs of the kubelet that wrote it, which differs for every
//! layout, and its purpose is to detect other layouts. The kubelet renames a complete file into place, so it is never partial.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use sampler_labels::{Assignment, AssignmentSource};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, de};
use serde_json::Value;

use super::claims::CdiDevice;
use super::file;

pub const CHECKPOINT: &str = "device-plugins/kubelet_internal_checkpoint";
/// One GPU of 48 GiB that is shared in MiB has 5 MB of ids; a node has up to sixteen.
pub const MAX_BYTES: u64 = 128 << 20;
/// Entries kept: a node has some hundred containers.
const MAX_ENTRIES: usize = 16_384;

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: larger than {bound} bytes", path.display())]
    TooLarge { path: PathBuf, bound: u64 },
    #[error("{}: not JSON", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: no pod entries", path.display())]
    Shape { path: PathBuf },
}

// Field numbers: kubernetes, `staging/src/k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1/api.proto`.

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerAllocateResponse {
    #[prost(map = "string, string", tag = "1")]
    envs: HashMap<String, String>,
    #[prost(message, repeated, tag = "3")]
    devices: Vec<DeviceSpec>,
    #[prost(message, repeated, tag = "5")]
    cdi_devices: Vec<CdiDevice>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DeviceSpec {
    #[prost(string, tag = "2")]
    host_path: String,
}

impl ContainerAllocateResponse {
    /// The ids of the devices that the container really has, in the forms that [`sampler_labels::device`] accepts. The variable is the
    /// most exact: device nodes do not name MIG devices.
    fn device_ids(&self) -> Vec<String> {
        let visible = self.envs.get("NVIDIA_VISIBLE_DEVICES").map(String::as_str).unwrap_or_default();
        let by_variable: Vec<String> = visible.split(',').map(str::trim).filter(|id| is_id(id)).map(str::to_owned).collect();
        if !by_variable.is_empty() {
            return by_variable;
        }
        let by_name: Vec<String> = self.cdi_devices.iter().map(|device| device.name.clone()).collect();
        if !by_name.is_empty() {
            return by_name;
        }
        let nodes = self.devices.iter().filter_map(|device| device.host_path.rsplit('/').next());
        nodes.filter(|name| name.strip_prefix("nvidia").is_some_and(|n| n.parse::<u32>().is_ok())).map(str::to_owned).collect()
    }
}

/// `all`, `none` and `void` do not name a device; a path is that of the list of volume mounts.
fn is_id(text: &str) -> bool {
    !text.is_empty() && !matches!(text, "all" | "none" | "void") && !text.starts_with('/')
}

#[derive(Clone, Debug, Default)]
pub struct DeviceCheckpoint {
    /// By pod UIDs.
    pub assignments: Vec<Assignment>,
    /// A device plugin has registered a resource of NVIDIA.
    pub has_gpu_plugin: bool,
}

/// Reads what a kubelet has assigned, up to this many bytes; `None` if there is no checkpoint. Blocking.
pub fn read(root: &Path, bound: u64) -> Result<Option<DeviceCheckpoint>, CheckpointError> {
    let path = root.join(CHECKPOINT);
    let opened = match file::open(&path) {
        Ok(opened) => opened,
        Err(error) if file::is_absent(&error) => return Ok(None),
        Err(source) => return Err(CheckpointError::Read { path, source }),
    };
    if opened.metadata().is_ok_and(|metadata| metadata.len() > bound) {
        return Err(CheckpointError::TooLarge { path, bound });
    }
    parse(BufReader::new(opened.take(bound)), path).map(Some)
}

fn parse(text: impl io::Read, path: PathBuf) -> Result<DeviceCheckpoint, CheckpointError> {
    let mut json = serde_json::Deserializer::from_reader(text);
    let mut has_gpu_plugin = false;
    let outer = Layer { has_gpu_plugin: &mut has_gpu_plugin, is_registry: false };
    match outer.deserialize(&mut json).and_then(|found| json.end().map(|()| found)) {
        Ok(Some(assignments)) => Ok(DeviceCheckpoint { assignments, has_gpu_plugin }),
        Ok(None) => Err(CheckpointError::Shape { path }),
        Err(source) if source.is_io() => Err(CheckpointError::Read { path, source: source.into() }),
        Err(source) => Err(CheckpointError::Json { path, source }),
    }
}

/// The outer object, and `Data` in it; `None` without a list of entries. Or the ids of all devices by their resource, which are not kept.
struct Layer<'f> {
    has_gpu_plugin: &'f mut bool,
    is_registry: bool,
}

impl<'de> DeserializeSeed<'de> for Layer<'_> {
    type Value = Option<Vec<Assignment>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Layer<'_> {
    type Value = Option<Vec<Assignment>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the object of a checkpoint")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            *self.has_gpu_plugin |= self.is_registry && key.starts_with("nvidia.com/");
            let is_registry = key == "RegisteredDevices";
            let entries = match key.as_str() {
                _ if self.is_registry => map.next_value::<IgnoredAny>().map(|_| None)?,
                "Data" | "RegisteredDevices" => {
                    map.next_value_seed(Layer { has_gpu_plugin: &mut *self.has_gpu_plugin, is_registry })?
                }
                "PodDeviceEntries" | "Entries" => map.next_value_seed(Entries)?,
                _ => map.next_value::<IgnoredAny>().map(|_| None)?,
            };
            found = found.or(entries);
        }
        Ok(found)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }
}

/// The list of entries. Go encodes an empty list as null.
struct Entries;

impl<'de> DeserializeSeed<'de> for Entries {
    type Value = Option<Vec<Assignment>>;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries {
    type Value = Option<Vec<Assignment>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut all = Vec::new();
        while let Some(entry) = list.next_element::<Lenient>()? {
            let assignment = entry.0.and_then(CheckpointEntry::assignment).filter(Assignment::is_gpu);
            all.extend(assignment.filter(|_| all.len() < MAX_ENTRIES));
        }
        Ok(Some(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Some(Vec::new()))
    }
}

/// An entry, or anything else.
struct Lenient(Option<CheckpointEntry>);

impl<'de> Deserialize<'de> for Lenient {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(Self(CheckpointEntry::deserialize(Value::deserialize(from)?).ok()))
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CheckpointEntry {
    #[serde(rename = "PodUID", default)]
    pod_uid: Option<String>,
    container_name: String,
    resource_name: String,
    #[serde(rename = "DeviceIDs", default)]
    device_ids: DeviceIds,
    #[serde(default)]
    alloc_resp: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DeviceIds {
    List(Vec<Value>),
    ByNode(BTreeMap<String, Vec<Value>>),
    Other(IgnoredAny),
}

impl Default for DeviceIds {
    fn default() -> Self {
        Self::List(Vec::new())
    }
}

impl CheckpointEntry {
    fn assignment(self) -> Option<Assignment> {
        let text = |value: Value| if let Value::String(text) = value { Some(text) } else { None };
        let device_ids = match self.device_ids {
            DeviceIds::List(ids) => ids.into_iter().filter_map(text).collect(),
            DeviceIds::ByNode(by_node) => by_node.into_values().flatten().filter_map(text).collect(),
            DeviceIds::Other(_) => Vec::new(),
        };
        let response = self.alloc_resp.and_then(|text| STANDARD.decode(text).ok());
        let response = response.and_then(|bytes| ContainerAllocateResponse::decode(&*bytes).ok()).unwrap_or_default();
        let is_named = !self.container_name.is_empty() && !self.resource_name.is_empty();
        is_named.then_some(Assignment {
            pod_uid: self.pod_uid.filter(|uid| !uid.is_empty()),
            namespace: None,
            pod: None,
            container: self.container_name,
            resource: self.resource_name,
            device_ids,
            handed_out: response.device_ids(),
            source: AssignmentSource::Checkpoint,
            inside: None,
        })
    }
}

#[cfg(test)]
pub mod tests {
    use std::fs;

    use super::*;

    pub fn show(list: &[Assignment]) -> Vec<String> {
        let or = |part: &Option<String>| part.clone().unwrap_or("-".into());
        let line = |a: &Assignment| {
            let (uid, namespace, pod) = (or(&a.pod_uid), or(&a.namespace), or(&a.pod));
            format!("{uid} {namespace}/{pod}/{} {} {}", a.container, a.resource, a.device_ids.join(","))
        };
        list.iter().map(line).collect()
    }

    /// A kubelet folder with this checkpoint.
    pub fn folder(text: &[u8]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("device-plugins")).unwrap();
        fs::write(root.path().join(CHECKPOINT), text).unwrap();
        root
    }

    #[test]
    fn checkpoints_of_every_layout_parse() {
        let check = |text: &str, expect: &[&str]| {
            let found = read(folder(text.as_bytes()).path(), MAX_BYTES).unwrap().unwrap();
            assert_eq!(show(&found.assignments), expect, "{text}");
            assert_eq!(found.has_gpu_plugin, text.contains(r#""nvidia.com/gpu":["#), "{text}");
        };
        let entry = |ids: &str| {
            format!(
                r#"{{"PodUID":"u1","ContainerName":"c","ResourceName":"nvidia.com/gpu","DeviceIDs":{ids},"AllocResp":"Cgk="}}"#
            )
        };
        let (old, new) = (entry(r#"["GPU-1","GPU-2"]"#), entry(r#"{"0":["GPU-1"],"1":["GPU-2"]}"#));
        let both = "u1 -/-/c nvidia.com/gpu GPU-1,GPU-2";
        check(&format!(r#"{{"Entries":[{old}]}}"#), &[both]);
        check(&format!(r#"{{"PodDeviceEntries":[{old}],"RegisteredDevices":{{"nvidia.com/gpu":["GPU-1"]}}}}"#), &[both]);
        check(&format!(r#"{{"Data":{{"PodDeviceEntries":[{old}],"RegisteredDevices":null}},"Checksum":1}}"#), &[both]);
        check(&format!(r#"{{"Data":{{"PodDeviceEntries":[{new}],"New":[]}},"Checksum":1,"BootID":"b"}}"#), &[both]);
        check(
            &format!(r#"{{"Data":{{"PodDeviceEntries":[{}]}}}}"#, entry(r#"{"-1":["GPU-1"]}"#)),
            &["u1 -/-/c nvidia.com/gpu GPU-1"],
        );
        check(
            &format!(r#"{{"Data":{{"PodDeviceEntries":[1,{{}},{},{new}]}}}}"#, entry("7")),
            &["u1 -/-/c nvidia.com/gpu ", both],
        );
        check(r#"{"Data":{"PodDeviceEntries":null,"RegisteredDevices":{}},"Checksum":1}"#, &[]);
    }

    #[test]
    fn invalid_checkpoints_are_errors() {
        let check = |text: &[u8], expect: &str| {
            let root = folder(text);
            let error = read(root.path(), MAX_BYTES).unwrap_err().to_string();
            assert!(error.ends_with(expect) && error.contains(CHECKPOINT), "{error}");
        };
        check(b"", "not JSON");
        check(b"{\"Data\":{\"PodDeviceEntries\":[", "not JSON");
        check(&[0xff; 10], "not JSON");
        check(&[b'['; 100_000], "not JSON");
        check(b"{}", "no pod entries");
        check(b"[]", "no pod entries");
        check(br#"{"Data":"text"}"#, "no pod entries");
        check(br#"{"Data":{"PodDeviceEntries":{}}}"#, "no pod entries");
        assert!(read(Path::new("/nowhere"), MAX_BYTES).unwrap().is_none());
        let root = folder(b"{}");
        fs::remove_file(root.path().join(CHECKPOINT)).unwrap();
        fs::create_dir(root.path().join(CHECKPOINT)).unwrap();
        assert!(matches!(read(root.path(), MAX_BYTES), Err(CheckpointError::Read { .. })));
    }

    /// An entry of a plugin that replied with this.
    fn entry(id: &str, response: &ContainerAllocateResponse) -> String {
        let response = STANDARD.encode(response.encode_to_vec());
        format!(
            r#"{{"PodUID":"u1","ContainerName":"c","ResourceName":"nvidia.com/gpu","DeviceIDs":{{"0":["{id}"]}},"AllocResp":"{response}"}}"#
        )
    }

    #[test]
    fn the_reply_of_the_plugin_has_what_was_handed_out() {
        let check = |response: ContainerAllocateResponse, expect: &[&str]| {
            let text = format!(r#"{{"Data":{{"PodDeviceEntries":[{}]}},"Checksum":1}}"#, entry("GPU-1", &response));
            let list = read(folder(text.as_bytes()).path(), MAX_BYTES).unwrap().unwrap().assignments;
            assert_eq!(list[0].handed_out, expect, "{response:?}");
        };
        let env = |value: &str| HashMap::from([("NVIDIA_VISIBLE_DEVICES".to_owned(), value.to_owned())]);
        let node = |path: &str| DeviceSpec { host_path: path.to_owned() };
        let devices = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia3"].map(node).to_vec();
        let cdi = vec![CdiDevice { name: "k8s.device-plugin.nvidia.com/gpu=GPU-9".to_owned() }];
        let none = ContainerAllocateResponse::default();
        check(
            ContainerAllocateResponse { envs: env("GPU-2, GPU-3"), devices: devices.clone(), ..none.clone() },
            &["GPU-2", "GPU-3"],
        );
        check(ContainerAllocateResponse { devices: devices.clone(), ..none.clone() }, &["nvidia3"]);
        check(
            ContainerAllocateResponse { cdi_devices: cdi, envs: env("void"), ..none.clone() },
            &["k8s.device-plugin.nvidia.com/gpu=GPU-9"],
        );
        check(
            ContainerAllocateResponse { envs: env("/var/run/nvidia-container-devices"), devices, ..none.clone() },
            &["nvidia3"],
        );
        check(none, &[]);
    }

    /// A GPU that is shared in MiB: as many ids, also in the list of registered devices.
    #[test]
    fn a_checkpoint_of_forty_megabytes_is_read_to_its_end() {
        let uuid = "8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0";
        let ids = |n: usize| (0..n).map(|i| format!("\"GPU-{uuid}-_-{i}\"")).collect::<Vec<_>>().join(",");
        let shares = ids(46_068);
        let pods = (0..17).map(|pod| {
            format!(
                r#"{{"PodUID":"u{pod}","ContainerName":"c","ResourceName":"aliyun.com/gpu-mem","DeviceIDs":{{"0":[{shares}]}}}}"#
            )
        });
        let pods: Vec<String> = pods.chain([entry(&format!("GPU-{uuid}"), &ContainerAllocateResponse::default())]).collect();
        let text = format!(
            r#"{{"Data":{{"PodDeviceEntries":[{}],"RegisteredDevices":{{"aliyun.com/gpu-mem":[{shares}]}}}},"Checksum":1}}"#,
            pods.join(",")
        );
        let list = read(folder(text.as_bytes()).path(), MAX_BYTES).unwrap().unwrap().assignments;
        assert!(text.len() > 40_000_000, "{} bytes", text.len());
        assert_eq!((list.len(), list[16].device_ids.len(), &*list[17].device_ids[0]), (18, 46_068, &*format!("GPU-{uuid}")));
    }

    #[test]
    fn a_file_beyond_the_bound_is_refused() {
        let root = folder(b"{}");
        let file = fs::OpenOptions::new().write(true).open(root.path().join(CHECKPOINT)).unwrap();
        file.set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(read(root.path(), MAX_BYTES), Err(CheckpointError::TooLarge { .. })));
    }

    /// The checkpoint of a device manager, also of a tenant's own kubelet: entries have names and are of GPUs, and joining them with
    /// themselves invents nothing.
    #[test]
    fn fuzz_checkpoint() {
        devkit::fuzz(file!(), "checkpoint", move |bytes| {
            let Ok(found) = parse(bytes, PathBuf::new()) else { return };
            let all = found.assignments;
            assert!(all.len() <= bytes.len() && all.iter().all(Assignment::is_gpu), "{all:?}");
            assert!(all.iter().all(|a| !a.container.is_empty() && !a.resource.is_empty()), "{all:?}");
            let ids = |list: &[Assignment]| -> std::collections::BTreeSet<String> {
                list.iter().flat_map(|assignment| assignment.device_ids.clone()).collect()
            };
            for id in ids(&all) {
                let _device = sampler_labels::device(&id);
            }
            // Ids of shares are not kept.
            let joined = sampler_labels::join(all.clone(), all.clone());
            assert!(ids(&joined).is_subset(&ids(&all)), "{joined:?}");
            // Without its shares, a resource of another vendor may not look like a GPU any more.
            let again: Vec<Assignment> = joined.into_iter().filter(Assignment::is_gpu).collect();
            assert_eq!(ids(&sampler_labels::join(again.clone(), Vec::new())), ids(&again));
        });
    }

    /// The reply of a device plugin, in the checkpoint.
    #[test]
    fn fuzz_device_plugin() {
        devkit::fuzz(file!(), "device_plugin", move |bytes| {
            let Ok(response) = ContainerAllocateResponse::decode(bytes) else { return };
            let ids = response.device_ids();
            assert!(ids.len() <= bytes.len() && ids.iter().map(String::len).sum::<usize>() <= bytes.len());
            assert_eq!(ContainerAllocateResponse::decode(&*response.encode_to_vec()), Ok(response));
        });
    }
}
