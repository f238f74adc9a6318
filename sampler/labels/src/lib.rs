//! From a cgroup path to labels: what the path says, what sources answer, and when to ask which.
#![forbid(unsafe_code)]

mod assigned;
mod resolver;
mod values;

pub use assigned::{Assignment, Device, device, facts_for, join};
pub use resolver::{
    ABSENT, FILES_IN_FLIGHT, LabelResolver, Outcome, Query, QueryAttempt, QueryOutcome, TargetId, can_know, is_likely,
};
pub use values::{ContainerLabels, Facts, Label, LabelValue, Source};
