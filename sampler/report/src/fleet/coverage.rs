//! Which GPUs were already reported until when, so that two files of one GPU do not count its seconds twice.

use std::collections::BTreeMap;

use sampler_core::fact::{Fact, GpuFact};
use sampler_core::units::WallTime;
use sampler_session::Session;

use super::{WallSpan, end};
use crate::model::Report;

/// Files are added in the order of their starts.
#[derive(Debug, Default)]
pub struct Coverage {
    /// By UUID: the end of what was reported, and the file.
    until: BTreeMap<String, (WallTime, String)>,
}

/// The part of a file that is not in an earlier one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// What begins at this time; the earlier part is in this file.
    After(WallTime, String),
    /// Nothing: all of it is in this file.
    Nothing(String),
}

fn uuids(session: &Session) -> impl Iterator<Item = &str> {
    session.facts.iter().filter_map(|fact| match fact {
        Fact::Gpu { fact: GpuFact::Opened(info), .. } => Some(&*info.uuid.0),
        _ => None,
    })
}

impl Coverage {
    /// `span`: that of the session, by its node's clock.
    pub fn cut(&self, session: &Session, span: WallSpan) -> Cut {
        let covered = uuids(session).filter_map(|uuid| self.until.get(uuid)).max_by_key(|(until, _)| *until);
        match covered {
            Some((until, file)) if *until >= span.to => Cut::Nothing(file.clone()),
            Some((until, file)) if *until > span.from => Cut::After(*until, file.clone()),
            _ => Cut::Whole,
        }
    }

    pub fn add(&mut self, file: &str, report: &Report) {
        for gpu in &report.gpus {
            let new = (end(report), file.to_owned());
            let entry = self.until.entry(gpu.uuid.clone()).or_insert_with(|| new.clone());
            if entry.0 < new.0 {
                *entry = new;
            }
        }
    }
}
