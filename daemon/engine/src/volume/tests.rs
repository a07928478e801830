//! The volume against a naive byte model, executed by a tiny shard that ends its operations in random order.

use std::num::NonZeroU32;

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length).unwrap()
}

fn write(offset: u64, length: u64, fua: bool) -> HostCommand {
    HostCommand::Write { range: range(offset, length), fua }
}

fn trim(offset: u64, length: u64, fua: bool) -> HostCommand {
    HostCommand::Trim { range: range(offset, length), fua }
}

fn zeroes(offset: u64, length: u64, fua: bool) -> HostCommand {
    HostCommand::WriteZeroes { range: range(offset, length), fua, no_hole: false, fast: false }
}

fn bounds(range: ByteRange) -> std::ops::Range<usize> {
    usize::try_from(range.offset()).unwrap()..usize::try_from(range.end()).unwrap()
}

fn volume(size: u64, limit: IopsLimit, mirrored: bool) -> Volume {
    Volume::new(VolumeConfig { size: ByteCount(size), limit, mirrored }, Monotonic(0))
}

/// Runs a volume's effects on plain bytes; the payload of command `n` is all bytes `n + 1`.
struct Shard {
    volume: Volume,
    now: Monotonic,
    home: Vec<u8>,
    pending: Vec<Effect>,
    prepared: BTreeMap<StepId, Vec<u8>>,
    zeroing: Vec<CommandId>,
    /// The ranges of write steps and copies between their first effect and their end.
    held: BTreeMap<StepId, ByteRange>,
    replies: BTreeMap<CommandId, HostResult>,
    step_max: BTreeMap<CommandId, usize>,
}

impl Shard {
    fn new(volume: Volume, size: u64) -> Self {
        Self {
            volume,
            now: Monotonic(0),
            home: vec![0xEE; usize::try_from(size).unwrap()],
            pending: Vec::new(),
            prepared: BTreeMap::new(),
            zeroing: Vec::new(),
            held: BTreeMap::new(),
            replies: BTreeMap::new(),
            step_max: BTreeMap::new(),
        }
    }

    fn submit(&mut self, id: u64, command: HostCommand) {
        if let HostCommand::WriteZeroes { .. } = command {
            self.zeroing.push(CommandId(id));
        }
        self.volume.submit(self.now, CommandId(id), command);
        self.collect();
    }

    fn collect(&mut self) {
        self.held.retain(|step, _| self.volume.steps.find(step.0).is_some());
        while let Some(effect) = self.volume.poll_effect() {
            match effect {
                Effect::Reply { command, result } => {
                    assert_eq!(self.replies.insert(command, result), None, "one reply each");
                }
                Effect::Granted { .. } => unreachable!("nothing is reserved"),
                Effect::Prepare { step, device, .. }
                | Effect::Admit { step, device, .. }
                | Effect::Write { step, device, .. }
                | Effect::ZeroRange { step, device, .. }
                | Effect::CopyReady { step, device } => {
                    let zeroes = matches!(
                        effect,
                        Effect::ZeroRange { .. } | Effect::Admit { content: Content::Trimmed, .. }
                    );
                    let most = if zeroes { ZERO_STEP_BYTES_MAX } else { MIB };
                    assert!(device.is_unit_aligned() && device.length() <= most);
                    let clash = self.held.iter().any(|(other, held)| *other != step && held.overlaps(device));
                    assert!(!clash, "two writes at once on {device}");
                    self.held.insert(step, device);
                    self.pending.push(effect);
                }
                Effect::Read { .. } | Effect::Flush { .. } | Effect::Inquire { .. } => {
                    self.pending.push(effect)
                }
            }
        }
        let mut steps = BTreeMap::new();
        for step in self.volume.steps.values().filter_map(|step| step.command) {
            *steps.entry(step).or_insert(0_usize) += 1;
        }
        assert!(steps.values().all(|count| *count <= STEPS_IN_FLIGHT_MAX));
        self.step_max.extend(steps);
    }

    /// Ends one pending operation; `result` is the device's answer.
    fn end(&mut self, index: usize, result: HostResult) {
        let now = self.now;
        match self.pending.remove(index) {
            Effect::Read { step, device, wanted, .. } => {
                assert!(device.contains(wanted));
                self.volume.read_done(now, step, result);
            }
            Effect::Prepare { step, command, device, wanted, read_head, read_tail } => {
                let sealed = self.seal(command, device, wanted, (read_head, read_tail));
                self.prepared.insert(step, sealed);
                self.volume.prepared(now, step, result);
            }
            Effect::Admit { step, .. } => match result {
                Ok(()) => self.volume.admitted(now, step),
                Err(error) => self.volume.admit_failed(now, step, error),
            },
            Effect::Write { step, device, content, .. } => {
                let bytes = match content {
                    Content::Sealed => self.prepared.remove(&step).unwrap(),
                    Content::Zeros => vec![0; bounds(device).len()],
                    Content::Trimmed => panic!("a trim is no write"),
                };
                if result.is_ok() {
                    self.home[bounds(device)].copy_from_slice(&bytes);
                }
                self.volume.written(now, step, result);
            }
            Effect::ZeroRange { step, device, .. } => {
                if result.is_ok() {
                    self.home[bounds(device)].fill(0);
                }
                self.volume.zeroed(now, step, result);
            }
            Effect::Flush { step, .. } => self.volume.flushed(now, step, result),
            Effect::Inquire { step, .. } => self.volume.inquired(now, step, result),
            Effect::CopyReady { step, .. } => {
                self.volume.copy_done(now, step);
            }
            Effect::Granted { .. } | Effect::Reply { .. } => unreachable!(),
        }
        self.collect();
    }

    /// What `Prepare` asks for, from home only where it says that home is needed.
    fn seal(&self, command: CommandId, device: ByteRange, wanted: ByteRange, read: (bool, bool)) -> Vec<u8> {
        let mut bytes = vec![0xDD; bounds(device).len()];
        let unit = usize::try_from(DATA_UNIT_BYTES).unwrap();
        let home = &self.home[bounds(device)];
        if read.0 {
            bytes[..unit].copy_from_slice(&home[..unit]);
        }
        if read.1 {
            let tail = bytes.len() - unit;
            bytes[tail..].copy_from_slice(&home[tail..]);
        }
        let payload = if self.zeroing.contains(&command) { 0 } else { fill(command.0) };
        let start = usize::try_from(wanted.offset() - device.offset()).unwrap();
        bytes[start..start + usize::try_from(wanted.length()).unwrap()].fill(payload);
        bytes
    }

    fn end_all(&mut self) {
        while !self.pending.is_empty() {
            self.end(0, Ok(()));
        }
    }

    fn reply(&self, id: u64) -> Option<HostResult> {
        self.replies.get(&CommandId(id)).copied()
    }
}

fn fill(command: u64) -> u8 {
    u8::try_from(command % 255 + 1).unwrap()
}

fn apply_to_model(model: &mut [u8], id: u64, command: &HostCommand) {
    match command {
        HostCommand::Write { range, .. } => model[bounds(*range)].fill(fill(id)),
        HostCommand::WriteZeroes { range, .. } => model[bounds(*range)].fill(0),
        HostCommand::Trim { range, .. } if range.length() >= MIB => {
            model[bounds(range.unit_inward())].fill(0)
        }
        HostCommand::Trim { .. }
        | HostCommand::Read { .. }
        | HostCommand::Flush
        | HostCommand::Cache { .. }
        | HostCommand::Status { .. } => {}
    }
}

#[derive(Clone, Debug)]
enum Action {
    Submit(HostCommand),
    Copy(ByteRange),
    End(prop::sample::Index),
    Wait,
}

fn commands() -> impl Strategy<Value = HostCommand> {
    let length =
        prop_oneof![4 => 0_u64..20_000, 1 => (1_u64..40).prop_map(|n| n * 4096), 1 => 0_u64..3 * MIB];
    let offset = prop_oneof![3 => 0_u64..64_000, 1 => (0_u64..16).prop_map(|n| n * 4096), 1 => 0..SIZE];
    (offset, length, 0..9, any::<bool>()).prop_map(|(offset, length, kind, fua)| {
        let length = length.min(SIZE - offset);
        match kind {
            0..3 => write(offset, length, fua),
            3 => trim(offset, length, fua),
            4..6 => zeroes(offset, length, fua),
            6 => HostCommand::Read { range: range(offset, length) },
            7 => HostCommand::Status { range: range(offset, length), one: fua },
            _ => HostCommand::Flush,
        }
    })
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let copies = (0_u64..64, 1_u64..8).prop_map(|(unit, count)| range(unit * 4096, count * 4096));
    let action = prop_oneof![
        4 => commands().prop_map(Action::Submit),
        1 => copies.prop_map(Action::Copy),
        6 => any::<prop::sample::Index>().prop_map(Action::End),
        1 => Just(Action::Wait),
    ];
    prop::collection::vec(action, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn home_equals_a_serial_execution_in_admission_order(actions in actions(), mirrored: bool, limited: bool) {
        let limit = if limited { NonZeroU32::new(1000).map_or(IopsLimit::Unlimited, IopsLimit::PerSecond) } else { IopsLimit::Unlimited };
        let mut shard = Shard::new(volume(SIZE, limit, mirrored), SIZE);
        let mut model = shard.home.clone();
        let (mut submitted, mut picks) = (0, Vec::new());
        for action in actions {
            match action {
                Action::Submit(command) => {
                    apply_to_model(&mut model, submitted, &command);
                    shard.submit(submitted, command);
                    submitted += 1;
                }
                Action::Copy(device) => {
                    shard.volume.begin_copy(shard.now, device);
                    shard.collect();
                }
                Action::End(index) if !shard.pending.is_empty() => {
                    picks.push(index);
                    shard.end(index.index(shard.pending.len()), Ok(()));
                }
                Action::End(_) => {}
                Action::Wait => {
                    shard.now = shard.volume.poll_timeout().unwrap_or(shard.now);
                    shard.volume.handle_time(shard.now);
                    shard.collect();
                }
            }
        }
        let mut turn = 0;
        while !shard.pending.is_empty() || shard.volume.poll_timeout().is_some() {
            if shard.pending.is_empty() {
                shard.now = shard.volume.poll_timeout().unwrap();
                shard.volume.handle_time(shard.now);
                shard.collect();
            } else {
                let pick = picks.get(turn % picks.len().max(1)).map_or(0, |pick| pick.index(shard.pending.len()));
                shard.end(pick, Ok(()));
            }
            turn += 1;
        }
        prop_assert_eq!(shard.replies.len() as u64, submitted, "no lost replies");
        prop_assert!(shard.replies.values().all(Result::is_ok));
        prop_assert!(shard.home == model);
        prop_assert!(shard.volume.locks.is_empty() && shard.volume.steps.len() == 0);
        prop_assert!(shard.held.is_empty());
        prop_assert_eq!(shard.volume.in_flight(), 0);
    }

    #[test]
    fn errors_never_lose_a_reply_or_a_lock(actions in actions(), mirrored: bool, failures in prop::collection::vec(0_u8..6, 200)) {
        let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, mirrored), SIZE);
        let mut failures = failures.into_iter().cycle();
        let mut answer = || if failures.next() == Some(0) { Err(HostError::Io) } else { Ok(()) };
        let mut submitted = 0;
        for action in actions {
            match action {
                Action::Submit(command) => {
                    shard.submit(submitted, command);
                    submitted += 1;
                }
                Action::Copy(device) => {
                    shard.volume.begin_copy(shard.now, device);
                    shard.collect();
                }
                Action::End(index) if !shard.pending.is_empty() => {
                    shard.end(index.index(shard.pending.len()), answer());
                }
                Action::End(_) | Action::Wait => {}
            }
        }
        while !shard.pending.is_empty() {
            shard.end(0, answer());
        }
        prop_assert_eq!(shard.replies.len() as u64, submitted);
        prop_assert!(shard.volume.locks.is_empty() && shard.volume.commands.is_empty());
    }
}

#[test]
fn a_huge_trim_has_few_steps_in_flight() {
    let size = 16 << 40;
    let mut shard = Shard::new(volume(size, IopsLimit::Unlimited, true), 0);
    shard.volume.submit(Monotonic(0), CommandId(0), trim(5, size - 5, false));
    shard.collect();
    assert_eq!(shard.pending.len(), ZERO_STEPS_IN_FLIGHT_MAX);
    for _ in 0..100 {
        shard.end(0, Ok(()));
        assert_eq!(shard.volume.steps.len(), ZERO_STEPS_IN_FLIGHT_MAX);
        let zero = shard.pending.pop().unwrap();
        let Effect::ZeroRange { step, .. } = zero else { panic!("{zero:?}") };
        shard.volume.zeroed(Monotonic(0), step, Ok(()));
        shard.collect();
    }
    shard.volume.set_offline(Monotonic(0));
    while let Some(effect) = shard.pending.pop() {
        let (Effect::Admit { step, .. } | Effect::ZeroRange { step, .. }) = effect else {
            panic!("{effect:?}")
        };
        if matches!(effect, Effect::Admit { .. }) {
            shard.volume.admit_failed(Monotonic(0), step, HostError::Shutdown);
        } else {
            shard.volume.zeroed(Monotonic(0), step, Ok(()));
        }
        shard.collect();
    }
    assert_eq!(shard.reply(0), Some(Err(HostError::Shutdown)));
    assert_eq!(shard.volume.in_flight(), 0);
}

#[test]
fn a_fast_zeroing_changes_nothing_where_ranges_cannot_be_zeroed() {
    for (offset, length) in [(100, 2 * MIB), (0, MIB + 7), (4095, MIB), (4096, MIB)] {
        let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, false), SIZE);
        let range = range(offset, length);
        let command = HostCommand::WriteZeroes { range, fua: true, no_hole: false, fast: true };
        let mut model = shard.home.clone();
        for (id, result) in [(0, Err(HostError::NotSupported)), (1, Ok(()))] {
            shard.submit(id, command);
            assert!(!shard.pending.is_empty());
            let whole = |effect: &Effect| matches!(effect, Effect::ZeroRange { .. });
            assert!(shard.pending.iter().all(whole), "the ends come last: {:?}", shard.pending);
            while shard.pending.iter().any(whole) {
                shard.end(0, result);
            }
            shard.end_all();
            if result.is_ok() {
                apply_to_model(&mut model, id, &command);
            }
            assert_eq!(shard.reply(id), Some(result));
            assert!(shard.home == model, "{range}: {result:?}");
        }
    }
}

#[test]
fn a_small_trim_does_nothing_and_zero_lengths_are_answered() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, true), SIZE);
    let commands = [
        trim(0, MIB - 1, true),
        write(7, 0, true),
        zeroes(9, 0, true),
        HostCommand::Read { range: range(SIZE, 0) },
    ];
    for (id, command) in (0..).zip(commands) {
        shard.submit(id, command);
        assert_eq!(shard.reply(id), Some(Ok(())));
    }
    assert!(shard.pending.is_empty());
}

#[test]
fn forced_unit_access_is_durable_on_every_path() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, false), SIZE);
    shard.submit(0, write(4096, 4096, true));
    shard.end(0, Ok(()));
    assert!(matches!(shard.pending[0], Effect::Write { durable: true, .. }));
    shard.end(0, Ok(()));
    shard.submit(1, zeroes(0, 8192, true));
    assert!(matches!(shard.pending[0], Effect::Write { content: Content::Zeros, durable: true, .. }));
    shard.end(0, Ok(()));
    shard.submit(2, zeroes(0, 2 * MIB, true));
    assert!(matches!(shard.pending[..], [Effect::ZeroRange { .. }]));
    shard.end(0, Ok(()));
    assert!(matches!(shard.pending[..], [Effect::Flush { .. }]) && shard.reply(2).is_none());
    shard.end(0, Ok(()));
    assert_eq!(shard.reply(2), Some(Ok(())));
    shard.submit(3, zeroes(0, 2 * MIB, false));
    shard.end_all();
    assert_eq!(shard.reply(3), Some(Ok(())));
}

#[test]
fn a_failed_flush_poisons_writes_and_flushes_but_not_reads() {
    let one = NonZeroU32::new(1).map_or(IopsLimit::Unlimited, IopsLimit::PerSecond);
    let mut shard = Shard::new(volume(SIZE, one, false), SIZE);
    shard.submit(0, write(0, 100, false));
    shard.submit(1, write(0, 100, false));
    shard.submit(2, HostCommand::Read { range: range(0, 1) });
    assert_eq!(shard.volume.throttled(), 2);
    shard.submit(3, HostCommand::Flush);
    shard.submit(4, HostCommand::Flush);
    let flush = shard.pending.iter().position(|effect| matches!(effect, Effect::Flush { .. })).unwrap();
    shard.end(flush, Err(HostError::Io));
    assert!(shard.volume.is_poisoned());
    assert_eq!((shard.reply(1), shard.reply(2)), (Some(Err(HostError::Io)), None));
    shard.end_all();
    assert_eq!(shard.reply(0), Some(Err(HostError::Io)), "prepared, but not written any more");
    assert_eq!(shard.reply(4), Some(Err(HostError::Io)), "its flush says nothing any more");
    shard.submit(5, HostCommand::Flush);
    shard.submit(6, write(0, 1, false));
    assert_eq!((shard.reply(5), shard.reply(6)), (Some(Err(HostError::Io)), Some(Err(HostError::Io))));
    shard.now = shard.volume.poll_timeout().unwrap();
    shard.volume.handle_time(shard.now);
    shard.collect();
    shard.end_all();
    assert_eq!(shard.reply(2), Some(Ok(())));
}

#[test]
fn only_a_failed_durable_write_poisons() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, false), SIZE);
    for (id, fua) in [(0, false), (1, true)] {
        shard.submit(id, write(0, 4096, fua));
        shard.end(0, Ok(()));
        shard.end(0, Err(HostError::Io));
        assert_eq!(shard.reply(id), Some(Err(HostError::Io)));
        assert_eq!(shard.volume.is_poisoned(), fua);
    }
}

#[test]
fn requests_beyond_the_end_are_refused() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, false), SIZE);
    shard.submit(0, write(SIZE - 1, 2, false));
    shard.submit(1, zeroes(SIZE, 1, false));
    shard.submit(2, HostCommand::Read { range: range(SIZE - 1, 2) });
    shard.submit(3, trim(SIZE, 1, false));
    let replies: Vec<_> = shard.replies.values().copied().collect();
    let (no_space, invalid) = (Err(HostError::NoSpace), Err(HostError::Invalid));
    assert_eq!(replies, [no_space, no_space, invalid, invalid]);
}

#[test]
fn a_grown_volume_serves_what_was_added() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, false), 2 * SIZE);
    shard.submit(0, write(SIZE, 4096, false));
    assert_eq!(shard.replies[&CommandId(0)], Err(HostError::NoSpace));
    shard.volume.set_size(ByteCount(2 * SIZE));
    shard.submit(1, write(2 * SIZE - 4096, 4096, false));
    shard.submit(2, write(2 * SIZE, 4096, false));
    shard.end_all();
    assert_eq!(shard.replies[&CommandId(1)], Ok(()));
    assert_eq!(shard.replies[&CommandId(2)], Err(HostError::NoSpace));
}

#[test]
#[should_panic(expected = "never shrinks")]
fn a_volume_does_not_shrink() {
    volume(SIZE, IopsLimit::Unlimited, false).set_size(ByteCount(SIZE - 4096));
}

#[test]
fn a_copy_waits_for_writes_and_writes_wait_for_it() {
    let mut shard = Shard::new(volume(SIZE, IopsLimit::Unlimited, true), SIZE);
    shard.submit(0, write(0, 4096, false));
    let copy = shard.volume.begin_copy(shard.now, range(0, MIB));
    shard.submit(1, write(8192, 4096, false));
    assert_eq!(shard.pending.len(), 1);
    for _ in 0..3 {
        shard.end(0, Ok(()));
    }
    assert_eq!(shard.pending, [Effect::CopyReady { step: copy, device: range(0, MIB) }]);
    shard.end(0, Ok(()));
    assert!(matches!(shard.pending[..], [Effect::Prepare { .. }]));
    let given_up = shard.volume.begin_copy(shard.now, range(0, MIB));
    shard.volume.copy_done(shard.now, given_up);
    shard.end_all();
    assert_eq!((shard.reply(0), shard.reply(1)), (Some(Ok(())), Some(Ok(()))));
}

#[test]
fn forgotten_commands_get_no_reply() {
    let one = NonZeroU32::new(1).map_or(IopsLimit::Unlimited, IopsLimit::PerSecond);
    let mut shard = Shard::new(volume(SIZE, one, false), SIZE);
    shard.submit(0, write(0, 4096, false));
    shard.submit(1, write(0, 4096, false));
    assert!(shard.volume.forget(shard.now, CommandId(0)));
    assert!(!shard.volume.forget(shard.now, CommandId(1)));
    assert_eq!(shard.volume.poll_timeout(), None);
    shard.end_all();
    assert!(shard.replies.is_empty() && !shard.volume.is_running(CommandId(0)));
    assert_eq!(shard.home[0], fill(0));
}

#[test]
fn an_offline_volume_ends_what_it_has_and_takes_nothing_new() {
    let one = NonZeroU32::new(1).map_or(IopsLimit::Unlimited, IopsLimit::PerSecond);
    let mut shard = Shard::new(volume(SIZE, one, false), SIZE);
    shard.submit(0, write(0, 4096, false));
    shard.submit(1, write(0, 4096, false));
    shard.volume.set_offline(shard.now);
    shard.submit(2, HostCommand::Flush);
    assert_eq!(shard.volume.in_flight(), 1);
    shard.end_all();
    let shutdown = Some(Err(HostError::Shutdown));
    assert_eq!((shard.reply(0), shard.reply(1), shard.reply(2)), (Some(Ok(())), shutdown, shutdown));
    assert_eq!(shard.volume.in_flight(), 0);
}
