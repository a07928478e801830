//! The transmission phase: received bytes in, commands out.
//!
//! Nothing is allocated, and no payload passes through: the machine's state is one partial header.

use block::HostCommand;
use zerocopy::FromBytes;

use super::layout::{REQUEST_MAGIC, RequestHeader};
use super::request::{self, Action, Limits};
use super::{Cookie, Negotiated, Refusal, ReplyStyle};

const HEADER_BYTES: usize = size_of::<RequestHeader>();

/// The request side of one established connection.
///
/// Call [`Transmission::parse`] in a loop over each piece of input, until it is used up. After
/// [`Event::WritePayload`] the next `length` bytes of the stream are not the machine's: the caller takes them,
/// first from the rest of its input and then from the socket, and parses on behind them.
#[derive(Debug)]
pub struct Transmission {
    limits: Limits,
    step: Step,
    /// A request header that came in pieces; the first `partial_length` bytes count.
    partial: [u8; HEADER_BYTES],
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
    /// Answer the error at once ([`ReplyStyle::put_refusal`]). A write's payload has been consumed before.
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
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Header,
    /// The payload of a refused write is dropped as it comes.
    Discard {
        cookie: Cookie,
        refusal: Refusal,
        missing: u32,
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
            },
            step: Step::Header,
            partial: [0; HEADER_BYTES],
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
            Step::Discard { cookie, refusal, missing } => self.discard(input, cookie, refusal, missing),
            Step::Ended(event) => Parsed { consumed: input.len(), event },
        }
    }

    fn header(&mut self, input: &[u8]) -> Parsed {
        if self.partial_length == 0
            && let Ok((header, rest)) = RequestHeader::ref_from_prefix(input)
        {
            return self.request(header, rest).after(HEADER_BYTES);
        }
        let free = self.partial.get_mut(self.partial_length..).unwrap_or_default();
        let (taken, rest) = input.split_at(free.len().min(input.len()));
        for (to, from) in free.iter_mut().zip(taken) {
            *to = *from;
        }
        self.partial_length += taken.len();
        if self.partial_length < HEADER_BYTES {
            return Parsed { consumed: taken.len(), event: Event::NeedMore };
        }
        self.partial_length = 0;
        let partial = self.partial;
        let header = RequestHeader::ref_from_bytes(&partial).expect("the sizes are equal");
        self.request(header, rest).after(taken.len())
    }

    /// A whole header and what follows it.
    fn request(&mut self, header: &RequestHeader, rest: &[u8]) -> Parsed {
        let magic = header.magic.get();
        if magic != REQUEST_MAGIC {
            return self.end(Event::Broken(BrokenReason::RequestMagic(magic)));
        }
        let cookie = Cookie(header.cookie.get());
        let length = request::payload_bytes(header);
        let event = match request::check(header, &self.limits) {
            Ok(Action::Run(command @ HostCommand::Write { .. })) => {
                Event::WritePayload { cookie, command, length }
            }
            Ok(Action::Run(command)) => Event::Request { cookie, command },
            Ok(Action::Nothing) => Event::Served { cookie },
            Ok(Action::Disconnect) => return self.end(Event::Disconnect),
            Err(refusal) => return self.discard(rest, cookie, refusal, length),
        };
        Parsed { consumed: 0, event }
    }

    /// Drops what is missing of a refused request's payload; the refusal comes when all of it is gone.
    fn discard(&mut self, input: &[u8], cookie: Cookie, refusal: Refusal, missing: u32) -> Parsed {
        let available = u32::try_from(input.len()).unwrap_or(u32::MAX);
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
