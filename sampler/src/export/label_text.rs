//! The labels of pairs as they stand in their series, in two parts: those of the GPU, written for each page, and those of the container,
//! written once and kept while they stay the same.

use sampler_core::device::GpuInfo;
use sampler_labels::{ContainerLabels, Label};

use super::encode::label_block;
use crate::config::PodLabels;

/// cAdvisor's own constant for this label.
const MAKE: &str = "nvidia";

/// Of a GPU.
#[derive(Debug)]
pub struct GpuText {
    /// Of the own families.
    pub own: String,
    /// Of the families that replace those of cAdvisor.
    pub accelerator: String,
}

impl GpuText {
    pub fn new(info: &GpuInfo) -> Self {
        let mut own = vec![("uuid", &*info.uuid.0)];
        own.extend(info.parent.as_ref().map(|parent| ("gpu_uuid", &*parent.0)));
        let accelerator = [("acc_id", &*info.uuid.0), ("make", MAKE), ("model", &info.model)];
        Self { own: label_block(&own), accelerator: label_block(&accelerator) }
    }
}

/// Of a container, or of a job, unit or login session.
#[derive(Debug, Default)]
pub struct ContainerText {
    /// Of the own families.
    pub own: String,
    /// Of the families that replace those of cAdvisor.
    pub accelerator: String,
}

impl ContainerText {
    /// `container_id` as exported. `pods`: the configured generations of the pod labels.
    pub fn new(labels: &ContainerLabels, container_id: &str, pods: PodLabels) -> Self {
        if labels.host_user.is_some() {
            let own = [("kind", labels.kind.user_kind()), ("user", container_id)];
            return Self { own: label_block(&own), accelerator: String::new() };
        }
        let own = [
            ("namespace", labels.text(Label::Namespace)),
            ("pod", labels.text(Label::Pod)),
            ("container", labels.text(Label::Container)),
            ("container_id", container_id),
        ];
        let mut accelerator = vec![
            ("id", &*labels.id),
            ("name", labels.text(Label::Name)),
            ("image", labels.text(Label::Image)),
            ("namespace", labels.text(Label::Namespace)),
        ];
        for (new, old, label) in [("pod", "pod_name", Label::Pod), ("container", "container_name", Label::Container)] {
            if pods != PodLabels::Old {
                accelerator.push((new, labels.text(label)));
            }
            if pods != PodLabels::New {
                accelerator.push((old, labels.text(label)));
            }
        }
        Self { own: label_block(&own), accelerator: label_block(&accelerator) }
    }
}
