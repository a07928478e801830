//! Exports: what the caller's directory knows of them, and what a handshake has agreed on.

use block::{ByteCount, VolumeId};

use super::ReplyStyle;
use super::layout::transmission_flag as flag;

/// The exports that a host may see; the caller's view of its volumes.
///
/// It is asked for one connection, whose caller knows who the client is and whether TLS is up; so it may hide, refuse
/// and make read-only what it wants.
///
/// The handshake asks anew for each option, so that what it answers is never older than the option.
pub trait ExportDirectory {
    /// The names of the exports that this client may know of, also of those that are not presented at this moment.
    fn list(&self) -> Vec<String>;

    /// The export of this name, which is never empty.
    ///
    /// # Errors
    /// [`ExportRefusal`] if there is none, or hosts may not open it now.
    fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal>;
}

/// An export that may be opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// The volume behind it.
    pub volume: VolumeId,
    /// Its size.
    pub size: ByteCount,
    /// True if commands that change content are refused.
    pub read_only: bool,
    /// A text for people; at most [`super::STRING_BYTES_MAX`] bytes of it are sent.
    pub description: Option<String>,
}

/// Why an export cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExportRefusal {
    /// There is no export of this name.
    #[error("no such export")]
    Unknown,
    /// It exists, but hosts may not open it now: a secondary, or a fenced or offline volume.
    #[error("{reason}")]
    NotPresented {
        /// One sentence for the client's user.
        reason: String,
    },
    /// It is served over TLS only, and the connection is in clear text.
    #[error("the export is served over TLS only")]
    TlsRequired,
    /// This client may not open it.
    #[error("{reason}")]
    Denied {
        /// One sentence for the client's user.
        reason: String,
    },
}

/// What a handshake agreed on: all that the transmission phase needs to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Negotiated {
    /// The export's name, also where the client asked for the default export.
    pub name: String,
    /// The volume behind it.
    pub volume: VolumeId,
    /// Its size at the handshake; a client learns no other.
    pub size: ByteCount,
    /// True if commands that change content are refused.
    pub read_only: bool,
    /// How requests and replies are framed.
    pub reply_style: ReplyStyle,
    /// True if the client selected the context `base:allocation` for this export, and so may ask for its status.
    pub base_allocation: bool,
}

/// The export of `name`, and its name; an empty name means the only export, if there is exactly one.
pub(super) fn resolve(
    exports: &dyn ExportDirectory,
    name: &str,
) -> Result<(String, ExportInfo), ExportRefusal> {
    let name = if name.is_empty() {
        let mut names = exports.list();
        match (names.pop(), names.is_empty()) {
            (Some(only), true) => only,
            (Some(_) | None, _) => return Err(ExportRefusal::Unknown),
        }
    } else {
        name.to_owned()
    };
    let info = exports.find(&name)?;
    Ok((name, info))
}

/// The transmission flags of an export.
///
/// All connections to a volume share one engine, so a flush on one covers what any other was answered before:
/// CAN_MULTI_CONN always holds.
pub(super) const fn transmission_flags(read_only: bool, style: ReplyStyle, base_allocation: bool) -> u16 {
    let common =
        flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    let change = if read_only {
        flag::READ_ONLY
    } else {
        flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    };
    let framing = match (style, base_allocation) {
        (ReplyStyle::Simple, _) => 0,
        (ReplyStyle::Structured, _) | (ReplyStyle::Extended, false) => flag::SEND_DF,
        (ReplyStyle::Extended, true) => flag::SEND_DF | flag::BLOCK_STATUS_PAYLOAD,
    };
    common | change | framing
}
