//! The primary's side of a session: dialing, the hello and its answer, acknowledgements, the end of a session.

use std::time::Duration;

use block::{ByteCount, ByteRange, Monotonic, Position, Sequence, VolumeIndex};
use engine::dirty_map::DirtyMap;
use protocol::GroupState;
use protocol::{
    Ack, AckOutcome, CompareRange, Hello, Message, PROTOCOL_VERSION, RefusalCode, Refuse, ResumePlan,
    SenderChain, Welcome,
};

use super::effect::{Effect, Loudness, Outbox, SessionId};
use super::growth::has_blocks;
use super::primary::{Gate, HaltedStart, Link, Primary};
use super::rewind::{inside, united};
use super::{GroupVolume, MirrorSettings};

/// The first wait before another attempt; doubles up to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// What the group must do after a session event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum LinkNews {
    /// Nothing beyond what was queued.
    Nothing,
    /// The partner answered: a primary that waited for it may serve hosts.
    Heard,
    /// The target holds a complete image of this lineage.
    Complete,
    /// Both.
    HeardComplete,
    /// The partner is of a higher epoch: this side must fence itself.
    Fenced(Box<Refuse>),
}

impl Primary {
    /// Dials if an attempt is due.
    pub(super) fn dial_if_due(&mut self, now: Monotonic, out: &mut Outbox) {
        if let Link::Down { retry_at, attempt } = self.link
            && now >= retry_at
            && self.admission_open
        {
            self.link = Link::Dialing { attempt };
            out.push(Effect::Dial);
        }
    }

    pub(super) fn dialed(
        &mut self,
        session: SessionId,
        settings: &MirrorSettings,
        state: &GroupState,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        if !matches!(self.link, Link::Dialing { .. }) {
            out.push(Effect::CloseSession { session, reason: "not wanted any more".into() });
            return;
        }
        let room = |(index, volume): (usize, &GroupVolume)| {
            let index = VolumeIndex(u16::try_from(index).unwrap_or(u16::MAX));
            (volume.id, self.sizes.room(index, volume.size))
        };
        let hello = Hello {
            version: PROTOCOL_VERSION,
            mirror: settings.mirror,
            position: self.position(),
            forks: state.forks.clone(),
            volumes: settings.volumes.iter().enumerate().map(room).collect(),
            echo: self.newest_echo(),
        };
        self.greeted_at = now;
        out.push(Effect::Send { session, frame: Message::Hello(hello).encode() });
        self.link = Link::Greeting { session };
    }

    pub(super) fn dial_failed(&mut self, reason: &str, now: Monotonic) {
        if let Link::Dialing { attempt } = self.link {
            self.trouble = Some(reason.to_owned());
            self.retry(attempt + 1, now);
        }
    }

    fn retry(&mut self, attempt: u32, now: Monotonic) {
        let wait = RETRY_FIRST.saturating_mul(1 << attempt.min(8)).min(RETRY_LAST);
        self.link = Link::Down { retry_at: now + wait, attempt };
    }

    /// True if `session` is the one this side talks on.
    pub(super) fn is_session(&self, session: SessionId) -> bool {
        match &self.link {
            Link::Greeting { session: ours } | Link::Up { session: ours } => *ours == session,
            Link::Down { .. } | Link::Dialing { .. } | Link::Halted { .. } | Link::Stopped => false,
        }
    }

    /// The session ended. What was sent and not acknowledged is sent again in the next one.
    pub(super) fn session_closed(
        &mut self,
        session: SessionId,
        reason: &str,
        now: Monotonic,
        out: &mut Outbox,
    ) {
        if !self.is_session(session) {
            return;
        }
        if matches!(self.link, Link::Up { .. }) {
            out.log(Loudness::Info, format!("the session with the partner ended: {reason}"));
        }
        self.trouble = Some(reason.to_owned());
        self.compare.session_lost();
        self.verify.session_lost();
        self.sizes.session_lost();
        self.cut_due = None;
        self.retry(0, now);
    }

    /// Ends the session from this side.
    pub(super) fn close(&mut self, link: Link, reason: &str, out: &mut Outbox) {
        if let Link::Greeting { session } | Link::Up { session } = self.link {
            out.push(Effect::CloseSession { session, reason: reason.to_owned() });
        }
        self.compare.session_lost();
        self.verify.session_lost();
        self.sizes.session_lost();
        self.cut_due = None;
        self.link = link;
    }

    fn halt(&mut self, reason: String, start: HaltedStart, out: &mut Outbox) -> LinkNews {
        out.log(Loudness::Error, reason.clone());
        self.close(Link::Halted { reason: reason.clone(), start }, &reason, out);
        LinkNews::Nothing
    }

    pub(super) fn message(
        &mut self,
        session: SessionId,
        message: Message,
        settings: &MirrorSettings,
        state: &GroupState,
        now: Monotonic,
        out: &mut Outbox,
    ) -> LinkNews {
        match message {
            Message::Welcome(welcome) => self.welcomed(session, &welcome, settings, state, out),
            Message::Refuse(refuse) => self.refused(refuse, state, now, out),
            Message::Ack(ack) => self.acknowledged(&ack, state, now, out),
            Message::HashReply(reply) => {
                self.compare_hashes(reply);
                LinkNews::Nothing
            }
            Message::VerifyReply(reply) => {
                self.verify_answered(reply, now, out);
                LinkNews::Nothing
            }
            Message::PassRefused { pass, missing } => self.pass_refused(pass, missing, now, out),
            Message::Grown { volume, size, trouble } => {
                self.grown(volume, size, trouble, out);
                LinkNews::Nothing
            }
            Message::LeaseAsk { asked } => {
                self.lease_asked(session, asked, now, out);
                LinkNews::Nothing
            }
            Message::LeaseOffer
            | Message::LeaseGrant { .. }
            | Message::Hello(_)
            | Message::AbortPass { .. }
            | Message::HashRequest(_)
            | Message::VerifyRequest(_)
            | Message::Orphans { .. }
            | Message::OrphanRequest(_)
            | Message::OrphanReply(_)
            | Message::SwitchAsk
            | Message::SwitchReady { .. }
            | Message::Relinquish { .. }
            | Message::CreateMirror(_)
            | Message::Created { .. }
            | Message::DeleteMirror { .. }
            | Message::Deleted
            | Message::SetAccess(_)
            | Message::AccessSet
            | Message::Grow { .. }
            | Message::SetKeys(_)
            | Message::KeysSet
            | Message::Ping
            | Message::Pong { .. } => {
                self.close(
                    Link::Down { retry_at: now + RETRY_LAST, attempt: 0 },
                    "a message out of place",
                    out,
                );
                LinkNews::Nothing
            }
        }
    }

    fn refused(&mut self, refuse: Refuse, state: &GroupState, now: Monotonic, out: &mut Outbox) -> LinkNews {
        match refuse.code {
            RefusalCode::StaleEpoch if refuse.epoch > state.epoch => LinkNews::Fenced(Box::new(refuse)),
            RefusalCode::Busy => {
                self.trouble = Some(refuse.text.clone());
                self.close(
                    Link::Down { retry_at: now + RETRY_FIRST, attempt: 0 },
                    "the partner is busy",
                    out,
                );
                LinkNews::Nothing
            }
            RefusalCode::Fork => self.halt(
                format!(
                    "both sides were promoted in epoch {}: each serves hosts and mirroring rests; run 'farshore mirror \
                     start NAME --primary local' at the side whose writes are to be kept",
                    state.epoch.0
                ),
                HaltedStart::Settles,
                out,
            ),
            RefusalCode::StaleEpoch
            | RefusalCode::UnknownMirror
            | RefusalCode::Mismatch
            | RefusalCode::WrongPartner
            | RefusalCode::Conflict
            | RefusalCode::NoSpace
            | RefusalCode::Protocol => self.halt(
                format!(
                    "the partner refuses the mirror: {}; mend it, then run 'farshore mirror start'",
                    refuse.text
                ),
                HaltedStart::Retries,
                out,
            ),
        }
    }

    fn welcomed(
        &mut self,
        session: SessionId,
        welcome: &Welcome,
        settings: &MirrorSettings,
        state: &GroupState,
        out: &mut Outbox,
    ) -> LinkNews {
        if self.link != (Link::Greeting { session }) {
            return LinkNews::Nothing;
        }
        let below_known =
            self.known_tip.take().is_some_and(|known| welcome.tip.position.order(&known).is_lt());
        let plan = match state.judge_tip(self.position(), &welcome.tip, welcome.diverged) {
            ResumePlan::Ancestor if below_known && !state.overwrite_approved => ResumePlan::Unrelated,
            plan @ (ResumePlan::SameIncarnation
            | ResumePlan::Ancestor
            | ResumePlan::Diverged
            | ResumePlan::Unrelated) => plan,
        };
        self.link = Link::Up { session };
        self.sync.welcomed();
        self.trouble = None;
        self.hear_clock(welcome.clock);
        self.sizes.heard(&welcome.sizes, self.volumes.len());
        let mut news = LinkNews::Heard;
        match plan {
            ResumePlan::SameIncarnation if self.chain.is_some() => {
                match self.resume_incarnation(welcome, state, out) {
                    Some(true) => news = LinkNews::HeardComplete,
                    Some(false) => {}
                    None => return self.unrelated(settings, state, welcome, out),
                }
            }
            ResumePlan::SameIncarnation | ResumePlan::Ancestor => {
                // An image that never was complete gets what the intent map and the dirty map name: that is all.
                let forked = welcome.tip.position.epoch < state.epoch && welcome.consistent;
                // A side that gave its role up holds the fork's image and nothing else; the maps name what followed.
                let fresh =
                    self.chain.as_ref().is_none_or(|known| known.committed().position.epoch < state.epoch);
                let given = welcome.relinquished && welcome.tip.position == state.fork() && fresh;
                let forked = forked && !given;
                self.resume_ancestor(welcome, forked.then_some(settings), out);
            }
            ResumePlan::Diverged => self.resume_diverged(welcome, state, out),
            ResumePlan::Unrelated => return self.unrelated(settings, state, welcome, out),
        }
        out.log(
            Loudness::Info,
            format!("the partner answered: its image is at position {}", welcome.tip.position),
        );
        news
    }

    /// The tip is in no known history: nothing is overwritten until an operator says so, then everything is compared.
    fn unrelated(
        &mut self,
        settings: &MirrorSettings,
        state: &GroupState,
        welcome: &Welcome,
        out: &mut Outbox,
    ) -> LinkNews {
        if !state.overwrite_approved {
            let reason = format!(
                "the partner's image at position {} does not belong to this history or lost data: nothing is \
                 overwritten until 'farshore mirror start' compares all of it",
                welcome.tip.position
            );
            self.halt(reason, HaltedStart::Overwrites, out);
            return LinkNews::Heard;
        }
        self.compare_everything(settings);
        self.begin_anew(welcome, out);
        LinkNews::Heard
    }

    fn compare_everything(&mut self, settings: &MirrorSettings) {
        for (index, volume) in settings.volumes.iter().enumerate() {
            if let (Ok(index), Some(range)) = (u16::try_from(index), ByteRange::new(0, volume.size.0)) {
                self.compare.add(VolumeIndex(index), range, false);
            }
        }
    }

    /// A chain from the target's tip, and a pass that reconciles it.
    fn begin_anew(&mut self, welcome: &Welcome, out: &mut Outbox) {
        if let (Some((pass, _)), Link::Up { session }) = (welcome.staged, &self.link) {
            out.push(Effect::Send { session: *session, frame: Message::AbortPass { pass }.encode() });
        }
        self.abort_pass();
        self.chain = Some(SenderChain::new(welcome.tip));
        self.gate = Gate::Open;
        self.start_pass(!welcome.consistent, out);
    }

    fn resume_ancestor(&mut self, welcome: &Welcome, compare_all: Option<&MirrorSettings>, out: &mut Outbox) {
        if let Some(settings) = compare_all {
            self.compare_everything(settings);
        }
        self.inherit_age(welcome.age_bound_ms);
        self.begin_anew(welcome, out);
    }

    /// A restarted primary learns from its target how old the writes can be that it lacks.
    fn inherit_age(&mut self, age_bound_ms: Option<u64>) {
        if let Some(age) = age_bound_ms.filter(|_| self.rpo.is_unknown()) {
            // The target told its age after the hello had left.
            let nanos = age.saturating_mul(1_000_000);
            self.rpo.inherit(Monotonic(self.greeted_at.0.saturating_sub(nanos)));
        }
    }

    fn resume_diverged(&mut self, welcome: &Welcome, state: &GroupState, out: &mut Outbox) {
        self.inherit_age(welcome.age_bound_ms);
        self.orphaned = ByteCount(0);
        // The partner does not list what it had acknowledged here before a rewind discarded it.
        let listed = [&welcome.compare[..], &self.rewound].concat();
        let clipped = listed.into_iter().map(|entry| {
            let size = self.volumes.get(usize::from(entry.volume.0)).map_or(0, |volume| volume.size.0);
            CompareRange { range: inside(entry.range, size), ..entry }
        });
        let mut ranges: Vec<_> = clipped.filter(|entry| !entry.range.is_empty()).collect();
        // Nor where it has more of a volume than there is here.
        ranges.extend(self.sizes.surplus(self.volumes.iter().map(|volume| volume.size)));
        self.compare.add_partner_ranges(&united(ranges));
        if state.overwrite_approved {
            self.begin_anew(welcome, out);
            return;
        }
        self.abort_pass();
        if let (Some((pass, _)), Link::Up { session }) = (welcome.staged, &self.link) {
            out.push(Effect::Send { session: *session, frame: Message::AbortPass { pass }.encode() });
        }
        self.chain = Some(SenderChain::new(welcome.tip));
        self.gate = Gate::Comparing;
    }

    /// The comparison with a diverged partner has ended: go on if it holds nothing of its own, else wait.
    pub(super) fn open_gate_if_compared(&mut self, out: &mut Outbox) {
        let (Gate::Comparing, Some(session)) = (self.gate, self.session()) else {
            return;
        };
        if !self.compare.is_done() {
            return;
        }
        let waiting = self.orphaned.0 > 0;
        let frame = Message::Orphans { bytes: self.orphaned, waiting }.encode();
        out.push(Effect::Send { session, frame });
        if waiting {
            self.gate = Gate::Approval;
            out.log(
                Loudness::Warn,
                format!(
                    "the partner differs in up to {} bytes that this side never had: 'farshore mirror start' here \
                     overwrites them",
                    self.orphaned.0
                ),
            );
        } else {
            self.gate = Gate::Open;
            self.start_pass(false, out);
        }
    }

    /// An operator allowed the partner's own writes to be overwritten; what is not compared yet is compared in the pass.
    pub(super) fn approve(&mut self, out: &mut Outbox) {
        if self.gate != Gate::Open {
            self.gate = Gate::Open;
            self.start_pass(false, out);
            if let Some(session) = self.session() {
                let frame = Message::Orphans { bytes: self.orphaned, waiting: false }.encode();
                out.push(Effect::Send { session, frame });
            }
        }
    }

    /// Continues in the same incarnation. True if the target's image turned complete meanwhile; `None` if the target
    /// lost what it had acknowledged.
    fn resume_incarnation(
        &mut self,
        welcome: &Welcome,
        state: &GroupState,
        out: &mut Outbox,
    ) -> Option<bool> {
        let mut complete = false;
        self.inherit_age(welcome.age_bound_ms);
        let staged =
            welcome.staged.filter(|(id, _)| self.pass.is_some_and(|pass| pass.id == *id)).map(|(_, tip)| tip);
        // What the target holds and this side has not heard of is as good as acknowledged.
        if let Some(outcome) = self.chain.as_mut().and_then(|chain| chain.acknowledged(&welcome.tip, false)) {
            complete = self.stored(outcome, state) == LinkNews::Complete;
        }
        if let Some(tip) = staged
            && let Some(outcome) = self.chain.as_mut().and_then(|chain| chain.acknowledged(&tip, true))
        {
            self.stored(outcome, state);
        }
        let chain = self.chain.as_mut()?;
        if !chain.resume(&welcome.tip, staged.as_ref()) {
            if welcome.tip.position.order(&chain.committed().position).is_lt() {
                return None;
            }
            // A cut of this incarnation that the target had voided, and a crash brought back: it is a good prefix.
            self.rpo.committed(welcome.tip.position.sequence);
            self.begin_anew(welcome, out);
            return Some(complete);
        }
        if let (Some((pass, _)), None, Link::Up { session }) = (welcome.staged, staged, &self.link) {
            out.push(Effect::Send { session: *session, frame: Message::AbortPass { pass }.encode() });
        }
        let staging = self.pass.is_some_and(|pass| !pass.is_initial());
        if staging && staged.is_none() {
            // Nothing of the pass survived at the target, not even what it had acknowledged; the ring alone is no
            // prefix, so all of it travels in a new pass.
            self.abort_pass();
            self.start_pass(false, out);
        } else if let Some(pass) = &mut self.pass {
            // The commit may be lost: what folded since belongs to this pass again.
            pass.commit = None;
            self.folded_from = None;
        }
        Some(complete)
    }

    fn pass_refused(&mut self, pass: u64, missing: ByteCount, now: Monotonic, out: &mut Outbox) -> LinkNews {
        let reason = format!(
            "resync pass {pass} does not fit into the partner's reserve: at least {} bytes are missing; the target \
             keeps its old image",
            missing.0
        );
        out.log(Loudness::Error, reason.clone());
        self.close(Link::Down { retry_at: now + RETRY_LAST.saturating_mul(5), attempt: 0 }, &reason, out);
        self.trouble = Some(reason);
        LinkNews::Nothing
    }

    fn acknowledged(&mut self, ack: &Ack, state: &GroupState, now: Monotonic, out: &mut Outbox) -> LinkNews {
        self.hear_clock(ack.clock);
        let outcome = self.chain.as_mut().and_then(|chain| chain.acknowledged(&ack.tip, ack.staged));
        match outcome {
            Some(outcome) => self.stored(outcome, state),
            None => {
                let reason =
                    format!("the partner acknowledged position {} that was never sent", ack.tip.position);
                out.log(Loudness::Error, reason.clone());
                self.close(Link::Down { retry_at: now + RETRY_LAST, attempt: 0 }, &reason, out);
                LinkNews::Nothing
            }
        }
    }

    /// The target holds cuts on stable media: the ring releases them.
    fn stored(&mut self, outcome: AckOutcome, state: &GroupState) -> LinkNews {
        if !self.chain.as_ref().is_some_and(|chain| chain.stored().position.same_lineage(&self.start)) {
            // A cut of an older incarnation, acknowledged again: its sequence says nothing of this one's.
            return LinkNews::Nothing;
        }
        let staging = self.pass.is_some_and(|pass| !pass.is_initial());
        let through = outcome.stored_through;
        if staging {
            let staged: Vec<(VolumeIndex, ByteRange)> = self
                .ring
                .records(Sequence(0), through)
                .filter(|record| has_blocks(record))
                .map(|record| (record.volume, record.range))
                .collect();
            for (volume, range) in staged {
                self.volume(volume).next.set(range);
            }
        }
        self.ring.release(through);
        let Some(tip) = outcome.committed else {
            return LinkNews::Nothing;
        };
        self.committed(tip.position, state)
    }

    fn committed(&mut self, position: Position, state: &GroupState) -> LinkNews {
        let sequence = position.sequence;
        let closes = self.pass.and_then(|pass| pass.commit).is_some_and(|commit| commit <= sequence);
        if closes {
            self.pass = None;
            for volume in &mut self.volumes {
                volume.next = DirtyMap::default();
                volume.tracker.verified_all(sequence);
                volume.own = None;
            }
            self.orphaned = ByteCount(0);
        }
        if self.pass.is_some_and(|pass| pass.is_initial()) {
            return LinkNews::Nothing;
        }
        self.rpo.committed(sequence);
        self.sizes.committed(&position);
        if let Some(time) = self.cut_time(sequence) {
            self.recovery_point = Some((position, time));
        }
        let news = closes && (!state.consistent || state.overwrite_approved);
        if news { LinkNews::Complete } else { LinkNews::Nothing }
    }
}
