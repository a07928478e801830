//! Whole sessions: a script is played to the machines, and every answer is compared with the model's.

use block::{ByteRange, Extent, HostCommand, HostError};

use super::super::{Cookie, Event, HandshakeOutput, ReplyStyle, TlsMode, errno};
use super::client::{Body, Reply, option_replies, replies, status_payload};
use super::model::{Agreed, Answer, HandshakeModel, Outcome, outcome};
use super::run::connect;
use super::script::{Ask, Script};

/// Payloads that are really sent are at most so long; longer ones end the stream.
const SENT_BYTES_MAX: u64 = 4096;

/// A session of a client that does as it likes: the bytes choose options, requests, and how the stream is cut.
///
/// # Panics
/// If an answer is not the expected one: that is what the fuzzer looks for.
pub fn session(data: &[u8]) {
    let script = Script::from_bytes(data);
    let mut stream = script.client_flags.to_be_bytes().to_vec();
    let mut answers = Vec::new();
    let refused =
        script.client_flags > 3 || (script.tls == TlsMode::Required && script.client_flags & 1 == 0);
    let mut agreed = None;
    if refused {
        answers.push(Answer::Close);
    } else {
        let mut model = HandshakeModel::new(script.tls, script.client_flags);
        for haggle in &script.options {
            stream.extend(haggle.encode());
            let answer = model.answer(haggle);
            let over = matches!(answer, Answer::Close | Answer::Bare(_)) || is_abort(&answer);
            answers.push(answer);
            if over || model.agreed.export.is_some() {
                break;
            }
        }
        agreed = model.agreed.export.map(|_| model.agreed);
    }
    let mut asked = Vec::new();
    if let Some(agreed) = &agreed {
        for ask in &script.requests {
            let outcome = outcome(ask, agreed);
            let Some(bytes) = encode(ask, agreed, outcome) else { break };
            stream.extend(bytes);
            asked.push((ask, outcome));
            if matches!(outcome, Outcome::Disconnect | Outcome::Broken) {
                break;
            }
        }
    }
    for cut in [script.cut, stream.len()] {
        let found = connect(script.tls, &stream, cut);
        compare_handshake(&found.handshake, &answers, agreed.as_ref());
        if let Some(agreed) = &agreed {
            assert_eq!(found.events.len(), asked.len(), "{asked:?}: {:?}", found.events);
            for (event, (ask, expected)) in found.events.iter().zip(&asked) {
                compare_event(*event, ask, *expected, agreed);
            }
        } else {
            assert!(found.events.is_empty(), "nothing was established");
        }
    }
}

fn is_abort(answer: &Answer) -> bool {
    matches!(answer, Answer::Replies(replies) if replies.first().is_some_and(|reply| reply.0 == 2))
}

impl Ask {
    /// What the header says of the payload's length.
    pub(super) fn payload_bytes(&self, extended: bool) -> u64 {
        let length = self.request.length;
        match self.request.kind {
            7 if extended && self.request.flags & 0x20 != 0 => {
                8 + 4 * u64::try_from(self.status.1.len()).unwrap_or(0)
            }
            1 => length,
            _ if extended && self.request.flags & 0x20 != 0 => length,
            _ => 0,
        }
    }
}

/// The request's bytes; none if the client does not send that much, or a compact request cannot say it.
fn encode(ask: &Ask, agreed: &Agreed, outcome: Outcome) -> Option<Vec<u8>> {
    let extended = agreed.style == ReplyStyle::Extended;
    let mut request = ask.request;
    if !extended && u32::try_from(request.length).is_err() {
        return None;
    }
    let bytes = ask.payload_bytes(extended);
    let ends = matches!(outcome, Outcome::Disconnect | Outcome::Broken);
    if bytes > SENT_BYTES_MAX && !ends {
        return None;
    }
    let payload = if extended && request.kind == 7 && request.flags & 0x20 != 0 {
        request.length = bytes;
        status_payload(ask.status.0, &ask.status.1)
    } else if ends {
        Vec::new()
    } else {
        vec![0x5a; usize::try_from(bytes).ok()?]
    };
    let header = if extended { request.encode_extended() } else { request.encode() };
    Some([header, payload].concat())
}

fn compare_handshake(outputs: &[HandshakeOutput], answers: &[Answer], agreed: Option<&Agreed>) {
    let mut outputs = outputs.iter();
    assert!(matches!(outputs.next(), Some(HandshakeOutput::Send(_))), "the greeting comes first");
    for answer in answers {
        match (answer, outputs.next()) {
            (Answer::Close, Some(HandshakeOutput::Close(_))) => {}
            (Answer::Bare(bytes), Some(HandshakeOutput::Send(sent))) => assert_eq!(sent, bytes),
            (Answer::Replies(expected), Some(HandshakeOutput::Send(sent))) => {
                let found = option_replies(sent);
                assert_eq!(found.len(), expected.len(), "{expected:?}: {found:?}");
                for (found, (option, kind, data)) in found.iter().zip(expected) {
                    assert_eq!((found.option, found.kind), (*option, *kind));
                    assert!(data.as_ref().is_none_or(|data| *data == found.data), "{expected:?}: {found:?}");
                }
                let is_acknowledged = expected.last().is_some_and(|reply| reply.1 == 1);
                if is_abort(answer) {
                    assert!(matches!(outputs.next(), Some(HandshakeOutput::Close(_))), "an abort closes");
                } else if is_acknowledged && expected.first().is_some_and(|reply| reply.0 == 5) {
                    assert_eq!(outputs.next(), Some(&HandshakeOutput::StartTls));
                }
            }
            (answer, output) => unreachable!("expected {answer:?}, got {output:?}"),
        }
    }
    if let Some(agreed) = agreed {
        let Some(HandshakeOutput::Established(negotiated)) = outputs.next() else {
            unreachable!("{agreed:?} was not established");
        };
        assert_eq!(Some(&*negotiated.name), agreed.export);
        assert_eq!(negotiated.reply_style, agreed.style);
        assert_eq!(negotiated.base_allocation, agreed.context == agreed.export);
        assert_eq!(negotiated.read_only, agreed.export == Some("frozen"));
    }
    assert_eq!(outputs.next(), None);
}

fn compare_event(event: Event, ask: &Ask, expected: Outcome, agreed: &Agreed) {
    let style = agreed.style;
    let mut out = Vec::new();
    match (expected, event) {
        (Outcome::Disconnect, Event::Disconnect) | (Outcome::Broken, Event::Broken(_)) => {}
        (Outcome::Nothing, Event::Served { cookie }) => {
            style.put_success(&mut out, cookie);
            assert_eq!(replies(&out), [success(ask, style, Body::None)]);
        }
        (Outcome::Error(number), Event::Refused { cookie, refusal }) => {
            style.put_refusal(&mut out, cookie, refusal);
            compare_error(&out, number, ask, style);
        }
        (Outcome::Run(expected), Event::Request { cookie, command }) => {
            assert_eq!(command, expected);
            assert!(!matches!(command, HostCommand::Write { .. }), "writes come with their payload");
            compare_answer(cookie, command, ask, style);
        }
        (Outcome::Run(expected), Event::WritePayload { cookie, command, length }) => {
            assert_eq!(command, expected);
            assert_eq!(u64::from(length), ask.request.length);
            compare_answer(cookie, command, ask, style);
        }
        (expected, event) => unreachable!("{ask:?}: expected {expected:?}, got {event:?}"),
    }
}

/// What the volume might answer reads back as what was asked.
fn compare_answer(cookie: Cookie, command: HostCommand, ask: &Ask, style: ReplyStyle) {
    let mut out = Vec::new();
    if ask.answer % 4 == 1 {
        let error = HostError::NotSupported;
        style.put_error(&mut out, cookie, error, "a text");
        return compare_error(&out, errno(error), ask, style);
    }
    match command {
        HostCommand::Read { range } => compare_read(cookie, range, ask, style),
        HostCommand::Status { range, one } => compare_status(cookie, range, one, ask, style),
        HostCommand::Write { .. }
        | HostCommand::Flush
        | HostCommand::Trim { .. }
        | HostCommand::WriteZeroes { .. }
        | HostCommand::Cache { .. } => {
            style.put_success(&mut out, cookie);
            assert_eq!(replies(&out), [success(ask, style, Body::None)]);
        }
    }
}

fn compare_read(cookie: Cookie, range: ByteRange, ask: &Ask, style: ReplyStyle) {
    let mut out = Vec::new();
    let (offset, length) = (range.offset(), range.length());
    style.put_read_head(&mut out, cookie, range);
    assert_eq!(replies(&out), [success(ask, style, Body::Data { offset, length })]);
    let may = style != ReplyStyle::Simple && ask.request.flags & 4 == 0;
    assert_eq!(style.may_fragment(cookie), may);
    let half = length / 2;
    let parts = (ByteRange::new(offset, half), ByteRange::new(offset + half, length - half));
    let ((Some(first), Some(second)), true) = (parts, may && half > 0) else {
        return;
    };
    out.clear();
    style.put_read_data_head(&mut out, cookie, second, false);
    style.put_read_hole(&mut out, cookie, first, true);
    let not_last = match success(ask, style, Body::Data { offset: second.offset(), length: second.length() })
    {
        Reply::Chunk { cookie, echo, body, .. } => Reply::Chunk { cookie, echo, body, done: false },
        simple @ Reply::Simple { .. } => simple,
    };
    let hole = success(ask, style, Body::Hole { offset, length: half });
    assert_eq!(replies(&out), [not_last, hole]);
}

fn compare_status(cookie: Cookie, range: ByteRange, one: bool, ask: &Ask, style: ReplyStyle) {
    let mut extents = Vec::new();
    let step = 1 + range.length() / (1 + u64::from(ask.answer % 7));
    for number in 0..u64::from(ask.answer % 9) + 1 {
        extents.push(Extent { length: step + number, zero: (ask.answer >> (number % 8)) & 1 == 0 });
    }
    let mut out = Vec::new();
    style.put_status(&mut out, cookie, &extents);
    let found = replies(&out);
    let [Reply::Chunk { body: Body::Status { context: 1, extents: told }, .. }] = found.as_slice() else {
        unreachable!("not one status: {found:?}");
    };
    assert_eq!(found, [success(ask, style, Body::Status { context: 1, extents: told.clone() })]);
    // The naive reader marks every change of state, and finds them all in the reply.
    let known: u64 = extents.iter().map(|extent| extent.length).sum();
    let covered: u64 = told.iter().map(|(length, _)| length).sum();
    assert!(told.iter().all(|(length, flags)| *length > 0 && flags & !2 == 0), "{told:?}");
    assert!(told.windows(2).all(|pair| matches!(pair, [(_, one), (_, next)] if one != next)), "{told:?}");
    if one {
        assert!(told.len() == 1 && covered <= range.length(), "one extent was wanted: {told:?}");
    } else {
        assert_eq!(covered, known.min(range.length()));
    }
    let state = |lengths: &[(u64, u64)], at: u64| {
        let mut end = 0;
        lengths
            .iter()
            .find(|(length, _)| {
                end += length;
                at < end
            })
            .map(|(_, flags)| *flags)
    };
    let given: Vec<_> =
        extents.iter().map(|extent| (extent.length, if extent.zero { 2 } else { 0 })).collect();
    let mut at = 0;
    for (length, _) in &given {
        for at in [at, at + length - 1].into_iter().filter(|at| *at < covered) {
            assert_eq!(state(told, at), state(&given, at), "at {at}: {extents:?} {told:?}");
        }
        at += length;
    }
}

fn compare_error(out: &[u8], number: u32, ask: &Ask, style: ReplyStyle) {
    match replies(out).as_slice() {
        [Reply::Simple { error, cookie }] => {
            assert_eq!((*error, *cookie, style), (number, ask.request.cookie, ReplyStyle::Simple));
        }
        [found @ Reply::Chunk { body: Body::Error { error, text }, .. }] => {
            assert_eq!(*error, number);
            assert!(!text.is_empty(), "an error says why");
            assert_eq!(*found, success(ask, style, Body::Error { error: number, text: text.clone() }));
        }
        other => unreachable!("not one error: {other:?}"),
    }
}

/// The only reply to a request.
fn success(ask: &Ask, style: ReplyStyle, body: Body) -> Reply {
    let cookie = ask.request.cookie;
    match style {
        ReplyStyle::Simple => Reply::Simple { error: 0, cookie },
        ReplyStyle::Structured => Reply::Chunk { cookie, echo: None, done: true, body },
        ReplyStyle::Extended => Reply::Chunk { cookie, echo: Some(ask.request.offset), done: true, body },
    }
}
