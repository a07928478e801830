//! A daemon's standard error, line by line.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The lines of one site over all its runs. Clones share them.
#[derive(Clone)]
pub struct Log {
    name: String,
    shared: Arc<(Mutex<Lines>, Condvar)>,
}

#[derive(Default)]
struct Lines {
    lines: Vec<String>,
    allowed: Vec<String>,
}

impl Log {
    /// An empty log of the site with this name.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), shared: Arc::default() }
    }

    /// Reads lines from a pipe until it closes, in a thread.
    pub fn follow(&self, pipe: impl Read + Send + 'static) {
        let log = self.clone();
        thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                let line = without_colours(&String::from_utf8_lossy(&line));
                log.lock().lines.push(line);
                log.shared.1.notify_all();
            }
        });
    }

    /// Expects WARN and ERROR lines that contain this text.
    pub fn allow(&self, text: &str) {
        self.lock().allowed.push(text.to_owned());
    }

    /// The number of lines so far.
    pub fn length(&self) -> usize {
        self.lock().lines.len()
    }

    /// Waits for a line, from line number `from` on, that the predicate accepts.
    pub fn wait_for(&self, from: usize, timeout: Duration, accepts: impl Fn(&str) -> bool) -> Option<String> {
        let deadline = Instant::now() + timeout;
        let mut lines = self.lock();
        loop {
            let found = lines.lines.iter().skip(from).find(|line| accepts(line));
            if let Some(line) = found {
                return Some(line.clone());
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.shared.1.wait_timeout(lines, left);
            lines = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// WARN, ERROR and panic lines that no test expects.
    pub fn unexpected(&self) -> Vec<String> {
        let lines = self.lock();
        let known = |line: &&String| {
            is_alarming(line) && !lines.allowed.iter().any(|text| line.contains(text.as_str()))
        };
        let found = lines.lines.iter().filter(known);
        found.map(|line| format!("{}: {line}", self.name)).collect()
    }

    /// The last `count` lines, each with the site's name.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lock();
        let skipped = lines.lines.len().saturating_sub(count);
        let shown = lines.lines.iter().skip(skipped);
        shown.map(|line| format!("{}: {line}\n", self.name)).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A panic, or a log line of level WARN or ERROR: the level stands among the first words.
fn is_alarming(line: &str) -> bool {
    line.contains("panicked at")
        || line.contains("\"level\":\"ERROR\"")
        || line.contains("\"level\":\"WARN\"")
        || line.split_whitespace().take(3).any(|word| word == "WARN" || word == "ERROR")
}

/// The line without ANSI colour sequences.
fn without_colours(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' {
            // A colour sequence ends with `m`.
            characters.by_ref().find(|inner| *inner == 'm');
        } else {
            text.push(character);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unexpected_lines_are_those_of_high_level_that_are_not_allowed() {
        let log = Log::new("west");
        log.follow(
            &b"2026-01-01T00:00:00Z  INFO daemon: a WARN inside the text\n\
            \x1b[2m2026-01-01T00:00:00Z\x1b[0m \x1b[33m WARN\x1b[0m daemon: grace time ended\n\
            2026-01-01T00:00:00Z ERROR daemon: disk\n\
            thread 'main' panicked at src/main.rs:1\nlast\n"[..],
        );
        log.wait_for(0, Duration::from_secs(5), |line| line == "last").unwrap();
        log.allow("grace time");
        let found = log.unexpected();
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].contains("disk") && found[1].contains("panicked"));
        assert!(log.wait_for(0, Duration::from_millis(20), |line| line == "never").is_none());
    }
}
