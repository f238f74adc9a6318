//! Labels of containers: values from the cgroup path and from label sources, and the schedule of queries to these sources.
#![forbid(unsafe_code)]

mod assigned;
mod details;
mod device;
mod resolver;
mod values;
mod visible;

pub use assigned::{Assignment, AssignmentSource, facts_for, join};
pub use details::{UserDetails, user_name};
pub use device::{Device, device};
pub use resolver::{
    ABSENT, FILES_IN_FLIGHT, LabelResolver, Outcome, Query, QueryAttempt, QueryOutcome, TargetId, can_resolve, is_likely,
};
pub use values::{ContainerLabels, Facts, Label, LabelValue, Source};
pub use visible::{SpecParts, VisibleGpus};
