//! Selects the kernel mode: the best that works, determined by trying it, not by comparing versions.
//!
//! ```text
//!  raw_tracepoint  --refused-->  inotify  --refused-->  procfs
//! ```
//! A mode configured by name is the only one tried: if it does not work, the agent does not start.

use std::path::Path;

use super::layout::Layout;
use super::{KernelError, Mode, Tracker, load, refusal, watch};
use crate::config::KernelMode;

/// Where the kernel's interfaces are, and the size of the ring of process events.
pub struct KernelAccess<'a> {
    pub btf: &'a Path,
    pub procfs: &'a Path,
    pub sysfs: &'a Path,
    pub ring_bytes: u32,
}

/// The selected mode, and the reasons why better modes were refused.
pub struct Chosen {
    pub tracker: Tracker,
    pub refused: Vec<(Mode, KernelError)>,
}

fn try_mode(mode: Mode, layout: &Layout, kernel: &KernelAccess<'_>) -> Result<Tracker, KernelError> {
    match mode {
        Mode::RawTracepoint => {
            let v1 = layout.v1.as_ref().map(|(name, id, _)| (*name, *id));
            let program = load(v1, kernel.btf, kernel.ring_bytes);
            program
                .map(|program| Tracker::RawTracepoint(Box::new(program)))
                .map_err(|error| refusal::explain(error, kernel.procfs, kernel.sysfs))
        }
        Mode::Inotify => watch::CgroupWatch::new(layout).map(Tracker::Inotify).map_err(KernelError::Watch),
        Mode::Procfs => Ok(Tracker::Procfs),
    }
}

pub fn choose(wanted: KernelMode, layout: &Layout, kernel: &KernelAccess<'_>) -> Result<Chosen, KernelError> {
    let (better, last) = match wanted {
        KernelMode::Auto => (&[Mode::RawTracepoint, Mode::Inotify][..], Mode::Procfs),
        KernelMode::RawTracepoint => (&[][..], Mode::RawTracepoint),
        KernelMode::Inotify => (&[][..], Mode::Inotify),
        KernelMode::Procfs => (&[][..], Mode::Procfs),
    };
    let mut refused = Vec::new();
    for mode in better {
        match try_mode(*mode, layout, kernel) {
            Ok(tracker) => return Ok(Chosen { tracker, refused }),
            Err(error) => refused.push((*mode, error)),
        }
    }
    Ok(Chosen { tracker: try_mode(last, layout, kernel)?, refused })
}
