//! Replies as a client reads them.

use block::{ByteCount, ByteRange, Extent, HostError, VolumeId};
use bytes::BytesMut;
use proptest::prelude::*;

use crate::nbd::fuzz::client::{Body, Reply, Request, replies};
use crate::nbd::{
    Cookie, ERROR_REPLY_BYTES_MAX, Event, Negotiated, PAYLOAD_BYTES_MAX, REPLY_HEAD_BYTES_MAX, Refusal,
    ReplyStyle, STATUS_EXTENTS_MAX, Transmission, errno,
};

const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];
const ERRORS: [(HostError, u32); 6] = [
    (HostError::ReadOnly, 1),
    (HostError::Io, 5),
    (HostError::Invalid, 22),
    (HostError::NoSpace, 28),
    (HostError::NotSupported, 95),
    (HostError::Shutdown, 108),
];
const NAME: u64 = 0xfeed_0000_0000_0007;

/// The name of a request, as the machine gives it.
fn cookie(style: ReplyStyle, kind: u16, flags: u16, offset: u64, length: u64) -> Cookie {
    let negotiated = Negotiated {
        name: "disk".to_owned(),
        volume: VolumeId::default(),
        size: ByteCount(1 << 62),
        read_only: false,
        reply_style: style,
        base_allocation: true,
    };
    let request = Request { flags, kind, cookie: NAME, offset, length };
    let header = match style {
        ReplyStyle::Simple | ReplyStyle::Structured => request.encode(),
        ReplyStyle::Extended => request.encode_extended(),
    };
    let event = Transmission::new(&negotiated).parse(&header).event;
    let (Event::Request { cookie, .. } | Event::Served { cookie }) = event else {
        panic!("{event:?}");
    };
    cookie
}

fn only(style: ReplyStyle, offset: u64, body: Body) -> Reply {
    match style {
        ReplyStyle::Simple => Reply::Simple { error: 0, cookie: NAME },
        ReplyStyle::Structured => Reply::Chunk { cookie: NAME, echo: None, done: true, body },
        ReplyStyle::Extended => Reply::Chunk { cookie: NAME, echo: Some(offset), done: true, body },
    }
}

fn status(style: ReplyStyle, flags: u16, length: u64, extents: &[(u64, bool)]) -> Vec<(u64, u64)> {
    let extents: Vec<_> =
        extents.iter().map(|(length, zero)| Extent { length: *length, zero: *zero }).collect();
    let mut out = BytesMut::new();
    style.put_status(&mut out, cookie(style, 7, flags, 512, length), &extents);
    let [Reply::Chunk { body: Body::Status { extents, .. }, .. }] = &replies(&out)[..] else {
        panic!("one status");
    };
    extents.clone()
}

#[test]
fn errors_have_the_numbers_of_the_specification() {
    for (error, number) in ERRORS {
        assert_eq!(errno(error), number);
    }
    assert_eq!(Refusal::UnfragmentedTooLong.errno(), 75);
}

#[test]
fn with_chunks_no_reply_is_simple() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let cookie = cookie(style, 0, 0, 9, 100);
        let mut out = BytesMut::new();
        style.put_success(&mut out, cookie);
        assert_eq!(replies(&out.split()), [only(style, 9, Body::None)]);
        style.put_refusal(&mut out, cookie, Refusal::ReadOnly);
        let text = "the export is read-only".to_owned();
        assert_eq!(replies(&out), [only(style, 9, Body::Error { error: 1, text })]);
    }
}

#[test]
fn a_long_error_text_is_cut_at_a_character() {
    let mut out = BytesMut::new();
    let text = format!("x{}", "ä".repeat(300));
    ReplyStyle::Structured.put_error(&mut out, Cookie::default(), HostError::Io, &text);
    let [Reply::Chunk { body: Body::Error { text, .. }, .. }] = &replies(&out)[..] else {
        panic!("an error chunk");
    };
    assert_eq!(*text, format!("x{}", "ä".repeat(127)));
}

#[test]
fn a_read_comes_in_parts_unless_the_client_or_the_style_forbids_it() {
    for style in STYLES {
        assert_eq!(style.may_fragment(cookie(style, 0, 0, 0, 10)), style != ReplyStyle::Simple);
    }
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        assert!(!style.may_fragment(cookie(style, 0, 4, 0, 10)));
        let cookie = cookie(style, 0, 0, 4096, 8192);
        let range = |offset, length| ByteRange::new(offset, length).unwrap();
        let mut out = BytesMut::new();
        style.put_read_hole(&mut out, cookie, range(8192, 4096), false);
        style.put_read_data_head(&mut out, cookie, range(4096, 4096), true);
        let found = replies(&out);
        let Reply::Chunk { body: Body::Hole { offset: 8192, length: 4096 }, done: false, echo, .. } =
            found[0]
        else {
            panic!("{found:?}");
        };
        assert_eq!(echo, (style == ReplyStyle::Extended).then_some(4096));
        assert_eq!(found[1], only(style, 4096, Body::Data { offset: 4096, length: 4096 }));
    }
}

#[test]
fn an_error_may_follow_parts_of_a_read() {
    let style = ReplyStyle::Structured;
    let cookie = cookie(style, 0, 0, 0, 8192);
    let mut out = BytesMut::new();
    style.put_read_data_head(&mut out, cookie, ByteRange::new(0, 4096).unwrap(), false);
    style.put_error(&mut out, cookie, HostError::Io, "");
    let done: Vec<_> = replies(&out)
        .iter()
        .map(|reply| matches!(reply, Reply::Chunk { done: true, body: Body::Error { error: 5, .. }, .. }))
        .collect();
    assert_eq!(done, [false, true]);
}

#[test]
#[should_panic(expected = "only of what was asked")]
fn a_part_outside_of_the_request_is_never_sent() {
    let style = ReplyStyle::Structured;
    let cookie = cookie(style, 0, 0, 4096, 4096);
    style.put_read_data_head(&mut BytesMut::new(), cookie, ByteRange::new(0, 4097).unwrap(), true);
}

#[test]
fn a_status_never_tells_more_than_was_asked() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        assert_eq!(status(style, 0, 100, &[(1 << 50, true)]), [(100, 2)]);
        assert_eq!(status(style, 0, 100, &[(60, false), (60, true), (9, false)]), [(60, 0), (40, 2)]);
        assert_eq!(status(style, 0, 100, &[(60, false)]), [(60, 0)], "it may tell less");
    }
}

#[test]
fn neighbours_of_the_same_state_are_one_extent() {
    let extents = [(10, true), (20, true), (30, false), (5, false), (35, true)];
    assert_eq!(status(ReplyStyle::Extended, 0, 100, &extents), [(30, 2), (35, 0), (35, 2)]);
    assert_eq!(status(ReplyStyle::Extended, 0, 100, &[(u64::MAX, true), (u64::MAX, true)]), [(100, 2)]);
}

#[test]
fn one_extent_is_sent_where_one_is_wanted() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        assert_eq!(status(style, 8, 100, &[(30, true), (3, true), (90, false)]), [(33, 2)]);
        assert_eq!(status(style, 8, 100, &[(300, true)]), [(100, 2)]);
    }
}

#[test]
fn extents_beyond_32_bits_need_extended_headers() {
    assert_eq!(
        status(ReplyStyle::Extended, 0, 1 << 41, &[(1 << 40, true), (1 << 39, false)]),
        [(1 << 40, 2), (1 << 39, 0)]
    );
    let longest = u64::from(u32::MAX);
    assert_eq!(status(ReplyStyle::Structured, 0, longest, &[(1 << 40, true)]), [(longest, 2)]);
}

#[test]
fn the_number_of_extents_is_bounded() {
    let extents: Vec<_> = (0..STATUS_EXTENTS_MAX + 5).map(|number| (1, number % 2 == 0)).collect();
    assert_eq!(status(ReplyStyle::Structured, 0, 1 << 30, &extents).len(), STATUS_EXTENTS_MAX);
}

proptest! {
    #[test]
    fn every_reply_reads_back(
        style in prop::sample::select(&STYLES[..]),
        offset in 0_u64..1 << 61,
        length in 1..=u64::from(PAYLOAD_BYTES_MAX),
        (error, number) in prop::sample::select(&ERRORS[..]),
        text in "\\PC{0,60}",
    ) {
        let name = cookie(style, 0, 0, offset, length);
        let mut out = BytesMut::new();

        style.put_success(&mut out, name);
        prop_assert!(out.len() <= REPLY_HEAD_BYTES_MAX);
        prop_assert_eq!(replies(&out.split()), [only(style, offset, Body::None)]);

        style.put_read_head(&mut out, name, ByteRange::new(offset, length).unwrap());
        prop_assert!(out.len() <= REPLY_HEAD_BYTES_MAX);
        prop_assert_eq!(replies(&out.split()), [only(style, offset, Body::Data { offset, length })]);

        if style.may_fragment(name) {
            style.put_read_hole(&mut out, name, ByteRange::new(offset, length).unwrap(), true);
            prop_assert!(out.len() <= REPLY_HEAD_BYTES_MAX);
            prop_assert_eq!(replies(&out.split()), [only(style, offset, Body::Hole { offset, length })]);
        }

        style.put_error(&mut out, name, error, &text);
        prop_assert!(out.len() <= ERROR_REPLY_BYTES_MAX);
        let expected = if style == ReplyStyle::Simple {
            Reply::Simple { error: number, cookie: NAME }
        } else {
            only(style, offset, Body::Error { error: number, text })
        };
        prop_assert_eq!(replies(&out), [expected]);
    }
}
