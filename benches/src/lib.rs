//! Benchmarks of Farshore.
