//! One daemon: start, stop, kill, and its command line.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::{Export, Finished, Log, Metrics, NbdClient, NbdError, binary, finish, free_port};

const READY_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(30);
const CLI_TIMEOUT: Duration = Duration::from_secs(120);

/// How a site is started.
#[derive(Clone, Debug, Default)]
pub struct SiteOptions {
    /// The key-encryption key's file; without it the daemon makes one in its directory.
    pub kek: Option<PathBuf>,
    /// Serve NBD on a Unix socket in the site's directory instead of TCP.
    pub nbd_unix: bool,
    /// Further flags.
    pub flags: Vec<String>,
    /// Settings that no flag has, as key and TOML value: they replace the defaults of `--dev`.
    pub settings: Vec<(String, String)>,
}

/// A site: its directory, its addresses and, while it runs, its daemon.
pub struct Site {
    name: String,
    directory: PathBuf,
    options: SiteOptions,
    nbd: SocketAddr,
    replication: SocketAddr,
    console: SocketAddr,
    child: Option<Child>,
    log: Log,
    /// Variables of the daemon's environment.
    environment: Vec<(String, PathBuf)>,
}

impl Site {
    /// Starts a daemon and waits until it serves.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn start(name: &str, directory: PathBuf, options: SiteOptions, log: Log) -> Result<Self> {
        fs::create_dir_all(&directory)?;
        let mut site = Self {
            name: name.to_owned(),
            directory,
            options,
            nbd: free_port(),
            replication: free_port(),
            console: free_port(),
            child: None,
            log,
            environment: Vec::new(),
        };
        site.write_settings()?;
        site.resume()?;
        Ok(site)
    }

    /// Writes the settings file, if settings are given that no flag has.
    fn write_settings(&self) -> Result<()> {
        if self.options.settings.is_empty() {
            return Ok(());
        }
        let mut command = self.development_command()?;
        command.arg("--print-settings");
        let mut text = finish(command, CLI_TIMEOUT)?.success()?;
        for (key, value) in &self.options.settings {
            let begin = format!("{key} = ");
            let changed = |line: &str| match line.starts_with(&begin) {
                true => format!("{begin}{value}\n"),
                false => format!("{line}\n"),
            };
            ensure!(text.lines().any(|line| line.starts_with(&begin)), "no setting {key} in:\n{text}");
            text = text.lines().map(changed).collect();
        }
        Ok(fs::write(self.directory.join("settings.toml"), text)?)
    }

    /// Changes a setting that no flag has, for the next start.
    ///
    /// # Errors
    /// If there is no such setting.
    pub fn set_setting(&mut self, key: &str, value: &str) -> Result<()> {
        self.options.settings.retain(|(known, _)| known != key);
        self.options.settings.push((key.to_owned(), value.to_owned()));
        self.write_settings()
    }

    /// Sets a variable of the daemon's environment to a path, for the next start.
    pub fn set_environment(&mut self, variable: &str, path: &Path) {
        self.environment.push((variable.to_owned(), path.to_owned()));
    }

    /// The daemon's command line.
    ///
    /// # Errors
    /// If the daemon has not been built.
    pub fn daemon_command(&self) -> Result<Command> {
        if self.options.settings.is_empty() {
            return self.development_command();
        }
        let mut command = Command::new(binary("farshored")?);
        command.arg("--config").arg(self.directory.join("settings.toml"));
        Ok(command)
    }

    fn development_command(&self) -> Result<Command> {
        let mut command = Command::new(binary("farshored")?);
        command
            .arg("--dev")
            .arg(&self.directory)
            .args(["--site", &self.name, "--nbd", &self.nbd_argument()])
            .args(["--replication", &self.replication.to_string()])
            .args(["--console", &self.console.to_string()])
            .args(&self.options.flags);
        if let Some(kek) = &self.options.kek {
            command.arg("--kek").arg(kek);
        }
        Ok(command)
    }

    /// Starts the stopped daemon again, at the same addresses.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn resume(&mut self) -> Result<()> {
        let from = self.spawn()?;
        let deadline = Instant::now() + READY_TIMEOUT;
        let is_ready = |line: &str| line.split_whitespace().any(|word| word == "READY");
        while self.log.wait_for(from, Duration::from_millis(50), is_ready).is_none() {
            if let Some(status) = self.child()?.try_wait()? {
                self.child = None;
                // The pipe's last lines may still be on their way to the log.
                thread::sleep(Duration::from_millis(200));
                bail!("{} ended with {status} before READY:\n{}", self.name, self.log.tail(20));
            }
            ensure!(Instant::now() < deadline, "{} is not ready after {READY_TIMEOUT:?}", self.name);
        }
        Ok(())
    }

    /// Starts the daemon and does not wait for READY; the number of its first log line.
    ///
    /// # Errors
    /// If it runs already or cannot be started.
    pub fn spawn(&mut self) -> Result<usize> {
        ensure!(self.child.is_none(), "{} runs already", self.name);
        let from = self.log.length();
        let mut command = self.daemon_command()?;
        command.envs(self.environment.iter().map(|(variable, path)| (variable, path)));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start farshored")?;
        if let Some(pipe) = child.stderr.take() {
            self.log.follow(pipe);
        }
        self.child = Some(child);
        Ok(from)
    }

    /// Waits for a daemon that should end by itself; true if it ended with 0.
    ///
    /// # Errors
    /// If it still runs after `timeout`.
    pub fn wait_for_end(&mut self, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let name = self.name.clone();
        loop {
            if let Some(status) = self.child()?.try_wait()? {
                self.child = None;
                return Ok(status.success());
            }
            ensure!(Instant::now() < deadline, "{name} has not ended within {timeout:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL, as a crash of the process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn kill9(&mut self) -> Result<()> {
        let child = self.child()?;
        child.kill()?;
        child.wait()?;
        self.child = None;
        Ok(())
    }

    /// SIGTERM: the daemon drains and ends with 0 in bounded time.
    ///
    /// # Errors
    /// If it does not.
    pub fn terminate(&mut self) -> Result<()> {
        let id = i32::try_from(self.child()?.id()).context("process id")?;
        let pid = Pid::from_raw(id).context("process id 0")?;
        kill_process(pid, Signal::TERM)?;
        let clean = self.wait_for_end(STOP_TIMEOUT)?;
        ensure!(clean, "{} ended after SIGTERM with a failure:\n{}", self.name, self.log.tail(20));
        Ok(())
    }

    /// [`Self::terminate`], then [`Self::resume`].
    ///
    /// # Errors
    /// Theirs.
    pub fn restart(&mut self) -> Result<()> {
        self.terminate()?;
        self.resume()
    }

    /// Runs `farshore` against this site with the words of a line, as in `volume show data`.
    ///
    /// # Errors
    /// If it cannot be run or hangs.
    pub fn cli(&self, line: &str) -> Result<Finished> {
        let mut command = Command::new(binary("farshore")?);
        let arguments = line.split_whitespace();
        command.arg("--socket").arg(self.control_socket()).args(arguments);
        finish(command, CLI_TIMEOUT)
    }

    /// Runs a verb that must succeed; what it printed.
    ///
    /// # Errors
    /// If it does not succeed.
    pub fn run(&self, line: &str) -> Result<String> {
        self.cli(line)?.success()
    }

    /// Runs a verb with `--json`; the parsed answer.
    ///
    /// # Errors
    /// If it fails or prints something else.
    pub fn json(&self, line: &str) -> Result<Value> {
        let printed = self.run(&format!("--json {line}"))?;
        serde_json::from_str(&printed).with_context(|| format!("`{line}` printed: {printed}"))
    }

    /// Runs a verb that must be refused: exit code 1, one clear sentence on stderr, nothing on stdout.
    ///
    /// # Errors
    /// If it is not, or not so.
    pub fn refused(&self, line: &str) -> Result<String> {
        let finished = self.cli(line)?;
        let sentence = finished.stderr.trim_end().to_owned();
        ensure!(
            finished.status.code() == Some(1),
            "`{line}` ended with {}: {}{sentence}",
            finished.status,
            finished.stdout
        );
        ensure!(
            !sentence.is_empty() && !sentence.contains('\n') && finished.stdout.is_empty(),
            "`{line}` should give one sentence, not:\n{}{}",
            finished.stdout,
            finished.stderr
        );
        ensure!(!sentence.contains("panicked"), "{sentence}");
        Ok(sentence)
    }

    /// How hosts reach a volume.
    pub fn export(&self, volume: &str) -> Export {
        if self.options.nbd_unix {
            Export::unix(self.nbd_socket(), volume)
        } else {
            Export::tcp(self.nbd, volume)
        }
    }

    /// Connects to a volume as soon as it is served; a mirrored one opens only after a hello with the partner.
    ///
    /// # Errors
    /// If it is not served in time: the last refusal.
    pub fn wait_for_export(&self, volume: &str, timeout: Duration) -> Result<NbdClient> {
        let deadline = Instant::now() + timeout;
        loop {
            match NbdClient::connect(&self.export(volume)) {
                Ok(client) => return Ok(client),
                Err(error) if Instant::now() >= deadline => {
                    return Err(error)
                        .with_context(|| format!("{volume} at {} after {timeout:?}", self.name));
                }
                Err(
                    NbdError::Refused { .. } | NbdError::Io(_) | NbdError::Command(_) | NbdError::Protocol(_),
                ) => {
                    thread::sleep(Duration::from_millis(50));
                }
            }
        }
    }

    /// The path of a volume's ciphertext in the pool.
    ///
    /// # Errors
    /// If the volume does not exist.
    pub fn data_file(&self, volume: &str) -> Result<PathBuf> {
        let shown = self.json(&format!("volume show {volume}"))?;
        let id = shown.get("id").and_then(Value::as_str).context("volume show --json has no id")?;
        Ok(self.directory.join("pool").join(id).join("data"))
    }

    /// The metrics as the console serves them now.
    ///
    /// # Errors
    /// If it does not.
    pub fn metrics(&self) -> Result<Metrics> {
        Metrics::fetch(self.console)
    }

    /// The CPU time that the daemon has used, user and system, in ticks of 10 ms.
    ///
    /// # Errors
    /// If it does not run.
    pub fn cpu_ticks(&self) -> Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        let text = fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
        // After the command's name in parentheses come the fields from the third on; 14 and 15 are the times.
        let (_, fields) = text.rsplit_once(')').context("/proc/PID/stat")?;
        let times = fields.split_whitespace().skip(11).take(2);
        times.map(|field| field.parse::<u64>().context("/proc/PID/stat")).sum()
    }

    /// Memory of the daemon that is in RAM.
    ///
    /// # Errors
    /// If it does not run.
    pub fn resident_bytes(&self) -> Result<u64> {
        let child = self.child.as_ref().with_context(|| format!("{} does not run", self.name))?;
        let text = fs::read_to_string(format!("/proc/{}/statm", child.id()))?;
        let pages: u64 = text.split_whitespace().nth(1).context("/proc/PID/statm")?.parse()?;
        Ok(pages * 4096)
    }

    /// Open file descriptors of the daemon.
    ///
    /// # Errors
    /// If it does not run.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.process_id()?))?.count())
    }

    /// The daemon's process.
    ///
    /// # Errors
    /// If it does not run.
    pub fn process_id(&self) -> Result<u32> {
        Ok(self.child.as_ref().with_context(|| format!("{} does not run", self.name))?.id())
    }

    /// The site's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The site's data directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where it listens for NBD over TCP.
    pub const fn nbd(&self) -> SocketAddr {
        self.nbd
    }

    /// Where it listens for its partner.
    pub const fn replication(&self) -> SocketAddr {
        self.replication
    }

    /// Where it serves the console.
    pub const fn console(&self) -> SocketAddr {
        self.console
    }

    /// The control API's socket.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join("control.sock")
    }

    /// The daemon's log.
    pub const fn log(&self) -> &Log {
        &self.log
    }

    fn nbd_socket(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }

    fn nbd_argument(&self) -> String {
        if self.options.nbd_unix {
            format!("unix:{}", self.nbd_socket().display())
        } else {
            self.nbd.to_string()
        }
    }

    fn child(&mut self) -> Result<&mut Child> {
        self.child.as_mut().with_context(|| format!("{} does not run", self.name))
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child
            && let Ok(None) = child.try_wait()
        {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
