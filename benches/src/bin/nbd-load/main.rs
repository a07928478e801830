//! Puts load on NBD servers, cheaply: one thread, one epoll, many requests a system call.
//!
//! It speaks the plain protocol of the Linux kernel's client (simple replies, no TLS), so that it costs less than the
//! server it measures. It does not check the data it reads: that is the task of the system tests.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "what it prints is its product")]

mod arguments;
mod connection;
mod driver;
mod handshake;
mod histogram;
mod meter;
mod offsets;
mod process;
mod report;
mod target;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use crate::arguments::{Arguments, Pattern};
use crate::driver::Driver;
use crate::report::Report;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("nbd-load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the load and prints what it measured; false if the server answered a request with an error.
fn run(arguments: &Arguments) -> Result<bool> {
    process::allow_many_files()?;
    let driver = Driver::connect(arguments)?;
    eprintln!("nbd-load: {} connections are open", driver.connections());
    if arguments.pattern == Pattern::Idle {
        driver.stay_idle(arguments.duration())?;
        return Ok(true);
    }
    let report = Report::new(arguments, &driver.run(arguments)?);
    if arguments.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(report.errors == 0)
}
