//! Whole sessions, cut anywhere, against a model of what a client may expect.

use block::{ByteRange, HostCommand};
use proptest::prelude::*;

use super::client::{Request, export_request, option, option_replies};
use crate::nbd::fuzz::{self, connect, transmit};
use crate::nbd::{CloseReason, Cookie, Event, HandshakeOutput, ReplyStyle};

const SIZE: u64 = 1 << 20;
const ACK: u32 = 1;
const UNSUP: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;

#[derive(Clone, Debug)]
enum Haggle {
    List,
    Structured { data: Vec<u8> },
    Info { name: String, wanted: Vec<u16> },
    Unserved { number: u32, data: Vec<u8> },
}

#[derive(Clone, Debug)]
enum Ending {
    Go { name: &'static str },
    ExportName { name: &'static str },
    Abort,
}

fn haggle() -> impl Strategy<Value = Haggle> {
    let data = || prop::collection::vec(any::<u8>(), 0..20);
    let name =
        prop_oneof![Just("disk".to_owned()), Just("replica".to_owned()), "[a-zä]{0,9}".prop_map(|name| name)];
    prop_oneof![
        Just(Haggle::List),
        Just(Haggle::Structured { data: Vec::new() }),
        data().prop_map(|data| Haggle::Structured { data }),
        (name, prop::collection::vec(0_u16..5, 0..6))
            .prop_map(|(name, wanted)| Haggle::Info { name, wanted }),
        (9_u32..20, data()).prop_map(|(number, data)| Haggle::Unserved { number, data }),
    ]
}

fn ending() -> impl Strategy<Value = Ending> {
    prop_oneof![
        4 => Just(Ending::Go { name: "disk" }),
        2 => Just(Ending::Go { name: "frozen" }),
        2 => Just(Ending::ExportName { name: "disk" }),
        1 => Just(Ending::Abort),
    ]
}

fn requests() -> impl Strategy<Value = Vec<Request>> {
    let request = (
        prop_oneof![8 => 0_u16..7, 1 => any::<u16>()],
        prop_oneof![3 => Just(0_u16), 2 => 0_u16..8, 1 => any::<u16>()],
        any::<u64>(),
        prop_oneof![4 => 0..SIZE, 1 => SIZE - 300..SIZE + 300, 1 => any::<u64>()],
        prop_oneof![1 => Just(0_u32), 6 => 1_u32..600],
    );
    let request = request.prop_map(|(kind, flags, cookie, offset, length)| Request {
        flags,
        kind,
        cookie,
        offset: if kind == 3 && length < 300 { 0 } else { offset },
        length: if kind == 3 && length < 300 { 0 } else { length },
    });
    prop::collection::vec(request, 0..12)
}

/// The option replies, as (option, reply type), that a client may expect.
fn expected_replies(options: &[Haggle]) -> Vec<(u32, u32)> {
    let mut replies = Vec::new();
    for haggle in options {
        match haggle {
            Haggle::List => replies.extend([(3, 2), (3, 2), (3, 2), (3, ACK)]),
            Haggle::Structured { data } if data.is_empty() => replies.push((8, ACK)),
            Haggle::Structured { .. } => replies.push((8, INVALID)),
            Haggle::Info { name, wanted } if name == "disk" => {
                let known = (1..=3).filter(|kind| wanted.contains(kind)).count();
                replies.extend(vec![(6, 3); 1 + known]);
                replies.push((6, ACK));
            }
            Haggle::Info { name, .. } if name == "replica" => replies.push((6, 0x8000_0002)),
            Haggle::Info { .. } => replies.push((6, 0x8000_0006)),
            Haggle::Unserved { number, .. } => replies.push((*number, UNSUP)),
        }
    }
    replies
}

fn encode(haggle: &Haggle) -> Vec<u8> {
    match haggle {
        Haggle::List => option(3, b""),
        Haggle::Structured { data } => option(8, data),
        Haggle::Info { name, wanted } => option(6, &export_request(name, wanted)),
        Haggle::Unserved { number, data } => option(*number, data),
    }
}

/// What a client may expect of a request: the command, or the error number.
fn expected(request: &Request, structured: bool, read_only: bool) -> Result<Option<HostCommand>, u32> {
    let Request { kind, flags, offset, length, .. } = *request;
    let end = u128::from(offset) + u128::from(length);
    let flag = |bit: u16| flags & (1 << bit) != 0;
    let only = |bits: &[u16]| (0..16).all(|bit| !flag(bit) || bits.contains(&bit));
    let flags_known = match kind {
        0 if structured => only(&[0, 2]),
        0 | 1 | 3 | 4 => only(&[0]),
        6 => only(&[0, 1]),
        _ => false,
    };
    if !flags_known {
        return Err(22);
    }
    if kind == 3 {
        return if end == 0 { Ok(Some(HostCommand::Flush)) } else { Err(22) };
    }
    if read_only && kind != 0 {
        return Err(1);
    }
    if end > u128::from(SIZE) {
        return Err(if kind == 1 || kind == 6 { 28 } else { 22 });
    }
    let (range, fua) = (ByteRange::new(offset, u64::from(length)).unwrap(), flag(0));
    Ok((length > 0).then_some(match kind {
        0 => HostCommand::Read { range },
        1 => HostCommand::Write { range, fua },
        4 => HostCommand::Trim { range, fua },
        _ => HostCommand::WriteZeroes { range, fua, no_hole: flag(1), fast: false },
    }))
}

fn compare_events(requests: &[Request], events: &[Event], structured: bool, read_only: bool) {
    let mut events = events.iter();
    for request in requests {
        let event = *events.next().unwrap();
        if request.kind == 2 {
            assert_eq!(event, Event::Disconnect);
            break;
        }
        let cookie = Cookie(request.cookie);
        match (expected(request, structured, read_only), event) {
            (Err(number), Event::Refused { cookie: named, refusal }) => {
                assert_eq!((named, crate::nbd::errno(refusal.error())), (cookie, number));
            }
            (Ok(None), event) => assert_eq!(event, Event::Served { cookie }),
            (Ok(Some(command @ HostCommand::Write { .. })), event) => {
                let length = request.length;
                assert_eq!(event, Event::WritePayload { cookie, command, length });
            }
            (Ok(Some(command)), event) => assert_eq!(event, Event::Request { cookie, command }),
            (expected, event) => panic!("{request:?}: expected {expected:?}, got {event:?}"),
        }
    }
    assert_eq!(events.next(), None);
}

/// The handshake's outputs after the greeting: the option replies and how it ended.
fn split(outputs: &[HandshakeOutput]) -> (Vec<u8>, &HandshakeOutput) {
    let (end, sends) = outputs[1..].split_last().unwrap();
    let bytes = sends.iter().flat_map(|output| match output {
        HandshakeOutput::Send(bytes) => bytes.to_vec(),
        HandshakeOutput::Established(_) | HandshakeOutput::Close(_) => {
            panic!("the handshake went on after {output:?}")
        }
    });
    (bytes.collect(), end)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_session_is_the_same_however_it_is_cut(
        options in prop::collection::vec(haggle(), 0..6),
        ending in ending(),
        requests in requests(),
        cut in 1_usize..200,
    ) {
        let structured = options
            .iter()
            .any(|haggle| matches!(haggle, Haggle::Structured { data } if data.is_empty()));
        let mut stream = vec![0, 0, 0, 3];
        stream.extend(options.iter().flat_map(encode));
        let mut replies = expected_replies(&options);
        let mut bare_bytes = 0;
        match ending {
            Ending::Go { name } => {
                stream.extend(option(7, &export_request(name, &[])));
                replies.extend([(7, 3), (7, ACK)]);
            }
            Ending::ExportName { name } => {
                stream.extend(option(1, name.as_bytes()));
                bare_bytes = 10;
            }
            Ending::Abort => {
                stream.extend(option(2, b""));
                replies.push((2, ACK));
            }
        }
        for request in &requests {
            stream.extend(request.encode());
            if request.kind == 1 {
                stream.extend(vec![0x5a; usize::try_from(request.length).unwrap()]);
            }
        }

        let outcome = connect(&stream, cut);
        let (sent, end) = split(&outcome.handshake);
        let got: Vec<_> = option_replies(&sent[..sent.len() - bare_bytes])
            .iter()
            .map(|reply| (reply.option, reply.kind))
            .collect();
        prop_assert_eq!(got, replies);
        match end {
            HandshakeOutput::Established(negotiated) => {
                prop_assert_eq!(negotiated.reply_style == ReplyStyle::Structured, structured);
                compare_events(&requests, &outcome.events, structured, negotiated.read_only);
            }
            HandshakeOutput::Close(reason) => prop_assert_eq!(reason, &CloseReason::Aborted),
            HandshakeOutput::Send(_) => prop_assert!(false, "the handshake did not end"),
        }
    }

    #[test]
    fn garbage_behind_a_good_start_never_panics(
        prefix in 0_usize..120,
        garbage in prop::collection::vec(any::<u8>(), 0..400),
        cut: u8,
    ) {
        let start = [
            &[cut, 0, 0, 0, 3][..],
            &option(8, b""),
            &option(3, b""),
            &option(7, &export_request("disk", &[3])),
            &Request { flags: 0, kind: 1, cookie: 1, offset: 0, length: 5 }.encode(),
        ]
        .concat();
        let data = [&start[..prefix.min(start.len())], &garbage].concat();
        fuzz::handshake(&data);
        fuzz::transmission(&data);
    }

    #[test]
    fn requests_with_random_fields_never_panic(fields: Vec<(u16, u16, u64, u64, u32)>, choice: u8) {
        let mut data = vec![choice];
        for (flags, kind, cookie, offset, length) in fields {
            let (kind, length) = (kind % 9, length & (u32::MAX >> (cookie % 32)));
            data.extend(Request { flags: flags % 64, kind, cookie, offset, length }.encode());
        }
        fuzz::transmission(&data);
    }
}

#[test]
fn an_endless_stream_of_nothing_needs_no_memory() {
    let data = vec![0; 1 << 16];
    fuzz::handshake(&data);
    fuzz::transmission(&data);
    assert!(connect(&[], 1).events.is_empty());
    let negotiated = match connect(&[&[0, 0, 0, 3][..], &option(1, b"disk")].concat(), 3).handshake.pop() {
        Some(HandshakeOutput::Established(negotiated)) => negotiated,
        other => panic!("{other:?}"),
    };
    assert!(transmit(&negotiated, &[], 1).is_empty());
}
