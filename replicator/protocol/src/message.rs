//! Control messages between two sites; each is one frame of the control stream.
//!
//! Cuts travel beside them on the data stream in the format of docs/formats/journal.md. The list of messages, their
//! fields and who may send what when stand in docs/protocols/replication.md.

use block::{
    ByteCount, ByteRange, Epoch, MirrorId, Monotonic, Position, Sequence, SiteId, Tip, VolumeId, VolumeIndex,
    WallTime,
};
use bytes::Bytes;

use crate::access::{
    MirrorAccess, SetAccess, decode_access, decode_set_access, encode_access, encode_set_access,
};
use crate::codec::{CodecError, Reader, Writer};
use crate::keys::{SetKeys, decode_set_keys, encode_set_keys};
use crate::lineage::{FORKS_MAX, Fork, RefusalCode};
use crate::verify::{self, VerifyReply, VerifyRequest};

/// The version that both sides must speak.
pub const PROTOCOL_VERSION: u16 = 3;
/// No control frame is longer.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

const VOLUMES_MAX: usize = 256;
const NAME_BYTES_MAX: usize = 64;
const TEXT_BYTES_MAX: usize = 1024;
const KEY_BYTES_MAX: usize = 256;
/// More ranges than this are merged by the sender into fewer, larger ones.
pub(crate) const RANGES_MAX: usize = 16_384;
const HASH_BYTES: usize = 32;
const HASHES_MAX: usize = 4096;

/// A volume as the two sides compare it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorVolume {
    /// Same on both sides.
    pub id: VolumeId,
    /// Same on both sides.
    pub name: String,
    /// Size in bytes.
    pub size: ByteCount,
    /// Storage class by name.
    pub class: String,
    /// IOPS limit that overrides the class; `None` follows the class, 0 is unlimited.
    pub iops: Option<u32>,
    /// The data key, wrapped by the key-encryption key that both sites share.
    pub wrapped_key: Vec<u8>,
    /// Who may open it: the replica begins with the primary's rules.
    pub access: MirrorAccess,
}

/// The primary opens a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Must equal [`PROTOCOL_VERSION`].
    pub version: u16,
    /// Which mirror.
    pub mirror: MirrorId,
    /// The primary's position: its last assigned sequence.
    pub position: Position,
    /// How its epochs began, oldest first.
    pub forks: Vec<Fork>,
    /// Its volumes in index order: id and size must match.
    pub volumes: Vec<(VolumeId, ByteCount)>,
    /// The target's latest clock stamp that it heard.
    pub echo: WallTime,
}

/// Bytes of one volume that may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompareRange {
    /// Which volume.
    pub volume: VolumeIndex,
    /// Unit-aligned bytes.
    pub range: ByteRange,
}

/// The target accepts a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The end of what it holds committed and durable.
    pub tip: Tip,
    /// The resync pass of which it holds staged cuts, and the last of them.
    pub staged: Option<(u64, Tip)>,
    /// False until an initial copy has completed.
    pub consistent: bool,
    /// It was a primary itself and may hold writes that the new primary never had: `compare` lists where.
    pub diverged: bool,
    /// It gave its role up in a planned switch at exactly this tip and has taken nothing since.
    pub relinquished: bool,
    /// By how much, in milliseconds of the target's clock, its image may be older than now; `None` if unknown.
    pub age_bound_ms: Option<u64>,
    /// Where a diverged side may differ.
    pub compare: Vec<CompareRange>,
    /// The target's clock.
    pub clock: WallTime,
    /// The sizes of its volumes as of its image, in index order.
    pub sizes: Vec<ByteCount>,
}

/// A session or request is refused; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refuse {
    /// Why, for machines.
    pub code: RefusalCode,
    /// The refusing side's epoch and who began it.
    pub epoch: Epoch,
    /// The site that is primary in that epoch.
    pub origin: SiteId,
    /// Where that epoch forked off.
    pub fork: Position,
    /// Why, for people.
    pub text: String,
}

/// The target tells how far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ack {
    /// The last cut on stable media.
    pub tip: Tip,
    /// True if that cut is only staged.
    pub staged: bool,
    /// Everything up to here is applied to the volumes.
    pub applied: Sequence,
    /// The target's clock.
    pub clock: WallTime,
}

/// The primary asks for the hashes of the target's image at its durable tip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HashRequest {
    /// Echoed in the reply.
    pub id: u64,
    /// Which volume.
    pub volume: VolumeIndex,
    /// Unit-aligned; at most 4096 blocks.
    pub range: ByteRange,
}

/// One BLAKE3 hash for each 4096-byte block of the range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashReply {
    /// The request's.
    pub id: u64,
    /// Hashes in block order; empty if the target could not read the range.
    pub hashes: Vec<[u8; 32]>,
}

/// What the new primary's home holds now, for a fenced side that asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OrphanReply {
    /// The request's.
    pub id: u64,
    /// In block order: a BLAKE3 hash, and true if hosts may have written the block since the epoch began; empty if the
    /// range could not be read.
    pub blocks: Vec<([u8; 32], bool)>,
}

/// Asks the partner to hold the secondary of a new mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateMirror {
    /// The new mirror.
    pub mirror: MirrorId,
    /// Its name, the same on both sides.
    pub name: String,
    /// The primary.
    pub origin: SiteId,
    /// RPO budget in seconds.
    pub rpo_seconds: u64,
    /// A fingerprint of the key-encryption key; both sites must share the key.
    pub key_fingerprint: String,
    /// In index order.
    pub volumes: Vec<MirrorVolume>,
}

/// Every control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Primary to target: opens a session.
    Hello(Hello),
    /// Target to primary: the session is open.
    Welcome(Welcome),
    /// Either way: refused, with the reason.
    Refuse(Refuse),
    /// Target to primary: progress.
    Ack(Ack),
    /// Primary to target: the staged cuts of this pass are void.
    AbortPass {
        /// The pass.
        pass: u64,
    },
    /// Target to primary: the pass does not fit into the reserve; the old image stays.
    PassRefused {
        /// The pass.
        pass: u64,
        /// How many bytes are missing at least.
        missing: ByteCount,
    },
    /// Primary to target.
    HashRequest(HashRequest),
    /// Target to primary.
    HashReply(HashReply),
    /// New primary to fenced old primary: bytes in which it differs and that wait for an operator.
    Orphans {
        /// At most this many bytes of its own.
        bytes: ByteCount,
        /// True while an operator's `start` is awaited.
        waiting: bool,
    },
    /// Primary to target: what do you hold at this point of the order?
    VerifyRequest(VerifyRequest),
    /// Target to primary.
    VerifyReply(VerifyReply),
    /// Fenced side to new primary: what does your home hold here? At most 1 MiB.
    OrphanRequest(HashRequest),
    /// New primary to fenced side.
    OrphanReply(OrphanReply),
    /// Primary to target: can you take the role over?
    SwitchAsk,
    /// Target to primary: the answer.
    SwitchReady {
        /// Why not; empty if it can.
        trouble: String,
    },
    /// A side that durably gave its role up to its target: take it, at exactly this tip.
    Relinquish {
        /// Everything that its hosts ever wrote.
        tip: Tip,
    },
    /// Primary to target: make room for a volume that is to grow.
    Grow {
        /// Which volume.
        volume: VolumeIndex,
        /// The room wanted.
        size: ByteCount,
    },
    /// Target to primary: the answer.
    Grown {
        /// Which volume.
        volume: VolumeIndex,
        /// The room that was wanted.
        size: ByteCount,
        /// Why there is none; empty if there is.
        trouble: String,
    },
    /// Primary to target: mirroring is synchronous, a lease can be asked for.
    LeaseOffer,
    /// Target to primary: give me a lease from this moment of my monotonic clock on.
    LeaseAsk {
        /// The target's own clock when it asked.
        asked: Monotonic,
    },
    /// Primary to target: it is yours.
    LeaseGrant {
        /// The ask's.
        asked: Monotonic,
    },
    /// Site to partner, first frame of its own session.
    CreateMirror(CreateMirror),
    /// The partner holds the secondary.
    Created {
        /// The partner's identity.
        site: SiteId,
    },
    /// Site to partner: forget this mirror.
    DeleteMirror {
        /// Which.
        mirror: MirrorId,
        /// The sender's epoch; a lower one than the receiver's is refused.
        epoch: Epoch,
    },
    /// It is forgotten.
    Deleted,
    /// Primary to target, first frame of its own session.
    SetAccess(SetAccess),
    /// It is durable there.
    AccessSet,
    /// Primary to target, first frame of its own session.
    SetKeys(SetKeys),
    /// It is durable there.
    KeysSet,
    /// Are you there?
    Ping,
    /// Yes.
    Pong {
        /// The answering site.
        site: SiteId,
        /// Its name.
        name: String,
    },
}

const HELLO: u8 = 1;
const WELCOME: u8 = 2;
const REFUSE: u8 = 3;
const ACK: u8 = 4;
const ABORT_PASS: u8 = 5;
const PASS_REFUSED: u8 = 6;
const HASH_REQUEST: u8 = 7;
const HASH_REPLY: u8 = 8;
const ORPHANS: u8 = 9;
const SWITCH_ASK: u8 = 10;
const SWITCH_READY: u8 = 11;
const RELINQUISH: u8 = 12;
const ORPHAN_REQUEST: u8 = 13;
const ORPHAN_REPLY: u8 = 14;
const CREATE_MIRROR: u8 = 16;
const CREATED: u8 = 17;
const DELETE_MIRROR: u8 = 18;
const DELETED: u8 = 19;
const PING: u8 = 20;
const PONG: u8 = 21;
const VERIFY_REQUEST: u8 = 24;
const VERIFY_REPLY: u8 = 25;
const LEASE_OFFER: u8 = 30;
const LEASE_ASK: u8 = 31;
const LEASE_GRANT: u8 = 32;
const SET_ACCESS: u8 = 22;
const ACCESS_SET: u8 = 23;
const GROW: u8 = 26;
const GROWN: u8 = 27;
const SET_KEYS: u8 = 40;
const KEYS_SET: u8 = 41;

impl Message {
    /// The frame's bytes.
    ///
    /// # Panics
    /// If the message is longer than [`MESSAGE_BYTES_MAX`]: its maker keeps its lists short.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::default();
        match self {
            Self::Hello(hello) => encode_hello(&mut out, hello),
            Self::Welcome(welcome) => encode_welcome(&mut out, welcome),
            Self::Refuse(refuse) => encode_refuse(&mut out, refuse),
            Self::Ack(ack) => encode_ack(&mut out, ack),
            Self::AbortPass { pass } => encode_number(&mut out, ABORT_PASS, *pass),
            Self::PassRefused { pass, missing } => {
                out.u8(PASS_REFUSED);
                out.u64(*pass);
                out.u64(missing.0);
            }
            Self::HashRequest(request) => encode_request(&mut out, HASH_REQUEST, request),
            Self::HashReply(reply) => encode_hash_reply(&mut out, reply),
            Self::Orphans { bytes, waiting } => {
                out.u8(ORPHANS);
                out.u64(bytes.0);
                out.bool(*waiting);
            }
            Self::VerifyRequest(request) => {
                out.u8(VERIFY_REQUEST);
                verify::encode_request(&mut out, request);
            }
            Self::VerifyReply(reply) => {
                out.u8(VERIFY_REPLY);
                verify::encode_reply(&mut out, reply);
            }
            Self::OrphanRequest(request) => encode_request(&mut out, ORPHAN_REQUEST, request),
            Self::OrphanReply(reply) => encode_orphan_reply(&mut out, reply),
            Self::SwitchAsk => out.u8(SWITCH_ASK),
            Self::SwitchReady { trouble } => encode_text(&mut out, SWITCH_READY, cut_short(trouble)),
            Self::Relinquish { tip } => {
                out.u8(RELINQUISH);
                out.tip(tip);
            }
            Self::Grow { volume, size } => encode_grow(&mut out, GROW, *volume, *size),
            Self::Grown { volume, size, trouble } => {
                encode_grow(&mut out, GROWN, *volume, *size);
                out.counted(cut_short(trouble).as_bytes());
            }
            Self::LeaseOffer => out.u8(LEASE_OFFER),
            Self::LeaseAsk { asked } => encode_stamp(&mut out, LEASE_ASK, *asked),
            Self::LeaseGrant { asked } => encode_stamp(&mut out, LEASE_GRANT, *asked),
            Self::CreateMirror(create) => encode_create(&mut out, create),
            Self::Created { site } => {
                out.u8(CREATED);
                out.raw(&site.to_bytes());
            }
            Self::DeleteMirror { mirror, epoch } => {
                out.u8(DELETE_MIRROR);
                out.raw(&mirror.to_bytes());
                out.u64(epoch.0);
            }
            Self::Deleted => out.u8(DELETED),
            Self::SetAccess(set) => encode_set_access(&mut out, SET_ACCESS, set),
            Self::AccessSet => out.u8(ACCESS_SET),
            Self::SetKeys(set) => encode_set_keys(&mut out, SET_KEYS, set),
            Self::KeysSet => out.u8(KEYS_SET),
            Self::Ping => out.u8(PING),
            Self::Pong { site, name } => {
                out.u8(PONG);
                out.raw(&site.to_bytes());
                out.counted(name.as_bytes());
            }
        }
        let bytes = out.finish();
        assert!(bytes.len() <= MESSAGE_BYTES_MAX, "a message fits into a frame");
        bytes.into()
    }

    /// Parses a frame.
    ///
    /// # Errors
    /// Any byte that the format does not allow, also bytes after the message's end.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut input = Reader::new(bytes);
        let message = match input.u8()? {
            HELLO => Self::Hello(decode_hello(&mut input)?),
            WELCOME => Self::Welcome(decode_welcome(&mut input)?),
            REFUSE => Self::Refuse(decode_refuse(&mut input)?),
            ACK => Self::Ack(Ack {
                tip: input.tip()?,
                staged: input.bool("staged")?,
                applied: Sequence(input.u64()?),
                clock: input.wall_time()?,
            }),
            ABORT_PASS => Self::AbortPass { pass: input.u64()? },
            PASS_REFUSED => Self::PassRefused { pass: input.u64()?, missing: ByteCount(input.u64()?) },
            HASH_REQUEST => Self::HashRequest(hash_request(&mut input)?),
            ORPHAN_REQUEST => Self::OrphanRequest(hash_request(&mut input)?),
            ORPHAN_REPLY => {
                let id = input.u64()?;
                let count = input.count("blocks", HASHES_MAX)?;
                let mut block = || Ok((input.array::<HASH_BYTES>()?, input.bool("changed")?));
                let blocks = (0..count).map(|_| block()).collect::<Result<_, CodecError>>()?;
                Self::OrphanReply(OrphanReply { id, blocks })
            }
            HASH_REPLY => {
                let id = input.u64()?;
                let count = input.count("hashes", HASHES_MAX)?;
                let hashes = (0..count).map(|_| input.array::<HASH_BYTES>()).collect::<Result<_, _>>()?;
                Self::HashReply(HashReply { id, hashes })
            }
            ORPHANS => Self::Orphans { bytes: ByteCount(input.u64()?), waiting: input.bool("waiting")? },
            VERIFY_REQUEST => Self::VerifyRequest(verify::decode_request(&mut input)?),
            VERIFY_REPLY => Self::VerifyReply(verify::decode_reply(&mut input)?),
            LEASE_OFFER => Self::LeaseOffer,
            LEASE_ASK => Self::LeaseAsk { asked: Monotonic(input.u64()?) },
            LEASE_GRANT => Self::LeaseGrant { asked: Monotonic(input.u64()?) },
            SWITCH_ASK => Self::SwitchAsk,
            SWITCH_READY => Self::SwitchReady { trouble: input.text("trouble", TEXT_BYTES_MAX)? },
            RELINQUISH => Self::Relinquish { tip: input.tip()? },
            GROW => Self::Grow { volume: VolumeIndex(input.u16()?), size: ByteCount(input.u64()?) },
            GROWN => Self::Grown {
                volume: VolumeIndex(input.u16()?),
                size: ByteCount(input.u64()?),
                trouble: input.text("trouble", TEXT_BYTES_MAX)?,
            },
            CREATE_MIRROR => Self::CreateMirror(decode_create(&mut input)?),
            CREATED => Self::Created { site: input.site()? },
            DELETE_MIRROR => Self::DeleteMirror {
                mirror: MirrorId::from_bytes(input.array()?),
                epoch: Epoch(input.u64()?),
            },
            DELETED => Self::Deleted,
            SET_ACCESS => Self::SetAccess(decode_set_access(&mut input)?),
            ACCESS_SET => Self::AccessSet,
            SET_KEYS => Self::SetKeys(decode_set_keys(&mut input)?),
            KEYS_SET => Self::KeysSet,
            PING => Self::Ping,
            PONG => Self::Pong { site: input.site()?, name: input.text("name", NAME_BYTES_MAX)? },
            value => {
                return Err(CodecError::Unknown { field: "message", value: u64::from(value) });
            }
        };
        input.finish()?;
        Ok(message)
    }
}

fn encode_grow(out: &mut Writer, kind: u8, volume: VolumeIndex, size: ByteCount) {
    out.u8(kind);
    out.u16(volume.0);
    out.u64(size.0);
}

fn range(out: &mut Writer, volume: VolumeIndex, range: ByteRange) {
    out.u16(volume.0);
    out.u64(range.offset());
    out.u64(range.length());
}

fn hash_request(input: &mut Reader<'_>) -> Result<HashRequest, CodecError> {
    let id = input.u64()?;
    let CompareRange { volume, range } = compare_range(input)?;
    Ok(HashRequest { id, volume, range })
}

fn compare_range(input: &mut Reader<'_>) -> Result<CompareRange, CodecError> {
    let volume = VolumeIndex(input.u16()?);
    let (offset, length) = (input.u64()?, input.u64()?);
    let range = ByteRange::new(offset, length).filter(|range| range.is_unit_aligned());
    let range = range.ok_or(CodecError::Unknown { field: "range", value: offset })?;
    Ok(CompareRange { volume, range })
}

pub(crate) fn encode_forks(out: &mut Writer, forks: &[Fork]) {
    out.count(forks.len());
    for fork in forks {
        out.u64(fork.epoch.0);
        out.raw(&fork.origin.to_bytes());
        out.position(&fork.at);
    }
}

pub(crate) fn decode_forks(input: &mut Reader<'_>) -> Result<Vec<Fork>, CodecError> {
    let count = input.count("forks", FORKS_MAX)?;
    let fork = |input: &mut Reader<'_>| {
        Ok(Fork { epoch: Epoch(input.u64()?), origin: input.site()?, at: input.position()? })
    };
    (0..count).map(|_| fork(input)).collect()
}

fn encode_number(out: &mut Writer, kind: u8, number: u64) {
    out.u8(kind);
    out.u64(number);
}

fn encode_text(out: &mut Writer, kind: u8, text: &str) {
    out.u8(kind);
    out.counted(text.as_bytes());
}

fn encode_stamp(out: &mut Writer, kind: u8, stamp: Monotonic) {
    out.u8(kind);
    out.u64(stamp.0);
}

fn encode_hello(out: &mut Writer, hello: &Hello) {
    out.u8(HELLO);
    out.u16(hello.version);
    out.raw(&hello.mirror.to_bytes());
    out.position(&hello.position);
    encode_forks(out, &hello.forks);
    out.count(hello.volumes.len());
    for (id, size) in &hello.volumes {
        out.raw(&id.to_bytes());
        out.u64(size.0);
    }
    out.u64(hello.echo.0);
}

fn decode_hello(input: &mut Reader<'_>) -> Result<Hello, CodecError> {
    let version = input.u16()?;
    if version != PROTOCOL_VERSION {
        return Err(CodecError::Unknown { field: "version", value: u64::from(version) });
    }
    let mirror = MirrorId::from_bytes(input.array()?);
    let position = input.position()?;
    let forks = decode_forks(input)?;
    let count = input.count("volumes", VOLUMES_MAX)?;
    let volume = |input: &mut Reader<'_>| Ok((VolumeId::from_bytes(input.array()?), ByteCount(input.u64()?)));
    let volumes = (0..count).map(|_| volume(input)).collect::<Result<_, _>>()?;
    Ok(Hello { version, mirror, position, forks, volumes, echo: input.wall_time()? })
}

fn encode_welcome(out: &mut Writer, welcome: &Welcome) {
    out.u8(WELCOME);
    out.tip(&welcome.tip);
    out.bool(welcome.staged.is_some());
    if let Some((pass, tip)) = &welcome.staged {
        out.u64(*pass);
        out.tip(tip);
    }
    out.bool(welcome.consistent);
    out.bool(welcome.diverged);
    out.bool(welcome.relinquished);
    out.u64(welcome.age_bound_ms.unwrap_or(u64::MAX));
    assert!(welcome.compare.len() <= RANGES_MAX, "compare ranges are merged before they are sent");
    out.count(welcome.compare.len());
    welcome.compare.iter().for_each(|entry| range(out, entry.volume, entry.range));
    out.u64(welcome.clock.0);
    out.count(welcome.sizes.len());
    welcome.sizes.iter().for_each(|size| out.u64(size.0));
}

fn decode_welcome(input: &mut Reader<'_>) -> Result<Welcome, CodecError> {
    let tip = input.tip()?;
    let staged = if input.bool("staged")? { Some((input.u64()?, input.tip()?)) } else { None };
    let consistent = input.bool("consistent")?;
    let diverged = input.bool("diverged")?;
    let relinquished = input.bool("relinquished")?;
    let age_bound_ms = Some(input.u64()?).filter(|age| *age != u64::MAX);
    let count = input.count("compare", RANGES_MAX)?;
    let compare = (0..count).map(|_| compare_range(input)).collect::<Result<_, _>>()?;
    let clock = input.wall_time()?;
    let count = input.count("sizes", VOLUMES_MAX)?;
    let sizes = (0..count).map(|_| Ok(ByteCount(input.u64()?))).collect::<Result<_, CodecError>>()?;
    Ok(Welcome { tip, staged, consistent, diverged, relinquished, age_bound_ms, compare, clock, sizes })
}

fn encode_ack(out: &mut Writer, ack: &Ack) {
    out.u8(ACK);
    out.tip(&ack.tip);
    out.bool(ack.staged);
    out.u64(ack.applied.0);
    out.u64(ack.clock.0);
}

/// A request about the blocks of a range.
fn encode_request(out: &mut Writer, kind: u8, request: &HashRequest) {
    out.u8(kind);
    out.u64(request.id);
    range(out, request.volume, request.range);
}

fn encode_orphan_reply(out: &mut Writer, reply: &OrphanReply) {
    out.u8(ORPHAN_REPLY);
    out.u64(reply.id);
    out.count(reply.blocks.len());
    for (hash, changed) in &reply.blocks {
        out.raw(hash);
        out.bool(*changed);
    }
}

fn encode_hash_reply(out: &mut Writer, reply: &HashReply) {
    out.u8(HASH_REPLY);
    out.u64(reply.id);
    out.count(reply.hashes.len());
    reply.hashes.iter().for_each(|hash| out.raw(hash));
}

fn encode_refuse(out: &mut Writer, refuse: &Refuse) {
    out.u8(REFUSE);
    out.u8(refuse.code.to_byte());
    out.u64(refuse.epoch.0);
    out.raw(&refuse.origin.to_bytes());
    out.position(&refuse.fork);
    out.counted(cut_short(&refuse.text).as_bytes());
}

/// The text, or as much of it as a message may carry.
fn cut_short(text: &str) -> &str {
    let mut text = text;
    while text.len() > TEXT_BYTES_MAX {
        let shorter = text.char_indices().next_back().map_or(0, |(index, _)| index);
        text = text.get(..shorter).unwrap_or("");
    }
    text
}

fn decode_refuse(input: &mut Reader<'_>) -> Result<Refuse, CodecError> {
    let code = input.u8()?;
    Ok(Refuse {
        code: RefusalCode::from_byte(code)
            .ok_or(CodecError::Unknown { field: "code", value: u64::from(code) })?,
        epoch: Epoch(input.u64()?),
        origin: input.site()?,
        fork: input.position()?,
        text: input.text("text", TEXT_BYTES_MAX)?,
    })
}

fn encode_create(out: &mut Writer, create: &CreateMirror) {
    out.u8(CREATE_MIRROR);
    out.u16(PROTOCOL_VERSION);
    out.raw(&create.mirror.to_bytes());
    out.counted(create.name.as_bytes());
    out.raw(&create.origin.to_bytes());
    out.u64(create.rpo_seconds);
    out.counted(create.key_fingerprint.as_bytes());
    out.count(create.volumes.len());
    for volume in &create.volumes {
        out.raw(&volume.id.to_bytes());
        out.counted(volume.name.as_bytes());
        out.u64(volume.size.0);
        out.counted(volume.class.as_bytes());
        out.bool(volume.iops.is_some());
        out.u32(volume.iops.unwrap_or(0));
        out.counted(&volume.wrapped_key);
        encode_access(out, &volume.access);
    }
}

fn decode_create(input: &mut Reader<'_>) -> Result<CreateMirror, CodecError> {
    let version = input.u16()?;
    if version != PROTOCOL_VERSION {
        return Err(CodecError::Unknown { field: "version", value: u64::from(version) });
    }
    let mirror = MirrorId::from_bytes(input.array()?);
    let name = input.text("name", NAME_BYTES_MAX)?;
    let origin = input.site()?;
    let rpo_seconds = input.u64()?;
    let key_fingerprint = input.text("key fingerprint", NAME_BYTES_MAX)?;
    let count = input.count("volumes", VOLUMES_MAX)?;
    let volumes = (0..count).map(|_| decode_volume(input)).collect::<Result<_, _>>()?;
    Ok(CreateMirror { mirror, name, origin, rpo_seconds, key_fingerprint, volumes })
}

fn decode_volume(input: &mut Reader<'_>) -> Result<MirrorVolume, CodecError> {
    let id = VolumeId::from_bytes(input.array()?);
    let name = input.text("volume name", NAME_BYTES_MAX)?;
    let size = ByteCount(input.u64()?);
    let class = input.text("class", NAME_BYTES_MAX)?;
    let has_iops = input.bool("iops")?;
    let value = input.u32()?;
    if !has_iops && value != 0 {
        return Err(CodecError::Unknown { field: "iops", value: u64::from(value) });
    }
    let iops = has_iops.then_some(value);
    let wrapped_key = input.counted("wrapped key", KEY_BYTES_MAX)?;
    let access = decode_access(input)?;
    Ok(MirrorVolume { id, name, size, class, iops, wrapped_key, access })
}

#[cfg(test)]
mod tests {
    use block::Incarnation;
    use proptest::prelude::*;

    use super::*;
    use crate::access::MirrorHost;

    fn position() -> Position {
        Position {
            epoch: Epoch(3),
            origin: SiteId::from_bytes([7; 16]),
            incarnation: Incarnation(2),
            sequence: Sequence(99),
        }
    }

    fn samples() -> Vec<Message> {
        [session_samples(), lone_samples()].concat()
    }

    /// Messages of a mirror's session.
    fn session_samples() -> Vec<Message> {
        let position = position();
        let tip = Tip { position, chain: block::ChainHash([9; 32]) };
        let range = ByteRange::new(4096, 8192).unwrap();
        vec![
            Message::Hello(Hello {
                version: PROTOCOL_VERSION,
                mirror: MirrorId::from_bytes([2; 16]),
                position,
                forks: vec![Fork { epoch: Epoch(3), origin: position.origin, at: position }],
                volumes: vec![(VolumeId::from_bytes([1; 16]), ByteCount(1 << 30))],
                echo: WallTime(5),
            }),
            Message::Welcome(Welcome {
                tip,
                staged: Some((4, tip)),
                consistent: true,
                diverged: true,
                relinquished: false,
                age_bound_ms: Some(10),
                compare: vec![CompareRange { volume: VolumeIndex(0), range }],
                clock: WallTime(77),
                sizes: vec![ByteCount(1 << 30), ByteCount(1 << 20)],
            }),
            Message::Refuse(Refuse {
                code: RefusalCode::StaleEpoch,
                epoch: Epoch(4),
                origin: position.origin,
                fork: position,
                text: "old".into(),
            }),
            Message::Ack(Ack { tip, staged: false, applied: Sequence(98), clock: WallTime(1) }),
            Message::AbortPass { pass: 9 },
            Message::PassRefused { pass: 9, missing: ByteCount(4096) },
            Message::HashRequest(HashRequest { id: 1, volume: VolumeIndex(3), range }),
            Message::HashReply(HashReply { id: 1, hashes: vec![[1; 32], [2; 32]] }),
            Message::Orphans { bytes: ByteCount(8192), waiting: true },
            Message::OrphanRequest(HashRequest { id: 2, volume: VolumeIndex(1), range }),
            Message::OrphanReply(OrphanReply { id: 2, blocks: vec![([1; 32], true), ([2; 32], false)] }),
            Message::SwitchAsk,
            Message::SwitchReady { trouble: "locked".into() },
            Message::Relinquish { tip },
            Message::Grow { volume: VolumeIndex(1), size: ByteCount(1 << 21) },
            Message::Grown { volume: VolumeIndex(1), size: ByteCount(1 << 21), trouble: "full".into() },
            Message::LeaseOffer,
            Message::LeaseAsk { asked: Monotonic(77) },
            Message::LeaseGrant { asked: Monotonic(77) },
        ]
    }

    /// Messages that are alone in a session of their own.
    fn lone_samples() -> Vec<Message> {
        let position = position();
        let volume = MirrorVolume {
            id: VolumeId::from_bytes([1; 16]),
            name: "db".into(),
            size: ByteCount(1 << 30),
            class: "standard".into(),
            iops: Some(500),
            wrapped_key: vec![5; 72],
            access: MirrorAccess {
                tls_required: true,
                read_only: false,
                hosts: vec![MirrorHost { identity: "host 1".into(), read_only: true }],
            },
        };
        let access = (volume.id, 7, volume.access.clone());
        vec![
            Message::CreateMirror(CreateMirror {
                mirror: MirrorId::from_bytes([2; 16]),
                name: "m".into(),
                origin: position.origin,
                rpo_seconds: 900,
                key_fingerprint: "00ff".into(),
                volumes: vec![volume],
            }),
            Message::Created { site: position.origin },
            Message::DeleteMirror { mirror: MirrorId::from_bytes([2; 16]), epoch: Epoch(1) },
            Message::Deleted,
            Message::SetAccess(SetAccess {
                mirror: MirrorId::from_bytes([2; 16]),
                epoch: Epoch(1),
                volumes: vec![access],
            }),
            Message::AccessSet,
            Message::SetKeys(SetKeys {
                mirror: MirrorId::from_bytes([2; 16]),
                epoch: Epoch(1),
                lock: crate::TenantLock::Lock,
                volumes: vec![(VolumeId::from_bytes([1; 16]), vec![6; 248])],
            }),
            Message::KeysSet,
            Message::Ping,
            Message::Pong { site: position.origin, name: "east".into() },
            Message::VerifyRequest(VerifyRequest {
                id: 5,
                volume: VolumeIndex(3),
                range: ByteRange::new(4096, 8192).unwrap(),
                at: position,
                content: true,
            }),
            Message::VerifyReply(VerifyReply {
                id: 5,
                through: position,
                held: verify::Held::Hashes(vec![[1; 32], [2; 32]]),
            }),
            Message::VerifyReply(VerifyReply {
                id: 6,
                through: position,
                held: verify::Held::Content(Bytes::from_static(b"block")),
            }),
            Message::VerifyReply(VerifyReply { id: 7, through: position, held: verify::Held::Unreadable }),
        ]
    }

    #[test]
    fn every_message_survives_the_round_trip_and_no_truncation_is_accepted() {
        for message in samples() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes).unwrap(), message);
            for length in 0..bytes.len() {
                assert!(Message::decode(&bytes[..length]).is_err(), "{message:?} cut to {length}");
            }
            let mut longer = bytes.to_vec();
            longer.push(0);
            assert!(matches!(Message::decode(&longer), Err(CodecError::Trailing(1))));
        }
    }

    proptest! {
        #[test]
        fn what_decodes_encodes_to_the_same_bytes(message in proptest::sample::select(samples()), at in 0_usize..400, value: u8) {
            let mut bytes = message.encode().to_vec();
            let at = at % bytes.len();
            bytes[at] = value;
            if let Ok(message) = Message::decode(&bytes) {
                prop_assert_eq!(message.encode().to_vec(), bytes);
            }
        }
    }
}
