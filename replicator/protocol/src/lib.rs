//! The mirror's protocol: messages, lineage and fencing, the chain of cuts on both sides, RPO arithmetic.
//!
//! Pure and sans-IO: time comes in as arguments, decisions go out as values. The normative page is
//! docs/protocols/replication.md. The machines here decide *what is allowed*; the daemon's group machine decides
//! *when*, and performs it.

mod access;
mod codec;
pub mod fuzz;
mod keys;
mod lease;
mod lineage;
mod message;
mod receiver;
mod rpo;
mod sender;
mod states;
mod verify;

pub use access::{MirrorAccess, MirrorHost, SetAccess};
pub use codec::CodecError;
pub use keys::{SetKeys, TenantLock};
pub use lease::{LEASE, LEASE_MARGIN, LEASE_PATIENCE, LeaseGiver, LeaseHolder};
pub use lineage::{Fork, GroupState, HelloVerdict, Refusal, RefusalCode, ResumePlan, Role};
pub use message::{
    Ack, CompareRange, CreateMirror, HashReply, HashRequest, Hello, MESSAGE_BYTES_MAX, Message, MirrorVolume,
    OrphanReply, PROTOCOL_VERSION, Refuse, Welcome,
};
pub use receiver::{Arrival, ArrivalError, ReceiverChain};
pub use rpo::RpoTracker;
pub use sender::{AckOutcome, SenderChain};
pub use states::{JournalTier, MirrorState};
pub use verify::{Held, VERIFY_BLOCKS_MAX, VerifyReply, VerifyRequest};
