//! Changed copies of kept inputs.

use crate::Random;
use std::path::PathBuf;

/// Longer inputs are cut, so that a test is short.
const LONGEST: usize = 16 << 10;
/// Numbers at which things change.
const NUMBERS: [u64; 10] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 63, u64::MAX];
/// Bytes with a meaning in text formats.
const BYTES: &[u8] = b"\0\n\"'\\/:,.=-_{}[]()<>%&#0195eE \xff\xc3";

/// One of the inputs with one to four changes.
pub fn changed(kept: &[(PathBuf, Vec<u8>)], random: &mut Random) -> Vec<u8> {
    let mut input = one_of(kept, random).1.clone();
    for _ in 0..=random.below(4) {
        change(&mut input, kept, random);
    }
    input.truncate(LONGEST);
    input
}

fn one_of<'a, T>(all: &'a [T], random: &mut Random) -> &'a T {
    &all[random.below(all.len() as u64) as usize]
}

/// A position in the input, or its end.
fn position(input: &[u8], random: &mut Random) -> usize {
    random.below(input.len() as u64 + 1) as usize
}

fn change(input: &mut Vec<u8>, kept: &[(PathBuf, Vec<u8>)], random: &mut Random) {
    let (at, other) = (position(input, random), position(input, random));
    let (from, to) = (at.min(other), at.max(other));
    match random.below(9) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = *one_of(BYTES, random),
        2 => input.insert(at, *one_of(BYTES, random)),
        3 => input.truncate(at),
        4 => drop(input.drain(from..to)),
        5 => {
            let piece = input[from..to].to_vec();
            let times = 1 + random.below(8) as usize;
            input.splice(to..to, piece.repeat(times.min(1 + LONGEST / piece.len().max(1))));
        }
        6 => {
            let number = one_of(&NUMBERS, random).to_le_bytes();
            let width = 1 << random.below(4);
            let end = (at + width).min(input.len());
            input.splice(at..end, number[..width].iter().copied());
        }
        7 => {
            let number = one_of(&NUMBERS, random).to_string();
            input.splice(from..to, number.bytes());
        }
        _ => {
            let source = &one_of(kept, random).1;
            let (a, b) = (position(source, random), position(source, random));
            input.splice(from..to, source[a.min(b)..a.max(b)].iter().copied());
        }
    }
}
