//! Which threads are in which driver call since when. The core thread looks four times a second; nothing here waits.
//!
//! ```text
//!  idle --enter--> in a call --2 s--> stalled (said once, again at 10 s, 1 min, 10 min) --leave--> idle (said)
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use sampler_core::units::BootNs;

use super::nvml_calls::Call;

/// A call this long is a stall; said again at each further age, so that what is said stays the same in between.
const AGES: [(u64, &str); 4] = [(2, "2 s"), (10, "10 s"), (60, "a minute"), (600, "ten minutes")];

/// One thread that calls the driver.
pub struct CallSlot {
    who: String,
    pub(super) uuid: Option<Arc<str>>,
    /// Boot time at which the call under way began; 0 is none.
    since: AtomicU64,
    call: AtomicU8,
    /// How many of [`AGES`] were said.
    said: AtomicU8,
    over: AtomicBool,
}

/// The thread's own end of its slot.
pub struct Caller {
    slot: Arc<CallSlot>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Stalled { who: String, message: String },
    Answers { who: String, message: String },
}

impl Caller {
    pub(super) fn new(slot: Arc<CallSlot>) -> Self {
        Self { slot }
    }

    pub fn slot(&self) -> Arc<CallSlot> {
        Arc::clone(&self.slot)
    }

    pub fn enter(&self, call: Call, now: BootNs) {
        self.slot.call.store(call as u8, Ordering::Relaxed);
        self.slot.since.store(now.0.max(1), Ordering::Release);
    }

    pub fn leave(&self) {
        self.slot.since.store(0, Ordering::Release);
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.leave();
        self.slot.end();
    }
}

impl CallSlot {
    pub(super) fn new(who: String, uuid: Option<Arc<str>>) -> Self {
        let (since, call, said) = (AtomicU64::new(0), AtomicU8::new(0), AtomicU8::new(0));
        Self { who, uuid, since, call, said, over: AtomicBool::new(false) }
    }

    /// Nobody waits for this thread any more: another has its work.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.said.load(Ordering::Relaxed) > 0
    }

    pub(super) fn watch(&self, now: BootNs) -> Option<Change> {
        let since = self.since.load(Ordering::Acquire);
        let age = if since == 0 || self.is_over() { 0 } else { now.0.saturating_sub(since) / 1_000_000_000 };
        let reached = AGES.iter().filter(|(seconds, _)| age >= *seconds).count();
        let before = self.said.swap(reached as u8, Ordering::Relaxed);
        if reached == usize::from(before) {
            return None;
        }
        let who = self.who.clone();
        let Some((_, for_long)) = reached.checked_sub(1).map(|n| AGES[n]) else {
            return Some(Change::Answers { who, message: "the driver answers again".into() });
        };
        let call = Call::ALL.get(usize::from(self.call.load(Ordering::Relaxed))).map_or("", |call| call.name());
        let what = match &self.uuid {
            Some(uuid) => {
                format!("samples of {uuid} are missing meanwhile, all else goes on; see dmesg for Xid lines, a reset may help")
            }
            None => "what it would tell is missing meanwhile, all else goes on".into(),
        };
        let message = format!("the driver has not answered {call} for {for_long}; {what}");
        Some(Change::Stalled { who, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_said_once_an_age_and_so_is_its_end() {
        let slot = Arc::new(CallSlot::new("gpu-3".into(), Some("GPU-x".into())));
        let caller = Caller::new(Arc::clone(&slot));
        let at = |ms: u64| BootNs(1_000_000_000 + ms * 1_000_000);
        caller.enter(Call::GetSamples, at(0));
        assert_eq!(slot.watch(at(1_900)), None);
        let said = |ms| match slot.watch(at(ms)) {
            Some(Change::Stalled { who, message }) => format!("{who}: {message}"),
            other => format!("{other:?}"),
        };
        assert!(said(2_000).starts_with("gpu-3: the driver has not answered GetSamples for 2 s; samples of GPU-x are missing"));
        assert!(slot.is_stalled());
        assert_eq!(slot.watch(at(9_000)), None);
        assert!(said(10_000).contains("for 10 s"));
        caller.leave();
        assert!(matches!(slot.watch(at(10_100)), Some(Change::Answers { .. })));
        assert!(!slot.is_stalled());
        assert_eq!(slot.watch(at(20_000)), None);
    }

    #[test]
    fn a_thread_that_was_given_up_is_not_spoken_of() {
        let slot = Arc::new(CallSlot::new("gpu-3".into(), None));
        let caller = Caller::new(Arc::clone(&slot));
        caller.enter(Call::GetSamples, BootNs(1));
        let late = BootNs(5_000_000_000);
        assert!(matches!(slot.watch(late), Some(Change::Stalled { .. })));
        slot.end();
        assert!(matches!(slot.watch(late), Some(Change::Answers { .. })));
        assert_eq!(slot.watch(late), None);
    }
}
