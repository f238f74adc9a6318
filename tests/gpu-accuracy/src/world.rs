//! The worlds: the same users on four simulated GPUs below drivers that differ.

/// Draw of a GPU without work, and with work all of the time, as the simulated driver has it.
pub const IDLE_WATTS: f64 = 40.0;
pub const BUSY_WATTS: f64 = 260.0;

pub const GPUS: usize = 4;
/// The GPU of short-lived processes.
pub const SHORT: usize = 2;
/// The container of short-lived processes.
pub const SHORT_POD: &str = "short-lived";
pub const SHORT_LASTING: &str = "100ms..2s";
pub const SHORT_DEMAND: &str = "0.8";
/// GPUs that are never without work, on which a utilization of 0 is wrong.
pub const BUSY: [usize; 2] = [0, 1];

/// A container that works all of the time.
#[derive(Debug)]
pub struct Role {
    pub pod: &'static str,
    pub gpu: usize,
    /// Demands of its processes; a process without one only holds memory.
    pub demands: &'static [Option<f64>],
}

pub const ROLES: [Role; 4] = [
    Role { pod: "trainer", gpu: 0, demands: &[Some(0.6)] },
    Role { pod: "notebook", gpu: 0, demands: &[Some(0.3)] },
    Role { pod: "two-processes", gpu: 1, demands: &[Some(0.3), Some(0.2)] },
    Role { pod: "resident", gpu: 3, demands: &[None] },
];

#[derive(Debug)]
pub struct World {
    pub name: &'static str,
    pub about: &'static str,
    /// Keys of the world file; those in `{gpus}` belong to every GPU.
    settings: &'static str,
    /// Keys of one GPU.
    gpu: [&'static str; GPUS],
    /// Arguments of `nvml-sim fault` at a third of the run.
    pub fault: Option<&'static [&'static str]>,
}

impl World {
    /// The content of a world file of nvml-sim.
    pub fn file(&self) -> String {
        let gpus: String = self.gpu.iter().map(|keys| format!("[[gpus]]\n{keys}\n")).collect();
        format!("seed = 7\nenergy = true\n{}\n{gpus}", self.settings)
    }
}

pub const WORLDS: [World; 5] = [
    World {
        name: "plain",
        about: "driver 550; a sample names the process at its instant",
        settings: "driver_version = '550.54.14'",
        gpu: [""; GPUS],
        fault: None,
    },
    World {
        name: "driver-580",
        about: "driver 580.159.04 as measured on an H200: a sample names the last process of its period, and none that has ended",
        settings: "driver_version = '580.159.04'\npid_rule = 'last'\nexited_pids = 'blank'\naverage = 'over_all'\nnewer_by_us = 1",
        gpu: [""; GPUS],
        fault: None,
    },
    World {
        name: "slow-calls",
        about: "each driver call takes 1 ms, process lists 4.5 ms, one at a time",
        settings: "driver_version = '550.54.14'\none_lock = true\ncall_us = 1000\nlist_us = 4500",
        gpu: [""; GPUS],
        fault: None,
    },
    World {
        name: "clocks",
        about: "the clocks of the first two GPUs are 12 s ahead and 12 s behind",
        settings: "driver_version = '550.54.14'",
        gpu: ["clock_offset_us = 12000000", "clock_offset_us = -12000000", "", ""],
        fault: None,
    },
    World {
        name: "failures",
        about: "the calls of the first GPU fail for 10 s; the second returns garbage among its process samples",
        settings: "driver_version = '550.54.14'",
        gpu: ["", "garbage = ['util', 'pid_zero', 'pid_max', 'stale', 'exited', 'zombies']\ngarbage_every = 7", "", ""],
        fault: Some(&["--gpu", "0", "--kind", "error", "--error", "UNKNOWN", "--for", "10s"]),
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_files_are_valid() {
        let names: std::collections::BTreeSet<_> = WORLDS.iter().map(|world| world.name).collect();
        assert_eq!(names.len(), WORLDS.len());
        for world in &WORLDS {
            let parsed = nvidia_ml_sim::world::World::parse(&world.file()).unwrap();
            assert_eq!(parsed.gpus.len(), GPUS, "{}", world.name);
        }
    }
}
