//! Assigns slots of the core to devices. A device that returns gets its previous slot, so that its counters continue.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// After this time, the slot of a removed device may be reused: MIG devices get a new UUID each time they are created.
const KEEP_GONE: Duration = Duration::from_secs(600);

#[derive(Default)]
pub struct Slots {
    by_uuid: Mutex<HashMap<String, Slot>>,
}

struct Slot {
    number: usize,
    gone: Option<Instant>,
}

impl Slots {
    pub fn take(&self, uuid: &str) -> usize {
        let mut slots = self.by_uuid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(uuid) {
            slot.gone = None;
            return slot.number;
        }
        let free =
            slots.iter().find(|(_, slot)| slot.gone.is_some_and(|at| at.elapsed() >= KEEP_GONE)).map(|(uuid, _)| uuid.clone());
        let number = free.and_then(|uuid| slots.remove(&uuid)).map_or(slots.len(), |slot| slot.number);
        slots.insert(uuid.to_owned(), Slot { number, gone: None });
        number
    }

    pub fn gone(&self, uuid: &str) {
        let mut slots = self.by_uuid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(uuid) {
            slot.gone = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_returns_gets_its_previous_slot() {
        let slots = Slots::default();
        assert_eq!([slots.take("a"), slots.take("b"), slots.take("a")], [0, 1, 0]);
        slots.gone("a");
        assert_eq!([slots.take("c"), slots.take("a")], [2, 0]);
    }
}
