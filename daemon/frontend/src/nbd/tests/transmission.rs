//! Requests, one by one.

use block::{ByteCount, ByteRange, HostCommand, HostError, VolumeId};

use super::client::Request;
use crate::nbd::fuzz::transmit;
use crate::nbd::{BrokenReason, Cookie, Event, Negotiated, Refusal, ReplyStyle, Transmission};

const SIZE: u64 = 1 << 40;
const COOKIE: Cookie = Cookie(0xfeed_0000_0000_0001);
const FUA: u16 = 1;
const NO_HOLE: u16 = 2;
const DF: u16 = 4;

fn negotiated(read_only: bool, reply_style: ReplyStyle) -> Negotiated {
    Negotiated {
        name: "disk".to_owned(),
        volume: VolumeId::default(),
        size: ByteCount(SIZE),
        read_only,
        reply_style,
    }
}

fn request(kind: u16, flags: u16, offset: u64, length: u32) -> Request {
    Request { flags, kind, cookie: COOKIE.0, offset, length }
}

/// The event that a request's header leads to, on a writable export with structured replies.
fn event(kind: u16, flags: u16, offset: u64, length: u32) -> Event {
    let negotiated = negotiated(false, ReplyStyle::Structured);
    let header = request(kind, flags, offset, length).encode();
    Transmission::new(&negotiated).parse(&header).event
}

fn run(command: HostCommand) -> Event {
    Event::Request { cookie: COOKIE, command }
}

fn refused(refusal: Refusal) -> Event {
    Event::Refused { cookie: COOKIE, refusal }
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
    assert_eq!(event(1, FUA, 4096, 512), Event::WritePayload { cookie: COOKIE, command: write, length: 512 });
    assert_eq!(event(3, FUA, 0, 0), run(HostCommand::Flush));
    let trim = HostCommand::Trim { range: range(0, u64::from(u32::MAX)), fua: false };
    assert_eq!(event(4, 0, 0, u32::MAX), run(trim));
    let zeroes =
        HostCommand::WriteZeroes { range: range(SIZE - 1, 1), fua: true, no_hole: true, fast: false };
    assert_eq!(event(6, FUA | NO_HOLE, SIZE - 1, 1), run(zeroes));
    assert_eq!(event(2, 0xffff, 9, 9), Event::Disconnect);
}

#[test]
fn unknown_commands_and_flags_are_invalid_and_the_connection_stays() {
    for kind in [5, 7, 8, 99, 0xffff] {
        assert_eq!(event(kind, 0, 0, 4096), refused(Refusal::UnknownCommand));
    }
    for (kind, flags) in [(0, NO_HOLE), (0, 8), (3, DF), (4, NO_HOLE), (6, 16), (6, DF), (4, 32)] {
        assert_eq!(event(kind, flags, 0, 0), refused(Refusal::UnknownFlag));
    }
    assert_eq!(event(3, 0, 0, 1), refused(Refusal::FlushRange));
    assert_eq!(event(3, 0, 1, 0), refused(Refusal::FlushRange));
    assert_eq!(Refusal::UnknownCommand.error(), HostError::Invalid);
}

#[test]
fn do_not_fragment_needs_structured_replies() {
    let header = request(0, DF, 0, 512).encode();
    let events = transmit(&negotiated(false, ReplyStyle::Simple), &header, 28);
    assert_eq!(events, [refused(Refusal::UnknownFlag)]);
}

#[test]
fn beyond_the_end_writes_lack_space_and_reads_are_invalid() {
    for (offset, length) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1), (u64::MAX - 3, 4)] {
        for (kind, error) in [(0, HostError::Invalid), (4, HostError::Invalid), (6, HostError::NoSpace)] {
            let Event::Refused { refusal, .. } = event(kind, 0, offset, length) else {
                panic!("served beyond the end");
            };
            assert_eq!(refusal.error(), error);
        }
    }
    assert_eq!(event(1, 0, SIZE + 1, 0), refused(Refusal::WriteBeyondEnd));
}

#[test]
fn a_request_for_nothing_is_served_up_to_the_end() {
    for kind in [0, 1, 4, 6] {
        assert_eq!(event(kind, FUA, SIZE, 0), Event::Served { cookie: COOKIE });
    }
}

#[test]
fn payloads_up_to_64_mib_are_served_and_longer_ones_are_refused() {
    let longest = 64 << 20;
    assert!(matches!(event(0, 0, 0, longest), Event::Request { .. }));
    assert!(matches!(event(1, 0, 0, longest), Event::WritePayload { .. }));
    assert_eq!(event(0, 0, 0, longest + 1), refused(Refusal::PayloadTooLong));
}

#[test]
fn read_only_exports_refuse_what_changes_content() {
    let negotiated = negotiated(true, ReplyStyle::Simple);
    let stream: Vec<u8> = [1, 4, 6, 3, 0]
        .iter()
        .flat_map(|kind| {
            let length = if *kind == 3 { 0 } else { 8 };
            let mut bytes = request(*kind, 0, 0, length).encode();
            bytes.extend(vec![0; if *kind == 1 { 8 } else { 0 }]);
            bytes
        })
        .collect();
    let read_only = refused(Refusal::ReadOnly);
    let read = HostCommand::Read { range: range(0, 8) };
    assert_eq!(
        transmit(&negotiated, &stream, 9),
        [read_only, read_only, read_only, run(HostCommand::Flush), run(read)]
    );
    assert_eq!(Refusal::ReadOnly.error(), HostError::ReadOnly);
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
    assert_eq!(parsed.event, refused(Refusal::PayloadTooLong));
    assert_eq!(parsed.consumed, 1);
    let parsed = machine.parse(&request(3, 0, 0, 0).encode());
    assert_eq!(parsed.event, run(HostCommand::Flush));
}

#[test]
fn a_bad_magic_breaks_the_connection_for_good() {
    let mut machine = Transmission::new(&negotiated(false, ReplyStyle::Simple));
    let broken = Event::Broken(BrokenReason::RequestMagic(0));
    assert_eq!(machine.parse(&[0; 28]).event, broken);
    assert_eq!(machine.parse(&request(3, 0, 0, 0).encode()).event, broken);
}
