//! Aggregation: a pure fold of facts into sums. Facts are its only input, so a replay of a session gives the same result as live use.

mod clients;
mod coactivity;
mod device;
mod divide;
mod energy;
mod engine_account;
mod exits;
mod holders;
mod naming;
mod settings;
mod standard_error;
mod throttle;
mod waits;
mod windows;

use std::sync::Arc;

pub use coactivity::{COACTIVITY_WINDOW_NS, Part, QUERIED_RATIO, Window, is_user};
pub use device::{DeviceAccount, Duty};
pub use divide::{NAMED_NEIGHBOURS, QUERIED_NEIGHBOURS, WAIT_NS};
pub use engine_account::Credit;
pub use holders::Held;
pub use settings::{Range, SATURATION_RATIO, Settings, WINDOW_NS};
pub use waits::{Waits, window_parts};

use crate::fact::{AttributedProcess, Fact, GpuFact, User};
use crate::units::{BootNs, ContainerKey, WallTime};
use exits::Lifetimes;

/// A device that is gone is kept for this long, so that its last values can be scraped.
const KEEP_GONE_NS: u64 = 300_000_000_000;
/// Maximum number of device slots: session files are untrusted, and a number in one must not determine the memory use.
const SLOTS: usize = 4096;

/// The user that a sample with these processes names.
pub fn named(processes: &[AttributedProcess]) -> Option<User> {
    exits::NamedUser::from_processes(processes).map(|named| named.user)
}

#[derive(Debug, Default)]
pub struct Aggregate {
    settings: Settings,
    gpus: Vec<Option<DeviceAccount>>,
    lifetimes: Lifetimes,
    pub waits: Waits,
    pub now: BootNs,
    pub wall: WallTime,
}

impl Aggregate {
    pub fn new(settings: Settings) -> Self {
        Self { settings, ..Self::default() }
    }

    pub fn apply(&mut self, fact: &Fact) {
        match fact {
            Fact::Time { at, wall } => self.advance(*at, *wall),
            Fact::Gpu { gpu, at, fact } => self.gpu_fact(*gpu as usize, *at, fact),
            Fact::Container(container) => self.lifetimes.created(container.key, container.created),
            Fact::ContainerGone { key, at } => self.lifetimes.gone(*key, *at),
            Fact::ContainerForgotten { key } if !self.settings.keep_history => {
                self.lifetimes.forget(*key);
                self.waits.forget(*key);
                for gpu in self.gpus.iter_mut().flatten() {
                    gpu.forget(|known| known == key);
                }
            }
            // A report compares windows by itself, with all of the session known.
            Fact::Waited(wait) if !self.settings.keep_history => self.waits.apply(wait),
            Fact::ContainerForgotten { .. }
            | Fact::Labels(_)
            | Fact::Comm { .. }
            | Fact::Pressure(_)
            | Fact::Waited(_)
            | Fact::WaitProbe(_)
            | Fact::Engine(_)
            | Fact::Experiment(_) => {}
        }
    }

    fn gpu_fact(&mut self, slot: usize, at: BootNs, fact: &GpuFact) {
        if slot >= SLOTS {
            return;
        }
        if self.gpus.len() <= slot {
            self.gpus.resize_with(slot + 1, || None);
        }
        let Some(account) = self.gpus.get_mut(slot) else { return };
        match (account, fact) {
            (Some(gpu), fact) => gpu.apply(at, fact, &self.lifetimes),
            (account @ None, GpuFact::Opened(info)) => *account = Some(DeviceAccount::new(Arc::clone(info), at, self.settings)),
            // Facts about a device that was never opened are ignored.
            (None, _) => {}
        }
    }

    fn advance(&mut self, at: BootNs, wall: WallTime) {
        self.now = self.now.max(at);
        self.wall = wall;
        let (now, lifetimes) = (self.now, &self.lifetimes);
        for slot in &mut self.gpus {
            let expired = slot.as_ref().and_then(|gpu| gpu.gone).is_some_and(|at| now.saturating_since(at) > KEEP_GONE_NS);
            if expired && !self.settings.keep_history {
                *slot = None;
            }
        }
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.advance(now, |key| !lifetimes.is_gone(key));
        }
        self.advance_waits();
    }

    fn advance_waits(&mut self) {
        let is_needed = self.waits.is_needed(self.now);
        for (slot, gpu) in self.gpus.iter_mut().enumerate() {
            let Some(gpu) = gpu else { continue };
            for (number, window) in gpu.coactivity.take_closed(is_needed) {
                let is_saturated = window.saturated(self.settings.saturation_ratio);
                self.waits.closed(slot, number, &window, is_saturated);
            }
        }
        self.waits.settle(self.now);
    }

    /// Ends the input: waiting samples are divided, windows are closed.
    pub fn finish(&mut self) {
        for gpu in self.gpus.iter_mut().flatten() {
            gpu.finish(&self.lifetimes);
        }
    }

    pub fn has_gpu(&self, slot: usize) -> bool {
        self.gpus.get(slot).is_some_and(Option::is_some)
    }

    /// By slot.
    pub fn gpus(&self) -> impl Iterator<Item = (usize, &DeviceAccount)> {
        self.gpus.iter().enumerate().filter_map(|(slot, gpu)| Some((slot, gpu.as_ref()?)))
    }

    /// Whether the container has credits on any GPU.
    pub fn credits(&self, key: ContainerKey) -> bool {
        self.gpus.iter().flatten().any(|gpu| gpu.credits_any(User::Container(key)))
    }
}
