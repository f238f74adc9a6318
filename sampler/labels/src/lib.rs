//! Labels of containers: values from the cgroup path and from label sources, and the schedule of queries to these sources.
#![forbid(unsafe_code)]

mod assigned;
mod details;
mod resolver;
mod values;

pub use assigned::{Assignment, AssignmentSource, Device, device, facts_for, join};
pub use details::{UserDetails, user_name};
pub use resolver::{
    ABSENT, FILES_IN_FLIGHT, LabelResolver, Outcome, Query, QueryAttempt, QueryOutcome, TargetId, can_resolve, is_likely,
};
pub use values::{ContainerLabels, Facts, Label, LabelValue, Source};
