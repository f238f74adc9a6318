//! From a session's facts to its report.

use super::model::Report;
use crate::session::{Session, View};

pub fn build(session: &Session, view: &View) -> Report {
    let _ = view;
    Report {
        format: super::FORMAT,
        start: session.header.start_wall,
        duration_seconds: 0.0,
        truncated: session.end.is_none() || !session.damage.is_empty(),
        damage: session.damage.clone(),
        node: session.header.node.clone(),
        agent_version: session.header.agent_version.clone(),
        window_seconds: 1.0,
        saturation_ratio: 0.9,
        gaps: Vec::new(),
        gpus: Vec::new(),
        containers: Vec::new(),
        findings: Vec::new(),
        timelines: Vec::new(),
    }
}
