//! Verify at the target: hashes of the image once it includes a position.
//!
//! Guarantees: what is hashed includes everything up to the position that was asked for and nothing behind the one that
//! the reply names, also while later cuts are applied; a read over which home was made older (a failed flush, whose cuts
//! are applied again) is not answered but repeated.

use std::collections::{BTreeMap, VecDeque};

use block::Position;
use bytes::Bytes;
use protocol::{Held, Message, VerifyReply, VerifyRequest};

use super::super::effect::{Effect, IoFailure, IoRequest, Outbox, Purpose, SessionId};
use super::super::secondary::Secondary;
use super::hashes;

/// Requests that may wait; a primary keeps far fewer.
const WAITING_MAX: usize = 256;
/// Ranges being read.
const READS_MAX: usize = 8;

/// Requests of the primary's.
#[derive(Debug, Default)]
pub(in super::super) struct Verifying {
    waiting: VecDeque<VerifyRequest>,
    /// Being read, with the number of replays when the read began.
    reading: BTreeMap<u64, (VerifyRequest, u64)>,
    last: u64,
}

impl Verifying {
    /// The session ended.
    pub(in super::super) fn clear(&mut self) {
        self.waiting.clear();
        self.reading.clear();
    }
}

impl Secondary {
    pub(in super::super) fn verify_asked(&mut self, request: VerifyRequest, out: &mut Outbox) {
        if self.verifying.waiting.len() >= WAITING_MAX {
            return self.end_session("too many verify requests", out);
        }
        self.verifying.waiting.push_back(request);
    }

    /// Reads what can be read; call in every turn.
    pub(in super::super) fn verify_more(&mut self, out: &mut Outbox) {
        let Some(session) = self.session() else { return };
        let Some(image) = self.image_at() else { return };
        let replays = self.applying.replays;
        while self.verifying.reading.len() < READS_MAX {
            let ready = |request: &VerifyRequest| image.order(&request.at).is_ge();
            let Some(place) = self.verifying.waiting.iter().position(ready) else { return };
            let Some(request) = self.verifying.waiting.remove(place) else { return };
            self.verifying.last += 1;
            let (volume, range) = (request.volume, request.range);
            let purpose = Purpose::VerifyHash { session, request: self.verifying.last };
            out.io(purpose, IoRequest::HomeRead { volume, range });
            self.verifying.reading.insert(self.verifying.last, (request, replays));
        }
    }

    /// A range was read.
    pub(in super::super) fn verify_hashed(
        &mut self,
        session: SessionId,
        request: u64,
        home: Result<Bytes, IoFailure>,
        out: &mut Outbox,
    ) {
        if !self.is_session(session) {
            return;
        }
        let Some((request, replays)) = self.verifying.reading.remove(&request) else { return };
        if replays != self.applying.replays {
            self.verifying.waiting.push_back(request);
            return;
        }
        let held = match home {
            Ok(data) if request.content => Held::Content(data),
            Ok(data) => Held::Hashes(hashes(&data)),
            Err(_) => Held::Unreadable,
        };
        let reply = VerifyReply { id: request.id, through: self.image_through(), held };
        out.push(Effect::Send { session, frame: Message::VerifyReply(reply).encode() });
    }

    /// What home shows at least; none while cuts that it showed before are applied again.
    fn image_at(&self) -> Option<Position> {
        let applied = self.applying.applied.position;
        let next = self.applying.next_tip().or_else(|| self.queue.front().map(|item| item.tip));
        let repeats = next.is_some_and(|next| next.position.order(&applied).is_le());
        (!repeats).then_some(applied)
    }

    /// What home shows at most: the cuts whose writes have begun.
    fn image_through(&self) -> Position {
        self.applying.last_tip().unwrap_or(self.applying.applied).position
    }
}
