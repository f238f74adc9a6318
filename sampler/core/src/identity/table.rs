//! The map type of the identity tables.

use std::collections::HashMap;

/// Keyed by numbers that the kernel assigns, with several lookups for each event: a fast hash, which tenants cannot attack with chosen
/// keys.
pub(crate) type Table<K, V> = HashMap<K, V, foldhash::fast::RandomState>;
