//! What a page of an exporter means: which families have the time and the energy of GPUs and of their users, and which labels name them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// The description of one exporter, as in the files of `mappings/`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// The exporter, with its version.
    pub name: String,
    /// Path of the page.
    #[serde(default = "metrics")]
    pub path: String,
    /// Utilization or busy time of a GPU.
    pub device: Option<Family>,
    /// The current utilization of a GPU, if `device` is a counter.
    pub device_now: Option<Family>,
    /// Utilization or time of a user of a GPU.
    pub user: Option<Family>,
    /// Energy or power of a GPU.
    pub device_energy: Option<Family>,
    /// Energy of a user of a GPU above what the GPU draws when idle.
    pub user_energy: Option<Family>,
    /// Labels of `user` that identify its container, with what they have to be.
    #[serde(default)]
    pub labels: BTreeMap<String, Identity>,
}

fn metrics() -> String {
    "/metrics".to_owned()
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Family {
    pub metric: String,
    pub kind: Kind,
    /// Only series with these labels.
    #[serde(default)]
    pub with: BTreeMap<String, String>,
    /// The label of the GPU.
    pub gpu: Key,
    /// The label of the user; a user is the sum of its processes.
    pub user: Option<Key>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    pub label: String,
    pub is: Identity,
}

/// What a label has as its value.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Identity {
    /// Of a GPU.
    Uuid,
    /// Of a GPU, from 0.
    Index,
    /// Of a process.
    Pid,
    ContainerId,
    Namespace,
    Pod,
    Container,
    Image,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A gauge from 0 to 100.
    Percent,
    /// A gauge from 0 to 1.
    Ratio,
    /// A counter.
    Seconds,
    /// A gauge.
    Watts,
    /// A counter.
    Joules,
    /// A counter.
    Millijoules,
}

impl Kind {
    pub fn is_gauge(self) -> bool {
        matches!(self, Kind::Percent | Kind::Ratio | Kind::Watts)
    }

    /// Seconds or joules of one unit of the family; of a gauge in each second.
    pub fn scale(self) -> f64 {
        match self {
            Kind::Percent => 0.01,
            Kind::Millijoules => 0.001,
            Kind::Ratio | Kind::Seconds | Kind::Watts | Kind::Joules => 1.0,
        }
    }

    fn is_energy(self) -> bool {
        matches!(self, Kind::Watts | Kind::Joules | Kind::Millijoules)
    }
}

/// All families with their keys, and whether they have to be of energy.
fn families(mapping: &Mapping) -> impl Iterator<Item = (&'static str, &Family, bool)> {
    let all = [
        ("device", &mapping.device, false),
        ("device_now", &mapping.device_now, false),
        ("user", &mapping.user, false),
        ("device_energy", &mapping.device_energy, true),
        ("user_energy", &mapping.user_energy, true),
    ];
    all.into_iter().filter_map(|(key, family, energy)| Some((key, family.as_ref()?, energy)))
}

impl Mapping {
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("--mapping {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("--mapping {}", path.display()))
    }

    pub fn parse(text: &str) -> Result<Self> {
        let mapping: Self = toml::from_str(text)?;
        let users = [("user", &mapping.user), ("user_energy", &mapping.user_energy)];
        for (key, family) in users.into_iter().filter_map(|(key, family)| Some((key, family.as_ref()?))) {
            ensure!(family.user.is_some(), "{key}: a family of users needs the key `user`, the label that names them");
        }
        for (key, family, energy) in families(&mapping) {
            let kinds = if energy { "watts, joules or millijoules" } else { "percent, ratio or seconds" };
            ensure!(family.kind.is_energy() == energy, "{key}: `kind` has to be {kinds}");
        }
        for (key, family, _) in families(&mapping) {
            ensure!(matches!(family.gpu.is, Identity::Uuid | Identity::Index), "{key}: `gpu` has to be a uuid or an index");
            let is_user = |key: &Key| matches!(key.is, Identity::Pid | Identity::ContainerId | Identity::Pod);
            ensure!(family.user.as_ref().is_none_or(is_user), "{key}: `user` has to be a pid, a container_id or a pod");
        }
        let is_of_container = |is: &Identity| !matches!(is, Identity::Uuid | Identity::Index | Identity::Pid);
        let wrong = mapping.labels.iter().find(|(_, is)| !is_of_container(is));
        ensure!(
            wrong.is_none(),
            "labels: {} has to be a namespace, pod, container, container_id or image",
            wrong.map_or("", |(name, _)| name)
        );
        let now = mapping.device_now.as_ref();
        ensure!(now.is_none_or(|family| family.kind.is_gauge()), "device_now: `kind` has to be percent or ratio");
        ensure!(mapping.device.is_some() || mapping.user.is_some(), "there is neither `device` nor `user` to score");
        Ok(mapping)
    }

    /// The current utilization of a GPU.
    pub fn gauge(&self) -> Option<&Family> {
        self.device_now.as_ref().or(self.device.as_ref().filter(|family| family.kind.is_gauge()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAMILY: &str = "metric = 'm'\nkind = 'percent'\ngpu = { label = 'index', is = 'index' }\n";

    #[test]
    fn each_file_of_this_package_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("mappings");
        let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(!files.is_empty());
        for file in files {
            Mapping::read(&file).unwrap();
        }
    }

    #[test]
    fn mistakes_are_named() {
        let cases = [
            ("name = 'x'".to_owned(), "neither `device` nor `user`"),
            (format!("name = 'x'\n[user]\n{FAMILY}"), "needs the key `user`"),
            (format!("name = 'x'\n[device_energy]\n{FAMILY}"), "watts, joules"),
            (format!("name = 'x'\nnmae = 'y'\n[device]\n{FAMILY}"), "nmae"),
            (format!("name = 'x'\n[device]\n{}", FAMILY.replace("percent", "joules")), "percent, ratio"),
            (format!("name = 'x'\n[device]\n{}", FAMILY.replace("is = 'index'", "is = 'pod'")), "a uuid or an index"),
            (format!("name = 'x'\n[user]\n{FAMILY}user = {{ label = 'x', is = 'image' }}"), "a pid, a container_id or a pod"),
            (format!("name = 'x'\n[device]\n{FAMILY}[labels]\npid = 'pid'"), "labels: pid"),
        ];
        for (text, expect) in cases {
            let error = format!("{:#}", Mapping::parse(&text).unwrap_err());
            assert!(error.contains(expect), "{error}");
        }
    }
}
