//! What the specification makes a client expect, written as naively as possible and without the server's code.

use block::{ByteRange, HostCommand};

use super::super::{ReplyStyle, TlsMode};
use super::exports::{HUGE_BYTES, SMALL_BYTES};
use super::script::{Ask, Haggle};

/// What a client may expect of its client flags or of one option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// Replies in their order: option, type, and the data where it is not free text.
    Replies(Vec<(u32, u32, Option<Vec<u8>>)>),
    /// The reply to EXPORT_NAME, and transmission.
    Bare(Vec<u8>),
    Close,
}

/// What has been agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) tls: bool,
    pub(crate) style: ReplyStyle,
    pub(crate) context: Option<&'static str>,
    pub(crate) export: Option<&'static str>,
}

/// The handshake, option by option.
#[derive(Clone, Debug)]
pub(crate) struct HandshakeModel {
    mode: TlsMode,
    padding: usize,
    pub(crate) agreed: Agreed,
}

/// What a client may expect of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Run(HostCommand),
    /// Success at once.
    Nothing,
    /// An error at once, by its number.
    Error(u32),
    Disconnect,
    /// The connection drops.
    Broken,
}

const ACK: u32 = 1;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQUIRED: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;
const NOTHING_AGREED: Agreed = Agreed { tls: false, style: ReplyStyle::Simple, context: None, export: None };

impl HandshakeModel {
    /// The state after client flags that do not close the connection.
    pub(crate) fn new(mode: TlsMode, client_flags: u32) -> Self {
        let fixed = client_flags & 1 != 0;
        let padding = if client_flags & 2 == 0 { 124 } else { 0 };
        let mode = if fixed { mode } else { TlsMode::Off };
        Self { mode, padding, agreed: NOTHING_AGREED }
    }

    pub(crate) fn answer(&mut self, haggle: &Haggle) -> Answer {
        let forced = self.mode == TlsMode::Required && !self.agreed.tls;
        match haggle {
            Haggle::ExportName { .. } if forced || self.agreed.style == ReplyStyle::Extended => Answer::Close,
            Haggle::ExportName { name } => match self.find(name) {
                Ok(export) if name != "d\0" => {
                    self.agreed.export = Some(export);
                    let mut reply = self.export_info(export);
                    reply.extend(vec![0; self.padding]);
                    Answer::Bare(reply)
                }
                Ok(_) | Err(_) => Answer::Close,
            },
            Haggle::Plain { number: 2, .. } => Answer::Replies(vec![(2, ACK, Some(Vec::new()))]),
            Haggle::Plain { number, data } => self.plain(*number, data, forced),
            Haggle::Malformed { number } => {
                if *number == 10 {
                    self.agreed.context = None;
                }
                error(*number, if forced { TLS_REQUIRED } else { INVALID })
            }
            Haggle::Info { go, name, wanted } => {
                let number = if *go { 7 } else { 6 };
                if forced { error(number, TLS_REQUIRED) } else { self.info(number, name, wanted) }
            }
            Haggle::Contexts { set, name, queries } => {
                let number = if *set { 10 } else { 9 };
                if forced { error(number, TLS_REQUIRED) } else { self.contexts(number, name, queries) }
            }
        }
    }

    fn plain(&mut self, number: u32, data: &[u8], forced: bool) -> Answer {
        let acknowledged = Answer::Replies(vec![(number, ACK, Some(Vec::new()))]);
        match number {
            3 | 8 | 11 if forced => error(number, TLS_REQUIRED),
            3 | 5 | 8 | 11 if !data.is_empty() => error(number, INVALID),
            3 => {
                let names = ["disk", "frozen", "huge", "replica", "private", "secret"];
                let shown = names.iter().take(if self.agreed.tls { 6 } else { 4 });
                let mut replies: Vec<_> = shown
                    .map(|name| {
                        let length = [0, 0, 0, u8::try_from(name.len()).unwrap_or(0)];
                        (3, 2, Some([&length[..], name.as_bytes()].concat()))
                    })
                    .collect();
                replies.push((3, ACK, Some(Vec::new())));
                Answer::Replies(replies)
            }
            5 if self.agreed.tls => error(5, INVALID),
            5 if self.mode == TlsMode::Off => error(5, POLICY),
            5 => {
                self.agreed = Agreed { tls: true, ..NOTHING_AGREED };
                acknowledged
            }
            8 if self.agreed.style == ReplyStyle::Extended => error(8, 0x8000_000a),
            8 => {
                self.agreed.style = ReplyStyle::Structured;
                acknowledged
            }
            11 => {
                self.agreed.style = ReplyStyle::Extended;
                acknowledged
            }
            _ if forced => error(number, TLS_REQUIRED),
            _ => error(number, 0x8000_0001),
        }
    }

    fn info(&mut self, number: u32, name: &str, wanted: &[u16]) -> Answer {
        if name == "d\0" {
            return error(number, INVALID);
        }
        let export = match self.find(name) {
            Ok(export) => export,
            Err(kind) => return error(number, kind),
        };
        let mut replies = vec![(number, 3, Some([&[0, 0][..], &self.export_info(export)].concat()))];
        if wanted.contains(&1) {
            replies.push((number, 3, Some([&[0, 1][..], export.as_bytes()].concat())));
        }
        if wanted.contains(&2) {
            replies.push((number, 3, Some(b"\0\x02a disk".to_vec())));
        }
        if wanted.contains(&3) {
            replies.push((number, 3, Some(vec![0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0])));
        }
        replies.push((number, ACK, Some(Vec::new())));
        if number == 7 {
            self.agreed.export = Some(export);
        }
        Answer::Replies(replies)
    }

    fn contexts(&mut self, number: u32, name: &str, queries: &[&[u8]]) -> Answer {
        let set = number == 10;
        if set {
            self.agreed.context = None;
        }
        let malformed = |query: &&[u8]| *query == b"allocation" || *query == b"base:\xff";
        if self.agreed.style == ReplyStyle::Simple || name == "d\0" || queries.iter().any(malformed) {
            return error(number, INVALID);
        }
        let export = match self.find(name) {
            Ok(export) => export,
            // These options must not be answered with TLS_REQD.
            Err(TLS_REQUIRED) => return error(number, POLICY),
            Err(kind) => return error(number, kind),
        };
        let exact = queries.contains(&&b"base:allocation"[..]);
        let all = queries.is_empty() || queries.contains(&&b"base:"[..]);
        let mut replies = Vec::new();
        if exact || (all && !set) {
            let data = [&[0, 0, 0, u8::from(set)][..], b"base:allocation"].concat();
            replies.push((number, 4, Some(data)));
        }
        if exact && set {
            self.agreed.context = Some(export);
        }
        replies.push((number, ACK, Some(Vec::new())));
        Answer::Replies(replies)
    }

    fn find(&self, name: &str) -> Result<&'static str, u32> {
        match name {
            "disk" => Ok("disk"),
            "huge" => Ok("huge"),
            "frozen" => Ok("frozen"),
            "secret" if self.agreed.tls => Ok("secret"),
            "secret" if self.mode == TlsMode::Off => Err(POLICY),
            "secret" => Err(TLS_REQUIRED),
            "replica" | "private" => Err(POLICY),
            _ => Err(UNKNOWN),
        }
    }

    /// Size and transmission flags.
    fn export_info(&self, export: &str) -> Vec<u8> {
        let selected = self.agreed.context == Some(export);
        let flags: [(u32, bool); 9] = [
            (0, true),
            (1, export == "frozen"),
            (2, true),
            (3, true),
            (8, true),
            (10, true),
            (7, self.agreed.style != ReplyStyle::Simple),
            (12, self.agreed.style == ReplyStyle::Extended && selected),
            (4, false),
        ];
        let writable = [5, 6, 11].map(|bit| (bit, export != "frozen"));
        let flags: u16 =
            flags.iter().chain(&writable).filter(|(_, set)| *set).map(|(bit, _)| 1_u16 << bit).sum();
        [&size(export).to_be_bytes()[..], &flags.to_be_bytes()].concat()
    }
}

fn error(option: u32, kind: u32) -> Answer {
    Answer::Replies(vec![(option, kind, None)])
}

fn size(export: &str) -> u64 {
    if export == "huge" { HUGE_BYTES } else { SMALL_BYTES }
}

/// What a client may expect of a request, once the handshake has ended with an export.
pub(crate) fn outcome(ask: &Ask, agreed: &Agreed) -> Outcome {
    let extended = agreed.style == ReplyStyle::Extended;
    let export = agreed.export.unwrap_or_default();
    let flag = |bit: u16| ask.request.flags & (1 << bit) != 0;
    let only = |bits: &[u16]| (0..16).all(|bit| !flag(bit) || bits.contains(&bit));
    let kind = ask.request.kind;
    let filtered = extended && kind == 7 && flag(5);
    let announced = ask.payload_bytes(extended);
    if kind == 2 {
        return Outcome::Disconnect;
    }
    let refuse = |number| if announced > 0xffff_ffff { Outcome::Broken } else { Outcome::Error(number) };
    let flags_known = match kind {
        0 if agreed.style == ReplyStyle::Simple => only(&[0]),
        0 => only(&[0, 2]),
        1 if extended => only(&[0, 5]),
        1 | 3 | 4 | 5 => only(&[0]),
        6 => only(&[0, 1, 4]),
        7 if extended => only(&[0, 3, 5]),
        7 => only(&[0, 3]),
        _ => false,
    };
    let length = if filtered { ask.status.0 } else { ask.request.length };
    let offset = ask.request.offset;
    if !flags_known {
        return refuse(22);
    }
    if kind == 3 {
        let bare = offset == 0 && length == 0;
        return if bare { Outcome::Run(HostCommand::Flush) } else { refuse(22) };
    }
    if kind == 7 && (agreed.context != agreed.export || (filtered && ask.status.1 != [1])) {
        return refuse(22);
    }
    if export == "frozen" && [1, 4, 6].contains(&kind) {
        return refuse(1);
    }
    if u128::from(offset) + u128::from(length) > u128::from(size(export)) {
        return refuse(if kind == 1 || kind == 6 { 28 } else { 22 });
    }
    if length == 0 {
        return if kind == 7 { refuse(22) } else { Outcome::Nothing };
    }
    if length > 64 << 20 && kind <= 1 {
        return refuse(if kind == 0 && flag(2) { 75 } else { 22 });
    }
    let Some(range) = ByteRange::new(offset, length) else {
        unreachable!("the range lies in the export");
    };
    let fua = flag(0);
    Outcome::Run(match kind {
        0 => HostCommand::Read { range },
        1 => HostCommand::Write { range, fua },
        4 => HostCommand::Trim { range, fua },
        5 => HostCommand::Cache { range },
        6 => HostCommand::WriteZeroes { range, fua, no_hole: flag(1), fast: flag(4) },
        _ => HostCommand::Status { range, one: flag(3) },
    })
}
