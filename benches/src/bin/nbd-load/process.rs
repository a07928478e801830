//! What the kernel knows about processes.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The CPU time of a process so far, user and system, of all its threads; in steps of a clock tick.
///
/// # Errors
/// When there is no such process.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let ticks = cpu_ticks(&text).with_context(|| format!("cannot understand {path}"))?;
    let ticks_per_second = u32::try_from(rustix::param::clock_ticks_per_second())?;
    Ok(Duration::from_secs(ticks) / ticks_per_second)
}

/// The fields `utime` and `stime`; the second field, the name, may contain blanks and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

/// Raises the limit of open files as far as this process may.
///
/// # Errors
/// When the kernel refuses.
pub(crate) fn allow_many_files() -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        .context("cannot raise the limit of open files")
}

#[cfg(test)]
mod tests {
    use super::cpu_ticks;

    #[test]
    fn a_name_with_blanks_does_not_shift_the_fields() {
        let stat = "7 (a ) 1 (b) S 1 7 7 0 -1 4194560 100 0 0 0 31 11 0 0 20 0 5 0 100";
        assert_eq!(cpu_ticks(stat), Some(42));
        assert_eq!(cpu_ticks("7 (a) S 1"), None);
    }
}
