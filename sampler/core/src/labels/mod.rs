//! From a cgroup path to labels: what the path says, what sources answer, and when to ask which.

mod ladder;
mod path;
mod values;

pub use ladder::{Ask, Ladder, Outcome};
pub use path::{CgroupIdentity, Kind, Runtime, parse};
pub use values::{ContainerLabels, Facts, Label, LabelValue, Source};
