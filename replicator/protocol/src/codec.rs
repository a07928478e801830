//! The byte codec of control messages and of the durable group state: little-endian, fixed-width, bounded.

use block::{ChainHash, Epoch, Incarnation, Position, Sequence, SiteId, Tip, WallTime};

/// Why bytes were refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The bytes end before the message does.
    #[error("the message is cut short")]
    Short,
    /// Bytes are left after the message's end.
    #[error("the message has {0} bytes too many")]
    Trailing(usize),
    /// A field has a value that the format does not know.
    #[error("field '{field}' has the unknown value {value}")]
    Unknown {
        /// The field's name.
        field: &'static str,
        /// What was found.
        value: u64,
    },
    /// A list or text is longer than the format allows.
    #[error("field '{field}' is longer than its limit of {limit}")]
    TooLong {
        /// The field's name.
        field: &'static str,
        /// The limit, in elements or bytes.
        limit: usize,
    },
    /// A text is not UTF-8.
    #[error("field '{0}' is not UTF-8 text")]
    NotText(&'static str),
}

/// Appends fields to a message.
#[derive(Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.bytes.push(u8::from(value));
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// A list or text: its length, then its bytes.
    pub(crate) fn counted(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }

    /// A list's length. Longer lists than 2^32-1 are a caller's bug.
    pub(crate) fn count(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        assert!(count < u32::MAX, "a message list fits in 32 bits");
        self.u32(count);
    }

    pub(crate) fn position(&mut self, position: &Position) {
        self.u64(position.epoch.0);
        self.raw(&position.origin.to_bytes());
        self.u64(position.incarnation.0);
        self.u64(position.sequence.0);
    }

    pub(crate) fn tip(&mut self, tip: &Tip) {
        self.position(&tip.position);
        self.raw(&tip.chain.0);
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields from a message; never reads past its end.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], CodecError> {
        let (head, rest) = self.bytes.split_at_checked(length).ok_or(CodecError::Short)?;
        self.bytes = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (head, rest) = self.bytes.split_first_chunk::<N>().ok_or(CodecError::Short)?;
        self.bytes = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, CodecError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn bool(&mut self, field: &'static str) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(CodecError::Unknown { field, value: u64::from(value) }),
        }
    }

    pub(crate) fn u16(&mut self) -> Result<u16, CodecError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, CodecError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, CodecError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A list's length, refused above `limit`.
    pub(crate) fn count(&mut self, field: &'static str, limit: usize) -> Result<usize, CodecError> {
        let count = usize::try_from(self.u32()?).unwrap_or(usize::MAX);
        if count > limit { Err(CodecError::TooLong { field, limit }) } else { Ok(count) }
    }

    pub(crate) fn counted(&mut self, field: &'static str, limit: usize) -> Result<Vec<u8>, CodecError> {
        let count = self.count(field, limit)?;
        Ok(self.take(count)?.to_vec())
    }

    pub(crate) fn text(&mut self, field: &'static str, limit: usize) -> Result<String, CodecError> {
        String::from_utf8(self.counted(field, limit)?).map_err(|_| CodecError::NotText(field))
    }

    pub(crate) fn site(&mut self) -> Result<SiteId, CodecError> {
        Ok(SiteId::from_bytes(self.array()?))
    }

    pub(crate) fn wall_time(&mut self) -> Result<WallTime, CodecError> {
        Ok(WallTime(self.u64()?))
    }

    pub(crate) fn position(&mut self) -> Result<Position, CodecError> {
        Ok(Position {
            epoch: Epoch(self.u64()?),
            origin: self.site()?,
            incarnation: Incarnation(self.u64()?),
            sequence: Sequence(self.u64()?),
        })
    }

    pub(crate) fn tip(&mut self) -> Result<Tip, CodecError> {
        Ok(Tip { position: self.position()?, chain: ChainHash(self.array()?) })
    }

    pub(crate) const fn finish(self) -> Result<(), CodecError> {
        if self.bytes.is_empty() { Ok(()) } else { Err(CodecError::Trailing(self.bytes.len())) }
    }
}
