//! The handshake: options in, option replies out, until an export is chosen or the connection ends.
//!
//! Memory is bounded whatever the client sends: one option's data (64 KiB) and the replies to one option.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use zerocopy::{FromBytes, IntoBytes};

use super::export::{self, ExportDirectory, ExportInfo, ExportRefusal, Negotiated};
use super::layout::{self, ExportNameReply, Greeting, OptionHeader, context, handshake_flag, option_reply};
use super::option_reply::OptionReplies;
use super::option_request::{self, OptionFault, OptionKind, WantedInfo};
use super::{OPTION_BYTES_MAX, OPTIONS_MAX, ReplyStyle, STRING_BYTES_MAX};

const CLIENT_FLAGS_BYTES: u32 = 4;
const OPTION_HEADER_BYTES: u32 = 16;
/// The zeros after the answer to EXPORT_NAME, for clients that did not decline them.
const EXPORT_NAME_PADDING: [u8; 124] = [0; 124];

/// Whether a listener's connections are encrypted; the specification's names are in parentheses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// TLS is refused (NOTLS).
    Off,
    /// TLS is served; which exports need it is the directory's decision (SELECTIVETLS).
    Optional,
    /// Nothing is served before TLS (FORCEDTLS).
    Required,
}

/// The server's side of one connection's handshake.
///
/// Drive it in this order, again and again: take outputs until there is none, receive, give the input. After
/// [`HandshakeOutput::Established`] or [`HandshakeOutput::Close`] it takes no more input; what it did not consume
/// belongs to the transmission phase. After [`HandshakeOutput::StartTls`] it takes none until
/// [`Handshake::secured`].
#[derive(Debug)]
pub struct Handshake {
    step: Step,
    /// Bytes of the current step that are still to come.
    missing: u32,
    /// What came of it, if the step keeps its bytes.
    kept: Vec<u8>,
    /// Options so far, also those before TLS.
    options: u32,
    pads_export_name: bool,
    channel: Channel,
    agreed: Agreed,
    outputs: VecDeque<HandshakeOutput>,
}

/// What the caller has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeOutput {
    /// Send these bytes.
    Send(Bytes),
    /// Start TLS as the server, when everything before is sent, and call [`Handshake::secured`] when it is up.
    ///
    /// Bytes that were received and not consumed came in clear text, from whoever could write to the wire: if there
    /// are any, close the connection for [`CloseReason::ClearTextAfterStartTls`]. They must never be taken for what
    /// comes out of the TLS session.
    StartTls,
    /// Go on to the transmission phase, when everything before is sent.
    Established(Negotiated),
    /// Close the connection, when everything before is sent.
    Close(CloseReason),
}

/// Why a handshake ended without an export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// The client ended it in order.
    #[error("the client ended the handshake")]
    Aborted,
    /// The client set flags that were not offered; the specification demands that the connection drops.
    #[error("the client set unknown flags {0:#x}")]
    ClientFlags(u32),
    /// What should be an option is none: this is no NBD client.
    #[error("the client sent {0:#018x} where an option should start")]
    OptionMagic(u64),
    /// EXPORT_NAME asked for an export that cannot be opened; that option has no error reply.
    #[error("export '{name}' was refused: {refusal}")]
    ExportRefused {
        /// The name asked for.
        name: String,
        /// Why it was refused.
        refusal: ExportRefusal,
    },
    /// EXPORT_NAME came with a malformed name; that option has no error reply.
    #[error("the client asked for a malformed export name: {0}")]
    ExportName(OptionFault),
    /// EXPORT_NAME came after EXTENDED_HEADERS, which forbids it.
    #[error("the client sent EXPORT_NAME after EXTENDED_HEADERS")]
    ExportNameExtended,
    /// A client without TLS asked what only another option could have answered with an error.
    #[error("the client did not start TLS")]
    TlsRequired,
    /// Bytes followed STARTTLS in clear text; the caller finds this, the handshake never says it.
    #[error("the client sent clear text after STARTTLS")]
    ClearTextAfterStartTls,
    /// The client asked for more than [`OPTIONS_MAX`] options.
    #[error("the client sent too many options")]
    TooManyOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    ClientFlags,
    OptionHeader,
    OptionData {
        option: u32,
        length: u32,
    },
    /// Until the caller has TLS up.
    AwaitTls,
    Ended,
}

/// What the bytes of the connection travel in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Channel {
    ClearText(TlsMode),
    Tls,
}

/// What options have agreed on so far; all of it is forgotten when TLS starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Agreed {
    reply_style: ReplyStyle,
    /// The export for which the context `base:allocation` is selected.
    context_export: Option<String>,
}

impl Handshake {
    /// A handshake whose first output is the greeting.
    pub fn new(tls: TlsMode) -> Self {
        let greeting = Greeting {
            magic: layout::NBD_MAGIC.into(),
            option_magic: layout::OPTION_MAGIC.into(),
            flags: (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into(),
        };
        let greeting = Bytes::copy_from_slice(greeting.as_bytes());
        Self {
            step: Step::ClientFlags,
            missing: CLIENT_FLAGS_BYTES,
            kept: Vec::new(),
            options: 0,
            pads_export_name: true,
            channel: Channel::ClearText(tls),
            agreed: Agreed::default(),
            outputs: VecDeque::from([HandshakeOutput::Send(greeting)]),
        }
    }

    /// Takes received bytes, up to the first that leads to outputs; returns how many were consumed.
    ///
    /// While outputs wait, nothing is consumed: a client that does not read its replies gets no further.
    pub fn handle_input(&mut self, input: &[u8], exports: &dyn ExportDirectory) -> usize {
        let mut rest = input;
        while self.outputs.is_empty() && !matches!(self.step, Step::AwaitTls | Step::Ended) {
            rest = self.gather(rest);
            if self.missing > 0 {
                break;
            }
            self.advance(exports);
        }
        input.len() - rest.len()
    }

    /// The next thing to do; see [`HandshakeOutput`].
    pub fn poll_output(&mut self) -> Option<HandshakeOutput> {
        self.outputs.pop_front()
    }

    /// Goes on with options, inside the TLS session that is up now. Whatever was agreed on before is forgotten.
    ///
    /// # Panics
    /// If [`HandshakeOutput::StartTls`] did not ask for TLS.
    pub fn secured(&mut self) {
        assert!(
            self.step == Step::AwaitTls && self.outputs.is_empty(),
            "TLS starts where STARTTLS asked for it"
        );
        self.channel = Channel::Tls;
        self.agreed = Agreed::default();
        self.enter(Step::OptionHeader, OPTION_HEADER_BYTES);
    }

    /// Bytes held of an option that is not complete.
    pub(super) fn buffered(&self) -> u32 {
        u32::try_from(self.kept.len()).unwrap_or(u32::MAX)
    }

    /// Moves bytes that the current step lacks from `input`, and returns the others.
    fn gather<'input>(&mut self, input: &'input [u8]) -> &'input [u8] {
        let missing = usize::try_from(self.missing).unwrap_or(usize::MAX);
        let (taken, rest) = input.split_at(missing.min(input.len()));
        self.missing = u32::try_from(missing - taken.len()).unwrap_or(u32::MAX);
        if self.keeps_bytes() {
            self.kept.extend_from_slice(taken);
        }
        rest
    }

    fn keeps_bytes(&self) -> bool {
        match self.step {
            Step::ClientFlags | Step::OptionHeader => true,
            Step::OptionData { option, length } => {
                OptionKind::from_number(option).reads_data() && length <= OPTION_BYTES_MAX
            }
            Step::AwaitTls | Step::Ended => false,
        }
    }

    /// The current step is complete: acts on it and enters the next.
    fn advance(&mut self, exports: &dyn ExportDirectory) {
        assert_eq!(self.missing, 0, "a step advances when it is complete");
        let kept = std::mem::take(&mut self.kept);
        match self.step {
            Step::ClientFlags => self.client_flags(&kept),
            Step::OptionHeader => self.option_header(&kept),
            Step::OptionData { option, length } => {
                self.enter(Step::OptionHeader, OPTION_HEADER_BYTES);
                self.serve(option, length, &kept, exports);
            }
            Step::AwaitTls | Step::Ended => {}
        }
    }

    fn enter(&mut self, step: Step, missing: u32) {
        self.step = step;
        self.missing = missing;
    }

    fn client_flags(&mut self, kept: &[u8]) {
        let flags = kept.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return self.close(CloseReason::ClientFlags(flags));
        }
        self.pads_export_name = flags & u32::from(handshake_flag::NO_ZEROES) == 0;
        if flags & u32::from(handshake_flag::FIXED_NEWSTYLE) == 0 {
            // Such a client has no STARTTLS; the specification demands the mode NOTLS.
            match self.channel {
                Channel::ClearText(TlsMode::Required) => return self.close(CloseReason::TlsRequired),
                Channel::ClearText(_) | Channel::Tls => self.channel = Channel::ClearText(TlsMode::Off),
            }
        }
        self.enter(Step::OptionHeader, OPTION_HEADER_BYTES);
    }

    fn option_header(&mut self, kept: &[u8]) {
        let header = OptionHeader::read_from_bytes(kept).expect("the step gathered a whole header");
        if header.magic.get() != layout::OPTION_MAGIC {
            return self.close(CloseReason::OptionMagic(header.magic.get()));
        }
        self.options += 1;
        if self.options > OPTIONS_MAX {
            return self.close(CloseReason::TooManyOptions);
        }
        let (option, length) = (header.option.get(), header.length.get());
        if OptionKind::from_number(option) == OptionKind::ExportName
            && let Some(reason) = self.export_name_obstacle(length)
        {
            return self.close(reason);
        }
        self.enter(Step::OptionData { option, length }, length);
    }

    /// Why EXPORT_NAME cannot be served, whatever the name: it has no error reply.
    fn export_name_obstacle(&self, length: u32) -> Option<CloseReason> {
        let name_fits = usize::try_from(length).is_ok_and(|length| length <= STRING_BYTES_MAX);
        if self.channel == Channel::ClearText(TlsMode::Required) {
            Some(CloseReason::TlsRequired)
        } else if self.agreed.reply_style == ReplyStyle::Extended {
            Some(CloseReason::ExportNameExtended)
        } else {
            (!name_fits).then_some(CloseReason::ExportName(OptionFault::NameTooLong))
        }
    }

    /// Why an option is refused before its data is looked at.
    fn obstacle(&self, kind: OptionKind, length: u32) -> Option<(u32, &'static str)> {
        let needs_chunks = matches!(kind, OptionKind::ListMetaContext | OptionKind::SetMetaContext);
        if self.channel == Channel::ClearText(TlsMode::Required)
            && !matches!(kind, OptionKind::StartTls | OptionKind::Abort)
        {
            Some((option_reply::ERR_TLS_REQD, "nothing is served before STARTTLS"))
        } else if kind.refuses_data() && length > 0 {
            Some((option_reply::ERR_INVALID, "the option takes no data"))
        } else if kind.reads_data() && length > OPTION_BYTES_MAX {
            Some((option_reply::ERR_TOO_BIG, "the option is longer than 64 KiB"))
        } else if needs_chunks && self.agreed.reply_style == ReplyStyle::Simple {
            Some((option_reply::ERR_INVALID, "contexts need structured replies or extended headers"))
        } else {
            None
        }
    }

    /// Answers an option whose data is consumed; `data` is empty if it was not kept.
    fn serve(&mut self, option: u32, length: u32, data: &[u8], exports: &dyn ExportDirectory) {
        let mut replies = OptionReplies::new(option);
        let kind = OptionKind::from_number(option);
        if kind == OptionKind::SetMetaContext {
            // It replaces the selection even where it fails.
            self.agreed.context_export = None;
        }
        if let Some((error, text)) = self.obstacle(kind, length) {
            return self.send(replies.error(error, text));
        }
        match kind {
            OptionKind::ExportName => self.export_name(data, exports),
            OptionKind::Abort => {
                self.send(replies.acknowledge());
                self.close(CloseReason::Aborted);
            }
            OptionKind::List => {
                for name in exports.list() {
                    replies.server(&name);
                }
                self.send(replies.acknowledge());
            }
            OptionKind::StartTls => self.start_tls(replies),
            OptionKind::Info => {
                let (reply, _) = self.export_info(replies, data, exports);
                self.send(reply);
            }
            OptionKind::Go => {
                let (reply, negotiated) = self.export_info(replies, data, exports);
                self.send(reply);
                if let Some(negotiated) = negotiated {
                    self.establish(negotiated);
                }
            }
            OptionKind::StructuredReply if self.agreed.reply_style == ReplyStyle::Extended => {
                self.send(replies.error(option_reply::ERR_EXT_HEADER_REQD, "extended headers are in use"));
            }
            OptionKind::StructuredReply => self.frame(replies, ReplyStyle::Structured),
            OptionKind::ExtendedHeaders => self.frame(replies, ReplyStyle::Extended),
            OptionKind::ListMetaContext => self.list_contexts(replies, data, exports),
            OptionKind::SetMetaContext => self.set_context(replies, data, exports),
            OptionKind::Unserved => self.send(replies.error(option_reply::ERR_UNSUP, "")),
        }
    }

    fn start_tls(&mut self, replies: OptionReplies) {
        match self.channel {
            Channel::ClearText(TlsMode::Optional | TlsMode::Required) => {
                self.send(replies.acknowledge());
                self.outputs.push_back(HandshakeOutput::StartTls);
                self.enter(Step::AwaitTls, 0);
            }
            Channel::ClearText(TlsMode::Off) => {
                self.send(replies.error(option_reply::ERR_POLICY, "TLS is not served here"));
            }
            Channel::Tls => self.send(replies.error(option_reply::ERR_INVALID, "TLS is in use already")),
        }
    }

    fn frame(&mut self, replies: OptionReplies, style: ReplyStyle) {
        self.agreed.reply_style = style;
        self.send(replies.acknowledge());
    }

    fn list_contexts(&mut self, mut replies: OptionReplies, data: &[u8], exports: &dyn ExportDirectory) {
        let request = match option_request::parse_context_request(data) {
            Ok(request) => request,
            Err(fault) => return self.send(replies.error(option_reply::ERR_INVALID, &fault.to_string())),
        };
        if let Err(refusal) = export::resolve(exports, request.name) {
            return self.send(refuse_for_contexts(replies, &refusal));
        }
        if request.is_bare || request.exact || request.wildcard {
            replies.meta_context(0, context::BASE_ALLOCATION);
        }
        self.send(replies.acknowledge());
    }

    fn set_context(&mut self, mut replies: OptionReplies, data: &[u8], exports: &dyn ExportDirectory) {
        let request = match option_request::parse_context_request(data) {
            Ok(request) => request,
            Err(fault) => return self.send(replies.error(option_reply::ERR_INVALID, &fault.to_string())),
        };
        match export::resolve(exports, request.name) {
            Ok((name, _)) => {
                if request.exact {
                    replies.meta_context(context::BASE_ALLOCATION_ID, context::BASE_ALLOCATION);
                    self.agreed.context_export = Some(name);
                }
                self.send(replies.acknowledge());
            }
            Err(refusal) => self.send(refuse_for_contexts(replies, &refusal)),
        }
    }

    fn export_name(&mut self, data: &[u8], exports: &dyn ExportDirectory) {
        let name = match option_request::parse_name(data) {
            Ok(name) => name,
            Err(fault) => return self.close(CloseReason::ExportName(fault)),
        };
        match export::resolve(exports, name) {
            Ok((name, export)) => {
                let negotiated = self.negotiated(name, &export);
                let reply =
                    ExportNameReply { size: export.size.0.into(), flags: flags_of(&negotiated).into() };
                let mut bytes = BytesMut::new();
                bytes.put_slice(reply.as_bytes());
                if self.pads_export_name {
                    bytes.put_slice(&EXPORT_NAME_PADDING);
                }
                self.send(bytes.freeze());
                self.establish(negotiated);
            }
            Err(refusal) => self.close(CloseReason::ExportRefused { name: name.to_owned(), refusal }),
        }
    }

    /// The replies to INFO and GO, which are the same, and what GO establishes.
    fn export_info(
        &self,
        replies: OptionReplies,
        data: &[u8],
        exports: &dyn ExportDirectory,
    ) -> (Bytes, Option<Negotiated>) {
        let request = match option_request::parse_export_request(data) {
            Ok(request) => request,
            Err(fault) => {
                return (replies.error(option_reply::ERR_INVALID, &fault.to_string()), None);
            }
        };
        match export::resolve(exports, request.name) {
            Ok((name, export)) => {
                let negotiated = self.negotiated(name, &export);
                (describe(replies, request.wanted, &negotiated, &export), Some(negotiated))
            }
            Err(refusal) => {
                // Only a client that could start TLS is told to do so.
                let kind = match refusal {
                    ExportRefusal::Unknown => option_reply::ERR_UNKNOWN,
                    ExportRefusal::TlsRequired if self.channel == Channel::ClearText(TlsMode::Optional) => {
                        option_reply::ERR_TLS_REQD
                    }
                    ExportRefusal::TlsRequired
                    | ExportRefusal::NotPresented { .. }
                    | ExportRefusal::Denied { .. } => option_reply::ERR_POLICY,
                };
                (replies.error(kind, &refusal.to_string()), None)
            }
        }
    }

    fn negotiated(&self, name: String, export: &ExportInfo) -> Negotiated {
        let base_allocation = self.agreed.context_export.as_ref() == Some(&name);
        Negotiated {
            name,
            volume: export.volume,
            size: export.size,
            read_only: export.read_only,
            reply_style: self.agreed.reply_style,
            base_allocation,
        }
    }

    fn send(&mut self, bytes: Bytes) {
        self.outputs.push_back(HandshakeOutput::Send(bytes));
    }

    fn establish(&mut self, negotiated: Negotiated) {
        self.outputs.push_back(HandshakeOutput::Established(negotiated));
        self.enter(Step::Ended, 0);
    }

    fn close(&mut self, reason: CloseReason) {
        self.outputs.push_back(HandshakeOutput::Close(reason));
        self.enter(Step::Ended, 0);
    }
}

/// What INFO and GO say of an export.
fn describe(
    mut replies: OptionReplies,
    wanted: WantedInfo,
    negotiated: &Negotiated,
    export: &ExportInfo,
) -> Bytes {
    replies.info_export(export, flags_of(negotiated));
    if wanted.name {
        replies.info_name(&negotiated.name);
    }
    if let (true, Some(description)) = (wanted.description, &export.description) {
        replies.info_description(description);
    }
    if wanted.block_size {
        replies.info_block_size();
    }
    replies.acknowledge()
}

fn flags_of(negotiated: &Negotiated) -> u16 {
    export::transmission_flags(negotiated.read_only, negotiated.reply_style, negotiated.base_allocation)
}

/// The answer to options that may not be answered with ERR_TLS_REQD.
fn refuse_for_contexts(replies: OptionReplies, refusal: &ExportRefusal) -> Bytes {
    let kind = match refusal {
        ExportRefusal::Unknown => option_reply::ERR_UNKNOWN,
        ExportRefusal::NotPresented { .. } | ExportRefusal::TlsRequired | ExportRefusal::Denied { .. } => {
            option_reply::ERR_POLICY
        }
    };
    replies.error(kind, &refusal.to_string())
}
