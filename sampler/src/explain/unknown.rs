//! Why the subject of an explanation is not known.

use std::path::Path;

use sampler_core::identity::{KEEP_EXITED_NS, KEEP_REMOVED_NS};

use crate::health::condition::CGROUPS_REMEDY;
use crate::observe::kernel::Mode;
use crate::observe::kernel::proc::{is_zombie, thread_group};

/// Maximum number of ids in a message.
const SEVERAL: usize = 4;
const KEEP_EXITED_S: u64 = KEEP_EXITED_NS / 1_000_000_000;

/// Normalizes an id copied from other tools, such as `containerd://1AB..`.
pub fn plain_id(input: &str) -> String {
    let scheme = input.trim().rsplit_once("://");
    let bare = scheme.map_or(input.trim(), |(_, id)| id);
    // A name given with ctr may have upper case, an id of an engine never has.
    let is_engine_id = (scheme.is_some() || bare.len() == 64) && bare.bytes().all(|b| b.is_ascii_hexdigit());
    if is_engine_id { bare.to_ascii_lowercase() } else { bare.trim_start_matches('/').to_owned() }
}

/// Why a container was not found.
pub fn no_container(id: &str, with_prefix: &[String]) -> String {
    match with_prefix {
        [] => format!(
            "no container has an id that begins with {id}, or this name; it may have ended: a running agent keeps containers for {} s \
             after their end, `docker ps -a` or `crictl ps -a` show them longer",
            KEEP_REMOVED_NS / 1_000_000_000
        ),
        several => {
            let more = if several.len() > SEVERAL { ", .." } else { "" };
            let first: Vec<&str> = several.iter().take(SEVERAL).map(String::as_str).collect();
            format!("{} container ids begin with {id}: {}{more}; specify more of the id", several.len(), first.join(", "))
        }
    }
}

/// Why a PID was not found, as far as /proc and the kernel mode show. `mode` is `None` if no agent runs.
pub fn why_unknown(procfs: &Path, pid: u32, mode: Option<Mode>) -> String {
    match thread_group(procfs, pid) {
        Some(thread_group) if thread_group != pid => {
            format!("{pid} is a thread of the process {thread_group}; use --pid {thread_group}")
        }
        Some(_) if is_zombie(procfs, pid) => format!("the process {pid} has ended (a zombie), and its cgroup was not recorded"),
        Some(_) => format!("the process {pid} exists, but its cgroups cannot be read from here: {CGROUPS_REMEDY}"),
        None => match mode {
            Some(Mode::RawTracepoint) => {
                format!("there is no process with PID {pid}, and none has ended within the last {KEEP_EXITED_S} s")
            }
            Some(mode) => format!(
                "there is no process with PID {pid}; in kernel mode {} an ended process is known only if the driver reported it before",
                mode.name()
            ),
            None => format!(
                "there is no process with PID {pid}; ended processes are known only to a running agent (`gpu-sampler run`)"
            ),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_copied_from_other_tools_are_normalized() {
        for (input, expect) in [
            ("containerd://1ab4", "1ab4"),
            ("docker://1AB4", "1ab4"),
            ("CAFE", "CAFE"),
            (" 1ab4\n", "1ab4"),
            ("/web", "web"),
            ("Trainer", "Trainer"),
            ("", ""),
        ] {
            assert_eq!(plain_id(input), expect, "{input:?}");
        }
        assert!(no_container("1", &["1a".into(), "1b".into()]).contains("2 container ids begin with 1: 1a, 1b; specify more"));
        assert!(no_container("x", &[]).contains("no container has an id that begins with x"));
    }
}
