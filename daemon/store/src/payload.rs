//! What is written or sent: one piece of memory or several, as one transfer.

use bytes::Bytes;

/// Immutable memory for a write or a send, in order. Empty pieces are allowed.
#[derive(Clone, Debug)]
pub enum Payload {
    /// One piece; costs no allocation.
    One(Bytes),
    /// Several pieces, gathered by the kernel without a copy.
    Many(Vec<Bytes>),
}

impl Payload {
    /// The sum of the pieces' lengths.
    pub fn length(&self) -> usize {
        self.pieces().iter().map(Bytes::len).sum()
    }

    /// The pieces.
    pub fn pieces(&self) -> &[Bytes] {
        match self {
            Self::One(piece) => std::slice::from_ref(piece),
            Self::Many(pieces) => pieces,
        }
    }

    /// The pieces, as their list.
    pub fn into_pieces(self) -> Vec<Bytes> {
        match self {
            Self::One(piece) => vec![piece],
            Self::Many(pieces) => pieces,
        }
    }

    /// The bytes after the first `skip`, as non-empty slices.
    pub(crate) fn rest(&self, skip: usize) -> impl Iterator<Item = &[u8]> {
        let mut skip = skip;
        self.pieces().iter().filter_map(move |piece| {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            piece.get(skipped..).filter(|slice| !slice.is_empty())
        })
    }
}

impl From<Bytes> for Payload {
    fn from(piece: Bytes) -> Self {
        Self::One(piece)
    }
}

impl From<Vec<Bytes>> for Payload {
    fn from(pieces: Vec<Bytes>) -> Self {
        Self::Many(pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_starts_anywhere_and_has_no_empty_slice() {
        let payload =
            Payload::from(vec![Bytes::from_static(b"ab"), Bytes::new(), Bytes::from_static(b"cde")]);
        assert_eq!(payload.length(), 5);
        for skip in 0..=6 {
            let slices: Vec<&[u8]> = payload.rest(skip).collect();
            assert!(slices.iter().all(|slice| !slice.is_empty()));
            assert_eq!(slices.concat(), b"abcde"[skip.min(5)..]);
        }
    }
}
