//! Random 4 KiB O_DIRECT reads at a fixed depth: rate, and processor time per read.
//!
//! `cargo run --release -p farshore-store --example random_read -- FILE [DEPTH] [SECONDS]`; a file that does not
//! exist is made (1 GiB) and removed again.
#![allow(clippy::print_stdout, reason = "a command line program")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use store::{BufferPool, Completion, File, Operation, Ring, Token};

const READ_BYTES: usize = 4096;
const FILE_BYTES: u64 = 1 << 30;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = PathBuf::from(arguments.next().ok_or("usage: random_read FILE [DEPTH] [SECONDS]")?);
    let depth: u64 = arguments.next().map_or(Ok(32), |text| text.parse())?;
    let seconds: u64 = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let made = !path.exists();
    let file = if made { filled(&path)? } else { File::open(&path, true)? };
    let outcome = measure(&file, depth, Duration::from_secs(seconds));
    if made {
        std::fs::remove_file(&path)?;
    }
    outcome
}

/// A new file with written extents.
fn filled(path: &std::path::Path) -> Result<File, Box<dyn std::error::Error>> {
    let file = File::create_thick(path, FILE_BYTES, true)?;
    let mut ring = Ring::new(8)?;
    let mut buffer = BufferPool::new(1 << 20).take_over(1 << 20);
    buffer.fill(0xA5);
    let chunk = buffer.freeze();
    let mut out = Vec::new();
    for offset in (0..FILE_BYTES).step_by(1 << 20) {
        let (file, data) = (file.clone(), chunk.clone().into());
        ring.submit(Token(0), Operation::Write { file, offset, data, durable: false });
        while ring.in_flight() > 0 {
            ring.wait(None, &mut out)?;
        }
        for completion in out.drain(..) {
            completion.result?;
        }
    }
    Ok(file)
}

fn measure(file: &File, depth: u64, time: Duration) -> Result<(), Box<dyn std::error::Error>> {
    let pool = BufferPool::new(64 << 20);
    let mut ring = Ring::new(256)?;
    let blocks = file.size()? / 4096;
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut next_offset = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % blocks * 4096
    };
    let mut submit = |ring: &mut Ring, index: u64| {
        let buffer = pool.take_over(READ_BYTES);
        let (file, offset, range) = (file.clone(), next_offset(), 0..READ_BYTES);
        ring.submit(Token(index), Operation::Read { file, offset, buffer, range });
    };
    for index in 0..depth {
        submit(&mut ring, index);
    }
    let (start, before) = (Instant::now(), processor_time()?);
    let (mut reads, mut waits) = (0_u32, 0_u32);
    let mut out: Vec<Completion> = Vec::new();
    while start.elapsed() < time {
        ring.wait(None, &mut out)?;
        waits += 1;
        for completion in out.drain(..) {
            completion.result?;
            reads += 1;
            submit(&mut ring, completion.token.0);
        }
    }
    let (elapsed, after) = (start.elapsed().as_secs_f64(), processor_time()?);
    let each = |ticks: u32| f64::from(ticks) * 10_000.0 / f64::from(reads);
    println!(
        "depth {depth}: {:.0} reads/s, {:.2} us user + {:.2} us system a read, {:.1} reads a wait",
        f64::from(reads) / elapsed,
        each(after.0 - before.0),
        each(after.1 - before.1),
        f64::from(reads) / f64::from(waits),
    );
    Ok(())
}

/// User and system time of the process, in hundredths of a second.
fn processor_time() -> Result<(u32, u32), Box<dyn std::error::Error>> {
    let statistics = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = statistics.rsplit_once(')').ok_or("unknown format of /proc/self/stat")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut next = || fields.next().ok_or("too few fields in /proc/self/stat");
    Ok((next()?.parse()?, next()?.parse()?))
}
