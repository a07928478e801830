//! Reply heads, and the one table from errors to NBD error numbers.

use block::{ByteRange, HostError};
use bytes::BufMut;
use zerocopy::IntoBytes;

use super::layout::{self, ChunkHeader, DataChunk, ErrorChunk, SimpleReply, chunk};
use super::{PAYLOAD_BYTES_MAX, Refusal};

/// The most bytes of a success reply without read data.
pub const REPLY_HEAD_BYTES_MAX: usize = size_of::<DataChunk>();
/// The longest text of an error reply; the specification says that strings should be no longer.
const ERROR_TEXT_BYTES_MAX: usize = 256;
/// The most bytes of an error reply.
pub const ERROR_REPLY_BYTES_MAX: usize = size_of::<ErrorChunk>() + ERROR_TEXT_BYTES_MAX;

/// The client's name for a request; replies carry it back as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie(pub u64);

/// How the replies of a connection are framed.
///
/// All methods append to `out`, which must have room or grow; they allocate nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyStyle {
    /// 16-byte simple replies.
    Simple,
    /// Structured chunks for every reply, also where a simple one would be allowed: one rule, and errors have text.
    Structured,
}

impl ReplyStyle {
    /// Success without data: to every command but a read, and to a request for zero bytes.
    pub fn put_success(self, out: &mut impl BufMut, cookie: Cookie) {
        match self {
            Self::Simple => put_simple(out, cookie, 0),
            Self::Structured => out.put_slice(chunk_header(chunk::NONE, cookie, 0).as_bytes()),
        }
    }

    /// The head of a successful read; exactly `range.length()` bytes of data must follow, in one piece.
    ///
    /// The data is at hand when the head is written, so that no error can follow and the only chunk is the last.
    ///
    /// # Panics
    /// If the range is empty or longer than [`PAYLOAD_BYTES_MAX`]: no such read reaches a volume.
    pub fn put_read_head(self, out: &mut impl BufMut, cookie: Cookie, range: ByteRange) {
        assert!(
            (1..=u64::from(PAYLOAD_BYTES_MAX)).contains(&range.length()),
            "a read of {} bytes was never handed out",
            range.length()
        );
        match self {
            Self::Simple => put_simple(out, cookie, 0),
            Self::Structured => {
                let length = u32::try_from(8 + range.length()).expect("bounded above");
                let head = DataChunk {
                    chunk: chunk_header(chunk::OFFSET_DATA, cookie, length),
                    offset: range.offset().into(),
                };
                out.put_slice(head.as_bytes());
            }
        }
    }

    /// An error, to any command. The text is for the client's user; it may be empty, and only structured replies
    /// carry it, cut to 256 bytes.
    ///
    /// # Panics
    /// If `out` cannot take the reply.
    pub fn put_error(self, out: &mut impl BufMut, cookie: Cookie, error: HostError, text: &str) {
        match self {
            Self::Simple => put_simple(out, cookie, errno(error)),
            Self::Structured => {
                let end = text.floor_char_boundary(ERROR_TEXT_BYTES_MAX);
                let text = text.get(..end).unwrap_or_default().as_bytes();
                let text_length = u16::try_from(text.len()).expect("bounded above");
                let head = ErrorChunk {
                    chunk: chunk_header(chunk::ERROR, cookie, 6 + u32::from(text_length)),
                    error: errno(error).into(),
                    text_length: text_length.into(),
                };
                out.put_slice(head.as_bytes());
                out.put_slice(text);
            }
        }
    }

    /// The error reply to a request that [`super::Transmission`] refused.
    pub fn put_refusal(self, out: &mut impl BufMut, cookie: Cookie, refusal: Refusal) {
        match self {
            Self::Simple => self.put_error(out, cookie, refusal.error(), ""),
            Self::Structured => self.put_error(out, cookie, refusal.error(), &refusal.to_string()),
        }
    }
}

/// The NBD error number of an error. The specification fixes the numbers, whatever the platform's own are.
pub const fn errno(error: HostError) -> u32 {
    match error {
        HostError::ReadOnly => 1,
        HostError::Io => 5,
        HostError::Invalid => 22,
        HostError::NoSpace => 28,
        HostError::NotSupported => 95,
        HostError::Shutdown => 108,
    }
}

fn put_simple(out: &mut impl BufMut, cookie: Cookie, error: u32) {
    let reply = SimpleReply {
        magic: layout::SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.0.into(),
    };
    out.put_slice(reply.as_bytes());
}

/// The header of a reply's only, and so last, chunk.
fn chunk_header(kind: u16, cookie: Cookie, length: u32) -> ChunkHeader {
    ChunkHeader {
        magic: layout::CHUNK_MAGIC.into(),
        flags: chunk::FLAG_DONE.into(),
        kind: kind.into(),
        cookie: cookie.0.into(),
        length: length.into(),
    }
}
