//! The handshake: options in, option replies out, until an export is chosen or the connection ends.
//!
//! Memory is bounded whatever the client sends: one option's data (64 KiB) and the replies to one option.

use std::collections::VecDeque;

use bytes::{BufMut, Bytes, BytesMut};
use zerocopy::{FromBytes, IntoBytes};

use super::export::{self, ExportDirectory, ExportInfo, ExportRefusal, Negotiated};
use super::layout::{self, ExportNameReply, Greeting, OptionHeader, handshake_flag, option_reply};
use super::option_reply::OptionReplies;
use super::option_request::{self, OptionFault, OptionKind, WantedInfo};
use super::{OPTION_BYTES_MAX, OPTIONS_MAX, ReplyStyle, STRING_BYTES_MAX};

const CLIENT_FLAGS_BYTES: u32 = 4;
const OPTION_HEADER_BYTES: u32 = 16;
/// The zeros after the answer to EXPORT_NAME, for clients that did not decline them.
const EXPORT_NAME_PADDING: [u8; 124] = [0; 124];

/// The server's side of one connection's handshake.
///
/// Drive it in this order, again and again: take outputs until there is none, receive, give the input. After
/// [`HandshakeOutput::Established`] or [`HandshakeOutput::Close`] it takes no more input; what it did not consume
/// belongs to the transmission phase.
#[derive(Debug)]
pub struct Handshake {
    step: Step,
    /// Bytes of the current step that are still to come.
    missing: u32,
    /// What came of it, if the step keeps its bytes.
    kept: Vec<u8>,
    options: u32,
    pads_export_name: bool,
    reply_style: ReplyStyle,
    outputs: VecDeque<HandshakeOutput>,
}

/// What the caller has to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandshakeOutput {
    /// Send these bytes.
    Send(Bytes),
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
    /// The client asked for more than [`OPTIONS_MAX`] options.
    #[error("the client sent too many options")]
    TooManyOptions,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    ClientFlags,
    OptionHeader,
    OptionData { option: u32, length: u32 },
    Ended,
}

impl Default for Handshake {
    fn default() -> Self {
        Self::new()
    }
}

impl Handshake {
    /// A handshake whose first output is the greeting.
    pub fn new() -> Self {
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
            reply_style: ReplyStyle::Simple,
            outputs: VecDeque::from([HandshakeOutput::Send(greeting)]),
        }
    }

    /// Takes received bytes, up to the first that leads to outputs; returns how many were consumed.
    ///
    /// While outputs wait, nothing is consumed: a client that does not read its replies gets no further.
    pub fn handle_input(&mut self, input: &[u8], exports: &dyn ExportDirectory) -> usize {
        let mut rest = input;
        while self.outputs.is_empty() && self.step != Step::Ended {
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
            Step::Ended => false,
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
            Step::Ended => {}
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
        let name_fits = usize::try_from(length).is_ok_and(|length| length <= STRING_BYTES_MAX);
        if OptionKind::from_number(option) == OptionKind::ExportName && !name_fits {
            return self.close(CloseReason::ExportName(OptionFault::NameTooLong));
        }
        self.enter(Step::OptionData { option, length }, length);
    }

    /// Answers an option whose data is consumed; `data` is empty if it was not kept.
    fn serve(&mut self, option: u32, length: u32, data: &[u8], exports: &dyn ExportDirectory) {
        let mut replies = OptionReplies::new(option);
        match OptionKind::from_number(option) {
            OptionKind::ExportName => self.export_name(data, exports),
            OptionKind::Abort => {
                self.send(replies.acknowledge());
                self.close(CloseReason::Aborted);
            }
            OptionKind::List | OptionKind::StructuredReply if length > 0 => {
                self.send(replies.error(option_reply::ERR_INVALID, &OptionFault::UnexpectedData.to_string()));
            }
            OptionKind::List => {
                for name in exports.list() {
                    replies.server(&name);
                }
                self.send(replies.acknowledge());
            }
            OptionKind::StructuredReply => {
                self.reply_style = ReplyStyle::Structured;
                self.send(replies.acknowledge());
            }
            OptionKind::Info | OptionKind::Go if length > OPTION_BYTES_MAX => {
                self.send(replies.error(option_reply::ERR_TOO_BIG, "the option is longer than 64 KiB"));
            }
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
            OptionKind::Unserved => self.send(replies.error(option_reply::ERR_UNSUP, "")),
        }
    }

    fn export_name(&mut self, data: &[u8], exports: &dyn ExportDirectory) {
        let name = match option_request::parse_name(data) {
            Ok(name) => name,
            Err(fault) => return self.close(CloseReason::ExportName(fault)),
        };
        match export::resolve(exports, name) {
            Ok((name, export)) => {
                let reply = ExportNameReply {
                    size: export.size.0.into(),
                    flags: export::transmission_flags(export.read_only, self.reply_style).into(),
                };
                let mut bytes = BytesMut::new();
                bytes.put_slice(reply.as_bytes());
                if self.pads_export_name {
                    bytes.put_slice(&EXPORT_NAME_PADDING);
                }
                self.send(bytes.freeze());
                self.establish(self.negotiated(name, &export));
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
                let reply = self.describe(replies, request.wanted, &name, &export);
                (reply, Some(self.negotiated(name, &export)))
            }
            Err(refusal) => {
                let kind = match refusal {
                    ExportRefusal::Unknown => option_reply::ERR_UNKNOWN,
                    ExportRefusal::NotPresented { .. } => option_reply::ERR_POLICY,
                };
                (replies.error(kind, &refusal.to_string()), None)
            }
        }
    }

    fn describe(
        &self,
        mut replies: OptionReplies,
        wanted: WantedInfo,
        name: &str,
        export: &ExportInfo,
    ) -> Bytes {
        let flags = export::transmission_flags(export.read_only, self.reply_style);
        replies.info_export(export, flags);
        if wanted.name {
            replies.info_name(name);
        }
        if let (true, Some(description)) = (wanted.description, &export.description) {
            replies.info_description(description);
        }
        if wanted.block_size {
            replies.info_block_size();
        }
        replies.acknowledge()
    }

    fn negotiated(&self, name: String, export: &ExportInfo) -> Negotiated {
        Negotiated {
            name,
            volume: export.volume,
            size: export.size,
            read_only: export.read_only,
            reply_style: self.reply_style,
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
