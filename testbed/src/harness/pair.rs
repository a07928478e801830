//! Two sites that are partners, over a link that can be cut.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Relay, RelaySettings, Site, SiteOptions, World, first_difference};

/// The name of the mirror that [`Pair::mirror`] makes.
pub const MIRROR: &str = "mirror";

/// Sites `west` and `east`; each knows the other as a partner by that name.
pub struct Pair {
    /// The first primary.
    pub west: Site,
    /// The first secondary.
    pub east: Site,
    links: [Relay; 2],
}

impl Pair {
    /// Starts both and makes them partners.
    ///
    /// # Errors
    /// If that fails.
    pub fn start(world: &World) -> Result<Self> {
        Self::start_with(world, [Vec::new(), Vec::new()])
    }

    /// Starts both, each with these further flags, and makes them partners.
    ///
    /// # Errors
    /// If that fails.
    pub fn start_with(world: &World, flags: [Vec<String>; 2]) -> Result<Self> {
        Self::start_as(world, flags.map(|flags| SiteOptions { flags, ..SiteOptions::default() }))
    }

    /// Starts both with these options, but for the key-encryption key, which they share, and makes them partners.
    ///
    /// # Errors
    /// If that fails.
    pub fn start_as(world: &World, options: [SiteOptions; 2]) -> Result<Self> {
        let [west, east] = options.map(|options| SiteOptions { kek: Some(world.path("kek")), ..options });
        let west = world.site("west", west)?;
        let east = world.site("east", east)?;
        let links = [Relay::start(east.replication(), 1)?, Relay::start(west.replication(), 2)?];
        add_partner(world, &west, &east, &links[0])?;
        add_partner(world, &east, &west, &links[1])?;
        Ok(Self { west, east, links })
    }

    /// Starts both, with one mirrored volume `data` of `mebibytes` MiB, without an IOPS limit, caught up.
    ///
    /// # Errors
    /// If that fails.
    pub fn with_mirrored_volume(world: &World, mebibytes: u64) -> Result<Self> {
        let pair = Self::start(world)?;
        let create = format!("volume create data --size {mebibytes}MiB --iops unlimited");
        pair.west.run(&create)?;
        pair.mirror(&["data"])?;
        Ok(pair)
    }

    /// Mirrors volumes of `west` to `east` and waits until the copy is complete.
    ///
    /// # Errors
    /// If that fails.
    pub fn mirror(&self, volumes: &[&str]) -> Result<()> {
        let volumes = volumes.join(",");
        let create = format!("mirror create {MIRROR} --partner east --volumes {volumes}");
        self.west.run(&create)?;
        self.west.wait_caught_up()
    }

    /// Lets nothing pass between the sites.
    pub fn cut(&self) {
        self.links.iter().for_each(Relay::cut);
    }

    /// Lets everything pass again.
    pub fn heal(&self) {
        self.links.iter().for_each(Relay::heal);
    }

    /// Changes what the link does.
    pub fn set_link(&self, settings: RelaySettings) {
        self.links.iter().for_each(|link| link.set(settings));
    }

    /// Waits until `east` has everything that hosts wrote at `west`.
    ///
    /// # Errors
    /// If it does not come to that in time.
    pub fn wait_caught_up(&self) -> Result<()> {
        self.west.wait_caught_up()
    }

    /// Checks that both sites hold the same ciphertext. Hosts must be quiet and the mirror caught up; what is
    /// durable at the target may still be on its way from its redo log to the volume.
    ///
    /// # Errors
    /// If they do not come to be equal.
    pub fn check_equal(&self, volume: &str) -> Result<()> {
        let (west, east) = (self.west.data_file(volume)?, self.east.data_file(volume)?);
        let deadline = Instant::now() + Duration::from_secs(15);
        loop {
            let Some(offset) = first_difference(&west, &east)? else {
                return Ok(());
            };
            ensure!(
                Instant::now() < deadline,
                "volume {volume} differs between the sites, first at byte {offset}"
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
}

fn add_partner(world: &World, site: &Site, partner: &Site, link: &Relay) -> Result<()> {
    let certificate = world.text(&format!("{}.pem", partner.name()));
    std::fs::write(&certificate, partner.run("certificate show")?)?;
    let (name, address) = (partner.name(), link.address());
    site.run(&format!("partner add {name} --address {address} --certificate {certificate}"))?;
    Ok(())
}

impl Site {
    /// `mirror show --json` of the mirror that [`Pair::mirror`] makes.
    ///
    /// # Errors
    /// If there is none.
    pub fn mirror_view(&self) -> Result<Value> {
        self.json(&format!("mirror show {MIRROR}"))
    }

    /// Waits until the partner of this primary has everything that hosts wrote.
    ///
    /// # Errors
    /// If it does not come to that in time.
    pub fn wait_caught_up(&self) -> Result<()> {
        self.run(&format!("mirror wait {MIRROR} --for caught-up --timeout 90s"))?;
        Ok(())
    }

    /// Waits until the mirror's view is as wished.
    ///
    /// # Errors
    /// If it does not come to that: with the last view.
    pub fn wait_for_mirror(
        &self,
        wish: &str,
        timeout: Duration,
        accepts: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            let view = self.mirror_view()?;
            if accepts(&view) {
                return Ok(view);
            }
            ensure!(
                Instant::now() < deadline,
                "{}: mirror not {wish} after {timeout:?}: {view:#}",
                self.name()
            );
            thread::sleep(Duration::from_millis(100));
        }
    }
}
