//! GPU assignments of the kubelet: joins its two lists and parses device ids.
//!
//! The device checkpoint has pods by UID, pod-resources has them by namespace and name, and neither has container ids. The devices link
//! them: two entries with the same container name, resource and device ids are merged if no other entry has the same three. Nothing is
//! guessed: an entry without a counterpart is kept as its own list has it.
//!
//! This module does no IO and has no list of existing devices: the caller resolves an index or a minor number.

use std::collections::{BTreeMap, BTreeSet};

use super::device::{Device, device, is_share, uuid};
use super::values::{Facts, Label};

/// Devices of one resource that were assigned to one container.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Assignment {
    pub pod_uid: Option<String>,
    pub namespace: Option<String>,
    pub pod: Option<String>,
    pub container: String,
    /// Such as `nvidia.com/gpu`.
    pub resource: String,
    /// As the device plugin named them; see [`device`].
    pub device_ids: Vec<String>,
    /// The devices in the plugin's reply, if that is known: they are what the container has, whatever the ids of the kubelet.
    pub handed_out: Vec<String>,
    pub source: AssignmentSource,
    /// The container of the node, for a kubelet in a container (kind): it assigns to containers in that one.
    pub inside: Option<String>,
}

/// Where an assignment is known from, the most exact first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, strum::IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum AssignmentSource {
    #[default]
    Checkpoint,
    /// A resource claim (DRA).
    Claim,
    PodResources,
    /// The specification of the container, see [`VisibleGpus`](crate::VisibleGpus).
    Bundle,
}

impl AssignmentSource {
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Assignment {
    /// The GPUs that were handed out; if that is not known, those of its device ids. A bare number is an index only if the resource is a
    /// GPU: other resources number other things. An id that shares a GPU by a suffix is one of many equal ones, of which the kubelet picks
    /// any: the scheduler of the plugin decides which GPU the container gets.
    pub fn devices(&self) -> Vec<Device> {
        let name = self.resource.strip_prefix("nvidia.com/").unwrap_or_default();
        let numbered = ["gpu", "mig-", "shared-gpu"].iter().any(|start| name.starts_with(start));
        let by_id = |id: &String| match device(id) {
            Device::Index(_) if !numbered => Device::Unknown(id.clone()),
            Device::Uuid(_) | Device::Mig(_) if is_share(id) => Device::Unknown(id.clone()),
            device => device,
        };
        let by_ids: Vec<Device> = self.device_ids.iter().map(by_id).collect();
        let handed_out: Vec<Device> = self.handed_out.iter().map(|id| device(id)).collect();
        // A device node is that of the whole GPU also where a part of it was handed out.
        let is_part = by_ids.iter().any(|device| matches!(device, Device::Mig(_) | Device::Instance { .. }));
        let is_exact = |device: &Device| !(matches!(device, Device::Unknown(_)) || is_part && matches!(device, Device::Minor(_)));
        if handed_out.iter().any(is_exact) { handed_out } else { by_ids }
    }

    /// Whether this is a resource of NVIDIA, or another vendor's resource with NVIDIA devices.
    pub fn is_gpu(&self) -> bool {
        let is_nvidia_device = |id: &String| {
            let uuid_of = |prefix: &str| id.strip_prefix(prefix).and_then(uuid);
            ["GPU-", "MIG-", "MIG-GPU-"].into_iter().find_map(uuid_of).is_some()
                || matches!(device(id), Device::Minor(_) | Device::Instance { .. })
        };
        self.resource.starts_with("nvidia.com/")
            || self.source == AssignmentSource::Claim
            || self.device_ids.iter().any(is_nvidia_device)
    }

    fn is_of_same_container(&self, other: &Self) -> bool {
        let parts = |a: &Self| (a.pod_uid.clone(), a.names());
        parts(self) == parts(other) && self.container == other.container && self.resource == other.resource
    }

    fn names(&self) -> Option<Names> {
        Some((self.namespace.clone()?, self.pod.clone()?))
    }
}

/// Namespace and name of a pod.
type Names = (String, String);

/// Joins the entries of the checkpoint and of pod-resources; returns those with NVIDIA devices, sorted.
pub fn join(checkpoint: Vec<Assignment>, pod_resources: Vec<Assignment>) -> Vec<Assignment> {
    let (checkpoint, pod_resources) = (merged(checkpoint), merged(pod_resources));
    let by_devices = unique(pod_resources.iter().filter_map(|a| Some((key(a)?, a.names()?))));
    let uids = unique(checkpoint.iter().filter_map(|a| Some((key(a)?, a.pod_uid.clone()?))));
    // One matched container provides the names for its whole pod.
    let pairs = || uids.iter().filter_map(|(key, uid)| Some((uid.clone(), by_devices.get(key)?.clone())));
    let names_of = unique(pairs().collect::<BTreeSet<_>>());
    let uid_of = unique(pairs().map(|(uid, names)| (names, uid)).collect::<BTreeSet<_>>());
    let mut all = BTreeSet::new();
    for mut entry in checkpoint {
        let names = entry.pod_uid.as_ref().and_then(|uid| names_of.get(uid));
        if let Some(names) = names.filter(|names| uid_of.contains_key(*names)) {
            (entry.namespace, entry.pod) = (Some(names.0.clone()), Some(names.1.clone()));
        }
        all.insert(entry);
    }
    for mut entry in pod_resources {
        let uid = entry.names().and_then(|names| uid_of.get(&names).cloned());
        entry.pod_uid = uid.filter(|uid| names_of.contains_key(uid)).or(entry.pod_uid);
        // The checkpoint says more about the same allocation.
        if !all.iter().any(|known: &Assignment| known.is_of_same_container(&entry) && known.device_ids == entry.device_ids) {
            all.insert(entry);
        }
    }
    // Ids of shares are only for the comparison of the lists: there may be tens of thousands.
    let without_shares = |entry: Assignment| {
        let device_ids = entry.device_ids.into_iter().filter(|id| !is_share(id)).collect();
        Assignment { device_ids, ..entry }
    };
    all.into_iter().map(without_shares).collect()
}

/// The labels of a pod from the kubelet's lists. The container label is not set: the cgroup may be the sandbox's, or another container's.
pub fn facts_for(pod_uid: &str, assignments: &[Assignment]) -> Option<Facts> {
    let (namespace, pod) = assignments.iter().filter(|a| a.pod_uid.as_deref() == Some(pod_uid)).find_map(Assignment::names)?;
    let mut facts = Facts { pod_uid: Some(pod_uid.to_owned()), pod_status_known: true, ..Facts::default() };
    facts.set(Label::Namespace, Some(&namespace));
    facts.set(Label::Pod, Some(&pod));
    Some(facts)
}

/// Merges entries to one per container and resource, since both lists may have one per NUMA node. Ids are sorted.
fn merged(list: Vec<Assignment>) -> Vec<Assignment> {
    let mut ids: BTreeMap<Assignment, BTreeSet<String>> = BTreeMap::new();
    for mut entry in list.into_iter().filter(Assignment::is_gpu) {
        let entry_ids = std::mem::take(&mut entry.device_ids);
        ids.entry(entry).or_default().extend(entry_ids);
    }
    ids.into_iter().map(|(entry, ids)| Assignment { device_ids: ids.into_iter().collect(), ..entry }).collect()
}

fn key(entry: &Assignment) -> Option<(&str, &str, &[String])> {
    (!entry.device_ids.is_empty()).then_some((&entry.container, &entry.resource, &entry.device_ids))
}

/// Keys that occur once.
fn unique<K: Ord, V>(pairs: impl IntoIterator<Item = (K, V)>) -> BTreeMap<K, V> {
    let mut seen: BTreeMap<K, Option<V>> = BTreeMap::new();
    for (key, value) in pairs {
        seen.entry(key).and_modify(|v| *v = None).or_insert(Some(value));
    }
    seen.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const U: &str = "8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0";

    #[test]
    fn a_bare_number_is_an_index_of_gpu_resources_only() {
        let first_device = |resource: &str| {
            let (resource, device_ids) = (resource.to_owned(), vec!["1".to_owned()]);
            Assignment { resource, device_ids, ..Assignment::default() }.devices().into_iter().next()
        };
        for resource in ["nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.5gb"] {
            assert_eq!(first_device(resource), Some(Device::Index(1)), "{resource}");
        }
        for resource in ["nvidia.com/hostdev", "nvidia.com/TU104GL_Tesla_T4", "rdma/hca"] {
            assert_eq!(first_device(resource), Some(Device::Unknown("1".into())), "{resource}");
        }
    }

    /// Parses `uid|namespace/pod|container resource id,id`; `-` is an absent value.
    fn entry(text: &str) -> Assignment {
        let (owner, rest) = text.split_once(' ').unwrap();
        let (resource, ids) = rest.split_once(' ').unwrap();
        let [uid, names, container] = owner.split('|').collect::<Vec<_>>()[..] else { panic!("{text}") };
        let known = |part: &str| (part != "-").then(|| part.to_owned());
        let (namespace, pod) = names.split_once('/').map_or((None, None), |(n, p)| (known(n), known(p)));
        let device_ids = ids.split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
        let (container, resource) = (container.into(), resource.into());
        Assignment { pod_uid: known(uid), namespace, pod, container, resource, device_ids, ..Assignment::default() }
    }

    fn show(a: &Assignment) -> String {
        let or = |part: &Option<String>| part.clone().unwrap_or("-".into());
        let names = a.names().map_or("-".into(), |(n, p)| format!("{n}/{p}"));
        format!("{}|{names}|{} {} {}", or(&a.pod_uid), a.container, a.resource, a.device_ids.join(","))
    }

    fn check(checkpoint: &[&str], pod_resources: &[&str], expect: &[&str]) {
        let list = |texts: &[&str]| texts.iter().map(|text| entry(text)).collect::<Vec<_>>();
        let joined: Vec<String> = join(list(checkpoint), list(pod_resources)).iter().map(show).collect();
        assert_eq!(joined, expect, "{checkpoint:?} {pod_resources:?}");
    }

    #[test]
    fn entries_with_the_same_devices_are_joined() {
        let gpu_entry = |owner: &str, ids: &str| format!("{owner} nvidia.com/gpu {ids}");
        // Ids in another order, and split by NUMA node.
        check(
            &[&gpu_entry("u1|-|c", "GPU-b,GPU-a"), &gpu_entry("u2|-|c", "GPU-c")],
            &[&gpu_entry("-|n/p|c", "GPU-a"), &gpu_entry("-|n/p|c", "GPU-b"), &gpu_entry("-|n/q|c", "GPU-c")],
            &[&gpu_entry("u1|n/p|c", "GPU-a,GPU-b"), &gpu_entry("u2|n/q|c", "GPU-c")],
        );
        // Only one of the lists.
        check(&[&gpu_entry("u1|-|c", "GPU-a")], &[], &[&gpu_entry("u1|-|c", "GPU-a")]);
        check(&[], &[&gpu_entry("-|n/p|c", "GPU-a")], &[&gpu_entry("-|n/p|c", "GPU-a")]);
        // A different container name is not joined.
        check(
            &[&gpu_entry("u1|-|c", "GPU-a")],
            &[&gpu_entry("-|n/p|d", "GPU-a")],
            &[&gpu_entry("-|n/p|d", "GPU-a"), &gpu_entry("u1|-|c", "GPU-a")],
        );
        // An ended pod is still in the checkpoint: the match is ambiguous.
        check(
            &[&gpu_entry("u1|-|c", "GPU-a"), &gpu_entry("u2|-|c", "GPU-a")],
            &[&gpu_entry("-|n/p|c", "GPU-a")],
            &[&gpu_entry("-|n/p|c", "GPU-a"), &gpu_entry("u1|-|c", "GPU-a"), &gpu_entry("u2|-|c", "GPU-a")],
        );
        // One matched container names its pod, also for another container with ambiguous devices.
        check(
            &[&gpu_entry("u1|-|c", "GPU-a"), &gpu_entry("u1|-|d", "GPU-b"), &gpu_entry("u0|-|d", "GPU-b")],
            &[&gpu_entry("-|n/p|c", "GPU-a"), &gpu_entry("-|n/p|d", "GPU-b")],
            &[&gpu_entry("u0|-|d", "GPU-b"), &gpu_entry("u1|n/p|c", "GPU-a"), &gpu_entry("u1|n/p|d", "GPU-b")],
        );
        // One UID with two names is a contradiction.
        check(
            &[&gpu_entry("u1|-|c", "GPU-a"), &gpu_entry("u1|-|d", "GPU-b")],
            &[&gpu_entry("-|n/p|c", "GPU-a"), &gpu_entry("-|n/q|d", "GPU-b")],
            &[
                &gpu_entry("-|n/p|c", "GPU-a"),
                &gpu_entry("-|n/q|d", "GPU-b"),
                &gpu_entry("u1|-|c", "GPU-a"),
                &gpu_entry("u1|-|d", "GPU-b"),
            ],
        );
    }

    #[test]
    fn shares_are_the_gpu_that_was_handed_out_and_no_other() {
        let check = |resource: &str, ids: &[&str], handed_out: &[&str], expect: &[Device]| {
            let text = |list: &[&str]| list.iter().map(|id| id.replace("UU", U)).collect::<Vec<_>>();
            let (device_ids, handed_out) = (text(ids), text(handed_out));
            let assignment = Assignment { resource: resource.into(), device_ids, handed_out, ..Assignment::default() };
            let known: Vec<Device> =
                assignment.devices().into_iter().filter(|device| !matches!(device, Device::Unknown(_))).collect();
            assert_eq!(known, expect, "{ids:?}, {handed_out:?}", handed_out = assignment.handed_out);
        };
        let (gpu, other) = (Device::Uuid(format!("GPU-{U}")), "GPU-11111111-2222-3333-4444-555555555555");
        let of_other = Device::Uuid(other.to_owned());
        // HAMi: the kubelet picks any of the equal ids, the scheduler's annotation decides.
        check("nvidia.com/gpu", &["GPU-UU-17"], &[], &[]);
        check("nvidia.com/gpu", &["GPU-UU-17"], &[other], std::slice::from_ref(&of_other));
        // gpushare: MiB of a GPU.
        check("aliyun.com/gpu-mem", &["GPU-UU-_-0", "GPU-UU-_-1"], &["1"], &[Device::Index(1)]);
        check("aliyun.com/gpu-mem", &["GPU-UU-_-0"], &[], &[]);
        // NVIDIA's own replicas are those of the GPU in the id.
        check("nvidia.com/gpu.shared", &["GPU-UU::3"], &[], std::slice::from_ref(&gpu));
        check("nvidia.com/gpu", &["GPU-UU"], &["k8s.device-plugin.nvidia.com/gpu=GPU-UU"], std::slice::from_ref(&gpu));
        check("nvidia.com/gpu", &["GPU-UU"], &["tegra"], &[gpu]);
        // GKE's plugin hands out the nodes of the GPU and of the capabilities of its instance.
        for handed_out in [&[][..], &["nvidia0"]] {
            check("nvidia.com/gpu", &["nvidia0/gi1"], handed_out, &[Device::Instance { minor: 0, gpu_instance: 1 }]);
        }
        check("nvidia.com/mig-1g.5gb", &["MIG-UU"], &["nvidia0"], &[Device::Mig(format!("MIG-{U}"))]);
        check("nvidia.com/gpu", &["GPU-UU"], &["nvidia2"], &[Device::Minor(2)]);
    }

    #[test]
    fn only_nvidia_devices_are_kept() {
        let uuid = format!("GPU-{U}-_-3");
        let lent = format!("u1|-|c aliyun.com/gpu-mem {uuid}");
        let bare = format!("u1|-|c example.com/disk {U}");
        let others = ["u1|-|c rdma/hca 1", "u1|-|c amd.com/gpu 0000:3b:00.0", &lent, &bare];
        check(&others, &["-|n/p|c smarter/tty tty1"], &["u1|-|c aliyun.com/gpu-mem "]);
        check(&["u1|-|c nvidia.com/gpu "], &["-|n/p|c nvidia.com/gpu "], &["-|n/p|c nvidia.com/gpu ", "u1|-|c nvidia.com/gpu "]);
    }

    #[test]
    fn facts_of_a_pod_have_its_names_and_no_container() {
        let joined = [entry("u1|-|c nvidia.com/gpu a"), entry("u1|n/p|c nvidia.com/gpu b")];
        let facts = facts_for("u1", &joined).unwrap();
        assert_eq!(
            (facts.labels[Label::Namespace as usize].as_deref(), facts.labels[Label::Pod as usize].as_deref()),
            (Some("n"), Some("p"))
        );
        assert_eq!((facts.labels[Label::Container as usize].as_deref(), facts.pod_status_known), (None, true));
        assert_eq!(facts_for("u2", &joined), None);
    }

    proptest! {
        /// No entry is lost, and its own values are unchanged.
        #[test]
        fn joining_keeps_everything(
            left in prop::collection::vec((0..4u8, 0..3u8, prop::collection::vec(0..4u8, 0..3)), 0..8),
            right in prop::collection::vec((0..4u8, 0..3u8, prop::collection::vec(0..4u8, 0..3)), 0..8),
        ) {
            let ids = |ids: &[u8]| ids.iter().map(|i| format!("nvidia{i}")).collect::<Vec<_>>().join(",");
            let list = |entries: &[(u8, u8, Vec<u8>)], owner: &dyn Fn(u8, u8) -> String| -> Vec<Assignment> {
                entries.iter().map(|(pod, c, devices)| entry(&format!("{} nvidia.com/gpu {}", owner(*pod, *c), ids(devices)))).collect()
            };
            let checkpoint = list(&left, &|pod, c| format!("u{pod}|-|c{c}"));
            let pod_resources = list(&right, &|pod, c| format!("-|n/p{pod}|c{c}"));
            let joined = join(checkpoint.clone(), pod_resources.clone());
            for entry in checkpoint {
                prop_assert!(joined.iter().any(|a| a.pod_uid == entry.pod_uid && a.container == entry.container
                    && entry.device_ids.iter().all(|id| a.device_ids.contains(id))));
            }
            for entry in pod_resources {
                prop_assert!(joined.iter().any(|a| a.pod == entry.pod && a.container == entry.container
                    && entry.device_ids.iter().all(|id| a.device_ids.contains(id))));
            }
        }
    }
}
