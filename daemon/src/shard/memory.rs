//! Memory of requests on their way: how much a shard gives to its hosts, and who gets it.
//!
//! Three bounds, each with its own wait: a connection has a fixed share; a volume may hold as much as it leaves free,
//! so that many that are slow still leave some for the next (the dynamic threshold of Choudhury and Hahne, "Dynamic
//! queue length thresholds for shared-memory packet switches", 1998); and all together have the pool. A volume that
//! holds nothing always has its turn, however long its command.
//!
//! The ring of a mirror has a budget of its own, so a partner that does not take what is sent starves no host.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use block::{HostCommand, VolumeIndex};
use engine::STEP_BYTES_MAX;
use engine::volume::STEPS_IN_FLIGHT_MAX;
use slab::Slab;

use super::connection::ConnectionId;
use super::datapath::EXTENTS_MAX;
use super::{GroupKey, Shard};

/// What a command without payload is charged: it bounds how many there are.
const COMMAND_BYTES: u64 = 512;
/// The longest answer to a status command: 16 bytes for each extent, and its head.
const STATUS_BYTES_MAX: u64 = 16 * (EXTENTS_MAX as u64) + 512;
/// A connection's share of the memory; the rest is for others.
const CONNECTION_SHARE: usize = 4;

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Owner(usize);

/// What came of asking for memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Yes,
    /// Its connection has its share, or waits for something else.
    OwnFull,
    /// Its volume has its share.
    VolumeFull,
    /// All of it is taken.
    AllFull,
}

/// The memory of a shard's requests.
pub(super) struct RequestMemory {
    bytes_max: usize,
    bytes: usize,
    volumes: Slab<VolumeMemory>,
    places: BTreeMap<(GroupKey, VolumeIndex), Owner>,
    /// Connections that wait for memory, first come, first served.
    starved: VecDeque<ConnectionId>,
    /// Volumes with connections that wait for their volume's share.
    full: BTreeSet<Owner>,
    /// Some was released since those who wait tried last.
    freed: bool,
}

struct VolumeMemory {
    volume: (GroupKey, VolumeIndex),
    connections: usize,
    bytes: usize,
    waiting: VecDeque<ConnectionId>,
}

impl RequestMemory {
    pub(super) const fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            bytes: 0,
            volumes: Slab::new(),
            places: BTreeMap::new(),
            starved: VecDeque::new(),
            full: BTreeSet::new(),
            freed: false,
        }
    }

    /// A connection to a volume begins.
    pub(super) fn join(&mut self, volume: (GroupKey, VolumeIndex)) -> Owner {
        let (places, volumes) = (&mut self.places, &mut self.volumes);
        let owner = *places.entry(volume).or_insert_with(|| {
            let empty = VolumeMemory { volume, connections: 0, bytes: 0, waiting: VecDeque::new() };
            Owner(volumes.insert(empty))
        });
        self.volume(owner).connections += 1;
        owner
    }

    /// A connection ends. What its requests hold stays charged until they end.
    pub(super) fn leave(&mut self, owner: Owner) {
        let volume = self.volume(owner);
        assert!(volume.connections > 0, "a connection leaves once");
        volume.connections -= 1;
        self.forget_if_unused(owner);
    }

    /// A connection waits no more.
    pub(super) fn give_up(&mut self, owner: Owner, id: ConnectionId) {
        self.starved.retain(|starved| *starved != id);
        if self.full.contains(&owner) {
            let waiting = &mut self.volume(owner).waiting;
            waiting.retain(|one| *one != id);
            if waiting.is_empty() {
                self.full.remove(&owner);
            }
        }
    }

    /// Charges `bytes` to a volume, if its connection, which holds `held`, and the volume may have them, and there are
    /// so many.
    fn take(&mut self, owner: Owner, held: usize, bytes: usize) -> Taken {
        if held > 0 && held + bytes > self.bytes_max / CONNECTION_SHARE {
            return Taken::OwnFull;
        }
        let (total, bytes_max) = (self.bytes, self.bytes_max);
        let free = bytes_max.saturating_sub(total);
        let volume = self.volume(owner);
        if volume.bytes > 0 && volume.bytes + bytes > free {
            return Taken::VolumeFull;
        }
        if total > 0 && bytes > free {
            return Taken::AllFull;
        }
        volume.bytes += bytes;
        self.bytes += bytes;
        Taken::Yes
    }

    /// Bytes of a volume's requests are no longer on their way.
    fn release(&mut self, owner: Owner, bytes: usize) {
        let volume = self.volume(owner);
        assert!(bytes <= volume.bytes, "a command's bytes are charged once");
        volume.bytes -= bytes;
        self.bytes -= bytes;
        self.freed |= bytes > 0;
        self.forget_if_unused(owner);
    }

    /// A connection has to wait, behind the others.
    fn wait(&mut self, owner: Owner, id: ConnectionId, taken: Taken) {
        match taken {
            Taken::Yes | Taken::OwnFull => {}
            Taken::VolumeFull => {
                self.volume(owner).waiting.push_back(id);
                self.full.insert(owner);
            }
            Taken::AllFull => self.starved.push_back(id),
        }
    }

    /// True if a connection waits for others' memory.
    fn awaits(&self, owner: Owner, id: ConnectionId) -> bool {
        let volume = self.volumes.get(owner.0).filter(|_| self.full.contains(&owner));
        volume.is_some_and(|volume| volume.waiting.contains(&id)) || self.starved.contains(&id)
    }

    /// Lets the first connection of each volume that waits for its share wait for memory itself, to see what is to be had.
    fn try_full(&mut self) {
        for owner in std::mem::take(&mut self.full) {
            let waiting = &mut self.volume(owner).waiting;
            let first = waiting.pop_front();
            if !waiting.is_empty() {
                self.full.insert(owner);
            }
            self.starved.extend(first);
        }
    }

    /// True if nobody waits for memory that others hold.
    pub(super) fn is_enough(&self) -> bool {
        self.starved.is_empty() && self.full.is_empty()
    }

    /// Volumes of which a connection waits for its volume's share.
    pub(super) fn full_volumes(&self) -> BTreeSet<Owner> {
        self.full.clone()
    }

    /// True if those who wait have something to try.
    pub(super) fn has_news(&self) -> bool {
        self.freed && !self.is_enough()
    }

    fn volume(&mut self, owner: Owner) -> &mut VolumeMemory {
        self.volumes.get_mut(owner.0).expect("a volume is known while it has connections or memory")
    }

    fn forget_if_unused(&mut self, owner: Owner) {
        let volume = self.volume(owner);
        if volume.connections == 0 && volume.bytes == 0 {
            let key = volume.volume;
            self.volumes.remove(owner.0);
            self.places.remove(&key);
            self.full.remove(&owner);
        }
    }
}

impl Shard {
    /// Charges a waiting command's bytes and goes on with it. Without room it waits its turn.
    pub(super) fn take_memory(&mut self, id: ConnectionId) {
        let Some(owner) = self.connections.get(id.0).map(|connection| connection.owner) else {
            return;
        };
        if self.memory.awaits(owner, id) {
            return;
        }
        // A large command that waits is not overtaken.
        let first = self.memory.starved.is_empty();
        let taken = if first { self.try_take_memory(id) } else { Taken::AllFull };
        self.memory.wait(owner, id, taken);
    }

    fn try_take_memory(&mut self, id: ConnectionId) -> Taken {
        let connection = self.connections.get(id.0).filter(|connection| !connection.closed);
        let Some(command) = connection.and_then(|connection| connection.wants_memory()) else {
            return Taken::OwnFull;
        };
        let Some(connection) = self.connections.get_mut(id.0) else {
            return Taken::OwnFull;
        };
        let charged = charge(&command);
        let taken = self.memory.take(connection.owner, connection.bytes, charged);
        if taken == Taken::Yes {
            connection.bytes += charged;
            self.has_memory(id);
        }
        taken
    }

    /// Connections that waited for memory try again, in their order.
    pub(super) fn feed_starved(&mut self) {
        if !self.memory.has_news() {
            return;
        }
        self.memory.freed = false;
        let mut progress = true;
        while progress {
            progress = false;
            self.memory.try_full();
            while let Some(id) = self.memory.starved.pop_front() {
                let Some(owner) = self.connections.get(id.0).map(|connection| connection.owner) else {
                    continue;
                };
                match self.try_take_memory(id) {
                    Taken::Yes => {
                        progress = true;
                        self.parse(id);
                    }
                    Taken::OwnFull => {}
                    Taken::VolumeFull => {
                        self.memory.volume(owner).waiting.push_front(id);
                        self.memory.full.insert(owner);
                    }
                    Taken::AllFull => return self.memory.starved.push_front(id),
                }
            }
        }
    }

    /// What the first of those who wait for memory lacks.
    pub(super) fn missing_bytes(&self) -> usize {
        let first = self.memory.starved.front().and_then(|id| self.connections.get(id.0)?.wants_memory());
        let wanted = first.map_or(0, |command| charge(&command));
        (self.memory.bytes + wanted).saturating_sub(self.memory.bytes_max)
    }

    /// Bytes of a volume's commands are no longer on their way; `id` is their connection, while there is one.
    pub(super) fn release_memory(&mut self, owner: Owner, id: Option<ConnectionId>, bytes: usize) {
        if let Some(connection) = id.and_then(|id| self.connections.get_mut(id.0)) {
            assert!(bytes <= connection.bytes, "a command's bytes are charged to its connection");
            connection.bytes -= bytes;
        }
        self.memory.release(owner, bytes);
    }
}

/// Bytes that a command holds while it is on its way. A write that is cut into steps, or that does not cover whole data
/// units, holds them twice: in its own buffer and in the steps'.
pub(super) fn charge(command: &HostCommand) -> usize {
    const STEPS_BYTES_MAX: u64 = STEP_BYTES_MAX * (STEPS_IN_FLIGHT_MAX as u64);
    let length = match command {
        HostCommand::Write { range, .. } if range.length() > STEP_BYTES_MAX || !range.is_unit_aligned() => {
            range.length() + range.unit_outward().length().min(STEPS_BYTES_MAX)
        }
        HostCommand::Read { range } | HostCommand::Write { range, .. } => range.length(),
        // The extents found, and the reply made of them.
        HostCommand::Status { one: false, .. } => STATUS_BYTES_MAX,
        HostCommand::Flush
        | HostCommand::Trim { .. }
        | HostCommand::WriteZeroes { .. }
        | HostCommand::Cache { .. }
        | HostCommand::Status { one: true, .. } => COMMAND_BYTES,
    };
    usize::try_from(length).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1 << 20;

    fn memory(volumes: u16) -> (RequestMemory, Vec<Owner>) {
        let mut memory = RequestMemory::new(256 * MIB);
        let owners =
            (0..volumes).map(|volume| memory.join((GroupKey(u64::from(volume)), VolumeIndex(0)))).collect();
        (memory, owners)
    }

    /// Takes pieces for a volume, each for a connection of its own, until there are no more.
    fn fill(memory: &mut RequestMemory, owner: Owner, bytes: usize) -> usize {
        let mut count = 0;
        while memory.take(owner, 0, bytes) == Taken::Yes {
            count += 1;
        }
        count * bytes
    }

    #[test]
    fn each_volume_leaves_as_much_as_it_holds() {
        let (mut memory, owners) = memory(3);
        let held: Vec<usize> = owners.iter().map(|owner| fill(&mut memory, *owner, MIB)).collect();
        assert_eq!(held, [128 * MIB, 64 * MIB, 32 * MIB]);
    }

    #[test]
    fn a_volume_that_holds_nothing_has_its_turn_with_any_length() {
        let (mut memory, owners) = memory(2);
        assert_eq!(memory.take(owners[0], 0, 72 * MIB), Taken::Yes);
        assert_eq!(memory.take(owners[1], 0, 72 * MIB), Taken::Yes);
        assert_eq!(memory.take(owners[1], 0, 72 * MIB), Taken::VolumeFull);
        memory.release(owners[0], 72 * MIB);
        assert_eq!(memory.take(owners[0], 0, 200 * MIB), Taken::AllFull);
        memory.release(owners[1], 72 * MIB);
        assert_eq!(memory.take(owners[0], 0, 300 * MIB), Taken::Yes, "longer than all, but alone");
    }

    #[test]
    fn a_connection_has_a_share_of_its_own() {
        let (mut memory, owners) = memory(1);
        assert_eq!(memory.take(owners[0], 0, 60 * MIB), Taken::Yes);
        assert_eq!(memory.take(owners[0], 60 * MIB, 5 * MIB), Taken::OwnFull);
        assert_eq!(memory.take(owners[0], 0, 5 * MIB), Taken::Yes, "another connection");
    }

    #[test]
    fn a_volume_without_connections_is_known_until_its_memory_is_back() {
        let (mut memory, owners) = memory(1);
        assert_eq!(memory.take(owners[0], 0, MIB), Taken::Yes);
        memory.leave(owners[0]);
        assert_eq!(memory.join((GroupKey(0), VolumeIndex(0))), owners[0], "the same volume");
        memory.leave(owners[0]);
        memory.release(owners[0], MIB);
        assert_eq!((memory.volumes.len(), memory.places.len(), memory.bytes), (0, 0, 0));
    }

    proptest! {
        /// However volumes take and give back, the books are right, something is left for the next volume, and all of
        /// it comes back.
        #[test]
        fn the_books_are_right(steps in prop::collection::vec((0_usize..8, 1_usize..64, any::<bool>()), 0..200)) {
            let (mut memory, owners) = memory(8);
            let mut held: Vec<(usize, usize)> = Vec::new();
            for (who, pages, gives) in steps {
                let bytes = pages * 4096;
                if gives && !held.is_empty() {
                    let (owner, bytes) = held.swap_remove(who % held.len());
                    memory.release(owners[owner], bytes);
                } else if memory.take(owners[who], 0, bytes) == Taken::Yes {
                    held.push((who, bytes));
                }
                prop_assert_eq!(memory.bytes, held.iter().map(|(_, bytes)| bytes).sum::<usize>());
                for (index, owner) in owners.iter().enumerate() {
                    let sum: usize = held.iter().filter(|(who, _)| *who == index).map(|(_, bytes)| bytes).sum();
                    prop_assert_eq!(memory.volume(*owner).bytes, sum);
                }
                prop_assert!(memory.bytes < memory.bytes_max, "nothing is left for the next");
            }
            for (owner, bytes) in held {
                memory.release(owners[owner], bytes);
            }
            prop_assert_eq!(memory.bytes, 0);
        }
    }
}
