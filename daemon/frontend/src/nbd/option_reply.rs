//! The replies to one option, in the order in which they are sent.

use bytes::{BufMut, Bytes, BytesMut};
use zerocopy::IntoBytes;

use super::layout::{self, InfoBlockSize, InfoExport, OptionReplyHeader, info, option_reply};
use super::{ExportInfo, PAYLOAD_BYTES_ADVERTISED, STRING_BYTES_MAX};

/// Any request is served, to the byte.
const BLOCK_BYTES_MINIMUM: u32 = 1;
/// The data unit: smaller or unaligned writes are read-modify-write.
const BLOCK_BYTES_PREFERRED: u32 = 4096;

/// Collects the replies to one option.
pub(super) struct OptionReplies {
    option: u32,
    bytes: BytesMut,
}

impl OptionReplies {
    pub(super) fn new(option: u32) -> Self {
        Self { option, bytes: BytesMut::new() }
    }

    pub(super) fn acknowledge(self) -> Bytes {
        self.finish(option_reply::ACK, "")
    }

    /// Ends the replies with an error. The text may be empty: some old clients cannot read one.
    pub(super) fn error(self, kind: u32, text: &str) -> Bytes {
        assert!(kind & (1 << 31) != 0, "error reply types have bit 31 set");
        self.finish(kind, text)
    }

    /// One export of a list.
    pub(super) fn server(&mut self, name: &str) {
        let name = bounded(name);
        self.put(option_reply::SERVER, &[&length(name.len()).to_be_bytes(), name.as_bytes()]);
    }

    /// One metadata context of a list (identity 0) or of a selection.
    pub(super) fn meta_context(&mut self, identity: u32, name: &str) {
        self.put(option_reply::META_CONTEXT, &[&identity.to_be_bytes(), name.as_bytes()]);
    }

    pub(super) fn info_export(&mut self, export: &ExportInfo, flags: u16) {
        let layout =
            InfoExport { kind: info::EXPORT.into(), size: export.size.0.into(), flags: flags.into() };
        self.put(option_reply::INFO, &[layout.as_bytes()]);
    }

    pub(super) fn info_name(&mut self, name: &str) {
        self.info_text(info::NAME, name);
    }

    pub(super) fn info_description(&mut self, description: &str) {
        self.info_text(info::DESCRIPTION, description);
    }

    pub(super) fn info_block_size(&mut self) {
        let layout = InfoBlockSize {
            kind: info::BLOCK_SIZE.into(),
            minimum: BLOCK_BYTES_MINIMUM.into(),
            preferred: BLOCK_BYTES_PREFERRED.into(),
            payload_max: PAYLOAD_BYTES_ADVERTISED.into(),
        };
        self.put(option_reply::INFO, &[layout.as_bytes()]);
    }

    fn info_text(&mut self, kind: u16, text: &str) {
        self.put(option_reply::INFO, &[&kind.to_be_bytes(), bounded(text).as_bytes()]);
    }

    fn finish(mut self, kind: u32, text: &str) -> Bytes {
        self.put(kind, &[bounded(text).as_bytes()]);
        self.bytes.freeze()
    }

    fn put(&mut self, kind: u32, data: &[&[u8]]) {
        let header = OptionReplyHeader {
            magic: layout::OPTION_REPLY_MAGIC.into(),
            option: self.option.into(),
            kind: kind.into(),
            length: length(data.iter().map(|piece| piece.len()).sum()).into(),
        };
        self.bytes.put_slice(header.as_bytes());
        for piece in data {
            self.bytes.put_slice(piece);
        }
    }
}

/// The text up to the protocol's bound, cut at a character.
fn bounded(text: &str) -> &str {
    let end = text.floor_char_boundary(STRING_BYTES_MAX);
    text.get(..end).unwrap_or_default()
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a reply is one bounded string and a few numbers")
}
