//! Reply heads, and the one table from errors to NBD error numbers.

use block::{ByteRange, Extent, HostError};
use bytes::BufMut;
use zerocopy::IntoBytes;

use super::layout::{
    self, ChunkHeader, ErrorBody, ExtendedChunkHeader, ExtendedStatusBody, ExtendedStatusDescriptor,
    HoleBody, SimpleReply, StatusBody, StatusDescriptor, chunk, context,
};
use super::{PAYLOAD_BYTES_MAX, Refusal};

/// The most bytes of the head of a success reply, whether all of it, a read's chunk or a hole; not of a status.
pub const REPLY_HEAD_BYTES_MAX: usize = size_of::<ExtendedChunkHeader>() + size_of::<HoleBody>();
/// The longest text of an error reply; the specification says that strings should be no longer.
const ERROR_TEXT_BYTES_MAX: usize = 256;
/// The most bytes of an error reply.
pub const ERROR_REPLY_BYTES_MAX: usize =
    size_of::<ExtendedChunkHeader>() + size_of::<ErrorBody>() + ERROR_TEXT_BYTES_MAX;
/// The most extents of a status reply; the specification says that a chunk should have no more.
pub const STATUS_EXTENTS_MAX: usize = 1 << 20;

/// The client's name for a request, with what its reply depends on; replies carry the name back as it came.
///
/// Only [`super::Transmission`] makes one that names a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cookie {
    pub(super) name: u64,
    pub(super) offset: u64,
    /// Of the range asked about: a status tells no more.
    pub(super) length: u64,
    /// Do not fragment.
    pub(super) whole: bool,
    /// One extent is wanted.
    pub(super) one: bool,
}

/// How the requests and replies of a connection are framed.
///
/// All methods append to `out`, which must have room or grow. A status takes up to 40 bytes and 16 for each extent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReplyStyle {
    /// 28-byte requests, 16-byte simple replies.
    #[default]
    Simple,
    /// 28-byte requests; structured chunks for every reply, also where a simple one would be allowed: one rule, and
    /// errors have text.
    Structured,
    /// 32-byte requests with 64-bit lengths, and chunks with 32-byte headers for every reply.
    Extended,
}

impl ReplyStyle {
    /// Success without data: to every command but a read or a status, and to a request for zero bytes.
    pub fn put_success(self, out: &mut impl BufMut, cookie: Cookie) {
        match self {
            Self::Simple => put_simple(out, cookie, 0),
            Self::Structured | Self::Extended => self.put_chunk(out, cookie, chunk::NONE, true, 0),
        }
    }

    /// The head of a successful read; exactly `range.length()` bytes of data must follow, in one piece.
    ///
    /// The data is at hand when the head is written, so that no error can follow and the only chunk is the last.
    ///
    /// # Panics
    /// If the range is empty or longer than [`PAYLOAD_BYTES_MAX`]: no such read reaches a volume.
    pub fn put_read_head(self, out: &mut impl BufMut, cookie: Cookie, range: ByteRange) {
        check_part(cookie, range);
        match self {
            Self::Simple => put_simple(out, cookie, 0),
            Self::Structured | Self::Extended => self.put_data_head(out, cookie, range, true),
        }
    }

    /// True if the reply to this read may come as several chunks, and holes as such.
    pub const fn may_fragment(self, cookie: Cookie) -> bool {
        match self {
            Self::Simple => false,
            Self::Structured | Self::Extended => !cookie.whole,
        }
    }

    /// The head of a part of a read; exactly `part.length()` bytes of data must follow. The parts of a read cover its
    /// range without overlap, in any order; the last one that is sent says so, and no error may follow it.
    ///
    /// # Panics
    /// If the reply may not be fragmented, or the part is empty or not within the request.
    pub fn put_read_data_head(self, out: &mut impl BufMut, cookie: Cookie, part: ByteRange, last: bool) {
        assert!(self.may_fragment(cookie), "the reply is one piece");
        check_part(cookie, part);
        self.put_data_head(out, cookie, part, last);
    }

    /// A part of a read that is all zeros, which are not sent; else like [`ReplyStyle::put_read_data_head`].
    ///
    /// # Panics
    /// If the reply may not be fragmented, or the part is empty or not within the request.
    pub fn put_read_hole(self, out: &mut impl BufMut, cookie: Cookie, part: ByteRange, last: bool) {
        assert!(self.may_fragment(cookie), "the reply is one piece");
        check_part(cookie, part);
        let length = u32::try_from(part.length()).expect("a read's length was checked");
        let body = HoleBody { offset: part.offset().into(), length: length.into() };
        self.put_chunk(out, cookie, chunk::OFFSET_HOLE, last, size_of::<HoleBody>());
        out.put_slice(body.as_bytes());
    }

    /// The answer to a status request: what `extents` say of the bytes from the request's offset on.
    ///
    /// Extents beyond the request's end are cut off, neighbours of the same state become one, and where one extent was
    /// wanted the first is sent. At most [`STATUS_EXTENTS_MAX`] go out; the client asks on behind them.
    ///
    /// # Panics
    /// If there is no extent, one is empty, or the style cannot carry a status (no such request is handed out).
    pub fn put_status(self, out: &mut impl BufMut, cookie: Cookie, extents: &[Extent]) {
        let descriptors = || Descriptors::new(cookie, extents);
        let count = descriptors().count();
        assert!(count > 0, "a status has at least one extent");
        match self {
            Self::Simple => unreachable!("simple replies carry no status"),
            Self::Structured => {
                let body = StatusBody { context: context::BASE_ALLOCATION_ID.into() };
                let bytes = size_of::<StatusBody>() + count * size_of::<StatusDescriptor>();
                self.put_chunk(out, cookie, chunk::BLOCK_STATUS, true, bytes);
                out.put_slice(body.as_bytes());
                for extent in descriptors() {
                    let length = u32::try_from(extent.length).expect("no longer than the compact request's");
                    let descriptor =
                        StatusDescriptor { length: length.into(), flags: state(extent.zero).into() };
                    out.put_slice(descriptor.as_bytes());
                }
            }
            Self::Extended => {
                let count_field = u32::try_from(count).expect("the number of extents is bounded");
                let body = ExtendedStatusBody {
                    context: context::BASE_ALLOCATION_ID.into(),
                    count: count_field.into(),
                };
                let bytes = size_of::<ExtendedStatusBody>() + count * size_of::<ExtendedStatusDescriptor>();
                self.put_chunk(out, cookie, chunk::BLOCK_STATUS_EXT, true, bytes);
                out.put_slice(body.as_bytes());
                for extent in descriptors() {
                    let flags = u64::from(state(extent.zero));
                    let descriptor =
                        ExtendedStatusDescriptor { length: extent.length.into(), flags: flags.into() };
                    out.put_slice(descriptor.as_bytes());
                }
            }
        }
    }

    /// An error, to any command, also behind parts of a read. The text is for the client's user; it may be empty, and
    /// simple replies do not carry it. It is cut to 256 bytes.
    ///
    /// # Panics
    /// If `out` cannot take the reply.
    pub fn put_error(self, out: &mut impl BufMut, cookie: Cookie, error: HostError, text: &str) {
        self.put_error_number(out, cookie, errno(error), text);
    }

    /// The error reply to a request that [`super::Transmission`] refused.
    pub fn put_refusal(self, out: &mut impl BufMut, cookie: Cookie, refusal: Refusal) {
        match self {
            Self::Simple => put_simple(out, cookie, refusal.errno()),
            Self::Structured | Self::Extended => {
                self.put_error_number(out, cookie, refusal.errno(), &refusal.to_string());
            }
        }
    }

    fn put_error_number(self, out: &mut impl BufMut, cookie: Cookie, error: u32, text: &str) {
        match self {
            Self::Simple => put_simple(out, cookie, error),
            Self::Structured | Self::Extended => {
                let end = text.floor_char_boundary(ERROR_TEXT_BYTES_MAX);
                let text = text.get(..end).unwrap_or_default().as_bytes();
                let text_length = u16::try_from(text.len()).expect("the text was cut");
                let body = ErrorBody { error: error.into(), text_length: text_length.into() };
                self.put_chunk(out, cookie, chunk::ERROR, true, size_of::<ErrorBody>() + text.len());
                out.put_slice(body.as_bytes());
                out.put_slice(text);
            }
        }
    }

    fn put_data_head(self, out: &mut impl BufMut, cookie: Cookie, part: ByteRange, last: bool) {
        let length = usize::try_from(part.length()).expect("a read's length was checked");
        self.put_chunk(out, cookie, chunk::OFFSET_DATA, last, size_of::<u64>() + length);
        out.put_u64(part.offset());
    }

    /// The header of a chunk with `bytes` behind it.
    fn put_chunk(self, out: &mut impl BufMut, cookie: Cookie, kind: u16, last: bool, bytes: usize) {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        let length = u32::try_from(bytes).expect("a chunk is bounded");
        match self {
            Self::Simple => unreachable!("simple replies have no chunks"),
            Self::Structured => {
                let header = ChunkHeader {
                    magic: layout::CHUNK_MAGIC.into(),
                    flags: flags.into(),
                    kind: kind.into(),
                    cookie: cookie.name.into(),
                    length: length.into(),
                };
                out.put_slice(header.as_bytes());
            }
            Self::Extended => {
                let header = ExtendedChunkHeader {
                    magic: layout::EXTENDED_CHUNK_MAGIC.into(),
                    flags: flags.into(),
                    kind: kind.into(),
                    cookie: cookie.name.into(),
                    offset: cookie.offset.into(),
                    length: u64::from(length).into(),
                };
                out.put_slice(header.as_bytes());
            }
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

/// The extents of a status reply, as they are sent.
struct Descriptors<'extents> {
    rest: &'extents [Extent],
    /// Bytes of the request that no extent has covered yet.
    missing: u64,
    count_max: usize,
}

impl<'extents> Descriptors<'extents> {
    const fn new(cookie: Cookie, extents: &'extents [Extent]) -> Self {
        let count_max = if cookie.one { 1 } else { STATUS_EXTENTS_MAX };
        Self { rest: extents, missing: cookie.length, count_max }
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Extent;

    fn next(&mut self) -> Option<Extent> {
        if self.missing == 0 || self.count_max == 0 {
            return None;
        }
        let (first, mut rest) = self.rest.split_first()?;
        let mut length = first.length;
        while let Some((next, behind)) = rest.split_first()
            && next.zero == first.zero
            && length < self.missing
        {
            length = length.saturating_add(next.length);
            rest = behind;
        }
        assert!(length > 0, "extents are not empty");
        let length = length.min(self.missing);
        self.missing -= length;
        self.count_max -= 1;
        self.rest = rest;
        Some(Extent { length, zero: first.zero })
    }
}

/// Volumes are thick: no extent is a hole, to which a write could fail for want of space.
const fn state(zero: bool) -> u32 {
    if zero { context::STATE_ZERO } else { 0 }
}

fn check_part(cookie: Cookie, part: ByteRange) {
    assert!(
        (1..=u64::from(PAYLOAD_BYTES_MAX)).contains(&part.length()),
        "a read of {} bytes was never handed out",
        part.length()
    );
    assert!(
        part.offset() >= cookie.offset && part.end() - cookie.offset <= cookie.length,
        "a reply tells only of what was asked"
    );
}

fn put_simple(out: &mut impl BufMut, cookie: Cookie, error: u32) {
    let reply = SimpleReply {
        magic: layout::SIMPLE_REPLY_MAGIC.into(),
        error: error.into(),
        cookie: cookie.name.into(),
    };
    out.put_slice(reply.as_bytes());
}
