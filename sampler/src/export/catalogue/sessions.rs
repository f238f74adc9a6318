//! Sessions and the ring for their lookback.

use super::{Family, families};

families! {
    in Agent;
    SESSIONS: Family::gauge("gpu_sampler_sessions", "sessions", &["state"])
        .help("Number of sessions by state, including those of earlier runs.");
    DROPPED_FRAMES: Family::counter("gpu_sampler_session_dropped_frames_total", "frames", &[])
        .help("Number of frames missing in session files because the disk or the recorder was too slow.");
    UPLOADS: Family::counter("gpu_sampler_session_uploads_total", "uploads", &["outcome"])
        .help("Number of uploads of sessions to the object store, by outcome: ok, error (repeated later), or removed (the local file was \
               removed before it was uploaded).")
        .absent("unless session_store is set");
    RING_BYTES: Family::gauge("gpu_sampler_session_ring_bytes", "bytes", &[])
        .help("Size of the facts kept in memory for the lookback of sessions, in bytes.");
    RING_SECONDS: Family::gauge("gpu_sampler_session_ring_seconds", "seconds", &[])
        .help("Longest lookback that is available now, in seconds.");
}
