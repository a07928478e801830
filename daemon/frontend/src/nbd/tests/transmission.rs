//! Requests, one by one.

use block::{ByteCount, ByteRange, HostCommand, VolumeId};

use crate::nbd::fuzz::client::{Request, status_payload};
use crate::nbd::fuzz::transmit;
use crate::nbd::{BrokenReason, Event, Negotiated, Refusal, ReplyStyle, Transmission};

const SIZE: u64 = 1 << 40;
const NAME: u64 = 0xfeed_0000_0000_0001;
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;
const ONE: u16 = 8;
const FAST: u16 = 16;
const PAYLOAD: u16 = 32;

fn negotiated(read_only: bool, reply_style: ReplyStyle) -> Negotiated {
    Negotiated {
        name: "disk".to_owned(),
        volume: VolumeId::default(),
        size: ByteCount(SIZE),
        read_only,
        reply_style,
        base_allocation: reply_style != ReplyStyle::Simple,
    }
}

fn request(kind: u16, flags: u16, offset: u64, length: u64) -> Request {
    Request { flags, kind, cookie: NAME, offset, length }
}

/// What an event is about, without the name.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    More,
    Run(HostCommand),
    Write(HostCommand, u32),
    Served,
    Refused(Refusal),
    Disconnect,
    Broken(BrokenReason),
}

fn outcome(event: Event) -> Outcome {
    let (cookie, outcome) = match event {
        Event::NeedMore => return Outcome::More,
        Event::Disconnect => return Outcome::Disconnect,
        Event::Broken(reason) => return Outcome::Broken(reason),
        Event::Request { cookie, command } => (cookie, Outcome::Run(command)),
        Event::WritePayload { cookie, command, length } => (cookie, Outcome::Write(command, length)),
        Event::Served { cookie } => (cookie, Outcome::Served),
        Event::Refused { cookie, refusal } => (cookie, Outcome::Refused(refusal)),
    };
    assert_eq!(cookie.name, NAME);
    outcome
}

/// The event that a request's header leads to, on a writable export with structured replies.
fn event(kind: u16, flags: u16, offset: u64, length: u64) -> Outcome {
    let negotiated = negotiated(false, ReplyStyle::Structured);
    let header = request(kind, flags, offset, length).encode();
    outcome(Transmission::new(&negotiated).parse(&header).event)
}

/// The same with extended headers, where the header is all that comes.
fn extended(kind: u16, flags: u16, offset: u64, length: u64) -> Outcome {
    let negotiated = negotiated(false, ReplyStyle::Extended);
    let header = request(kind, flags, offset, length).encode_extended();
    outcome(Transmission::new(&negotiated).parse(&header).event)
}

/// The outcomes of a status request with payload and of a flush behind it.
fn status_then_flush(payload: &[u8], flags: u16, selected: bool) -> Vec<Outcome> {
    let negotiated = Negotiated { base_allocation: selected, ..negotiated(true, ReplyStyle::Extended) };
    let length = u64::try_from(payload.len()).unwrap();
    let header = request(7, PAYLOAD | flags, 4096, length).encode_extended();
    let stream = [&header[..], payload, &request(3, 0, 0, 0).encode_extended()].concat();
    let outcomes = |cut| transmit(&negotiated, &stream, cut).into_iter().map(outcome).collect::<Vec<_>>();
    assert_eq!(outcomes(1), outcomes(stream.len()));
    outcomes(5)
}

const fn run(command: HostCommand) -> Outcome {
    Outcome::Run(command)
}

const fn refused(refusal: Refusal) -> Outcome {
    Outcome::Refused(refusal)
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

#[test]
fn commands_and_their_flags_are_understood() {
    let read = HostCommand::Read { range: range(1, 2) };
    for flags in [0, FUA, DF, FUA | DF] {
        assert_eq!(event(0, flags, 1, 2), run(read));
    }
    let write = HostCommand::Write { range: range(4096, 512), fua: true };
    assert_eq!(event(1, FUA, 4096, 512), Outcome::Write(write, 512));
    assert_eq!(event(3, FUA, 0, 0), run(HostCommand::Flush));
    let trim = HostCommand::Trim { range: range(0, u64::from(u32::MAX)), fua: false };
    assert_eq!(event(4, 0, 0, u64::from(u32::MAX)), run(trim));
    let zeroes =
        HostCommand::WriteZeroes { range: range(SIZE - 1, 1), fua: true, no_hole: true, fast: false };
    assert_eq!(event(6, FUA | NO_HOLE, SIZE - 1, 1), run(zeroes));
    let fast = HostCommand::WriteZeroes { range: range(0, 9), fua: false, no_hole: false, fast: true };
    assert_eq!(event(6, FAST, 0, 9), run(fast));
    assert_eq!(event(5, FUA, 3, 4), run(HostCommand::Cache { range: range(3, 4) }));
    for one in [false, true] {
        let status = HostCommand::Status { range: range(5, 6), one };
        assert_eq!(event(7, FUA | if one { ONE } else { 0 }, 5, 6), run(status));
    }
    assert_eq!(event(2, 0xffff, 9, 9), Outcome::Disconnect);
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_the_connection_stays() {
    for kind in [8, 9, 99, 0xffff] {
        assert_eq!(event(kind, 0, 0, 4096), refused(Refusal::UnknownCommand));
    }
    for (kind, flags) in [
        (0, NO_HOLE),
        (0, ONE),
        (3, DF),
        (4, NO_HOLE),
        (5, DF),
        (6, DF),
        (7, FAST),
        (1, PAYLOAD),
        (4, PAYLOAD),
    ] {
        assert_eq!(event(kind, flags, 0, 0), refused(Refusal::UnknownFlag));
    }
    assert_eq!(event(3, 0, 0, 1), refused(Refusal::FlushRange));
    assert_eq!(event(3, 0, 1, 0), refused(Refusal::FlushRange));
}

#[test]
fn do_not_fragment_needs_structured_replies() {
    let header = request(0, DF, 0, 512).encode();
    let events = transmit(&negotiated(false, ReplyStyle::Simple), &header, 28);
    assert_eq!(events.into_iter().map(outcome).collect::<Vec<_>>(), [refused(Refusal::UnknownFlag)]);
}

#[test]
fn beyond_the_end_writes_lack_space_and_reads_are_invalid() {
    for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4)] {
        for (kind, number) in [(0, 22), (4, 22), (5, 22), (7, 22), (6, 28)] {
            for outcome in [event(kind, 0, offset, length), extended(kind, 0, offset, length)] {
                let Outcome::Refused(refusal) = outcome else {
                    panic!("served beyond the end");
                };
                assert_eq!(refusal.errno(), number);
            }
        }
    }
    assert_eq!(event(1, 0, SIZE + 1, 0), refused(Refusal::WriteBeyondEnd));
}

#[test]
fn a_request_for_nothing_is_served_up_to_the_end() {
    for kind in [0, 1, 4, 5, 6] {
        assert_eq!(event(kind, FUA, SIZE, 0), Outcome::Served);
        assert_eq!(extended(kind, FUA, SIZE, 0), Outcome::Served);
    }
    assert_eq!(event(7, 0, 0, 0), refused(Refusal::EmptyStatus), "its reply could not have an extent");
}

#[test]
fn payloads_up_to_64_mib_are_served_and_longer_ones_are_refused() {
    let longest = 64 << 20;
    assert!(matches!(event(0, DF, 0, longest), Outcome::Run(_)));
    assert!(matches!(event(1, 0, 0, longest), Outcome::Write(..)));
    assert_eq!(event(0, 0, 0, longest + 1), refused(Refusal::PayloadTooLong));
    assert_eq!(event(0, DF, 0, longest + 1), refused(Refusal::UnfragmentedTooLong));
    assert!(matches!(extended(1, PAYLOAD, 0, longest), Outcome::Write(..)));
    assert_eq!(extended(0, 0, 0, SIZE), refused(Refusal::PayloadTooLong));
}

#[test]
fn read_only_exports_refuse_what_changes_content() {
    let negotiated = negotiated(true, ReplyStyle::Simple);
    let stream: Vec<u8> = [1, 4, 6, 3, 0, 5]
        .iter()
        .flat_map(|kind| {
            let length = if *kind == 3 { 0 } else { 8 };
            let mut bytes = request(*kind, 0, 0, length).encode();
            bytes.extend(vec![0; if *kind == 1 { 8 } else { 0 }]);
            bytes
        })
        .collect();
    let read = HostCommand::Read { range: range(0, 8) };
    let read_only = || refused(Refusal::ReadOnly);
    let cache = HostCommand::Cache { range: range(0, 8) };
    let outcomes: Vec<_> = transmit(&negotiated, &stream, 9).into_iter().map(outcome).collect();
    assert_eq!(
        outcomes,
        [read_only(), read_only(), read_only(), run(HostCommand::Flush), run(read), run(cache)]
    );
    assert_eq!(Refusal::ReadOnly.errno(), 1);
}

#[test]
fn the_refusal_of_a_write_comes_behind_its_payload() {
    let mut machine = Transmission::new(&negotiated(false, ReplyStyle::Simple));
    let length = (64 << 20) + 1;
    let header = request(1, 0, 0, length).encode();
    assert_eq!(machine.parse(&header).event, Event::NeedMore);
    let piece = vec![0xaa; 1 << 20];
    for _ in 0..64 {
        assert_eq!(machine.parse(&piece).event, Event::NeedMore);
    }
    let parsed = machine.parse(&piece);
    assert_eq!(outcome(parsed.event), refused(Refusal::PayloadTooLong));
    assert_eq!(parsed.consumed, 1);
    let parsed = machine.parse(&request(3, 0, 0, 0).encode());
    assert_eq!(outcome(parsed.event), run(HostCommand::Flush));
}

#[test]
fn a_bad_magic_breaks_the_connection_for_good() {
    let mut machine = Transmission::new(&negotiated(false, ReplyStyle::Simple));
    let broken = Event::Broken(BrokenReason::RequestMagic(0));
    assert_eq!(machine.parse(&[0; 28]).event, broken);
    assert_eq!(machine.parse(&request(3, 0, 0, 0).encode()).event, broken);
}

#[test]
fn each_framing_has_its_own_magic() {
    let mut machine = Transmission::new(&negotiated(false, ReplyStyle::Extended));
    let compact = [request(3, 0, 0, 0).encode(), vec![0; 4]].concat();
    assert_eq!(machine.parse(&compact).event, Event::Broken(BrokenReason::RequestMagic(0x2560_9513)));
    let mut machine = Transmission::new(&negotiated(false, ReplyStyle::Structured));
    let extended = request(3, 0, 0, 0).encode_extended();
    assert_eq!(machine.parse(&extended).event, Event::Broken(BrokenReason::RequestMagic(0x21e4_1c71)));
}

#[test]
fn commands_without_payload_may_be_as_long_as_the_export() {
    let whole = range(0, SIZE);
    assert_eq!(extended(4, FUA, 0, SIZE), run(HostCommand::Trim { range: whole, fua: true }));
    assert_eq!(extended(5, 0, 0, SIZE), run(HostCommand::Cache { range: whole }));
    assert_eq!(extended(7, ONE, 0, SIZE), run(HostCommand::Status { range: whole, one: true }));
    let zeroes = HostCommand::WriteZeroes { range: whole, fua: false, no_hole: false, fast: true };
    assert_eq!(extended(6, FAST, 0, SIZE), run(zeroes));
}

#[test]
fn a_write_has_its_payload_whether_or_not_the_client_flags_it() {
    let write = HostCommand::Write { range: range(0, 512), fua: false };
    for flags in [0, PAYLOAD] {
        assert_eq!(extended(1, flags, 0, 512), Outcome::Write(write, 512));
    }
}

#[test]
fn a_payload_that_no_command_takes_is_consumed() {
    let negotiated = negotiated(false, ReplyStyle::Extended);
    for kind in [0, 3, 4, 5, 6] {
        let header = request(kind, PAYLOAD, 0, 100).encode_extended();
        let stream = [&header[..], &[0xaa; 100], &request(3, 0, 0, 0).encode_extended()].concat();
        let outcomes: Vec<_> = transmit(&negotiated, &stream, 33).into_iter().map(outcome).collect();
        assert_eq!(outcomes, [refused(Refusal::UnexpectedPayload), run(HostCommand::Flush)]);
    }
}

#[test]
fn a_payload_beyond_patience_breaks_the_connection() {
    let patience = u64::from(u32::MAX);
    for kind in [0, 1, 7, 99] {
        let broken = Outcome::Broken(BrokenReason::PayloadLength(patience + 1));
        assert_eq!(extended(kind, PAYLOAD, 0, patience + 1), broken);
        assert_eq!(extended(kind, PAYLOAD, 0, patience), Outcome::More);
    }
}

#[test]
fn a_status_needs_a_selected_context() {
    let negotiated = Negotiated { base_allocation: false, ..negotiated(false, ReplyStyle::Structured) };
    let header = request(7, 0, 0, 512).encode();
    let event = Transmission::new(&negotiated).parse(&header).event;
    assert_eq!(outcome(event), refused(Refusal::NoContext));
}

#[test]
fn a_status_payload_names_the_context_and_the_length() {
    let status = |one| run(HostCommand::Status { range: range(4096, 1 << 35), one });
    let payload = status_payload(1 << 35, &[1]);
    assert_eq!(status_then_flush(&payload, 0, true), [status(false), run(HostCommand::Flush)]);
    assert_eq!(status_then_flush(&payload, ONE, true), [status(true), run(HostCommand::Flush)]);
}

#[test]
fn a_bad_status_payload_is_consumed_and_refused() {
    let cases = [
        (status_payload(512, &[1]), false, Refusal::NoContext),
        (status_payload(512, &[]), true, Refusal::StatusPayload),
        (status_payload(512, &[2]), true, Refusal::StatusPayload),
        (status_payload(512, &[1, 1]), true, Refusal::StatusPayload),
        (status_payload(512, &[1; 5000]), true, Refusal::StatusPayload),
        (vec![0; 11], true, Refusal::StatusPayload),
        (status_payload(0, &[1]), true, Refusal::EmptyStatus),
        (status_payload(SIZE, &[1]), true, Refusal::ReadBeyondEnd),
        (status_payload(u64::MAX, &[1]), true, Refusal::ReadBeyondEnd),
    ];
    for (payload, selected, refusal) in cases {
        assert_eq!(refusal.errno(), 22);
        let outcomes = status_then_flush(&payload, 0, selected);
        assert_eq!(outcomes, [refused(refusal), run(HostCommand::Flush)]);
    }
}
