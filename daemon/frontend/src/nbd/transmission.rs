//! The transmission phase: received bytes in, commands out.
//!
//! Nothing is allocated, and no payload passes through but the twelve bytes of a status request: the machine's state is
//! one partial header.

use block::HostCommand;
use zerocopy::FromBytes;

use super::layout::{
    EXTENDED_REQUEST_MAGIC, ExtendedRequestHeader, REQUEST_MAGIC, RequestHeader, StatusPayload,
};
use super::request::{Action, Limits, Request};
use super::{Cookie, Negotiated, Refusal, ReplyStyle};

/// The longest header.
const HEADER_BYTES_MAX: usize = size_of::<ExtendedRequestHeader>();
const STATUS_PAYLOAD_BYTES: usize = size_of::<StatusPayload>();
/// The longest payload that is read only to be dropped: what a compact request can announce. Beyond it the client
/// talks nonsense.
const DISCARD_BYTES_MAX: u64 = 0xffff_ffff;

/// The request side of one established connection.
///
/// Call [`Transmission::parse`] in a loop over each piece of input, until it is used up. After
/// [`Event::WritePayload`] the next `length` bytes of the stream are not the machine's: the caller takes them,
/// first from the rest of its input and then from the socket, and parses on behind them.
#[derive(Debug)]
pub struct Transmission {
    limits: Limits,
    step: Step,
    /// A header, or payload of a status request, that came in pieces; the first `partial_length` bytes count.
    partial: [u8; HEADER_BYTES_MAX],
    partial_length: usize,
}

/// The outcome of one call of [`Transmission::parse`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// How much of the input was used; all of it with [`Event::NeedMore`].
    pub consumed: usize,
    /// What it led to.
    pub event: Event,
}

/// What the caller has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Receive more: no request is complete.
    NeedMore,
    /// Run the command: it lies within the export, changes nothing that is read-only, and its range is not empty.
    /// A read is of at most [`super::PAYLOAD_BYTES_MAX`]; commands without payload may be as long as the export.
    Request {
        /// The request's name.
        cookie: Cookie,
        /// What to run; never a write.
        command: HostCommand,
    },
    /// Take the payload from the stream, then run the command, which is checked as that of a request.
    WritePayload {
        /// The request's name.
        cookie: Cookie,
        /// The write to run.
        command: HostCommand,
        /// The payload's length, that of the write's range: 1 to [`super::PAYLOAD_BYTES_MAX`].
        length: u32,
    },
    /// Answer success at once ([`ReplyStyle::put_success`]): the request is for zero bytes.
    Served {
        /// The request's name.
        cookie: Cookie,
    },
    /// Answer the error at once ([`ReplyStyle::put_refusal`]). The request's payload has been consumed before.
    Refused {
        /// The request's name.
        cookie: Cookie,
        /// What was wrong.
        refusal: Refusal,
    },
    /// The client leaves in order: answer what is in flight, then close. Comes again if parsing goes on.
    Disconnect,
    /// The stream makes no sense any more: drop the connection. Comes again if parsing goes on.
    Broken(BrokenReason),
}

/// Why a connection has to be dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BrokenReason {
    /// What should be a request is none.
    #[error("the client sent {0:#010x} where a request should start")]
    RequestMagic(u32),
    /// A payload that cannot be served is too long to be waited for.
    #[error("the client announced a payload of {0} bytes")]
    PayloadLength(u64),
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Header,
    /// The payload of a status request is gathered.
    StatusPayload {
        request: Request,
    },
    /// The payload of a refused request is dropped as it comes.
    Discard {
        cookie: Cookie,
        refusal: Refusal,
        missing: u64,
    },
    Ended(Event),
}

impl Transmission {
    /// The machine of a connection that the handshake established.
    pub const fn new(negotiated: &Negotiated) -> Self {
        Self {
            limits: Limits {
                size: negotiated.size.0,
                read_only: negotiated.read_only,
                reply_style: negotiated.reply_style,
                base_allocation: negotiated.base_allocation,
            },
            step: Step::Header,
            partial: [0; HEADER_BYTES_MAX],
            partial_length: 0,
        }
    }

    /// How to encode this connection's replies.
    pub const fn reply_style(&self) -> ReplyStyle {
        self.limits.reply_style
    }

    /// Uses received bytes up to the first event.
    pub fn parse(&mut self, input: &[u8]) -> Parsed {
        match self.step {
            Step::Header => self.header(input),
            Step::StatusPayload { request } => self.status_payload(input, request),
            Step::Discard { cookie, refusal, missing } => self.discard(input, cookie, refusal, missing),
            Step::Ended(event) => Parsed { consumed: input.len(), event },
        }
    }

    fn header(&mut self, input: &[u8]) -> Parsed {
        let header_bytes = match self.limits.reply_style {
            ReplyStyle::Simple | ReplyStyle::Structured => size_of::<RequestHeader>(),
            ReplyStyle::Extended => size_of::<ExtendedRequestHeader>(),
        };
        if self.partial_length == 0
            && let Some((header, rest)) = input.split_at_checked(header_bytes)
        {
            return self.decode(header, rest).after(header_bytes);
        }
        let (taken, rest) = self.gather(input, header_bytes);
        if self.partial_length < header_bytes {
            return Parsed { consumed: taken, event: Event::NeedMore };
        }
        self.partial_length = 0;
        let partial = self.partial;
        self.decode(partial.get(..header_bytes).unwrap_or_default(), rest).after(taken)
    }

    /// Moves input into the partial piece, up to `wanted` bytes there; how many were taken, and the others.
    fn gather<'input>(&mut self, input: &'input [u8], wanted: usize) -> (usize, &'input [u8]) {
        let free = self.partial.get_mut(self.partial_length..wanted).unwrap_or_default();
        let (taken, rest) = input.split_at(free.len().min(input.len()));
        for (to, from) in free.iter_mut().zip(taken) {
            *to = *from;
        }
        self.partial_length += taken.len();
        (taken.len(), rest)
    }

    /// A whole header and what follows it.
    fn decode(&mut self, header: &[u8], rest: &[u8]) -> Parsed {
        let (magic, expected, request) = match self.limits.reply_style {
            ReplyStyle::Simple | ReplyStyle::Structured => {
                let header = RequestHeader::ref_from_bytes(header).expect("the whole header is there");
                (header.magic.get(), REQUEST_MAGIC, Request::compact(header))
            }
            ReplyStyle::Extended => {
                let header =
                    ExtendedRequestHeader::ref_from_bytes(header).expect("the whole header is there");
                (header.magic.get(), EXTENDED_REQUEST_MAGIC, Request::extended(header))
            }
        };
        if magic == expected {
            self.request(request, rest)
        } else {
            self.end(Event::Broken(BrokenReason::RequestMagic(magic)))
        }
    }

    fn request(&mut self, request: Request, rest: &[u8]) -> Parsed {
        let cookie = request.cookie();
        let event = match request.check(&self.limits) {
            Ok(Action::Run(command @ HostCommand::Write { range, .. })) => {
                let length = u32::try_from(range.length()).expect("a write's length was checked");
                Event::WritePayload { cookie, command, length }
            }
            Ok(Action::Run(command)) => Event::Request { cookie, command },
            Ok(Action::ReadStatusPayload) => {
                self.step = Step::StatusPayload { request };
                return self.status_payload(rest, request);
            }
            Ok(Action::Nothing) => Event::Served { cookie },
            Ok(Action::Disconnect) => return self.end(Event::Disconnect),
            Err(refusal) => return self.refuse(rest, cookie, refusal, request.payload_bytes()),
        };
        Parsed { consumed: 0, event }
    }

    /// The payload of a status request decides whether it is served.
    fn status_payload(&mut self, input: &[u8], request: Request) -> Parsed {
        let (taken, rest) = self.gather(input, STATUS_PAYLOAD_BYTES);
        if self.partial_length < STATUS_PAYLOAD_BYTES {
            return Parsed { consumed: taken, event: Event::NeedMore };
        }
        self.partial_length = 0;
        self.step = Step::Header;
        let (payload, _) = StatusPayload::read_from_prefix(&self.partial).expect("a header is longer");
        let parsed = match request.with_status_payload(&payload) {
            Ok(request) => self.request(request, rest),
            Err(refusal) => self.refuse(rest, request.cookie(), refusal, 0),
        };
        parsed.after(taken)
    }

    /// Drops the payload of a refused request, if there may be so much; the refusal comes when all of it is gone.
    fn refuse(&mut self, input: &[u8], cookie: Cookie, refusal: Refusal, payload: u64) -> Parsed {
        if payload > DISCARD_BYTES_MAX {
            return self.end(Event::Broken(BrokenReason::PayloadLength(payload)));
        }
        self.discard(input, cookie, refusal, payload)
    }

    fn discard(&mut self, input: &[u8], cookie: Cookie, refusal: Refusal, missing: u64) -> Parsed {
        let available = u64::try_from(input.len()).unwrap_or(u64::MAX);
        if available < missing {
            self.step = Step::Discard { cookie, refusal, missing: missing - available };
            return Parsed { consumed: input.len(), event: Event::NeedMore };
        }
        self.step = Step::Header;
        Parsed {
            consumed: usize::try_from(missing).unwrap_or(input.len()),
            event: Event::Refused { cookie, refusal },
        }
    }

    fn end(&mut self, event: Event) -> Parsed {
        self.step = Step::Ended(event);
        Parsed { consumed: 0, event }
    }
}

impl Parsed {
    /// The same, where `before` bytes had been used already.
    const fn after(self, before: usize) -> Self {
        Self { consumed: before + self.consumed, event: self.event }
    }
}
