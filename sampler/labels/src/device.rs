//! Ids of devices, in the forms of device plugins, runtimes and CDI.

/// The physical GPU that a device id refers to. Time slices and replicas refer to their GPU.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Device {
    /// `GPU-..`, the UUID in NVML's form.
    Uuid(String),
    /// NVML's index.
    Index(u32),
    /// The number in `/dev/nvidia<N>`, which may differ from NVML's index.
    Minor(u32),
    /// A MIG device of the GPU with this minor number, by the number of its GPU instance.
    Instance { minor: u32, gpu_instance: u32 },
    /// `MIG-<uuid>`: only NVML has the GPU that the partition belongs to.
    Mig(String),
    /// The unchanged id.
    Unknown(String),
}

/// Parses a device id of the NVIDIA, GKE and CDI forms, and of plugins that append a suffix to a UUID.
pub fn device(id: &str) -> Device {
    read(id.trim()).unwrap_or_else(|| Device::Unknown(id.to_owned()))
}

fn read(id: &str) -> Option<Device> {
    // CDI: `<vendor>/<class>=<name>`.
    let id = match id.rsplit_once('=') {
        Some((kind, name)) if kind.contains('/') => name,
        _ => id,
    };
    // A replica (time slicing, MPS) refers to its device.
    let id = match id.split_once("::") {
        Some((device, replica)) if is_number(replica) => device,
        _ => id,
    };
    // NVML does not guarantee a form after `GPU-` and `MIG-`: if it is not a UUID, the whole text is used.
    let named = |prefix: &str, rest: &str| (!rest.is_empty()).then(|| format!("{prefix}{}", uuid(rest).unwrap_or(rest)));
    if let Some(rest) = id.strip_prefix("MIG-") {
        // Before driver 470 the id of a partition was `MIG-GPU-<uuid>/<gi>/<ci>`.
        return match rest.strip_prefix("GPU-") {
            Some(gpu) => named("GPU-", gpu.split('/').next()?).map(Device::Uuid),
            None => named("MIG-", rest).map(Device::Mig),
        };
    }
    if let Some(gpu) = id.strip_prefix("GPU-") {
        return named("GPU-", gpu).map(Device::Uuid);
    }
    if let Some(bare) = uuid(id).filter(|bare| *bare == id) {
        return Some(Device::Uuid(format!("GPU-{bare}")));
    }
    // GKE: `nvidia0`, `nvidia0/vgpu3`, `nvidia0/gi1`, `nvidia0/gi1/vgpu3`.
    if let Some(rest) = id.strip_prefix("nvidia") {
        let mut parts = rest.split('/');
        let minor = parse(parts.next()?)?;
        let gpu_instance = parts.next().and_then(|part| parse(part.strip_prefix("gi")?));
        return Some(gpu_instance.map_or(Device::Minor(minor), |gpu_instance| Device::Instance { minor, gpu_instance }));
    }
    // `0`, a partition's `0:1`, and CDI's `gpu0` and `mig0:1`.
    let number = id.strip_prefix("gpu").or(id.strip_prefix("mig")).unwrap_or(id);
    let index = match number.split_once(':') {
        Some((gpu, partition)) if is_number(partition) => gpu,
        Some(_) => return None,
        None => number,
    };
    parse(index).map(Device::Index)
}

/// The UUID at the beginning of the text. Some plugins append a replica: `<uuid>-3`, `<uuid>-_-3`, `<uuid>/3`.
pub(super) fn uuid(text: &str) -> Option<&str> {
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
    const LEN: usize = 36;
    let (head, tail) = text.split_at_checked(LEN)?;
    let whole = head.split('-').map(str::len).eq(GROUPS) && head.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit());
    let ends = tail.bytes().next().is_none_or(|b| !b.is_ascii_alphanumeric());
    (whole && ends).then_some(head)
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn parse(text: &str) -> Option<u32> {
    is_number(text).then(|| text.parse().ok()).flatten()
}

/// `<uuid>-3`, `<uuid>-_-3`: the shares of HAMi, gpushare and other plugins. A replica of NVIDIA's plugin has `::` instead.
pub(super) fn is_share(id: &str) -> bool {
    let rest = ["MIG-GPU-", "MIG-", "GPU-"].iter().find_map(|prefix| id.trim().strip_prefix(prefix)).unwrap_or(id.trim());
    uuid(rest).is_some_and(|uuid| rest[uuid.len()..].starts_with(['-', '_', '@', '.']))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const U: &str = "8f1f4a33-bb7c-4c8e-9a51-d3a1c2d2e6f0";

    #[test]
    fn device_ids_of_every_known_form_parse() {
        let check = |id: &str, expect: Device| assert_eq!(device(&id.replace("UU", U)), expect, "{id}");
        let gpu = || Device::Uuid(format!("GPU-{U}"));
        let mig = || Device::Mig(format!("MIG-{U}"));
        for id in
            ["GPU-UU", "GPU-UU::3", "UU", "UU::12", "GPU-UU-0", "GPU-UU-_-7", "GPU-UU/2", "MIG-GPU-UU/7/0", "MIG-GPU-UU/7/0::1"]
        {
            check(id, gpu());
        }
        check("GPU-sim-0::1", Device::Uuid("GPU-sim-0".into()));
        check("GPU-UUff", Device::Uuid(format!("GPU-{U}ff")));
        check("MIG-GPU-x/1/0", Device::Uuid("GPU-x".into()));
        for id in ["MIG-UU", "MIG-UU::2", "nvidia.com/gpu=MIG-UU"] {
            check(id, mig());
        }
        for id in ["nvidia.com/gpu=GPU-UU", "k8s.device-plugin.nvidia.com/gpu=GPU-UU", "nvidia.com/gpu=GPU-UU::1"] {
            check(id, gpu());
        }
        for id in ["nvidia2", "nvidia2/vgpu0"] {
            check(id, Device::Minor(2));
        }
        for (id, gpu_instance) in [("nvidia2/gi0", 0), ("nvidia2/gi1/vgpu3", 1), ("nvidia2/gi13", 13)] {
            check(id, Device::Instance { minor: 2, gpu_instance });
        }
        for id in
            ["1", "1:0", "1::4", " 1 ", "nvidia.com/gpu=1", "nvidia.com/gpu=1:0", "nvidia.com/gpu=gpu1", "nvidia.com/gpu=mig1:0"]
        {
            check(id, Device::Index(1));
        }
        for id in
            ["", "all", "tegra", "GPU-", "MIG-", "MIG-GPU-", "nvidia", "nvidiactl", "nvidia.com/gpu=all", "1:x", "0000:3b:00.1"]
        {
            check(id, Device::Unknown(id.to_owned()));
        }
        for id in ["-1", "+1", "99999999999", "é", "gpu", "card0-0", "=1", "UU-x", "::1"] {
            check(id, Device::Unknown(id.replace("UU", U)));
        }
    }

    proptest! {
        #[test]
        fn any_text_parses(id in "\\PC*") {
            device(&id);
        }

        #[test]
        fn malformed_ids_parse(id in "(MIG-|GPU-|nvidia|gpu|nvidia.com/gpu=)?(GPU-)?([0-9a-fé-]{0,40})((::|/|:)[0-9a-z]{0,3})?") {
            device(&id);
        }
    }

    /// CDI names, ids of plugins and values of variables: the result is a part of the id.
    #[test]
    fn fuzz_device_id() {
        devkit::fuzz(file!(), "device_id", move |bytes| {
            let id = String::from_utf8_lossy(bytes);
            match device(&id) {
                Device::Uuid(uuid) => {
                    let bare = uuid.strip_prefix("GPU-").unwrap();
                    assert!(!bare.is_empty() && id.contains(bare), "{id}: {uuid}");
                }
                Device::Mig(uuid) => assert!(uuid.len() > "MIG-".len() && id.contains(&uuid["MIG-".len()..]), "{id}: {uuid}"),
                Device::Unknown(unchanged) => assert_eq!(unchanged, id),
                Device::Index(number) | Device::Minor(number) | Device::Instance { minor: number, .. } => {
                    // Zeros may come before it.
                    assert!(id.contains(&number.to_string()), "{id}: {number}");
                }
            }
            let _either = is_share(&id);
        });
    }
}
