//! The handshakes on their way: bounded, and fair to who is not the cause of the crowd.
//!
//! A listener always accepts. When there are as many handshakes as there may be, or descriptors run short, the oldest one
//! of the origin with the most of them is dropped: an origin that opens connections and says nothing pushes out its own. If
//! no origin has more than an eighth of the places, the oldest of all is.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use tokio::task::JoinHandle;

use super::lock;

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Origin {
    /// An address; of an IPv6 address its /64 network, as one host may have all addresses of that.
    Network(IpAddr),
    /// A Unix socket.
    Local,
}

impl Origin {
    pub(super) fn of(address: IpAddr) -> Self {
        Self::Network(match address.to_canonical() {
            IpAddr::V4(address) => address.into(),
            IpAddr::V6(address) => (address.to_bits() >> 64 << 64).to_be_bytes().into(),
        })
    }
}

/// All handshakes on their way.
#[derive(Debug)]
pub(super) struct Greetings {
    greetings_max: usize,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    last: u64,
    /// By age.
    tasks: BTreeMap<u64, (Origin, Option<JoinHandle<()>>)>,
}

impl Greetings {
    pub(super) fn new(greetings_max: usize) -> Arc<Self> {
        assert!(greetings_max > 0, "at least one handshake");
        Arc::new(Self { greetings_max, running: Mutex::default() })
    }

    /// Runs a handshake, and drops another if there would be too many.
    pub(super) fn spawn(
        self: &Arc<Self>,
        origin: Origin,
        greeting: impl Future<Output = ()> + Send + 'static,
    ) {
        let (number, dropped) = {
            let mut running = lock(&self.running);
            let full = running.tasks.len() >= self.greetings_max;
            let dropped = if full { running.take_one(self.greetings_max / 8) } else { None };
            running.last += 1;
            let number = running.last;
            running.tasks.insert(number, (origin, None));
            (number, dropped)
        };
        // Without the lock: a runtime that shuts down drops the handshake within these calls, and that takes the lock.
        if let Some(dropped) = dropped {
            dropped.abort();
        }
        let place = Place { greetings: Arc::clone(self), number };
        let task = tokio::spawn(async move {
            let _place = place;
            greeting.await;
        });
        match lock(&self.running).tasks.get_mut(&number) {
            Some((_, handle)) => *handle = Some(task),
            // It has ended, or lost its place before it could be told.
            None => task.abort(),
        }
    }

    /// Drops a handshake and waits until its connection is closed; false if there is none.
    pub(super) async fn drop_oldest(&self) -> bool {
        let dropped = lock(&self.running).take_one(self.greetings_max / 8);
        match dropped {
            Some(task) => {
                task.abort();
                // It ends as cancelled, or in order if it was just about to.
                let _ = task.await;
                true
            }
            None => false,
        }
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        lock(&self.running).tasks.len()
    }
}

impl Running {
    /// Takes a handshake from the list, to be ended. An origin with at most `share` of them is no crowd.
    fn take_one(&mut self, share: usize) -> Option<JoinHandle<()>> {
        let mut counts = BTreeMap::<Origin, usize>::new();
        for (origin, _) in self.tasks.values() {
            *counts.entry(*origin).or_default() += 1;
        }
        let most = counts.values().max().copied().filter(|most| *most > share);
        let is_crowded = |origin: &Origin| most.is_none_or(|most| counts.get(origin) == Some(&most));
        // By age, so of origins with equally many the one with the oldest handshake.
        let oldest = self.tasks.iter().find(|(_, (origin, _))| is_crowded(origin)).map(|(age, _)| *age)?;
        let (origin, task) = self.tasks.remove(&oldest)?;
        tracing::debug!(?origin, "a handshake is dropped for a newer one");
        task
    }
}

/// A handshake's place in the list; left when it ends, also by being dropped.
struct Place {
    greetings: Arc<Greetings>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.greetings.running).tasks.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;

    use super::*;

    fn origin(text: &str) -> Origin {
        Origin::of(text.parse().unwrap())
    }

    /// A handshake that never ends, and what tells when it was dropped.
    fn idle() -> (impl Future<Output = ()> + Send, oneshot::Receiver<()>) {
        let (alive, dropped) = oneshot::channel::<()>();
        let greeting = async move {
            let _alive = alive;
            pending::<()>().await;
        };
        (greeting, dropped)
    }

    #[tokio::test]
    async fn a_crowd_of_idle_connections_pushes_out_its_own_oldest_and_nobody_elses() {
        let greetings = Greetings::new(4);
        let mut dropped = Vec::new();
        for from in ["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.2", "10.0.0.2", "10.0.0.2"] {
            let (greeting, gone) = idle();
            greetings.spawn(origin(from), greeting);
            dropped.push(gone);
        }
        assert_eq!(greetings.count(), 4);
        for gone in [1, 2] {
            let _ = (&mut dropped[gone]).await;
        }
        for here in [0, 3, 4, 5] {
            assert!(matches!(dropped[here].try_recv(), Err(oneshot::error::TryRecvError::Empty)), "{here}");
        }
    }

    /// Which of these handshakes, in their order, was dropped.
    async fn dropped(greetings_max: usize, from: &[&str], place: usize) {
        let greetings = Greetings::new(greetings_max);
        let mut gone = Vec::new();
        for from in from {
            let (greeting, dropped) = idle();
            greetings.spawn(origin(from), greeting);
            gone.push(dropped);
        }
        let _ = (&mut gone[place]).await;
        for (here, gone) in gone.iter_mut().enumerate().filter(|(here, _)| *here != place) {
            assert!(matches!(gone.try_recv(), Err(oneshot::error::TryRecvError::Empty)), "{here}");
        }
    }

    #[tokio::test]
    async fn of_equally_crowded_origins_the_oldest_handshake_is_dropped() {
        dropped(4, &["10.0.0.2", "10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.3"], 0).await;
        dropped(4, &["10.0.0.1", "10.0.0.2", "10.0.0.2", "10.0.0.1", "10.0.0.3"], 0).await;
    }

    #[tokio::test]
    async fn without_a_crowd_the_oldest_of_all_is_dropped() {
        let mut from: Vec<_> = (1..=14).map(|host| format!("10.0.0.{host}")).collect();
        from.extend(["10.0.1.1", "10.0.1.1", "10.0.1.2"].map(str::to_owned));
        let from: Vec<_> = from.iter().map(String::as_str).collect();
        dropped(16, &from, 0).await;
    }

    #[tokio::test]
    async fn a_handshake_that_ends_frees_its_place() {
        let greetings = Greetings::new(1);
        let (done, ended) = oneshot::channel();
        greetings.spawn(Origin::Local, async move {
            let _ = done.send(());
        });
        ended.await.unwrap();
        while greetings.count() > 0 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn the_oldest_is_gone_when_its_drop_was_waited_for() {
        let greetings = Greetings::new(4);
        assert!(!greetings.drop_oldest().await);
        let ((first, mut first_gone), (second, mut second_gone)) = (idle(), idle());
        greetings.spawn(Origin::Local, first);
        greetings.spawn(Origin::Local, second);
        assert!(greetings.drop_oldest().await);
        assert!(matches!(first_gone.try_recv(), Err(oneshot::error::TryRecvError::Closed)));
        assert!(matches!(second_gone.try_recv(), Err(oneshot::error::TryRecvError::Empty)));
        assert_eq!(greetings.count(), 1);
    }

    #[test]
    fn an_origin_is_an_ipv4_address_or_an_ipv6_network() {
        assert_eq!(origin("::ffff:10.0.0.1"), origin("10.0.0.1"));
        assert_eq!(origin("2001:db8::1"), origin("2001:db8::2"));
        assert_ne!(origin("2001:db8::1"), origin("2001:db8:0:1::1"));
        assert_ne!(origin("10.0.0.1"), origin("10.0.0.2"));
    }
}
