//! Entry points for fuzz targets: each takes any bytes and must not panic, stay within its bounds, and come to the
//! same outcome however the bytes are cut into pieces.
//!
//! [`session`] goes further: the bytes choose what a client does, and every answer is compared with what a naive model
//! of the specification expects.

pub(super) mod client;
mod exports;
mod model;
mod run;
mod script;
mod session;

use block::{ByteCount, HostCommand, VolumeId};

use self::client::{Reader, Request, export_request, option};
#[cfg(test)]
pub(super) use self::exports::Exports;
use self::exports::SMALL_BYTES;
pub(super) use self::run::{connect, transmit};
pub use self::session::session;
use super::{Event, HandshakeOutput, Negotiated, ReplyStyle, TlsMode};

/// A whole connection: the first byte says how the others are cut, and the TLS mode.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn handshake(data: &[u8]) {
    let Some((&choice, stream)) = data.split_first() else {
        return;
    };
    let tls = [TlsMode::Off, TlsMode::Optional, TlsMode::Required, TlsMode::Optional];
    let tls = tls.get(usize::from(choice >> 6)).copied().unwrap_or(TlsMode::Off);
    let whole = connect(tls, stream, stream.len());
    let pieces = connect(tls, stream, usize::from(choice & 0x3f));
    assert_eq!(whole, pieces, "cuts do not change the outcome");
}

/// The transmission phase: the first byte chooses the export, the framing and the cuts of the others.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn transmission(data: &[u8]) {
    let Some((&choice, stream)) = data.split_first() else {
        return;
    };
    let (reply_style, base_allocation) = match choice >> 1 & 3 {
        0 => (ReplyStyle::Simple, false),
        1 => (ReplyStyle::Structured, true),
        2 => (ReplyStyle::Extended, false),
        _ => (ReplyStyle::Extended, true),
    };
    let negotiated = Negotiated { read_only: choice & 1 != 0, ..small(reply_style, base_allocation) };
    let whole = transmit(&negotiated, stream, stream.len());
    let pieces = transmit(&negotiated, stream, usize::from(choice >> 3));
    assert_eq!(whole, pieces, "cuts do not change the outcome");
}

/// The payload of a status request: it is served or refused, and in either case consumed.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn status_payload(payload: &[u8]) {
    let length = u64::try_from(payload.len()).unwrap_or(u64::MAX);
    let status = Request { flags: 1 << 5, kind: 7, cookie: 1, offset: 512, length };
    let flush = Request { flags: 0, kind: 3, cookie: 2, offset: 0, length: 0 };
    let stream = [&status.encode_extended()[..], payload, &flush.encode_extended()].concat();
    let mut reader = Reader(payload);
    let effect = (reader.try_number(8), reader.try_number(4), reader.try_number(1));
    let served = matches!(effect, (Some(length), Some(1), None)
        if payload.len() == 12 && (1..=SMALL_BYTES - 512).contains(&length));
    for cut in [1, 7, stream.len()] {
        let events = transmit(&small(ReplyStyle::Extended, true), &stream, cut);
        match events.as_slice() {
            [status, Event::Request { command: HostCommand::Flush, .. }] => {
                let is_status = matches!(status, Event::Request { command: HostCommand::Status { range, .. }, .. }
                    if effect.0 == Some(range.length()));
                assert!(is_status == served, "{status:?}");
                assert!(is_status || matches!(status, Event::Refused { .. }), "{status:?}");
            }
            other => unreachable!("the payload was not consumed: {other:?}"),
        }
    }
}

/// The data of SET_META_CONTEXT: what it selects is what a naive reader of it finds.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn meta_contexts(data: &[u8]) {
    let stream = [
        &[0, 0, 0, 3][..],
        &option(8, b""),
        &option(10, data),
        &option(9, data),
        &option(7, &export_request("disk", &[])),
    ]
    .concat();
    let expected = (data.len() <= 64 << 10).then(|| naive_contexts(data)).flatten();
    for cut in [61, stream.len()] {
        let outputs = connect(TlsMode::Off, &stream, cut).handshake;
        let Some(HandshakeOutput::Established(negotiated)) = outputs.last() else {
            unreachable!("the option spoils the connection: {outputs:?}");
        };
        let selected = expected.as_ref().is_some_and(|(name, queries)| {
            name == "disk" && queries.iter().any(|query| query == "base:allocation")
        });
        assert_eq!(negotiated.base_allocation, selected, "{expected:?}");
    }
}

/// Export name and queries, if the data is well-formed.
fn naive_contexts(data: &[u8]) -> Option<(String, Vec<String>)> {
    fn string(reader: &mut Reader<'_>) -> Option<String> {
        let length = reader.try_number(4)?;
        String::from_utf8(reader.try_take(length)?.to_vec()).ok()
    }
    let mut reader = Reader(data);
    let name = string(&mut reader)?;
    let count = reader.try_number(4)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        queries.push(string(&mut reader)?);
    }
    let is_string = |text: &String| text.len() <= 4096 && !text.contains('\0');
    let has_namespace = |query: &String| query.find(':').is_some_and(|at| at > 0);
    let is_good = reader.0.is_empty()
        && is_string(&name)
        && queries.iter().all(|query| is_string(query) && has_namespace(query));
    is_good.then_some((name, queries))
}

fn small(reply_style: ReplyStyle, base_allocation: bool) -> Negotiated {
    Negotiated {
        name: "disk".to_owned(),
        volume: VolumeId::default(),
        size: ByteCount(SMALL_BYTES),
        read_only: false,
        reply_style,
        base_allocation,
    }
}
