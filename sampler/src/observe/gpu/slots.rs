//! Which device has which slot of the core's. A device that comes back gets its old one, so what it counted goes on.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The slot of a device that has been gone for so long may be another's: MIG devices get a new UUID each time they are made.
const KEEP_GONE: Duration = Duration::from_secs(600);

#[derive(Default)]
pub struct Slots {
    of: Mutex<HashMap<String, Slot>>,
}

struct Slot {
    number: usize,
    gone: Option<Instant>,
}

impl Slots {
    pub fn take(&self, uuid: &str) -> usize {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = of.get_mut(uuid) {
            slot.gone = None;
            return slot.number;
        }
        let free =
            of.iter().find(|(_, slot)| slot.gone.is_some_and(|at| at.elapsed() >= KEEP_GONE)).map(|(uuid, _)| uuid.clone());
        let number = free.and_then(|uuid| of.remove(&uuid)).map_or(of.len(), |slot| slot.number);
        of.insert(uuid.to_owned(), Slot { number, gone: None });
        number
    }

    pub fn gone(&self, uuid: &str) {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = of.get_mut(uuid) {
            slot.gone = Some(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_comes_back_has_its_old_slot() {
        let slots = Slots::default();
        assert_eq!([slots.take("a"), slots.take("b"), slots.take("a")], [0, 1, 0]);
        slots.gone("a");
        assert_eq!([slots.take("c"), slots.take("a")], [2, 0]);
    }
}
