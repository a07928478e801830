//! The machines, driven as a caller drives them, over a stream that arrives in pieces.

use block::HostCommand;

use super::super::{
    Event, Handshake, HandshakeOutput, Negotiated, OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, TlsMode, Transmission,
};
use super::exports::Exports;

/// What a whole connection came to: everything of both phases.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) handshake: Vec<HandshakeOutput>,
    pub(crate) events: Vec<Event>,
}

/// Runs both phases over `stream`, given in pieces of at most `cut` bytes. TLS comes up at once where it is asked for,
/// and what follows in the stream is taken for what comes out of it.
pub(crate) fn connect(tls: TlsMode, stream: &[u8], cut: usize) -> Outcome {
    let mut machine = Handshake::new(tls);
    let mut exports = Exports { tls: false };
    let mut outputs = Vec::new();
    let mut rest = stream;
    loop {
        let before = outputs.len();
        while let Some(output) = machine.poll_output() {
            outputs.push(output);
        }
        match outputs.get(before..).and_then(<[_]>::last) {
            Some(HandshakeOutput::Established(negotiated)) => {
                let events = transmit(negotiated, rest, cut);
                return Outcome { handshake: outputs, events };
            }
            Some(HandshakeOutput::StartTls) => {
                assert!(!exports.tls, "TLS starts once");
                assert_eq!(machine.handle_input(rest, &exports), 0, "nothing is consumed before TLS");
                exports.tls = true;
                machine.secured();
            }
            Some(HandshakeOutput::Close(_)) => return Outcome { handshake: outputs, events: Vec::new() },
            Some(HandshakeOutput::Send(_)) | None => {}
        }
        let consumed = machine.handle_input(piece(stream, rest, cut), &exports);
        assert!(machine.buffered() <= OPTION_BYTES_MAX, "memory is bounded");
        if consumed == 0 {
            assert!(rest.is_empty(), "it never stalls");
            return Outcome { handshake: outputs, events: Vec::new() };
        }
        rest = rest.get(consumed..).unwrap_or_default();
    }
}

/// Runs the transmission phase over `stream`, given in pieces of at most `cut` bytes, and drops payloads.
pub(crate) fn transmit(negotiated: &Negotiated, stream: &[u8], cut: usize) -> Vec<Event> {
    let mut machine = Transmission::new(negotiated);
    let mut events = Vec::new();
    let mut rest = stream;
    while !rest.is_empty() {
        let input = piece(stream, rest, cut);
        let parsed = machine.parse(input);
        assert!(parsed.consumed <= input.len(), "no more than there is");
        rest = rest.get(parsed.consumed..).unwrap_or_default();
        match parsed.event {
            Event::NeedMore => assert_eq!(parsed.consumed, input.len(), "more is needed after all input"),
            Event::WritePayload { command, length, .. } => {
                check_command(negotiated, command, u64::from(length));
                rest =
                    usize::try_from(length).map_or(&[][..], |length| rest.get(length..).unwrap_or_default());
                events.push(parsed.event);
            }
            Event::Request { command, .. } => {
                let length = command.range().map_or(0, block::ByteRange::length);
                check_command(negotiated, command, length);
                events.push(parsed.event);
            }
            Event::Served { .. } | Event::Refused { .. } => events.push(parsed.event),
            Event::Disconnect | Event::Broken(_) => {
                events.push(parsed.event);
                return events;
            }
        }
    }
    events
}

/// What every command that leaves the machine promises.
fn check_command(negotiated: &Negotiated, command: HostCommand, length: u64) {
    assert!(!(negotiated.read_only && command.changes_content()), "read-only is kept");
    if let Some(range) = command.range() {
        assert!(range.end() <= negotiated.size.0, "the command lies in the export");
        assert!(!range.is_empty() && range.length() == length, "the range is the payload's");
    }
    let has_payload = matches!(command, HostCommand::Read { .. } | HostCommand::Write { .. });
    assert!(!has_payload || length <= u64::from(PAYLOAD_BYTES_MAX), "the payload is bounded");
    let is_status = matches!(command, HostCommand::Status { .. });
    assert!(!is_status || negotiated.base_allocation, "a status has a context");
}

/// What is left of the piece that `rest`, the end of `stream`, starts in: pieces arrive in multiples of `cut` bytes,
/// wherever the machines stand.
fn piece<'stream>(stream: &[u8], rest: &'stream [u8], cut: usize) -> &'stream [u8] {
    let cut = cut.max(1);
    let arrived = cut - (stream.len() - rest.len()) % cut;
    rest.get(..arrived).unwrap_or(rest)
}
