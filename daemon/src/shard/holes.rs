//! Which parts of a read are zeros, and so need not be sent.

use block::{ByteRange, DATA_UNIT_BYTES};
use bytes::Bytes;

use super::requests::Parts;

/// A read is cut into at most about this many holes: a chunk costs the client more than a few zeros.
const HOLES_MAX: u64 = 64;

/// A part of a read: its bytes, or `None` where all of it is zeros.
pub(super) type Piece = (ByteRange, Option<Bytes>);

/// True if a data unit, or the part of one at an end, is all zeros.
pub(super) fn has_zeros(parts: &Parts) -> bool {
    parts.iter().any(|(offset, data)| units(*offset, data).any(is_zero))
}

/// Cuts a read of `range` into data and holes, in order. Short holes are sent as data.
///
/// A piece keeps all the memory of its part alive. Where little of a part is sent, that is copied, so that what waits to
/// be sent takes at most twice its length.
pub(super) fn cut(range: ByteRange, parts: Parts) -> Vec<Piece> {
    let hole_bytes_min = (range.length() / HOLES_MAX).max(DATA_UNIT_BYTES).min(range.length());
    let mut pieces: Vec<Piece> = Vec::new();
    for (offset, data) in parts.into_ordered() {
        let first = pieces.len();
        let mut at = 0;
        // Where the data begins that the last piece is, if it is of this part.
        let mut data_from = None;
        while let Some((length, zero)) = run(offset, &data, at) {
            let hole = zero && length >= hole_bytes_min;
            let content = (!hole).then(|| data.slice(at..at + size(length)));
            let start = offset + wide(at);
            at += size(length);
            match (pieces.last_mut(), content) {
                (Some((last, None)), None) if last.end() == start => {
                    *last = ByteRange::between(last.offset(), start + length).unwrap_or(*last);
                }
                (Some((last, before @ Some(_))), Some(_)) if data_from.is_some() => {
                    *before = data_from.map(|from| data.slice(from..at));
                    *last = ByteRange::between(last.offset(), start + length).unwrap_or(*last);
                }
                (Some(_) | None, content) => {
                    data_from = content.is_some().then_some(at - size(length));
                    pieces.push((ByteRange::new(start, length).unwrap_or_default(), content));
                }
            }
        }
        let own = pieces.get_mut(first..).unwrap_or_default();
        let sent: usize = own.iter().filter_map(|(_, content)| content.as_ref()).map(Bytes::len).sum();
        if sent * 2 < data.len() {
            let contents = own.iter_mut().filter_map(|(_, content)| content.as_mut());
            contents.for_each(|content| *content = Bytes::copy_from_slice(content));
        }
    }
    pieces
}

/// The run of units alike from `at` on: its length and whether it is zeros.
fn run(offset: u64, data: &[u8], at: usize) -> Option<(u64, bool)> {
    let mut units = units(offset + wide(at), data.get(at..)?);
    let first = units.next()?;
    let zero = is_zero(first);
    let others: usize = units.take_while(|unit| is_zero(unit) == zero).map(<[u8]>::len).sum();
    Some((wide(first.len() + others), zero))
}

/// The data units of bytes that start at `offset`; the first and the last may be parts of units.
fn units(offset: u64, data: &[u8]) -> impl Iterator<Item = &[u8]> {
    let head = size((DATA_UNIT_BYTES - offset % DATA_UNIT_BYTES) % DATA_UNIT_BYTES).min(data.len());
    let (head, rest) = data.split_at(head);
    std::iter::once(head).filter(|head| !head.is_empty()).chain(rest.chunks(size(DATA_UNIT_BYTES)))
}

fn is_zero(unit: &[u8]) -> bool {
    let (chunks, rest) = unit.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

fn wide(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_rebuild_the_read_and_holes_are_zeros(
            offset in 0_u64..20_000,
            units in prop::collection::vec(any::<bool>(), 1..300),
            trim in 0_usize..4096,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
        ) {
            let fill = |zero: &bool| [u8::from(!zero); 4096];
            let mut image: Vec<u8> = units.iter().flat_map(fill).collect();
            image.truncate(image.len() - trim);
            let data = Bytes::from(image.clone());
            let mut borders: Vec<usize> = cuts.iter().map(|cut| cut.index(data.len())).chain([0, data.len()]).collect();
            borders.sort_unstable();
            borders.dedup();
            let mut parts = Parts::default();
            for border in borders.windows(2).rev() {
                parts.push(offset + wide(border[0]), data.slice(border[0]..border[1]));
            }
            let range = ByteRange::new(offset, wide(image.len())).unwrap();
            let zeros = has_zeros(&parts);
            let pieces = cut(range, parts);
            prop_assert!(zeros || pieces.iter().all(|(_, content)| content.is_some()));
            prop_assert!(pieces.iter().filter(|(_, content)| content.is_none()).count() <= 65);
            let (mut at, mut rebuilt) = (offset, Vec::new());
            for (piece, content) in pieces {
                prop_assert_eq!(piece.offset(), at);
                prop_assert!(!piece.is_empty());
                at = piece.end();
                let zeros = Bytes::from(vec![0; size(piece.length())]);
                let content = content.unwrap_or(zeros);
                prop_assert_eq!(wide(content.len()), piece.length());
                rebuilt.extend_from_slice(&content);
            }
            prop_assert_eq!(rebuilt, image);
        }
    }
}
