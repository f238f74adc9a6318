//! `report --fleet`: one report of the session files of several nodes. One file is in memory at a time.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::bail;
use sampler_core::units::{WallTime, rfc3339};
use sampler_report::{Coverage, Cut, FileProblem, Fleet, FleetFile, FleetOptions, JoinField, WallSpan};
use sampler_session::{Session, View};

use super::report::Moment;
use super::session_files::{SessionFile, SessionFiles, SessionOutline};
use crate::error::display_chain;

/// What a fleet report is made of.
pub struct FleetRequest<'a> {
    pub files: &'a [PathBuf],
    pub from: Option<Moment>,
    pub to: Option<Moment>,
    pub join_by: &'a [JoinField],
    /// The selection of GPUs and users for a session, without a range.
    pub view: &'a dyn Fn(&Session) -> View,
    pub progress: &'a dyn Fn(String),
}

/// A file with its span by the clock of its node; a session that was not stopped in order has no known end.
struct KnownFile {
    file: SessionFile,
    node: String,
    span: WallSpan,
}

impl KnownFile {
    fn new(file: SessionFile, outline: SessionOutline) -> Self {
        let from = outline.header.start_wall;
        let length = |at: sampler_core::units::BootNs| at.saturating_since(outline.header.start);
        let to = outline.end.map_or(WallTime(u64::MAX), |end| WallTime(from.0.saturating_add(length(end.at))));
        Self { file, node: outline.header.node, span: WallSpan { from, to } }
    }

    fn problem(&self, problem: String) -> FileProblem {
        FileProblem { file: self.file.name.clone(), node: Some(self.node.clone()), problem }
    }
}

fn wall(moment: Moment, start: WallTime) -> WallTime {
    let nanos = |length: std::time::Duration| u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
    match moment {
        Moment::AfterStart(offset) => WallTime(start.0.saturating_add(nanos(offset))),
        Moment::At(time) => WallTime(time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, nanos)),
    }
}

impl FleetRequest<'_> {
    pub fn fleet(&self) -> anyhow::Result<Fleet> {
        let files = SessionFiles::new()?;
        let (known, mut problems) = self.outlines(&files)?;
        let Some(start) = known.iter().map(|known| known.span.from).min() else {
            bail!("no file can be read: {}", problems.first().map_or("", |problem| &*problem.problem));
        };
        let span = WallSpan {
            from: self.from.map_or(start, |from| wall(from, start)),
            to: self.to.map_or(WallTime(u64::MAX), |to| wall(to, start)),
        };
        if span.from >= span.to {
            bail!("--from is not before --to, so there is nothing to report");
        }
        let overlaps = |known: &KnownFile| known.span.from < span.to && known.span.to > span.from;
        let mut known: Vec<KnownFile> = known.into_iter().filter(overlaps).collect();
        if known.is_empty() {
            bail!("no session file has time after {} and before --to", rfc3339(span.from));
        }
        known.sort_by(|a, b| (a.span.from, &a.file.name).cmp(&(b.span.from, &b.file.name)));
        let (mut coverage, mut reported, mut remarks) = (Coverage::default(), Vec::new(), Vec::new());
        for known in &known {
            (self.progress)(format!("reading {}", known.file.name));
            let session = match files.read(&known.file) {
                Ok(session) => session,
                Err(error) => {
                    problems.push(known.problem(display_chain(error.as_ref())));
                    continue;
                }
            };
            let Some(view) = self.range(known, &session, &coverage, span, &mut remarks) else { continue };
            let mut report = sampler_report::build(&session, &view);
            drop(session);
            // The largest part of a report; a fleet report does not draw it.
            report.timelines = Vec::new();
            coverage.add(&known.file.name, &report);
            reported.push(FleetFile { file: known.file.name.clone(), report });
        }
        if reported.is_empty() {
            bail!("no file can be reported: {}", problems.first().map_or("", |problem| &*problem.problem));
        }
        let span =
            (self.from.is_some() || self.to.is_some()).then(|| WallSpan { from: span.from, to: self.end(&reported, span) });
        let options = FleetOptions { span, join_by: self.join_by.to_vec() };
        Ok(sampler_report::fleet(&reported, problems, remarks, &options))
    }

    /// The end that was requested, or else that of the last file.
    fn end(&self, reported: &[FleetFile], span: WallSpan) -> WallTime {
        if self.to.is_some() { span.to } else { reported.iter().map(FleetFile::end).max().unwrap_or(span.from) }
    }

    fn outlines(&self, files: &SessionFiles) -> anyhow::Result<(Vec<KnownFile>, Vec<FileProblem>)> {
        let (mut known, mut problems) = (Vec::new(), Vec::new());
        for argument in self.files {
            (self.progress)(format!("listing {}", argument.display()));
            for file in files.find(argument)? {
                match files.outline(&file) {
                    Ok(outline) => known.push(KnownFile::new(file, outline)),
                    Err(error) => {
                        let problem = display_chain(error.as_ref());
                        problems.push(FileProblem { file: file.name, node: None, problem });
                    }
                }
            }
        }
        Ok((known, problems))
    }

    /// The part of a file within the span that no earlier file covers; `None` if there is none.
    fn range(
        &self,
        known: &KnownFile,
        session: &Session,
        coverage: &Coverage,
        span: WallSpan,
        remarks: &mut Vec<String>,
    ) -> Option<View> {
        let (name, mut from) = (&known.file.name, known.span.from.max(span.from));
        match coverage.cut(session, known.span) {
            Cut::Whole => {}
            Cut::After(time, other) => {
                from = from.max(time);
                remarks.push(format!("{name} is reported from {} on: it has GPUs that {other} covers until then", rfc3339(time)));
            }
            Cut::Nothing(other) => {
                remarks.push(format!("{name} is not reported: {other} covers its GPUs in all of its time"));
                return None;
            }
        }
        let offset = |at: WallTime| at.0.saturating_sub(known.span.from.0);
        let to = known.span.to.min(span.to);
        let view = (self.view)(session);
        (from < to).then(|| View {
            from_ns: (from > known.span.from).then(|| offset(from)),
            to_ns: (span.to < known.span.to && span.to.0 != u64::MAX).then(|| offset(span.to)),
            ..view
        })
    }
}
