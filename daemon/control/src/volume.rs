//! Volumes: create, resize and view.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use block::{ByteCount, IopsLimit, VolumeId, VolumeName};
use serde::{Deserialize, Serialize};

use crate::{VolumeAccess, VolumeAccessChange};

/// A limit on host commands a second; in JSON a number from 1 or `"unlimited"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "IopsText", into = "IopsText")]
pub struct Iops(pub IopsLimit);

/// Why an IOPS limit was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("IOPS limit '{0}' is not understood: write a whole number from 1 to 4294967295, or unlimited")]
pub struct IopsError(String);

/// How [`Iops`] stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum IopsText {
    Number(u64),
    Word(String),
}

impl TryFrom<IopsText> for Iops {
    type Error = IopsError;

    fn try_from(text: IopsText) -> Result<Self, Self::Error> {
        match text {
            IopsText::Number(number) => number.to_string().parse(),
            IopsText::Word(word) if word == "unlimited" => Ok(Self(IopsLimit::Unlimited)),
            IopsText::Word(word) => Err(IopsError(word)),
        }
    }
}

impl From<Iops> for IopsText {
    fn from(iops: Iops) -> Self {
        match iops.0 {
            IopsLimit::Unlimited => Self::Word("unlimited".to_owned()),
            IopsLimit::PerSecond(limit) => Self::Number(u64::from(limit.get())),
        }
    }
}

impl FromStr for Iops {
    type Err = IopsError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "unlimited" {
            return Ok(Self(IopsLimit::Unlimited));
        }
        text.parse::<NonZeroU32>()
            .map(|limit| Self(IopsLimit::PerSecond(limit)))
            .map_err(|_| IopsError(text.to_owned()))
    }
}

impl fmt::Display for Iops {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// What lies between a volume and its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// O_DIRECT: a write is answered when the device has completed it.
    #[default]
    None,
    /// The page cache, which then holds ciphertext; only FLUSH and FUA reach stable media.
    Page,
}

impl fmt::Display for Cache {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "none",
            Self::Page => "page",
        })
    }
}

/// Whether hosts can use a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// Hosts can read and write.
    Online,
    /// The data file or its pool cannot be used.
    Offline,
    /// Its key cannot be had: its tenant is locked, or the key provider does not open it or does not answer.
    Locked,
    /// A flush failed: reads only, until the daemon restarts.
    Poisoned,
    /// The replica of a mirror: hosts are refused until it is promoted.
    Secondary,
    /// The partner holds a higher epoch: hosts are refused.
    Fenced,
    /// A mirrored primary after a start, until it has heard its partner or the grace time ends.
    Waiting,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Locked => "locked",
            Self::Poisoned => "poisoned",
            Self::Secondary => "secondary",
            Self::Fenced => "fenced",
            Self::Waiting => "waiting",
        })
    }
}

/// Body of `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    /// The name, also of the export; unique on the site.
    pub name: VolumeName,
    /// The size; all of it is allocated at once. A multiple of 4096.
    pub size_bytes: ByteCount,
    /// The storage class; its IOPS per TiB give the limit. The default is `standard`.
    #[serde(default = "VolumeCreate::class_default")]
    pub class: String,
    /// A limit instead of the class's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<Iops>,
    /// The cache mode.
    #[serde(default)]
    pub cache: Cache,
    /// The tenant that it belongs to; without one it is the default tenant's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<VolumeName>,
    /// Who may open it, as a change of what is open to any host.
    #[serde(default, skip_serializing_if = "is_default")]
    pub access: VolumeAccessChange,
}

fn is_default(access: &VolumeAccessChange) -> bool {
    *access == VolumeAccessChange::default()
}

impl VolumeCreate {
    /// The storage class of a volume created without one.
    pub fn class_default() -> String {
        "standard".to_owned()
    }
}

/// Body of `POST /v1/volumes/NAME/resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeResize {
    /// The new size, not below the present one. A multiple of 4096.
    pub size_bytes: ByteCount,
}

/// A volume as `volume show` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeView {
    /// Its name.
    pub name: VolumeName,
    /// Its identity, the same at both sites of a mirror.
    pub id: VolumeId,
    /// Its size.
    pub size_bytes: ByteCount,
    /// Its storage class.
    pub class: String,
    /// The limit in force, over all connections.
    pub iops_limit: Iops,
    /// Its cache mode.
    pub cache: Cache,
    /// The tenant that it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenant: Option<VolumeName>,
    /// Whether hosts can use it.
    pub state: VolumeState,
    /// Why it is not online, as a sentence.
    pub state_reason: Option<String>,
    /// The mirror that it is part of.
    pub mirror: Option<VolumeName>,
    /// Who may open it: `tls_required`, `read_only` and `hosts`.
    #[serde(flatten)]
    pub access: VolumeAccess,
    /// Where hosts connect.
    pub uris: Vec<String>,
    /// What a create or resize did that may not be what was meant, as a sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_iops_limit_is_a_number_or_the_word_unlimited() {
        for text in ["750", "\"unlimited\""] {
            let iops: Iops = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&iops).unwrap(), text);
        }
        for text in ["0", "-1", "4294967296", "\"fast\"", "1.5", "null"] {
            assert!(serde_json::from_str::<Iops>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_create_needs_only_name_and_size_and_refuses_unknown_fields() {
        let create: VolumeCreate = serde_json::from_str(r#"{"name":"a","size_bytes":1048576}"#).unwrap();
        assert_eq!(create.class, "standard");
        assert_eq!((create.iops, create.cache), (None, Cache::None));
        assert!(serde_json::from_str::<VolumeCreate>(r#"{"name":"a","size_bytes":1,"sise":2}"#).is_err());
        assert!(serde_json::from_str::<VolumeCreate>(r#"{"name":"../a","size_bytes":1}"#).is_err());
    }
}
