//! Epochs, forks and roles: who may write, and whether a target's image is an ancestor of the primary's.
//!
//! Two rules carry everything. An epoch that is heard is durable before it is acted on; and a message of a lower
//! epoch is refused everywhere. A [`GroupState`] is the durable part of a group on one site.

use std::cmp::Ordering;

use block::{Epoch, Incarnation, Position, Sequence, SiteId, Tip};

use crate::codec::{CodecError, Reader, Writer};
use crate::message::{Hello, decode_forks, encode_forks};

/// Promotions that a history remembers: 64 bytes each, so that a state fits into a volume's header. A side that missed
/// more of them is compared in full.
pub(crate) const FORKS_MAX: usize = 100;

/// Version 2 has no `leased`, version 1 also no `relinquished`; they are still read.
const STATE_VERSION: u16 = 3;

/// What a site is to a mirror.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Hosts write here.
    Primary,
    /// Receives the primary's writes; hosts are refused.
    Secondary,
}

/// The beginning of an epoch: who promoted, and after which position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The epoch that began.
    pub epoch: Epoch,
    /// The site that promoted.
    pub origin: SiteId,
    /// The last position of the lineage before that the new one contains.
    pub at: Position,
}

/// The durable state of a group on one site; written before it is acted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupState {
    /// Primary or secondary.
    pub role: Role,
    /// The highest epoch heard.
    pub epoch: Epoch,
    /// The primary of that epoch.
    pub origin: SiteId,
    /// The highest incarnation used or heard.
    pub incarnation: Incarnation,
    /// How the epochs began, oldest first; the last one is the current epoch's.
    pub forks: Vec<Fork>,
    /// An operator stopped mirroring.
    pub stopped: bool,
    /// The target has had a complete image since the mirror was created.
    pub consistent: bool,
    /// A secondary that was a primary and may hold writes that the new primary never had.
    pub diverged: bool,
    /// At the primary: an operator's `start` allowed the partner's diverged blocks to be overwritten.
    pub overwrite_approved: bool,
    /// This side was the primary and gave its role up in a planned switch: its homes durably hold the image at this
    /// tip and nothing else. Until it hears of the next epoch it presents that to its partner; the first commit of the
    /// new lineage, or a promotion here, ends it.
    pub relinquished: Option<Tip>,
    /// This side, as a primary, may have given its partner a lease: see `LeaseGiver`.
    pub leased: bool,
}

/// Why a side refuses; the number travels on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The sender's epoch is lower: it must fence itself.
    StaleEpoch,
    /// Both sides promoted in the same epoch.
    Fork,
    /// The mirror is not known here.
    UnknownMirror,
    /// Volumes, sizes, class or key differ.
    Mismatch,
    /// The certificate's owner is not this mirror's partner.
    WrongPartner,
    /// The receiver cannot serve now; try again.
    Busy,
    /// The request conflicts with something that exists.
    Conflict,
    /// Not enough space.
    NoSpace,
    /// The message makes no sense in this state.
    Protocol,
}

/// A refusal before it becomes a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// For machines.
    pub code: RefusalCode,
    /// For people.
    pub text: String,
}

/// What a site does with a hello.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HelloVerdict {
    /// Open the session.
    Accept,
    /// A higher epoch: make this state durable, stop serving hosts, then open the session.
    Adopt(Box<GroupState>),
    /// Refuse; nothing changes.
    Refuse(Refusal),
}

/// How a primary continues from the target's tip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResumePlan {
    /// The tip lies in this incarnation: the ring or the dirty map holds what is missing.
    SameIncarnation,
    /// The tip is an ancestor: the intent map's regions must be compared, then a pass follows.
    Ancestor,
    /// The tip is not an ancestor, but the target says so and lists where it may differ.
    Diverged,
    /// The tip makes no sense for this history.
    Unrelated,
}

impl RefusalCode {
    const ALL: [Self; 9] = [
        Self::StaleEpoch,
        Self::Fork,
        Self::UnknownMirror,
        Self::Mismatch,
        Self::WrongPartner,
        Self::Busy,
        Self::Conflict,
        Self::NoSpace,
        Self::Protocol,
    ];

    pub(crate) const fn to_byte(self) -> u8 {
        match self {
            Self::StaleEpoch => 1,
            Self::Fork => 2,
            Self::UnknownMirror => 3,
            Self::Mismatch => 4,
            Self::WrongPartner => 5,
            Self::Busy => 6,
            Self::Conflict => 7,
            Self::NoSpace => 8,
            Self::Protocol => 9,
        }
    }

    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|code| code.to_byte() == byte)
    }
}

impl GroupState {
    /// A new mirror's state at the primary.
    pub fn new_primary(site: SiteId) -> Self {
        Self::first_epoch(Role::Primary, site)
    }

    /// A new mirror's state at the secondary of `primary`.
    pub fn new_secondary(primary: SiteId) -> Self {
        Self::first_epoch(Role::Secondary, primary)
    }

    fn first_epoch(role: Role, origin: SiteId) -> Self {
        let epoch = Epoch(1);
        let at = Position { epoch: Epoch(0), origin, incarnation: Incarnation(0), sequence: Sequence(0) };
        Self {
            role,
            epoch,
            origin,
            incarnation: Incarnation(0),
            forks: vec![Fork { epoch, origin, at }],
            stopped: false,
            consistent: false,
            diverged: false,
            overwrite_approved: false,
            relinquished: None,
            leased: false,
        }
    }

    /// The position before the first write of the current epoch and incarnation.
    pub const fn start_position(&self) -> Position {
        Position {
            epoch: self.epoch,
            origin: self.origin,
            incarnation: self.incarnation,
            sequence: Sequence(0),
        }
    }

    /// Where the current epoch forked off.
    pub fn fork(&self) -> Position {
        self.forks.last().map_or_else(Position::default, |fork| fork.at)
    }

    /// The state after promoting this site at `tip`: the epoch rises and the fork is remembered.
    pub fn promoted(&self, site: SiteId, tip: Position) -> Self {
        let epoch = self.epoch.next();
        let forks = self.forked(Fork { epoch, origin: site, at: tip });
        Self {
            role: Role::Primary,
            epoch,
            origin: site,
            incarnation: self.incarnation.next(),
            forks,
            diverged: false,
            overwrite_approved: false,
            relinquished: None,
            ..self.clone()
        }
    }

    /// The state of a primary that gives its role up at `tip`, in its own epoch: its homes hold exactly that, durably.
    ///
    /// # Panics
    /// If this side is not a primary of the tip's epoch whose target is complete.
    pub fn relinquishing(&self, tip: Tip) -> Self {
        assert!(
            self.role == Role::Primary && self.consistent,
            "only a primary with a target gives its role up"
        );
        assert!(tip.position.epoch == self.epoch, "what is given up is the present epoch's");
        Self {
            role: Role::Secondary,
            diverged: false,
            overwrite_approved: false,
            relinquished: Some(tip),
            ..self.clone()
        }
    }

    /// The tip at which `site` gave its role up, while nobody is known to have taken it.
    pub fn offered(&self, site: SiteId) -> Option<Tip> {
        self.relinquished.filter(|_| self.role == Role::Secondary && self.origin == site)
    }

    /// The state of a primary, or of one that gave its role up, that heard of a higher epoch by a refusal.
    ///
    /// # Panics
    /// If the epoch is not higher.
    pub fn fenced(&self, epoch: Epoch, origin: SiteId, fork: Position) -> Self {
        assert!(epoch > self.epoch, "only a higher epoch fences");
        let heard = self.heard(epoch, origin);
        // What was given up and is not in the new lineage is this side's own.
        let beyond = self.relinquished.is_some_and(|tip| tip.position.order(&fork) == Ordering::Greater);
        Self {
            forks: self.forked(Fork { epoch, origin, at: fork }),
            diverged: heard.diverged || beyond,
            ..heard
        }
    }

    /// The history with one more fork; the oldest are forgotten beyond the bound.
    fn forked(&self, fork: Fork) -> Vec<Fork> {
        let mut forks = self.forks.clone();
        forks.push(fork);
        let excess = forks.len().saturating_sub(FORKS_MAX);
        forks.drain(..excess);
        forks
    }

    fn heard(&self, epoch: Epoch, origin: SiteId) -> Self {
        Self {
            role: Role::Secondary,
            epoch,
            origin,
            // A primary's image is complete; it may only hold too much.
            consistent: self.consistent || self.role == Role::Primary,
            diverged: self.diverged || self.role == Role::Primary,
            overwrite_approved: false,
            // Whoever held a lease of it is the primary now, or dropped it before that one's hello was answered.
            leased: false,
            ..self.clone()
        }
    }

    /// What this site does with a primary's hello. `tip` is the end of what this site holds as a secondary.
    pub fn judge_hello(&self, hello: &Hello, tip: Position) -> HelloVerdict {
        let theirs = hello.position;
        match theirs.epoch.cmp(&self.epoch) {
            Ordering::Less => HelloVerdict::Refuse(Refusal {
                code: RefusalCode::StaleEpoch,
                text: format!(
                    "epoch {} is over: epoch {} began at position {}; this side must become the secondary",
                    theirs.epoch.0,
                    self.epoch.0,
                    self.fork()
                ),
            }),
            Ordering::Equal if theirs.origin != self.origin || self.role == Role::Primary => {
                HelloVerdict::Refuse(Refusal {
                    code: RefusalCode::Fork,
                    text: format!(
                        "both sides were promoted in epoch {}: an operator must choose one",
                        self.epoch.0
                    ),
                })
            }
            Ordering::Equal => HelloVerdict::Accept,
            Ordering::Greater => self.judge_higher_epoch(hello, tip),
        }
    }

    fn judge_higher_epoch(&self, hello: &Hello, tip: Position) -> HelloVerdict {
        let theirs = hello.position;
        let newest = hello.forks.last();
        let first_after = hello.forks.iter().find(|fork| fork.epoch > self.epoch);
        let (Some(newest), Some(first_after)) = (newest, first_after) else {
            return Self::broken_history("its history does not list its epoch");
        };
        if newest.epoch != theirs.epoch || newest.origin != theirs.origin {
            return Self::broken_history("its history does not end with its epoch");
        }
        let mut state = self.heard(theirs.epoch, theirs.origin);
        state.forks.clone_from(&hello.forks);
        state.incarnation = state.incarnation.max(theirs.incarnation);
        // A secondary that holds more than the new lineage took over has writes of a lost branch.
        state.diverged |= tip.order(&first_after.at) == Ordering::Greater;
        HelloVerdict::Adopt(Box::new(state))
    }

    fn broken_history(text: &str) -> HelloVerdict {
        HelloVerdict::Refuse(Refusal {
            code: RefusalCode::Protocol,
            text: format!("the hello is refused: {text}"),
        })
    }

    /// How this primary, now at `position`, continues from a target's `tip`.
    pub fn judge_tip(&self, position: Position, tip: &Tip, target_diverged: bool) -> ResumePlan {
        let theirs = tip.position;
        if target_diverged {
            let known = theirs.epoch <= self.epoch;
            return if known { ResumePlan::Diverged } else { ResumePlan::Unrelated };
        }
        if theirs.same_lineage(&position) {
            return if theirs.sequence <= position.sequence {
                ResumePlan::SameIncarnation
            } else {
                ResumePlan::Unrelated
            };
        }
        if theirs.epoch == self.epoch {
            let older = theirs.origin == self.origin && theirs.incarnation < position.incarnation;
            return if older { ResumePlan::Ancestor } else { ResumePlan::Unrelated };
        }
        match self.forks.iter().find(|fork| fork.epoch > theirs.epoch) {
            Some(fork)
                if fork.at.epoch == theirs.epoch
                    && fork.at.origin == theirs.origin
                    && theirs.order(&fork.at) != Ordering::Greater =>
            {
                ResumePlan::Ancestor
            }
            Some(_) | None => ResumePlan::Unrelated,
        }
    }

    /// The bytes that the catalogue and the volume headers keep.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u16(STATE_VERSION);
        out.bool(self.role == Role::Primary);
        out.u64(self.epoch.0);
        out.raw(&self.origin.to_bytes());
        out.u64(self.incarnation.0);
        encode_forks(&mut out, &self.forks);
        for flag in [self.stopped, self.consistent, self.diverged, self.overwrite_approved] {
            out.bool(flag);
        }
        out.bool(self.relinquished.is_some());
        if let Some(tip) = &self.relinquished {
            out.tip(tip);
        }
        out.bool(self.leased);
        out.finish()
    }

    /// Reads what [`GroupState::encode`] wrote.
    ///
    /// # Errors
    /// An unknown version or anything malformed.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut input = Reader::new(bytes);
        let version = input.u16()?;
        if !(1..=STATE_VERSION).contains(&version) {
            return Err(CodecError::Unknown { field: "group state version", value: u64::from(version) });
        }
        let role = if input.bool("role")? { Role::Primary } else { Role::Secondary };
        let state = Self {
            role,
            epoch: Epoch(input.u64()?),
            origin: input.site()?,
            incarnation: Incarnation(input.u64()?),
            forks: decode_forks(&mut input)?,
            stopped: input.bool("stopped")?,
            consistent: input.bool("consistent")?,
            diverged: input.bool("diverged")?,
            overwrite_approved: input.bool("overwrite approved")?,
            relinquished: None,
            leased: false,
        };
        let relinquished = version >= 2 && input.bool("relinquished")?;
        let relinquished = if relinquished { Some(input.tip()?) } else { None };
        let leased = version >= 3 && input.bool("leased")?;
        input.finish()?;
        Ok(Self { relinquished, leased, ..state })
    }
}

#[cfg(test)]
mod tests {
    use block::{ChainHash, MirrorId, WallTime};

    use super::*;
    use crate::message::PROTOCOL_VERSION;

    const EAST: SiteId = SiteId::from_bytes([1; 16]);
    const WEST: SiteId = SiteId::from_bytes([2; 16]);

    fn hello(state: &GroupState, sequence: u64) -> Hello {
        Hello {
            version: PROTOCOL_VERSION,
            mirror: MirrorId::default(),
            position: state.start_position().at(Sequence(sequence)),
            forks: state.forks.clone(),
            volumes: vec![],
            echo: WallTime(0),
        }
    }

    fn tip(position: Position) -> Tip {
        Tip { position, chain: ChainHash([1; 32]) }
    }

    #[test]
    fn a_stale_primary_is_refused_and_fences_itself_as_diverged() {
        let east = GroupState { incarnation: Incarnation(1), ..GroupState::new_primary(EAST) };
        let west = GroupState::new_secondary(EAST);
        let at = east.start_position().at(Sequence(10));
        let west = west.promoted(WEST, at);
        assert!(matches!(
            west.judge_hello(&hello(&east, 12), at),
            HelloVerdict::Refuse(Refusal { code: RefusalCode::StaleEpoch, .. })
        ));
        let fenced = east.fenced(west.epoch, west.origin, west.fork());
        assert!(fenced.diverged && fenced.role == Role::Secondary && fenced.epoch == Epoch(2));
        assert_eq!(fenced.judge_hello(&hello(&west, 5), at), HelloVerdict::Accept);
    }

    #[test]
    fn a_higher_epoch_is_adopted_before_the_session_opens() {
        let east = GroupState { incarnation: Incarnation(1), ..GroupState::new_primary(EAST) };
        let at = east.start_position().at(Sequence(10));
        let west = GroupState::new_secondary(EAST).promoted(WEST, at);
        let HelloVerdict::Adopt(state) = east.judge_hello(&hello(&west, 3), at) else {
            panic!("not adopted")
        };
        assert!(state.diverged, "a primary may hold writes that the new one never had");
        let third = SiteId::from_bytes([3; 16]);
        let secondary = GroupState { consistent: true, ..GroupState::new_secondary(EAST) };
        let other = GroupState::new_secondary(EAST).promoted(third, at);
        let HelloVerdict::Adopt(state) = secondary.judge_hello(&hello(&other, 3), at) else {
            panic!("not adopted")
        };
        assert!(!state.diverged);
        let beyond = at.at(Sequence(11));
        let HelloVerdict::Adopt(state) = secondary.judge_hello(&hello(&other, 3), beyond) else {
            panic!("no")
        };
        assert!(state.diverged);
    }

    #[test]
    fn two_promotions_in_one_epoch_are_a_fork() {
        let at = GroupState::new_primary(EAST).start_position();
        let west = GroupState::new_secondary(EAST).promoted(WEST, at);
        let east = GroupState::new_primary(EAST).promoted(EAST, at);
        assert!(matches!(
            east.judge_hello(&hello(&west, 1), at),
            HelloVerdict::Refuse(Refusal { code: RefusalCode::Fork, .. })
        ));
    }

    #[test]
    fn tips_are_judged_by_the_history() {
        let mut east = GroupState { incarnation: Incarnation(2), ..GroupState::new_primary(EAST) };
        let now = east.start_position().at(Sequence(50));
        assert_eq!(east.judge_tip(now, &tip(now.at(Sequence(50))), false), ResumePlan::SameIncarnation);
        assert_eq!(east.judge_tip(now, &tip(now.at(Sequence(51))), false), ResumePlan::Unrelated);
        let older = Position { incarnation: Incarnation(1), sequence: Sequence(900), ..now };
        assert_eq!(east.judge_tip(now, &tip(older), false), ResumePlan::Ancestor);
        assert_eq!(
            east.judge_tip(now, &tip(Position { origin: WEST, ..older }), false),
            ResumePlan::Unrelated
        );
        let fork = now.at(Sequence(40));
        east = east.promoted(WEST, fork);
        let now = east.start_position();
        assert_eq!(east.judge_tip(now, &tip(fork), false), ResumePlan::Ancestor);
        assert_eq!(east.judge_tip(now, &tip(fork.at(Sequence(41))), false), ResumePlan::Unrelated);
        assert_eq!(east.judge_tip(now, &tip(fork.at(Sequence(41))), true), ResumePlan::Diverged);
    }

    #[test]
    fn a_side_that_gave_its_role_up_is_diverged_only_if_the_new_lineage_begins_before_that() {
        let east =
            GroupState { incarnation: Incarnation(1), consistent: true, ..GroupState::new_primary(EAST) };
        let at = east.start_position().at(Sequence(10));
        let given = east.relinquishing(tip(at));
        assert_eq!(given.offered(EAST), Some(tip(at)));
        assert_eq!(given.offered(WEST), None);
        // Its hello is a primary's of its epoch to the partner.
        let west = GroupState { consistent: true, ..GroupState::new_secondary(EAST) };
        assert_eq!(west.judge_hello(&hello(&given, 10), at), HelloVerdict::Accept);
        let taken = west.promoted(WEST, at);
        let fenced = given.fenced(taken.epoch, WEST, taken.fork());
        assert!(!fenced.diverged && fenced.offered(EAST).is_none() && fenced.relinquished.is_some());
        let HelloVerdict::Adopt(adopted) = given.judge_hello(&hello(&taken, 1), at) else {
            panic!("not adopted")
        };
        assert_eq!(*adopted, fenced);
        assert_eq!(taken.judge_tip(taken.start_position(), &tip(at), false), ResumePlan::Ancestor);
        // A forced failover from an older tip takes less over than was given up.
        let older = west.promoted(WEST, at.at(Sequence(9)));
        assert!(given.fenced(older.epoch, WEST, older.fork()).diverged);
        let HelloVerdict::Adopt(adopted) = given.judge_hello(&hello(&older, 1), at) else {
            panic!("not adopted")
        };
        assert!(adopted.diverged);
        // It takes the role back only by a promotion of its own.
        assert_eq!(given.promoted(EAST, at).relinquished, None);
    }

    #[test]
    fn the_state_survives_the_round_trip() {
        let plain = GroupState::new_secondary(EAST).promoted(WEST, Position::default());
        let given = GroupState { relinquished: Some(tip(plain.start_position())), ..plain.clone() };
        let leased = GroupState { leased: true, ..given.clone() };
        for state in [plain, given, leased] {
            let bytes = state.encode();
            assert_eq!(GroupState::decode(&bytes).unwrap(), state);
            for length in 0..bytes.len() {
                assert!(GroupState::decode(&bytes[..length]).is_err());
            }
        }
    }

    #[test]
    fn states_of_older_versions_are_read() {
        let state = GroupState::new_secondary(EAST).promoted(WEST, Position::default());
        let mut bytes = state.encode();
        // Version 2 ended before the flag of the lease, version 1 also before that of what was given up.
        for version in [2, 1] {
            bytes.pop();
            bytes[0] = version;
            assert_eq!(GroupState::decode(&bytes).unwrap(), state);
        }
        bytes[0] = 4;
        assert!(GroupState::decode(&bytes).is_err());
    }
}
