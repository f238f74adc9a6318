//! The slots of one container: a sorted list, since a container has some ten and there are thousands of containers.

use super::TargetId;
use super::entry::Slot;

/// Only of targets that are or were present: most machines have a fraction of the endpoints that are looked for.
#[derive(Debug, Default)]
pub(super) struct Slots(Vec<(TargetId, Slot)>);

impl Slots {
    pub fn with_room_for(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    fn position(&self, id: TargetId) -> Result<usize, usize> {
        self.0.binary_search_by_key(&id, |(id, _)| *id)
    }

    pub fn get(&self, id: TargetId) -> Option<&Slot> {
        Some(&self.0[self.position(id).ok()?].1)
    }

    pub fn get_mut(&mut self, id: TargetId) -> Option<&mut Slot> {
        let position = self.position(id).ok()?;
        Some(&mut self.0[position].1)
    }

    /// Replaces the slot of that target, if there is one.
    pub fn insert(&mut self, id: TargetId, slot: Slot) {
        match self.position(id) {
            Ok(position) => self.0[position].1 = slot,
            Err(position) => self.0.insert(position, (id, slot)),
        }
    }

    pub fn remove(&mut self, id: TargetId) -> Option<Slot> {
        Some(self.0.remove(self.position(id).ok()?).1)
    }

    pub fn iter(&self) -> impl Iterator<Item = (TargetId, &Slot)> {
        self.0.iter().map(|(id, slot)| (*id, slot))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (TargetId, &mut Slot)> {
        self.0.iter_mut().map(|(id, slot)| (*id, slot))
    }
}
