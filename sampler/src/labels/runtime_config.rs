//! Paths in the configuration files of runtimes and kubelets. An unreadable or invalid file counts as empty: then the defaults apply, as
//! far as this program knows them.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::root::Root;
use super::source::file;

/// Longer files are truncated.
pub const MAX_TEXT_BYTES: u64 = 256 << 10;
/// Files of a folder of configuration files; a machine has a handful.
const MAX_DROP_INS: usize = 64;
/// The depth of folders in such a folder.
const MAX_DEPTH: usize = 3;

pub fn read(root: &Root, host: &str) -> Option<Vec<u8>> {
    // Without the file the defaults apply.
    file::beginning(&root.path(Path::new(host)), MAX_TEXT_BYTES).ok()
}

fn text(root: &Root, host: &str) -> String {
    read(root, host).map(|text| String::from_utf8_lossy(&text).into_owned()).unwrap_or_default()
}

/// The files in a folder and in its folders, in lexical order.
fn files_in(root: &Root, host: &Path, depth: usize) -> Vec<PathBuf> {
    let mut names: Vec<_> =
        fs::read_dir(root.path(host)).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    let mut found = Vec::new();
    for name in names.into_iter().take(MAX_DROP_INS) {
        let path = host.join(name);
        match root.path(&path).is_dir() {
            true if depth < MAX_DEPTH => found.extend(files_in(root, &path, depth + 1)),
            true => {}
            false => found.push(path),
        }
    }
    found.truncate(MAX_DROP_INS);
    found
}

/// The paths of CRI-O and containers/storage that a configuration names.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StoragePaths {
    #[serde(alias = "graphroot")]
    pub root: Option<String>,
    pub runroot: Option<String>,
    #[serde(skip)]
    pub listen: Option<String>,
}

impl StoragePaths {
    fn overlay(&mut self, over: StoragePaths) {
        let set = |value: Option<String>| value.filter(|value| !value.is_empty());
        self.root = set(over.root).or(self.root.take());
        self.runroot = set(over.runroot).or(self.runroot.take());
        self.listen = set(over.listen).or(self.listen.take());
    }
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CrioToml {
    crio: CrioTable,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CrioTable {
    #[serde(flatten)]
    paths: StoragePaths,
    api: CrioApi,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct CrioApi {
    listen: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct StorageConf {
    storage: StoragePaths,
}

/// CRI-O's file, then all files of its folder in lexical order, of any name; a later value takes precedence. Source: cri-o,
/// `pkg/config/config.go`, `UpdateFromPath`.
pub fn crio(root: &Root, file: &str, folder: &str) -> StoragePaths {
    // What CRI-O does not set comes from containers/storage.
    let mut paths = storage(root, "/etc/containers/storage.conf");
    for path in std::iter::once(PathBuf::from(file)).chain(files_in(root, Path::new(folder), 0)) {
        let read: CrioToml = toml::from_str(&text(root, &path.to_string_lossy())).unwrap_or_default();
        paths.overlay(StoragePaths { listen: read.crio.api.listen, ..read.crio.paths });
    }
    paths
}

/// `[storage] graphroot, runroot`.
pub fn storage(root: &Root, file: &str) -> StoragePaths {
    toml::from_str::<StorageConf>(&text(root, file)).unwrap_or_default().storage
}

/// A kubelet's configuration (YAML or JSON), then the files that amend it: `*.conf`, in lexical order.
fn kubelet_texts(root: &Root, file: Option<&str>, folder: Option<&str>) -> impl Iterator<Item = String> {
    let drop_ins = folder.into_iter().flat_map(|folder| files_in(root, Path::new(folder), 0));
    let drop_ins = drop_ins.filter(|path| path.extension().is_some_and(|extension| extension == "conf"));
    let files = file.map(PathBuf::from).into_iter().chain(drop_ins);
    files.map(|file| text(root, &file.to_string_lossy()))
}

/// `podLogsDir` of a kubelet's configuration.
pub fn pod_logs_dir(root: &Root, file: Option<&str>, folder: Option<&str>) -> Option<String> {
    kubelet_texts(root, file, folder).filter_map(|text| scalar(&text, "podLogsDir")).last()
}

/// Whether a kubelet's configuration has this feature gate, `NAME=VALUE`.
pub fn has_gate(root: &Root, file: Option<&str>, folder: Option<&str>, gate: &str) -> bool {
    let is_gate = |line: &str| {
        let line: String = line.chars().filter(|c| !c.is_whitespace() && !['"', '\'', '{', '}'].contains(c)).collect();
        line.split(',').any(|entry| entry.trim_start_matches("featureGates:").replacen(':', "=", 1) == gate)
    };
    kubelet_texts(root, file, folder).any(|text| text.lines().any(is_gate))
}

/// The value of a key at the top level, of a YAML or JSON document. Enough for paths; a file with the key in another form has no value.
fn scalar(text: &str, key: &str) -> Option<String> {
    if let Ok(json) = serde_json::from_str::<serde_json::Value>(text) {
        return json[key].as_str().map(str::to_owned);
    }
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let value = value.split(" #").next()?.trim().trim_matches(['"', '\'']);
    Some(value.to_owned()).filter(|value| value.starts_with('/'))
}

/// The flags in a file of arguments, one a line, as microk8s has it; `${NAME}` is replaced by a value of the environment.
pub fn arguments(root: &Root, file: &str, environment: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let expanded = |line: &str| {
        let mut out = String::new();
        let mut rest = line;
        while let Some((before, after)) = rest.split_once("${") {
            out += before;
            let Some((name, after)) = after.split_once('}') else { break };
            out += &environment(name).unwrap_or_default();
            rest = after;
        }
        out + rest
    };
    let lines = text(root, file);
    lines.lines().map(str::trim).filter(|line| line.starts_with('-')).map(expanded).collect()
}

/// The values in k3s' configuration that are flags of the kubelet: list items of the form `NAME=VALUE`, as flags.
pub fn k3s_kubelet_flags(root: &Root, file: &str) -> Vec<String> {
    let lines = text(root, file);
    let item = |line: &str| {
        let item = line.trim().strip_prefix("kubelet-arg:").map_or(line.trim(), str::trim);
        let item = item.trim_start_matches('-').trim().trim_matches(['"', '\'']);
        item.split_once('=').filter(|(name, _)| KUBELET_FLAGS.contains(name)).map(|_| format!("--{item}"))
    };
    lines.lines().filter_map(item).collect()
}

/// The kubelet's flags with paths, without their dashes.
pub const KUBELET_FLAGS: [&str; 4] = ["root-dir", "pod-logs-dir", "config", "config-dir"];

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = Root::new(dir.path());
        (dir, root)
    }

    #[test]
    fn the_last_file_of_crio_takes_precedence() {
        let (_dir, root) = host(&[
            ("etc/containers/storage.conf", "[storage]\ndriver = 'overlay'\ngraphroot = '/g'\nrunroot = '/storage-run'\n"),
            ("etc/crio/crio.conf", "[crio]\nroot = '/a'\n[crio.api]\nlisten = '/a.sock'\n[crio.runtime]\nx = 1\n"),
            ("etc/crio/crio.conf.d/10-b", "[crio]\nroot = '/b'\nrunroot = ''\n"),
            ("etc/crio/crio.conf.d/20-c.conf", "[crio.api]\nlisten = '/c.sock'\n"),
            ("etc/crio/crio.conf.d/30-invalid.conf", "[crio.api\nlisten = '/d.sock'\n"),
        ]);
        let text = |value: &str| Some(value.to_owned());
        let all = crio(&root, "/etc/crio/crio.conf", "/etc/crio/crio.conf.d");
        assert_eq!(all, StoragePaths { root: text("/b"), runroot: text("/storage-run"), listen: text("/c.sock") });
        let none = crio(&root, "/no/file", "/no/folder");
        assert_eq!(none, StoragePaths { root: text("/g"), runroot: text("/storage-run"), listen: None });
    }

    #[test]
    fn pod_logs_dir_is_read_from_yaml_and_json() {
        let (_dir, root) = host(&[
            ("k/config.yaml", "kind: KubeletConfiguration\npodLogsDir: \"/data/logs\" # moved\nx:\n  podLogsDir: /no\n"),
            ("k/config.json", r#"{"podLogsDir": "/json"}"#),
            ("k/d/10.conf", "podLogsDir: /first\n"),
            ("k/d/20.conf", "podLogsDir: /second\n"),
            ("k/d/30.yaml", "podLogsDir: /not-read\n"),
        ]);
        let read = |file, folder| pod_logs_dir(&root, file, folder);
        assert_eq!(read(Some("/k/config.yaml"), None).as_deref(), Some("/data/logs"));
        assert_eq!(read(Some("/k/config.json"), None).as_deref(), Some("/json"));
        assert_eq!(read(Some("/k/config.yaml"), Some("/k/d")).as_deref(), Some("/second"));
        assert_eq!((read(Some("/absent"), None), read(None, None)), (None, None));
        for (text, expect) in [
            ("featureGates:\n  A: true\n  CriStats: true\n", true),
            (r#"{"featureGates": {"A": true, "CriStats": true}}"#, true),
            ("featureGates:\n  CriStats: false\n", false),
            ("featureGates:\n  NotCriStats: true\n", false),
        ] {
            let (_dir, root) = host(&[("k", text)]);
            assert_eq!(has_gate(&root, Some("/k"), None, "CriStats=true"), expect, "{text}");
        }
    }

    #[test]
    fn flags_of_embedded_kubelets_are_read() {
        let (_dir, root) = host(&[
            ("args", "--root-dir=${SNAP_COMMON}/var/lib/kubelet\n# --x\n--other=${NONE}${\n"),
            ("k3s", "kubelet-arg:\n  - \"root-dir=/k\"\n  - max-pods=250\nnode-label: [a=b]\n"),
            ("one", "kubelet-arg: pod-logs-dir=/l\n"),
        ]);
        let environment = |name: &str| (name == "SNAP_COMMON").then(|| "/snap".to_owned());
        assert_eq!(arguments(&root, "/args", &environment), ["--root-dir=/snap/var/lib/kubelet", "--other=${"]);
        assert_eq!(k3s_kubelet_flags(&root, "/k3s"), ["--root-dir=/k"]);
        assert_eq!(k3s_kubelet_flags(&root, "/one"), ["--pod-logs-dir=/l"]);
        assert!(k3s_kubelet_flags(&root, "/absent").is_empty());
    }

    /// Configuration files of runtimes and kubelets: paths come from the file, and flags from its lines.
    #[test]
    fn fuzz_runtime_config() {
        let (dir, root) = host(&[("etc/file", "")]);
        let path = dir.path().join("etc/file");
        devkit::fuzz(file!(), "runtime_config", move |bytes| {
            fs::write(&path, bytes).unwrap();
            let file = "/etc/file";
            let paths = crio(&root, file, "/none");
            let all = [paths.root, paths.runroot, paths.listen, storage(&root, file).root, pod_logs_dir(&root, Some(file), None)];
            // A byte that is not text is replaced by a character of three.
            assert!(all.iter().flatten().all(|path| path.len() <= 3 * bytes.len()), "{all:?}");
            let _either = has_gate(&root, Some(file), None, "PodAndContainerStatsFromCRI=true");
            let value = |name: &str| (name == "SNAP").then(|| "/snap".to_owned());
            let flags = arguments(&root, file, &value);
            assert!(flags.iter().all(|flag| flag.starts_with('-')), "{flags:?}");
            let flags = k3s_kubelet_flags(&root, file);
            assert!(flags.iter().all(|flag| flag.starts_with("--") && flag.contains('=')), "{flags:?}");
        });
    }
}
