//! Volumes of a mirror grow: the target makes room first, then this side, then a record says the new size in the order of
//! the writes, and when the target holds that durably hosts here see it.
//!
//! So no host can have seen more of a volume than whatever image the target may be promoted with, and no record or hash
//! lies beyond the room that the other side has. A volume never becomes smaller; a target may be larger than its
//! primary, after a growth that was given up or a rewind to before one: then a record says that what is behind the
//! primary's size is zeros, so nothing of another lineage comes to light there. docs/protocols/replication.md, 14.

use block::{ByteCount, ByteRange, IopsLimit, Monotonic, Position, Sequence, VolumeIndex};
use bytes::Bytes;
use engine::volume::VolumeConfig;
use journal::{Change, ChangeContent, Record, RecordKind};
use protocol::{CompareRange, Message};

use super::effect::{Effect, IoFailure, IoRequest, Outbox, Purpose, SessionId};
use super::primary::{Gate, Primary};
use super::secondary::Secondary;
use super::{Group, Machine, Mirror, MirrorSettings, VerbRefused};

/// What a target has behind a recorded size is zeroed in steps of so many bytes.
const ZERO_BYTES_MAX: u64 = 64 << 20;

/// How far a growth that an operator ordered has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The target makes room.
    Room,
    /// So does this side.
    Home,
    /// The record is on its way to the target's stable media.
    Record,
    /// The size becomes durable here.
    Showing,
}

#[derive(Clone, Copy, Debug)]
struct Growth {
    volume: VolumeIndex,
    size: ByteCount,
    stage: Stage,
}

/// What a primary knows of its target's sizes.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// As of the target's image, by volume; empty before it was heard.
    at_target: Vec<ByteCount>,
    /// A record of this session is committed: what the target has behind this side's size is zeros.
    cleared: Vec<bool>,
    /// Records on their way.
    sent: Vec<Option<(Sequence, ByteCount)>>,
    /// Room that the target has made: a record in the ring may need it, whatever became of the growth.
    promised: Vec<(VolumeIndex, ByteCount)>,
    growth: Option<Growth>,
    /// Why the last growth failed.
    failure: Option<String>,
}

impl Sizes {
    pub(super) const fn is_growing(&self) -> bool {
        self.growth.is_some()
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.clone()
    }

    /// The size that the target may have of a volume: more than it has here after a growth that was given up, or a rewind.
    fn extent(&self, volume: VolumeIndex, size: ByteCount) -> ByteCount {
        let known = self.at_target.get(usize::from(volume.0)).copied();
        self.room(volume, size).max(known.unwrap_or_default())
    }

    fn fail(&mut self, reason: String) {
        self.growth = None;
        self.failure = Some(reason);
    }

    /// What a hello says of a volume: the room that the target must have.
    pub(super) fn room(&self, volume: VolumeIndex, size: ByteCount) -> ByteCount {
        let promised = self.promised.iter().filter(|(of, _)| *of == volume).map(|(_, size)| *size);
        promised.max().unwrap_or_default().max(size)
    }

    /// The target told its sizes; whatever was on its way is sent again where they are behind.
    pub(super) fn heard(&mut self, sizes: &[ByteCount], volumes: usize) {
        self.at_target = sizes.iter().copied().take(volumes).collect();
        self.cleared = vec![false; self.at_target.len()];
        self.sent = vec![None; self.at_target.len()];
    }

    /// The size that a record must say next of a volume of this size, if one must.
    fn owed(&self, index: usize, size: ByteCount) -> Option<ByteCount> {
        let known = *self.at_target.get(index)?;
        let sent = self.sent.get(index).copied().flatten();
        let growth = self.growth.filter(|growth| usize::from(growth.volume.0) == index);
        let growth = growth.filter(|growth| growth.stage == Stage::Record);
        if known > size && !self.is_cleared(index) {
            // Before any growth: hosts must not see there what the target has.
            return sent.is_none().then_some(size);
        }
        let wanted = growth.map_or(size, |growth| growth.size.max(size));
        (known < wanted && sent.is_none_or(|(_, sent)| sent < wanted)).then_some(wanted)
    }

    fn is_cleared(&self, index: usize) -> bool {
        self.cleared.get(index).copied().unwrap_or_default()
    }

    /// Where the target has more of its volumes than this side.
    pub(super) fn surplus(&self, sizes: impl Iterator<Item = ByteCount>) -> Vec<CompareRange> {
        let known = (0_u16..).map(VolumeIndex).zip(self.at_target.iter().zip(sizes));
        let surplus = |(volume, (known, ours)): (VolumeIndex, (&ByteCount, ByteCount))| {
            let range = ByteRange::between(ours.0, known.0).filter(|range| !range.is_empty())?;
            Some(CompareRange { volume, range })
        };
        known.filter_map(surplus).collect()
    }

    /// Records on their way are lost.
    pub(super) fn forget_sent(&mut self) {
        self.sent.iter_mut().for_each(|sent| *sent = None);
    }

    pub(super) fn session_lost(&mut self) {
        if self.growth.is_some_and(|growth| growth.stage == Stage::Room) {
            self.fail("the session with the partner was lost".to_owned());
        }
    }

    /// The target holds everything up to here, durably and committed.
    pub(super) fn committed(&mut self, position: &Position) {
        let known = self.at_target.iter_mut().zip(&mut self.cleared);
        for ((known, cleared), sent) in known.zip(&mut self.sent) {
            if let Some((sequence, size)) = *sent
                && sequence <= position.sequence
            {
                *known = size.max(*known);
                *cleared = true;
                *sent = None;
            }
        }
    }
}

/// True if the record stands for content of its blocks.
pub(super) fn has_blocks(record: &Record) -> bool {
    record.kind != RecordKind::Resize && !record.range.is_empty()
}

/// Raises sizes to those that a cut records.
pub(super) fn raise(sizes: &mut [ByteCount], recorded: &[(VolumeIndex, ByteCount)]) {
    for (volume, size) in recorded {
        if let Some(known) = sizes.get_mut(usize::from(volume.0)) {
            *known = (*known).max(*size);
        }
    }
}

/// Issues what resize records ask for; returns how many requests that are.
pub(super) fn issue_sizes(records: &[Record], purpose: Purpose, out: &mut Outbox) -> usize {
    let mut issued = 0;
    for record in records.iter().filter(|record| record.kind == RecordKind::Resize) {
        let (volume, size) = (record.volume, ByteCount(record.range.end()));
        out.io(purpose, IoRequest::Resize { volume, size });
        issued += 1;
    }
    issued
}

impl Primary {
    fn begin_growth(
        &mut self,
        volume: VolumeIndex,
        size: ByteCount,
        out: &mut Outbox,
    ) -> Result<(), VerbRefused> {
        let refuse = |reason: &str| Err(VerbRefused(reason.to_owned()));
        if self.sizes.is_growing() {
            return refuse("another volume of its mirror is growing: wait for that");
        }
        let Some(session) = self.session().filter(|_| self.gate == Gate::Open) else {
            return refuse(
                "its mirror is not connected, and the partner must make room first: see 'farshore mirror show'",
            );
        };
        if self.pass.is_some() || self.folded_from.is_some() || !self.compare.is_done() {
            return refuse("its mirror is being synchronized: wait for it with 'farshore mirror wait'");
        }
        self.sizes.failure = None;
        self.sizes.growth = Some(Growth { volume, size, stage: Stage::Room });
        out.push(Effect::Send { session, frame: Message::Grow { volume, size }.encode() });
        Ok(())
    }

    /// The target has made room, or says why not.
    pub(super) fn grown(&mut self, volume: VolumeIndex, size: ByteCount, trouble: String, out: &mut Outbox) {
        let Some(growth) = &mut self.sizes.growth else {
            return;
        };
        if (growth.volume, growth.size, growth.stage) != (volume, size, Stage::Room) {
            return;
        }
        if trouble.is_empty() {
            growth.stage = Stage::Home;
            let room = self.sizes.room(volume, size);
            self.sizes.promised.retain(|(of, _)| *of != volume);
            self.sizes.promised.push((volume, room));
            out.io(Purpose::Grow { volume, size }, IoRequest::Grow { volume, size });
        } else {
            self.sizes.fail(format!("the partner has no room for it: {trouble}"));
        }
    }

    fn home_grown(&mut self, volume: VolumeIndex, size: ByteCount, failure: Option<IoFailure>) {
        let Some(growth) = &mut self.sizes.growth else {
            return;
        };
        if (growth.volume, growth.size, growth.stage) != (volume, size, Stage::Home) {
            return;
        }
        match failure {
            None => growth.stage = Stage::Record,
            Some(failure) => self.sizes.fail(failure.to_string()),
        }
    }

    fn shown(&mut self, volume: VolumeIndex, size: ByteCount, failure: Option<IoFailure>) {
        let ours = |growth: &Growth| growth.volume == volume && growth.size == size;
        if self.sizes.growth.as_ref().is_some_and(ours) {
            match failure {
                None => self.sizes.growth = None,
                Some(failure) => self.sizes.fail(format!("its new size could not be stored: {failure}")),
            }
        }
    }

    fn indexed_sizes(&self) -> impl Iterator<Item = (VolumeIndex, ByteCount)> {
        let volumes = (0_u16..).map(VolumeIndex).zip(&self.volumes);
        volumes.map(|(index, volume)| (index, volume.size))
    }

    /// Why the role cannot be given up: the target would show more than this side could after it. Every record of a size
    /// that this process sent is known here, and what the target held before.
    pub(super) fn unfinished_growth(&self) -> Option<String> {
        if let Some(growth) = self.sizes.growth {
            return Some(format!(
                "a resize of its volume {} is under way: wait until it has ended",
                growth.volume.0
            ));
        }
        let extents = self.indexed_sizes().map(|(index, size)| (index, size, self.sizes.extent(index, size)));
        let (index, _, extent) = extents.into_iter().find(|(_, size, extent)| extent > size)?;
        Some(format!(
            "the partner has more of volume {}, after an unfinished resize or a rewind: resize it here to at least \
             {extent} first",
            index.0
        ))
    }

    /// A size that the target lacks is in no record yet.
    pub(super) fn owes_sizes(&self) -> bool {
        // The initial copy records none: a new mirror has equal sizes.
        if self.pass.is_some_and(|pass| pass.is_initial()) {
            return false;
        }
        self.volumes.iter().enumerate().any(|(index, volume)| self.sizes.owed(index, volume.size).is_some())
    }

    /// Takes a growth on whose record the target holds.
    pub(super) fn grow_more(&mut self, out: &mut Outbox) {
        let Some(growth) = &mut self.sizes.growth else {
            return;
        };
        let index = usize::from(growth.volume.0);
        let known = self.sizes.at_target.get(index).is_some_and(|known| *known >= growth.size);
        let cleared = self.sizes.cleared.get(index).is_some_and(|cleared| *cleared);
        if growth.stage == Stage::Record && known && cleared {
            let (volume, size) = (growth.volume, growth.size);
            growth.stage = Stage::Showing;
            out.io(Purpose::Show { volume, size }, IoRequest::Resize { volume, size });
        }
    }

    /// Records the sizes that the target lacks, if records may join the ring now.
    pub(super) fn push_sizes(&mut self, now: Monotonic) {
        if self.folded_from.is_some() || self.pass.is_some_and(|pass| pass.is_initial()) {
            return;
        }
        for index in 0..self.sizes.at_target.len() {
            let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            let size = self.volume(volume).size;
            let Some(wanted) = self.sizes.owed(index, size) else { continue };
            let sequence = Sequence(self.last.0 + 1);
            let range = ByteRange::new(0, wanted.0).unwrap_or_default();
            let record = Record { sequence, volume, kind: RecordKind::Resize, range, payload: Bytes::new() };
            if self.journal(record).is_err() {
                return;
            }
            let taken = self.take_sequence(now);
            assert_eq!(taken, sequence, "sequences are assigned one by one");
            // A pass must not commit without it: what it copies may lie beyond the old size.
            self.commit_floor = sequence;
            if let Some(sent) = self.sizes.sent.get_mut(index) {
                *sent = Some((sequence, wanted));
            }
        }
    }
}

/// A session's wish for room.
#[derive(Clone, Copy, Debug)]
struct Wish {
    session: SessionId,
    volume: VolumeIndex,
    size: ByteCount,
}

/// The room that a target's volumes have, which may be more than their size.
#[derive(Debug, Default)]
pub(super) struct Room {
    have: Vec<ByteCount>,
    making: Option<(VolumeIndex, ByteCount)>,
    wishes: Vec<Wish>,
    /// The sizes as of the committed tip, applied or not.
    recorded: Vec<ByteCount>,
    /// The last attempt failed, for so much.
    failed: Option<(VolumeIndex, ByteCount, IoFailure)>,
}

impl Room {
    pub(super) fn of(settings: &MirrorSettings) -> Self {
        let have: Vec<_> = settings.volumes.iter().map(|volume| volume.size).collect();
        Self { recorded: have.clone(), have, ..Self::default() }
    }

    /// A cut that records these sizes is committed.
    pub(super) fn committed(&mut self, sizes: &[(VolumeIndex, ByteCount)]) {
        raise(&mut self.recorded, sizes);
    }

    /// The sizes of the image.
    pub(super) fn recorded(&self) -> &[ByteCount] {
        &self.recorded
    }

    /// What a cut with these sizes changes behind them.
    pub(super) fn changes_behind(&self, sizes: &[(VolumeIndex, ByteCount)]) -> Vec<Change> {
        let behind = |(volume, size): &(VolumeIndex, ByteCount)| {
            let range = self.behind(*volume, *size)?;
            Some(Change { volume: *volume, range, content: ChangeContent::Zeros })
        };
        sizes.iter().filter_map(behind).collect()
    }

    /// The records, and behind each that says a size others that zero what is there.
    pub(super) fn with_zeros(&self, records: Vec<Record>) -> Vec<Record> {
        if !records.iter().any(|record| record.kind == RecordKind::Resize) {
            return records;
        }
        let mut whole = Vec::with_capacity(records.len());
        for record in records {
            let Record { sequence, volume, kind, range, .. } = record;
            whole.push(record);
            let behind =
                if kind == RecordKind::Resize { self.behind(volume, ByteCount(range.end())) } else { None };
            let mut rest = behind.unwrap_or_default();
            while !rest.is_empty() {
                let end = rest.end().min(rest.offset() + ZERO_BYTES_MAX);
                let step = ByteRange::between(rest.offset(), end).unwrap_or_default();
                whole.push(Record {
                    sequence,
                    volume,
                    kind: RecordKind::Trim,
                    range: step,
                    payload: Bytes::new(),
                });
                rest = ByteRange::between(end, rest.end()).unwrap_or_default();
            }
        }
        whole
    }

    fn behind(&self, volume: VolumeIndex, size: ByteCount) -> Option<ByteRange> {
        let have = self.have.get(usize::from(volume.0))?;
        ByteRange::between(size.0, have.0).filter(|range| !range.is_empty())
    }

    pub(super) fn holds(&self, volume: VolumeIndex, end: u64) -> bool {
        self.have.get(usize::from(volume.0)).is_some_and(|have| end <= have.0)
    }

    fn missing(&self, sizes: &[ByteCount]) -> Option<(VolumeIndex, ByteCount)> {
        let mut short = self.have.iter().zip(sizes).enumerate().filter(|(_, (have, size))| size > have);
        let (index, (_, size)) = short.next()?;
        Some((VolumeIndex(u16::try_from(index).ok()?), *size))
    }

    fn note(&mut self, volume: VolumeIndex, size: ByteCount) {
        if let Some(have) = self.have.get_mut(usize::from(volume.0)) {
            *have = size.max(*have);
        }
    }
}

impl Secondary {
    /// The primary asks for room.
    pub(super) fn wish_for_room(&mut self, session: SessionId, volume: VolumeIndex, size: ByteCount) {
        // A primary has one wish at a time: a later one takes the place of an earlier.
        self.room.wishes.clear();
        self.room.failed = None;
        self.room.wishes.push(Wish { session, volume, size });
    }

    /// Whether there is room for the sizes of a hello; `Some` once that is known.
    pub(super) fn room_for(&mut self, sizes: &[ByteCount], out: &mut Outbox) -> Option<Result<(), String>> {
        let Some((volume, size)) = self.room.missing(sizes) else {
            return Some(Ok(()));
        };
        if let Some((_, _, failure)) =
            self.room.failed.take_if(|(of, most, _)| (*of, *most) == (volume, size))
        {
            return Some(Err(format!(
                "volume {} has no room for {} bytes here: {failure}",
                volume.0, size.0
            )));
        }
        self.make_room(volume, size, out);
        None
    }

    fn make_room(&mut self, volume: VolumeIndex, size: ByteCount, out: &mut Outbox) {
        if self.room.making.is_none() {
            self.room.making = Some((volume, size));
            out.io(Purpose::Grow { volume, size }, IoRequest::Grow { volume, size });
        }
    }

    /// Answers wishes, and asks for the room that they need.
    pub(super) fn grant_wishes(&mut self, out: &mut Outbox) {
        let Some(wish) = self.room.wishes.first().copied() else {
            return;
        };
        let Wish { session, volume, size } = wish;
        let failure = self.room.failed.take_if(|(of, most, _)| (*of, *most) == (volume, size));
        let known = usize::from(volume.0) < self.room.have.len();
        if known && failure.is_none() && !self.room.holds(volume, size.0) {
            return self.make_room(volume, size, out);
        }
        self.room.wishes.clear();
        let trouble = match failure {
            Some((_, _, failure)) => failure.to_string(),
            None if known => String::new(),
            None => "there is no such volume".to_owned(),
        };
        if self.is_session(session) {
            let frame = Message::Grown { volume, size, trouble }.encode();
            out.push(Effect::Send { session, frame });
        }
    }

    fn room_made(&mut self, volume: VolumeIndex, size: ByteCount, failure: Option<IoFailure>) {
        self.room.making = None;
        match failure {
            None => self.room.note(volume, size),
            Some(failure) => self.room.failed = Some((volume, size, failure)),
        }
    }
}

impl Group {
    /// `volume resize` of a mirrored volume: begins it. It has ended when [`super::MirrorSnapshot::growing`] falls.
    ///
    /// # Errors
    /// This side is not the primary, the mirror is not connected and synchronized, or another volume grows.
    pub fn grow(&mut self, volume: VolumeIndex, size: ByteCount) -> Result<(), VerbRefused> {
        let switching = self.mirror.as_ref().is_some_and(|mirror| mirror.planned.is_running());
        let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror else {
            let reason = "this side is not the primary of its mirror now: see 'farshore mirror show'";
            return Err(VerbRefused(reason.to_owned()));
        };
        if switching {
            return Err(VerbRefused(
                "its mirror is being switched: try again when that has ended".to_owned(),
            ));
        }
        primary.begin_growth(volume, size, &mut self.out)
    }

    /// Gives up a growth that the target does not confirm. What the target has stays larger.
    pub fn give_up_growth(&mut self) {
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror
            && primary.sizes.growth.is_some_and(|growth| growth.stage != Stage::Showing)
        {
            primary.sizes.fail("the partner did not confirm it in time".to_owned());
        }
    }

    /// A volume has this size from now on: its files have room, and it is durable.
    ///
    /// # Panics
    /// If the volume would shrink.
    pub fn resize(&mut self, volume: VolumeIndex, size: ByteCount, limit: IopsLimit) {
        let now = self.now;
        let index = usize::from(volume.0);
        if let Some(slot) = self.slot(volume) {
            slot.config = VolumeConfig { size, limit, ..slot.config };
            slot.volume.set_size(size);
            slot.volume.set_limit(now, limit);
        }
        let Some(mirror) = &mut self.mirror else { return };
        mirror.watch.look_again();
        if let Some(known) = mirror.settings.volumes.get_mut(index) {
            known.size = size;
            known.limit = limit;
        }
        if let Some(intent) = mirror.intents.get_mut(index) {
            intent.grow(size);
        }
        match &mut mirror.machine {
            Machine::Primary(primary) => {
                let known = primary.volume(volume);
                known.size = size;
                known.intent.grow(size);
            }
            Machine::Secondary(secondary) => secondary.room.note(volume, size),
            Machine::Changing(change) => {
                if let Some(secondary) = change.secondary() {
                    secondary.room.note(volume, size);
                }
            }
        }
    }

    /// Room was made for a volume, or not.
    pub(super) fn grown(&mut self, volume: VolumeIndex, size: ByteCount, failure: Option<IoFailure>) {
        match self.mirror.as_mut().map(|mirror| &mut mirror.machine) {
            Some(Machine::Primary(primary)) => primary.home_grown(volume, size, failure),
            Some(Machine::Secondary(secondary)) => secondary.room_made(volume, size, failure),
            Some(Machine::Changing(change)) => {
                if let Some(secondary) = change.secondary() {
                    secondary.room_made(volume, size, failure);
                }
            }
            None => {}
        }
    }

    /// A primary's new size was stored, or not.
    pub(super) fn shown(&mut self, volume: VolumeIndex, size: ByteCount, failure: Option<IoFailure>) {
        if let Some(Mirror { machine: Machine::Primary(primary), .. }) = &mut self.mirror {
            primary.shown(volume, size, failure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(sequence: u64) -> Position {
        Position { sequence: Sequence(sequence), ..Position::default() }
    }

    #[test]
    fn a_size_is_the_targets_when_a_commit_covers_its_record_and_no_sooner() {
        let mut sizes = Sizes::default();
        sizes.heard(&[ByteCount(10), ByteCount(20), ByteCount(30)], 2);
        assert_eq!(
            sizes.at_target,
            [ByteCount(10), ByteCount(20)],
            "a target that tells more is not believed"
        );
        sizes.sent[1] = Some((Sequence(7), ByteCount(25)));
        sizes.committed(&at(6));
        assert_eq!(sizes.at_target[1], ByteCount(20));
        sizes.committed(&at(7));
        assert_eq!((sizes.at_target[1], sizes.sent[1]), (ByteCount(25), None));
        // A lost record is not taken for one that the target holds.
        sizes.sent[0] = Some((Sequence(8), ByteCount(11)));
        sizes.forget_sent();
        sizes.committed(&at(9));
        assert_eq!(sizes.at_target[0], ByteCount(10));
    }

    #[test]
    fn a_hello_asks_for_room_that_was_promised_once_although_the_growth_was_given_up() {
        let mut sizes = Sizes::default();
        sizes.promised.push((VolumeIndex(1), ByteCount(50)));
        sizes.fail("given up".to_owned());
        assert_eq!(sizes.room(VolumeIndex(1), ByteCount(20)), ByteCount(50));
        assert_eq!(sizes.room(VolumeIndex(1), ByteCount(60)), ByteCount(60));
        assert_eq!(sizes.room(VolumeIndex(0), ByteCount(20)), ByteCount(20));
    }

    #[test]
    fn what_the_target_has_behind_is_zeroed_before_a_growth_shows_it() {
        let mut sizes = Sizes::default();
        let (small, large) = (ByteCount(10), ByteCount(30));
        sizes.heard(&[large], 1);
        assert_eq!(sizes.extent(VolumeIndex(0), small), large);
        let surplus = CompareRange { volume: VolumeIndex(0), range: ByteRange::between(10, 30).unwrap() };
        assert_eq!(sizes.surplus([small].into_iter()), [surplus]);
        sizes.growth = Some(Growth { volume: VolumeIndex(0), size: ByteCount(20), stage: Stage::Record });
        assert_eq!(sizes.owed(0, small), Some(small), "the present size comes first");
        sizes.sent[0] = Some((Sequence(3), small));
        assert_eq!(sizes.owed(0, small), None);
        sizes.forget_sent();
        assert_eq!(sizes.owed(0, small), Some(small), "the record was lost");
        sizes.sent[0] = Some((Sequence(4), small));
        sizes.committed(&at(4));
        assert_eq!((sizes.owed(0, small), sizes.is_cleared(0)), (None, true));
        assert_eq!(sizes.owed(0, ByteCount(20)), None, "once in a session");
        sizes.growth = Some(Growth { volume: VolumeIndex(0), size: ByteCount(40), stage: Stage::Record });
        assert_eq!(sizes.owed(0, ByteCount(20)), Some(ByteCount(40)));
        sizes.heard(&[large], 1);
        assert_eq!(sizes.owed(0, ByteCount(20)), Some(ByteCount(20)), "the next session does not know");
    }

    #[test]
    fn a_size_zeroes_what_is_behind_it_in_its_place_among_the_records() {
        let room = Room { have: vec![ByteCount(0), ByteCount(3 * ZERO_BYTES_MAX / 2)], ..Room::default() };
        let record = |sequence, kind, length| Record {
            sequence: Sequence(sequence),
            volume: VolumeIndex(1),
            kind,
            range: ByteRange::new(0, length).unwrap(),
            payload: Bytes::new(),
        };
        let records = vec![
            record(1, RecordKind::Zero, 4096),
            record(2, RecordKind::Resize, 8192),
            record(3, RecordKind::Trim, 512),
        ];
        let whole = room.with_zeros(records);
        let told: Vec<_> = whole.iter().map(|record| (record.sequence.0, record.kind)).collect();
        let (zero, trim) = (RecordKind::Zero, RecordKind::Trim);
        assert_eq!(told, [(1, zero), (2, RecordKind::Resize), (2, trim), (2, trim), (3, trim)]);
        let steps: Vec<_> =
            whole[2..4].iter().map(|record| (record.range.offset(), record.range.end())).collect();
        let (start, middle, end) = (8192, 8192 + ZERO_BYTES_MAX, 3 * ZERO_BYTES_MAX / 2);
        assert_eq!(steps, [(start, middle), (middle, end)]);
        let changes =
            room.changes_behind(&[(VolumeIndex(1), ByteCount(8192)), (VolumeIndex(0), ByteCount(1))]);
        assert_eq!(changes.len(), 1, "only where there is something behind");
        assert_eq!((changes[0].range.offset(), changes[0].range.end()), (start, end));
    }
}
