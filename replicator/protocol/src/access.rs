//! Who may open a volume, as two sites tell it each other: the replica gets the primary's rules.
//!
//! What the rules mean is the front end's business; here they are bounded bytes. When they are sent, and that a replica is
//! never more open than its primary, is docs/protocols/replication.md's.

use block::{Epoch, MirrorId, VolumeId};

use crate::codec::{CodecError, Reader, Writer};

/// The most hosts in a list.
const HOSTS_MAX: usize = 64;
const IDENTITY_BYTES_MAX: usize = 128;
const VOLUMES_MAX: usize = 256;

/// A host that may open the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MirrorHost {
    /// What its certificate calls it.
    pub identity: String,
    /// True if it may only read.
    pub read_only: bool,
}

/// Who may open a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorAccess {
    /// Over TLS only.
    pub tls_required: bool,
    /// No host may write.
    pub read_only: bool,
    /// The only hosts; if empty, any.
    pub hosts: Vec<MirrorHost>,
}

/// The primary tells its target who may open the volumes once they are presented there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetAccess {
    /// Which mirror.
    pub mirror: MirrorId,
    /// The primary's epoch.
    pub epoch: Epoch,
    /// Some or all of its volumes, each with the primary's revision of it: with the epoch it orders what is said of a
    /// volume.
    pub volumes: Vec<(VolumeId, u64, MirrorAccess)>,
}

pub(crate) fn encode_access(out: &mut Writer, access: &MirrorAccess) {
    out.bool(access.tls_required);
    out.bool(access.read_only);
    out.count(access.hosts.len());
    for host in &access.hosts {
        out.bool(host.read_only);
        out.counted(host.identity.as_bytes());
    }
}

pub(crate) fn decode_access(input: &mut Reader<'_>) -> Result<MirrorAccess, CodecError> {
    let tls_required = input.bool("tls required")?;
    let read_only = input.bool("read-only")?;
    let count = input.count("hosts", HOSTS_MAX)?;
    let host = |input: &mut Reader<'_>| {
        let read_only = input.bool("host read-only")?;
        Ok(MirrorHost { read_only, identity: input.text("host identity", IDENTITY_BYTES_MAX)? })
    };
    let hosts = (0..count).map(|_| host(input)).collect::<Result<_, CodecError>>()?;
    Ok(MirrorAccess { tls_required, read_only, hosts })
}

pub(crate) fn encode_set_access(out: &mut Writer, kind: u8, set: &SetAccess) {
    out.u8(kind);
    out.raw(&set.mirror.to_bytes());
    out.u64(set.epoch.0);
    out.count(set.volumes.len());
    for (id, revision, access) in &set.volumes {
        out.raw(&id.to_bytes());
        out.u64(*revision);
        encode_access(out, access);
    }
}

pub(crate) fn decode_set_access(input: &mut Reader<'_>) -> Result<SetAccess, CodecError> {
    let mirror = MirrorId::from_bytes(input.array()?);
    let epoch = Epoch(input.u64()?);
    let count = input.count("volumes", VOLUMES_MAX)?;
    let volume = |input: &mut Reader<'_>| {
        Ok((VolumeId::from_bytes(input.array()?), input.u64()?, decode_access(input)?))
    };
    let volumes = (0..count).map(|_| volume(input)).collect::<Result<_, CodecError>>()?;
    Ok(SetAccess { mirror, epoch, volumes })
}
