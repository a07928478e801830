//! QUIC transport between two sites: pinned certificates, control frames and cuts.
//!
//! The crate moves bytes. It guarantees that both ends of a session hold the private key of a certificate that
//! the other end has pinned, that control frames and cuts arrive whole and in order, that every queue is bounded,
//! and that each session ends with exactly one [`SessionEvent::Closed`]. It does not know what a frame or a cut
//! means, and sees neither volumes nor keys of volumes. The wire is described in docs/protocols/transport.md.
//!
//! A consumer is a thread without async: it drains a [`SessionHandle`] with [`SessionHandle::try_next`] when the
//! session's wake callback has rung, and sends with calls that never block.

mod cuts;
mod driver;
mod endpoint;
mod frames;
mod handshake;
mod identity;
mod pins;
mod session;
mod settings;
mod verify;

pub use cuts::{BudgetedBuffers, CUT_HEADER_BYTES, CutBuffers, CutIntake};
pub use endpoint::{BindError, Endpoint};
pub use handshake::{DialError, IncomingSession};
pub use identity::{CERTIFICATE_FILE, IdentityError, KEY_FILE, SiteIdentity};
pub use pins::{CertificateError, Fingerprint, PinError, PinStore, PinnedCertificate};
pub use session::{CloseReason, Refusal, Refused, SessionEvent, SessionHandle, SessionId, Wake};
pub use settings::{Congestion, SettingsError, TransportSettings};
