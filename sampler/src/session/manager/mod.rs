//! The work of the recorder thread, without the thread: packs facts into frames, and passes frames to the ring and to recording sessions.
//!
//! ```text
//!  facts -> State -> pending --each second--> Facts frame --+--> ring
//!                    labels, names ----^                    +--> recording sessions
//!  each 15 s, and after losses: a State frame begins a section
//! ```
//! A session is armed, records, waits until the facts of the counted span are complete, then ends:
//!
//! ```text
//!  start --with a trigger--> Armed --fires--> Recording --end reached--> (tail) --complete, or 25 s--> End frame
//!        \--without-------------------------/            \--stop: end is now--/
//! ```

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};

use arc_swap::ArcSwap;
use sampler_core::experiment::{BootSpan, ExperimentFact, ReportedFreezes};
use sampler_core::fact::Fact;
use sampler_core::snapshot::Snapshot;
use sampler_core::units::{BootNs, WallTime};
use sampler_session::trigger::{Fired, Watch};
use sampler_session::{End, Frame, Header, PackError, Packer, State};
use tokio::sync::watch;

use super::enrich::{self, Comms};
use super::request::Request;
use super::ring::{CONTEXT_NS, Piece, SessionRing};
use super::store::{Entry, Phase, Store, StoreError};
use super::writer::{self, Item};
use crate::engine_rules::{self, RuleConflict};
use crate::error::display_chain;
use crate::labels::LabelView;
use crate::observe::waits::{Requester, WaitRequests};
use crate::serving::EngineRequest;

const SECOND_NS: u64 = 1_000_000_000;
/// The time span of a frame, which is the loss in a crash.
const FRAME_NS: u64 = SECOND_NS;
const SECTION_NS: u64 = 15 * SECOND_NS;
/// Maximum number of facts in one frame.
const MAX_PENDING: usize = 50_000;
/// Facts arrive late, because samples wait for their process samples. This much beyond the counted span is recorded, because clocks agree
/// only roughly.
const TAIL_NS: u64 = SECOND_NS / 2;
/// Samples without a process wait 10 s for later ones, which arrive up to 13 s late if driver calls are slow; facts of a hanging GPU may
/// never arrive.
const MAX_TAIL_NS: u64 = 25 * SECOND_NS;
/// Includes sessions that wait for a trigger.
const MAX_ACTIVE: usize = 8;
/// A session of which the trigger does not fire for this time fails.
const MAX_ARMED_NS: u64 = 86_400 * SECOND_NS;

/// Inputs of the recorder that are not facts.
pub struct SessionInputs {
    pub labels: Box<dyn Fn() -> Arc<LabelView> + Send>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub procfs: PathBuf,
    pub waits: WaitRequests,
    pub node: String,
    /// The saturation threshold of contention in the agent.
    pub saturation_percent: u8,
    /// Which metrics of serving engines the sessions that record want.
    pub engines: watch::Sender<Option<Arc<EngineRequest>>>,
}

pub struct SessionManager {
    sources: SessionInputs,
    store: Arc<Store>,
    state: State,
    packer: Packer,
    pub ring: SessionRing,
    pending: Vec<Fact>,
    /// When the last frame was closed and the last section begun; `None` before the first.
    framed: Option<BootNs>,
    sectioned: Option<BootNs>,
    comms: Comms,
    sessions: Vec<RunningSession>,
    pub dropped_frames: u64,
}

struct RunningSession {
    id: String,
    request: Request,
    phase: LivePhase,
}

enum LivePhase {
    Armed { watch: Box<Watch>, until: BootNs },
    Recording(Recording),
}

struct Recording {
    to: SyncSender<Item>,
    /// Written again before each State.
    header: Arc<Frame>,
    began: BootNs,
    end: BootNs,
    sequence: u32,
    dropped: u64,
    /// Frames are missing: the next frame must be a State.
    broken: bool,
    experiment: Option<ReportedFreezes>,
}

impl Recording {
    /// Checks a fact about an experiment: one schedule, and freezes of that schedule.
    fn accept(&mut self, fact: &ExperimentFact, now: BootNs) -> Result<(), String> {
        match (fact, &mut self.experiment) {
            (ExperimentFact::Schedule(_), Some(_)) => Err("it has an experiment already; start a session for each".into()),
            (ExperimentFact::Schedule(schedule), none) => {
                *none = Some(ReportedFreezes::new(schedule.clone()));
                Ok(())
            }
            (ExperimentFact::Frozen { .. }, None) => Err("it has no experiment".into()),
            (ExperimentFact::Frozen { experiment, burst, from, to }, Some(known)) => {
                known.report(*experiment, *burst, BootSpan { from: *from, to: *to }, now)
            }
        }
    }

    /// Returns false if the queue is full.
    fn send(&mut self, frame: &Arc<Frame>, ends_after_ns: Option<u64>) -> bool {
        let item = Item { sequence: self.sequence, frame: Arc::clone(frame), ends_after_ns };
        match self.to.try_send(item) {
            Ok(()) => {
                self.sequence = self.sequence.wrapping_add(1);
                true
            }
            // The writer has stored its error; the session is removed in this turn.
            Err(TrySendError::Disconnected(_)) => true,
            Err(TrySendError::Full(_)) => false,
        }
    }

    /// The sequence number stays unused, so that a reader detects the gap.
    fn drop_frame(&mut self) {
        self.sequence = self.sequence.wrapping_add(1);
        self.dropped += 1;
        self.broken = true;
    }

    fn take(&mut self, piece: &Piece<Arc<Frame>>) {
        match piece {
            Piece::Facts(frame) => {
                if self.broken || !self.send(frame, None) {
                    self.drop_frame();
                }
            }
            Piece::Lost => self.drop_frame(),
            Piece::State(frames) => {
                let header = Arc::clone(&self.header);
                // A section without its State is unusable; its facts are dropped until the next State.
                self.broken = !(self.send(&header, None) && frames.iter().all(|frame| self.send(frame, None)));
            }
        }
    }
}

fn shared(frames: Vec<Frame>) -> Vec<Arc<Frame>> {
    frames.into_iter().map(Arc::new).collect()
}

impl SessionManager {
    pub fn new(sources: SessionInputs, store: Arc<Store>, ring_bytes: usize) -> Result<Self, PackError> {
        Ok(Self {
            sources,
            store,
            state: State::default(),
            packer: Packer::new()?,
            ring: SessionRing::new(ring_bytes),
            pending: Vec::new(),
            framed: None,
            sectioned: None,
            comms: Comms::default(),
            sessions: Vec::new(),
            dropped_frames: 0,
        })
    }

    pub fn facts(&mut self, facts: &[Fact], now: BootNs) {
        if self.sectioned.is_none() {
            self.section(now);
        }
        for fact in facts {
            self.state.follow(fact, &mut |fact| self.pending.push(fact));
            if self.pending.len() >= MAX_PENDING {
                self.frame(now);
            }
        }
    }

    /// Facts did not reach the recorder.
    pub fn lost(&mut self, facts: u64, now: BootNs) {
        tracing::warn!(facts, "the recorder did not keep up: these facts are missing from sessions");
        self.frame(now);
        self.give(&Piece::Lost, now);
        self.section(now);
    }

    /// To be called a few times a second.
    pub fn turn(&mut self, now: BootNs, wall: WallTime) {
        if self.sectioned.is_none() {
            self.section(now);
        }
        if self.framed.is_none_or(|framed| now.saturating_since(framed) >= FRAME_NS) {
            self.frame(now);
            let due = self.sectioned.is_none_or(|begun| now.saturating_since(begun) >= SECTION_NS);
            if due || self.ring.is_section_full() {
                self.section(now);
            }
            self.repair();
        }
        self.check_triggers(now, wall);
        self.end_wait_probes(now);
        self.end_due(now);
        self.request_engines(now);
    }

    /// Has engines read while a session that wants them counts.
    fn request_engines(&self, now: BootNs) {
        let counts = |session: &&RunningSession| matches!(&session.phase, LivePhase::Recording(recording) if now < recording.end);
        let wanted =
            EngineRequest::union(self.sessions.iter().filter(counts).filter_map(|session| session.request.engines.as_ref()));
        self.sources.engines.send_if_modified(|present| {
            let is_other = present.as_deref() != wanted.as_ref();
            if is_other {
                *present = wanted.map(Arc::new);
            }
            is_other
        });
    }

    /// Closes a frame.
    fn frame(&mut self, now: BootNs) {
        self.framed = Some(now);
        let mut joined = enrich::labels(&self.state, &(self.sources.labels)());
        joined.extend(self.comms.read(&self.state, &self.sources.procfs));
        for fact in &joined {
            self.state.follow(fact, &mut |fact| self.pending.push(fact));
        }
        let packed = self.packer.facts(&self.pending);
        self.pending.clear();
        match packed {
            Ok(frames) => {
                for frame in shared(frames) {
                    self.give(&Piece::Facts(frame), now);
                }
            }
            Err(error) => {
                tracing::error!(error = display_chain(&error), "cannot record facts");
                self.give(&Piece::Lost, now);
                self.sectioned = None;
            }
        }
    }

    /// Begins a section. There must be no pending facts.
    fn section(&mut self, now: BootNs) {
        self.sectioned = Some(now);
        let facts = self.state.facts();
        match self.packer.state(&facts) {
            Ok(frames) => self.give(&Piece::State(shared(frames)), now),
            Err(error) => tracing::error!(error = display_chain(&error), "cannot record the state"),
        }
    }

    fn give(&mut self, piece: &Piece<Arc<Frame>>, now: BootNs) {
        match piece {
            Piece::State(frames) => self.ring.begin(now, frames.clone()),
            Piece::Facts(frame) => self.ring.push(now, Some(Arc::clone(frame))),
            Piece::Lost => self.ring.push(now, None),
        }
        let mut dropped = 0;
        for session in &mut self.sessions {
            if let LivePhase::Recording(recording) = &mut session.phase {
                let before = recording.dropped;
                recording.take(piece);
                dropped += recording.dropped - before;
                if recording.dropped > before {
                    let (first, all) = (before == 0, recording.dropped);
                    self.store.change(&session.id, |entry| entry.dropped_frames = all);
                    if first {
                        tracing::warn!(session = session.id, "the disk does not keep up: frames are dropped");
                    }
                }
            }
        }
        self.dropped_frames += dropped;
    }

    /// Wait probes end with the counted span; the session records some seconds longer.
    fn end_wait_probes(&mut self, now: BootNs) {
        for session in &mut self.sessions {
            let LivePhase::Recording(recording) = &session.phase else { continue };
            if now >= recording.end && session.request.wait_probes.take().is_some() {
                self.sources.waits.clear(&Requester::Session(session.id.clone()));
            }
        }
    }

    /// Sends a State to sessions that miss frames and have room again.
    fn repair(&mut self) {
        let mut state = None;
        for session in &mut self.sessions {
            let LivePhase::Recording(recording) = &mut session.phase else { continue };
            let header = Arc::clone(&recording.header);
            // The state is packed only if there is room for the header.
            if !recording.broken || !recording.send(&header, None) {
                continue;
            }
            let frames = state.get_or_insert_with(|| {
                let facts = self.state.facts();
                // Without a State the session stays broken; this is tried again after the next frame.
                self.packer.state(&facts).map(shared).unwrap_or_else(|error| {
                    tracing::error!(error = display_chain(&error), "cannot record the state");
                    Vec::new()
                })
            });
            recording.broken = frames.is_empty() || !frames.iter().all(|frame| recording.send(frame, None));
        }
    }

    pub fn start(&mut self, request: Request, now: BootNs, wall: WallTime) -> Result<String, StoreError> {
        if self.sessions.len() >= MAX_ACTIVE {
            return Err(StoreError::Conflict(format!("{MAX_ACTIVE} sessions are active; stop one first")));
        }
        self.check_rules(&request).map_err(|conflict| StoreError::Conflict(conflict.to_string()))?;
        let phase = if request.trigger.is_some() { Phase::Armed } else { Phase::Recording };
        let trigger = request.trigger.as_ref().map(ToString::to_string);
        let id = self.store.add(wall, Entry::new(phase, request.duration_ns, request.lookback_ns, trigger));
        let phase = match &request.trigger {
            Some(trigger) => LivePhase::Armed { watch: Box::new(Watch::new(trigger.clone())), until: now.plus(MAX_ARMED_NS) },
            None => LivePhase::Recording(self.begin(&id, &request, None, now, wall)?),
        };
        tracing::info!(
            session = id,
            "{}",
            if request.trigger.is_some() { "session waits for its trigger" } else { "session started" }
        );
        self.sessions.push(RunningSession { id: id.clone(), request, phase });
        self.request_engines(now);
        Ok(id)
    }

    /// Sessions share the readings of engines; one that waits for its trigger keeps its rules, too.
    fn check_rules(&self, request: &Request) -> Result<(), RuleConflict> {
        let Some(engines) = &request.engines else { return Ok(()) };
        let mut others = self.sessions.iter().filter_map(|session| session.request.engines.as_ref());
        others.try_for_each(|other| engine_rules::check_sessions(&engines.rules, &other.rules))
    }

    /// Begins recording, starting with the lookback.
    fn begin(
        &mut self,
        id: &str,
        request: &Request,
        trigger: Option<String>,
        now: BootNs,
        wall: WallTime,
    ) -> Result<Recording, StoreError> {
        if self.sectioned.is_none() {
            self.section(now);
        }
        // Pending facts belong before the session.
        self.frame(now);
        let start = now.minus(request.lookback_ns).max(self.ring.since().unwrap_or(now));
        let lookback_ns = now.saturating_since(start);
        let header = Header {
            node: self.sources.node.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            start,
            start_wall: WallTime(wall.0.saturating_sub(lookback_ns)),
            trigger,
            view: request.view.clone(),
            saturation_percent: self.sources.saturation_percent,
        };
        let failed = |message: String| {
            self.store.fail(id, now, message.clone());
            StoreError::Conflict(message)
        };
        let header_frame = self.packer.header(&header).map_err(|error| failed(display_chain(&error)))?;
        let header_frame = Arc::new(header_frame);
        let (mut items, mut sequence, mut dropped) = (Vec::new(), 0, 0);
        for piece in self.ring.from(start.minus(CONTEXT_NS)) {
            let frames = match piece {
                Piece::State(frames) => [vec![Arc::clone(&header_frame)], frames].concat(),
                Piece::Facts(frame) => vec![frame],
                // The sequence number stays unused, so that a reader detects the gap.
                Piece::Lost => {
                    (sequence, dropped) = (sequence + 1, dropped + 1);
                    continue;
                }
            };
            for frame in frames {
                items.push(Item { sequence, frame, ends_after_ns: None });
                sequence += 1;
            }
        }
        self.store.change(id, |entry| {
            (entry.phase, entry.began, entry.started) = (Phase::Recording, Some(now), Some(header.start_wall));
            (entry.lookback_ns, entry.dropped_frames) = (lookback_ns, dropped);
        });
        let to = writer::spawn(Arc::clone(&self.store), id.to_owned(), items)
            .map_err(|error| failed(format!("cannot start the thread that writes the file: {error}")))?;
        if let Some(selector) = &request.wait_probes {
            self.sources.waits.set(Requester::Session(id.to_owned()), selector.clone());
        }
        let end = now.plus(request.duration_ns);
        Ok(Recording { to, header: header_frame, began: now, end, sequence, dropped, broken: false, experiment: None })
    }

    /// Ends a session as soon as the facts of the counted span are complete. A session that waits for its trigger has no file.
    pub fn stop(&mut self, id: &str, now: BootNs) -> Result<(), StoreError> {
        let Some(n) = self.sessions.iter().position(|session| session.id == id) else {
            let status = self.store.status(id, now)?;
            return Err(StoreError::Conflict(format!("session {id} is {} already", status.state.name())));
        };
        match &mut self.sessions[n].phase {
            LivePhase::Armed { .. } => {
                self.sessions.remove(n);
                self.store.fail(id, now, "stopped before its condition was met".into());
            }
            LivePhase::Recording(recording) => recording.end = recording.end.min(now),
        }
        Ok(())
    }

    /// Adds a fact about an experiment, and closes the frame with it: the schedule is written before the first freeze.
    pub fn experiment(&mut self, id: &str, fact: ExperimentFact, now: BootNs) -> Result<(), StoreError> {
        let session = self.sessions.iter_mut().find(|session| session.id == id);
        let Some(LivePhase::Recording(recording)) = session.map(|session| &mut session.phase) else {
            let status = self.store.status(id, now)?;
            return Err(StoreError::Conflict(format!(
                "session {id} is {}, so it cannot have an experiment",
                status.state.name()
            )));
        };
        recording.accept(&fact, now).map_err(|problem| StoreError::Conflict(format!("session {id}: {problem}")))?;
        self.facts(&[Fact::Experiment(fact)], now);
        self.frame(now);
        Ok(())
    }

    fn check_triggers(&mut self, now: BootNs, wall: WallTime) {
        if !self.sessions.iter().any(|session| matches!(session.phase, LivePhase::Armed { .. })) {
            return;
        }
        let snapshot = self.sources.snapshot.load_full();
        let mut kept = Vec::new();
        for mut session in std::mem::take(&mut self.sessions) {
            let LivePhase::Armed { watch, until } = &mut session.phase else {
                kept.push(session);
                continue;
            };
            if let Some(Fired { gpu, value, .. }) = watch.evaluate(&snapshot) {
                let condition = session.request.trigger.as_ref().map(ToString::to_string).unwrap_or_default();
                let trigger = format!("{condition}: {value:.2} on {gpu}");
                tracing::info!(session = session.id, "{trigger}: session started");
                let Ok(recording) = self.begin(&session.id, &session.request, Some(trigger), now, wall) else { continue };
                session.phase = LivePhase::Recording(recording);
            } else if now >= *until {
                let hours = MAX_ARMED_NS / SECOND_NS / 3600;
                self.store.fail(&session.id, now, format!("its condition was not met within {hours} hours"));
                continue;
            }
            kept.push(session);
        }
        self.sessions = kept;
    }

    fn end_due(&mut self, now: BootNs) {
        let is_due = |state: &State, recording: &Recording| {
            let is_complete = || state.is_complete(recording.end.plus(TAIL_NS));
            now >= recording.end && (now >= recording.end.plus(MAX_TAIL_NS) || is_complete())
        };
        self.end(now, is_due, Packer::end);
    }

    /// Ends all sessions in their present state.
    pub fn close(&mut self, now: BootNs) {
        for session in std::mem::take(&mut self.sessions) {
            match session.phase {
                LivePhase::Recording(mut recording) => {
                    recording.end = recording.end.min(now);
                    self.sessions.push(RunningSession { phase: LivePhase::Recording(recording), ..session });
                }
                LivePhase::Armed { .. } => self.store.fail(&session.id, now, "the agent ended".into()),
            }
        }
        self.end_wait_probes(now);
        self.end(now, |_, _| true, Packer::end);
    }

    /// `pack`: [`Packer::end`].
    fn end(
        &mut self,
        now: BootNs,
        is_due: impl Fn(&State, &Recording) -> bool,
        pack: impl Fn(&mut Packer, &End) -> Result<Frame, PackError>,
    ) {
        let due = |state: &State, session: &RunningSession| match &session.phase {
            LivePhase::Recording(recording) => is_due(state, recording),
            LivePhase::Armed { .. } => false,
        };
        if self.sessions.iter().any(|session| due(&self.state, session)) {
            self.frame(now);
        }
        let state = &self.state;
        let (packer, store, waits) = (&mut self.packer, &self.store, &self.sources.waits);
        self.sessions.retain_mut(|session| {
            let ends = due(state, session);
            let LivePhase::Recording(recording) = &mut session.phase else { return true };
            if !store.status(&session.id, now).is_ok_and(|status| status.state == Phase::Recording) {
                // The writer has failed and has stored its error.
                waits.clear(&Requester::Session(session.id.clone()));
                return false;
            }
            if !ends {
                return true;
            }
            let end = End { at: recording.end, dropped_frames: recording.dropped };
            let frame = match pack(packer, &end) {
                Ok(frame) => frame,
                Err(error) => {
                    let why =
                        format!("cannot record its end: {}; the part recorded until then can be read", display_chain(&error));
                    store.fail(&session.id, now, why);
                    waits.clear(&Requester::Session(session.id.clone()));
                    return false;
                }
            };
            // If the queue is full, this is tried again in the next turn: a disk may recover.
            !recording.send(&Arc::new(frame), Some(recording.end.saturating_since(recording.began)))
        });
    }
}
