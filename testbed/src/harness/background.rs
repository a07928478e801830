//! Child processes with a deadline, and a guard that ends only its own child.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    /// The command line.
    pub command: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Finished {
    /// The standard output of a command that ended with 0.
    ///
    /// # Errors
    /// If it did not: with everything that it wrote.
    pub fn success(self) -> Result<String> {
        ensure!(
            self.status.success(),
            "`{}` ended with {}\n{}{}",
            self.command,
            self.status,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// A running child with captured output; killed when dropped.
pub struct Background {
    command: String,
    child: Child,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Background {
    /// Starts a command.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Result<Self> {
        let line = format!("{command:?}");
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let stdout = child.stdout.take().map(collect);
        let stderr = child.stderr.take().map(collect);
        Ok(Self { command: line, child, stdout, stderr })
    }

    /// True while the child runs.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the child's end.
    ///
    /// # Errors
    /// If it does not end in time; it is killed then.
    pub fn finish(mut self, timeout: Duration) -> Result<Finished> {
        let deadline = Instant::now() + timeout;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                bail!("`{}` has not ended within {timeout:?}", self.command);
            }
            thread::sleep(Duration::from_millis(10));
        };
        Ok(Finished {
            command: std::mem::take(&mut self.command),
            status,
            stdout: join(self.stdout.take()),
            stderr: join(self.stderr.take()),
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Ended already: nothing to kill, and a reaped child's id is never signalled.
        if let Ok(None) = self.child.try_wait() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        drop(pipe.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn join(reader: Option<JoinHandle<String>>) -> String {
    reader.and_then(|reader| reader.join().ok()).unwrap_or_default()
}

/// Runs a command to its end.
///
/// # Errors
/// If it cannot be started or does not end in time. A non-zero exit status is no error here.
pub fn finish(command: Command, timeout: Duration) -> Result<Finished> {
    Background::start(command)?.finish(timeout)
}

/// Runs a program with arguments; its standard output.
///
/// # Errors
/// If it does not end with 0 within two minutes.
pub fn run<Argument: AsRef<std::ffi::OsStr>>(program: &str, arguments: &[Argument]) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    finish(command, Duration::from_secs(120))?.success()
}
