//! Wrapped keys, as a primary gives them to its target: new wraps of the keys that the target has, and that a tenant is locked.
//!
//! What wraps hold is not this crate's business; here they are bounded bytes. When they are sent is
//! docs/protocols/replication.md's.

use block::{Epoch, MirrorId, VolumeId};

use crate::codec::{CodecError, Reader, Writer};

const VOLUMES_MAX: usize = 256;
const KEY_BYTES_MAX: usize = 256;

/// What is to become of the lock of the volumes' tenant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TenantLock {
    /// It stays.
    Keep,
    /// The tenant is locked.
    Lock,
    /// It is unlocked.
    Unlock,
}

/// The primary gives its target the volumes' keys as they are wrapped now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetKeys {
    /// Which mirror.
    pub mirror: MirrorId,
    /// The primary's epoch.
    pub epoch: Epoch,
    /// What is to become of the lock of the tenant whose all the mirror's volumes are.
    pub lock: TenantLock,
    /// Some of its volumes, or none, each with its wrapped key.
    pub volumes: Vec<(VolumeId, Vec<u8>)>,
}

pub(crate) fn encode_set_keys(out: &mut Writer, code: u8, set: &SetKeys) {
    out.u8(code);
    out.raw(&set.mirror.to_bytes());
    out.u64(set.epoch.0);
    out.u8(match set.lock {
        TenantLock::Keep => 0,
        TenantLock::Lock => 1,
        TenantLock::Unlock => 2,
    });
    out.count(set.volumes.len());
    for (id, key) in &set.volumes {
        out.raw(&id.to_bytes());
        out.counted(key);
    }
}

pub(crate) fn decode_set_keys(input: &mut Reader<'_>) -> Result<SetKeys, CodecError> {
    let mirror = MirrorId::from_bytes(input.array()?);
    let epoch = Epoch(input.u64()?);
    let lock = match input.u8()? {
        0 => TenantLock::Keep,
        1 => TenantLock::Lock,
        2 => TenantLock::Unlock,
        value => return Err(CodecError::Unknown { field: "tenant lock", value: u64::from(value) }),
    };
    let count = input.count("volumes", VOLUMES_MAX)?;
    let volume = |input: &mut Reader<'_>| {
        Ok((VolumeId::from_bytes(input.array()?), input.counted("wrapped key", KEY_BYTES_MAX)?))
    };
    let volumes = (0..count).map(|_| volume(input)).collect::<Result<_, CodecError>>()?;
    Ok(SetKeys { mirror, epoch, lock, volumes })
}
