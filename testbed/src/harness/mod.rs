//! System-test harness: real daemons, real clients, a link that can be cut.
//!
//! A test runs inside [`World::run`], which gives it a directory, collects the logs of every daemon that it starts
//! and fails it on unexpected WARN, ERROR and panic lines. The harness knows the product by its surface only: flags,
//! verbs with `--json`, NBD, HTTP, signals and, where a test must look behind it, the files of a pool.

mod background;
mod binaries;
mod bystander;
mod disk;
mod fio;
mod footprint;
mod history;
mod images;
mod load;
mod log;
mod metrics;
pub mod nbd;
mod pair;
mod ports;
mod random;
mod relay;
mod site;
mod world;

pub use background::{Background, Finished, finish, run};
pub use binaries::binary;
pub use bystander::{Bystander, Latencies};
pub use disk::{Backing, LoopDisk};
pub use fio::{Fio, FioReport};
pub use footprint::Footprint;
pub use history::{History, Prefix, Resume};
pub use images::{directory_contains, files_equal, first_difference};
pub use load::Load;
pub use log::Log;
pub use metrics::Metrics;
pub use nbd::{Export, NbdClient, NbdError};
pub use pair::{MIRROR, Pair};
pub use ports::free_port;
pub use random::Random;
pub use relay::{Relay, RelaySettings};
pub use site::{Site, SiteOptions};
pub use world::World;
