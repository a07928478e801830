//! The control API's types: what an operator's request and the daemon's answer look like as JSON.
//!
//! The daemon serves these under `/v1` on its control socket; the command line and the console send and read
//! them. The crate is pure: [`Call`] describes a request as method, path and body, and whoever owns a socket sends
//! it. Requests refuse unknown fields; answers may gain fields, so readers ignore those that they do not know.
//! A refusal is a [`Problem`] (RFC 9457).

mod access;
mod access_order;
mod call;
mod mirror;
mod partner;
mod policy;
mod problem;
mod recovery;
mod status;
mod tenant;
mod time;
mod verify;
mod volume;

pub use access::{
    ACCESS_HOSTS_BYTES_MAX, ACCESS_HOSTS_MAX, AccessChangeError, AccessRefusal, Admission,
    HOST_IDENTITY_BYTES_MAX, HostAccess, HostIdentity, HostIdentityError, Peer, TlsRule, VolumeAccess,
    VolumeAccessChange, VolumeAccessView,
};
pub use call::{Call, CallError, Method};
pub use mirror::{
    FailoverRequest, FailoverResult, JournalTier, LinkFailure, MirrorCreate, MirrorMemory, MirrorMode,
    MirrorStart, MirrorState, MirrorView, OrphanView, OrphansRequest, OrphansView, Overload, RecoveryPoint,
    ResyncView, Role, Side, SyncView, UnknownState,
};
pub use partner::{AddressError, CERTIFICATE_BYTES_MAX, CertificateView, HostPort, PartnerAdd, PartnerView};
pub use policy::{HostWrites, MirrorSet, PressureView, Rate, RateError};
pub use problem::{Problem, ProblemKind};
pub use recovery::{DrillStart, DrillView, RecoveryTarget, RecoveryTargetError, WindowView};
pub use status::{Counts, StatusView};
pub use tenant::{
    AuditVerify, AuditView, ProviderView, RotationView, TenantCreate, TenantView, VolumeKeyView,
};
pub use time::{Timestamp, TimestampError};
pub use verify::{Extent, MirrorVerify, VerifyState, VerifyView};
pub use volume::{Cache, Iops, IopsError, VolumeCreate, VolumeResize, VolumeState, VolumeView};

/// The longest request body that the daemon reads, in bytes: the largest is a partner's certificate.
pub const REQUEST_BYTES_MAX: usize = 64 << 10;
