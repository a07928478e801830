//! Volumes of a mirror grow: the target makes room first, then this side, then a record says the new size in the order of
//! the writes, and when the target holds that durably hosts here see it.
//!
//! So no host can have seen more of a volume than whatever image the target may be promoted with, and no record or hash
//! lies beyond the room that the other side has. A volume never becomes smaller; a target may be larger than its
//! primary, after a growth that was given up. docs/protocols/replication.md, 14.

use block::{ByteCount, ByteRange, IopsLimit, Monotonic, Position, Sequence, VolumeIndex};
use bytes::Bytes;
use engine::volume::VolumeConfig;
use journal::{Record, RecordKind};
use protocol::Message;

use super::effect::{Effect, IoFailure, IoRequest, Outbox, Purpose, SessionId};
use super::primary::{Gate, Primary};
use super::secondary::Secondary;
use super::{Group, Machine, Mirror, MirrorSettings, VerbRefused};

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

    /// The target may be larger than a volume of this size: a growth is on its way, or was given up.
    fn is_unfinished(&self, volume: VolumeIndex, size: ByteCount) -> bool {
        self.is_growing() || self.room(volume, size) > size
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
        self.sent = vec![None; self.at_target.len()];
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
        for (known, sent) in self.at_target.iter_mut().zip(&mut self.sent) {
            if let Some((sequence, size)) = *sent
                && sequence <= position.sequence
            {
                *known = size.max(*known);
                *sent = None;
            }
        }
    }
}

/// True if the record stands for content of its blocks.
pub(super) fn has_blocks(record: &Record) -> bool {
    record.kind != RecordKind::Resize && !record.range.is_empty()
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

    /// Why the role cannot be given up: the target would show more than this side could after it.
    pub(super) fn unfinished_growth(&self) -> Option<String> {
        let mut volumes = self.indexed_sizes();
        let (index, size) = volumes.find(|(index, size)| self.sizes.is_unfinished(*index, *size))?;
        let room = self.sizes.room(index, size);
        Some(format!(
            "a resize of its volume {} is not finished: resize that to at least {room} first",
            index.0
        ))
    }

    /// A size that the target lacks is in no record yet.
    pub(super) fn owes_sizes(&self) -> bool {
        // The initial copy records none: a new mirror has equal sizes.
        if self.pass.is_some_and(|pass| pass.is_initial()) {
            return false;
        }
        let known = self.sizes.at_target.iter().zip(&self.sizes.sent);
        known.zip(&self.volumes).any(|((known, sent), volume)| *known < volume.size && sent.is_none())
    }

    /// Takes a growth on whose record the target holds.
    pub(super) fn grow_more(&mut self, out: &mut Outbox) {
        let Some(growth) = &mut self.sizes.growth else {
            return;
        };
        let known = self.sizes.at_target.get(usize::from(growth.volume.0));
        if growth.stage == Stage::Record && known.is_some_and(|known| *known >= growth.size) {
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
            let growth = self.sizes.growth.filter(|growth| growth.volume == volume);
            let growth = growth.filter(|growth| growth.stage == Stage::Record);
            let wanted = growth.map_or(ByteCount(0), |growth| growth.size).max(self.volume(volume).size);
            let known = self.sizes.at_target.get(index).copied().unwrap_or(wanted);
            let sent = self.sizes.sent.get(index).copied().flatten();
            if known >= wanted || sent.is_some_and(|(_, size)| size >= wanted) {
                continue;
            }
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
    /// What the primary said of its sizes.
    primary: Vec<ByteCount>,
    /// The largest sizes in records that are durable here, perhaps not applied.
    recorded: Vec<ByteCount>,
    /// Cuts found at the start are not applied yet: what sizes they record is not known.
    unread: bool,
    /// The last attempt failed, for so much.
    failed: Option<(VolumeIndex, ByteCount, IoFailure)>,
}

impl Room {
    pub(super) fn of(settings: &MirrorSettings, unread: bool) -> Self {
        let have: Vec<_> = settings.volumes.iter().map(|volume| volume.size).collect();
        Self { recorded: have.clone(), have, unread, ..Self::default() }
    }

    /// Everything that was found at the start is applied.
    pub(super) const fn all_read(&mut self) {
        self.unread = false;
    }

    /// A record is durable here.
    pub(super) fn note_record(&mut self, record: &Record) {
        if record.kind == RecordKind::Resize
            && let Some(recorded) = self.recorded.get_mut(usize::from(record.volume.0))
        {
            *recorded = ByteCount(record.range.end()).max(*recorded);
        }
    }

    /// Why this side cannot take the role over: it would show more than its primary can after it.
    pub(super) fn outgrows_primary(&self, settings: &MirrorSettings) -> Option<String> {
        if self.unread {
            return Some("this side has just started and applies what it holds: try again".to_owned());
        }
        let sizes = settings.volumes.iter().zip(&self.recorded).zip(&self.primary);
        let larger = |((ours, recorded), theirs): &((&super::GroupVolume, &ByteCount), &ByteCount)| {
            ours.size.max(**recorded) > **theirs
        };
        let ((ours, recorded), _) = sizes.into_iter().find(larger)?;
        let size = ours.size.max(*recorded);
        Some(format!(
            "the replica of volume {} is larger after an unfinished resize: resize that to at least {size} first",
            ours.id
        ))
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
        self.room.primary = sizes.to_vec();
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
}
