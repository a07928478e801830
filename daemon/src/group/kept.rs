//! What a primary that stops in order keeps of its journal, and how the next start goes on with it.
//!
//! Everything that the target may lack is put into the spill file and named by an index, which the daemon stores with
//! the record of the clean stop. The next start continues the same incarnation: it has the chain of cuts, its records,
//! and the sequences that follow. If anything of that fails, the journal folds into the dirty maps instead, and a
//! resync follows. The record of the stop is good for one start; after an unclean one nothing of the file counts.

use block::{Sequence, WallTime};
use engine::dirty_map::DirtyMap;
use journal::{Record, SpillIndex, SpillSegment, SpillSpace};
use protocol::{GroupState, SenderChain};

use super::effect::{IoFailure, IoRequest, Loudness, Outbox, Purpose};
use super::primary::{Gate, Primary};
use super::spill::{Place, Queued};
use super::{CleanState, Group, Machine, Mirror, MirrorSettings};

/// The journal in the spill file of a primary that stopped in order.
#[derive(Clone, Debug)]
pub struct KeptJournal {
    /// The chain, and where its records are.
    pub index: SpillIndex,
    /// A superset of the blocks that those records change, one map a volume: what folds if they cannot be read.
    pub blocks: Vec<DirtyMap>,
}

/// How far a stopping primary is with keeping its journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Keeping {
    /// It does not stop.
    #[default]
    No,
    /// It stops; hosts' writes may still be in flight.
    Asked,
    /// Segments are being written.
    Writing,
    /// The file is being flushed.
    Syncing,
    /// All of it is on stable media.
    Kept,
    /// It folds.
    GaveUp,
}

impl Keeping {
    pub(super) const fn is_under_way(self) -> bool {
        matches!(self, Self::Asked | Self::Writing | Self::Syncing)
    }
}

impl CleanState {
    /// The state without a journal that this start cannot use: of another lineage, or for a file of another size.
    pub(super) fn usable(mut self, settings: &MirrorSettings, state: &GroupState) -> Self {
        let fits = |index: &SpillIndex| {
            index.lineage == state.start_position().into() && index.capacity == settings.spill_bytes
        };
        if let Some(kept) = self.journal.take_if(|kept| !fits(&kept.index)) {
            for (dirty, blocks) in self.dirty.iter_mut().zip(&kept.blocks) {
                dirty.union(blocks);
            }
        }
        self
    }
}

impl Primary {
    /// A clean stop begins.
    pub(super) const fn keep_journal(&mut self) {
        self.spill.keeping = Keeping::Asked;
    }

    /// Takes a stopping primary as far as it can go; `drained` says that no host's command and no copy is in flight.
    pub(super) fn keep_turn(
        &mut self,
        settings: &MirrorSettings,
        drained: bool,
        wall: WallTime,
        out: &mut Outbox,
    ) {
        match self.spill.keeping {
            Keeping::Asked if drained && self.ring.is_empty() && !self.spill.is_pending() => {
                self.spill.keeping = Keeping::GaveUp;
            }
            Keeping::Asked if drained => match self.cannot_keep() {
                Some(reason) => self.give_up_journal(reason, out),
                None => {
                    self.spill_all(settings, wall, out);
                    self.spill.keeping = Keeping::Writing;
                }
            },
            Keeping::Asked
            | Keeping::Writing
            | Keeping::No
            | Keeping::Syncing
            | Keeping::Kept
            | Keeping::GaveUp => {}
        }
        if self.spill.keeping == Keeping::Writing && self.spill.writes() == 0 {
            let all_stored = self.spill.queue.iter().all(|queued| matches!(queued.place, Place::Stored));
            if all_stored {
                self.spill.keeping = Keeping::Syncing;
                out.io(Purpose::SpillSync, IoRequest::SpillSync);
            } else {
                self.give_up_journal("the spill file is full or cannot be written", out);
            }
        }
    }

    /// Why no start could go on with the journal, if none could.
    fn cannot_keep(&self) -> Option<&'static str> {
        let continues = self.chain.as_ref().is_some_and(|chain| {
            chain.committed().position.same_lineage(&self.start) && chain.sent_commits().is_some()
        });
        let half = self.ring.budget().bytes_max / 2;
        let mut records = self.ring.records(Sequence(0), Sequence(u64::MAX));
        let reasons = [
            (self.spill.space.capacity() == 0, "there is no spill file"),
            (!continues, "the target has not committed anything of this incarnation"),
            (self.pass.is_some() || self.gate != Gate::Open, "a resync is under way"),
            (!self.compare.is_done(), "regions must be compared"),
            // The next process would not know of the record.
            (self.unfinished_growth().is_some(), "a resize is not finished"),
            (!self.admission_open || self.ended_through() != self.last, "writes have not ended"),
            (self.volumes.iter().any(|volume| volume.poisoned), "a flush failed"),
            (records.any(|record| record.payload_bytes() > half), "a record is larger than half the ring"),
        ];
        reasons.into_iter().find(|(applies, _)| *applies).map(|(_, reason)| reason)
    }

    /// The journal folds.
    fn give_up_journal(&mut self, reason: &str, out: &mut Outbox) {
        self.spill.keeping = Keeping::GaveUp;
        let text = format!("the journal is not kept, a resync follows the next start: {reason}");
        out.log(Loudness::Info, text);
    }

    /// The end of what the journal covers.
    fn journal_end(&self) -> Sequence {
        self.folded_from.map_or(self.last, |first| Sequence(first.0.saturating_sub(1)))
    }

    /// Writes everything that is in memory.
    fn spill_all(&mut self, settings: &MirrorSettings, wall: WallTime, out: &mut Outbox) {
        let committed = self.chain.as_ref().map(|chain| chain.committed().position.sequence);
        let end = self.journal_end();
        let ring_end = self.spill.first().map_or(end, |first| Sequence(first.0.saturating_sub(1)));
        let tail_from = self.spill.tail_from;
        let ring: Vec<Record> = self.ring.clear().into();
        let (queue, tail) = self.spill.requeue();
        let ring_from = committed.unwrap_or_default().next();
        self.spill_records(settings, ring, (ring_from, ring_end), wall, out);
        for Queued { key, segment, place } in queue {
            match place {
                // Its answer finds the segment no longer being read, and is dropped.
                Place::Stored | Place::Loading => {
                    self.spill.queue.push_back(Queued { key, segment, place: Place::Stored });
                }
                Place::Writing(records) => {
                    self.spill.count(&records);
                    self.spill.queue.push_back(Queued { key, segment, place: Place::Writing(records) });
                }
                Place::Loaded(records) | Place::Unwritten(records) => {
                    self.spill_records(settings, records, (segment.first, segment.last), segment.time, out);
                }
            }
        }
        if !tail.is_empty() {
            self.spill_records(settings, tail.into(), (tail_from, end), wall, out);
        }
    }

    /// Writes records, which are all of those sequences, as segments at the queue's end.
    fn spill_records(
        &mut self,
        settings: &MirrorSettings,
        records: Vec<Record>,
        (mut from, through): (Sequence, Sequence),
        time: WallTime,
        out: &mut Outbox,
    ) {
        let mut rest = records.into_iter().peekable();
        while from <= through {
            let mut chunk: Vec<Record> = Vec::new();
            let mut bytes = 0;
            while let Some(record) = rest.next_if(|record| {
                let more = bytes + record.payload_bytes();
                chunk.is_empty() || (more <= settings.cut_bytes && chunk.len() < journal::RECORDS_MAX)
            }) {
                bytes += record.payload_bytes();
                chunk.push(record);
            }
            let last = match rest.peek() {
                Some(_) => chunk.last().map_or(through, |record| record.sequence),
                None => through,
            };
            self.spill.count(&chunk);
            let sealed = SpillSegment::seal(settings.mirror, self.start.into(), (from, last), time, &chunk);
            self.spill.write(settings, sealed, chunk, out);
            from = last.next();
        }
        assert!(rest.peek().is_none(), "every record is covered");
    }

    /// The spill file was flushed, or not.
    pub(super) fn spill_synced(&mut self, failure: Option<IoFailure>, out: &mut Outbox) {
        if self.spill.keeping != Keeping::Syncing {
            return;
        }
        self.spill.keeping = match failure {
            None => Keeping::Kept,
            Some(failure) => {
                let text =
                    format!("the spill file cannot be flushed: {failure}; a resync follows the next start");
                out.log(Loudness::Warn, text);
                Keeping::GaveUp
            }
        };
    }

    /// The journal that is on stable media now, if it was kept.
    pub(super) fn kept_journal(&self) -> Option<KeptJournal> {
        let chain = self.chain.as_ref()?;
        let index = SpillIndex {
            lineage: self.start.into(),
            capacity: self.spill.space.capacity(),
            last: self.last,
            folded_from: self.folded_from,
            commit_floor: self.commit_floor,
            committed: chain.committed(),
            sent: chain.sent_commits()?,
            segments: self.spill.queue.iter().map(|queued| queued.segment).collect(),
        };
        let sound = self.spill.keeping == Keeping::Kept && index.check().is_ok();
        sound.then(|| KeptJournal { index, blocks: self.spill.stored_blocks(self.volumes.len()) })
    }

    /// Goes on where a clean stop ended, in the same incarnation. False if the journal makes no sense.
    pub(super) fn continue_from(&mut self, kept: KeptJournal) -> bool {
        let KeptJournal { index, blocks } = kept;
        let space = SpillSpace::restore(index.capacity, &index.segments);
        let (Some(space), Ok(())) = (space, index.check()) else {
            return false;
        };
        self.spill.restore(space, &index.segments, blocks);
        self.last = index.last;
        self.folded_from = index.folded_from;
        self.commit_floor = index.commit_floor;
        self.chain = Some(SenderChain::continued(index.committed, index.sent));
        // Where home differs, a record of the journal says how, or the dirty map says where.
        self.volumes.iter_mut().for_each(|volume| volume.tracker.verified_all(index.last));
        self.admission_open = true;
        true
    }
}

impl Group {
    /// A request of the spill was answered.
    pub(super) fn spill_io(&mut self, purpose: Purpose, result: Result<bytes::Bytes, IoFailure>) {
        let now = self.now;
        let Some(Mirror { machine: Machine::Primary(primary), settings, .. }) = &mut self.mirror else {
            return;
        };
        if let Purpose::SpillWrite { key } = purpose {
            primary.spill_written(key, result.err(), now, &mut self.out);
        } else if let Purpose::SpillRead { key } = purpose {
            primary.spill_read(key, result, settings, &mut self.out);
        } else {
            primary.spill_synced(result.err(), &mut self.out);
        }
    }

    /// One turn of the spill.
    pub(super) fn spill_turn(&mut self) {
        let drained = self.volumes.iter().all(|slot| slot.volume.in_flight() == 0);
        let (now, wall) = (self.now, self.wall);
        if let Some(Mirror { machine: Machine::Primary(primary), settings, .. }) = &mut self.mirror {
            primary.spill_turn(settings, now, wall, &mut self.out);
            primary.keep_turn(settings, drained, wall, &mut self.out);
        }
    }

    /// True while a stopping primary still writes its journal.
    pub(super) fn is_keeping(&self) -> bool {
        match self.mirror.as_ref().map(|mirror| &mirror.machine) {
            Some(Machine::Primary(primary)) => primary.spill.keeping.is_under_way(),
            Some(Machine::Secondary(_) | Machine::Changing(_)) | None => false,
        }
    }
}

/// The requests of the spill: nobody waits for them when the primary's machine is gone.
pub(super) fn is_of_the_spill(purpose: &Purpose) -> bool {
    matches!(purpose, Purpose::SpillWrite { .. } | Purpose::SpillRead { .. } | Purpose::SpillSync)
}
