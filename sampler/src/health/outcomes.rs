//! Counts of what an optional part of the agent did, by outcome.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use strum::VariantArray;

/// The outcome of a request to an OTLP receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum OtlpOutcome {
    Ok,
    Error,
}

/// The outcome of the upload of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, strum::IntoStaticStr, strum::VariantArray)]
#[strum(serialize_all = "lowercase")]
pub enum UploadOutcome {
    Ok,
    Error,
    /// The local file was removed before it was uploaded.
    Removed,
}

#[derive(Debug)]
pub struct CountsByOutcome<O> {
    is_on: AtomicBool,
    /// One for each variant.
    counts: Vec<AtomicU64>,
    outcome: PhantomData<O>,
}

impl<O: VariantArray> Default for CountsByOutcome<O> {
    fn default() -> Self {
        Self {
            is_on: AtomicBool::new(false),
            counts: O::VARIANTS.iter().map(|_| AtomicU64::new(0)).collect(),
            outcome: PhantomData,
        }
    }
}

impl<O: VariantArray + PartialEq + Copy + Into<&'static str>> CountsByOutcome<O> {
    /// The counts are exposed from now on.
    pub fn turn_on(&self) {
        self.is_on.store(true, Ordering::Relaxed);
    }

    pub fn record(&self, outcome: O) {
        let counted = O::VARIANTS.iter().zip(&self.counts).find(|(variant, _)| **variant == outcome);
        if let Some((_, count)) = counted {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// By outcome; `None` while the part of the agent is off.
    pub fn view(&self) -> Option<Vec<(&'static str, f64)>> {
        let count = |(variant, count): (&O, &AtomicU64)| ((*variant).into(), count.load(Ordering::Relaxed) as f64);
        self.is_on.load(Ordering::Relaxed).then(|| O::VARIANTS.iter().zip(&self.counts).map(count).collect())
    }
}
