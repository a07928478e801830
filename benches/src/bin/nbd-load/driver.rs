//! The loop that keeps all connections busy, from one thread.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;

use crate::arguments::{Arguments, Pattern};
use crate::connection::{Connection, Shape};
use crate::handshake;
use crate::meter::{Measured, Meter};
use crate::offsets::{Offsets, noise};
use crate::process::cpu_time;

/// What one receive takes: many replies, and it stays in the cache.
const BUFFER_BYTES: usize = 256 << 10;
const EVENTS_MAX: usize = 256;
/// How long the last requests may take once the time is over.
const DRAIN: Duration = Duration::from_secs(60);

/// All connections, and what they share.
pub(crate) struct Driver {
    epoll: OwnedFd,
    connections: Vec<Connection>,
    events: Vec<epoll::Event>,
    buffer: Vec<u8>,
    /// What each write sends.
    payload: Vec<u8>,
    meter: Meter,
    /// Whether the offsets have an end.
    once: bool,
}

impl Driver {
    /// Opens every connection.
    ///
    /// # Errors
    /// When one cannot be opened, or an export is smaller than a block.
    pub(crate) fn connect(arguments: &Arguments) -> Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let shape = Shape { writes: arguments.pattern.writes(), block_bytes: arguments.block };
        let mut connections = Vec::new();
        for (number, target) in arguments.targets.iter().enumerate() {
            for nth in 0..arguments.connections {
                let opened = handshake::open(target)?;
                let index = u64::try_from(connections.len())?;
                let offsets = offsets(arguments, opened.size_bytes, nth, index)?
                    .with_context(|| format!("{target} is smaller than a block"))?;
                let flags = epoll::EventFlags::IN;
                epoll::add(&epoll, &opened.socket, epoll::EventData::new_u64(index), flags)?;
                connections.push(Connection::new(
                    opened.socket,
                    number,
                    shape,
                    offsets,
                    arguments.queue_depth,
                ));
            }
        }
        let payload =
            if shape.writes { noise(usize::try_from(arguments.block)?, arguments.seed) } else { Vec::new() };
        Ok(Self {
            epoll,
            connections,
            events: Vec::with_capacity(EVENTS_MAX),
            buffer: vec![0; BUFFER_BYTES],
            payload,
            meter: Meter::new(arguments.spacing()?),
            once: arguments.once()?,
        })
    }

    pub(crate) const fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Keeps the queues full for the time asked for; then waits for what is in flight, and disconnects.
    ///
    /// # Errors
    /// When a connection breaks, or the server's process is not there.
    pub(crate) fn run(mut self, arguments: &Arguments) -> Result<Measured> {
        let client = std::process::id();
        if !self.once {
            self.fill_all()?;
            self.turn_until(Instant::now() + arguments.warmup(), true)?;
        }
        let server_cpu = arguments.pid.map(cpu_time).transpose()?;
        let client_cpu = cpu_time(client)?;
        self.meter.start();
        let start = Instant::now();
        if self.once {
            self.fill_all()?;
            while self.busy() {
                self.turn(Instant::now() + DRAIN, true)?;
            }
        } else {
            self.turn_until(start + arguments.duration(), true)?;
        }
        self.meter.stop();
        let elapsed = start.elapsed();
        let client_cpu = cpu_time(client)?.saturating_sub(client_cpu);
        let server_cpu = match (arguments.pid, server_cpu) {
            (Some(pid), Some(before)) => Some(cpu_time(pid)?.saturating_sub(before)),
            _ => None,
        };
        self.drain()?;
        let mut completions = vec![0; arguments.targets.len()];
        for connection in self.connections {
            if let Some(count) = completions.get_mut(connection.target) {
                *count += connection.completions;
            }
            connection.disconnect();
        }
        Ok(Measured { elapsed, completions, meter: self.meter, server_cpu, client_cpu })
    }

    /// Lets each connection do one read, then does nothing for the time asked for.
    ///
    /// # Errors
    /// When a connection breaks, also while it is idle.
    pub(crate) fn stay_idle(mut self, duration: Duration) -> Result<()> {
        self.fill_all()?;
        self.drain()?;
        self.turn_until(Instant::now() + duration, false)?;
        self.connections.into_iter().for_each(Connection::disconnect);
        Ok(())
    }

    fn fill_all(&mut self) -> Result<()> {
        for index in 0..self.connections.len() {
            if let Some(connection) = self.connections.get_mut(index) {
                connection.fill(Instant::now());
            }
            self.send(index)?;
        }
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let deadline = Instant::now() + DRAIN;
        while self.busy() {
            ensure!(Instant::now() < deadline, "requests are unanswered after {} s", DRAIN.as_secs());
            self.turn(deadline, false)?;
        }
        Ok(())
    }

    fn busy(&self) -> bool {
        self.connections.iter().any(|connection| connection.in_flight() > 0)
    }

    fn turn_until(&mut self, deadline: Instant, more: bool) -> Result<()> {
        while Instant::now() < deadline {
            self.turn(deadline, more)?;
        }
        Ok(())
    }

    /// Waits for sockets, at most until the deadline, and serves them; `more` says whether to make new requests.
    fn turn(&mut self, deadline: Instant, more: bool) -> Result<()> {
        let timeout = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))?;
        self.events.clear();
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("epoll"),
        }
        for nth in 0..self.events.len() {
            let Some((index, flags)) = self.events.get(nth).map(|event| (event.data.u64(), event.flags))
            else {
                break;
            };
            self.serve(usize::try_from(index)?, flags, more)?;
        }
        Ok(())
    }

    fn serve(&mut self, index: usize, flags: epoll::EventFlags, more: bool) -> Result<()> {
        let Some(connection) = self.connections.get_mut(index) else { return Ok(()) };
        if flags.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            connection.receive(&mut self.buffer, &mut self.meter)?;
            if more {
                connection.fill(Instant::now());
            }
        }
        if flags.contains(epoll::EventFlags::OUT) {
            let only_in = epoll::EventFlags::IN;
            let data = epoll::EventData::new_u64(u64::try_from(index)?);
            epoll::modify(&self.epoll, connection.socket(), data, only_in)?;
        }
        self.send(index)
    }

    /// Sends what a socket takes, and asks to be told when it takes more.
    fn send(&mut self, index: usize) -> Result<()> {
        let Some(connection) = self.connections.get_mut(index) else { return Ok(()) };
        if !connection.send(&self.payload)? {
            let both = epoll::EventFlags::IN | epoll::EventFlags::OUT;
            let data = epoll::EventData::new_u64(u64::try_from(index)?);
            epoll::modify(&self.epoll, connection.socket(), data, both)?;
        }
        Ok(())
    }
}

/// Where the `nth` connection to an export goes; none if the export holds no block.
fn offsets(arguments: &Arguments, size_bytes: u64, nth: u32, index: u64) -> Result<Option<Offsets>> {
    let block_bytes = u64::from(arguments.block);
    let blocks = size_bytes / block_bytes;
    if blocks == 0 {
        return Ok(None);
    }
    let (nth, parts) = (u64::from(nth), u64::from(arguments.connections));
    Ok(Some(match arguments.pattern {
        Pattern::Randread | Pattern::Randwrite => {
            Offsets::random(block_bytes, blocks, arguments.seed.wrapping_add(index << 32))
        }
        Pattern::Read | Pattern::Write if arguments.once()? => Offsets::once(block_bytes, blocks, nth, parts),
        Pattern::Read | Pattern::Write | Pattern::Idle => {
            Offsets::around(block_bytes, blocks, blocks / parts * nth)
        }
    }))
}
