//! A host that minds its own volume while something happens to another.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Export, NbdClient, Random};

/// 4 KiB blocks of the volume that it uses.
const BLOCKS: usize = 1024;
const BLOCK_BYTES: u64 = 4096;

/// Reads and writes of one volume, one at a time, each read checked; until it is told to stop.
pub struct Bystander {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Duration>>>,
}

/// How long the operations of a [`Bystander`] took, ascending.
#[derive(Debug)]
pub struct Latencies(Vec<Duration>);

impl Bystander {
    /// Begins; the volume must have 4 MiB and nobody else may write it.
    ///
    /// # Errors
    /// If the volume cannot be opened.
    pub fn start(export: &Export) -> Result<Self> {
        let client = NbdClient::connect(export)?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::spawn(move || attend(client, &flag));
        Ok(Self { stop, thread })
    }

    /// Ends it; it must not have seen an error, and have done something.
    ///
    /// # Errors
    /// The error that it saw.
    pub fn stop(self) -> Result<Latencies> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join().map_err(|_| anyhow::anyhow!("the bystander panicked"))?;
        let mut latencies = ended.context("another volume's host saw an error")?;
        ensure!(!latencies.is_empty(), "another volume's host was never answered");
        latencies.sort();
        Ok(Latencies(latencies))
    }

    /// Watches for a time; the latencies of that time.
    ///
    /// # Errors
    /// As [`Self::start`] and [`Self::stop`].
    pub fn watch(export: &Export, time: Duration) -> Result<Latencies> {
        let bystander = Self::start(export)?;
        thread::sleep(time);
        bystander.stop()
    }
}

impl Latencies {
    /// Half of the operations were faster.
    pub fn median(&self) -> Duration {
        self.percentile(50)
    }

    /// `percent` of the operations were faster.
    pub fn percentile(&self, percent: usize) -> Duration {
        self.0.get(self.0.len() * percent / 100).copied().unwrap_or_default()
    }

    /// The slowest.
    pub fn longest(&self) -> Duration {
        self.0.last().copied().unwrap_or_default()
    }
}

fn attend(mut client: NbdClient, stop: &AtomicBool) -> Result<Vec<Duration>> {
    let mut random = Random::new(17);
    let mut model = vec![None; BLOCKS];
    let mut latencies = Vec::new();
    let mut found = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let block = random.index(BLOCKS);
        let offset = u64::try_from(block)? * BLOCK_BYTES;
        let begin = Instant::now();
        let known = model.get_mut(block).context("a block of the model")?;
        if let Some(byte) = *known
            && random.chance(700)
        {
            client.read(offset, &mut found)?;
            ensure!(found == [byte; 4096], "block {block} is not what was written");
        } else {
            let [byte, ..] = random.next().to_le_bytes();
            client.write(offset, &[byte; 4096])?;
            *known = Some(byte);
        }
        latencies.push(begin.elapsed());
    }
    client.disconnect()?;
    Ok(latencies)
}
