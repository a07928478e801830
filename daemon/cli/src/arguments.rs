//! What can be typed: commands, flags and their types.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use block::{ByteCount, TenantId, VolumeName};
use clap::{Args, Parser, Subcommand, ValueEnum};
use control::{
    Cache, HostAccess, HostIdentity, HostPort, Iops, LinkFailure, MirrorMode, MirrorState, Overload, Rate,
    RecoveryTarget, Side, TlsRule, UnknownState, VolumeAccessChange, VolumeCreate,
};

/// Where a daemon started with `--config` listens if its settings do not say otherwise.
const SOCKET_DEFAULT: &str = "/run/farshore/control.sock";

/// Volumes, mirrors and partners of a Farshore site.
#[derive(Debug, Parser)]
#[command(name = "farshore", version, arg_required_else_help = true)]
pub(crate) struct Arguments {
    /// The daemon's control socket.
    #[arg(long, global = true, env = "FARSHORE_SOCKET", default_value = SOCKET_DEFAULT, value_name = "PATH")]
    pub(crate) socket: PathBuf,
    /// Print the API's own document instead of a table.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Volumes: what hosts mount.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// This site's own certificate.
    #[command(subcommand)]
    Certificate(CertificateCommand),
    /// Partners: the peer sites.
    #[command(subcommand)]
    Partner(PartnerCommand),
    /// Mirrors: volumes that a partner holds a replica of.
    #[command(subcommand)]
    Mirror(MirrorCommand),
    /// Tenants: whose keys wrap the keys of which volumes.
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Keys: wrap them anew, and check what wraps them.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The audit log of keys and tenants.
    #[command(subcommand)]
    Audit(AuditCommand),
    /// The site as a whole.
    Status,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Create a volume; its space is allocated at once.
    Create(VolumeCreateArguments),
    /// All volumes.
    List,
    /// One volume.
    Show {
        /// The volume's name.
        name: VolumeName,
    },
    /// Make a volume larger; connections that exist keep the old size.
    Resize {
        /// The volume's name.
        name: VolumeName,
        /// The new size, as in 20GiB.
        #[arg(long)]
        size: ByteCount,
    },
    /// Show who may open a volume, or change it.
    Access(VolumeAccessArguments),
    /// Delete a volume and its data.
    Delete {
        /// The volume's name.
        name: VolumeName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TenantCommand {
    /// Make a tenant, with a domain key of its own.
    Create {
        /// The tenant's name.
        name: VolumeName,
        /// Its identity, where the partner site has the tenant already; `tenant show` tells it there.
        #[arg(long, value_name = "IDENTITY")]
        id: Option<TenantIdentity>,
    },
    /// All tenants.
    List,
    /// One tenant.
    Show {
        /// The tenant's name.
        name: VolumeName,
    },
    /// Delete a tenant that has no volumes, and its key.
    Delete {
        /// The tenant's name.
        name: VolumeName,
    },
    /// Take the tenant's volumes offline at once and wipe their keys, here and at the partners of this site's primaries.
    Lock {
        /// The tenant's name.
        name: VolumeName,
    },
    /// Bring them back.
    Unlock {
        /// The tenant's name.
        name: VolumeName,
    },
}

/// A tenant's identity as text.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TenantIdentity(pub(crate) TenantId);

impl FromStr for TenantIdentity {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let quoted = format!("\"{text}\"");
        serde_json::from_str(&quoted).map(Self).map_err(|_| "write it as 'farshore tenant show' does")
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// Wrap the key of a volume, or of all volumes of a tenant, anew; no data is touched.
    #[command(group = clap::ArgGroup::new("scope").required(true).args(["volume", "tenant"]))]
    Rotate {
        /// The volume: it gets a new key-encryption key.
        volume: Option<VolumeName>,
        /// The tenant: it gets a new domain key, and each of its volumes a new key-encryption key.
        #[arg(long, value_name = "TENANT")]
        tenant: Option<VolumeName>,
    },
    /// The root of trust.
    #[command(subcommand)]
    Provider(ProviderCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ProviderCommand {
    /// Wrap and unwrap a key with it.
    Test,
    /// Make its root key if there is none, then test it.
    Init,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Check that no line was changed, taken out or put in; print the hash of the last one, to be kept elsewhere.
    Verify {
        /// A hash that was kept, and must be in the log: no line up to it was cut off.
        #[arg(long, value_name = "HASH")]
        expect: Option<String>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct VolumeCreateArguments {
    /// The volume's name, also of its export.
    pub(crate) name: VolumeName,
    /// The size, as in 10GiB.
    #[arg(long)]
    pub(crate) size: ByteCount,
    /// The storage class.
    #[arg(long, default_value_t = VolumeCreate::class_default())]
    pub(crate) class: String,
    /// Commands a second, or unlimited, instead of the class's limit.
    #[arg(long, value_name = "N|unlimited")]
    pub(crate) iops: Option<Iops>,
    /// Bypass the page cache (none) or use it (page).
    #[arg(long, value_enum, default_value_t = CacheWord::None)]
    pub(crate) cache: CacheWord,
    /// The tenant that it belongs to; the default tenant without one.
    #[arg(long, value_name = "TENANT")]
    pub(crate) tenant: Option<VolumeName>,
    #[command(flatten)]
    pub(crate) access: AccessArguments,
}

/// Who may open a volume.
#[derive(Debug, Args)]
pub(crate) struct AccessArguments {
    /// Whether the volume can be opened over TLS only.
    #[arg(long, value_enum)]
    pub(crate) tls: Option<TlsWord>,
    /// Let no host write.
    #[arg(long, conflicts_with = "read_write")]
    pub(crate) read_only: bool,
    /// Let hosts write, but for those listed as ro.
    #[arg(long)]
    pub(crate) read_write: bool,
    /// List a host, by the name in its certificate; once there is a list, no other host may open the volume. Hosts can
    /// write, unless the name ends with :ro. May be given several times.
    #[arg(long, value_name = "IDENTITY[:ro|:rw]")]
    pub(crate) allow: Vec<HostAccess>,
}

impl AccessArguments {
    pub(crate) fn change(&self) -> VolumeAccessChange {
        VolumeAccessChange {
            tls: self.tls.map(Into::into),
            read_only: match (self.read_only, self.read_write) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            },
            allow: self.allow.clone(),
            ..VolumeAccessChange::default()
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct VolumeAccessArguments {
    /// The volume's name.
    pub(crate) name: VolumeName,
    #[command(flatten)]
    pub(crate) access: AccessArguments,
    /// Take a host from the list; its connections are closed. May be given several times.
    #[arg(long, value_name = "IDENTITY")]
    pub(crate) revoke: Vec<HostIdentity>,
    /// Empty the list first: if no --allow follows, any host may open the volume.
    #[arg(long)]
    pub(crate) any_host: bool,
    /// Of a mirrored volume: shut out here what is to be shut out, also if the partner cannot be told now. It is told when
    /// it answers again; a failover before that lets in what was shut out.
    #[arg(long)]
    pub(crate) here_first: bool,
}

impl VolumeAccessArguments {
    /// What is to change; none if nothing was said.
    pub(crate) fn change(&self) -> Option<VolumeAccessChange> {
        let change = VolumeAccessChange {
            revoke: self.revoke.clone(),
            any_host: self.any_host,
            here_first: self.here_first,
            ..self.access.change()
        };
        (change != VolumeAccessChange::default()).then_some(change)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum CertificateCommand {
    /// Print it as PEM, for `partner add` at the partner.
    Show,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PartnerCommand {
    /// Add a partner; do the same there with this site's certificate.
    Add {
        /// What this site calls the partner.
        name: VolumeName,
        /// Where it listens for replication.
        #[arg(long, value_name = "HOST:PORT")]
        address: HostPort,
        /// A file with its certificate (PEM): what `certificate show` prints there.
        #[arg(long, value_name = "FILE")]
        certificate: PathBuf,
    },
    /// All partners.
    List,
    /// One partner.
    Show {
        /// The partner's name.
        name: VolumeName,
    },
    /// Remove a partner that no mirror needs.
    Remove {
        /// The partner's name.
        name: VolumeName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MirrorCommand {
    /// Mirror volumes of this site to a partner.
    Create(MirrorCreateArguments),
    /// All mirrors.
    List,
    /// One mirror.
    Show {
        /// The mirror's name.
        name: VolumeName,
    },
    /// Change what the mirror is to do, at this site, while it runs.
    Set(MirrorSetArguments),
    /// Compare the partner's image with this primary's, in the order of writes, while hosts write; wait for the report.
    Verify {
        /// The mirror's name.
        name: VolumeName,
        /// Overwrite what differs with the blocks of this side.
        #[arg(long, value_enum, value_name = "local|partner")]
        repair_from: Option<SideWord>,
    },
    /// Stop copying; the partner keeps its image.
    Stop {
        /// The mirror's name.
        name: VolumeName,
    },
    /// Start copying again.
    Start {
        /// The mirror's name.
        name: VolumeName,
        /// Whose writes are kept where both sites have some.
        #[arg(long, value_enum, value_name = "local|partner")]
        primary: Option<SideWord>,
    },
    /// Give this primary's role to the secondary; nothing is lost, hosts reconnect there.
    Switch {
        /// The mirror's name.
        name: VolumeName,
    },
    /// What this old primary wrote and the new one never had.
    Orphans {
        /// The mirror's name.
        name: VolumeName,
        /// Also write it, decrypted, into this new directory of the daemon's machine.
        #[arg(long, value_name = "DIR")]
        export: Option<PathBuf>,
    },
    /// Make this secondary primary; what it has not received is lost.
    Failover {
        /// The mirror's name.
        name: VolumeName,
        /// Accept that writes after the recovery point are lost.
        #[arg(long)]
        accept_loss: bool,
        /// Go back to the last recovery point at or before this one: a time in UTC, or a sequence. Without
        /// --accept-loss it is only said which one that is.
        #[arg(long, value_name = "TIME|SEQUENCE")]
        at: Option<RecoveryTarget>,
    },
    /// Drills: a writable copy of the secondary's image while the mirror goes on.
    #[command(subcommand)]
    Drill(DrillCommand),
    /// Wait until the mirror is caught up or in a state.
    Wait {
        /// The mirror's name.
        name: VolumeName,
        /// caught-up, or a state as `mirror show` prints it.
        #[arg(long = "for", value_name = "caught-up|STATE")]
        goal: Goal,
        /// Give up after this time.
        #[arg(long, default_value = "60s", value_parser = humantime::parse_duration)]
        timeout: Duration,
    },
    /// Delete the mirror; the volumes stay.
    Delete {
        /// The mirror's name.
        name: VolumeName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DrillCommand {
    /// Export a writable copy of each volume as NAME@drill.
    Start {
        /// The mirror's name.
        name: VolumeName,
        /// Of the last recovery point at or before this one: a time in UTC, or a sequence; the newest if not given.
        #[arg(long, value_name = "TIME|SEQUENCE")]
        at: Option<RecoveryTarget>,
    },
    /// Discard the copy.
    Stop {
        /// The mirror's name.
        name: VolumeName,
    },
}

#[derive(Debug, Args)]
pub(crate) struct MirrorCreateArguments {
    /// The mirror's name, the same at both sites.
    pub(crate) name: VolumeName,
    /// The partner that gets the replica.
    #[arg(long)]
    pub(crate) partner: VolumeName,
    /// The volumes, which share one write order.
    #[arg(long, value_delimiter = ',', required = true, value_name = "A,B")]
    pub(crate) volumes: Vec<VolumeName>,
    /// When a host's write is answered.
    #[arg(long, value_enum, default_value_t = ModeWord::Async)]
    pub(crate) mode: ModeWord,
    /// What gives way when the partner of a synchronous mirror is away: degrade the mode, until it is back; stop the
    /// hosts' writes.
    #[arg(long, value_enum, default_value_t = LinkFailureWord::Degrade)]
    pub(crate) on_link_failure: LinkFailureWord,
    /// The RPO budget, in whole seconds, as in 15m; the site's setting if not given.
    #[arg(long, value_parser = whole_seconds)]
    pub(crate) rpo: Option<NonZeroU32>,
    /// What gives way when the partner cannot keep up.
    #[arg(long, value_enum, default_value_t = OverloadWord::Bitmap)]
    pub(crate) overload: OverloadWord,
    /// The most that is sent, as in 50MB/s.
    #[arg(long, value_name = "RATE|unlimited", default_value_t)]
    pub(crate) bandwidth: Rate,
    /// The most that copies and comparisons read, as in 50MB/s.
    #[arg(long, value_name = "RATE|unlimited", default_value_t)]
    pub(crate) resync_rate: Rate,
}

#[derive(Debug, Args)]
pub(crate) struct MirrorSetArguments {
    /// The mirror's name.
    pub(crate) name: VolumeName,
    /// When a host's write is answered: async when it is home, sync when the partner has received it too.
    #[arg(long, value_enum)]
    pub(crate) mode: Option<ModeWord>,
    /// What gives way when the partner of a synchronous mirror is away: degrade the mode, until it is back; stop the
    /// hosts' writes.
    #[arg(long, value_enum)]
    pub(crate) on_link_failure: Option<LinkFailureWord>,
    /// The RPO budget, in whole seconds, as in 15m.
    #[arg(long, value_parser = whole_seconds)]
    pub(crate) rpo: Option<NonZeroU32>,
    /// What gives way when the partner cannot keep up: bitmap nothing of the hosts', pace at most 10 % of their limits,
    /// stop their writes.
    #[arg(long, value_enum)]
    pub(crate) overload: Option<OverloadWord>,
    /// The most that is sent, as in 50MB/s.
    #[arg(long, value_name = "RATE|unlimited")]
    pub(crate) bandwidth: Option<Rate>,
    /// The most that copies and comparisons read, as in 50MB/s.
    #[arg(long, value_name = "RATE|unlimited")]
    pub(crate) resync_rate: Option<Rate>,
}

/// What `mirror wait` waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The partner has everything that hosts wrote.
    CaughtUp,
    /// A state.
    State(MirrorState),
}

impl FromStr for Goal {
    type Err = UnknownState;

    fn from_str(word: &str) -> Result<Self, Self::Err> {
        if word == "caught-up" {
            return Ok(Self::CaughtUp);
        }
        word.parse().map(Self::State)
    }
}

impl std::fmt::Display for Goal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CaughtUp => formatter.write_str("caught-up"),
            Self::State(state) => state.fmt(formatter),
        }
    }
}

/// A duration of 1 to 2^32-1 whole seconds.
fn whole_seconds(text: &str) -> Result<NonZeroU32, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let seconds = u32::try_from(duration.as_secs()).ok().and_then(NonZeroU32::new);
    seconds
        .filter(|_| duration.subsec_nanos() == 0)
        .ok_or_else(|| "write whole seconds, at least one, as in 15m or 90s".to_owned())
}

/// Declares how an API enum is typed on the command line.
macro_rules! word {
    ($word:ident => $target:ident { $($variant:ident),+ }) => {
        #[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
        pub(crate) enum $word {
            $($variant),+
        }

        impl From<$word> for $target {
            fn from(word: $word) -> Self {
                match word {
                    $($word::$variant => Self::$variant),+
                }
            }
        }
    };
}

word!(CacheWord => Cache { None, Page });
word!(ModeWord => MirrorMode { Async, Sync });
word!(OverloadWord => Overload { Bitmap, Pace, Stop });
word!(LinkFailureWord => LinkFailure { Degrade, Stop });
word!(TlsWord => TlsRule { Optional, Required });
word!(SideWord => Side { Local, Partner });

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_rpo_budget_is_whole_seconds() {
        assert_eq!(whole_seconds("15m").unwrap().get(), 900);
        for bad in ["0s", "1500ms", "soon", "500years"] {
            assert!(whole_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_goal_is_caught_up_or_a_state() {
        for word in ["caught-up", "consistent_synchronized", "idling"] {
            assert_eq!(word.parse::<Goal>().unwrap().to_string(), word);
        }
        assert!("synchronised".parse::<Goal>().is_err());
    }
}
