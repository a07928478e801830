//! Writers that remember what was acknowledged.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::history::SECTOR_BYTES;
use super::{Export, History, NbdClient, NbdError, Prefix, Random};

/// The longest write in sectors: beyond eight data units, so that whole and partial units occur in one write.
const WRITE_SECTORS_MAX: u64 = 80;

/// Some writers, each with its own connection and its own region of one volume.
pub struct Load {
    writers: Vec<Writer>,
    clock: AtomicU64,
}

struct Writer {
    /// Writes with FUA.
    durable: bool,
    offset: u64,
    random: Random,
    history: History,
}

impl Load {
    /// `writers` writers to the first bytes of a volume, with `region_bytes` each.
    pub fn new(writers: u64, region_bytes: u64, seed: u64) -> Self {
        let sectors = usize::try_from(region_bytes / SECTOR_BYTES).unwrap_or(0);
        let writer = |number: u64| Writer {
            durable: false,
            offset: number * region_bytes,
            random: Random::new(seed.wrapping_add(number)),
            history: History::new(number + 1, sectors),
        };
        Self { writers: (0..writers).map(writer).collect(), clock: AtomicU64::new(0) }
    }

    /// The same, with every write durable before it is acknowledged.
    pub fn durable(writers: u64, region_bytes: u64, seed: u64) -> Self {
        let mut load = Self::new(writers, region_bytes, seed);
        load.writers.iter_mut().for_each(|writer| writer.durable = true);
        load
    }

    /// How many writes were acknowledged in all.
    pub fn acknowledged(&self) -> usize {
        self.writers.iter().map(|writer| writer.history.acknowledged()).sum()
    }

    /// Writes as fast as the server answers while `during` runs; how each writer ended, `Ok` for those that were
    /// stopped.
    ///
    /// # Errors
    /// Those of `during`.
    pub fn run_while<Value>(
        &mut self,
        export: &Export,
        during: impl FnOnce() -> Result<Value>,
    ) -> Result<(Value, Vec<Result<(), NbdError>>)> {
        let stop = AtomicBool::new(false);
        let clock = &self.clock;
        thread::scope(|scope| {
            let running: Vec<_> = self
                .writers
                .iter_mut()
                .map(|writer| scope.spawn(|| writer.run(export, clock, &stop)))
                .collect();
            let value = during();
            stop.store(true, Ordering::Relaxed);
            let mut ends = Vec::new();
            for thread in running {
                let broken = NbdError::Protocol("the writer panicked");
                ends.push(thread.join().unwrap_or(Err(broken)));
            }
            Ok((value?, ends))
        })
    }

    /// Writes for a time; no writer may see an error.
    ///
    /// # Errors
    /// The first error that a writer saw.
    pub fn run_for(&mut self, export: &Export, duration: Duration) -> Result<()> {
        let ((), ends) = self.run_while(export, || {
            thread::sleep(duration);
            Ok(())
        })?;
        for end in ends {
            end.context("a writer saw an error")?;
        }
        Ok(())
    }

    /// Checks that the volume holds every acknowledged write and is in order.
    ///
    /// # Errors
    /// If not.
    pub fn verify_acknowledged(&self, export: &Export) -> Result<()> {
        for writer in &self.writers {
            writer.history.verify_acknowledged(&writer.image(export)?)?;
        }
        Ok(())
    }

    /// Checks that the volume is the state after a first part of the writes, in the order over all writers; the part
    /// of each.
    ///
    /// # Errors
    /// If not.
    pub fn verify_prefix(&self, export: &Export) -> Result<Vec<Prefix>> {
        let mut prefixes = Vec::new();
        for writer in &self.writers {
            prefixes.push(writer.history.verify_prefix(&writer.image(export)?)?);
        }
        for (writer, prefix) in self.writers.iter().zip(&prefixes) {
            for (other, other_prefix) in self.writers.iter().zip(&prefixes) {
                if let Some(resume) = other.history.resume(*other_prefix) {
                    writer.history.check_order(*prefix, resume)?;
                }
            }
        }
        Ok(prefixes)
    }

    /// After a failover: goes on from the writes that the new primary holds.
    ///
    /// # Errors
    /// If the number of prefixes is not that of the writers.
    pub fn discard_after(&mut self, prefixes: &[Prefix]) -> Result<()> {
        ensure!(prefixes.len() == self.writers.len(), "one prefix a writer");
        for (writer, prefix) in self.writers.iter_mut().zip(prefixes) {
            writer.history.discard_after(*prefix);
        }
        Ok(())
    }

    /// Writes the sectors of unacknowledged writes anew, so that the history is exact again.
    ///
    /// # Errors
    /// If such a write fails.
    pub fn settle(&mut self, export: &Export) -> Result<()> {
        for writer in &mut self.writers {
            if let Some((first, count)) = writer.history.unacknowledged() {
                let mut client = NbdClient::connect(export)?;
                writer.write(&mut client, first, count, &self.clock)?;
                client.disconnect()?;
            }
        }
        Ok(())
    }
}

impl Writer {
    fn run(&mut self, export: &Export, clock: &AtomicU64, stop: &AtomicBool) -> Result<(), NbdError> {
        let mut client = NbdClient::connect(export)?;
        let begin = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            assert!(begin.elapsed() < Duration::from_secs(600), "a load is stopped before ten minutes");
            let count = 1 + self.random.below(WRITE_SECTORS_MAX);
            let count = usize::try_from(count).unwrap_or(1).min(self.history.sectors());
            let first = self.random.index(self.history.sectors() - count + 1);
            self.write(&mut client, first, count, clock)?;
        }
        client.disconnect()
    }

    fn write(
        &mut self,
        client: &mut NbdClient,
        first: usize,
        count: usize,
        clock: &AtomicU64,
    ) -> Result<(), NbdError> {
        let data = self.history.submit(first, count, clock.fetch_add(1, Ordering::SeqCst));
        let offset = self.offset + u64::try_from(first).unwrap_or(0) * SECTOR_BYTES;
        if self.durable {
            client.write_durable(offset, &data)?;
        } else {
            client.write(offset, &data)?;
        }
        self.history.acknowledge(clock.fetch_add(1, Ordering::SeqCst));
        Ok(())
    }

    fn image(&self, export: &Export) -> Result<Vec<u8>> {
        const READ_BYTES: usize = 1 << 20;
        let mut client = NbdClient::connect(export)?;
        let bytes = self.history.sectors() * usize::try_from(SECTOR_BYTES)?;
        let mut image = vec![0; bytes];
        let mut offset = self.offset;
        for chunk in image.chunks_mut(READ_BYTES) {
            client.read(offset, chunk)?;
            offset += u64::try_from(chunk.len())?;
        }
        client.disconnect()?;
        Ok(image)
    }
}
