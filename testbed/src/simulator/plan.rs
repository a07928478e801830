//! What one run does: sizes, budgets, and which operations and faults it may use (swarm testing).

use std::time::Duration;

use daemon::group::{MirrorPolicy, Retention};
use journal::{PAGE_BYTES, RedoConfig, RingBudget};

use super::pressure;
use crate::harness::Random;

const KIB: u64 = 1024;

/// An operation or fault of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    KillPrimary,
    KillSecondary,
    PowerPrimary,
    PowerSecondary,
    CleanStop,
    CutLink,
    SlowLink,
    FlapLink,
    SlowDisk,
    JumpClock,
    StopMirror,
    StartMirror,
    Failover,
    FailoverDead,
    Rewind,
    Drill,
    Switch,
    Orphans,
    HomeErrors,
    ReadErrors,
    HomeSyncErrors,
    RedoErrors,
    IntentErrors,
    StateErrors,
    DamageCuts,
    SpillErrors,
    SlowSpill,
    StopInOutage,
    SetPolicy,
    Verify,
    Grow,
}

impl Fault {
    const ALL: &[Self] = &[
        Self::KillPrimary,
        Self::KillSecondary,
        Self::PowerPrimary,
        Self::PowerSecondary,
        Self::CleanStop,
        Self::CutLink,
        Self::SlowLink,
        Self::FlapLink,
        Self::SlowDisk,
        Self::JumpClock,
        Self::StopMirror,
        Self::StartMirror,
        Self::Failover,
        Self::FailoverDead,
        Self::Rewind,
        Self::Drill,
        Self::Switch,
        Self::Orphans,
        Self::HomeErrors,
        Self::ReadErrors,
        Self::HomeSyncErrors,
        Self::RedoErrors,
        Self::IntentErrors,
        Self::StateErrors,
        Self::DamageCuts,
        Self::SpillErrors,
        Self::SlowSpill,
        Self::StopInOutage,
        Self::SetPolicy,
        Self::Verify,
        Self::Grow,
    ];
}

/// The shape of a run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Blocks that each volume may come to have,
    pub(super) volume_blocks: Vec<u64>,
    /// and has at first.
    pub(super) first_blocks: Vec<u64>,
    pub(super) region_bytes: u64,
    pub(super) intent_budget_regions: u64,
    pub(super) ring: RingBudget,
    /// Bytes of the spill file; 0 is none.
    pub(super) spill_bytes: u64,
    pub(super) cut_bytes: u64,
    pub(super) cut_interval: Duration,
    pub(super) start_grace: Duration,
    pub(super) redo: RedoConfig,
    pub(super) retention: Retention,
    /// Blocks of the longest write.
    pub(super) write_blocks_max: u64,
    pub(super) faults: Vec<Fault>,
    /// The mean time between faults.
    pub(super) fault_interval: u64,
    /// The mean time between host commands while there is load.
    pub(super) host_interval: u64,
    /// When the load and the faults end.
    pub(super) load_end: u64,
    pub(super) skews: [u64; 2],
    pub(super) iops: Option<u32>,
    /// Blocks that hosts write often.
    pub(super) hot_blocks: u64,
    /// What operators want at the start, by site.
    pub(super) policies: [MirrorPolicy; 2],
    /// Corruption is planted when all is calm.
    pub(super) plant: bool,
}

pub(super) const MILLISECOND: u64 = 1_000_000;
pub(super) const SECOND: u64 = 1000 * MILLISECOND;

impl Plan {
    pub(super) fn new(random: &mut Random) -> Self {
        let volumes = 1 + random.below(3);
        let mut volume_blocks: Vec<u64> = (0..volumes).map(|_| [64, 96, 130, 256][random.index(4)]).collect();
        if random.chance(80) {
            volume_blocks[0] = 600;
        }
        let total_bytes = volume_blocks.iter().sum::<u64>() * PAGE_BYTES;
        let region_bytes = PAGE_BYTES * [4, 8, 16][random.index(3)];
        let ring_bytes = KIB * [64, 128, 256, 1024][random.index(4)];
        let write_blocks_max = [1, 4, 16, 40][random.index(4)];
        let cut_bytes = KIB * [16, 64, 256][random.index(3)];
        // A cut holds cut_bytes, or one record of any length, and its head.
        let segment = (cut_bytes.max(write_blocks_max * PAGE_BYTES).max(256 * KIB).min(ring_bytes)
            + cut_bytes
            + 64 * KIB)
            .next_multiple_of(PAGE_BYTES);
        let room = total_bytes * [2, 3][random.index(2)] + 3 * segment;
        let files = u32::try_from(room.div_ceil(segment) + 2).unwrap_or(64);
        let chosen = 1 + random.below(8);
        let mut faults: Vec<Fault> =
            (0..chosen).map(|_| Fault::ALL[random.index(Fault::ALL.len())]).collect();
        if random.chance(250) {
            // A switch meets every other fault only if it is ordered often enough.
            faults.extend([Fault::Switch, Fault::Switch]);
        }
        // Growth meets every other fault only if it is ordered often enough, as the mirror must be at rest for it.
        if random.chance(250) {
            faults.extend([Fault::Grow; 3]);
        }
        if random.chance(100) {
            faults.clear();
        }
        let retention = Retention {
            window: Duration::from_millis([0, 0, 100, 1500, 6000][random.index(5)]),
            failover_within: Duration::from_millis([1, 1000, 100_000][random.index(3)]),
        };
        // A window is there to go back in.
        if retention.window > Duration::ZERO && !faults.is_empty() && random.chance(600) {
            faults.push(Fault::Rewind);
        }
        if !faults.is_empty() && random.chance(400) {
            faults.push(Fault::Drill);
        }
        let first_blocks = if faults.contains(&Fault::Grow) {
            volume_blocks.iter().map(|blocks| blocks / [1, 2, 4][random.index(3)]).collect()
        } else {
            volume_blocks.clone()
        };
        Self {
            volume_blocks,
            first_blocks,
            region_bytes,
            intent_budget_regions: [0, 2, 1000][random.index(3)],
            ring: RingBudget { bytes_max: ring_bytes, records_max: [16, 64, 1000][random.index(3)] },
            spill_bytes: KIB * [0, 64, 512, 8192][random.index(4)],
            cut_bytes,
            cut_interval: Duration::from_millis([1, 10, 50][random.index(3)]),
            start_grace: Duration::from_millis([100, 2000, 30_000][random.index(3)]),
            redo: RedoConfig::new(files, segment).unwrap_or_else(|error| unreachable!("{error}")),
            retention,
            write_blocks_max,
            faults,
            fault_interval: MILLISECOND * [50, 300, 1000, 3000][random.index(4)],
            host_interval: MILLISECOND / 10 * [3, 10, 40, 100][random.index(4)],
            load_end: SECOND * (1 + random.below(8)),
            skews: [random.below(1000 * SECOND), random.below(1000 * SECOND)],
            iops: random.chance(150).then_some(3000),
            hot_blocks: [8, 32, 1000][random.index(3)],
            policies: [pressure::draw(random), pressure::draw(random)],
            plant: random.chance(500),
        }
    }
}
