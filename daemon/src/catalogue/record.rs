//! What the catalogue knows of volumes, partners and mirrors. Rows are stored as JSON; bytes as hexadecimal text.

use std::num::NonZeroU32;

use block::{ByteCount, MirrorId, VolumeId, VolumeName};
use control::{Cache, HostPort, Iops, LinkFailure, MirrorMode, Overload, Rate, Role, VolumeAccess};
use serde::{Deserialize, Serialize};

/// The longest wrapped data key, in bytes.
pub const WRAPPED_KEY_BYTES_MAX: usize = 256;
/// The longest name of a storage class, in bytes.
pub const CLASS_BYTES_MAX: usize = 64;
/// The longest encoded state of a consistency group, in bytes; its lineage history takes most of it.
pub const GROUP_STATE_BYTES_MAX: usize = 8 << 10;

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its identity, and its folder's name in the pool.
    pub id: VolumeId,
    /// Its name, unique on the site.
    pub name: VolumeName,
    /// Its size.
    pub size: ByteCount,
    /// Its storage class; at most [`CLASS_BYTES_MAX`] bytes.
    pub class: String,
    /// A limit instead of the class's.
    pub iops: Option<Iops>,
    /// Its cache mode.
    pub cache: Cache,
    /// Who may open it. A row of format 1 has none: any host.
    #[serde(default)]
    pub access: VolumeAccess,
    /// Its data key, wrapped; at most [`WRAPPED_KEY_BYTES_MAX`] bytes.
    #[serde(with = "hexadecimal")]
    pub wrapped_key: Vec<u8>,
    /// The pool that holds its folder. Not in the header, whose place tells it.
    pub pool: VolumeName,
    /// Counts the volume's changes: of catalogue and header the one with the higher is right. Set by the catalogue; 0
    /// before the first change of a volume from a format that had none.
    #[serde(default)]
    pub revision: u64,
}

/// A partner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartnerRecord {
    /// What this site calls it.
    pub name: VolumeName,
    /// Where it listens for replication.
    pub address: HostPort,
    /// Its certificate as PEM, at most [`control::CERTIFICATE_BYTES_MAX`] bytes.
    pub certificate: String,
}

/// A mirror.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorRecord {
    /// Its identity, the same at both sites.
    pub id: MirrorId,
    /// Its name, unique on the site.
    pub name: VolumeName,
    /// The partner.
    pub partner: VolumeName,
    /// The mode.
    pub mode: MirrorMode,
    /// What gives way when the partner of a synchronous mirror is away. A row without it has `degrade`.
    #[serde(default)]
    pub on_link_failure: LinkFailure,
    /// The RPO budget.
    pub rpo_seconds: NonZeroU32,
    /// The policy on overload.
    pub overload: Overload,
    /// The most that is sent. A row without it has no limit.
    #[serde(default)]
    pub bandwidth: Rate,
    /// The most that copies and comparisons read. A row without it has no limit.
    #[serde(default)]
    pub resync_rate: Rate,
    /// The volumes, in the order of their index in the group.
    pub volumes: Vec<VolumeId>,
    /// The group's durable state.
    pub group: GroupRecord,
    /// Counts the group's changes; orders them where epoch and incarnation are equal. Set by the catalogue.
    pub revision: u64,
    /// True if it came from headers: the start counts as unclean. Falls when the epoch or the incarnation rises.
    pub rebuilt: bool,
}

/// The durable state of a consistency group: opaque bytes, and what the catalogue must order copies by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The highest epoch; never falls.
    pub epoch: u64,
    /// The highest incarnation; never falls.
    pub incarnation: u64,
    /// Which end of the mirror this site is.
    pub role: Role,
    /// The state as the protocol encodes it, at most [`GROUP_STATE_BYTES_MAX`] bytes. Not interpreted here.
    #[serde(with = "hexadecimal")]
    pub state: Vec<u8>,
}

impl MirrorRecord {
    /// How copies of one mirror's record order: the highest is the latest.
    pub(super) const fn order(&self) -> (u64, u64, u64) {
        (self.group.epoch, self.group.incarnation, self.revision)
    }
}

/// Bytes as lower-case hexadecimal digits.
pub(super) mod hexadecimal {
    use std::fmt::Write;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(in super::super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(bytes.len().saturating_mul(2));
        for byte in bytes {
            write!(text, "{byte:02x}").map_err(serde::ser::Error::custom)?;
        }
        serializer.serialize_str(&text)
    }

    pub(in super::super) fn deserialize<'a, D: Deserializer<'a>>(
        deserializer: D,
    ) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if !rest.is_empty() {
            return Err(D::Error::custom("an odd number of hexadecimal digits"));
        }
        let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        pairs
            .iter()
            .map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?))
            .collect::<Option<_>>()
            .ok_or_else(|| D::Error::custom("not hexadecimal digits"))
    }
}
