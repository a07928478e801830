//! Changes to an input.

use super::INPUT_BYTES_MAX;
use crate::harness::Random;

/// Numbers at which decoders tend to be wrong.
const INTERESTING: [u64; 16] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x0fff,
    0x1000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    u64::MAX,
];

/// Changes `input` once; `other` is another input to take bytes from.
pub fn mutate(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match random.below(8) {
        0 => flip_bit(input, random),
        1 => {
            let at = random.index(input.len());
            let value = random.next().to_le_bytes();
            overwrite(input, at, value.get(..1).unwrap_or_default());
        }
        2..=4 => number(input, random),
        5 => {
            let at = random.index(input.len() + 1);
            let count = 1 + random.index(16);
            let piece: Vec<u8> = (0..count).map(|_| random.next().to_le_bytes()[0]).collect();
            insert(input, at, &piece);
        }
        6 => {
            let at = random.index(input.len());
            let count = random.index((input.len() - at).min(64) + 1);
            input.drain(at..at + count);
        }
        _ => splice(input, other, random),
    }
    input.truncate(INPUT_BYTES_MAX);
}

fn flip_bit(input: &mut [u8], random: &mut Random) {
    let at = random.index(input.len());
    if let Some(byte) = input.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

/// Writes a number of 1, 2, 4 or 8 bytes in either byte order, sometimes near the one that is there.
fn number(input: &mut [u8], random: &mut Random) {
    let width = 1 << random.below(4);
    let at = random.index(input.len());
    let mut value = INTERESTING.get(random.index(INTERESTING.len())).copied().unwrap_or(0);
    if random.chance(300) {
        value = value.wrapping_add(random.below(9)).wrapping_sub(4);
    }
    let little = value.to_le_bytes();
    let mut bytes = little.get(..width).unwrap_or_default().to_vec();
    if random.chance(500) {
        bytes.reverse();
    }
    overwrite(input, at, &bytes);
}

fn overwrite(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (place, byte) in input.iter_mut().skip(at).zip(bytes) {
        *place = *byte;
    }
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let at = at.min(input.len());
    input.splice(at..at, piece.iter().copied());
}

/// Copies a piece of the other input over or into this one.
fn splice(input: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let from = random.index(other.len());
    let count = random.index(other.len() - from.min(other.len()) + 1);
    let piece = other.get(from..from + count).unwrap_or_default();
    let at = random.index(input.len() + 1);
    if random.chance(500) {
        overwrite(input, at, piece);
    } else {
        insert(input, at, piece);
    }
}
