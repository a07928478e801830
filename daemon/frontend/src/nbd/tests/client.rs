//! A client's half of the codecs, written from the specification and not from the server's half.

/// One reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OptionReply {
    pub(super) option: u32,
    pub(super) kind: u32,
    pub(super) data: Vec<u8>,
}

/// One reply of the transmission phase, without read data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Simple { error: u32, cookie: u64 },
    None { cookie: u64 },
    Data { cookie: u64, offset: u64, length: u64 },
    Error { cookie: u64, error: u32, text: String },
}

/// The fields of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) kind: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

impl Request {
    /// The header, without payload.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13];
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        bytes.extend(self.length.to_be_bytes());
        bytes
    }
}

pub(super) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = option_header(number, u32::try_from(data.len()).unwrap());
    bytes.extend(data);
    bytes
}

pub(super) fn option_header(number: u32, length: u32) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

/// The data of INFO and GO.
pub(super) fn export_request(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(wanted.len()).unwrap().to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

/// Reads big-endian fields off the front.
pub(super) struct Reader<'data>(pub(super) &'data [u8]);

impl Reader<'_> {
    pub(super) fn take(&mut self, length: usize) -> Vec<u8> {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken.to_vec()
    }

    pub(super) fn number(&mut self, bytes: usize) -> u64 {
        self.take(bytes).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    fn short(&mut self) -> u32 {
        u32::try_from(self.number(4)).unwrap()
    }
}

pub(super) fn option_replies(bytes: &[u8]) -> Vec<OptionReply> {
    let mut reader = Reader(bytes);
    let mut replies = Vec::new();
    while !reader.0.is_empty() {
        assert_eq!(reader.number(8), 0x3_e889_0455_65a9);
        let (option, kind, length) = (reader.short(), reader.short(), reader.short());
        let data = reader.take(usize::try_from(length).unwrap());
        replies.push(OptionReply { option, kind, data });
    }
    replies
}

/// The one reply in `bytes`; the data of a read is not there.
pub(super) fn reply(bytes: &[u8]) -> Reply {
    let mut reader = Reader(bytes);
    let reply = match reader.number(4) {
        0x6744_6698 => Reply::Simple { error: reader.short(), cookie: reader.number(8) },
        0x668e_33ef => {
            let (flags, kind) = (reader.number(2), reader.number(2));
            let (cookie, length) = (reader.number(8), reader.number(4));
            assert_eq!(flags, 1, "the only chunk is the last");
            match kind {
                0 => {
                    assert_eq!(length, 0);
                    Reply::None { cookie }
                }
                1 => Reply::Data { cookie, offset: reader.number(8), length: length - 8 },
                0x8001 => {
                    let error = reader.short();
                    let text = reader.number(2);
                    assert_eq!(length, 6 + text);
                    let text = String::from_utf8(reader.take(usize::try_from(text).unwrap())).unwrap();
                    Reply::Error { cookie, error, text }
                }
                other => panic!("chunk type {other}"),
            }
        }
        other => panic!("reply magic {other:#x}"),
    };
    assert!(reader.0.is_empty(), "nothing is left over");
    reply
}
