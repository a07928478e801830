//! Messages by which a primary compares its target's image with its own at one point of the write order
//! (docs/protocols/replication.md, "Verify").

use block::{ByteRange, DATA_UNIT_BYTES, Position, VolumeIndex};
use bytes::Bytes;

use crate::codec::{CodecError, Reader, Writer};

/// The most blocks that one request names.
pub const VERIFY_BLOCKS_MAX: u64 = 64;
const HASH_BYTES: usize = 32;

/// The primary asks what the target holds once its image includes a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyRequest {
    /// Echoed in the reply.
    pub id: u64,
    /// Which volume.
    pub volume: VolumeIndex,
    /// Unit-aligned; 1 to [`VERIFY_BLOCKS_MAX`] blocks.
    pub range: ByteRange,
    /// The image must include it before it is read.
    pub at: Position,
    /// The bytes themselves are wanted, not their hashes.
    pub content: bool,
}

/// What the target holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// One BLAKE3 hash for each block.
    Hashes(Vec<[u8; HASH_BYTES]>),
    /// The blocks.
    Content(Bytes),
    /// It cannot be read.
    Unreadable,
}

/// The target's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyReply {
    /// The request's.
    pub id: u64,
    /// The image that was read includes nothing behind it.
    pub through: Position,
    /// What was read.
    pub held: Held,
}

pub(crate) fn encode_request(out: &mut Writer, request: &VerifyRequest) {
    out.u64(request.id);
    out.u16(request.volume.0);
    out.u64(request.range.offset());
    out.u64(request.range.length());
    out.position(&request.at);
    out.bool(request.content);
}

pub(crate) fn decode_request(input: &mut Reader<'_>) -> Result<VerifyRequest, CodecError> {
    let id = input.u64()?;
    let volume = VolumeIndex(input.u16()?);
    let (offset, length) = (input.u64()?, input.u64()?);
    let allowed = DATA_UNIT_BYTES..=VERIFY_BLOCKS_MAX * DATA_UNIT_BYTES;
    let range =
        ByteRange::new(offset, length).filter(|range| range.is_unit_aligned() && allowed.contains(&length));
    let range = range.ok_or(CodecError::Unknown { field: "range", value: offset })?;
    Ok(VerifyRequest { id, volume, range, at: input.position()?, content: input.bool("content")? })
}

pub(crate) fn encode_reply(out: &mut Writer, reply: &VerifyReply) {
    out.u64(reply.id);
    out.position(&reply.through);
    match &reply.held {
        Held::Unreadable => out.u8(0),
        Held::Hashes(hashes) => {
            out.u8(1);
            out.count(hashes.len());
            hashes.iter().for_each(|hash| out.raw(hash));
        }
        Held::Content(bytes) => {
            out.u8(2);
            out.counted(bytes);
        }
    }
}

pub(crate) fn decode_reply(input: &mut Reader<'_>) -> Result<VerifyReply, CodecError> {
    let id = input.u64()?;
    let through = input.position()?;
    let blocks = usize::try_from(VERIFY_BLOCKS_MAX).unwrap_or(0);
    let bytes = usize::try_from(VERIFY_BLOCKS_MAX * DATA_UNIT_BYTES).unwrap_or(0);
    let held = match input.u8()? {
        0 => Held::Unreadable,
        1 => {
            let count = input.count("hashes", blocks)?;
            let hashes = (0..count).map(|_| input.array::<HASH_BYTES>()).collect::<Result<_, _>>()?;
            Held::Hashes(hashes)
        }
        2 => Held::Content(input.counted("content", bytes)?.into()),
        value => return Err(CodecError::Unknown { field: "held", value: u64::from(value) }),
    };
    Ok(VerifyReply { id, through, held })
}
