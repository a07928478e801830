//! One volume's commands, from the host's request to its reply.
//!
//! Guarantees: each command is charged to the IOPS limit once, first come, first served, and split into steps of
//! at most [`STEP_BYTES_MAX`], of which at most [`STEPS_IN_FLIGHT_MAX`] exist at once; write steps that share a
//! data unit run one after the other, each from before its `Prepare` until its home write ended, so that home
//! order is the order of `Admit`; a command gets exactly one reply, after its last step, with the first error.
//! A flush is not queued: it covers what was answered before. A command of many tokens can be reserved before its
//! memory is taken.
//!
//! A failed flush or failed durable write *poisons* the volume: what reached stable media is unknown, so writes
//! and flushes are refused from then on, and reads served. Nothing heals it but a restart.
//!
//! How to drive it: call `submit`, the completion methods and `handle_time` as things happen; after each, take
//! effects from [`Volume::poll_effect`] until `None`, then the next deadline from [`Volume::poll_timeout`]. The
//! caller bounds the commands it submits (a session's window).
//!
//! A completion that does not fit its step is the caller's defect and panics.
//!
//! The volume sees neither payloads nor keys. Its rules are in docs/ARCHITECTURE.md, "Path of a write".

mod effect;
mod hold;
mod reserve;
mod split;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use block::{
    ByteCount, ByteRange, DATA_UNIT_BYTES, HostCommand, HostError, HostResult, IopsLimit, Monotonic,
};

pub use self::effect::{Content, Effect};
use self::hold::Hold;
use self::split::{Splitter, Task};
use crate::arena::Arena;
use crate::locks::{Acquired, RangeLocks};
use crate::qos::{self, Limiter};
use crate::{CommandId, STEP_BYTES_MAX, StepId, ZERO_STEP_BYTES_MAX};

/// The most steps of one command in flight: enough to keep a device busy, few enough that a command of the
/// longest length neither fills the device's queue nor holds more than 8 MiB of sealed data.
pub const STEPS_IN_FLIGHT_MAX: usize = 8;

/// The same for a command that zeroes more than so many steps could: a file system takes one a file at a time, and those
/// that wait for it each keep a thread of the kernel from other volumes.
pub const ZERO_STEPS_IN_FLIGHT_MAX: usize = 2;

/// What a volume is.
#[derive(Clone, Copy, Debug)]
pub struct VolumeConfig {
    /// Bytes that hosts see; whole data units.
    pub size: ByteCount,
    /// The limit over all its connections.
    pub limit: IopsLimit,
    /// True if write steps need a sequence.
    pub mirrored: bool,
}

/// The state machine of one volume.
pub struct Volume {
    size: ByteCount,
    mirrored: bool,
    poisoned: bool,
    online: bool,
    limit: IopsLimit,
    limiter: Limiter,
    /// Tokens taken so far.
    tokens: u64,
    /// Writes may not begin.
    hold: Option<Hold>,
    /// When the first command of `queue` can have its tokens.
    ready_at: Option<Monotonic>,
    /// Commands that wait for tokens.
    queue: VecDeque<(CommandId, HostCommand)>,
    /// Commands, of the queue or granted, that are not submitted yet.
    reserved: BTreeSet<CommandId>,
    commands: BTreeMap<CommandId, Running>,
    steps: Arena<Step>,
    /// Steps of copies among them.
    copies: usize,
    locks: RangeLocks,
    /// Steps whose lock was granted and that have not started.
    granted: VecDeque<StepId>,
    effects: VecDeque<Effect>,
    throttled: u64,
}

/// A command that has its tokens.
struct Running {
    command: HostCommand,
    splitter: Splitter,
    steps_in_flight: usize,
    error: Option<HostError>,
    /// A flush follows the last step: a FLUSH command's own, or FUA's after ZERO_RANGE.
    flush_last: bool,
    /// Its connection is gone; nobody waits for a reply.
    forgotten: bool,
}

struct Step {
    /// `None` for a copy.
    command: Option<CommandId>,
    task: Task,
    stage: Stage,
}

/// What a step waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Lock,
    Read,
    Prepare,
    Admit,
    Home,
    Flush,
    Inquiry,
    Copy,
}

impl Running {
    fn steps_in_flight_max(&self) -> usize {
        const LONG: u64 = ZERO_STEP_BYTES_MAX * (STEPS_IN_FLIGHT_MAX as u64);
        let long = self.command.range().is_some_and(|range| range.length() > LONG);
        if long && self.splitter.zeroes_ranges() { ZERO_STEPS_IN_FLIGHT_MAX } else { STEPS_IN_FLIGHT_MAX }
    }
}

impl Volume {
    /// A volume that accepts commands.
    ///
    /// # Panics
    /// If the size is not in whole data units.
    pub fn new(config: VolumeConfig, now: Monotonic) -> Self {
        assert!(config.size.0.is_multiple_of(DATA_UNIT_BYTES), "a volume has whole data units");
        Self {
            size: config.size,
            mirrored: config.mirrored,
            poisoned: false,
            online: true,
            limit: config.limit,
            limiter: Limiter::new(config.limit, now),
            tokens: 0,
            hold: None,
            ready_at: None,
            queue: VecDeque::new(),
            reserved: BTreeSet::new(),
            commands: BTreeMap::new(),
            steps: Arena::default(),
            copies: 0,
            locks: RangeLocks::default(),
            granted: VecDeque::new(),
            effects: VecDeque::new(),
            throttled: 0,
        }
    }

    /// Takes a host's command. Its payload, if any, stays with the caller until the reply.
    ///
    /// # Panics
    /// If `id` is in flight.
    pub fn submit(&mut self, now: Monotonic, id: CommandId, command: HostCommand) {
        if let Err(error) = self.check(&command) {
            self.reply(id, Err(error));
            return;
        }
        if self.hold_back(now, id, command) {
            return;
        }
        if command == HostCommand::Flush {
            self.launch(id, command);
        } else {
            self.queue.push_back((id, command));
        }
        self.turn(now);
        if self.queue.back().is_some_and(|(last, _)| *last == id) {
            self.throttled += 1;
        }
    }

    /// Starts what the limit allows by now.
    pub fn handle_time(&mut self, now: Monotonic) {
        self.turn(now);
    }

    /// When `handle_time` is wanted next.
    pub fn poll_timeout(&self) -> Option<Monotonic> {
        [self.ready_at, self.hold_expires_at()].into_iter().flatten().min()
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// A `Read` ended; its bytes are delivered.
    pub fn read_done(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Read);
        self.finish(step, result);
        self.turn(now);
    }

    /// A `Prepare` ended.
    pub fn prepared(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Prepare);
        match result {
            Ok(()) => self.admit(step),
            Err(error) => self.finish(step, Err(error)),
        }
        self.turn(now);
    }

    /// An `Admit` ended: the step has its sequence.
    pub fn admitted(&mut self, now: Monotonic, step: StepId) {
        self.leave(step, Stage::Admit);
        self.write_home(step);
        self.turn(now);
    }

    /// An `Admit` failed: the step ends without a home write.
    pub fn admit_failed(&mut self, now: Monotonic, step: StepId, error: HostError) {
        self.leave(step, Stage::Admit);
        self.finish(step, Err(error));
        self.turn(now);
    }

    /// A `Write` ended. The failure of a durable one poisons the volume: its sync may be what failed. A durable one that
    /// ends on a poisoned volume has failed: another sync beside it may have taken the system's report of the loss.
    pub fn written(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Home);
        let durable = self.is_durable(step);
        if result.is_err() && durable {
            self.poison();
        }
        let result = if self.poisoned && durable { result.and(Err(HostError::Io)) } else { result };
        self.finish(step, result);
        self.turn(now);
    }

    /// A `ZeroRange` ended.
    pub fn zeroed(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Home);
        self.finish(step, result);
        self.turn(now);
    }

    /// A `Flush` ended. A failure poisons the volume, also for the flushes in flight beside it.
    pub fn flushed(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Flush);
        if result.is_err() {
            self.poison();
        }
        let result = if self.poisoned { Err(HostError::Io) } else { result };
        self.finish(step, result);
        self.turn(now);
    }

    /// An `Inquire` ended.
    pub fn inquired(&mut self, now: Monotonic, step: StepId, result: HostResult) {
        self.leave(step, Stage::Inquiry);
        self.finish(step, result);
        self.turn(now);
    }

    /// A flush that no command asked for failed: the volume is poisoned.
    pub fn flush_failed(&mut self, now: Monotonic) {
        self.poison();
        self.turn(now);
    }

    /// Asks for a range to be kept from writes, to copy it in the write order; `CopyReady` says when it is.
    ///
    /// # Panics
    /// If the range is empty, not in whole units, longer than a step or beyond the volume's end.
    pub fn begin_copy(&mut self, now: Monotonic, device: ByteRange) -> StepId {
        let fits = device.end() <= self.size.0 && (1..=STEP_BYTES_MAX).contains(&device.length());
        assert!(fits && device.is_unit_aligned(), "copy range {device} is not allowed");
        self.copies += 1;
        let step = self.begin_step(None, Task::Copy(device));
        self.turn(now);
        step
    }

    /// Ends a copy, ready or not.
    ///
    /// # Panics
    /// If the step is no copy in progress.
    pub fn copy_done(&mut self, now: Monotonic, step: StepId) {
        let copy = self.steps.find(step.0).map(|step| step.task);
        assert!(matches!(copy, Some(Task::Copy(_))), "{step:?} is no copy");
        self.finish(step, Ok(()));
        self.turn(now);
    }

    /// Forgets a command whose connection is gone: dropped if it has not started, else it ends without a reply, when
    /// its steps that have begun have ended; no more of them begin.
    ///
    /// Returns true if it has started and goes on; [`Self::is_running`] tells when it ended.
    pub fn forget(&mut self, now: Monotonic, id: CommandId) -> bool {
        self.queue.retain(|(queued, _)| *queued != id);
        self.reserved.remove(&id);
        self.forget_held(id);
        if let Some(running) = self.commands.get_mut(&id) {
            running.forgotten = true;
            running.error.get_or_insert(HostError::Shutdown);
        }
        self.turn(now);
        self.advance(id);
        self.is_running(id)
    }

    /// True if the command has started and not ended.
    pub fn is_running(&self, id: CommandId) -> bool {
        self.commands.contains_key(&id)
    }

    /// Stops accepting commands, for good. Those that wait for tokens are refused; those that started end with
    /// the steps they have in flight, and with `Shutdown` if some of their steps have not begun.
    pub fn set_offline(&mut self, now: Monotonic) {
        self.online = false;
        self.refuse_queued(HostError::Shutdown, |_| true);
        self.refuse_held(HostError::Shutdown);
        for running in self.commands.values_mut() {
            if !running.splitter.is_done() {
                running.error.get_or_insert(HostError::Shutdown);
            }
        }
        self.turn(now);
    }

    /// Commands started, and copies begun, that have not ended. A drain is over at 0.
    pub fn in_flight(&self) -> usize {
        self.commands.len() + self.copies
    }

    /// Commands that wait for the IOPS limit.
    pub fn queued(&self) -> usize {
        self.queue.len()
    }

    /// How many commands ever had to wait for the IOPS limit.
    pub const fn throttled(&self) -> u64 {
        self.throttled
    }

    /// True after a failed flush or a failed durable write.
    pub const fn is_poisoned(&self) -> bool {
        self.poisoned
    }

    /// The volume has grown: commands from now on may use what was added.
    ///
    /// # Panics
    /// If it would shrink, or not be in whole data units.
    pub fn set_size(&mut self, size: ByteCount) {
        assert!(size >= self.size, "a volume never shrinks under its commands");
        assert!(size.0.is_multiple_of(DATA_UNIT_BYTES), "a volume has whole data units");
        self.size = size;
    }

    /// Changes the IOPS limit.
    pub fn set_limit(&mut self, now: Monotonic, limit: IopsLimit) {
        self.limit = limit;
        self.limiter.set_limit(limit, now);
        self.turn(now);
    }

    /// The limit in force.
    pub const fn limit(&self) -> IopsLimit {
        self.limit
    }

    /// The tokens that commands have taken so far: what the limit counts.
    pub const fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Makes the volume mirrored, or no longer so, for the steps that have not passed `Admit`.
    pub const fn set_mirrored(&mut self, mirrored: bool) {
        self.mirrored = mirrored;
    }

    fn check(&self, command: &HostCommand) -> HostResult {
        if !self.online {
            return Err(HostError::Shutdown);
        }
        if self.poisoned && (command.changes_content() || *command == HostCommand::Flush) {
            return Err(HostError::Io);
        }
        let inside = command.range().is_none_or(|range| range.end() <= self.size.0);
        match command {
            HostCommand::Write { .. } | HostCommand::WriteZeroes { .. } if !inside => Err(HostError::NoSpace),
            HostCommand::Read { .. }
            | HostCommand::Trim { .. }
            | HostCommand::Cache { .. }
            | HostCommand::Status { .. }
                if !inside =>
            {
                Err(HostError::Invalid)
            }
            HostCommand::Read { .. }
            | HostCommand::Write { .. }
            | HostCommand::Flush
            | HostCommand::Trim { .. }
            | HostCommand::WriteZeroes { .. }
            | HostCommand::Cache { .. }
            | HostCommand::Status { .. } => Ok(()),
        }
    }

    /// One turn: admit by the limit, then start every step whose lock is granted.
    fn turn(&mut self, now: Monotonic) {
        self.expire_hold(now);
        self.ready_at = None;
        while let Some((id, command)) = self.queue.front().copied() {
            let cost = qos::cost(&command);
            if let Err(ready) = self.limiter.try_take(now, cost) {
                self.ready_at = Some(ready);
                break;
            }
            self.tokens += u64::from(cost);
            self.queue.pop_front();
            if self.reserved.contains(&id) {
                self.effects.push_back(Effect::Granted { command: id });
            } else {
                self.launch(id, command);
            }
        }
        while let Some(step) = self.granted.pop_front() {
            self.start(step);
        }
    }

    fn launch(&mut self, id: CommandId, command: HostCommand) {
        let splitter = Splitter::new(&command);
        let running = Running {
            flush_last: command == HostCommand::Flush || (is_fua(&command) && splitter.zeroes_ranges()),
            command,
            splitter,
            steps_in_flight: 0,
            error: None,
            forgotten: false,
        };
        let before = self.commands.insert(id, running);
        assert!(before.is_none(), "{id:?} is in flight already");
        self.advance(id);
    }

    /// Begins the steps of a command that may begin, or ends it.
    fn advance(&mut self, id: CommandId) {
        loop {
            let Some(running) = self.commands.get_mut(&id) else {
                return;
            };
            let sound = running.error.is_none();
            let alone = running.steps_in_flight == 0;
            if sound
                && running.steps_in_flight < running.steps_in_flight_max()
                && (alone || !running.splitter.awaits_others())
                && let Some(task) = running.splitter.next()
            {
                running.steps_in_flight += 1;
                self.begin_step(Some(id), task);
                continue;
            }
            if running.steps_in_flight > 0 {
                return;
            }
            if sound && running.flush_last {
                running.flush_last = false;
                running.steps_in_flight = 1;
                self.begin_step(Some(id), Task::Flush);
                return;
            }
            let result = running.error.map_or(Ok(()), Err);
            let forgotten = running.forgotten;
            self.commands.remove(&id);
            if !forgotten {
                self.reply(id, result);
            }
            return;
        }
    }

    fn begin_step(&mut self, command: Option<CommandId>, task: Task) -> StepId {
        let id = StepId(self.steps.insert(Step { command, task, stage: Stage::Lock }));
        let acquired = match task.lock() {
            Some((device, kind)) => self.locks.acquire(id, device, kind),
            None => Acquired::Granted,
        };
        match acquired {
            Acquired::Granted => self.granted.push_back(id),
            Acquired::Queued => {}
        }
        id
    }

    /// A step has its lock.
    fn start(&mut self, id: StepId) {
        // A copy may have been given up since its lock was granted.
        let Some((task, command)) = self.steps.find(id.0).map(|step| (step.task, step.command)) else {
            return;
        };
        if self.poisoned && (task.changes_content() || task == Task::Flush) {
            self.finish(id, Err(HostError::Io));
            return;
        }
        let running = command.and_then(|command| self.commands.get(&command));
        if running.is_some_and(|running| running.forgotten) {
            self.finish(id, Err(HostError::Shutdown));
            return;
        }
        match (task, command) {
            (Task::Zeros(_) | Task::ZeroRange(_), _) => self.admit(id),
            (Task::Copy(device), _) => self.enter(id, Stage::Copy, Effect::CopyReady { step: id, device }),
            (Task::Read(wanted), Some(command)) => {
                let device = wanted.unit_outward();
                self.enter(id, Stage::Read, Effect::Read { step: id, command, device, wanted });
            }
            (Task::Seal(wanted), Some(command)) => {
                self.enter(id, Stage::Prepare, prepare(id, command, wanted));
            }
            (Task::Flush, Some(command)) => self.enter(id, Stage::Flush, Effect::Flush { step: id, command }),
            (Task::Inquiry, Some(command)) => {
                self.enter(id, Stage::Inquiry, Effect::Inquire { step: id, command });
            }
            (Task::Read(_) | Task::Seal(_) | Task::Flush | Task::Inquiry, None) => {
                unreachable!("only copies have no command")
            }
        }
    }

    /// A step's content is ready: ask for its sequence, or write home at once.
    fn admit(&mut self, id: StepId) {
        if self.poisoned {
            self.finish(id, Err(HostError::Io));
            return;
        }
        if !self.mirrored {
            self.write_home(id);
            return;
        }
        let (command, device, content) = self.home(id);
        self.enter(id, Stage::Admit, Effect::Admit { step: id, command, device, content });
    }

    fn write_home(&mut self, id: StepId) {
        let (command, device, content) = self.home(id);
        let effect = match content {
            Content::Sealed | Content::Zeros => {
                Effect::Write { step: id, command, device, content, durable: self.is_durable(id) }
            }
            Content::Trimmed => Effect::ZeroRange { step: id, command, device },
        };
        self.enter(id, Stage::Home, effect);
    }

    /// What a write step does at home.
    fn home(&self, id: StepId) -> (CommandId, ByteRange, Content) {
        let step = self.steps.find(id.0).expect("a step that is known");
        let command = step.command.expect("a write step has a command");
        match step.task {
            Task::Seal(wanted) => (command, wanted.unit_outward(), Content::Sealed),
            Task::Zeros(device) => (command, device, Content::Zeros),
            Task::ZeroRange(device) => (command, device, Content::Trimmed),
            Task::Read(_) | Task::Copy(_) | Task::Flush | Task::Inquiry => unreachable!("not a write step"),
        }
    }

    fn is_durable(&self, id: StepId) -> bool {
        let step = self.steps.find(id.0);
        let writes = step.is_some_and(|step| matches!(step.task, Task::Seal(_) | Task::Zeros(_)));
        let command = step.and_then(|step| step.command).and_then(|id| self.commands.get(&id));
        writes && command.is_some_and(|running| is_fua(&running.command))
    }

    fn enter(&mut self, id: StepId, stage: Stage, effect: Effect) {
        let step = self.steps.find_mut(id.0).expect("a step that is known");
        step.stage = stage;
        self.effects.push_back(effect);
    }

    /// Checks that a completion fits the step it names.
    fn leave(&self, id: StepId, stage: Stage) {
        let at = self.steps.find(id.0).map(|step| step.stage);
        assert!(at == Some(stage), "{id:?} is at {at:?}, but {stage:?} ended");
    }

    fn finish(&mut self, id: StepId, result: HostResult) {
        let step = self.steps.remove(id.0).expect("a step that is known");
        if let Some((_, kind)) = step.task.lock() {
            self.granted.extend(self.locks.release(id, kind));
        }
        let Some(command) = step.command else {
            self.copies -= 1;
            return;
        };
        if let Some(running) = self.commands.get_mut(&command) {
            running.steps_in_flight -= 1;
            if let Err(error) = result {
                running.error.get_or_insert(error);
            }
        }
        self.advance(command);
    }

    fn poison(&mut self) {
        self.poisoned = true;
        self.refuse_queued(HostError::Io, HostCommand::changes_content);
        self.refuse_held(HostError::Io);
    }

    fn refuse_queued(&mut self, error: HostError, refused: impl Fn(&HostCommand) -> bool) {
        let (out, stay) = self.queue.drain(..).partition(|(_, command)| refused(command));
        self.queue = stay;
        let out: VecDeque<(CommandId, HostCommand)> = out;
        for (id, _) in out {
            self.refuse(id, error);
        }
    }

    fn reply(&mut self, command: CommandId, result: HostResult) {
        self.effects.push_back(Effect::Reply { command, result });
    }
}

const fn is_fua(command: &HostCommand) -> bool {
    match command {
        HostCommand::Write { fua, .. }
        | HostCommand::Trim { fua, .. }
        | HostCommand::WriteZeroes { fua, .. } => *fua,
        HostCommand::Read { .. }
        | HostCommand::Flush
        | HostCommand::Cache { .. }
        | HostCommand::Status { .. } => false,
    }
}

fn prepare(step: StepId, command: CommandId, wanted: ByteRange) -> Effect {
    let device = wanted.unit_outward();
    let partial_head = !wanted.offset().is_multiple_of(DATA_UNIT_BYTES);
    let partial_tail = !wanted.end().is_multiple_of(DATA_UNIT_BYTES);
    let one_unit = device.length() == DATA_UNIT_BYTES;
    Effect::Prepare {
        step,
        command,
        device,
        wanted,
        read_head: partial_head || (one_unit && partial_tail),
        read_tail: partial_tail && !one_unit,
    }
}
