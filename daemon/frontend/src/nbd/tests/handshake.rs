//! The handshake, option by option.

use block::{ByteCount, VolumeId};
use bytes::Bytes;

use crate::nbd::fuzz::client::{
    OptionReply, Reader, context_request, export_request, option, option_header, option_replies,
};
use crate::nbd::fuzz::{Exports, connect};
use crate::nbd::{
    CloseReason, Event, ExportDirectory, ExportInfo, ExportRefusal, Handshake, HandshakeOutput, Negotiated,
    OPTIONS_MAX, OptionFault, ReplyStyle, TlsMode,
};

const ACK: u32 = 1;
const UNSUP: u32 = 0x8000_0001;
const POLICY: u32 = 0x8000_0002;
const INVALID: u32 = 0x8000_0003;
const TLS_REQUIRED: u32 = 0x8000_0005;
const UNKNOWN: u32 = 0x8000_0006;
const TOO_BIG: u32 = 0x8000_0009;

const FLAGS: [u8; 4] = [0, 0, 0, 3];
const GO: u32 = 7;
const INFO: u32 = 6;
const STARTTLS: u32 = 5;
const STRUCTURED: u32 = 8;
const LIST_CONTEXTS: u32 = 9;
const SET_CONTEXTS: u32 = 10;
const EXTENDED: u32 = 11;
const CLEAR: Exports = Exports { tls: false };

/// The outputs to `stream` after the greeting.
fn outputs(stream: &[u8]) -> Vec<HandshakeOutput> {
    outputs_with(TlsMode::Off, stream)
}

fn outputs_with(tls: TlsMode, stream: &[u8]) -> Vec<HandshakeOutput> {
    connect(tls, stream, stream.len()).handshake.split_off(1)
}

fn sent(output: &HandshakeOutput) -> &Bytes {
    match output {
        HandshakeOutput::Send(bytes) => bytes,
        HandshakeOutput::StartTls | HandshakeOutput::Established(_) | HandshakeOutput::Close(_) => {
            panic!("not a reply: {output:?}")
        }
    }
}

/// The replies to options after the client flags, where none ends the handshake.
fn replies(options: &[Vec<u8>]) -> Vec<OptionReply> {
    let stream = [&FLAGS[..], &options.concat()].concat();
    let outputs = outputs(&stream);
    outputs.iter().flat_map(|output| option_replies(sent(output))).collect()
}

/// The replies' types where TLS is served, up to the end of the handshake.
fn kinds_with(tls: TlsMode, options: &[Vec<u8>]) -> Vec<u32> {
    let stream = [&FLAGS[..], &options.concat()].concat();
    let outputs = outputs_with(tls, &stream);
    let sends = outputs.iter().filter(|output| matches!(output, HandshakeOutput::Send(_)));
    sends.flat_map(|output| option_replies(sent(output))).map(|reply| reply.kind).collect()
}

fn established(tls: TlsMode, options: &[Vec<u8>]) -> Negotiated {
    let stream = [&FLAGS[..], &options.concat()].concat();
    match outputs_with(tls, &stream).pop() {
        Some(HandshakeOutput::Established(negotiated)) => negotiated,
        other => panic!("no export: {other:?}"),
    }
}

fn kinds(options: &[Vec<u8>]) -> Vec<u32> {
    replies(options).iter().map(|reply| reply.kind).collect()
}

#[test]
fn the_greeting_offers_fixed_newstyle_without_zeroes() {
    let HandshakeOutput::Send(greeting) = Handshake::new(TlsMode::Off).poll_output().unwrap() else {
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
    assert_eq!(names, [&b"disk"[..], b"frozen", b"huge", b"replica"]);
    assert_eq!(replies[4].kind, ACK);
    assert_eq!(replies[0].data[..4], [0, 0, 0, 4]);
}

#[test]
fn info_answers_what_was_asked_and_ignores_the_rest() {
    let replies = replies(&[option(INFO, &export_request("disk", &[3, 99, 1, 2, 1]))]);
    let infos: Vec<_> = replies.iter().map(|reply| reply.data.clone()).collect();
    let mut export = Reader(&infos[0]);
    assert_eq!((export.number(2), export.number(8)), (0, 1 << 20));
    assert_eq!(export.number(2), 0b1101_0110_1101, "no DF without structured replies");
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
    assert_eq!(replies[1].data[10..], 0b101_1000_1111_u16.to_be_bytes());
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
    let unserved = [0, 4, 12, 13, 4711, 1 << 31].map(|number| option(number, b"some data"));
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
        let outcome = connect(TlsMode::Off, &stream, cut);
        let expected = Negotiated {
            name: "disk".to_owned(),
            volume: VolumeId::default(),
            size: ByteCount(1 << 20),
            read_only: false,
            reply_style: ReplyStyle::Structured,
            base_allocation: false,
        };
        assert_eq!(outcome.handshake.last(), Some(&HandshakeOutput::Established(expected)));
        assert_eq!(outcome.events, [Event::Disconnect]);
    }
}

#[test]
fn nothing_is_consumed_while_outputs_wait_or_after_the_end() {
    let mut handshake = Handshake::new(TlsMode::Off);
    assert_eq!(handshake.handle_input(&FLAGS, &CLEAR), 0);
    assert!(handshake.poll_output().is_some());
    let stream = [&FLAGS[..], &option(2, b""), &option(8, b"")].concat();
    assert_eq!(handshake.handle_input(&stream, &CLEAR), 20);
    while handshake.poll_output().is_some() {}
    assert_eq!(handshake.handle_input(&stream, &CLEAR), 0);
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
            CLEAR.find(name)
        }
    }
    let stream = [&FLAGS[..], &option(GO, &export_request("", &[1]))].concat();
    let mut handshake = Handshake::new(TlsMode::Off);
    handshake.poll_output().unwrap();
    assert_eq!(handshake.handle_input(&stream, &Lone), stream.len());
    let replies = option_replies(sent(&handshake.poll_output().unwrap()));
    assert_eq!(replies[1].data, b"\0\x01disk");
    let Some(HandshakeOutput::Established(negotiated)) = handshake.poll_output() else {
        panic!("the export is established");
    };
    assert_eq!(negotiated.name, "disk");
}

#[test]
fn contexts_are_listed_by_name_namespace_or_all() {
    let list = |queries: &[&[u8]]| option(LIST_CONTEXTS, &context_request("disk", queries));
    let all: [&[&[u8]]; 3] = [&[], &[b"base:"], &[b"base:allocation", b"base:allocation", b"base:"]];
    let none: [&[&[u8]]; 3] = [&[b"qemu:dirty-bitmap:x", b"x-y:"], &[b"base:other"], &[b"BASE:allocation"]];
    let found = vec![b"\0\0\0\0base:allocation".to_vec()];
    let cases = all.map(|queries| (queries, found.clone())).into_iter();
    for (queries, expected) in cases.chain(none.map(|queries| (queries, Vec::new()))) {
        let replies = replies(&[option(STRUCTURED, b""), list(queries)]);
        let found: Vec<_> =
            replies.iter().filter(|reply| reply.kind == 4).map(|reply| reply.data.clone()).collect();
        assert_eq!(found, expected);
        assert_eq!(replies.last().map(|reply| reply.kind), Some(ACK));
    }
}

#[test]
fn a_context_is_selected_for_one_export_by_its_exact_name() {
    let select = |export: &str, queries: &[&[u8]]| option(SET_CONTEXTS, &context_request(export, queries));
    let go = option(GO, &export_request("disk", &[]));
    let cases: [(Vec<u8>, bool); 5] = [
        (select("disk", &[b"x-y:z", b"base:allocation"]), true),
        (select("disk", &[b"base:"]), false),
        (select("disk", &[]), false),
        (select("frozen", &[b"base:allocation"]), false),
        (option(LIST_CONTEXTS, &context_request("disk", &[b"base:allocation"])), false),
    ];
    for style in [STRUCTURED, EXTENDED] {
        for (select, expected) in &cases {
            let negotiated = established(TlsMode::Off, &[option(style, b""), select.clone(), go.clone()]);
            assert_eq!(negotiated.base_allocation, *expected);
        }
    }
}

#[test]
fn selecting_replaces_the_whole_selection_even_where_it_fails() {
    let select = |export: &str, query: &[u8]| option(SET_CONTEXTS, &context_request(export, &[query]));
    let good = select("disk", b"base:allocation");
    let long = vec![0; (64 << 10) + 1];
    let failures = [
        select("disk", b"base:other"),
        select("nothing", b"base:allocation"),
        select("disk", b"no colon"),
        option(SET_CONTEXTS, b"\0"),
        option(SET_CONTEXTS, &long),
        select("huge", b"base:allocation"),
    ];
    for failure in failures {
        let go = option(GO, &export_request("disk", &[]));
        let options = [option(STRUCTURED, b""), good.clone(), failure, go];
        assert!(!established(TlsMode::Off, &options).base_allocation);
    }
    let go = option(GO, &export_request("disk", &[]));
    let listed = option(LIST_CONTEXTS, &context_request("disk", &[]));
    let options = [option(STRUCTURED, b""), good, listed, option(EXTENDED, b""), go];
    let negotiated = established(TlsMode::Off, &options);
    assert!(negotiated.base_allocation, "other options leave the selection alone");
}

#[test]
fn contexts_need_chunks_and_an_export() {
    let context = |number, name: &str| option(number, &context_request(name, &[b"base:allocation"]));
    assert_eq!(kinds(&[context(LIST_CONTEXTS, "disk"), context(SET_CONTEXTS, "disk")]), [INVALID; 2]);
    let options = [
        option(EXTENDED, b""),
        context(SET_CONTEXTS, "nothing"),
        context(SET_CONTEXTS, "replica"),
        context(LIST_CONTEXTS, "private"),
        context(LIST_CONTEXTS, "secret"),
    ];
    assert_eq!(kinds_with(TlsMode::Optional, &options), [ACK, UNKNOWN, POLICY, POLICY, POLICY]);
}

#[test]
fn malformed_context_options_are_invalid() {
    let good = context_request("disk", &[b"base:allocation"]);
    let mut trailing = good.clone();
    trailing.push(0);
    let mut counted = good.clone();
    counted[8..12].fill(0xff);
    let long = vec![b'x'; 4097];
    let bad = [
        &good[..good.len() - 1],
        &good[..11],
        &trailing,
        &counted,
        &context_request("disk", &[b"leaf"]),
        &context_request("disk", &[b":leaf"]),
        &context_request("disk", &[b"base:\xff"]),
        &context_request("disk", &[&[b"x:", &long[..]].concat()]),
    ];
    for data in bad {
        let options = [option(STRUCTURED, b""), option(SET_CONTEXTS, data), option(LIST_CONTEXTS, data)];
        assert_eq!(kinds(&options), [ACK, INVALID, INVALID]);
    }
}

#[test]
fn extended_headers_win_and_cannot_be_taken_back() {
    let options =
        [option(STRUCTURED, b""), option(EXTENDED, b"x"), option(EXTENDED, b""), option(STRUCTURED, b"")];
    assert_eq!(kinds(&options), [ACK, INVALID, ACK, 0x8000_000a]);
    let go = option(GO, &export_request("disk", &[]));
    let negotiated = established(TlsMode::Off, &[&options[..], &[go]].concat());
    assert_eq!(negotiated.reply_style, ReplyStyle::Extended);
}

#[test]
fn export_name_after_extended_headers_closes_the_connection() {
    let stream = [&FLAGS[..], &option(EXTENDED, b""), &option(1, b"disk")].concat();
    let last = outputs(&stream).pop();
    assert_eq!(last, Some(HandshakeOutput::Close(CloseReason::ExportNameExtended)));
}

#[test]
fn status_payloads_are_offered_with_extended_headers_and_a_context() {
    let select = option(SET_CONTEXTS, &context_request("disk", &[b"base:allocation"]));
    let info = |name: &str| option(INFO, &export_request(name, &[]));
    let replies = replies(&[option(EXTENDED, b""), info("disk"), select, info("disk"), info("frozen")]);
    let flags: Vec<_> =
        replies.iter().filter(|reply| reply.kind == 3).map(|reply| reply.data[10] >> 4 & 1).collect();
    assert_eq!(flags, [0, 1, 0]);
}

#[test]
fn without_tls_starttls_is_a_matter_of_policy() {
    assert_eq!(kinds(&[option(STARTTLS, b""), option(STARTTLS, b"x")]), [POLICY, INVALID]);
    assert_eq!(kinds(&[option(INFO, &export_request("secret", &[]))]), [POLICY], "never TLS_REQD");
}

#[test]
fn tls_starts_once_and_everything_before_it_is_forgotten() {
    let select = option(SET_CONTEXTS, &context_request("disk", &[b"base:allocation"]));
    let options = [
        option(EXTENDED, b""),
        select.clone(),
        option(STARTTLS, b""),
        option(STARTTLS, b""),
        select,
        option(GO, &export_request("disk", &[])),
    ];
    for tls in [TlsMode::Optional, TlsMode::Required] {
        let kinds = kinds_with(tls, &options);
        let before = if tls == TlsMode::Optional { vec![ACK, 4, ACK] } else { vec![TLS_REQUIRED; 2] };
        assert_eq!(kinds, [&before[..], &[ACK, INVALID, INVALID, 3, ACK]].concat());
        let negotiated = established(tls, &options);
        assert_eq!(negotiated.reply_style, ReplyStyle::Simple);
        assert!(!negotiated.base_allocation);
    }
}

#[test]
fn nothing_is_consumed_behind_starttls_until_tls_is_up() {
    let mut handshake = Handshake::new(TlsMode::Optional);
    handshake.poll_output().unwrap();
    let head = [&FLAGS[..], &option(STARTTLS, b"")].concat();
    let injected = [&head[..], &option(STRUCTURED, b"")].concat();
    assert_eq!(handshake.handle_input(&injected, &CLEAR), head.len());
    assert!(matches!(handshake.poll_output(), Some(HandshakeOutput::Send(_))));
    assert_eq!(handshake.poll_output(), Some(HandshakeOutput::StartTls));
    assert_eq!(handshake.handle_input(&injected[head.len()..], &CLEAR), 0);
    handshake.secured();
    assert_eq!(handshake.handle_input(&option(STRUCTURED, b""), &Exports { tls: true }), 16);
    assert_eq!(option_replies(sent(&handshake.poll_output().unwrap()))[0].kind, ACK);
}

#[test]
#[should_panic(expected = "where STARTTLS asked")]
fn tls_cannot_come_up_unasked() {
    Handshake::new(TlsMode::Required).secured();
}

#[test]
fn where_tls_is_required_nothing_else_is_served_before() {
    let options = [
        option(3, b"x"),
        option(INFO, &export_request("disk", &[])),
        option(GO, b"malformed"),
        option(STRUCTURED, b""),
        option(EXTENDED, b""),
        option(SET_CONTEXTS, b""),
        option(4711, &vec![0; 100_000]),
    ];
    assert_eq!(kinds_with(TlsMode::Required, &options), [TLS_REQUIRED; 7]);
    assert_eq!(kinds_with(TlsMode::Required, &[option(2, b"")]), [ACK]);
    for option in [option(1, b"disk"), option_header(1, u32::MAX)] {
        let outputs = outputs_with(TlsMode::Required, &[&FLAGS[..], &option].concat());
        assert_eq!(outputs, [HandshakeOutput::Close(CloseReason::TlsRequired)]);
    }
}

#[test]
fn an_export_may_require_tls_where_it_is_optional() {
    let ask = |number| option(number, &export_request("secret", &[]));
    assert_eq!(kinds_with(TlsMode::Optional, &[ask(INFO), ask(GO)]), [TLS_REQUIRED; 2]);
    let stream = [&FLAGS[..], &option(1, b"secret")].concat();
    let refused =
        CloseReason::ExportRefused { name: "secret".to_owned(), refusal: ExportRefusal::TlsRequired };
    assert_eq!(outputs_with(TlsMode::Optional, &stream), [HandshakeOutput::Close(refused)]);
    let negotiated = established(TlsMode::Optional, &[option(STARTTLS, b""), ask(GO)]);
    assert_eq!(negotiated.name, "secret");
}

#[test]
fn over_tls_nobody_is_told_to_start_it() {
    struct Stubborn;
    impl ExportDirectory for Stubborn {
        fn list(&self) -> Vec<String> {
            Vec::new()
        }
        fn find(&self, _: &str) -> Result<ExportInfo, ExportRefusal> {
            Err(ExportRefusal::TlsRequired)
        }
    }
    let mut handshake = Handshake::new(TlsMode::Required);
    handshake.poll_output().unwrap();
    handshake.handle_input(&[&FLAGS[..], &option(STARTTLS, b"")].concat(), &Stubborn);
    while handshake.poll_output().is_some() {}
    handshake.secured();
    handshake.handle_input(&option(GO, &export_request("disk", &[])), &Stubborn);
    assert_eq!(option_replies(sent(&handshake.poll_output().unwrap()))[0].kind, POLICY);
}

#[test]
fn a_denied_client_is_told_why() {
    let replies = replies(&[option(GO, &export_request("private", &[]))]);
    assert_eq!((replies[0].kind, &replies[0].data[..]), (POLICY, &b"volume 'private' is not for you"[..]));
}

#[test]
fn a_client_without_fixed_newstyle_has_no_tls() {
    let flags = [0, 0, 0, 2];
    let closed = outputs_with(TlsMode::Required, &flags);
    assert_eq!(closed, [HandshakeOutput::Close(CloseReason::TlsRequired)]);
    let stream = [&flags[..], &option(STARTTLS, b""), &option(INFO, &export_request("secret", &[]))].concat();
    let kinds: Vec<_> = outputs_with(TlsMode::Optional, &stream)
        .iter()
        .map(|output| option_replies(sent(output))[0].kind)
        .collect();
    assert_eq!(kinds, [POLICY; 2]);
}

#[test]
fn options_before_and_after_tls_are_counted_together() {
    let half = usize::try_from(OPTIONS_MAX / 2).unwrap();
    let stream =
        [&FLAGS[..], &option(4, b"").repeat(half), &option(STARTTLS, b""), &option(4, b"").repeat(half)]
            .concat();
    let last = outputs_with(TlsMode::Optional, &stream).pop();
    assert_eq!(last, Some(HandshakeOutput::Close(CloseReason::TooManyOptions)));
}

#[test]
fn info_and_go_answer_alike() {
    let data = export_request("huge", &[1, 2, 3]);
    let options = [option(EXTENDED, b""), option(INFO, &data), option(GO, &data)];
    let stream = [&FLAGS[..], &options.concat()].concat();
    let outputs = outputs(&stream);
    let answers: Vec<Vec<_>> = outputs[1..3]
        .iter()
        .map(|output| {
            option_replies(sent(output)).into_iter().map(|reply| (reply.kind, reply.data)).collect()
        })
        .collect();
    assert_eq!(answers[0], answers[1]);
}
