//! Reply heads as a client reads them.

use block::{ByteRange, HostError};
use bytes::BytesMut;
use proptest::prelude::*;

use super::client::{Reply, reply};
use crate::nbd::{
    Cookie, ERROR_REPLY_BYTES_MAX, PAYLOAD_BYTES_MAX, REPLY_HEAD_BYTES_MAX, Refusal, ReplyStyle, errno,
};

const ERRORS: [(HostError, u32); 6] = [
    (HostError::ReadOnly, 1),
    (HostError::Io, 5),
    (HostError::Invalid, 22),
    (HostError::NoSpace, 28),
    (HostError::NotSupported, 95),
    (HostError::Shutdown, 108),
];

#[test]
fn errors_have_the_numbers_of_the_specification() {
    for (error, number) in ERRORS {
        assert_eq!(errno(error), number);
    }
}

#[test]
fn with_structured_replies_no_reply_is_simple() {
    let mut out = BytesMut::new();
    ReplyStyle::Structured.put_success(&mut out, Cookie(7));
    assert_eq!(reply(&out.split()), Reply::None { cookie: 7 });
    ReplyStyle::Structured.put_refusal(&mut out, Cookie(8), Refusal::ReadOnly);
    assert_eq!(reply(&out), Reply::Error { cookie: 8, error: 1, text: "the export is read-only".to_owned() });
}

#[test]
fn a_long_error_text_is_cut_at_a_character() {
    let mut out = BytesMut::new();
    ReplyStyle::Structured.put_error(&mut out, Cookie(1), HostError::Io, &format!("x{}", "ä".repeat(300)));
    let Reply::Error { text, .. } = reply(&out) else {
        panic!("an error chunk");
    };
    assert_eq!(text, format!("x{}", "ä".repeat(127)));
}

proptest! {
    #[test]
    fn every_reply_reads_back(
        cookie: u64,
        structured: bool,
        offset in 0_u64..1 << 62,
        length in 1..=u64::from(PAYLOAD_BYTES_MAX),
        (error, number) in prop::sample::select(&ERRORS[..]),
        text in "\\PC{0,60}",
    ) {
        let style = if structured { ReplyStyle::Structured } else { ReplyStyle::Simple };
        let name = Cookie(cookie);
        let simple = |error| Reply::Simple { error, cookie };
        let mut out = BytesMut::new();

        style.put_success(&mut out, name);
        prop_assert!(out.len() <= REPLY_HEAD_BYTES_MAX);
        let expected = if structured { Reply::None { cookie } } else { simple(0) };
        prop_assert_eq!(reply(&out.split()), expected);

        style.put_read_head(&mut out, name, ByteRange::new(offset, length).unwrap());
        prop_assert!(out.len() <= REPLY_HEAD_BYTES_MAX);
        let expected = if structured { Reply::Data { cookie, offset, length } } else { simple(0) };
        prop_assert_eq!(reply(&out.split()), expected);

        style.put_error(&mut out, name, error, &text);
        prop_assert!(out.len() <= ERROR_REPLY_BYTES_MAX);
        let expected = if structured {
            Reply::Error { cookie, error: number, text }
        } else {
            simple(number)
        };
        prop_assert_eq!(reply(&out), expected);
    }
}
