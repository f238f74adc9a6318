//! The pid namespace of this process.

/// The inode of the initial pid namespace (PROC_PID_INIT_INO). In any other one the driver's pids name other processes.
const INIT_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Why the driver's pids cannot be matched here; `None` in the host's pid namespace.
pub fn problem() -> Option<String> {
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(link) if link.as_os_str() == INIT_PID_NAMESPACE => None,
        Ok(_) => Some(
            "not in the host's pid namespace: the driver's pids cannot be matched; run with hostPID: true or --pid=host".into(),
        ),
        Err(error) => Some(format!("the pid namespace is not known: /proc/self/ns/pid: {error}")),
    }
}
