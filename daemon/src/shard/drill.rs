//! A drill's copy on its shard: the hosts' data path over a group whose home is the drill of another group.
//!
//! The copy's volumes are a group of their own, without a mirror; what it asks of its home goes to the mirrored group
//! beside it, which knows of each block whether it is the drill's own or the image's.

use std::io;

use block::{ByteRange, Extent, HostError, VolumeIndex};
use bytes::{Bytes, BytesMut};
use store::{Buffer, Completion, File, Operation, Returned, Token};
use tokio::sync::oneshot;

use super::command::DrillStart;
use super::datapath::Pending;
use super::{GroupKey, GroupStart, Shard, ShardNews, VolumeFiles};
use crate::group::{DrillBegun, DrillIo, VerbRefused};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

impl Shard {
    /// Begins a drill of a mirrored group and serves its copy.
    pub(super) fn start_drill(
        &mut self,
        key: GroupKey,
        start: DrillStart,
        done: oneshot::Sender<Result<DrillBegun, VerbRefused>>,
    ) {
        let DrillStart { drill, files, mut volumes, at, scratch_bytes_max } = start;
        let mut started = Err(VerbRefused("the mirror is gone".to_owned()));
        let scratch: Vec<File> = files.iter().map(|files: &VolumeFiles| files.home.clone()).collect();
        self.with_group(key, |served, _| {
            started = served.group.start_drill(at, scratch_bytes_max);
            if started.is_ok() {
                served.scratch = scratch;
            }
        });
        if let Ok(begun) = &started {
            for (volume, size) in volumes.iter_mut().zip(&begun.sizes) {
                volume.size = *size;
            }
            self.add(drill, files, GroupStart::Alone(volumes));
            if let Some(served) = self.groups.get_mut(&drill) {
                served.drill_of = Some(key);
            }
        }
        let _ = done.send(started);
    }

    /// The scratch file of a volume of the group.
    pub(super) fn scratch(&self, key: GroupKey, volume: VolumeIndex) -> Option<File> {
        self.groups.get(&key)?.scratch.get(usize::from(volume.0)).cloned()
    }

    /// Does at the drill of `parent` what the copy's group asks of its home.
    pub(super) fn on_drill(
        &mut self,
        parent: GroupKey,
        volume: VolumeIndex,
        pending: Pending,
        operation: Operation,
    ) {
        let token = self.pending.insert(pending);
        let request = DrillIo(u64::try_from(token).unwrap_or(u64::MAX));
        if !self.groups.contains_key(&parent) {
            let error = io::Error::from_raw_os_error(EIO);
            return self.drill_completes(request, Err(error), Returned::Nothing);
        }
        match operation {
            Operation::Read { offset, buffer, range, .. } => {
                let range = whole_units(offset, u64::try_from(range.len()).unwrap_or(0));
                self.drill_buffers.insert(request, buffer);
                self.with_group(parent, |served, _| served.group.read_drill(request, volume, range));
            }
            Operation::Write { offset, data, .. } => {
                let data = gathered(data.into_pieces());
                let range = whole_units(offset, u64::try_from(data.len()).unwrap_or(0));
                self.with_group(parent, |served, _| {
                    served.group.write_drill(request, volume, range, Some(data));
                });
            }
            Operation::ZeroRange { offset, length, .. } => {
                let range = whole_units(offset, length);
                self.with_group(parent, |served, _| served.group.write_drill(request, volume, range, None));
            }
            // A drill does not outlive the daemon: there is nothing that a flush could save.
            Operation::Fdatasync { .. } | Operation::Prefetch { .. } => {
                self.drill_completes(request, Ok(0), Returned::Nothing);
            }
            Operation::Survey { length, .. } => {
                let data = Extent { length, zero: false };
                self.drill_completes(request, Ok(0), Returned::Extents(vec![data]));
            }
            Operation::Receive { .. } | Operation::Send { .. } => {
                let error = io::Error::from_raw_os_error(EIO);
                self.drill_completes(request, Err(error), Returned::Nothing);
            }
        }
    }

    /// A drill answered a request of its copy's group.
    pub(super) fn drill_done(&mut self, request: DrillIo, result: Result<Bytes, HostError>) {
        let buffer = self.drill_buffers.remove(&request);
        let (result, returned) = match (result, buffer) {
            (Ok(data), Some(mut buffer)) if buffer.len() == data.len() => {
                buffer.copy_from_slice(&data);
                (Ok(data.len()), Returned::Buffer(buffer))
            }
            (Ok(data), None) => (Ok(data.len()), Returned::Nothing),
            (Err(HostError::NoSpace), _) => (Err(io::Error::from_raw_os_error(ENOSPC)), Returned::Nothing),
            (Ok(_) | Err(_), _) => (Err(io::Error::from_raw_os_error(EIO)), Returned::Nothing),
        };
        self.drill_completes(request, result, returned);
    }

    fn drill_completes(&mut self, request: DrillIo, result: io::Result<usize>, returned: Returned) {
        self.complete(Completion { token: Token(request.0), result, returned });
    }

    /// The drill of a group is over: its hosts leave.
    pub(super) fn drill_ended(&mut self, key: GroupKey, reason: String) {
        let drill =
            self.groups.iter().find(|(_, served)| served.drill_of == Some(key)).map(|(drill, _)| *drill);
        if let Some(served) = self.groups.get_mut(&key) {
            served.scratch.clear();
        }
        if let Some(drill) = drill {
            self.with_group(drill, |served, _| served.group.drain());
        }
        self.tell(ShardNews::DrillEnded { key, reason });
    }
}

/// Buffers of reads that a drill has not answered.
pub(super) type DrillBuffers = std::collections::BTreeMap<DrillIo, Buffer>;

fn whole_units(offset: u64, length: u64) -> ByteRange {
    let range = ByteRange::new(offset, length).unwrap_or_default();
    assert!(range.is_unit_aligned(), "the data path asks its home for whole data units");
    range
}

fn gathered(mut pieces: Vec<Bytes>) -> Bytes {
    if pieces.len() == 1
        && let Some(piece) = pieces.pop()
    {
        return piece;
    }
    let mut whole = BytesMut::new();
    pieces.iter().for_each(|piece| whole.extend_from_slice(piece));
    whole.freeze()
}
