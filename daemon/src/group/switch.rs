//! The planned switch: the primary gives its role to its target, and nothing is lost.
//!
//! Guarantees (docs/protocols/replication.md, "Planned switch"): the role is given up durably, at a tip that the target
//! has committed and the homes here durably hold, *before* the partner hears of it; what was given up is taken back
//! only by a promotion. Until the hosts are withdrawn the switch can be given up, and the writes that it held go on;
//! they are held no longer than [`HOLD_MAX`].

use std::time::Duration;

use block::{Monotonic, SiteId, Tip, VolumeIndex, WallTime};
use journal::Checkpoint;
use protocol::{CompareRange, Hello, Message, PROTOCOL_VERSION, RefusalCode, Refuse, Welcome};

use super::effect::{Effect, IoFailure, IoRequest, Loudness, Outbox, Purpose, SessionId};
use super::primary::{Gate, Link, Primary};
use super::rewind::Target;
use super::roles::{self, StateChange, Transition};
use super::{Group, Machine, Mirror, MirrorSettings, VerbRefused};

/// The partner opens keys before it answers; no host waits meanwhile.
const ASK_MAX: Duration = Duration::from_secs(10);
/// Held writes wait no longer: hosts' own timeouts begin at 30 s.
const HOLD_MAX: Duration = Duration::from_secs(5);
/// The first wait before the role is offered again; doubles up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// How far the last switch that was ordered here is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SwitchProgress {
    /// None was ordered, or the last one is done.
    Idle,
    /// It is under way.
    Running,
    /// The role is given up; the partner has not been heard to have taken it. The text says what keeps it.
    Offered(String),
    /// It was given up, for this reason; hosts go on here.
    GivenUp(String),
}

/// What a mirror knows of planned switches.
#[derive(Default)]
pub(super) struct PlannedSwitch {
    run: Option<Run>,
    given_up: Option<String>,
    /// The checkpoint on its way to the disk.
    mark: Option<Checkpoint>,
    offer: Option<Offer>,
    taking: Option<Taking>,
    /// The daemon stops: nothing is offered any more.
    stopping: bool,
}

/// A switch under way at the primary.
struct Run {
    session: SessionId,
    deadline: Monotonic,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The partner was asked whether it can take the role.
    Asking,
    /// Writes are held; those that have begun end, and the target commits them.
    Draining,
    /// Homes are being flushed: they hold the tip and nothing else.
    Flushing { tip: Tip, outstanding: usize },
    /// The checkpoint that names the tip is being written: this side's own, once it is the secondary.
    Marking { tip: Tip },
    /// Hosts are withdrawn; what of theirs is in flight ends. There is no way back from here.
    Withdrawing { tip: Tip },
    /// The relinquishment is being stored.
    Storing,
}

impl Stage {
    /// The switch goes on whatever happens.
    const fn is_final(self) -> bool {
        match self {
            Self::Withdrawing { .. } | Self::Storing => true,
            Self::Asking | Self::Draining | Self::Flushing { .. } | Self::Marking { .. } => false,
        }
    }

    /// The tip is chosen: no further cut may follow it.
    const fn has_tip(self) -> bool {
        match self {
            Self::Flushing { .. } | Self::Marking { .. } | Self::Withdrawing { .. } | Self::Storing => true,
            Self::Asking | Self::Draining => false,
        }
    }
}

/// The side that gave its role up presents that to its partner until it hears of the next epoch.
struct Offer {
    link: OfferLink,
    attempt: u32,
    trouble: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OfferLink {
    Down { retry_at: Monotonic },
    Dialing,
    Greeting { session: SessionId },
    Up { session: SessionId },
}

impl OfferLink {
    const fn session(self) -> Option<SessionId> {
        match self {
            Self::Greeting { session } | Self::Up { session } => Some(session),
            Self::Down { .. } | Self::Dialing => None,
        }
    }
}

/// The target opens its keys, to answer or to take the role at a tip.
#[derive(Clone, Copy)]
struct Taking {
    session: SessionId,
    tip: Option<Tip>,
}

impl PlannedSwitch {
    /// What asks for a sequence now will not get one: hosts are withdrawn.
    pub(super) fn is_final(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.stage.is_final())
    }

    /// No cut may be sent and nothing copied.
    pub(super) fn has_tip(&self) -> bool {
        self.run.as_ref().is_some_and(|run| run.stage.has_tip())
    }

    pub(super) const fn is_running(&self) -> bool {
        self.run.is_some()
    }

    /// A checkpoint is on its way to its slot: no other may be written.
    pub(super) const fn is_marking(&self) -> bool {
        self.mark.is_some()
    }

    /// The partner was told that the role is given up, and the session still stands.
    fn is_told(&self) -> bool {
        self.offer.as_ref().is_some_and(|offer| matches!(offer.link, OfferLink::Up { .. }))
    }

    /// Another role change took over.
    pub(super) fn overtaken(&mut self) {
        self.run = None;
    }

    /// `changing`: the role's next change is being stored, and nothing is offered meanwhile.
    pub(super) fn poll_timeout(&self, changing: bool) -> Option<Monotonic> {
        let run = self.run.as_ref().filter(|run| !run.stage.is_final()).map(|run| run.deadline);
        let offer = self.offer.as_ref().filter(|_| !changing && !self.stopping);
        let offer = offer.and_then(|offer| match offer.link {
            OfferLink::Down { retry_at } => Some(retry_at),
            OfferLink::Dialing | OfferLink::Greeting { .. } | OfferLink::Up { .. } => None,
        });
        run.into_iter().chain(offer).min()
    }

    /// Nothing is offered any more.
    pub(super) fn end_offer(&mut self, reason: &str, out: &mut Outbox) {
        self.stopping = true;
        self.drop_offer(reason, out);
    }

    fn drop_offer(&mut self, reason: &str, out: &mut Outbox) {
        if let Some(session) = self.offer.take().and_then(|offer| offer.link.session()) {
            out.push(Effect::CloseSession { session, reason: reason.to_owned() });
        }
    }
}

/// All of every volume: what a side lists that gave up more than the new lineage took over.
pub(super) fn whole_volumes(settings: &MirrorSettings) -> Vec<CompareRange> {
    let whole = settings.volumes.iter().enumerate().filter_map(|(index, volume)| {
        let range = block::ByteRange::new(0, volume.size.0)?;
        Some(CompareRange { volume: VolumeIndex(u16::try_from(index).ok()?), range })
    });
    whole.collect()
}

impl Primary {
    /// Why this primary cannot give its role up now.
    fn cannot_switch(&self) -> Option<String> {
        let bad: u64 = self.volumes.iter().map(|volume| volume.bad.count().bytes().0).sum();
        match (&self.link, self.gate) {
            (Link::Up { .. }, Gate::Open) => {}
            (Link::Up { .. }, Gate::Comparing | Gate::Approval) => {
                return Some(
                    "the partner holds writes of its own: run 'farshore mirror start' first".to_owned(),
                );
            }
            (Link::Stopped, _) => {
                return Some("the mirror is stopped: run 'farshore mirror start' first".to_owned());
            }
            (Link::Halted { reason, .. }, _) => return Some(reason.clone()),
            (Link::Down { .. } | Link::Dialing { .. } | Link::Greeting { .. }, _) => {
                let trouble = self.trouble.as_deref().unwrap_or("no session is open");
                return Some(format!(
                    "the partner is away ({trouble}): wait until it is back; if it is to take over without this side, \
                     stop this side and run 'farshore mirror failover' there"
                ));
            }
        }
        if bad > 0 {
            return Some(format!(
                "{bad} bytes cannot be read here, and the partner has their old content: repair the device first"
            ));
        }
        if let Some(reason) = self.unfinished_growth() {
            return Some(reason);
        }
        let copying =
            self.pass.is_some() || self.folded_from.is_some() || self.has_dirty() || !self.compare.is_done();
        copying.then(|| {
            "a resync runs: wait for it with 'farshore mirror wait NAME --for caught-up', then switch"
                .to_owned()
        })
    }

    /// The tip that the target committed, if it holds every write and nothing is on its way.
    fn drained_tip(&self) -> Option<Tip> {
        let chain = self.chain.as_ref()?;
        let tip = chain.committed();
        let quiet = self.nothing_in_flight()
            && self.ring.record_count() == 0
            && !self.spill.is_pending()
            && self.cannot_switch().is_none();
        let committed = chain.outstanding() == 0 && chain.last() == tip && tip.position == self.position();
        (quiet && committed).then_some(tip)
    }
}

impl Mirror {
    /// Why the target cannot take the role over.
    fn cannot_take(&self, tip: Option<&Tip>) -> Option<String> {
        let Machine::Secondary(secondary) = &self.machine else {
            return Some("this side is changing its role".to_owned());
        };
        if !self.state.consistent || self.state.diverged || self.is_changing() {
            return Some("the image here is not complete".to_owned());
        }
        if secondary.applying.degraded {
            return Some("cuts cannot be applied here: look at the log of this site".to_owned());
        }
        let ours = secondary.tip().position;
        let tip = tip?;
        let whole = secondary.is_quiet() && secondary.durable.staged().is_none();
        (!whole || ours != tip.position).then(|| {
            format!("the role was given up at position {}, but the image here is at {ours}", tip.position)
        })
    }

    fn site(&self) -> SiteId {
        self.settings.site
    }

    /// Why a role that was given up cannot be taken back now.
    pub(super) fn cannot_take_back(&self) -> Option<String> {
        self.planned.is_told().then(|| {
            "the partner is there and is taking the role over: wait, or stop the partner before the role is taken back"
                .to_owned()
        })
    }

    /// What an operator is told of a role that was given up and not yet taken.
    pub(super) fn offered_reason(&self) -> Option<String> {
        let tip = self.state.offered(self.site())?;
        let trouble = self.planned.offer.as_ref().and_then(|offer| offer.trouble.as_deref());
        Some(format!(
            "this side gave its role up at position {} and the partner has not taken it yet ({}); if it cannot, \
             'farshore mirror failover' here takes the role back",
            tip.position,
            trouble.unwrap_or("it is being told")
        ))
    }

    /// Offers the role as long as it is given up and nobody has taken it.
    fn offer_turn(&mut self, now: Monotonic, out: &mut Outbox) {
        let offers =
            matches!(self.machine, Machine::Secondary(_)) && self.state.offered(self.site()).is_some();
        if !offers {
            return self.planned.drop_offer("the role is not offered any more", out);
        }
        if self.planned.stopping || self.is_changing() {
            return;
        }
        let first = Offer { link: OfferLink::Down { retry_at: now }, attempt: 0, trouble: None };
        let offer = self.planned.offer.get_or_insert(first);
        if matches!(offer.link, OfferLink::Down { retry_at } if now >= retry_at) {
            offer.link = OfferLink::Dialing;
            out.push(Effect::Dial);
        }
    }

    fn offer_failed(&mut self, trouble: &str, now: Monotonic) {
        if let Some(offer) = &mut self.planned.offer {
            let wait = RETRY_FIRST.saturating_mul(1 << offer.attempt.min(8)).min(RETRY_LAST);
            offer.attempt += 1;
            offer.link = OfferLink::Down { retry_at: now + wait };
            offer.trouble = Some(trouble.to_owned());
        }
    }

    fn is_offering_on(&self, session: SessionId) -> bool {
        self.planned.offer.as_ref().and_then(|offer| offer.link.session()) == Some(session)
    }

    /// The partner answered the hello of a side that gave its role up: it is told so on this session.
    fn offer_welcomed(&mut self, session: SessionId, welcome: &Welcome, now: Monotonic, out: &mut Outbox) {
        let Some(tip) = self.state.offered(self.site()) else { return };
        let theirs = welcome.tip.position;
        if theirs != tip.position || !welcome.consistent || welcome.diverged {
            let text = format!(
                "the role was given up at position {}, but the partner's image is at {theirs}: it cannot take it",
                tip.position
            );
            out.log(Loudness::Error, text.clone());
            out.push(Effect::CloseSession { session, reason: text.clone() });
            return self.offer_failed(&text, now);
        }
        if let Some(offer) = &mut self.planned.offer {
            offer.link = OfferLink::Up { session };
        }
        out.push(Effect::Send { session, frame: Message::Relinquish { tip }.encode() });
    }
}

impl Group {
    /// `mirror switch`: the partner becomes the primary, and nothing is lost. [`Group::switch_progress`] tells how it
    /// goes on.
    ///
    /// # Errors
    /// If this side is not the primary of a caught-up mirror whose partner is there.
    pub fn switch(&mut self) -> Result<(), VerbRefused> {
        let poisoned = self.volumes.iter().any(|slot| slot.volume.is_poisoned());
        let presented = self.presented;
        let now = self.now;
        if let Some(reason) = self.mirror.as_ref().and_then(Mirror::offered_reason) {
            return Err(VerbRefused(reason));
        }
        let mirror = self.mirror_in_role("switch")?;
        if mirror.planned.is_running() || mirror.is_changing() {
            return Err(VerbRefused(
                "a change of the role is under way already: look at 'farshore mirror show'".into(),
            ));
        }
        if !mirror.state.consistent {
            return Err(VerbRefused(
                "the partner has no complete image yet: wait with 'farshore mirror wait NAME --for caught-up'".into(),
            ));
        }
        if poisoned {
            return Err(VerbRefused(
                "a flush failed here and what is on the device is not known: restart farshored before a switch".into(),
            ));
        }
        let Machine::Primary(primary) = &mirror.machine else {
            return Err(VerbRefused("this side is not the primary".into()));
        };
        if let Some(reason) = primary.cannot_switch() {
            return Err(VerbRefused(reason));
        }
        if primary.spill.is_pending() {
            return Err(VerbRefused(
                "the partner is far behind: wait for it with 'farshore mirror wait NAME --for caught-up', then switch"
                    .into(),
            ));
        }
        let session = primary.session().filter(|_| presented && primary.admission_open);
        let busy = mirror.planned.is_marking();
        let Some(session) = session.filter(|_| !busy) else {
            return Err(VerbRefused(
                "the mirror is not ready for a switch yet: try again in a moment".into(),
            ));
        };
        if self.out.waits_for(|purpose| matches!(purpose, Purpose::SwitchFlush { .. })) {
            return Err(VerbRefused("the last switch is still ending: try again in a moment".into()));
        }
        if let Some(mirror) = &mut self.mirror {
            mirror.planned.given_up = None;
            mirror.planned.run = Some(Run { session, deadline: now + ASK_MAX, stage: Stage::Asking });
        }
        self.out.push(Effect::Send { session, frame: Message::SwitchAsk.encode() });
        self.out.log(Loudness::Info, "a switch is ordered: the partner is asked".to_owned());
        Ok(())
    }

    /// How far a switch is that was ordered here.
    pub fn switch_progress(&self) -> SwitchProgress {
        let Some(mirror) = &self.mirror else { return SwitchProgress::Idle };
        if mirror.planned.is_running() {
            return SwitchProgress::Running;
        }
        match (mirror.offered_reason(), &mirror.planned.given_up) {
            (Some(reason), _) => SwitchProgress::Offered(reason),
            (None, Some(reason)) => SwitchProgress::GivenUp(reason.clone()),
            (None, None) => SwitchProgress::Idle,
        }
    }

    /// An [`Effect::Unlock`] was answered: the volumes' keys are open, or why not.
    pub fn unlocked(&mut self, result: Result<(), String>) {
        let Some(mirror) = &mut self.mirror else { return };
        let Some(Taking { session, tip }) = mirror.planned.taking.take() else { return };
        let trouble = result.err().or_else(|| mirror.cannot_take(tip.as_ref()));
        let Machine::Secondary(secondary) = &mut mirror.machine else { return };
        if !secondary.is_session(session) {
            return;
        }
        match (tip, trouble) {
            (None, trouble) => {
                let frame = Message::SwitchReady { trouble: trouble.unwrap_or_default() }.encode();
                self.out.push(Effect::Send { session, frame });
            }
            (Some(_), Some(trouble)) => {
                let text = format!("the primary gave its role up, but this side cannot take it: {trouble}");
                self.out.log(Loudness::Error, text.clone());
                secondary.trouble = Some(text.clone());
                secondary.end_session(&text, &mut self.out);
            }
            (Some(tip), None) => {
                let text =
                    format!("the primary gave its role up at position {}: this side takes it", tip.position);
                self.out.log(Loudness::Info, text);
                self.begin_promotion(Target::everything(), "this side takes the role over");
            }
        }
    }

    /// Handles a message of a switch, or of the session on which a role is offered. False if it is neither.
    pub(super) fn switch_message(&mut self, session: SessionId, message: &Message) -> bool {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return false };
        if mirror.is_offering_on(session) {
            self.offer_message(session, message);
            return true;
        }
        match (message, &mut mirror.machine) {
            (Message::SwitchReady { trouble }, Machine::Primary(primary)) if primary.is_session(session) => {
                let asked = mirror.planned.run.as_mut().filter(|run| run.stage == Stage::Asking);
                let Some(run) = asked.filter(|run| run.session == session) else { return true };
                if trouble.is_empty() {
                    run.stage = Stage::Draining;
                    run.deadline = now + HOLD_MAX;
                    primary.admission_open = false;
                } else {
                    let reason = format!("the partner cannot take the role over: {trouble}");
                    self.give_up_switch(&reason, true);
                }
                true
            }
            (Message::SwitchAsk, Machine::Secondary(secondary)) if secondary.is_session(session) => {
                self.take_when_unlocked(Taking { session, tip: None })
            }
            (Message::Relinquish { tip }, Machine::Secondary(secondary)) if secondary.is_session(session) => {
                self.take_when_unlocked(Taking { session, tip: Some(*tip) })
            }
            (_, Machine::Primary(_) | Machine::Secondary(_) | Machine::Changing(_)) => false,
        }
    }

    fn take_when_unlocked(&mut self, taking: Taking) -> bool {
        if let Some(mirror) = &mut self.mirror {
            mirror.planned.taking = Some(taking);
            self.out.push(Effect::Unlock);
        }
        true
    }

    fn offer_message(&mut self, session: SessionId, message: &Message) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        if let Message::Welcome(welcome) = message {
            return mirror.offer_welcomed(session, welcome, now, &mut self.out);
        }
        let Message::Refuse(refuse) = message else { return };
        let Refuse { code, epoch, text, .. } = refuse;
        let taken = *code == RefusalCode::StaleEpoch && *epoch > mirror.state.epoch;
        mirror.offer_failed(text, now);
        self.out.push(Effect::CloseSession { session, reason: "refused".to_owned() });
        if taken && !mirror.is_changing() {
            let text = format!("the partner took the role over: it is the primary of epoch {}", epoch.0);
            self.out.log(Loudness::Info, text);
            self.fence(StateChange::Fence(Box::new(refuse.clone())));
        }
    }

    /// The session that an offer asked for is open. False if none asked.
    pub(super) fn offer_dialed(&mut self, session: SessionId) -> bool {
        let Some(mirror) = &mut self.mirror else { return false };
        let tip = mirror.state.offered(mirror.site());
        let Some(offer) = mirror.planned.offer.as_mut().filter(|offer| offer.link == OfferLink::Dialing)
        else {
            return false;
        };
        let Some(tip) = tip else { return false };
        let hello = Hello {
            version: PROTOCOL_VERSION,
            mirror: mirror.settings.mirror,
            position: tip.position,
            forks: mirror.state.forks.clone(),
            volumes: mirror.settings.volumes.iter().map(|volume| (volume.id, volume.size)).collect(),
            echo: WallTime(0),
        };
        offer.link = OfferLink::Greeting { session };
        self.out.push(Effect::Send { session, frame: Message::Hello(hello).encode() });
        true
    }

    /// The session that an offer asked for could not be opened.
    pub(super) fn offer_dial_failed(&mut self, reason: &str) {
        let now = self.now;
        if let Some(mirror) = &mut self.mirror
            && mirror.planned.offer.as_ref().is_some_and(|offer| offer.link == OfferLink::Dialing)
        {
            mirror.offer_failed(reason, now);
        }
    }

    /// A session ended; true if it was an offer's.
    pub(super) fn offer_closed(&mut self, session: SessionId, reason: &str) -> bool {
        let now = self.now;
        let Some(mirror) = self.mirror.as_mut().filter(|mirror| mirror.is_offering_on(session)) else {
            return false;
        };
        mirror.offer_failed(reason, now);
        true
    }

    /// Gives a switch up that has not withdrawn its hosts: with `reopen` the writes that it held go on at once.
    pub(super) fn give_up_switch(&mut self, reason: &str, reopen: bool) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let Some(run) = mirror.planned.run.take_if(|run| !run.stage.is_final()) else { return };
        mirror.planned.given_up = Some(reason.to_owned());
        self.out.log(Loudness::Warn, format!("the switch is given up: {reason}; hosts go on here"));
        if run.stage == Stage::Asking || !reopen {
            return;
        }
        if let Machine::Primary(primary) = &mut mirror.machine {
            primary.admission_open = true;
            self.admit_waiting(now);
        }
    }

    /// Takes a switch, and the offer of a role, as far as they can go.
    pub(super) fn switch_turn(&mut self) {
        let now = self.now;
        let ended = self.volumes.iter().all(|slot| slot.volume.in_flight() == 0);
        let Some(mirror) = &mut self.mirror else { return };
        mirror.offer_turn(now, &mut self.out);
        let Machine::Primary(primary) = &mirror.machine else { return };
        let Some(run) = &mut mirror.planned.run else { return };
        if let Some(reason) = run.hopeless(primary, now) {
            return self.give_up_switch(&reason, true);
        }
        match run.stage {
            Stage::Draining => {
                if let Some(tip) = primary.drained_tip() {
                    run.stage = Stage::Flushing { tip, outstanding: self.volumes.len() };
                    for index in 0..self.volumes.len() {
                        let volume = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
                        self.out.io(Purpose::SwitchFlush { volume }, IoRequest::HomeFlush { volume });
                    }
                }
            }
            Stage::Withdrawing { tip } => {
                if ended {
                    run.stage = Stage::Storing;
                    mirror.changes.push_back(StateChange::Relinquish(tip));
                }
            }
            Stage::Asking | Stage::Flushing { .. } | Stage::Marking { .. } | Stage::Storing => {}
        }
    }

    /// A home was flushed for a switch, or not.
    pub(super) fn switch_flushed(&mut self, volume: VolumeIndex, result: Result<(), IoFailure>) {
        let Some(mirror) = &mut self.mirror else { return };
        if !matches!(mirror.machine, Machine::Primary(_)) {
            return;
        }
        if result.is_err() {
            self.give_up_switch("a flush failed", false);
            return self.flush_failed(volume);
        }
        let Some(run) = &mut mirror.planned.run else { return };
        let Stage::Flushing { tip, outstanding } = &mut run.stage else { return };
        *outstanding = outstanding.saturating_sub(1);
        if *outstanding > 0 {
            return;
        }
        let tip = *tip;
        run.stage = Stage::Marking { tip };
        if let Some((log, checkpoint)) = &mut mirror.redo {
            // The log is empty since this side became the primary.
            let page = checkpoint.next(tip, log.reset());
            self.out.io(
                Purpose::SwitchMark,
                IoRequest::CheckpointWrite { slot: page.slot(), page: page.encode() },
            );
            mirror.planned.mark = Some(page);
        }
    }

    /// The checkpoint was written, or not.
    pub(super) fn switch_marked(&mut self, result: Result<(), IoFailure>) {
        let now = self.now;
        let Some(mirror) = &mut self.mirror else { return };
        let mark = mirror.planned.mark.take();
        if let (Ok(()), Some(mark), Some((_, checkpoint))) = (&result, mark, &mut mirror.redo) {
            *checkpoint = mark;
        }
        let Machine::Primary(primary) = &mut mirror.machine else { return };
        let Some(run) = &mut mirror.planned.run else { return };
        let Stage::Marking { tip } = run.stage else { return };
        let failed = result.err().map(|failure| format!("the redo checkpoint cannot be written: {failure}"));
        if let Some(reason) = failed.or_else(|| run.hopeless(primary, now)) {
            return self.give_up_switch(&reason, true);
        }
        run.stage = Stage::Withdrawing { tip };
        let waiting = primary.abandon_waiting();
        self.fail_steps(waiting, Vec::new());
        self.withdraw("this side gives its role to the partner: hosts must use the partner".to_owned());
    }

    /// It is durable that the role is given up: this side is a secondary, and tells its partner.
    pub(super) fn relinquished(&mut self) {
        let Some(mirror) = &mut self.mirror else { return };
        let opening = Machine::Changing(Box::new(Transition::Opening));
        let mut primary = match std::mem::replace(&mut mirror.machine, opening) {
            Machine::Primary(primary) => primary,
            other @ (Machine::Secondary(_) | Machine::Changing(_)) => {
                mirror.machine = other;
                return;
            }
        };
        mirror.planned.run = None;
        let session = primary.session();
        if session.is_none() {
            primary.close(Link::Stopped, "the role was given up", &mut self.out);
        }
        mirror.intents = primary.volumes.into_iter().map(|volume| volume.intent).collect();
        roles::forget_primary(&mut self.out);
        mirror.become_secondary(&mut self.out);
        self.withdrawn_because = roles::secondary_reason(&mirror.state);
        let Some(tip) = mirror.state.offered(mirror.site()) else { return };
        self.out.log(Loudness::Info, format!("the role is given up at position {}", tip.position));
        if let Some(session) = session {
            mirror.planned.offer = Some(Offer { link: OfferLink::Up { session }, attempt: 0, trouble: None });
            self.out.push(Effect::Send { session, frame: Message::Relinquish { tip }.encode() });
        }
    }
}

impl Run {
    /// Why the switch must be given up, while that is possible.
    fn hopeless(&self, primary: &Primary, now: Monotonic) -> Option<String> {
        if self.stage.is_final() {
            return None;
        }
        if primary.session() != Some(self.session) {
            return Some("the session with the partner ended".to_owned());
        }
        if now < self.deadline {
            return None;
        }
        Some(match self.stage {
            Stage::Asking => format!("the partner did not answer within {} s", ASK_MAX.as_secs()),
            Stage::Draining
            | Stage::Flushing { .. }
            | Stage::Marking { .. }
            | Stage::Withdrawing { .. }
            | Stage::Storing => format!("writes were held for {} s", HOLD_MAX.as_secs()),
        })
    }
}
