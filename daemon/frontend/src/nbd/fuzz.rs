//! Entry points for fuzz targets: each takes any bytes and must not panic, stay within its bounds, and come to the
//! same outcome however the bytes are cut into pieces.

use block::{ByteCount, HostCommand, VolumeId};

use super::{
    Event, ExportDirectory, ExportInfo, ExportRefusal, Handshake, HandshakeOutput, Negotiated,
    OPTION_BYTES_MAX, PAYLOAD_BYTES_MAX, ReplyStyle, Transmission,
};

/// The size of the exports that fuzzing meets: small, so that offsets near the end come up.
const EXPORT_BYTES: u64 = 1 << 20;

/// A whole connection: the first byte says how the others are cut.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn handshake(data: &[u8]) {
    let Some((&cut, stream)) = data.split_first() else {
        return;
    };
    let whole = connect(stream, stream.len());
    let pieces = connect(stream, usize::from(cut));
    assert_eq!(whole, pieces, "cuts do not change the outcome");
}

/// The transmission phase: the first byte chooses the export and the cuts of the others.
///
/// # Panics
/// If a property does not hold: that is what the fuzzer looks for.
pub fn transmission(data: &[u8]) {
    let Some((&choice, stream)) = data.split_first() else {
        return;
    };
    let negotiated = Negotiated {
        name: String::new(),
        volume: VolumeId::default(),
        size: ByteCount(EXPORT_BYTES),
        read_only: choice & 1 != 0,
        reply_style: if choice & 2 == 0 { ReplyStyle::Simple } else { ReplyStyle::Structured },
    };
    let whole = transmit(&negotiated, stream, stream.len());
    let pieces = transmit(&negotiated, stream, usize::from(choice >> 2));
    assert_eq!(whole, pieces, "cuts do not change the outcome");
}

/// Three exports: one to write, one to read, and one that is not presented.
#[derive(Debug)]
pub(super) struct Exports;

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<String> {
        ["disk", "frozen", "replica"].map(str::to_owned).into()
    }

    fn find(&self, name: &str) -> Result<ExportInfo, ExportRefusal> {
        assert!(!name.is_empty(), "the default export is resolved before");
        let export = |read_only| ExportInfo {
            volume: VolumeId::from_bytes([u8::from(read_only); 16]),
            size: ByteCount(EXPORT_BYTES),
            read_only,
            description: Some("a disk".to_owned()),
        };
        match name {
            "disk" => Ok(export(false)),
            "frozen" => Ok(export(true)),
            "replica" => {
                Err(ExportRefusal::NotPresented { reason: "volume 'replica' is a secondary".to_owned() })
            }
            _ => Err(ExportRefusal::Unknown),
        }
    }
}

/// What a whole connection came to: everything of both phases.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    pub(super) handshake: Vec<HandshakeOutput>,
    pub(super) events: Vec<Event>,
}

/// Runs both phases over `stream`, given in pieces of at most `cut` bytes.
pub(super) fn connect(stream: &[u8], cut: usize) -> Outcome {
    let mut machine = Handshake::new();
    let mut outputs = Vec::new();
    let mut rest = stream;
    loop {
        let before = outputs.len();
        while let Some(output) = machine.poll_output() {
            outputs.push(output);
        }
        match outputs.last() {
            Some(HandshakeOutput::Established(negotiated)) => {
                let events = transmit(negotiated, rest, cut);
                return Outcome { handshake: outputs, events };
            }
            Some(HandshakeOutput::Send(_)) if !rest.is_empty() => {}
            Some(_) | None => {
                return Outcome { handshake: outputs, events: Vec::new() };
            }
        }
        let consumed = machine.handle_input(piece(stream, rest, cut), &Exports);
        let is_first = outputs.len() == 1;
        assert!(consumed > 0 || is_first || outputs.len() > before, "it never stalls");
        assert!(machine.buffered() <= OPTION_BYTES_MAX, "memory is bounded");
        rest = rest.get(consumed..).unwrap_or_default();
    }
}

/// Runs the transmission phase over `stream`, given in pieces of at most `cut` bytes, and drops payloads.
pub(super) fn transmit(negotiated: &Negotiated, stream: &[u8], cut: usize) -> Vec<Event> {
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
}

/// What is left of the piece that `rest`, the end of `stream`, starts in: pieces arrive in multiples of `cut` bytes,
/// wherever the machines stand.
fn piece<'stream>(stream: &[u8], rest: &'stream [u8], cut: usize) -> &'stream [u8] {
    let cut = cut.max(1);
    let arrived = cut - (stream.len() - rest.len()) % cut;
    rest.get(..arrived).unwrap_or(rest)
}
