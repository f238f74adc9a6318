//! Session files and conditions from the fuzzer's bytes.

use super::generate::header;
use super::*;
use crate::trigger::Trigger;

/// More lines than [`Session::damage`] has at most: a hundred places, and what is said about the whole file.
const MOST_DAMAGE: usize = 104;

/// Whatever the bytes: problems are bounded, and a file that ends early has the same facts up to its end.
#[test]
fn fuzz_session_file() {
    devkit::fuzz(file!(), "session_file", move |bytes| {
        let (_header, _end) = (super::super::header(bytes), end(bytes));
        let cut = bytes.len() * usize::from(bytes.last().copied().unwrap_or_default()) / 256;
        let (whole, beginning) = (read(bytes), read(&bytes[..cut]));
        if let Ok(whole) = &whole {
            assert!(whole.damage.len() <= MOST_DAMAGE, "{}", whole.damage.len());
            assert!(whole.damage.iter().all(|line| line.len() < 300));
        }
        if let (Ok(whole), Ok(beginning)) = (whole, beginning) {
            assert!(is_subsequence(&beginning.facts, &whole.facts), "cut at {cut}");
        }
    });
}

/// Frames with valid checksums and any content. Of each: kind, minor version and step of the sequence, length in two bytes, content.
fn file_of(mut bytes: &[u8]) -> Vec<u8> {
    let (mut packer, mut file, mut sequence) = (Packer::new().unwrap(), FileBytes::default(), 0u32);
    file.put(&packer.header(&header()).unwrap());
    while let [kind, versions, low, high, rest @ ..] = bytes {
        let (raw, after) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        sequence = sequence.wrapping_add(u32::from(versions >> 4) / 4 + 1);
        let packed = zstd::bulk::compress(raw, 1).unwrap();
        file.bytes.extend(crafted(raw.len() as u32, &packed, (MAJOR, versions & 0xf), kind % 6, sequence));
        bytes = after;
    }
    file.bytes
}

/// Records of any content: a fact that is read is written and read again as the same fact, and the state takes it.
#[test]
fn fuzz_session_records() {
    devkit::fuzz(file!(), "session_records", move |bytes| {
        let session = read(&file_of(bytes)).unwrap();
        assert!(session.facts.len() <= bytes.len() && session.damage.len() <= MOST_DAMAGE);
        let (mut state, mut followed) = (State::default(), Vec::new());
        for fact in &session.facts {
            state.follow(fact, &mut |fact| followed.push(fact));
        }
        let (mut packer, mut file) = (Packer::new().unwrap(), FileBytes::default());
        file.put(&packer.header(&header()).unwrap());
        packer.state(&state.facts()).unwrap().iter().for_each(|frame| file.put(frame));
        packer.facts(&session.facts).unwrap().iter().for_each(|frame| file.put(frame));
        let again = read(&file.bytes).unwrap();
        let written = |facts: &[Fact]| postcard::to_allocvec(facts).unwrap();
        let tail = again.facts.len().checked_sub(session.facts.len()).unwrap();
        assert_eq!(written(&again.facts[tail..]), written(&session.facts));
        assert_eq!(again.damage, [""; 0]);
    });
}

/// A condition that is accepted is printed in a form that is accepted as the same condition; an error is short.
#[test]
fn fuzz_trigger() {
    devkit::fuzz(file!(), "trigger", move |bytes| match String::from_utf8_lossy(bytes).parse::<Trigger>() {
        Ok(trigger) => assert_eq!(trigger.to_string().parse(), Ok(trigger)),
        // It quotes the condition, of which a character takes up to ten.
        Err(error) => assert!(error.to_string().len() < 3000, "{error}"),
    });
}
