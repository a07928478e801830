//! The handshake, option by option.

use block::{ByteCount, VolumeId};
use bytes::Bytes;

use super::client::{OptionReply, Reader, export_request, option, option_header, option_replies};
use crate::nbd::fuzz::{Exports, connect};
use crate::nbd::{
    CloseReason, Event, ExportDirectory, ExportInfo, ExportRefusal, Handshake, HandshakeOutput, Negotiated,
    OPTIONS_MAX, OptionFault, ReplyStyle,
};

const ACK: u32 = 1;
const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

const FLAGS: [u8; 4] = [0, 0, 0, 3];
const GO: u32 = 7;
const INFO: u32 = 6;

/// The outputs to `stream` after the greeting.
fn outputs(stream: &[u8]) -> Vec<HandshakeOutput> {
    connect(stream, stream.len()).handshake.split_off(1)
}

fn sent(output: &HandshakeOutput) -> &Bytes {
    match output {
        HandshakeOutput::Send(bytes) => bytes,
        HandshakeOutput::Established(_) | HandshakeOutput::Close(_) => panic!("not a reply: {output:?}"),
    }
}

/// The replies to options after the client flags, where none ends the handshake.
fn replies(options: &[Vec<u8>]) -> Vec<OptionReply> {
    let stream = [&FLAGS[..], &options.concat()].concat();
    let outputs = outputs(&stream);
    outputs.iter().flat_map(|output| option_replies(sent(output))).collect()
}

fn kinds(options: &[Vec<u8>]) -> Vec<u32> {
    replies(options).iter().map(|reply| reply.kind).collect()
}

#[test]
fn the_greeting_offers_fixed_newstyle_without_zeroes() {
    let HandshakeOutput::Send(greeting) = Handshake::new().poll_output().unwrap() else {
        panic!("the greeting comes first");
    };
    assert_eq!(greeting, &b"NBDMAGICIHAVEOPT\0\x03"[..]);
}

#[test]
fn unknown_client_flags_close_the_connection() {
    let closed = outputs(&[0, 0, 0, 7]);
    assert_eq!(closed, [HandshakeOutput::Close(CloseReason::ClientFlags(7))]);
}

#[test]
fn something_else_than_an_option_closes_the_connection() {
    let closed = outputs(b"\0\0\0\x01GET / HTTP/1.1\r\n");
    let magic = u64::from_be_bytes(*b"GET / HT");
    assert_eq!(closed, [HandshakeOutput::Close(CloseReason::OptionMagic(magic))]);
}

#[test]
fn a_list_names_every_export() {
    let replies = replies(&[option(3, b"")]);
    let names: Vec<_> =
        replies.iter().filter(|reply| reply.kind == 2).map(|reply| reply.data[4..].to_vec()).collect();
    assert_eq!(names, [&b"disk"[..], b"frozen", b"replica"]);
    assert_eq!(replies[3].kind, ACK);
    assert_eq!(replies[0].data[..4], [0, 0, 0, 4]);
}

#[test]
fn info_answers_what_was_asked_and_ignores_the_rest() {
    let replies = replies(&[option(INFO, &export_request("disk", &[3, 99, 1, 2, 1]))]);
    let infos: Vec<_> = replies.iter().map(|reply| reply.data.clone()).collect();
    let mut export = Reader(&infos[0]);
    assert_eq!((export.number(2), export.number(8)), (0, 1 << 20));
    assert_eq!(export.number(2), 0b1_0110_1101, "no DF without structured replies");
    assert_eq!(infos[1], b"\0\x01disk");
    assert_eq!(infos[2], b"\0\x02a disk");
    let mut sizes = Reader(&infos[3]);
    let sizes = [2, 4, 4, 4].map(|bytes| sizes.number(bytes));
    assert_eq!(sizes, [3, 1, 4096, 32 << 20]);
    assert_eq!(replies[4].kind, ACK);
    assert_eq!(replies.len(), 5);
}

#[test]
fn structured_replies_change_the_flags_and_read_only_shows() {
    let replies = replies(&[option(8, b""), option(INFO, &export_request("frozen", &[]))]);
    assert_eq!((replies[0].option, replies[0].kind), (8, ACK));
    assert_eq!(replies[1].data[10..], 0b1_1000_1111_u16.to_be_bytes());
}

#[test]
fn refused_exports_say_why_and_the_handshake_goes_on() {
    let replies = replies(&[
        option(GO, &export_request("replica", &[])),
        option(GO, &export_request("nothing", &[3])),
        option(INFO, &export_request("", &[])),
    ]);
    let kinds: Vec<_> = replies.iter().map(|reply| reply.kind).collect();
    assert_eq!(kinds, [POLICY, UNKNOWN, UNKNOWN]);
    assert_eq!(replies[0].data, b"volume 'replica' is a secondary");
}

#[test]
fn options_that_are_not_served_are_consumed() {
    let unserved = [4, 5, 9, 10, 11, 4711].map(|number| option(number, b"some data"));
    let replies = replies(&unserved);
    assert!(replies.iter().all(|reply| reply.kind == UNSUP && reply.data.is_empty()));
    assert_eq!(replies.len(), 6);
}

#[test]
fn malformed_options_are_invalid() {
    let mut lengths = export_request("disk", &[1]);
    lengths.push(0);
    let bad = [
        option(3, b"x"),
        option(8, b"x"),
        option(INFO, b""),
        option(GO, &[0xff; 40]),
        option(GO, &lengths),
        option(GO, &export_request(&"n".repeat(4097), &[])),
        option(GO, &export_request("di\0sk", &[])),
        option(GO, &[0, 0, 0, 1, 0xff, 0, 0]),
    ];
    assert_eq!(kinds(&bad), [INVALID; 8]);
}

#[test]
fn an_option_beyond_the_bound_is_consumed_and_refused() {
    let long = vec![0; (64 << 10) + 1];
    let options = [option(GO, &long), option(77, &long), option(3, &long), option(8, b"")];
    assert_eq!(kinds(&options), [TOO_BIG, UNSUP, INVALID, ACK]);
}

#[test]
fn an_option_at_the_bound_is_served() {
    let data = export_request("disk", &vec![1; ((64 << 10) - 10) / 2]);
    assert_eq!(data.len(), 64 << 10);
    assert_eq!(kinds(&[option(INFO, &data)]), [3, 3, ACK]);
}

#[test]
fn an_abort_is_acknowledged_whatever_its_data() {
    let stream = [&FLAGS[..], &option(2, b"bye")].concat();
    let outputs = outputs(&stream);
    assert_eq!(option_replies(sent(&outputs[0]))[0].kind, ACK);
    assert_eq!(outputs[1], HandshakeOutput::Close(CloseReason::Aborted));
}

#[test]
fn export_name_pads_unless_the_client_declines() {
    for (flags, length) in [(1, 10 + 124), (3, 10)] {
        let stream = [&[0, 0, 0, flags][..], &option(1, b"disk")].concat();
        let outputs = outputs(&stream);
        let reply = sent(&outputs[0]);
        assert_eq!(reply.len(), length);
        assert_eq!(reply[..8], (1_u64 << 20).to_be_bytes());
        assert!(reply[10..].iter().all(|byte| *byte == 0));
        assert!(matches!(&outputs[1], HandshakeOutput::Established(_)));
    }
}

#[test]
fn export_name_closes_the_connection_where_it_is_refused() {
    let refused = |name: &str, refusal| CloseReason::ExportRefused { name: name.to_owned(), refusal };
    let secondary = ExportRefusal::NotPresented { reason: "volume 'replica' is a secondary".to_owned() };
    let too_long = option_header(1, 4097);
    let cases = [
        (option(1, b"nothing"), refused("nothing", ExportRefusal::Unknown)),
        (option(1, b""), refused("", ExportRefusal::Unknown)),
        (option(1, b"replica"), refused("replica", secondary)),
        (option(1, b"\xff"), CloseReason::ExportName(OptionFault::NameNotText)),
        (too_long, CloseReason::ExportName(OptionFault::NameTooLong)),
    ];
    for (option, reason) in cases {
        let stream = [&FLAGS[..], &option].concat();
        assert_eq!(outputs(&stream), [HandshakeOutput::Close(reason)]);
    }
}

#[test]
fn go_establishes_and_leaves_pipelined_bytes_to_the_transmission() {
    let stream = [
        &FLAGS[..],
        &option(8, b""),
        &option(GO, &export_request("disk", &[])),
        &[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 2],
        &[0; 20],
    ]
    .concat();
    for cut in [1, 7, stream.len()] {
        let outcome = connect(&stream, cut);
        let expected = Negotiated {
            name: "disk".to_owned(),
            volume: VolumeId::default(),
            size: ByteCount(1 << 20),
            read_only: false,
            reply_style: ReplyStyle::Structured,
        };
        assert_eq!(outcome.handshake.last(), Some(&HandshakeOutput::Established(expected)));
        assert_eq!(outcome.events, [Event::Disconnect]);
    }
}

#[test]
fn nothing_is_consumed_while_outputs_wait_or_after_the_end() {
    let mut handshake = Handshake::new();
    assert_eq!(handshake.handle_input(&FLAGS, &Exports), 0);
    assert!(handshake.poll_output().is_some());
    let stream = [&FLAGS[..], &option(2, b""), &option(8, b"")].concat();
    assert_eq!(handshake.handle_input(&stream, &Exports), 20);
    while handshake.poll_output().is_some() {}
    assert_eq!(handshake.handle_input(&stream, &Exports), 0);
}

#[test]
fn a_client_that_never_chooses_is_closed() {
    let mut stream = FLAGS.to_vec();
    for _ in 0..=OPTIONS_MAX {
        stream.extend(option(4, b""));
    }
    let outputs = outputs(&stream);
    assert_eq!(outputs.last(), Some(&HandshakeOutput::Close(CloseReason::TooManyOptions)));
}

#[test]
fn an_empty_name_means_the_only_export() {
    struct Lone;
    impl ExportDirectory for Lone {
        fn list(&self) -> Vec<String> {
            vec!["disk".to_owned()]
        }
        fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
            Exports.find(name)
        }
    }
    let stream = [&FLAGS[..], &option(GO, &export_request("", &[1]))].concat();
    let mut handshake = Handshake::new();
    handshake.poll_output().unwrap();
    assert_eq!(handshake.handle_input(&stream, &Lone), stream.len());
    let replies = option_replies(sent(&handshake.poll_output().unwrap()));
    assert_eq!(replies[1].data, b"\0\x01disk");
    let Some(HandshakeOutput::Established(negotiated)) = handshake.poll_output() else {
        panic!("the export is established");
    };
    assert_eq!(negotiated.name, "disk");
}
