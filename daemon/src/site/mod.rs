//! A site: everything that a daemon serves, wired together.
//!
//! The site owns the catalogue, the shards, the transport to its partners and the listeners. Requests of operators and
//! partners that change something run one at a time; blocking work runs on tokio's blocking threads.

mod access;
mod auditing;
mod certificates;
mod changes;
mod clean;
mod console;
mod descriptors;
mod drill;
mod exports;
mod files;
mod greeting;
mod greetings;
mod hosts;
mod keys;
mod mirrors;
mod operations;
mod orphans;
mod partners;
mod policy;
mod removal;
mod room;
mod switch;
mod tenants;
mod verify;
mod views;
mod volumes;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use block::{MirrorId, VolumeId, VolumeName, WallTime};
use metrics_exporter_prometheus::PrometheusHandle;
use protocol::{GroupState, Role};
use replicator::{
    BudgetedBuffers, CutIntake, Endpoint, PinStore, PinnedCertificate, SiteIdentity, TransportSettings,
};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::api::{ControlSocket, router};
use crate::audit::AuditLog;
use crate::catalogue::{Catalogue, DirectoryLock, GroupRecord, MirrorRecord};
use crate::group::{CleanState, IoFailure, IoId};
use crate::settings::{Action, ConsoleAddress, Settings};
use crate::shard::{GroupKey, HostLimits, ShardCommand, ShardHandle, ShardNews};

pub use console::install_metrics;
use descriptors::Demand;
use exports::Exports;
use greeting::Protection;
use greetings::Greetings;
use hosts::{HANDSHAKES_MAX, HostListener};
use keys::Keys;
use removal::Removals;

/// Memory for cuts that were received and are not applied.
const CUT_BUFFER_BYTES: u32 = 128 << 20;
/// Stopping waits so long for what is in flight.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// A group and where it is.
#[derive(Clone, Debug)]
struct GroupEntry {
    shard: usize,
    volumes: Vec<VolumeId>,
    mirror: Option<MirrorId>,
}

#[derive(Debug, Default)]
struct Groups {
    last: u64,
    entries: BTreeMap<GroupKey, GroupEntry>,
}

/// The running site.
pub struct Site {
    settings: Settings,
    catalogue: Catalogue,
    keys: keys::Keys,
    audit: AuditLog,
    identity: SiteIdentity,
    pins: PinStore,
    endpoint: Endpoint,
    shards: Vec<ShardHandle>,
    groups: Mutex<Groups>,
    exports: Exports,
    /// Drills' copies, by the mirrored group.
    drills: Mutex<BTreeMap<GroupKey, drill::DrillCopy>>,
    /// What is wrong with volumes that could not be opened.
    troubles: Mutex<BTreeMap<VolumeId, String>>,
    partner_troubles: Mutex<BTreeMap<VolumeName, Option<String>>>,
    /// What partners have not been told of who may open a volume.
    untold: Mutex<access::Untold>,
    /// Held while a partner is told of that.
    telling: tokio::sync::Mutex<()>,
    /// The (epoch, revision) of what this site was last told of a replica; a message that was late comes below it.
    told: tokio::sync::Mutex<BTreeMap<VolumeId, (u64, u64)>>,
    /// Held by whatever changes the set of volumes, partners or mirrors.
    changes: tokio::sync::Mutex<()>,
    started: Instant,
    /// Places for established connections of hosts.
    connections: Arc<Semaphore>,
    nbd_uris: Mutex<Vec<String>>,
    requests_failed: AtomicU64,
    removals: Arc<Removals>,
}

/// The parts of a site that are not shared: they end with it.
pub struct Running {
    site: Arc<Site>,
    threads: Vec<JoinHandle<()>>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    stop_api: oneshot::Sender<()>,
    api: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Site {
    /// Opens everything and begins to serve; returns when hosts, partners and operators can connect.
    ///
    /// # Errors
    /// One clear error for whatever keeps the site from serving.
    pub async fn start(settings: Settings, metrics: PrometheusHandle) -> anyhow::Result<Running> {
        descriptors::raise_limit();
        let lock = DirectoryLock::acquire(&settings.data_dir)?;
        for pool in settings.pools.values() {
            std::fs::create_dir_all(pool)
                .with_context(|| format!("cannot make pool folder {}", pool.display()))?;
        }
        let (catalogue, notices) = Catalogue::open(lock, settings.pools.clone())?;
        for notice in notices {
            tracing::warn!("{notice}");
        }
        crypto::set_key_guard(keystore::memory::guard);
        let audit = AuditLog::open(&settings.data_dir.join(crate::audit::FILE_NAME))?;
        if let Some(damage) = audit.damage() {
            tracing::error!(%damage, "volumes are served, but tenants and keys cannot be changed");
        }
        let is_new = catalogue.volumes().is_empty()
            && catalogue.tenants().iter().all(|tenant| tenant.domain.is_none());
        let keys = Keys::start(&settings, is_new)?;
        let identity = identity(&settings)?;
        let pins = PinStore::new();
        for partner in catalogue.partners() {
            let certificate = PinnedCertificate::from_pem(&partner.certificate)?;
            pins.insert(partner.name.as_str(), certificate)?;
        }
        let buffers = Arc::new(BudgetedBuffers::new(CUT_BUFFER_BYTES));
        let intake = CutIntake::new(buffers, |header| {
            let size = journal::peek(header).map_err(|error| error.to_string())?;
            usize::try_from(size.total_bytes()).map_err(|error| error.to_string())
        });
        let (endpoint, incoming) = Endpoint::bind(
            settings.replication_listen,
            &identity,
            pins.clone(),
            intake,
            TransportSettings::default(),
        )?;
        let (news, received) = mpsc::unbounded_channel();
        let (shards, threads) = start_shards(&settings, &news)?;
        let site = Arc::new(Self {
            catalogue,
            keys,
            audit,
            identity,
            pins,
            endpoint,
            shards,
            groups: Mutex::default(),
            exports: Exports::default(),
            drills: Mutex::default(),
            troubles: Mutex::default(),
            partner_troubles: Mutex::default(),
            untold: Mutex::default(),
            telling: tokio::sync::Mutex::default(),
            told: tokio::sync::Mutex::default(),
            changes: tokio::sync::Mutex::default(),
            started: Instant::now(),
            connections: Arc::new(Semaphore::new(usize::try_from(settings.nbd_connections_max.get())?)),
            nbd_uris: Mutex::default(),
            requests_failed: AtomicU64::new(0),
            removals: Arc::default(),
            settings,
        });
        site.serve(threads, received, incoming, metrics).await
    }

    async fn serve(
        self: Arc<Self>,
        threads: Vec<JoinHandle<()>>,
        news: mpsc::UnboundedReceiver<(usize, ShardNews)>,
        incoming: mpsc::Receiver<replicator::IncomingSession>,
        metrics: PrometheusHandle,
    ) -> anyhow::Result<Running> {
        if let Some(shortage) = self.descriptors_wanted().shortage() {
            tracing::warn!("{shortage}");
        }
        // Whatever can be refused is asked for first: opening the groups uses up the records of their clean stops.
        let mut listeners = Vec::new();
        let config = certificates::server_config(&self.settings)?;
        for listen in &self.settings.nbd_listen {
            let protection = Protection { tls: listen.tls, config: config.clone() };
            let listener = HostListener::bind(&listen.address, protection).await.with_context(|| {
                format!("cannot listen for hosts at {listen}: name another address with --nbd")
            })?;
            lock(&self.nbd_uris).push(listener.uri());
            listeners.push(listener);
        }
        let console = match self.settings.console_listen {
            ConsoleAddress::Tcp(address) => Some(console::bind(address).await.with_context(|| {
                format!("cannot listen for the console at {address}: name another with --console")
            })?),
            ConsoleAddress::Off => None,
        };
        let socket = ControlSocket::bind(&self.settings.control_socket)?;
        let mut tasks = vec![tokio::spawn(Arc::clone(&self).hear_shards(news))];
        let opener = Arc::clone(&self);
        tokio::task::spawn_blocking(move || opener.open_groups()).await?;
        for folder in self.catalogue.take_leftovers() {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // Nobody waits for it; the log tells if it fails.
            drop(self.removals.begin(&name, folder));
        }
        tasks.push(tokio::spawn(Arc::clone(&self).accept_partners(incoming)));
        tasks.push(tokio::spawn(Arc::clone(&self).retry_locked()));
        let greetings = Greetings::new(HANDSHAKES_MAX);
        for listener in listeners {
            tasks.push(tokio::spawn(listener.serve(Arc::clone(&self), Arc::clone(&greetings))));
        }
        if let Some(listener) = console {
            tasks.push(tokio::spawn(console::serve(listener, Arc::clone(&self), metrics)));
        }
        let (stop_api, stopped) = oneshot::channel::<()>();
        let api = tokio::spawn(socket.serve(
            router(Arc::new(operations::Operator(Arc::clone(&self)))),
            async move {
                // A sender that is gone means the same as a word from it.
                let _ = stopped.await;
            },
        ));
        Ok(Running { site: self, threads, tasks, stop_api, api })
    }

    fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The open files of this site at its fullest.
    fn descriptors_wanted(&self) -> Demand {
        let count = |number: usize| u64::try_from(number).unwrap_or(u64::MAX);
        let mirrors = count(self.catalogue.mirrors().len());
        Demand {
            connections: u64::from(self.settings.nbd_connections_max.get()),
            handshakes: count(HANDSHAKES_MAX),
            volumes: count(self.catalogue.volumes().len()),
            // With the checkpoints and the spill.
            redo_files: mirrors * (u64::from(self.settings.redo_segments.get()) + 2),
        }
    }

    fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn exports(&self) -> &Exports {
        &self.exports
    }

    fn name(&self) -> String {
        self.settings.site.to_string()
    }

    /// The shard that a group is, or would be, on.
    fn shard_of(&self, key: GroupKey) -> &ShardHandle {
        let shard = lock(&self.groups).entries.get(&key).map_or(0, |entry| entry.shard);
        #[expect(clippy::indexing_slicing, reason = "entries name shards that exist; there is at least one")]
        &self.shards[shard]
    }

    /// A key for a new group on the shard with the fewest.
    fn new_group(&self, volumes: Vec<VolumeId>, mirror: Option<MirrorId>) -> GroupKey {
        let mut groups = lock(&self.groups);
        groups.last += 1;
        let key = GroupKey(groups.last);
        let load = |shard: &usize| groups.entries.values().filter(|entry| entry.shard == *shard).count();
        let shard = (0..self.shards.len()).min_by_key(load).unwrap_or(0);
        groups.entries.insert(key, GroupEntry { shard, volumes, mirror });
        key
    }

    /// A key for the copy of a drill, beside its mirror. No volume is found by it.
    fn new_drill_group(&self, mirrored: GroupKey) -> GroupKey {
        let mut groups = lock(&self.groups);
        groups.last += 1;
        let key = GroupKey(groups.last);
        let shard = groups.entries.get(&mirrored).map_or(0, |entry| entry.shard);
        groups.entries.insert(key, GroupEntry { shard, volumes: Vec::new(), mirror: None });
        key
    }

    fn forget_group(&self, key: GroupKey) {
        lock(&self.groups).entries.remove(&key);
    }

    fn set_mirror(&self, key: GroupKey, mirror: Option<MirrorId>) {
        if let Some(entry) = lock(&self.groups).entries.get_mut(&key) {
            entry.mirror = mirror;
        }
    }

    fn group_of_volume(&self, volume: VolumeId) -> Option<GroupKey> {
        let groups = lock(&self.groups);
        groups.entries.iter().find(|(_, entry)| entry.volumes.contains(&volume)).map(|(key, _)| *key)
    }

    fn group_of_mirror(&self, mirror: MirrorId) -> Option<GroupKey> {
        let groups = lock(&self.groups);
        groups.entries.iter().find(|(_, entry)| entry.mirror == Some(mirror)).map(|(key, _)| *key)
    }

    fn mirror_of_group(&self, key: GroupKey) -> Option<MirrorRecord> {
        let mirror = lock(&self.groups).entries.get(&key)?.mirror?;
        self.catalogue.mirror_by_id(mirror)
    }

    fn note_partner(&self, partner: &VolumeName, trouble: Option<String>) {
        lock(&self.partner_troubles).insert(partner.clone(), trouble);
    }

    /// Does what the shards ask for.
    async fn hear_shards(self: Arc<Self>, mut news: mpsc::UnboundedReceiver<(usize, ShardNews)>) {
        while let Some((_, news)) = news.recv().await {
            match news {
                ShardNews::Dial(key) => {
                    tokio::spawn(Arc::clone(&self).dial_for(key));
                }
                ShardNews::Persist { key, io, state } => {
                    let site = Arc::clone(&self);
                    tokio::task::spawn_blocking(move || site.persist(key, io, &state));
                }
                ShardNews::Unlock(key) => {
                    let site = Arc::clone(&self);
                    tokio::task::spawn_blocking(move || site.unlock_for(key));
                }
                ShardNews::Grow { key, io, volume, size, stored } => {
                    let site = Arc::clone(&self);
                    tokio::task::spawn_blocking(move || site.grow_member(key, io, volume, size, stored));
                }
                ShardNews::Presented(key) => self.exports.present(key, &Ok(())),
                ShardNews::Withdrawn(key, reason) => self.exports.present(key, &Err(reason)),
                ShardNews::DrillEnded { key, reason } => {
                    tracing::info!(reason, "the copy of a drill is taken away");
                    tokio::spawn(Arc::clone(&self).drill_ended(key));
                }
            }
        }
    }

    fn persist(&self, key: GroupKey, io: IoId, state: &GroupState) {
        let mirror = lock(&self.groups).entries.get(&key).and_then(|entry| entry.mirror);
        let result = match mirror {
            Some(mirror) => self.catalogue.update_group(mirror, group_record(state)).map(|notices| {
                for notice in notices {
                    tracing::warn!("{notice}");
                }
            }),
            None => return,
        };
        let result = result.map_err(|error| {
            self.requests_failed.fetch_add(1, Ordering::Relaxed);
            tracing::error!(%error, "the state of a mirror cannot be stored");
            IoFailure { operation: "storing the mirror's state", errno: 0 }
        });
        self.shard_of(key).send(ShardCommand::Persisted { key, io, result });
    }
}

impl Running {
    /// The addresses that hosts use.
    pub fn nbd_uris(&self) -> Vec<String> {
        lock(&self.site.nbd_uris).clone()
    }

    /// Stops in order: no new connections, what is in flight ends, primaries leave a record of what their targets lack.
    /// Bounded in time; it waits for no partner.
    pub async fn stop(self) {
        for task in self.tasks.iter().skip(1) {
            task.abort();
        }
        let _ = self.stop_api.send(());
        self.site.removals.stop();
        let mut drains = Vec::new();
        for shard in &self.site.shards {
            let (done, drained) = oneshot::channel();
            shard.send(ShardCommand::Drain { done });
            drains.push(drained);
        }
        let deadline = tokio::time::Instant::now() + DRAIN_LIMIT;
        for drained in drains {
            match tokio::time::timeout_at(deadline, drained).await {
                Ok(Ok(states)) => self.site.write_clean(states),
                Ok(Err(_)) | Err(_) => {
                    tracing::warn!("a shard did not end in time: its mirrors are compared at the next start");
                }
            }
        }
        for shard in &self.site.shards {
            shard.send(ShardCommand::Stop);
        }
        for thread in self.threads {
            if thread.join().is_err() {
                tracing::error!("a shard's thread panicked");
            }
        }
        self.api.abort();
        for listen in &self.site.settings.nbd_listen {
            if let crate::settings::NbdAddress::Unix(path) = &listen.address {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

impl Site {
    fn write_clean(&self, states: Vec<(GroupKey, Option<CleanState>)>) {
        for (key, clean) in states {
            let (Some(mirror), Some(clean)) = (self.mirror_of_group(key), clean) else {
                continue;
            };
            let Ok(state) = GroupState::decode(&mirror.group.state) else {
                continue;
            };
            let sizes: Vec<_> = self.sizes(&mirror);
            let folder = files::mirror_folder(&self.settings.data_dir, mirror.id);
            if let Err(error) = clean::write(&folder, mirror.id, &state, &sizes, &clean) {
                tracing::warn!(%error, mirror = %mirror.name, "the record of the clean stop cannot be written");
            }
        }
    }

    fn sizes(&self, mirror: &MirrorRecord) -> Vec<(VolumeId, block::ByteCount)> {
        let volumes = mirror.volumes.iter().filter_map(|id| self.catalogue.volume_by_id(*id));
        volumes.map(|volume| (volume.id, volume.size)).collect()
    }
}

/// The site's calendar clock.
fn wall_time() -> WallTime {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    WallTime(u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// The catalogue's form of a group's state.
fn group_record(state: &GroupState) -> GroupRecord {
    GroupRecord {
        epoch: state.epoch.0,
        incarnation: state.incarnation.0,
        role: match state.role {
            Role::Primary => control::Role::Primary,
            Role::Secondary => control::Role::Secondary,
        },
        state: state.encode(),
    }
}

fn start_shards(
    settings: &Settings,
    news: &mpsc::UnboundedSender<(usize, ShardNews)>,
) -> anyhow::Result<(Vec<ShardHandle>, Vec<JoinHandle<()>>)> {
    let limits =
        HostLimits { receive_bytes: usize::try_from(settings.receive_pool.0)?, stall: settings.nbd_stall };
    let start = |index| crate::shard::start(index, limits, news.clone()).context("a shard cannot start");
    let started: Vec<_> = (0..settings.shards.get()).map(start).collect::<anyhow::Result<_>>()?;
    Ok(started.into_iter().unzip())
}

/// Loads the site's certificate, or makes one at the first start.
fn identity(settings: &Settings) -> anyhow::Result<SiteIdentity> {
    let folder = settings.data_dir.join("identity");
    if folder.join(replicator::CERTIFICATE_FILE).exists() || folder.join(replicator::KEY_FILE).exists() {
        return Ok(SiteIdentity::load(&folder)?);
    }
    let identity = SiteIdentity::generate(settings.site.as_str())?;
    identity.save(&folder)?;
    Ok(identity)
}

/// A lock that a panic elsewhere does not poison: what it guards is always whole between calls.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rebuilds the catalogue from the volumes' headers.
///
/// # Errors
/// What [`Catalogue::rebuild`] says.
pub fn rebuild_catalogue(settings: &Settings) -> anyhow::Result<()> {
    let lock = DirectoryLock::acquire(&settings.data_dir)?;
    let (catalogue, notices) = Catalogue::rebuild(lock, settings.pools.clone())?;
    for notice in notices {
        tracing::warn!("{notice}");
    }
    tracing::info!(
        volumes = catalogue.volumes().len(),
        mirrors = catalogue.mirrors().len(),
        "the catalogue was rebuilt from the volumes' headers"
    );
    Ok(())
}

/// What the command line asked for, if it is not to serve.
///
/// # Errors
/// What the action says.
pub fn act(settings: &Settings) -> anyhow::Result<bool> {
    match settings.action {
        Action::Serve => Ok(false),
        Action::RebuildCatalogue => rebuild_catalogue(settings).map(|()| true),
        Action::PrintSettings => {
            use std::io::Write as _;
            std::io::stdout().write_all(settings.effective().as_bytes())?;
            Ok(true)
        }
    }
}
