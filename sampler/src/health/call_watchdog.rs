//! Tracks the present driver call of each thread. The core thread checks four times a second; nothing here waits.
//!
//! ```text
//!  idle --enter--> in a call --2 s--> stalled (reported once, and at 10 s, 1 min, 10 min) --leave--> idle (reported)
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use sampler_core::units::BootNs;
use strum::VariantArray as _;

use super::condition::Condition;
use super::nvml_calls::Call;

/// Ages in seconds at which a stalled call is reported; the message does not change in between.
const AGES: [(u64, &str); 4] = [(2, "2 s"), (10, "10 s"), (60, "a minute"), (600, "ten minutes")];

/// One thread that calls the driver.
pub struct CallSlot {
    condition: Condition,
    pub(super) uuid: Option<Arc<str>>,
    /// Boot time at which the present call began; 0 if there is none.
    since: AtomicU64,
    call: AtomicU8,
    /// How many of [`AGES`] were reported.
    reported: AtomicU8,
    over: AtomicBool,
}

/// The side of a slot that the calling thread uses.
pub struct Caller {
    pub slot: Arc<CallSlot>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    Stalled { condition: Condition, message: String },
    Returned { condition: Condition },
}

impl Caller {
    /// Makes a call that begins now.
    pub fn during<T>(&self, call: Call, now: BootNs, make: impl FnOnce() -> T) -> T {
        self.enter(call, now);
        let result = make();
        self.leave();
        result
    }

    fn enter(&self, call: Call, now: BootNs) {
        self.slot.call.store(call as u8, Ordering::Relaxed);
        self.slot.since.store(now.0.max(1), Ordering::Release);
    }

    fn leave(&self) {
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
    pub(super) fn new(condition: Condition, uuid: Option<Arc<str>>) -> Self {
        let (since, call, reported) = (AtomicU64::new(0), AtomicU8::new(0), AtomicU8::new(0));
        Self { condition, uuid, since, call, reported, over: AtomicBool::new(false) }
    }

    /// The thread was abandoned: another one has taken over its work.
    pub fn end(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(super) fn is_stalled(&self) -> bool {
        self.reported.load(Ordering::Relaxed) > 0
    }

    pub(super) fn watch(&self, now: BootNs) -> Option<Change> {
        let since = self.since.load(Ordering::Acquire);
        let age = if since == 0 || self.is_over() { 0 } else { now.0.saturating_sub(since) / 1_000_000_000 };
        let reached = AGES.iter().filter(|(seconds, _)| age >= *seconds).count();
        let before = self.reported.swap(reached as u8, Ordering::Relaxed);
        if reached == usize::from(before) {
            return None;
        }
        let condition = self.condition;
        let Some((_, duration)) = reached.checked_sub(1).map(|n| AGES[n]) else {
            return Some(Change::Returned { condition });
        };
        let call = Call::VARIANTS.get(usize::from(self.call.load(Ordering::Relaxed))).map_or("", |call| call.name());
        let effect = match &self.uuid {
            Some(uuid) => {
                format!("until it returns, only samples of {uuid} are missing; check dmesg for Xid lines, a reset may help")
            }
            None => "until it returns, only its results are missing".into(),
        };
        let message = format!("the driver call {call} has not returned for {duration}; {effect}");
        Some(Change::Stalled { condition, message })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_reported_once_per_age_and_so_is_its_end() {
        let condition = Condition::Gpu { slot: 3 };
        let slot = Arc::new(CallSlot::new(condition, Some("GPU-x".into())));
        let caller = Caller { slot: Arc::clone(&slot) };
        let time = |ms: u64| BootNs(1_000_000_000 + ms * 1_000_000);
        caller.enter(Call::GetSamples, time(0));
        assert_eq!(slot.watch(time(1_900)), None);
        let reported = |ms| match slot.watch(time(ms)) {
            Some(Change::Stalled { condition, message }) => format!("{}: {message}", condition.key()),
            other => format!("{other:?}"),
        };
        let text = reported(2_000);
        assert!(
            text.starts_with(
                "gpu-3: the driver call GetSamples has not returned for 2 s; until it returns, only samples of GPU-x"
            )
        );
        assert!(slot.is_stalled());
        assert_eq!(slot.watch(time(9_000)), None);
        assert!(reported(10_000).contains("for 10 s"));
        caller.leave();
        assert_eq!(slot.watch(time(10_100)), Some(Change::Returned { condition }));
        assert!(!slot.is_stalled());
        assert_eq!(slot.watch(time(20_000)), None);
    }

    #[test]
    fn an_abandoned_thread_is_not_reported() {
        let slot = Arc::new(CallSlot::new(Condition::Gpu { slot: 3 }, None));
        let caller = Caller { slot: Arc::clone(&slot) };
        caller.enter(Call::GetSamples, BootNs(1));
        let late = BootNs(5_000_000_000);
        assert!(matches!(slot.watch(late), Some(Change::Stalled { .. })));
        slot.end();
        assert!(matches!(slot.watch(late), Some(Change::Returned { .. })));
        assert_eq!(slot.watch(late), None);
    }
}
