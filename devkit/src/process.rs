//! Processes of this machine.

use std::fs;

/// In clock ticks since boot: with the PID, the identity of a process. `None` if there is none of this PID, or a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    start_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn start_in(stat: &str) -> Option<u64> {
    // The name before the last bracket may contain anything.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_has_a_start_time() {
        assert!(start_time(std::process::id()).is_some_and(|time| time > 0));
        assert_eq!(start_time(u32::MAX), None);
    }

    #[test]
    fn names_may_contain_brackets_and_zombies_do_not_count() {
        let stat = |state: &str| format!("7 (a) Z (b) {state} 1 7 7 0 -1 4194304 90 0 0 0 1 2 3 4 20 0 1 0 5551 8192 100\n");
        assert_eq!(start_in(&stat("S")), Some(5551));
        assert_eq!((start_in(&stat("Z")), start_in(&stat("X")), start_in("")), (None, None, None));
    }
}
