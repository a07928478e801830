//! A volume's header: what the catalogue says of it, a second time, beside its data.
//!
//! The byte layout and the rules are docs/formats/catalogue.md's. Two slots hold two generations; a write goes to the
//! slot of the older, so that a torn write leaves the newer one whole. The module knows one header; which of several
//! tells the truth is decided elsewhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use block::{ByteCount, IopsLimit, MirrorId, SiteId, VolumeId, VolumeIndex};
use control::{
    ACCESS_HOSTS_BYTES_MAX, ACCESS_HOSTS_MAX, CERTIFICATE_BYTES_MAX, Cache, HostAccess, Iops, LinkFailure,
    MirrorMode, Overload, Rate, Role, VolumeAccess,
};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::fuse::Fuse;
use super::record::{
    GROUP_STATE_BYTES_MAX, GroupRecord, MirrorRecord, PartnerRecord, VolumeRecord, WRAPPED_KEY_BYTES_MAX,
};

/// The header's file name in the volume's folder.
pub const FILE_NAME: &str = "header";
/// Bytes in a slot.
const SLOT_BYTES: usize = 16 << 10;
/// Bytes in a header.
pub(super) const HEADER_BYTES: usize = 2 * SLOT_BYTES;
/// The same as a file offset.
const SLOT_OFFSET: u64 = 16 << 10;
const MAGIC: [u8; 8] = *b"FARSHVOL";
/// Version 4 lacks the mirror's policy on link failure, version 3 also its rates, version 2 also the volume's revision,
/// version 1 also the access to it: their places are zero there, which means that the mode gives way, no limit, that
/// nothing was changed yet, and any host.
const VERSION: u32 = 5;
const VERSIONS: std::ops::RangeInclusive<u32> = 1..=VERSION;
const FIXED_BYTES: usize = 256;
const TEXT_BYTES: usize = SLOT_BYTES - FIXED_BYTES;
/// How many texts follow the fixed part: name, class, wrapped key; then the mirror's name, the partner's name, address
/// and certificate, and the group's state; then the hosts that may open the volume.
const TEXTS: usize = 9;
/// Bits of `access`.
const ACCESS_TLS_REQUIRED: u8 = 1;
const ACCESS_READ_ONLY: u8 = 2;

/// `iops` of a volume that takes its class's limit; no limit of 0 exists.
const IOPS_OF_CLASS: u32 = 0;
/// `iops` of an unlimited volume, in its own field beside the number.
const IOPS_UNLIMITED: u8 = 1;

/// The fixed part of a slot.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Fixed {
    magic: [u8; 8],
    version: U32,
    checksum: U32,
    generation: U64,
    site: [u8; 16],
    volume: [u8; 16],
    size: U64,
    iops: U32,
    iops_unlimited: u8,
    life: u8,
    cache: u8,
    link: u8,
    role: u8,
    mode: u8,
    overload: u8,
    rebuilt: u8,
    index: U16,
    volume_count: U16,
    rpo_seconds: U32,
    mirror: [u8; 16],
    epoch: U64,
    incarnation: U64,
    revision: U64,
    text_lengths: [U16; TEXTS],
    access: u8,
    reserved_before: u8,
    volume_revision: U64,
    bandwidth: U64,
    resync_rate: U64,
    on_link_failure: u8,
    reserved: [u8; 87],
}

/// A whole slot.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Slot {
    fixed: Fixed,
    text: [u8; TEXT_BYTES],
}

const _: () = assert!(size_of::<Fixed>() == FIXED_BYTES);
const _: () = assert!(size_of::<Slot>() == SLOT_BYTES);
// Four names of 64 bytes and an address of 256 stand beside the long texts.
const _: () = assert!(
    4 * 64
        + 256
        + WRAPPED_KEY_BYTES_MAX
        + CERTIFICATE_BYTES_MAX
        + GROUP_STATE_BYTES_MAX
        + ACCESS_HOSTS_BYTES_MAX
        <= TEXT_BYTES
);

/// Where a volume is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    /// Not in the catalogue yet; its creation was not acknowledged.
    Creating,
    /// In the catalogue.
    Live,
    /// No longer in the catalogue, or about to leave it.
    Deleting,
}

/// The mirror that the volume is part of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MirrorPart {
    /// False while the mirror is being made or deleted.
    pub(super) settled: bool,
    /// The volume's index in the group.
    pub(super) index: VolumeIndex,
    /// How many volumes the group has.
    pub(super) volume_count: u16,
    /// The mirror; its list of volumes is empty here.
    pub(super) mirror: MirrorRecord,
    /// Its partner.
    pub(super) partner: PartnerRecord,
}

/// A header's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// The site that the volume belongs to.
    pub(super) site: SiteId,
    /// Where the volume is in its life.
    pub(super) life: Life,
    /// The volume.
    pub(super) volume: VolumeRecord,
    /// Its mirror, if any.
    pub(super) mirror: Option<MirrorPart>,
}

/// Why a header cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum HeaderError {
    /// The file cannot be read.
    #[error("{0}")]
    File(#[from] io::Error),
    /// Neither slot is whole.
    #[error("neither of its two slots is whole")]
    Damaged,
    /// A slot is whole, and of a version that we do not know.
    #[error("its version is {0}, this daemon knows versions up to {VERSION}")]
    Version(u32),
    /// A slot is whole, and holds what no daemon writes.
    #[error("its field '{0}' has no meaning")]
    Field(&'static str),
}

impl Header {
    /// Reads the newer whole slot of the volume in `folder`; `pool` is where that folder lies.
    ///
    /// # Errors
    /// The file is not there, or neither slot is whole.
    pub(super) fn read(folder: &Path, pool: &block::VolumeName) -> Result<Self, HeaderError> {
        let file = File::open(folder.join(FILE_NAME))?;
        let newest = newest(&file)?.ok_or(HeaderError::Damaged)?;
        Self::decode(&newest, pool)
    }

    /// True if both slots are whole and hold different wrapped keys.
    pub(super) fn has_old_key(folder: &Path) -> bool {
        let slots = File::open(folder.join(FILE_NAME)).and_then(|file| slots(&file));
        let Ok([Some(one), Some(other)]) = slots else { return false };
        let key = |slot: &Slot| slot.texts().map(|[_, _, key, ..]| key.to_vec());
        key(&one) != key(&other)
    }

    /// Writes the header over its older slot and makes it durable; makes the file if it is missing.
    ///
    /// # Errors
    /// The file cannot be written; the newer slot is as it was.
    pub(super) fn write(&self, folder: &Path, fuse: &Fuse) -> io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(folder.join(FILE_NAME))?;
        let generation = newest(&file)?.map_or(0, |slot| slot.fixed.generation.get());
        let generation = generation.saturating_add(1);
        let slot = self.encode(generation);
        let offset = generation % 2 * SLOT_OFFSET;
        if fuse.blows() {
            let (torn, _) = slot.as_bytes().split_at(SLOT_BYTES / 4);
            file.write_all_at(torn, offset)?;
            return Err(io::Error::other("simulated crash"));
        }
        file.write_all_at(slot.as_bytes(), offset)?;
        // A first write may also be the file's birth, so its size must be durable too.
        file.sync_all()?;
        if generation == 1 {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    fn encode(&self, generation: u64) -> Slot {
        let mut slot = Slot::new_zeroed();
        let (iops, iops_unlimited) = match self.volume.iops {
            None => (IOPS_OF_CLASS, 0),
            Some(Iops(IopsLimit::Unlimited)) => (IOPS_OF_CLASS, IOPS_UNLIMITED),
            Some(Iops(IopsLimit::PerSecond(limit))) => (limit.get(), 0),
        };
        let fixed = &mut slot.fixed;
        fixed.magic = MAGIC;
        fixed.version = U32::new(VERSION);
        fixed.generation = U64::new(generation);
        fixed.site = self.site.to_bytes();
        fixed.volume = self.volume.id.to_bytes();
        fixed.size = U64::new(self.volume.size.0);
        fixed.iops = U32::new(iops);
        fixed.iops_unlimited = iops_unlimited;
        fixed.life = code(LIVES, self.life);
        fixed.cache = code(CACHES, self.volume.cache);
        fixed.access = access_bits(&self.volume.access);
        fixed.volume_revision = U64::new(self.volume.revision);
        let mut texts: [&[u8]; TEXTS] = [&[]; TEXTS];
        if let Some(part) = &self.mirror {
            encode_mirror(part, fixed);
            texts = mirror_texts(part);
        }
        let hosts = encode_hosts(&self.volume.access.hosts);
        let [name, class, key, .., last] = &mut texts;
        *last = &hosts;
        *name = self.volume.name.as_str().as_bytes();
        *class = self.volume.class.as_bytes();
        *key = &self.volume.wrapped_key;
        let mut free = slot.text.as_mut_slice();
        for (length, text) in slot.fixed.text_lengths.iter_mut().zip(texts) {
            assert!(text.len() <= free.len(), "the catalogue checks every length before it writes");
            let (place, rest) = free.split_at_mut(text.len());
            place.copy_from_slice(text);
            // A slot is shorter than 2^16 bytes, and so is every text in it.
            *length = U16::new(u16::try_from(text.len()).unwrap_or(u16::MAX));
            free = rest;
        }
        slot.fixed.checksum = U32::new(slot.checksum());
        slot
    }

    fn decode(slot: &Slot, pool: &block::VolumeName) -> Result<Self, HeaderError> {
        let fixed = &slot.fixed;
        if !VERSIONS.contains(&fixed.version.get()) {
            return Err(HeaderError::Version(fixed.version.get()));
        }
        let rates = fixed.bandwidth.get() != 0 || fixed.resync_rate.get() != 0;
        if fixed.version.get() < 4 && rates {
            return Err(HeaderError::Field("bandwidth"));
        }
        if fixed.version.get() < 5 && fixed.on_link_failure != 0 {
            return Err(HeaderError::Field("on_link_failure"));
        }
        if fixed.reserved_before != 0 || fixed.reserved.iter().any(|byte| *byte != 0) {
            return Err(HeaderError::Field("reserved"));
        }
        let revision = fixed.volume_revision.get();
        if fixed.version.get() < 3 && revision != 0 {
            return Err(HeaderError::Field("volume_revision"));
        }
        let texts = slot.texts().ok_or(HeaderError::Field("text_lengths"))?;
        let [name, class, key, .., hosts] = texts;
        let access = VolumeAccess {
            tls_required: fixed.access & ACCESS_TLS_REQUIRED != 0,
            read_only: fixed.access & ACCESS_READ_ONLY != 0,
            hosts: decode_hosts(hosts).ok_or(HeaderError::Field("hosts"))?,
        };
        // Whatever would restrict the volume must be understood, or it would be opened to more than is meant.
        if fixed.access != access_bits(&access)
            || (fixed.version.get() == 1 && access != VolumeAccess::default())
        {
            return Err(HeaderError::Field("access"));
        }
        let volume = VolumeRecord {
            id: VolumeId::from_bytes(fixed.volume),
            name: text(name, "name")?,
            size: ByteCount(fixed.size.get()),
            class: text(class, "class")?,
            iops: match (fixed.iops_unlimited, std::num::NonZeroU32::new(fixed.iops.get())) {
                (0, limit) => limit.map(|limit| Iops(IopsLimit::PerSecond(limit))),
                (IOPS_UNLIMITED, None) => Some(Iops(IopsLimit::Unlimited)),
                _ => return Err(HeaderError::Field("iops")),
            },
            cache: meaning(CACHES, fixed.cache, "cache")?,
            access,
            wrapped_key: key.to_vec(),
            pool: pool.clone(),
            revision,
        };
        Ok(Self {
            site: SiteId::from_bytes(fixed.site),
            life: meaning(LIVES, fixed.life, "life")?,
            volume,
            mirror: decode_mirror(fixed, &texts)?,
        })
    }
}

/// The codes of each enum: the place in the list, from 1.
const LIVES: &[Life] = &[Life::Creating, Life::Live, Life::Deleting];
const CACHES: &[Cache] = &[Cache::None, Cache::Page];

fn code<T: PartialEq>(values: &[T], value: T) -> u8 {
    let place = values.iter().position(|known| *known == value);
    place.and_then(|place| u8::try_from(place + 1).ok()).unwrap_or(0)
}

fn meaning<T: Copy>(values: &[T], code: u8, field: &'static str) -> Result<T, HeaderError> {
    let place = usize::from(code).checked_sub(1);
    let value = place.and_then(|place| values.get(place));
    value.copied().ok_or(HeaderError::Field(field))
}

fn text<T: TryFrom<String>>(bytes: &[u8], field: &'static str) -> Result<T, HeaderError> {
    let text = str::from_utf8(bytes).map_err(|_| HeaderError::Field(field))?;
    T::try_from(text.to_owned()).map_err(|_| HeaderError::Field(field))
}

fn access_bits(access: &VolumeAccess) -> u8 {
    let bit = |set, bit| if set { bit } else { 0 };
    bit(access.tls_required, ACCESS_TLS_REQUIRED) | bit(access.read_only, ACCESS_READ_ONLY)
}

/// Each host: 1 if it may only read, else 0; the length of its identity; its identity.
fn encode_hosts(hosts: &[HostAccess]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for host in hosts {
        let identity = host.identity.as_str().as_bytes();
        // An identity has at most 128 bytes.
        bytes.extend([u8::from(host.read_only), u8::try_from(identity.len()).unwrap_or(u8::MAX)]);
        bytes.extend_from_slice(identity);
    }
    bytes
}

fn decode_hosts(mut bytes: &[u8]) -> Option<Vec<HostAccess>> {
    let mut hosts = Vec::new();
    while let Some(([read_only, length], rest)) = bytes.split_first_chunk() {
        let (identity, rest) = rest.split_at_checked(usize::from(*length))?;
        let identity = String::from_utf8(identity.to_vec()).ok()?.try_into().ok()?;
        let read_only = match read_only {
            0 => false,
            1 => true,
            _ => return None,
        };
        hosts.push(HostAccess { identity, read_only });
        bytes = rest;
    }
    (bytes.is_empty() && hosts.len() <= ACCESS_HOSTS_MAX).then_some(hosts)
}

/// A rate as it stands in a header; 0 is none.
fn rate_field(rate: Rate) -> U64 {
    U64::new(rate.0.map_or(0, std::num::NonZeroU64::get))
}

fn rate(field: U64, name: &'static str) -> Result<Rate, HeaderError> {
    let rate = std::num::NonZeroU64::new(field.get());
    let allowed = rate.is_none_or(|rate| (Rate::LEAST..=Rate::MOST).contains(&rate.get()));
    if allowed { Ok(Rate(rate)) } else { Err(HeaderError::Field(name)) }
}

fn encode_mirror(part: &MirrorPart, fixed: &mut Fixed) {
    let (mirror, group) = (&part.mirror, &part.mirror.group);
    fixed.link = if part.settled { 2 } else { 1 };
    fixed.role = code(Role::ALL, group.role);
    fixed.mode = code(MirrorMode::ALL, mirror.mode);
    fixed.overload = code(Overload::ALL, mirror.overload);
    fixed.rebuilt = u8::from(mirror.rebuilt);
    fixed.index = U16::new(part.index.0);
    fixed.volume_count = U16::new(part.volume_count);
    fixed.rpo_seconds = U32::new(mirror.rpo_seconds.get());
    fixed.bandwidth = rate_field(mirror.bandwidth);
    fixed.resync_rate = rate_field(mirror.resync_rate);
    fixed.on_link_failure = match mirror.on_link_failure {
        LinkFailure::Degrade => 0,
        LinkFailure::Stop => 1,
    };
    fixed.mirror = mirror.id.to_bytes();
    fixed.epoch = U64::new(group.epoch);
    fixed.incarnation = U64::new(group.incarnation);
    fixed.revision = U64::new(mirror.revision);
}

/// The texts from the fourth to the eighth; the others are the volume's.
fn mirror_texts(part: &MirrorPart) -> [&[u8]; TEXTS] {
    [
        &[],
        &[],
        &[],
        part.mirror.name.as_str().as_bytes(),
        part.partner.name.as_str().as_bytes(),
        part.partner.address.as_str().as_bytes(),
        part.partner.certificate.as_bytes(),
        &part.mirror.group.state,
        &[],
    ]
}

fn decode_mirror(fixed: &Fixed, texts: &[&[u8]; TEXTS]) -> Result<Option<MirrorPart>, HeaderError> {
    let settled = match fixed.link {
        0 => return Ok(None),
        1 => false,
        2 => true,
        _ => return Err(HeaderError::Field("link")),
    };
    let [_, _, _, name, partner_name, address, certificate, state, _] = texts;
    let partner = PartnerRecord {
        name: text(partner_name, "partner_name")?,
        address: text(address, "partner_address")?,
        certificate: text(certificate, "certificate")?,
    };
    let mirror = MirrorRecord {
        id: MirrorId::from_bytes(fixed.mirror),
        name: text(name, "mirror_name")?,
        partner: partner.name.clone(),
        mode: meaning(MirrorMode::ALL, fixed.mode, "mode")?,
        on_link_failure: match fixed.on_link_failure {
            0 => LinkFailure::Degrade,
            1 => LinkFailure::Stop,
            _ => return Err(HeaderError::Field("on_link_failure")),
        },
        rpo_seconds: fixed.rpo_seconds.get().try_into().map_err(|_| HeaderError::Field("rpo_seconds"))?,
        overload: meaning(Overload::ALL, fixed.overload, "overload")?,
        bandwidth: rate(fixed.bandwidth, "bandwidth")?,
        resync_rate: rate(fixed.resync_rate, "resync_rate")?,
        volumes: Vec::new(),
        group: GroupRecord {
            epoch: fixed.epoch.get(),
            incarnation: fixed.incarnation.get(),
            role: meaning(Role::ALL, fixed.role, "role")?,
            state: state.to_vec(),
        },
        revision: fixed.revision.get(),
        rebuilt: fixed.rebuilt != 0,
    };
    Ok(Some(MirrorPart {
        settled,
        index: VolumeIndex(fixed.index.get()),
        volume_count: fixed.volume_count.get(),
        mirror,
        partner,
    }))
}

impl Slot {
    /// CRC-32C of the whole slot with the checksum field zero.
    fn checksum(&self) -> u32 {
        let fixed = Fixed { checksum: U32::ZERO, ..self.fixed.clone() };
        crc32c::crc32c_append(crc32c::crc32c(fixed.as_bytes()), &self.text)
    }

    fn is_whole(&self) -> bool {
        self.fixed.magic == MAGIC && self.fixed.checksum.get() == self.checksum()
    }

    /// The texts, if their lengths fit and nothing follows them.
    fn texts(&self) -> Option<[&[u8]; TEXTS]> {
        let mut texts: [&[u8]; TEXTS] = [&[]; TEXTS];
        let mut rest = self.text.as_slice();
        for (text, length) in texts.iter_mut().zip(&self.fixed.text_lengths) {
            (*text, rest) = rest.split_at_checked(usize::from(length.get()))?;
        }
        rest.iter().all(|byte| *byte == 0).then_some(texts)
    }
}

/// The whole slot of the higher generation, if any.
fn newest(file: &File) -> io::Result<Option<Box<Slot>>> {
    let [first, second] = slots(file)?;
    Ok(match (first, second) {
        (Some(first), Some(second)) => {
            let newer = second.fixed.generation.get() > first.fixed.generation.get();
            Some(if newer { second } else { first })
        }
        (first, second) => first.or(second),
    })
}

/// The whole slots.
fn slots(file: &File) -> io::Result<[Option<Box<Slot>>; 2]> {
    let slot = |offset| {
        let mut slot = Box::new(Slot::new_zeroed());
        match file.read_exact_at(slot.as_mut_bytes(), offset) {
            Ok(()) => Ok(Some(slot).filter(|slot| slot.is_whole())),
            // A file that is too short lacks this slot.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    };
    Ok([slot(0)?, slot(SLOT_OFFSET)?])
}
