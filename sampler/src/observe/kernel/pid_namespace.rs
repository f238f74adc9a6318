//! The PID namespace of this process.

/// The inode of the initial PID namespace (PROC_PID_INIT_INO). In any other namespace the driver's PIDs refer to other processes.
const INIT_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Why the driver's PIDs cannot be matched here; `None` in the host's PID namespace. The remedy is that of the condition
/// `pid-namespace`.
pub fn problem() -> Option<String> {
    match std::fs::read_link("/proc/self/ns/pid") {
        Ok(link) if link.as_os_str() == INIT_PID_NAMESPACE => None,
        Ok(_) => Some("not in the host's PID namespace, so the driver's PIDs cannot be matched".into()),
        Err(error) => Some(format!("cannot determine the PID namespace: /proc/self/ns/pid: {error}")),
    }
}
