//! The map of the identity tables.

use std::collections::HashMap;

/// Keyed by the kernel's own numbers, several look-ups an event: a fast hash, which nobody outside can aim at.
pub(crate) type Table<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
