//! The processes with memory on a GPU or a MIG device, in NVML's lists.

use crate::driver::{Driver, RESERVED_BYTES};
use crate::loads::Load;
use crate::world::{ListMemory, Unit};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    Compute,
    Graphics,
    Mps,
}

/// NVML's value for an unknown size: all ones.
pub const UNKNOWN_BYTES: u64 = u64::MAX;
pub const NO_INSTANCE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    pub pid: u32,
    pub bytes: u64,
    pub gi: u32,
    pub ci: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    pub reserved: u64,
    pub used: u64,
}

fn is_in(list: List, load: &Load) -> bool {
    match list {
        List::Graphics => load.ways.graphics,
        List::Mps => load.ways.mps && !load.ways.graphics,
        List::Compute => !load.ways.mps && !load.ways.graphics,
    }
}

impl Driver {
    /// The unit itself and, for a GPU, its MIG devices.
    fn parts(&self, unit: Unit) -> Vec<Unit> {
        let within = |u: &Unit| *u == unit || unit.mig.is_none() && u.gpu == unit.gpu;
        self.world.units().into_iter().filter(within).collect()
    }

    /// The current processes; a GPU's list includes those of its MIG devices.
    pub fn processes(&mut self, unit: Unit, list: List) -> anyhow::Result<Vec<Process>> {
        self.settle()?;
        let unknown = *self.world.list_memory(unit.gpu) == ListMemory::Unknown;
        let mut found: Vec<Process> = Vec::new();
        for part in self.parts(unit) {
            let (gi, ci) = self.world.mig(part).map_or((NO_INSTANCE, NO_INSTANCE), |mig| (mig.gi, mig.ci));
            let from = found.len();
            for load in self.log.loads.of(part).iter().filter(|l| l.end_us.is_none() && is_in(list, l)) {
                let bytes = if unknown { UNKNOWN_BYTES } else { load.memory_bytes };
                let pid = self.shown(load.pid);
                match found[from..].iter_mut().find(|p| p.pid == pid) {
                    Some(process) => process.bytes = process.bytes.saturating_add(bytes),
                    None => found.push(Process { pid, bytes, gi, ci }),
                }
            }
        }
        Ok(found)
    }

    pub fn memory(&mut self, unit: Unit) -> anyhow::Result<Memory> {
        self.settle()?;
        let total = self.world.memory_bytes(unit);
        let loads = self.parts(unit).into_iter().flat_map(|part| self.log.loads.of(part));
        let held: u64 = loads.filter(|l| l.end_us.is_none()).map(|l| l.memory_bytes).sum();
        // The driver's own part belongs to the GPU, not to one of its devices.
        let reserved = if unit.mig.is_some() { 0 } else { RESERVED_BYTES.min(total) };
        Ok(Memory { total, reserved, used: held.min(total - reserved) })
    }
}
