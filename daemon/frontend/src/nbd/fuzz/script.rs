//! What a client does in one session, chosen by bytes: any bytes are a script, so that mutations of bytes are
//! mutations of what is done.

use super::super::TlsMode;
use super::client::{Request, context_request, export_request, option};

const OPTIONS_MAX: usize = 12;
const REQUESTS_MAX: usize = 24;

/// A session.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) tls: TlsMode,
    /// The stream arrives in pieces of at most so many bytes.
    pub(crate) cut: usize,
    pub(crate) client_flags: u32,
    pub(crate) options: Vec<Haggle>,
    pub(crate) requests: Vec<Ask>,
}

/// One option, by what a client means with it.
#[derive(Clone, Debug)]
pub(crate) enum Haggle {
    ExportName {
        name: String,
    },
    Info {
        go: bool,
        name: String,
        wanted: Vec<u16>,
    },
    Contexts {
        set: bool,
        name: String,
        queries: Vec<&'static [u8]>,
    },
    /// ABORT, LIST, STARTTLS, STRUCTURED_REPLY, EXTENDED_HEADERS, or a number that nobody knows; most come without
    /// data.
    Plain {
        number: u32,
        data: Vec<u8>,
    },
    /// INFO, GO or either of the context options, with data whose lengths are wrong.
    Malformed {
        number: u32,
    },
}

/// One request, and what comes behind it.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    pub(crate) request: Request,
    /// Contexts of a status request with payload, whose range is as long as this says.
    pub(crate) status: (u64, Vec<u32>),
    /// What the volume answers: an error, where it is odd.
    pub(crate) answer: u8,
}

impl Haggle {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::ExportName { name } => option(1, name.as_bytes()),
            Self::Info { go, name, wanted } => option(if *go { 7 } else { 6 }, &export_request(name, wanted)),
            Self::Contexts { set, name, queries } => {
                option(if *set { 10 } else { 9 }, &context_request(name, queries))
            }
            Self::Plain { number, data } => option(*number, data),
            Self::Malformed { number } => option(*number, &[0, 0, 0, 9, b'd']),
        }
    }
}

impl Script {
    pub(crate) fn from_bytes(data: &[u8]) -> Self {
        let mut choices = Choices(data);
        let tls = *choices.one_of(&[TlsMode::Off, TlsMode::Optional, TlsMode::Required]);
        let cut = 1 + usize::from(choices.byte());
        let client_flags = *choices.one_of(&[3, 3, 3, 3, 3, 1, 1, 2, 0, 4]);
        let mut options = Vec::new();
        // Half of the time the client asks for what makes the rest interesting.
        match choices.byte() % 8 {
            0 => options.push(plain(8)),
            1 => options.extend([plain(8), contexts("disk")]),
            2 => options.extend([plain(11), contexts("disk")]),
            3 => options.extend([plain(5), plain(11), contexts("huge")]),
            _ => {}
        }
        let count = usize::from(choices.byte()) % OPTIONS_MAX;
        options.extend((0..count).map(|_| choices.haggle()));
        // Most sessions come to something.
        match choices.byte() % 8 {
            0..=2 => options.push(Haggle::Info { go: true, name: "disk".to_owned(), wanted: Vec::new() }),
            3 | 4 => options.push(Haggle::Info { go: true, name: "huge".to_owned(), wanted: vec![3] }),
            5 => options.push(Haggle::Info { go: true, name: "frozen".to_owned(), wanted: vec![1, 2] }),
            6 => options.push(Haggle::ExportName { name: "disk".to_owned() }),
            _ => {}
        }
        let mut requests = Vec::new();
        while !choices.0.is_empty() && requests.len() < REQUESTS_MAX {
            requests.push(choices.ask());
        }
        Self { tls, cut, client_flags, options, requests }
    }
}

const fn plain(number: u32) -> Haggle {
    Haggle::Plain { number, data: Vec::new() }
}

fn contexts(name: &str) -> Haggle {
    Haggle::Contexts { set: true, name: name.to_owned(), queries: vec![b"base:allocation"] }
}

/// Bytes that are used up; behind their end come zeros.
struct Choices<'data>(&'data [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn number(&mut self, bytes: u32) -> u64 {
        (0..bytes).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    fn one_of<'list, T>(&mut self, list: &'list [T]) -> &'list T {
        let at = usize::from(self.byte()) % list.len();
        list.get(at).expect("the remainder is below the length")
    }

    fn one_in(&mut self, count: u8) -> bool {
        self.byte().is_multiple_of(count)
    }

    fn name(&mut self) -> String {
        let names =
            ["disk", "disk", "huge", "frozen", "replica", "private", "secret", "nothing", "", "d\0", "ä"];
        (*self.one_of(&names)).to_owned()
    }

    fn haggle(&mut self) -> Haggle {
        match self.byte() % 16 {
            0 => Haggle::ExportName { name: self.name() },
            1..=3 => {
                let (go, name) = (self.one_in(8), self.name());
                let wanted = (0..self.byte() % 5).map(|_| u16::from(self.byte() % 5)).collect();
                Haggle::Info { go, name, wanted }
            }
            4..=7 => {
                let (set, name) = (!self.one_in(4), self.name());
                let queries: [&[u8]; 8] = [
                    b"base:allocation",
                    b"base:allocation",
                    b"base:allocation",
                    b"base:",
                    b"qemu:allocation-depth",
                    b"base:other",
                    b"allocation",
                    b"base:\xff",
                ];
                let queries = (0..self.byte() % 4).map(|_| *self.one_of(&queries)).collect();
                Haggle::Contexts { set, name, queries }
            }
            8 => Haggle::Malformed { number: *self.one_of(&[6, 7, 9, 10]) },
            _ => {
                let number = *self.one_of(&[3, 3, 5, 5, 8, 8, 11, 11, 2, 4, 12, 4711]);
                let data = vec![0x55; usize::from(self.byte() / 0x30)];
                let data = if self.one_in(8) { data } else { Vec::new() };
                Haggle::Plain { number, data }
            }
        }
    }

    fn ask(&mut self) -> Ask {
        let kind = match self.byte() {
            byte @ 0..=239 => u16::from(byte % 9),
            byte => u16::from(byte) << 5,
        };
        let flags = match self.byte() {
            0..=127 => 0,
            byte @ 128..=239 => u16::from(byte & 0x3f),
            byte => u16::from(byte) << 3,
        };
        // A client that disconnects soon tests little.
        let kind = if kind == 2 && !self.one_in(4) { 7 } else { kind };
        let flags = if kind == 1 && !self.one_in(8) { flags | 1 << 5 } else { flags };
        let length = self.length();
        let offset = match self.byte() % 8 {
            0..=3 => self.number(2) << 4,
            4 => (1 << 20) - self.number(1),
            5 => (1 << 40) - self.number(2),
            6 => 0,
            _ => self.number(8),
        };
        let (offset, length) = if kind == 3 && !self.one_in(4) { (0, 0) } else { (offset, length) };
        let contexts = self.one_of(&[&[1][..], &[1], &[1], &[], &[1, 1], &[2], &[0, 1]]).to_vec();
        let request = Request { flags, kind, cookie: self.number(2) << 48 | 7, offset, length };
        Ask { request, status: (self.length(), contexts), answer: self.byte() }
    }

    fn length(&mut self) -> u64 {
        match self.byte() % 16 {
            0 => 0,
            1..=9 => 1 + self.number(1) * 3,
            10 => 1 << 20,
            11 => (64 << 20) + self.number(1),
            12 => self.number(5),
            13 => u64::from(u32::MAX) - 1 + self.number(1) % 4,
            14 => 1 << 40,
            _ => self.number(8),
        }
    }
}
