//! Simulator, system-test harness and fuzz targets of Farshore (docs/TESTING.md).

pub mod fuzzing;
pub mod harness;
pub mod simulator;
