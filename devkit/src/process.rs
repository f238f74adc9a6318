//! Processes of this machine.

use std::fs;

/// In clock ticks since boot: with the PID, the identity of a process. `None` if there is none of this PID, or a zombie.
pub fn start_time(pid: u32) -> Option<u64> {
    start_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Processor time so far, in user and in kernel mode; seconds, in steps of 10 ms.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ProcessorTime {
    /// Also of threads that have ended.
    pub own: f64,
    /// Of children that were waited for.
    pub children: f64,
}

/// `None` if there is no process of this PID.
pub fn processor_time(pid: u32) -> Option<ProcessorTime> {
    time_in(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn time_in(stat: &str) -> Option<ProcessorTime> {
    let mut ticks = fields(stat)?.skip(11).map(str::parse::<f64>);
    let mut sum = || Some((ticks.next()?.ok()? + ticks.next()?.ok()?) / 100.0);
    Some(ProcessorTime { own: sum()?, children: sum()? })
}

/// The fields from the state on.
fn fields(stat: &str) -> Option<std::str::Split<'_, char>> {
    // The name before the last bracket may contain anything.
    Some(stat.rsplit_once(") ")?.1.split(' '))
}

fn start_in(stat: &str) -> Option<u64> {
    let mut fields = fields(stat)?;
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
    fn processor_time_is_that_of_the_process_and_of_its_children() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 90 0 0 0 150 25 300 40 20 0 1 0 5551 8192 100\n";
        assert_eq!(time_in(stat), Some(ProcessorTime { own: 1.75, children: 3.4 }));
        assert_eq!((time_in("7 (a) S 1"), processor_time(u32::MAX)), (None, None));
        assert!(processor_time(std::process::id()).is_some());
    }

    #[test]
    fn names_may_contain_brackets_and_zombies_do_not_count() {
        let stat = |state: &str| format!("7 (a) Z (b) {state} 1 7 7 0 -1 4194304 90 0 0 0 1 2 3 4 20 0 1 0 5551 8192 100\n");
        assert_eq!(start_in(&stat("S")), Some(5551));
        assert_eq!((start_in(&stat("Z")), start_in(&stat("X")), start_in("")), (None, None, None));
    }
}
