//! The ring against the real kernel: files on disk and in memory, sockets, the waker.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "test code")]

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use store::{BufferPool, Completion, File, FileError, Operation, Payload, Ring, Socket, Token};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// A folder on disk and, where there is one, a folder in memory.
fn folders() -> Vec<TempDir> {
    let bases = [std::env::temp_dir(), PathBuf::from("/dev/shm")];
    let existing = bases.iter().filter(|base| base.is_dir());
    existing.map(|base| TempDir::new_in(base).unwrap()).collect()
}

/// A thick file, with O_DIRECT where the file system has it.
fn thick(folder: &Path, size: u64) -> File {
    match File::create_thick(&folder.join("data"), size, true) {
        Err(FileError::DirectRefused { .. }) => {
            File::create_thick(&folder.join("data"), size, false).unwrap()
        }
        other => other.unwrap(),
    }
}

/// Waits for `count` completions.
fn complete(ring: &mut Ring, count: usize) -> Vec<Completion> {
    let start = Instant::now();
    let mut out = Vec::new();
    while out.len() < count {
        assert!(start.elapsed() < PATIENCE, "{} of {count} completions", out.len());
        ring.wait(Some(Duration::from_secs(1)), &mut out).unwrap();
    }
    assert_eq!(out.len(), count);
    out
}

/// The next completion's count or errno.
fn outcome(ring: &mut Ring) -> Result<usize, Option<i32>> {
    let completion = complete(ring, 1).pop().unwrap();
    completion.result.map_err(|error| error.raw_os_error())
}

fn run(ring: &mut Ring, operation: Operation) -> Completion {
    ring.submit(Token(7), operation);
    let completion = complete(ring, 1).pop().unwrap();
    assert_eq!(completion.token, Token(7));
    completion
}

fn write(ring: &mut Ring, file: &File, offset: u64, data: impl Into<Payload>, durable: bool) -> usize {
    let (file, data) = (file.clone(), data.into());
    let length = data.length();
    let completion = run(ring, Operation::Write { file, offset, data, durable });
    assert_eq!(completion.returned.into_payload().unwrap().length(), length);
    completion.result.unwrap()
}

fn read(ring: &mut Ring, pool: &BufferPool, file: &File, offset: u64, length: usize) -> Vec<u8> {
    let buffer = pool.try_take(length).unwrap();
    let (file, range) = (file.clone(), 0..length);
    let completion = run(ring, Operation::Read { file, offset, buffer, range });
    assert_eq!(completion.result.unwrap(), length);
    completion.returned.into_buffer().unwrap().to_vec()
}

fn pattern(pool: &BufferPool, length: usize, seed: usize) -> Bytes {
    let mut buffer = pool.try_take(length).unwrap();
    for (index, byte) in buffer.iter_mut().enumerate() {
        *byte = u8::try_from((index / 7 + seed) % 251).unwrap();
    }
    buffer.freeze()
}

fn receive(socket: &Socket, pool: &BufferPool, length: usize, fill: bool) -> Operation {
    Operation::Receive {
        socket: socket.clone(),
        buffer: pool.try_take(length).unwrap(),
        range: 0..length,
        fill,
        quiet: false,
    }
}

#[test]
fn what_was_written_is_read() {
    let pool = BufferPool::new(64 << 20);
    for folder in folders() {
        let mut ring = Ring::new(64).unwrap();
        let file = thick(folder.path(), 8 << 20);
        assert_eq!(file.size().unwrap(), 8 << 20);
        assert!(read(&mut ring, &pool, &file, 0, 1 << 20).iter().all(|byte| *byte == 0));
        let one = pattern(&pool, 12 << 10, 1);
        assert_eq!(write(&mut ring, &file, 4096, one.clone(), true), 12 << 10);
        let many: Vec<Bytes> = (0..3).map(|seed| pattern(&pool, 4096 << seed, seed)).collect();
        assert_eq!(write(&mut ring, &file, 1 << 20, many.clone(), false), 28 << 10);
        assert_eq!(run(&mut ring, Operation::Fdatasync { file: file.clone() }).result.unwrap(), 0);
        assert_eq!(read(&mut ring, &pool, &file, 4096, 12 << 10), one);
        assert_eq!(read(&mut ring, &pool, &file, 1 << 20, 28 << 10), many.concat());
        let reopened = File::open(&folder.path().join("data"), file.is_direct()).unwrap();
        assert_eq!(read(&mut ring, &pool, &reopened, 4096, 12 << 10), one);
    }
    assert_eq!(pool.in_use_bytes(), 0);
}

#[test]
fn a_read_fills_only_its_range() {
    let pool = BufferPool::new(1 << 20);
    for folder in folders() {
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 64 << 10);
        write(&mut ring, &file, 0, pattern(&pool, 16 << 10, 3), false);
        let mut buffer = pool.try_take(16 << 10).unwrap();
        buffer.fill(255);
        let operation = Operation::Read { file: file.clone(), offset: 4096, buffer, range: 8192..12288 };
        let buffer = run(&mut ring, operation).returned.into_buffer().unwrap();
        assert!(buffer[..8192].iter().chain(&buffer[12288..]).all(|byte| *byte == 255));
        assert_eq!(buffer[8192..12288], pattern(&pool, 16 << 10, 3)[4096..8192]);
    }
}

#[test]
fn writes_of_more_pieces_than_one_transfer_takes_are_continued() {
    let pool = BufferPool::new(32 << 20);
    for folder in folders() {
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 8 << 20);
        let whole = pattern(&pool, 8 << 20, 5);
        let pieces: Vec<Bytes> =
            (0..1500).map(|index| whole.slice(index * 4096..(index + 1) * 4096)).collect();
        assert_eq!(write(&mut ring, &file, 0, pieces, true), 1500 * 4096);
        assert_eq!(read(&mut ring, &pool, &file, 0, 1500 * 4096), whole[..1500 * 4096]);
    }
}

#[test]
fn a_read_beyond_the_end_is_an_error() {
    let pool = BufferPool::new(1 << 20);
    for folder in folders() {
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 8192);
        for offset in [4096, 8192, 1 << 40] {
            let operation = Operation::Read {
                file: file.clone(),
                offset,
                buffer: pool.try_take(8192).unwrap(),
                range: 0..8192,
            };
            let completion = run(&mut ring, operation);
            assert_eq!(completion.result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
            assert_eq!(completion.returned.into_buffer().unwrap().len(), 8192);
        }
    }
}

#[test]
fn errors_keep_their_errno_and_give_the_payload_back() {
    let pool = BufferPool::new(1 << 20);
    let folder = TempDir::new().unwrap();
    let mut ring = Ring::new(8).unwrap();
    let operation = Operation::Write {
        file: thick(folder.path(), 4096),
        offset: 1 << 60,
        data: pattern(&pool, 4096, 0).into(),
        durable: false,
    };
    let completion = run(&mut ring, operation);
    assert_eq!(completion.result.unwrap_err().raw_os_error(), Some(libc::EFBIG));
    assert_eq!(completion.returned.into_payload().unwrap().length(), 4096);
    assert_eq!(pool.in_use_bytes(), 0);
}

#[test]
fn a_zeroed_range_reads_as_zeros_and_stays_allocated() {
    use std::os::unix::fs::MetadataExt;
    let pool = BufferPool::new(16 << 20);
    for folder in folders() {
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 4 << 20);
        let data = pattern(&pool, 4 << 20, 11);
        write(&mut ring, &file, 0, data.clone(), false);
        let blocks = || std::fs::metadata(folder.path().join("data")).unwrap().blocks();
        let before = blocks();
        let (offset, length) = (1 << 20, 2 << 20);
        let completion = run(&mut ring, Operation::ZeroRange { file: file.clone(), offset, length });
        assert_eq!(completion.result.unwrap(), 0);
        let after = read(&mut ring, &pool, &file, 0, 4 << 20);
        assert_eq!(after[..1 << 20], data[..1 << 20]);
        assert!(after[1 << 20..3 << 20].iter().all(|byte| *byte == 0));
        assert_eq!(after[3 << 20..], data[3 << 20..]);
        assert!(blocks() >= before, "the range lost its space");
    }
}

#[test]
fn hundreds_of_operations_pass_a_small_queue() {
    let pool = BufferPool::new(16 << 20);
    for folder in folders() {
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 4 << 20);
        for index in 0..1000_u64 {
            ring.submit(
                Token(index),
                Operation::Write {
                    file: file.clone(),
                    offset: index * 4096,
                    data: pattern(&pool, 4096, usize::try_from(index).unwrap()).into(),
                    durable: false,
                },
            );
        }
        assert_eq!(ring.in_flight(), 1000);
        let mut tokens: Vec<u64> =
            complete(&mut ring, 1000).iter().map(|completion| completion.token.0).collect();
        tokens.sort_unstable();
        assert!(tokens.into_iter().eq(0..1000));
        assert_eq!(ring.in_flight(), 0);
        for index in [0, 499, 999] {
            let offset = u64::try_from(index).unwrap() * 4096;
            assert_eq!(read(&mut ring, &pool, &file, offset, 4096), pattern(&pool, 4096, index));
        }
    }
}

#[test]
fn empty_operations_complete() {
    let folder = TempDir::new().unwrap();
    let mut ring = Ring::new(8).unwrap();
    let file = thick(folder.path(), 4096);
    assert_eq!(write(&mut ring, &file, 0, Bytes::new(), true), 0);
    assert_eq!(write(&mut ring, &file, 0, vec![Bytes::new(), Bytes::new()], true), 0);
}

#[test]
fn a_thick_file_that_does_not_fit_is_refused_and_leaves_nothing() {
    for folder in folders() {
        let path = folder.path().join("data");
        let refused = File::create_thick(&path, 1 << 60, false).unwrap_err();
        assert!(matches!(refused, FileError::NoSpace { size, .. } if size == 1 << 60), "{refused}");
        assert!(!path.exists());
        let refused = File::create_thick(&path, 0, false).unwrap_err();
        assert!(matches!(refused, FileError::System { .. }), "{refused}");
        assert!(!path.exists());
    }
}

#[test]
fn a_grown_file_keeps_its_content_and_is_zero_behind_it() {
    for folder in folders() {
        let path = folder.path().join("data");
        let pool = BufferPool::new(1 << 20);
        let mut ring = Ring::new(8).unwrap();
        let file = thick(folder.path(), 4096);
        write(&mut ring, &file, 0, pattern(&pool, 4096, 7), false);
        File::open(&path, false).unwrap().grow(&path, 12_288).unwrap();
        assert_eq!(file.size().unwrap(), 12_288);
        assert_eq!(read(&mut ring, &pool, &file, 0, 4096), pattern(&pool, 4096, 7));
        assert_eq!(read(&mut ring, &pool, &file, 4096, 8192), vec![0; 8192]);
        file.grow(&path, 4096).unwrap();
        assert_eq!(file.size().unwrap(), 12_288, "nothing shrinks");
    }
}

#[test]
fn a_file_that_cannot_grow_is_as_it_was() {
    for folder in folders() {
        let path = folder.path().join("data");
        let file = thick(folder.path(), 4096);
        let refused = file.grow(&path, 1 << 60).unwrap_err();
        assert!(matches!(refused, FileError::NoSpace { size, .. } if size == (1 << 60) - 4096), "{refused}");
        assert_eq!(file.size().unwrap(), 4096);
    }
}

#[test]
fn an_existing_file_is_never_replaced() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("data");
    std::fs::write(&path, b"precious").unwrap();
    let refused = File::create_thick(&path, 4096, false).unwrap_err();
    assert!(matches!(refused, FileError::Exists { .. }), "{refused}");
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn folders_missing_files_and_file_systems_without_direct_io_are_refused() {
    let folder = TempDir::new().unwrap();
    assert!(matches!(File::open(folder.path(), false), Err(FileError::System { .. })));
    assert!(matches!(File::open(&folder.path().join("none"), false), Err(FileError::System { .. })));
    let proc = Path::new("/proc/self/comm");
    assert!(matches!(File::open(proc, true), Err(FileError::DirectRefused { .. })));
}

/// Echoes 8 MiB sends through a slow peer, in pieces, on both kinds of socket.
#[test]
fn large_sends_complete_in_full_before_a_slow_reader() {
    const LENGTH: usize = 8 << 20;
    for nonblocking in [false, true] {
        let pool = BufferPool::new(64 << 20);
        let mut ring = Ring::new(8).unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(nonblocking).unwrap();
        let echo = thread::spawn(move || {
            let mut all = vec![0; LENGTH];
            for chunk in all.chunks_mut(700_001) {
                thread::sleep(Duration::from_millis(2));
                far.read_exact(chunk).unwrap();
            }
            for chunk in all.chunks(1_000_003) {
                far.write_all(chunk).unwrap();
            }
        });
        let socket = Socket::from(near);
        let whole = pattern(&pool, LENGTH, 21);
        // More pieces than one sendmsg takes.
        let data: Vec<Bytes> = (0..2048).map(|index| whole.slice(index * 4096..(index + 1) * 4096)).collect();
        let completion = run(&mut ring, Operation::Send { socket: socket.clone(), data: data.into() });
        assert_eq!(completion.result.unwrap(), LENGTH);
        let completion = run(&mut ring, receive(&socket, &pool, LENGTH / 2, true));
        assert_eq!(completion.result.unwrap(), LENGTH / 2);
        assert_eq!(completion.returned.into_buffer().unwrap()[..], whole[..LENGTH / 2]);
        let mut rest = Vec::new();
        loop {
            let completion = run(&mut ring, receive(&socket, &pool, 1 << 20, false));
            let count = completion.result.unwrap();
            if count == 0 {
                break;
            }
            rest.extend_from_slice(&completion.returned.into_buffer().unwrap()[..count]);
        }
        assert_eq!(rest, whole[LENGTH / 2..]);
        echo.join().unwrap();
        let completion = run(&mut ring, Operation::Send { socket, data: whole.clone().into() });
        assert_eq!(completion.result.unwrap_err().raw_os_error(), Some(libc::EPIPE));
    }
}

#[test]
fn a_filling_receive_ends_short_when_the_peer_closes() {
    let pool = BufferPool::new(1 << 20);
    let mut ring = Ring::new(8).unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    let socket = Socket::from(near);
    ring.submit(Token(1), receive(&socket, &pool, 100, true));
    let writer = thread::spawn(move || {
        far.write_all(b"abc").unwrap();
        thread::sleep(Duration::from_millis(20));
        far.write_all(b"de").unwrap();
    });
    let completion = complete(&mut ring, 1).pop().unwrap();
    assert_eq!(completion.result.unwrap(), 5);
    assert_eq!(completion.returned.into_buffer().unwrap()[..5], *b"abcde");
    writer.join().unwrap();
}

#[test]
fn shutdown_and_cancel_end_a_pending_receive() {
    let pool = BufferPool::new(1 << 20);
    let mut ring = Ring::new(8).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let socket = Socket::from(near);
    // Cancelled in the kernel.
    ring.submit(Token(1), receive(&socket, &pool, 100, false));
    assert!(!ring.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap());
    ring.cancel(Token(1));
    assert_eq!(outcome(&mut ring), Err(Some(libc::ECANCELED)));
    // Cancelled before it got there.
    ring.submit(Token(2), receive(&socket, &pool, 100, false));
    ring.cancel(Token(2));
    ring.cancel(Token(3));
    assert_eq!(outcome(&mut ring), Err(Some(libc::ECANCELED)));
    // Shut down.
    ring.submit(Token(4), receive(&socket, &pool, 100, false));
    ring.wait(Some(Duration::ZERO), &mut Vec::new()).unwrap();
    socket.shutdown().unwrap();
    assert_eq!(outcome(&mut ring), Ok(0));
    assert_eq!(pool.in_use_bytes(), 0);
}

#[test]
#[should_panic(expected = "two sends on one socket")]
fn a_second_send_on_a_socket_is_a_defect() {
    let mut ring = Ring::new(8).unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let socket = Socket::from(near);
    for _ in 0..2 {
        let data = Bytes::from_static(b"x").into();
        ring.submit(Token(0), Operation::Send { socket: socket.clone(), data });
    }
}

#[test]
fn a_waker_ends_the_wait_and_publishes() {
    const WAKES: usize = 2000;
    let mut ring = Ring::new(8).unwrap();
    let waker = ring.waker();
    let (sender, receiver) = std::sync::mpsc::channel();
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let (waker, sender) = (waker.clone(), sender.clone());
            thread::spawn(move || {
                for index in 0..WAKES {
                    sender.send(index).unwrap();
                    waker.wake();
                    if index % 64 == 0 {
                        thread::sleep(Duration::from_micros(200));
                    }
                }
            })
        })
        .collect();
    let mut received = 0;
    while received < 2 * WAKES {
        let start = Instant::now();
        // A lost wake-up would show as a wait of the full time.
        let woken = ring.wait(Some(PATIENCE), &mut Vec::new()).unwrap();
        assert!(start.elapsed() < PATIENCE, "a wake-up was lost after {received}");
        if woken {
            received += receiver.try_iter().count();
        }
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_wait_ends_at_its_time_and_polls_without_waiting() {
    let mut ring = Ring::new(8).unwrap();
    let mut out = Vec::new();
    let start = Instant::now();
    for _ in 0..100 {
        assert!(!ring.wait(Some(Duration::ZERO), &mut out).unwrap());
    }
    assert!(start.elapsed() < Duration::from_secs(1));
    let start = Instant::now();
    assert!(!ring.wait(Some(Duration::from_millis(30)), &mut out).unwrap());
    assert!(start.elapsed() >= Duration::from_millis(29), "{:?}", start.elapsed());
    assert!(out.is_empty());
    ring.waker().wake();
    assert!(ring.wait(None, &mut out).unwrap());
}

#[test]
fn a_dropped_ring_gives_all_memory_back() {
    let pool = BufferPool::new(16 << 20);
    for folder in folders() {
        let (near, far) = UnixStream::pair().unwrap();
        let (near, far) = (Socket::from(near), Socket::from(far));
        let mut ring = Ring::new(4).unwrap();
        let file = thick(folder.path(), 4 << 20);
        for index in 0..64 {
            let (file, data) = (file.clone(), pattern(&pool, 64 << 10, 1).into());
            ring.submit(Token(1), Operation::Write { file, offset: index * (64 << 10), data, durable: true });
        }
        ring.submit(Token(2), receive(&near, &pool, 4096, true));
        ring.submit(Token(3), receive(&far, &pool, 4096, false));
        let data = pattern(&pool, 4 << 20, 2).into();
        ring.submit(Token(4), Operation::Send { socket: near, data });
        let mut out = Vec::new();
        ring.wait(Some(Duration::ZERO), &mut out).unwrap();
        // One more that never reached the kernel.
        ring.submit(Token(5), Operation::Fdatasync { file });
        let start = Instant::now();
        drop(ring);
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        drop(out);
        assert_eq!(pool.in_use_bytes(), 0);
    }
}
