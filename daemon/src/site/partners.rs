//! The partner sites: dialing, incoming sessions, and the calls that create and delete mirrors.

use std::sync::Arc;
use std::time::Duration;

use block::{Epoch, MirrorId, VolumeName};
use control::ProblemKind;
use protocol::{CreateMirror, Message, RefusalCode, Refuse, SetAccess, SetKeys};
use replicator::{IncomingSession, SessionEvent, SessionHandle};
use tokio::sync::{Notify, mpsc};

use super::Site;
use crate::api::OperationError;
use crate::catalogue::PartnerRecord;
use crate::shard::{GroupKey, ShardCommand};

/// A partner may have to allocate large volumes before it answers.
const CALL_LIMIT: Duration = Duration::from_secs(120);
/// Asking whether a partner is there.
const PING_LIMIT: Duration = Duration::from_secs(3);

/// A session used for one question and its answer.
struct Call {
    handle: SessionHandle,
    rung: Arc<Notify>,
}

impl Call {
    fn new(handle: SessionHandle) -> Self {
        let rung = Arc::new(Notify::new());
        let bell = Arc::clone(&rung);
        handle.set_wake(Arc::new(move || bell.notify_one()));
        Self { handle, rung }
    }

    fn send(&self, message: &Message) -> Result<(), String> {
        self.handle.try_send_control(message.encode()).map_err(|refused| refused.to_string())
    }

    async fn answer(&mut self) -> Result<Message, String> {
        loop {
            match self.handle.try_next_control() {
                Some(SessionEvent::Control(frame)) => {
                    return Message::decode(&frame).map_err(|error| error.to_string());
                }
                Some(SessionEvent::Cut(_)) => return Err("the partner sent a cut out of place".to_owned()),
                Some(SessionEvent::Closed { reason }) => return Err(reason.to_string()),
                None => self.rung.notified().await,
            }
        }
    }
}

impl Site {
    /// Opens a session for a group's mirror and hands it to the group's shard.
    pub(super) async fn dial_for(self: Arc<Self>, key: GroupKey) {
        let Some(mirror) = self.mirror_of_group(key) else {
            return;
        };
        let session = match self.catalogue().partner(&mirror.partner) {
            Some(partner) => self.dial(&partner).await,
            None => Err(format!("partner '{}' is not known any more", mirror.partner)),
        };
        if session.is_ok() {
            tokio::spawn(Arc::clone(&self).repeat_access(mirror.id));
        }
        self.shard_of(key).send(ShardCommand::Dialed { key, session });
    }

    async fn dial(&self, partner: &PartnerRecord) -> Result<SessionHandle, String> {
        let dialed = self.endpoint().dial(partner.name.as_str(), partner.address.as_str()).await;
        let outcome = dialed.map_err(|error| error.to_string());
        self.note_partner(&partner.name, outcome.as_ref().err().cloned());
        outcome
    }

    /// Asks the partner one thing.
    pub(super) async fn ask(
        &self,
        partner: &PartnerRecord,
        question: Message,
        limit: Duration,
    ) -> Result<Message, OperationError> {
        let unavailable = |reason: String| {
            let name = &partner.name;
            let detail = format!("partner '{name}' at {} cannot be asked: {reason}", partner.address);
            OperationError::new(ProblemKind::Unavailable, detail)
        };
        let conversation = async {
            let mut call = Call::new(self.dial(partner).await?);
            call.send(&question)?;
            let answer = call.answer().await?;
            call.handle.close("answered");
            Ok(answer)
        };
        match tokio::time::timeout(limit, conversation).await {
            Ok(answer) => answer.map_err(unavailable),
            Err(_) => Err(unavailable(format!("no answer within {} seconds", limit.as_secs()))),
        }
    }

    /// Whether the partner answers; its trouble if not.
    pub(super) async fn ping(&self, partner: &PartnerRecord) -> Result<(), String> {
        match self.ask(partner, Message::Ping, PING_LIMIT).await {
            Ok(Message::Pong { .. }) => Ok(()),
            Ok(_) => Err("the partner answers, but not as Farshore does".to_owned()),
            Err(error) => Err(error.detail),
        }
    }

    /// Has the partner make the secondary of a new mirror.
    pub(super) async fn ask_to_create(
        &self,
        partner: &PartnerRecord,
        create: CreateMirror,
    ) -> Result<(), OperationError> {
        let answer = self.ask(partner, Message::CreateMirror(create), CALL_LIMIT).await?;
        if matches!(answer, Message::Created { .. }) { Ok(()) } else { Err(refused(partner, &answer)) }
    }

    /// Has the partner store who may open a mirror's volumes.
    pub(super) async fn ask_to_set_access(
        &self,
        partner: &PartnerRecord,
        set: SetAccess,
        limit: Duration,
    ) -> Result<(), OperationError> {
        let answer = self.ask(partner, Message::SetAccess(set), limit).await?;
        if matches!(answer, Message::AccessSet) { Ok(()) } else { Err(refused(partner, &answer)) }
    }

    /// Has the partner store the keys of a mirror's volumes as they are wrapped now.
    pub(super) async fn ask_to_set_keys(
        &self,
        partner: &PartnerRecord,
        set: SetKeys,
        limit: Duration,
    ) -> Result<(), OperationError> {
        let answer = self.ask(partner, Message::SetKeys(set), limit).await?;
        if matches!(answer, Message::KeysSet) { Ok(()) } else { Err(refused(partner, &answer)) }
    }

    /// Has the partner forget a mirror.
    pub(super) async fn ask_to_delete(
        &self,
        partner: &PartnerRecord,
        mirror: MirrorId,
        epoch: Epoch,
    ) -> Result<(), OperationError> {
        let answer = self.ask(partner, Message::DeleteMirror { mirror, epoch }, CALL_LIMIT).await?;
        if matches!(answer, Message::Deleted) { Ok(()) } else { Err(refused(partner, &answer)) }
    }

    /// Takes sessions that partners open, until the endpoint ends.
    pub(super) async fn accept_partners(self: Arc<Self>, mut incoming: mpsc::Receiver<IncomingSession>) {
        while let Some(session) = incoming.recv().await {
            tokio::spawn(Arc::clone(&self).receive_partner(session));
        }
    }

    async fn receive_partner(self: Arc<Self>, session: IncomingSession) {
        let IncomingSession { partner, hello, handle, .. } = session;
        let Ok(partner) = partner.parse::<VolumeName>() else {
            return;
        };
        self.note_partner(&partner, None);
        let question = match Message::decode(&hello) {
            Ok(message) => message,
            Err(error) => {
                tracing::warn!(%partner, %error, "a partner's first message makes no sense");
                return handle.close(&error.to_string());
            }
        };
        let answer = match question {
            Message::Hello(hello) => match self.group_of_hello(&partner, hello.mirror) {
                Ok(key) => {
                    self.shard_of(key).send(ShardCommand::Greeted { key, session: handle, hello });
                    return;
                }
                Err((code, text)) => refusal(code, text),
            },
            Message::Ping => Message::Pong { site: self.catalogue().site(), name: self.name() },
            Message::CreateMirror(create) => self.create_secondary(&partner, create).await,
            Message::DeleteMirror { mirror, epoch } => self.delete_for_partner(&partner, mirror, epoch).await,
            Message::SetAccess(set) => self.take_access(&partner, set).await,
            Message::SetKeys(set) => self.take_keys(&partner, set).await,
            Message::Welcome(_)
            | Message::Refuse(_)
            | Message::Ack(_)
            | Message::AbortPass { .. }
            | Message::PassRefused { .. }
            | Message::HashRequest(_)
            | Message::HashReply(_)
            | Message::VerifyRequest(_)
            | Message::VerifyReply(_)
            | Message::Orphans { .. }
            | Message::OrphanRequest(_)
            | Message::OrphanReply(_)
            | Message::SwitchAsk
            | Message::SwitchReady { .. }
            | Message::Relinquish { .. }
            | Message::LeaseOffer
            | Message::LeaseAsk { .. }
            | Message::LeaseGrant { .. }
            | Message::Created { .. }
            | Message::Deleted
            | Message::AccessSet
            | Message::Grow { .. }
            | Message::Grown { .. }
            | Message::KeysSet
            | Message::Pong { .. } => {
                refusal(RefusalCode::Protocol, "the first message must be a question".to_owned())
            }
        };
        let mut call = Call::new(handle);
        if call.send(&answer).is_ok() {
            // The asking side closes when it has the answer.
            let _ = tokio::time::timeout(PING_LIMIT, call.answer()).await;
        }
    }

    fn group_of_hello(
        &self,
        partner: &VolumeName,
        mirror: MirrorId,
    ) -> Result<GroupKey, (RefusalCode, String)> {
        let known = self.catalogue().mirror_by_id(mirror).zip(self.group_of_mirror(mirror));
        let Some((record, key)) = known else {
            let text =
                format!("site '{}' does not know this mirror; delete it and create it anew", self.name());
            return Err((RefusalCode::UnknownMirror, text));
        };
        if record.partner != *partner {
            let text = format!("mirror '{}' belongs to another partner than '{partner}'", record.name);
            return Err((RefusalCode::WrongPartner, text));
        }
        Ok(key)
    }
}

/// A refusal outside a mirror's session.
pub(super) fn refusal(code: RefusalCode, text: String) -> Message {
    Message::Refuse(Refuse {
        code,
        epoch: Epoch::default(),
        origin: block::SiteId::default(),
        fork: block::Position::default(),
        text,
    })
}

fn refused(partner: &PartnerRecord, answer: &Message) -> OperationError {
    let name = &partner.name;
    if let Message::Refuse(refuse) = answer {
        return OperationError::new(
            ProblemKind::Refused,
            format!("partner '{name}' refuses: {}", refuse.text),
        );
    }
    OperationError::new(ProblemKind::Unavailable, format!("partner '{name}' gave an answer out of place"))
}
