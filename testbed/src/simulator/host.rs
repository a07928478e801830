//! Hosts: commands on the volumes of every site that presents them.

use block::{ByteRange, HostCommand, VolumeIndex};
use daemon::group::Group;
use engine::CommandId;

use super::plan::SECOND;
use super::site::Outstanding;
use super::world::{Event, World};

/// Commands in flight at a site; more wait for answers first.
const OUTSTANDING_MAX: usize = 24;
/// With healthy disks a command is answered within this time, whatever the partner does.
pub(super) const ANSWER_MAX: u64 = 15 * SECOND;

/// The payload of a command: each 8 bytes depend on the command and on where they stand.
pub(super) fn fill(command: u64, offset: u64, out: &mut [u8]) {
    let word = |at: u64| {
        let mixed = ((command << 32) ^ (at / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 0x0100_0000_0000_0001;
        mixed.to_le_bytes()
    };
    if offset.is_multiple_of(8) && out.len().is_multiple_of(8) {
        for (index, chunk) in (0_u64..).zip(out.chunks_exact_mut(8)) {
            chunk.copy_from_slice(&word(offset + index * 8));
        }
        return;
    }
    for (at, byte) in (offset..).zip(out) {
        *byte = word(at)[super::size(at % 8)];
    }
}

impl World {
    /// Issues some commands and asks to be called again.
    pub(super) fn host_turn(&mut self) {
        if self.hosts_rest() {
            return;
        }
        let wait = self.random.below(2 * self.plan.host_interval) + 1;
        // Now and then all hosts are silent for a while.
        let pause = if self.random.chance(5) { self.random.below(2 * SECOND) } else { 0 };
        self.after(wait + pause, Event::Host);
        for site in 0..2 {
            if self.sites[site].drill.is_some() {
                self.drill_turn(site);
            }
            if !self.sites[site].presented || !self.sites[site].is_up() || self.is_stopping(site) {
                continue;
            }
            for _ in 0..=self.random.below(3) {
                if self.sites[site].commands.len() < OUTSTANDING_MAX {
                    self.host_command(site);
                }
            }
        }
    }

    fn host_command(&mut self, site: usize) {
        let volume = self.random.index(self.plan.volume_blocks.len());
        let blocks = self.sites[site].sizes[volume];
        let bytes = blocks * 4096;
        let command = match self.random.below(100) {
            0..=54 => HostCommand::Write { range: self.whole_units(blocks), fua: self.random.chance(50) },
            55..=69 => HostCommand::Write { range: self.part(bytes), fua: self.random.chance(50) },
            70..=77 => HostCommand::WriteZeroes {
                range: self.whole_units(blocks),
                fua: false,
                no_hole: true,
                fast: false,
            },
            78..=80 => {
                HostCommand::WriteZeroes { range: self.part(bytes), fua: false, no_hole: true, fast: false }
            }
            81 if bytes >= (1 << 20) + 8192 => {
                let range = ByteRange::new(self.random.below(2) * 8192, 1 << 20).unwrap_or_default();
                HostCommand::Trim { range, fua: self.random.chance(300) }
            }
            81..=83 => HostCommand::Trim { range: self.part(bytes), fua: false },
            84..=91 => HostCommand::Flush,
            _ => HostCommand::Read { range: self.part(bytes) },
        };
        self.commands += 1;
        let id = CommandId(self.commands);
        let volume = VolumeIndex(u16::try_from(volume).unwrap_or(0));
        self.note(id.0);
        self.sites[site].commands.insert(
            (volume, id),
            Outstanding { command, submitted: self.now, writes: Vec::new(), home_ended: None },
        );
        if let Some(group) = self.enter(site) {
            Group::submit(group, volume, id, command);
        }
        self.pump(site);
    }

    fn whole_units(&mut self, blocks: u64) -> ByteRange {
        let hot = blocks.min(self.plan.hot_blocks);
        let limit = if self.random.chance(700) { hot } else { blocks };
        let first = self.random.below(limit);
        let count = 1 + self.random.below(self.plan.write_blocks_max.min(blocks - first));
        ByteRange::new(first * 4096, count * 4096).unwrap_or_default()
    }

    fn part(&mut self, bytes: u64) -> ByteRange {
        let offset = if self.random.chance(500) {
            self.random.below(bytes / 512) * 512
        } else {
            self.random.below(bytes)
        };
        let length = 1 + self.random.below((bytes - offset).min(3 * 4096));
        ByteRange::new(offset, length).unwrap_or_default()
    }
}
