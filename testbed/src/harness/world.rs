//! The surroundings of one system test.

use std::cell::RefCell;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::{Log, Site, SiteOptions};

/// A directory and the logs of all daemons of one test.
pub struct World {
    directory: TempDir,
    logs: RefCell<Vec<Log>>,
}

impl World {
    /// Runs a test. It fails if the test does, or if a daemon logged an unexpected WARN, ERROR or panic line; the
    /// logs' ends are shown then, and the directory is kept if `FARSHORE_KEEP` is set.
    ///
    /// # Errors
    /// The test's, or the unexpected lines.
    pub fn run(test: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        // Not /tmp, which may be a RAM disk: the daemon's files want O_DIRECT.
        let parent =
            std::env::var_os("FARSHORE_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
        let directory = tempfile::Builder::new()
            .prefix("farshore-")
            .tempdir_in(&parent)
            .with_context(|| format!("no directory in {}", parent.display()))?;
        let mut world = Self { directory, logs: RefCell::default() };
        let outcome = catch_unwind(AssertUnwindSafe(|| test(&world)));
        let failed = !matches!(outcome, Ok(Ok(()))) || !world.unexpected().is_empty();
        if failed {
            world.show_logs();
            if std::env::var_os("FARSHORE_KEEP").is_some() {
                world.directory.disable_cleanup(true);
            }
        }
        match outcome {
            Ok(result) => result?,
            Err(panic) => resume_unwind(panic),
        }
        let unexpected = world.unexpected();
        ensure!(unexpected.is_empty(), "unexpected log lines:\n{}", unexpected.join("\n"));
        Ok(())
    }

    /// The test's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A path in the test's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// The same as text, for command lines.
    pub fn text(&self, name: &str) -> String {
        self.path(name).to_string_lossy().into_owned()
    }

    /// Starts a daemon with its data in a folder of its own, named after the site.
    ///
    /// # Errors
    /// If it does not become ready.
    pub fn site(&self, name: &str, options: SiteOptions) -> Result<Site> {
        let log = Log::new(name);
        self.logs.borrow_mut().push(log.clone());
        Site::start(name, self.path(name), options, log)
    }

    fn unexpected(&self) -> Vec<String> {
        self.logs.borrow().iter().flat_map(Log::unexpected).collect()
    }

    fn show_logs(&self) {
        let mut out = std::io::stderr().lock();
        for log in self.logs.borrow().iter() {
            drop(out.write_all(log.tail(60).as_bytes()));
        }
    }
}
