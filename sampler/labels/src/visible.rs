//! The GPUs that the specification of a container (OCI's `config.json`) gives to it. It is made before the container starts, so this is
//! known where no device plugin and no claim assigns anything: `docker --gpus`, a runtime class alone, fractions of a GPU, CDI.
//!
//! | what the specification has | GPUs |
//! |---|---|
//! | `NVIDIA_VISIBLE_DEVICES` and a hook of NVIDIA's runtime | those that the variable lists; the runtime decides by it |
//! | mounts below `/var/run/nvidia-container-devices`, if the variable names that folder | their names |
//! | annotations `cdi.k8s.io/..`, and nodes that came with them | the names of devices in them |
//! | nodes `/dev/nvidia<N>` | these, except in a privileged container, which has the nodes of all |
//!
//! Images set the variable, too (`all` in those of CUDA), and tenants choose names of mounts and annotations: nothing of these counts without
//! what only a runtime adds. `0:1`, a MIG device by its number, is not known.

use super::device::{Device, device};

/// Where NVIDIA's runtime looks for devices by mounts, if the variable has this value.
pub const MOUNTED: &str = "/var/run/nvidia-container-devices";
/// More devices than a node has.
const DEVICES_MOST: usize = 256;
/// Of a device. Tenants choose variables and annotations, and their text is kept for each container.
const ID_BYTES_MOST: usize = 256;

/// The parts of a specification that decide about GPUs.
#[derive(Clone, Debug, Default)]
pub struct SpecParts<'s> {
    /// The value of `NVIDIA_VISIBLE_DEVICES`.
    pub variable: Option<&'s str>,
    /// Paths of device nodes.
    pub nodes: Vec<&'s str>,
    /// Targets of mounts.
    pub mounts: Vec<&'s str>,
    /// Values of annotations that request CDI devices.
    pub cdi: Vec<&'s str>,
    /// A hook of NVIDIA's runtime.
    pub has_hook: bool,
    /// Access to all devices is allowed.
    pub is_privileged: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VisibleGpus {
    /// All of the node.
    All,
    These(Vec<Device>),
}

impl VisibleGpus {
    /// `None` if the specification gives no GPU, or if it does not say which.
    pub fn of(parts: &SpecParts<'_>) -> Option<Self> {
        let minors: Vec<&str> = parts.nodes.iter().filter_map(|path| gpu_node(path)).collect();
        let variable = parts.variable.filter(|_| parts.has_hook);
        let listed = || variable.into_iter().flat_map(|list| list.split(',')).map(str::trim);
        if listed().any(|id| id == "all") {
            return Some(Self::All);
        }
        let mounts = parts.mounts.iter().filter(|_| variable.is_some_and(|variable| variable.trim_end_matches('/') == MOUNTED));
        let mut mounted = mounts.filter_map(|path| path.strip_prefix(MOUNTED)?.strip_prefix('/'));
        let cdi = || parts.cdi.iter().filter(|_| !minors.is_empty());
        let by_cdi = || cdi().flat_map(|list| list.split(',')).map(str::trim).filter(|name| is_gpu(name));
        if by_cdi().any(|name| name.ends_with("=all")) {
            return Some(Self::All);
        }
        let named = |ids: &mut dyn Iterator<Item = &str>| -> Vec<Device> {
            ids.filter(|id| !id.contains(':') && id.len() <= ID_BYTES_MOST)
                .map(device)
                .filter(|device| !matches!(device, Device::Unknown(_)))
                .take(DEVICES_MOST)
                .collect()
        };
        // Nodes name whole GPUs, also where a part of one was given: then there are nodes of capabilities.
        let is_part = parts.nodes.iter().any(|path| path.starts_with("/dev/nvidia-caps/"));
        let mut by_node = minors.iter().copied().filter(|_| !is_part && !parts.is_privileged);
        let ways = [named(&mut listed()), named(&mut mounted), named(&mut by_cdi()), named(&mut by_node)];
        ways.into_iter().find(|devices| !devices.is_empty()).map(Self::These)
    }
}

/// `nvidia<N>`, of the node of a GPU.
fn gpu_node(path: &str) -> Option<&str> {
    let name = path.strip_prefix("/dev/")?;
    let number = name.strip_prefix("nvidia")?;
    (!number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())).then_some(name)
}

/// Whether a CDI name is that of a GPU: `nvidia.com/gpu=0`, `k8s.device-plugin.nvidia.com/gpu=GPU-..`. That of all nodes for a driver's
/// own management is none.
fn is_gpu(name: &str) -> bool {
    let kind = name.split_once('=').map_or("", |(kind, _)| kind);
    kind.ends_with("nvidia.com/gpu") && !kind.starts_with("management.")
}

#[cfg(test)]
mod tests {
    use super::*;

    const U: &str = "GPU-8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0";
    const MIG: &str = "MIG-8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0";

    fn these(devices: &[Device]) -> Option<VisibleGpus> {
        Some(VisibleGpus::These(devices.to_vec()))
    }

    fn uuid() -> Device {
        Device::Uuid(U.to_owned())
    }

    #[test]
    fn the_variable_counts_where_nvidias_runtime_reads_it() {
        let check = |variable: &str, expect: Option<VisibleGpus>| {
            let parts = SpecParts { variable: Some(variable), has_hook: true, ..SpecParts::default() };
            assert_eq!(VisibleGpus::of(&parts), expect, "{variable}");
        };
        check("all", Some(VisibleGpus::All));
        check(U, these(&[uuid()]));
        check("0,2", these(&[Device::Index(0), Device::Index(2)]));
        check(&format!("{U}, {MIG}"), these(&[uuid(), Device::Mig(MIG.to_owned())]));
        check("nvidia.com/gpu=1", these(&[Device::Index(1)]));
        for nothing in ["void", "none", "", " ", MOUNTED] {
            check(nothing, None);
        }
        // Images have the variable also where another runtime starts them.
        for variable in ["all", U] {
            assert_eq!(VisibleGpus::of(&SpecParts { variable: Some(variable), ..SpecParts::default() }), None);
        }
        // An image of CUDA with one device node.
        let parts = SpecParts { variable: Some("all"), nodes: vec!["/dev/nvidia0", "/dev/nvidiactl"], ..SpecParts::default() };
        assert_eq!(VisibleGpus::of(&parts), these(&[Device::Minor(0)]));
        check("0:1", None);
    }

    #[test]
    fn devices_are_found_by_mounts_annotations_and_nodes() {
        let mounts = vec!["/etc/hosts", "/var/run/nvidia-container-devices/GPU-8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0"];
        let parts = SpecParts { variable: Some(MOUNTED), mounts, has_hook: true, ..SpecParts::default() };
        assert_eq!(VisibleGpus::of(&parts), these(&[uuid()]));
        // A tenant may mount anything anywhere.
        for parts in [SpecParts { has_hook: false, ..parts.clone() }, SpecParts { variable: Some("void"), ..parts.clone() }] {
            assert_eq!(VisibleGpus::of(&parts), None);
        }
        let nodes = || vec!["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap1"];
        let cdi = |cdi: Vec<&'static str>| VisibleGpus::of(&SpecParts { cdi, nodes: nodes(), ..SpecParts::default() });
        let without_nodes = SpecParts { cdi: vec!["nvidia.com/gpu=0"], ..SpecParts::default() };
        assert_eq!(VisibleGpus::of(&without_nodes), None, "no runtime has followed the annotation");
        assert_eq!(cdi(vec!["nvidia.com/gpu=0, nvidia.com/gpu=1"]), these(&[Device::Index(0), Device::Index(1)]));
        assert_eq!(cdi(vec!["k8s.device-plugin.nvidia.com/gpu=GPU-8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0"]), these(&[uuid()]));
        assert_eq!(cdi(vec!["runtime.nvidia.com/gpu=all"]), Some(VisibleGpus::All));
        for other in
            ["management.nvidia.com/gpu=all", "k8s.gpu.nvidia.com/claim=u-gpu-0", "nvidia.com/gds=all", "amd.com/gpu=0", "x"]
        {
            assert_eq!(cdi(vec![other]), None, "{other}");
        }
        let nodes = |nodes: Vec<&'static str>, is_privileged| {
            VisibleGpus::of(&SpecParts { nodes, is_privileged, ..SpecParts::default() })
        };
        let all = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-modeset", "/dev/dri/card0", "/dev/null"];
        assert_eq!(nodes(all.to_vec(), false), None);
        let two = || [&all[..], &["/dev/nvidia1", "/dev/nvidia3"]].concat();
        assert_eq!(nodes(two(), false), these(&[Device::Minor(1), Device::Minor(3)]));
        assert_eq!(nodes(two(), true), None);
        // Which instance of the GPU it is, the nodes do not say.
        assert_eq!(nodes(vec!["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap21"], false), None);
        let parts = SpecParts {
            variable: Some(MIG),
            nodes: vec!["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap21"],
            has_hook: true,
            ..SpecParts::default()
        };
        assert_eq!(VisibleGpus::of(&parts), these(&[Device::Mig(MIG.to_owned())]));
    }
}
