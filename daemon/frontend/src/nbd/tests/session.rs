//! Whole sessions against the model, and garbage.

use proptest::prelude::*;

use crate::nbd::fuzz::client::{Request, context_request, export_request, option, status_payload};
use crate::nbd::fuzz::{self, connect, transmit};
use crate::nbd::{HandshakeOutput, TlsMode};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12_000))]

    #[test]
    fn every_session_is_answered_as_the_model_expects(
        choices in prop::collection::vec(any::<u8>(), 0..500),
    ) {
        fuzz::session(&choices);
    }

    #[test]
    fn context_options_are_read_as_a_naive_reader_does(
        name in prop_oneof![3 => Just("disk"), 1 => Just("huge"), 1 => Just("d\0"), 1 => Just("")],
        queries in prop::collection::vec(
            prop_oneof![
                Just(&b"base:allocation"[..]), Just(&b"base:"[..]), Just(&b":leaf"[..]), Just(&b"x-a:b"[..]),
                Just(&b"none"[..]), Just(&b"base:\xff"[..]),
            ],
            0..5,
        ),
        damage in prop::option::weighted(0.4, (any::<prop::sample::Index>(), any::<u8>())),
    ) {
        let mut data = context_request(name, &queries);
        if let Some((at, byte)) = damage {
            let at = at.index(data.len());
            data[at] = byte;
        }
        fuzz::meta_contexts(&data);
    }

    #[test]
    fn status_payloads_are_served_or_refused_whole(
        length in prop_oneof![0_u64..1 << 21, any::<u64>()],
        contexts in prop::collection::vec(0_u32..3, 0..4),
        extra in prop::collection::vec(any::<u8>(), 0..3),
    ) {
        fuzz::status_payload(&[&status_payload(length, &contexts)[..], &extra].concat());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn garbage_behind_a_good_start_never_panics(
        prefix in 0_usize..140,
        garbage in prop::collection::vec(any::<u8>(), 0..400),
        choice: u8,
    ) {
        let start = [
            &[choice, 0, 0, 0, 3][..],
            &option(5, b""),
            &option(11, b""),
            &option(3, b""),
            &option(7, &export_request("disk", &[3])),
            &Request { flags: 32, kind: 1, cookie: 1, offset: 0, length: 5 }.encode_extended(),
        ]
        .concat();
        let data = [&start[..prefix.min(start.len())], &garbage].concat();
        fuzz::handshake(&data);
        fuzz::transmission(&data);
    }

    #[test]
    fn requests_with_random_fields_never_panic(fields: Vec<(u16, u16, u64, u64, u64)>, choice: u8) {
        let mut data = vec![choice];
        for (flags, kind, cookie, offset, length) in fields {
            let (kind, length) = (kind % 9, length >> (cookie % 64));
            let request = Request { flags: flags % 64, kind, cookie, offset, length };
            if choice & 4 == 0 {
                data.extend(Request { length: length & 0xffff_ffff, ..request }.encode());
            } else {
                data.extend(request.encode_extended());
            }
        }
        fuzz::transmission(&data);
    }
}

#[test]
fn an_endless_stream_of_nothing_needs_no_memory() {
    let data = vec![0; 1 << 16];
    fuzz::handshake(&data);
    fuzz::transmission(&data);
    assert!(connect(TlsMode::Off, &[], 1).events.is_empty());
    let stream = [&[0, 0, 0, 3][..], &option(1, b"disk")].concat();
    let negotiated = match connect(TlsMode::Off, &stream, 3).handshake.pop() {
        Some(HandshakeOutput::Established(negotiated)) => negotiated,
        other => panic!("{other:?}"),
    };
    assert!(transmit(&negotiated, &[], 1).is_empty());
}
