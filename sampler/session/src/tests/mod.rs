mod fuzz;
mod generate;
mod states;
mod triggers;

use self::generate::{Node, Random, SECOND, START, header};
use super::frame::MAX_RAW_BYTES;
use super::*;
use sampler_core::fact::GpuFact;

/// A file, the end offsets of its frames, and its facts in the order of the file.
struct Written {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    facts: Vec<Fact>,
    /// The facts of Facts frames and of the first State.
    once: Vec<Fact>,
}

/// Writes sections of `every` seconds and Facts frames of one second.
fn write(node: Node, seconds: u64, every: u64) -> Written {
    let (mut state, mut packer, mut file) = (State::default(), Packer::new().unwrap(), FileBytes::default());
    let (mut ends, mut all, mut once) = (Vec::new(), Vec::new(), Vec::new());
    for fact in node.begin() {
        state.apply(&fact);
    }
    let mut random = Random(42);
    let mut put = |frame: &Frame| {
        file.put(frame);
        ends.push(file.bytes.len());
    };
    for second in 0..seconds {
        if second % every == 0 {
            put(&packer.header(&header()).unwrap());
            let facts = state.facts();
            packer.state(&facts).unwrap().iter().for_each(&mut put);
            once.extend(facts.iter().filter(|_| second == 0).cloned());
            all.extend(facts);
        }
        let mut facts = Vec::new();
        for fact in node.second(second, &mut random) {
            state.follow(&fact, &mut |fact| facts.push(fact));
        }
        packer.facts(&facts).unwrap().iter().for_each(&mut put);
        once.extend(facts.iter().cloned());
        all.extend(facts);
    }
    put(&packer.end(&End { at: BootNs(START + seconds * SECOND), dropped_frames: 0 }).unwrap());
    Written { bytes: file.bytes, ends, facts: all, once }
}

const SMALL: Node = Node { gpus: 2, processes: 9, max_processes: 2 };

fn is_subsequence(some: &[Fact], all: &[Fact]) -> bool {
    let mut all = all.iter();
    some.iter().all(|fact| all.any(|other| other == fact))
}

#[test]
fn a_written_file_reads_back() {
    let written = write(SMALL, 12, 5);
    let session = read(&written.bytes).unwrap();
    assert_eq!(session.damage, [""; 0]);
    assert_eq!((session.header, session.end), (header(), Some(BootNs(START + 12 * SECOND))));
    assert!(session.facts == written.once && written.once.len() < written.facts.len());
    assert_eq!(super::header(&written.bytes[..4096]), Some(header()));
    let last = &written.bytes[written.bytes.len() - 200..];
    assert_eq!(end(last), Some(End { at: BootNs(START + 12 * SECOND), dropped_frames: 0 }));
}

fn check(written: &Written, bytes: &[u8], what: &str) {
    match read(bytes) {
        Ok(session) => {
            assert!(is_subsequence(&session.facts, &written.facts), "{what}: facts that were not written");
            let whole = session.facts == written.once && session.end.is_some() && session.header == header();
            assert!(whole || session.end.is_none() || !session.damage.is_empty(), "{what}: an unreported loss");
        }
        Err(error) => assert!(bytes.len() < written.ends[0] || error != ReadError::NotASession, "{what}: {error}"),
    }
}

#[test]
fn a_file_cut_anywhere_reads_up_to_the_cut() {
    let written = write(SMALL, 12, 5);
    let mut random = Random(7);
    let ends = written.ends.iter().copied();
    let anywhere: Vec<usize> = (0..1000).map(|_| random.below(written.bytes.len() as u64) as usize).collect();
    for at in ends.chain(anywhere).chain(0..200) {
        check(&written, &written.bytes[..at], &format!("cut at {at}"));
        let beginning = read(&written.bytes[..at]).map(|session| session.facts.len()).unwrap_or_default();
        let whole = written.ends.iter().filter(|end| **end <= at).count();
        assert!(whole < 3 || beginning > 0, "cut at {at}: nothing of {whole} frames");
    }
}

#[test]
fn one_wrong_byte_is_reported_and_costs_less_than_half() {
    let written = write(SMALL, 12, 5);
    let mut random = Random(11);
    for _ in 0..1000 {
        let at = random.below(written.bytes.len() as u64) as usize;
        let mut bytes = written.bytes.clone();
        bytes[at] ^= 1 + random.below(255) as u8;
        check(&written, &bytes, &format!("byte {at} flipped"));
        let session = read(&bytes).unwrap();
        assert!(
            !session.damage.is_empty() && session.facts.len() * 2 > written.once.len(),
            "byte {at}: unreported, or more than half of the facts lost"
        );
    }
}

#[test]
fn no_loss_goes_unreported_after_cuts_swaps_and_repeats() {
    let written = write(SMALL, 12, 5);
    let mut random = Random(13);
    for n in 0..300 {
        let mut cut = [0; 2].map(|_| random.below(written.bytes.len() as u64) as usize);
        cut.sort_unstable();
        let (head, piece, tail) = (&written.bytes[..cut[0]], &written.bytes[cut[0]..cut[1]], &written.bytes[cut[1]..]);
        check(&written, &[head, tail].concat(), &format!("{n}: {cut:?} cut out"));
        check(&written, &[head, piece, piece, tail].concat(), &format!("{n}: {cut:?} twice"));
        check(&written, &[piece, head, tail].concat(), &format!("{n}: {cut:?} first"));
    }
}

#[test]
fn the_next_state_is_read_after_damage() {
    let written = write(SMALL, 12, 5);
    let mut bytes = written.bytes.clone();
    // Damages the first State frame: without it, GPUs and containers are unknown until the next State.
    bytes[written.ends[0] + 40] ^= 1;
    let session = read(&bytes).unwrap();
    let opened = |fact: &&Fact| matches!(fact, Fact::Gpu { fact: GpuFact::Opened(_), .. });
    assert_eq!(session.facts.iter().filter(opened).count(), 2, "{:?}", session.damage);
    assert!(session.damage[0].contains("the frame's checksum is wrong"), "{:?}", session.damage);
    assert!(session.damage[0].starts_with(&format!("bytes {} to {} ", written.ends[0], written.ends[1])));
    // A State of two frames is not used if one of them is missing.
    let facts = read(&written.bytes).unwrap().facts;
    let (mut packer, mut file) = (Packer::new().unwrap(), FileBytes::default());
    file.put(&packer.header(&header()).unwrap());
    file.sequence += 1;
    packer.state(&facts[..10]).unwrap().iter().for_each(|frame| file.put(frame));
    packer.facts(&facts[10..12]).unwrap().iter().for_each(|frame| file.put(frame));
    assert_eq!(read(&file.bytes).unwrap().facts, facts[10..12]);
}

#[test]
fn missing_frames_are_reported() {
    let written = write(SMALL, 12, 5);
    let without: Vec<u8> = [&written.bytes[..written.ends[3]], &written.bytes[written.ends[5]..]].concat();
    let session = read(&without).unwrap();
    assert_eq!(session.damage, [format!("frames 4 to 5 are missing before byte {}", written.ends[3])]);
}

/// Builds frames that the packer never writes.
fn crafted(raw_bytes: u32, packed: &[u8], version: (u8, u8), kind: u8, sequence: u32) -> Vec<u8> {
    let mut head = MARKER.to_vec();
    head.extend([version.0, version.1, kind, 0]);
    for number in [sequence, packed.len() as u32, raw_bytes] {
        head.extend(number.to_le_bytes());
    }
    let crc = crc32fast::hash(&[&head[8..], packed].concat());
    head.extend(crc.to_le_bytes());
    head.extend(packed);
    head
}

#[test]
fn hostile_files_are_rejected_with_bounded_work() {
    let outcome = |bytes: &[u8]| read(bytes).map(|session| session.damage.join("; ")).unwrap_or_else(|error| error.to_string());
    let zeros = zstd::bulk::compress(&vec![0; MAX_RAW_BYTES + 1], 19).unwrap();
    assert!(outcome(&crafted(MAX_RAW_BYTES as u32 + 1, &zeros, (1, 0), 3, 0)).contains("not a session file"));
    assert!(outcome(&crafted(10, &zeros, (1, 0), 3, 0)).contains("cannot be decompressed"));
    assert!(outcome(&crafted(10, b"no zstd", (1, 0), 3, 0)).contains("cannot be decompressed"));
    assert!(outcome(&crafted(10, b"", (2, 0), 9, 0)).contains("version 2"));
    assert_eq!(read(b"").unwrap_err(), ReadError::NotASession);
    assert_eq!(read(&[0; 10_000]).unwrap_err(), ReadError::NotASession);
    // A file of nothing but heads of long frames: the work is bounded.
    let mut long = MARKER.to_vec();
    long.extend([1, 0, 3, 0]);
    [0u32, 1 << 20, 1 << 20, 0].iter().for_each(|number| long.extend(number.to_le_bytes()));
    assert_eq!(read(&long.repeat(100_000)).unwrap_err(), ReadError::NotASession);
    // A record with a length beyond the end of its frame.
    let whole = write(SMALL, 1, 5);
    let raw = [0xff, 0xff, 0x7f, 0];
    let frame = crafted(4, &zstd::bulk::compress(&raw, 3).unwrap(), (1, 0), 3, whole.ends.len() as u32);
    assert!(outcome(&[&whole.bytes[..], &frame].concat()).contains("invalid record length"));
}

#[test]
fn unknown_kinds_of_a_later_minor_version_are_skipped() {
    let whole = write(SMALL, 1, 5);
    let (mut raw, n) = (Vec::new(), whole.ends.len() as u32);
    // An unknown kind of fact, a known one with additional bytes at its end, and an unknown kind of frame.
    frame::put_record(&[77, 1, 2, 3], &mut raw);
    let mut longer = postcard::to_allocvec(&Fact::ContainerForgotten { key: sampler_core::units::ContainerKey(3) }).unwrap();
    longer.extend([1, 2]);
    frame::put_record(&longer, &mut raw);
    let packed = zstd::bulk::compress(&raw, 3).unwrap();
    let facts = crafted(raw.len() as u32, &packed, (1, 4), 3, n);
    let unknown = crafted(raw.len() as u32, &packed, (1, 4), 9, n + 1);
    let session = read(&[&whole.bytes[..], &facts, &unknown].concat()).unwrap();
    assert_eq!(session.facts.len(), whole.once.len() + 1);
    assert_eq!(session.damage.len(), 1);
    assert!(session.damage[0].contains("newer version (1.4): 1 frames and 1 records"), "{:?}", session.damage);
    // In a file of this version the same bytes are damage.
    let facts = crafted(raw.len() as u32, &packed, (1, 0), 3, n);
    let session = read(&[&whole.bytes[..], &facts].concat()).unwrap();
    assert!(session.damage[0].contains("2 records of the frame"), "{:?}", session.damage);
}

#[test]
fn a_minute_of_a_busy_node_fits_the_size_bound() {
    for (max_processes, bound) in [(3, 512 << 10), (64, 1 << 20)] {
        let node = Node { gpus: 8, processes: 64, max_processes };
        let written = write(node, 60, 15);
        println!("8 GPUs, 64 processes each, up to {max_processes} processes a sample: {} bytes a minute", written.bytes.len());
        assert!(written.bytes.len() < bound, "{max_processes} processes a sample: {} bytes", written.bytes.len());
    }
}

/// A file of the first release of version 1, which must stay readable.
const FIXTURE: &str = "tests/fixtures/version-1.gpus";

#[test]
fn version_1_stays_readable() {
    let bytes = include_bytes!("../../tests/fixtures/version-1.gpus");
    let session = read(bytes).unwrap();
    assert_eq!(session.damage, [""; 0]);
    assert_eq!(session.header, header());
    assert!(session.facts == every_kind().once, "{FIXTURE} is read as different facts");
}

/// A file with every kind of fact of version 1.0.
fn every_kind() -> Written {
    use sampler_core::fact::{HostProcess, UnobservedReason};
    use sampler_core::units::ContainerKey;
    let node = Node { gpus: 1, processes: 8, max_processes: 2 };
    let mut facts = node.begin();
    facts.extend(node.second(0, &mut Random(1)));
    let at = BootNs(START + SECOND);
    let process = HostProcess { pid: 10_049, start: BootNs(START - 10_049 * 7_654_321) };
    for fact in [
        GpuFact::Restarted,
        GpuFact::Idle { ns: 1 },
        GpuFact::Unobserved { ns: 2, why: UnobservedReason::NotAsked },
        GpuFact::Unsupported { ns: 3 },
        GpuFact::Measured { ns: 4, busy_ratio: 0.5 },
        GpuFact::Held(None),
        GpuFact::Xid { xid: 79, count: 2 },
        GpuFact::Left { pid: 5, since: BootNs(6) },
        GpuFact::Gone,
    ] {
        facts.push(Fact::Gpu { gpu: 0, at, fact });
    }
    facts.push(Fact::Comm { process, comm: "python3".into() });
    facts.push(Fact::ContainerGone { key: ContainerKey(1), at });
    facts.push(Fact::ContainerForgotten { key: ContainerKey(1) });
    let (mut packer, mut file) = (Packer::new().unwrap(), FileBytes::default());
    file.put(&packer.header(&header()).unwrap());
    packer.state(&facts[..10]).unwrap().iter().for_each(|frame| file.put(frame));
    packer.facts(&facts[10..]).unwrap().iter().for_each(|frame| file.put(frame));
    file.put(&packer.end(&End { at, dropped_frames: 0 }).unwrap());
    Written { bytes: file.bytes, ends: Vec::new(), facts: facts.clone(), once: facts }
}

/// Only for a new major version: an existing fixture must not be rewritten.
#[test]
#[ignore = "writes the fixture"]
#[expect(clippy::disallowed_methods, reason = "the fixture is written by hand, once")]
fn write_the_fixture() {
    std::fs::write(format!("{}/{FIXTURE}", env!("CARGO_MANIFEST_DIR")), every_kind().bytes).unwrap();
}
