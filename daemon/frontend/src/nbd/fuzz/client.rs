//! A client's half of the codecs, written from the specification and not from the server's half.

use std::fmt::Debug;

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

/// One reply of the transmission phase, or one chunk of it, without read data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Simple {
        error: u32,
        cookie: u64,
    },
    Chunk {
        cookie: u64,
        /// The request's offset, which extended headers echo.
        echo: Option<u64>,
        done: bool,
        body: Body,
    },
}

/// The body of a chunk; the data of a read is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    None,
    Data {
        offset: u64,
        length: u64,
    },
    Hole {
        offset: u64,
        length: u64,
    },
    /// Lengths and flags.
    Status {
        context: u64,
        extents: Vec<(u64, u64)>,
    },
    Error {
        error: u32,
        text: String,
    },
}

/// The fields of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) length: u64,
}

impl Request {
    /// The 28-byte header, without payload; the length must fit.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.length).expect("a compact request has 32 bits of length");
        [&self.start(0x2560_9513)[..], &length.to_be_bytes()].concat()
    }

    /// The 32-byte header, without payload.
    pub(crate) fn encode_extended(&self) -> Vec<u8> {
        [&self.start(0x21e4_1c71)[..], &self.length.to_be_bytes()].concat()
    }

    fn start(&self, magic: u32) -> Vec<u8> {
        [
            &magic.to_be_bytes()[..],
            &self.flags.to_be_bytes(),
            &self.kind.to_be_bytes(),
            &self.cookie.to_be_bytes(),
            &self.offset.to_be_bytes(),
        ]
        .concat()
    }
}

pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = option_header(number, length(data));
    bytes.extend(data);
    bytes
}

pub(crate) fn option_header(number: u32, length: u32) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &length.to_be_bytes()].concat()
}

/// The data of INFO and GO.
pub(crate) fn export_request(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend(u16::try_from(wanted.len()).expect("few are wanted").to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn context_request(name: &str, queries: &[&[u8]]) -> Vec<u8> {
    let mut data = string(name.as_bytes());
    data.extend(u32::try_from(queries.len()).expect("few are asked").to_be_bytes());
    queries.iter().for_each(|query| data.extend(string(query)));
    data
}

/// The payload of a status request.
pub(crate) fn status_payload(length: u64, contexts: &[u32]) -> Vec<u8> {
    let mut data = length.to_be_bytes().to_vec();
    data.extend(contexts.iter().flat_map(|context| context.to_be_bytes()));
    data
}

fn string(text: &[u8]) -> Vec<u8> {
    [&length(text).to_be_bytes()[..], text].concat()
}

fn length(data: &[u8]) -> u32 {
    u32::try_from(data.len()).expect("what a client makes up is short")
}

/// Reads big-endian fields off the front.
pub(crate) struct Reader<'data>(pub(crate) &'data [u8]);

impl<'data> Reader<'data> {
    /// The next `length` bytes, if there are so many.
    pub(crate) fn try_take(&mut self, length: u64) -> Option<&'data [u8]> {
        let (taken, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(taken)
    }

    pub(crate) fn try_number(&mut self, bytes: u64) -> Option<u64> {
        Some(self.try_take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    pub(crate) fn take(&mut self, length: u64) -> &'data [u8] {
        self.try_take(length).expect("the server sends whole messages")
    }

    pub(crate) fn number(&mut self, bytes: u64) -> u64 {
        self.try_number(bytes).expect("the server sends whole messages")
    }

    fn short(&mut self) -> u32 {
        u32::try_from(self.number(4)).expect("four bytes")
    }
}

pub(crate) fn option_replies(bytes: &[u8]) -> Vec<OptionReply> {
    let mut reader = Reader(bytes);
    let mut replies = Vec::new();
    while !reader.0.is_empty() {
        expect(reader.number(8), 0x3_e889_0455_65a9);
        let (option, kind, length) = (reader.short(), reader.short(), reader.number(4));
        replies.push(OptionReply { option, kind, data: reader.take(length).to_vec() });
    }
    replies
}

/// The replies and chunks in `bytes`; the data of reads is not there.
pub(crate) fn replies(bytes: &[u8]) -> Vec<Reply> {
    let mut reader = Reader(bytes);
    let mut replies = Vec::new();
    while !reader.0.is_empty() {
        replies.push(match reader.number(4) {
            0x6744_6698 => Reply::Simple { error: reader.short(), cookie: reader.number(8) },
            0x668e_33ef => chunk(&mut reader, false),
            0x6e8a_278c => chunk(&mut reader, true),
            other => unreachable!("reply magic {other:#x}"),
        });
    }
    replies
}

fn chunk(reader: &mut Reader<'_>, extended: bool) -> Reply {
    let (flags, kind, cookie) = (reader.number(2), reader.number(2), reader.number(8));
    let echo = extended.then(|| reader.number(8));
    let length = reader.number(if extended { 8 } else { 4 });
    assert!(flags <= 1, "no flag but DONE");
    let body = match kind {
        0 => {
            expect((flags, length), (1, 0));
            Body::None
        }
        1 => {
            assert!(length >= 9, "data is not empty");
            Body::Data { offset: reader.number(8), length: length - 8 }
        }
        2 => {
            expect(length, 12);
            Body::Hole { offset: reader.number(8), length: reader.number(4) }
        }
        5 => status(&mut Reader(reader.take(length)), 4),
        6 => {
            assert!(extended, "only extended headers have this type");
            status(&mut Reader(reader.take(length)), 8)
        }
        0x8001 => {
            let (error, text) = (reader.short(), reader.number(2));
            expect(length, 6 + text);
            let text = str::from_utf8(reader.take(text)).expect("texts are UTF-8");
            assert!(error != 0, "an error has a number");
            Body::Error { error, text: text.to_owned() }
        }
        other => unreachable!("chunk type {other:#x}"),
    };
    Reply::Chunk { cookie, echo, done: flags == 1, body }
}

/// A status whose numbers have `width` bytes.
fn status(reader: &mut Reader<'_>, width: u64) -> Body {
    let context = reader.number(4);
    let count = (width == 8).then(|| reader.number(4));
    let mut extents = Vec::new();
    while !reader.0.is_empty() {
        extents.push((reader.number(width), reader.number(width)));
    }
    assert!(!extents.is_empty(), "a status has an extent");
    let found = u64::try_from(extents.len()).ok();
    assert!(count.is_none_or(|count| count == 0 || Some(count) == found), "the count is true");
    Body::Status { context, extents }
}

fn expect<T: PartialEq + Debug>(found: T, expected: T) {
    assert_eq!(found, expected, "the server's message is well-formed");
}
