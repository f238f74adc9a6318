//! Finds serving engines: processes of containers with GPUs that run a known program, and the TCP sockets on which they listen.
//!
//! Command lines and sockets are what a tenant chose: they decide what is read inside that container, and nothing else. Ports are ordered,
//! because a request to a port of another protocol may disturb it: first the port of the command line, then the engine's default, then the
//! other ports below the ephemeral ones, and at most [`MAX_PORTS`] in all.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sampler_core::identity::ContainerRecord;
use sampler_core::units::{BootNs, ContainerKey};

use super::listeners::{self, ListeningSocket};
use crate::engine_rules::EngineRules;
use crate::observe::kernel::proc::{directory, living_thread};

/// Engines in one container.
const MAX_PER_CONTAINER: usize = 4;
/// Processes of one container, and cgroups below its own, that are examined.
const MAX_PIDS: usize = 512;
const MAX_FOLDERS: usize = 64;
/// Of the list of processes of one cgroup: several times [`MAX_PIDS`].
const MAX_LIST_BYTES: u64 = 64 << 10;
/// Processes by one rule of which the sockets are read: a launcher, its server and one worker for each GPU have the same command line.
const MAX_PROCESSES: usize = 16;
/// Descriptors that are read in one search of a container, some 20 ms: an engine has hundreds.
const MAX_LINKS: usize = 16_384;
/// Network namespaces of a container of which the sockets are read in one search; it usually has one.
const MAX_NAMESPACES: usize = 16;
/// Of a command line: models and flags come first.
const MAX_COMMAND_BYTES: u64 = 16 << 10;
/// Ports of one engine that are tried.
const MAX_PORTS: usize = 4;
/// The kernel's default range of ports for outgoing connections, which libraries also use for connections among processes.
const FIRST_EPHEMERAL: u16 = 32_768;

/// A serving engine in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundEngine {
    pub key: ContainerKey,
    pub rules: Arc<EngineRules>,
    pub pid: u32,
    /// With the PID, identifies the process. With a resolution of 10 ms.
    pub start: BootNs,
    /// Where its metrics may be, most likely first. Empty if it does not listen, or if its sockets cannot be read.
    pub addresses: Vec<SocketAddr>,
    /// Why `addresses` is empty.
    pub problem: Option<String>,
}

/// How a known engine is recognized, and where it listens by default.
struct KnownProgram {
    name: &'static str,
    runs: fn(&[&str]) -> bool,
    port_flags: &'static [&'static str],
    default_ports: &'static [u16],
}

const PROGRAMS: [KnownProgram; 4] = [
    KnownProgram { name: "vllm", runs: runs_vllm, port_flags: &["--port"], default_ports: &[8000] },
    KnownProgram { name: "sglang", runs: runs_sglang, port_flags: &["--port"], default_ports: &[30_000] },
    KnownProgram { name: "triton", runs: runs_triton, port_flags: &["--metrics-port"], default_ports: &[8002] },
    KnownProgram { name: "tgi", runs: runs_tgi, port_flags: &["--port", "-p"], default_ports: &[80, 3000] },
];

fn base(word: &str) -> &str {
    word.rsplit('/').next().unwrap_or(word)
}

/// Whether a word is the module, or a module below it: `vllm.entrypoints.openai.api_server` is below `vllm.entrypoints`.
fn is_module(word: &str, module: &str) -> bool {
    word.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn has_verb(words: &[&str], program: &str, verb: &str) -> bool {
    // The interpreter, or the script itself, comes first.
    words.windows(2).take(3).any(|pair| base(pair[0]) == program && pair[1] == verb)
}

fn runs_vllm(words: &[&str]) -> bool {
    has_verb(words, "vllm", "serve") || words.iter().any(|word| is_module(word, "vllm.entrypoints"))
}

fn runs_sglang(words: &[&str]) -> bool {
    has_verb(words, "sglang", "serve") || words.iter().any(|word| is_module(word, "sglang.launch_server"))
}

fn runs_triton(words: &[&str]) -> bool {
    words.first().is_some_and(|word| base(word) == "tritonserver")
}

fn runs_tgi(words: &[&str]) -> bool {
    let names = ["text-generation-launcher", "text-generation-router", "text-generation-server"];
    words.iter().take(2).any(|word| names.contains(&base(word)))
}

/// A rule of an unknown engine matches a program, script or module of its name.
fn runs_named(words: &[&str], name: &str) -> bool {
    words.iter().take(3).any(|word| base(word) == name || is_module(word, name))
}

fn program(name: &str) -> Option<&'static KnownProgram> {
    PROGRAMS.iter().find(|program| program.name == name)
}

fn matches(rules: &EngineRules, words: &[&str]) -> bool {
    program(&rules.name).map_or_else(|| runs_named(words, &rules.name), |program| (program.runs)(words))
}

/// The port that the command line states, by the first of the flags that it has.
fn stated_port(words: &[&str], flags: &[&str]) -> Option<u16> {
    flags.iter().find_map(|flag| {
        let mut words = words.iter();
        words
            .find_map(|word| match word.strip_prefix(flag) {
                Some("") => Some(None),
                Some(value) => Some(Some(value.strip_prefix('=')?)),
                None => None,
            })
            .and_then(|value| value.or_else(|| words.next().copied()))
            .and_then(|value| value.parse().ok())
    })
}

/// The sockets in the order in which they are tried.
fn ordered(sockets: &[ListeningSocket], words: &[&str], rules: &EngineRules) -> Vec<SocketAddr> {
    let known = program(&rules.name);
    let stated = stated_port(words, known.map_or(&["--port"], |program| program.port_flags));
    let defaults = known.map_or(&[][..], |program| program.default_ports);
    let rank = |port: u16| match stated {
        Some(stated) if stated == port => Some(0),
        _ => defaults
            .iter()
            .position(|default| *default == port)
            .map(|n| 1 + n)
            .or_else(|| (port < FIRST_EPHEMERAL).then(|| 1 + defaults.len())),
    };
    let mut ranked: Vec<(usize, SocketAddr)> =
        sockets.iter().filter_map(|socket| Some((rank(socket.address.port())?, socket.address))).collect();
    ranked.sort_by_key(|(rank, address)| (*rank, address.port(), *address));
    let mut ports: Vec<u16> = Vec::new();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for (_, listening) in ranked {
        let is_new = !ports.contains(&listening.port());
        if is_new && ports.len() >= MAX_PORTS {
            break;
        }
        if is_new {
            ports.push(listening.port());
        }
        addresses.extend(
            listeners::reachable(listening).into_iter().filter(|address| !addresses.contains(address)).collect::<Vec<_>>(),
        );
    }
    addresses
}

/// A process of the container that runs an engine.
struct EngineProcess {
    pid: u32,
    start: BootNs,
    words: Vec<String>,
}

impl EngineProcess {
    fn words(&self) -> Vec<&str> {
        self.words.iter().map(String::as_str).collect()
    }
}

fn command(process: &Path) -> Vec<String> {
    let mut bytes = Vec::new();
    let read = fs::File::open(process.join("cmdline")).and_then(|file| file.take(MAX_COMMAND_BYTES).read_to_end(&mut bytes));
    // A process that has ended, or a kernel thread.
    if read.is_err() {
        return Vec::new();
    }
    bytes.split(|b| *b == 0).filter(|word| !word.is_empty()).map(|word| String::from_utf8_lossy(word).into_owned()).collect()
}

/// Where processes and cgroups are read.
pub struct EngineFinder {
    pub procfs: PathBuf,
    /// Mount points of the cgroup hierarchies that are followed.
    pub mounts: Vec<PathBuf>,
}

impl EngineFinder {
    /// The engines of one container, and how they can be reached.
    pub fn find(&self, record: &ContainerRecord, rules: &[Arc<EngineRules>]) -> Vec<FoundEngine> {
        let pids = self.pids(&record.cgroup_path);
        let mut by_rules: BTreeMap<usize, Vec<EngineProcess>> = BTreeMap::new();
        for pid in &pids {
            let folder = self.folder(*pid);
            let words = command(&folder);
            let refs: Vec<&str> = words.iter().map(String::as_str).collect();
            let Some(n) = rules.iter().position(|rules| matches(rules, &refs)) else { continue };
            // Read after the command line: a PID that was reused has another start.
            let processes = by_rules.entry(n).or_default();
            if processes.len() < MAX_PROCESSES
                && let Ok(Some((_, start))) = living_thread(&folder)
            {
                processes.push(EngineProcess { pid: *pid, start, words });
            }
        }
        let mut reads = SearchReads::default();
        let found =
            by_rules.into_iter().flat_map(|(n, processes)| self.instances(record.key, &rules[n], &processes, &pids, &mut reads));
        found.take(MAX_PER_CONTAINER).collect()
    }

    fn folder(&self, pid: u32) -> PathBuf {
        self.procfs.join(pid.to_string())
    }

    /// Processes in the container's cgroup and those below it, in ascending order.
    fn pids(&self, cgroup_path: &str) -> Vec<u32> {
        let mut pids = BTreeSet::new();
        let mut folders: VecDeque<PathBuf> =
            self.mounts.iter().filter_map(|mount| directory(mount, cgroup_path.as_bytes())).collect();
        for _ in 0..MAX_FOLDERS {
            let Some(folder) = folders.pop_front() else { break };
            pids.extend(listed(&folder.join("cgroup.procs")));
            let below = fs::read_dir(&folder).into_iter().flatten().flatten();
            folders.extend(
                below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|e| e.path()).take(MAX_FOLDERS),
            );
        }
        pids.into_iter().take(MAX_PIDS).collect()
    }

    /// One engine for each process that listens. An engine that does not listen itself may have other processes of the container do so.
    fn instances(
        &self,
        key: ContainerKey,
        rules: &Arc<EngineRules>,
        processes: &[EngineProcess],
        container_pids: &[u32],
        reads: &mut SearchReads,
    ) -> Vec<FoundEngine> {
        let Some(first) = processes.first() else { return Vec::new() };
        let engine = |process: &EngineProcess, addresses: Vec<SocketAddr>, problem: Option<String>| FoundEngine {
            key,
            rules: Arc::clone(rules),
            pid: process.pid,
            start: process.start,
            addresses,
            problem,
        };
        let mut claimed: BTreeSet<u64> = BTreeSet::new();
        let mut found = Vec::new();
        for process in processes {
            match self.listening(process.pid, &[process.pid], reads) {
                Ok(mut sockets) => {
                    // Children inherit sockets.
                    sockets.retain(|socket| claimed.insert(socket.inode));
                    let addresses = ordered(&sockets, &process.words(), rules);
                    if !addresses.is_empty() {
                        found.push(engine(process, addresses, None));
                    }
                }
                Err(error) => {
                    found.push(engine(process, Vec::new(), Some(error)));
                    break;
                }
            }
        }
        if !found.is_empty() {
            return found;
        }
        match self.listening(first.pid, container_pids, reads) {
            Ok(sockets) => {
                let addresses = ordered(&sockets, &first.words(), rules);
                let problem = addresses.is_empty().then(|| reads.silence(first.pid));
                vec![engine(first, addresses, problem)]
            }
            Err(error) => vec![engine(first, Vec::new(), Some(error))],
        }
    }

    /// The sockets in the network namespace of `pid` on which any of `owners` listens.
    fn listening(&self, pid: u32, owners: &[u32], reads: &mut SearchReads) -> Result<Vec<ListeningSocket>, String> {
        let folder = self.folder(pid);
        let error = |error: std::io::Error| {
            format!(
                "cannot read the sockets of process {pid}: {error}; the agent needs CAP_SYS_PTRACE for processes of other users"
            )
        };
        let mut inodes = BTreeSet::new();
        for owner in owners {
            match listeners::socket_inodes(&self.folder(*owner), &mut reads.links_left) {
                Ok(own) => inodes.extend(own),
                Err(other) if *owner == pid => return Err(error(other)),
                Err(_) => {}
            }
        }
        match reads.sockets(&folder) {
            Ok(Some(all)) => Ok(all.iter().filter(|socket| inodes.contains(&socket.inode)).copied().collect()),
            Ok(None) => Err(format!("its container has more than {MAX_NAMESPACES} network namespaces; this one is not examined")),
            // The process has ended.
            Err(_) if !folder.exists() => Ok(Vec::new()),
            Err(other) => Err(error(other)),
        }
    }
}

/// Processes in a `cgroup.procs`. Empty if the cgroup was removed.
fn listed(procs: &Path) -> Vec<u32> {
    let mut text = String::new();
    let read = fs::File::open(procs).and_then(|file| file.take(MAX_LIST_BYTES).read_to_string(&mut text));
    // Each number ends with a line feed: the last one of a list that is cut may not be whole.
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let pids = whole.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0);
    if read.is_ok() { pids.collect() } else { Vec::new() }
}

/// What one search of a container has read, and may still read.
struct SearchReads {
    links_left: usize,
    /// By network namespace.
    tables: BTreeMap<(u64, u64), Vec<ListeningSocket>>,
}

impl Default for SearchReads {
    fn default() -> Self {
        Self { links_left: MAX_LINKS, tables: BTreeMap::new() }
    }
}

impl SearchReads {
    /// The listening sockets of the network namespace of a process; `None` if too many namespaces were read.
    fn sockets(&mut self, process: &Path) -> std::io::Result<Option<&[ListeningSocket]>> {
        let namespace = listeners::network_namespace(process)?;
        if !self.tables.contains_key(&namespace) {
            if self.tables.len() >= MAX_NAMESPACES {
                return Ok(None);
            }
            self.tables.insert(namespace, listeners::of_namespace(process)?);
        }
        Ok(self.tables.get(&namespace).map(Vec::as_slice))
    }

    /// Why an engine has no address.
    fn silence(&self, pid: u32) -> String {
        if self.links_left == 0 {
            return format!(
                "process {pid}: none of the first {MAX_LINKS} descriptors of its container is a listening TCP socket"
            );
        }
        format!("process {pid} and its container listen on no TCP port below {FIRST_EPHEMERAL}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_rules::known;

    fn engine_of(command: &str) -> Option<String> {
        let words: Vec<&str> = command.split(' ').collect();
        known().iter().find(|rules| matches(rules, &words)).map(|rules| rules.name.clone())
    }

    #[test]
    fn engines_are_recognized_by_their_command_lines() {
        for (command, expect) in [
            ("/usr/bin/python3 /usr/local/bin/vllm serve meta/x --port 8001", Some("vllm")),
            ("vllm serve meta/x", Some("vllm")),
            ("python3 -m vllm.entrypoints.openai.api_server --model x", Some("vllm")),
            ("python -m sglang.launch_server --model-path x", Some("sglang")),
            ("/opt/tritonserver/bin/tritonserver --model-repository=/models", Some("triton")),
            ("text-generation-launcher --model-id x", Some("tgi")),
            ("/usr/bin/python3 /opt/conda/bin/text-generation-server serve x", Some("tgi")),
            ("python train.py --name vllm serve", None),
            ("vim vllm.entrypointsx", None),
            ("bash -c tritonserver", None),
        ] {
            assert_eq!(engine_of(command).as_deref(), expect, "{command}");
        }
        let other: EngineRules = "lmdeploy=/metrics,a=waiting".parse().unwrap();
        assert!(matches(&other, &["python3", "/usr/bin/lmdeploy", "serve"]) && matches(&other, &["python3", "-m", "lmdeploy.x"]));
        assert!(!matches(&other, &["cat", "a", "b", "lmdeploy"]));
    }

    #[test]
    fn ports_of_the_command_line_are_found() {
        let port = |command: &str, flags: &[&str]| stated_port(&command.split(' ').collect::<Vec<_>>(), flags);
        assert_eq!(port("vllm serve x --port 8001", &["--port"]), Some(8001));
        assert_eq!(port("vllm serve x --port=8002", &["--port"]), Some(8002));
        assert_eq!(port("a --http-port 80 --metrics-port 9001", &["--metrics-port", "--port"]), Some(9001));
        assert_eq!(port("vllm serve x --portal 8001", &["--port"]), None);
        assert_eq!(port("vllm serve x --port", &["--port"]), None);
    }

    #[test]
    fn the_most_likely_ports_come_first_and_ephemeral_ones_only_if_stated() {
        let socket = |address: &str| ListeningSocket { address: address.parse().unwrap(), inode: 1 };
        let rules = known();
        let of = |addresses: &[&str], command: &str| -> Vec<String> {
            let sockets: Vec<ListeningSocket> = addresses.iter().map(|address| socket(address)).collect();
            let words: Vec<&str> = command.split(' ').collect();
            ordered(&sockets, &words, &rules[0]).iter().map(ToString::to_string).collect()
        };
        let all = ["0.0.0.0:5555", "0.0.0.0:8000", "127.0.0.1:45000", "[::]:9000"];
        let expect = ["127.0.0.1:8000", "127.0.0.1:5555", "127.0.0.1:9000", "[::1]:9000"];
        assert_eq!(of(&all, "vllm serve x"), expect);
        assert_eq!(of(&all, "vllm serve x --port 45000")[0], "127.0.0.1:45000");
        let many: Vec<String> = (1..10).map(|n| format!("0.0.0.0:{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(of(&many, "vllm serve x").len(), MAX_PORTS);
    }

    #[test]
    fn sockets_are_read_once_for_each_network_namespace_and_within_the_limits_of_a_search() {
        let _listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let finder = EngineFinder { procfs: "/proc".into(), mounts: Vec::new() };
        let pid = std::process::id();
        let mut reads = SearchReads::default();
        let first = finder.listening(pid, &[pid], &mut reads).unwrap();
        // The table of the namespace is not read again.
        reads.tables.values_mut().for_each(Vec::clear);
        assert!(!first.is_empty() && finder.listening(pid, &[pid], &mut reads) == Ok(Vec::new()));
        assert!(reads.tables.len() == 1 && reads.links_left < MAX_LINKS && reads.silence(pid).contains("no TCP port below"));
        reads.tables = (0..MAX_NAMESPACES as u64).map(|n| ((0, n), Vec::new())).collect();
        assert!(finder.listening(pid, &[pid], &mut reads).is_err_and(|error| error.contains("more than 16 network namespaces")));
        let mut exhausted = SearchReads { links_left: 0, ..SearchReads::default() };
        assert_eq!(finder.listening(pid, &[pid], &mut exhausted), Ok(Vec::new()));
        assert!(exhausted.silence(pid).contains("none of the first 16384 descriptors"));
    }

    #[test]
    fn engines_are_found_by_the_processes_of_a_cgroup() {
        let root = tempfile::tempdir().unwrap();
        let (procfs, mount) = (root.path().join("proc"), root.path().join("cgroup"));
        std::fs::create_dir_all(mount.join("docker/x/inner")).unwrap();
        std::fs::write(mount.join("docker/x/cgroup.procs"), "7\n0\n").unwrap();
        std::fs::write(mount.join("docker/x/inner/cgroup.procs"), "8\n").unwrap();
        let long = "12345\n".repeat(MAX_LIST_BYTES as usize);
        std::fs::create_dir_all(mount.join("docker/y")).unwrap();
        std::fs::write(mount.join("docker/y/cgroup.procs"), long).unwrap();
        let finder = EngineFinder { procfs, mounts: vec![mount] };
        assert_eq!(finder.pids("/docker/x"), [7, 8]);
        assert_eq!(finder.pids("/docker/y"), [12345]);
        assert_eq!(finder.pids("/docker/../x"), [] as [u32; 0]);
    }
}
