//! The daemon: settings, threads, wiring.

pub mod api;
pub mod audit;
pub mod catalogue;
pub mod fuzz;
pub mod group;
pub mod settings;
pub mod shard;
pub mod site;
