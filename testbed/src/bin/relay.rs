//! A link that can be cut, slow or lossy, for the demonstration and benches: relays UDP on each `--route LISTEN=TARGET`.
//!
//! It looks at the file `--control` ten times a second: `cut` cuts all routes, anything else lets packets pass. It
//! ends with its parent's pipe: when standard input closes.
#![expect(clippy::print_stdout, reason = "it says when it is ready")]

use std::io::Read;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use testbed::harness::{Relay, RelaySettings};

#[derive(Parser)]
struct Arguments {
    /// From where to where, as in 127.0.0.1:7001=127.0.0.1:10820.
    #[arg(long, required = true, value_parser = route)]
    route: Vec<(SocketAddr, SocketAddr)>,
    /// The file that says whether the link is cut.
    #[arg(long)]
    control: PathBuf,
    /// Added to the way in each direction, in milliseconds.
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
    /// Of 1,000 packets this many are lost.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=1000))]
    drop_permille: u32,
}

fn route(text: &str) -> Result<(SocketAddr, SocketAddr)> {
    let (listen, target) = text.split_once('=').context("a route is LISTEN=TARGET")?;
    Ok((listen.parse()?, target.parse()?))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut relays = Vec::new();
    for (listen, target) in &arguments.route {
        let relay =
            Relay::listen(*listen, *target, 1).with_context(|| format!("cannot listen on {listen}"))?;
        relays.push(relay);
    }
    println!("READY");
    let ended = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ended);
    thread::spawn(move || {
        drop(std::io::stdin().lock().read_to_end(&mut Vec::new()));
        end.store(true, Ordering::Relaxed);
    });
    while !ended.load(Ordering::Relaxed) {
        let wish = std::fs::read_to_string(&arguments.control).unwrap_or_default();
        for relay in &relays {
            relay.set(RelaySettings {
                cut: wish.trim() == "cut",
                drop_permille: arguments.drop_permille,
                delay: Duration::from_millis(arguments.delay_ms),
                ..RelaySettings::default()
            });
        }
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
