//! The pure fold: facts in, sums out. It sees nothing but facts, so a replay of a session gives what live gave.

mod coactivity;
mod device;
mod divide;
mod engine_account;
mod exits;
mod holders;
mod settings;
mod standard_error;
mod windows;

use std::sync::Arc;

pub use coactivity::{Part, QUERIED_RATIO, TOGETHER_NS, Window, is_user};
pub use device::{DeviceAccount, Duty};
pub use divide::{NAMED_NEIGHBOURS, QUERIED_NEIGHBOURS, WAIT_NS};
pub use engine_account::Credit;
pub use holders::Held;
pub use settings::{Range, SATURATION_RATIO, Settings, WINDOW_NS};

use crate::fact::{AttributedProcess, Fact, GpuFact, User};
use crate::units::{BootNs, ContainerKey, WallTime};
use exits::Lifetimes;

/// A device that is gone stays for who scrapes its last values.
const KEEP_GONE_NS: u64 = 300_000_000_000;
/// Slots of devices: files come from anywhere, and a number in one must not decide how much memory is taken.
const SLOTS: usize = 4096;
/// Whom a tick of these rows names.
pub fn named(rows: &[AttributedProcess]) -> Option<User> {
    exits::NamedUser::of(rows).map(|named| named.user)
}

#[derive(Debug, Default)]
pub struct Aggregate {
    settings: Settings,
    gpus: Vec<Option<DeviceAccount>>,
    lifetimes: Lifetimes,
    pub now: BootNs,
    pub wall: WallTime,
}

impl Aggregate {
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    pub fn apply(&mut self, fact: &Fact) {
        match fact {
            Fact::Time { at, wall } => self.passed(*at, *wall),
            Fact::Gpu { gpu, at, fact } => self.gpu_fact(*gpu as usize, *at, fact),
            Fact::Container(container) => {
                self.lifetimes.created(container.key, container.created);
            }
            Fact::ContainerGone { key, at } => {
                self.lifetimes.gone(*key, *at);
            }
            Fact::ContainerForgotten { key } => {
                if !self.settings.keep_history {
                    self.lifetimes.forget(*key);
                    for gpu in self.gpus.iter_mut().flatten() {
                        gpu.forget(|known| known == key);
                    }
                }
            }
            Fact::Labels(_) | Fact::Comm { .. } | Fact::Pressure(_) => {}
        }
    }

    fn gpu_fact(&mut self, slot: usize, at: BootNs, fact: &GpuFact) {
        if slot >= SLOTS {
            return;
        }
        if self.gpus.len() <= slot {
            self.gpus.resize_with(slot + 1, || None);
        }
        let Some(place) = self.gpus.get_mut(slot) else { return };
        match (place, fact) {
            (Some(gpu), fact) => gpu.apply(at, fact, &self.lifetimes),
            (place @ None, GpuFact::Opened(info)) => *place = Some(DeviceAccount::new(Arc::clone(info), at, self.settings)),
            // Of a device that was never told of there is nothing to count.
            (None, _) => {}
        }
    }

    fn passed(&mut self, at: BootNs, wall: WallTime) {
        self.now = self.now.max(at);
        self.wall = wall;
        let (now, lifetimes) = (self.now, &self.lifetimes);
        for slot in &mut self.gpus {
            let left = slot.as_ref().and_then(|gpu| gpu.gone).is_some_and(|at| now.saturating_since(at) > KEEP_GONE_NS);
            if left && !self.settings.keep_history {
                *slot = None;
            }
        }
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.passed(now, |key| !lifetimes.is_gone(key));
        }
    }

    /// Nothing more will come: what waits is divided, windows are closed.
    pub fn finish(&mut self) {
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.finish(&self.lifetimes);
        }
    }

    pub fn knows(&self, slot: usize) -> bool {
        self.gpus.get(slot).is_some_and(Option::is_some)
    }

    /// By slot.
    pub fn gpus(&self) -> impl Iterator<Item = (usize, &DeviceAccount)> {
        self.gpus.iter().enumerate().filter_map(|(slot, gpu)| Some((slot, gpu.as_ref()?)))
    }

    /// GPUs whose credits are of it.
    pub fn credits(&self, key: ContainerKey) -> bool {
        self.gpus.iter().flatten().any(|gpu| gpu.credits_any(key))
    }
}
