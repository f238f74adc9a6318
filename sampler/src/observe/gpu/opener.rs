//! `gpu-open`: opens GPUs for gpu-watch, in a thread that is abandoned if a call hangs.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use nvml_wrapper::error::NvmlError;

use super::error::{GpuError, spawn};
use super::library::{Generation, Handle};

/// Time limit for opening one GPU, so that the other GPUs do not wait longer.
pub const PATIENCE: Duration = Duration::from_secs(2);

/// How a GPU is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OpenTarget {
    Index(u32),
    /// By its PCI address, which touches no other GPU; the index is its last one.
    Pci(u32, String),
}

impl OpenTarget {
    pub fn index(&self) -> u32 {
        match self {
            OpenTarget::Index(index) | OpenTarget::Pci(index, _) => *index,
        }
    }
}

/// A GPU that could be opened and answers.
pub struct OpenedGpu {
    pub handle: Handle,
    pub uuid: String,
    pub pci_bus_id: Option<String>,
    /// Number of its device node.
    pub minor: Option<u32>,
}

type OpenResult = Result<OpenedGpu, NvmlError>;

fn open(generation: &Arc<Generation>, target: &OpenTarget) -> OpenResult {
    let handle = match target {
        OpenTarget::Index(index) => Handle::by_index(generation, *index)?,
        OpenTarget::Pci(_, bus_id) => Handle::by_pci(generation, bus_id)?,
    };
    let device = handle.device();
    let uuid = device.uuid()?;
    // The driver returns a handle even for a lost device, so a call is made that needs it.
    if let Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired)) = device.memory_info() {
        return Err(error);
    }
    let (pci_bus_id, minor) = (device.pci_info().ok().map(|pci| pci.bus_id), device.minor_number().ok());
    Ok(OpenedGpu { uuid, pci_bus_id, minor, handle })
}

/// Starts a thread that opens these GPUs. Its channel has no capacity, so that it stops once the receiver is dropped.
fn start(generation: &Arc<Generation>, targets: Vec<OpenTarget>) -> Result<Receiver<(u32, OpenResult)>, GpuError> {
    let (to, opened) = sync_channel(0);
    let generation = Arc::clone(generation);
    spawn("gpu-open", move || {
        let _given_up = targets.iter().try_for_each(|target| to.send((target.index(), open(&generation, target))));
    })?;
    Ok(opened)
}

/// The threads that open GPUs.
#[derive(Default)]
pub struct Opener {
    /// Indices of GPUs for which the opening thread hangs.
    hanging: HashMap<u32, Receiver<(u32, OpenResult)>>,
}

impl Opener {
    /// How many threads hang.
    pub fn hanging(&self) -> usize {
        self.hanging.len()
    }

    /// Forgets the threads that have ended. One that still hangs after the library was closed is kept: another try would hang, too.
    pub fn forget_ended(&mut self) {
        self.hanging.retain(|_, thread| matches!(thread.try_recv(), Err(TryRecvError::Empty)));
    }

    /// Opens these GPUs; `None` for GPUs of which the calls do not return.
    pub fn open_all(&mut self, generation: &Arc<Generation>, targets: Vec<OpenTarget>) -> Vec<(u32, Option<OpenResult>)> {
        self.forget_ended();
        let (mut all, mut left) = (Vec::new(), VecDeque::new());
        for target in targets {
            if self.hanging.contains_key(&target.index()) {
                all.push((target.index(), None));
            } else {
                left.push_back(target);
            }
        }
        while !left.is_empty() {
            let Ok(opened) = start(generation, left.iter().cloned().collect()) else { break };
            let hangs = loop {
                match opened.recv_timeout(PATIENCE) {
                    Ok((index, result)) => {
                        left.pop_front();
                        all.push((index, Some(result)));
                    }
                    Err(RecvTimeoutError::Timeout) => break left.pop_front(),
                    Err(RecvTimeoutError::Disconnected) => break None,
                }
            };
            let Some(target) = hangs else { break };
            all.push((target.index(), None));
            self.hanging.insert(target.index(), opened);
        }
        // No thread could be started.
        all.extend(left.into_iter().map(|target| (target.index(), None)));
        all.sort_unstable_by_key(|(index, _)| *index);
        all
    }
}
