//! Verify at the target: hashes of the image once it includes a position.
//!
//! Guarantees: what is hashed is the image at the durable tip, home overlaid by redo; it includes everything up to the
//! position that was asked for and nothing behind the one that the reply names, also while cuts arrive and are applied.
//! A read over which home was made older (a failed flush, whose cuts are applied again) is not answered but repeated.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use protocol::{Held, Message, VerifyReply, VerifyRequest};

use super::super::effect::{Effect, IoFailure, Outbox, SessionId};
use super::super::image::Reader;
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
    /// Being read, with its session and the number of replays when the read began.
    reading: BTreeMap<u64, (SessionId, VerifyRequest, u64)>,
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
        let (tip, replays) = (self.tip().position, self.applying.replays);
        while self.verifying.reading.len() < READS_MAX {
            let ready = |request: &VerifyRequest| tip.order(&request.at).is_ge();
            let Some(place) = self.verifying.waiting.iter().position(ready) else { return };
            let Some(request) = self.verifying.waiting.remove(place) else { return };
            self.verifying.last += 1;
            let id = self.verifying.last;
            self.verifying.reading.insert(id, (session, request, replays));
            self.read_image(Reader::Verify(id), request.volume, request.range, out);
        }
    }

    /// A range was read.
    pub(in super::super) fn verify_hashed(
        &mut self,
        request: u64,
        image: Result<Bytes, IoFailure>,
        out: &mut Outbox,
    ) {
        let Some((session, request, replays)) = self.verifying.reading.remove(&request) else { return };
        if !self.is_session(session) {
            return;
        }
        if replays != self.applying.replays {
            self.verifying.waiting.push_back(request);
            return;
        }
        let held = match image {
            Ok(data) if request.content => Held::Content(data),
            Ok(data) => Held::Hashes(hashes(&data)),
            Err(_) => Held::Unreadable,
        };
        let reply = VerifyReply { id: request.id, through: self.tip().position, held };
        out.push(Effect::Send { session, frame: Message::VerifyReply(reply).encode() });
    }
}
