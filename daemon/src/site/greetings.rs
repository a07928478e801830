//! The handshakes on their way: bounded, and fair to who is not the cause of the crowd.
//!
//! A listener always accepts. When there are as many handshakes as there may be, or descriptors run short, the oldest one
//! of the origin with the most of them is dropped: an origin that opens connections and says nothing pushes out its own.

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

/// An origin with more than this part of all handshakes is a crowd.
const CROWD_SHARE: usize = 8;

#[derive(Debug, Default)]
struct Running {
    last: u64,
    /// By age.
    tasks: BTreeMap<u64, (Origin, JoinHandle<()>)>,
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
        let mut running = lock(&self.running);
        if running.tasks.len() >= self.greetings_max {
            drop(running.drop_one());
        }
        running.last += 1;
        let number = running.last;
        let place = Place { greetings: Arc::clone(self), number };
        drop(running);
        let (listed, start) = tokio::sync::oneshot::channel::<()>();
        // Without the lock: a runtime that is ending drops the task, and so its place, at once.
        let task = tokio::spawn(async move {
            let _place = place;
            if start.await.is_ok() {
                greeting.await;
            }
        });
        // It is in the list before it can leave it, unless it was dropped already.
        if !task.is_finished() {
            lock(&self.running).tasks.insert(number, (origin, task));
        }
        let _ = listed.send(());
    }

    /// Drops a handshake and waits until its connection is closed; false if there is none.
    pub(super) async fn drop_oldest(&self) -> bool {
        let dropped = lock(&self.running).drop_one();
        match dropped {
            Some(task) => {
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
    fn drop_one(&mut self) -> Option<JoinHandle<()>> {
        let mut counts = BTreeMap::<Origin, usize>::new();
        for (origin, _) in self.tasks.values() {
            *counts.entry(*origin).or_default() += 1;
        }
        // An origin with a real share loses its oldest; where none has, age alone decides, whatever the address.
        let crowd = self.tasks.len() / CROWD_SHARE;
        let crowded = counts.iter().filter(|(_, count)| **count > crowd).max_by_key(|(_, count)| **count);
        let crowded = crowded.map(|(origin, _)| *origin);
        let oldest =
            self.tasks.iter().find(|(_, (origin, _))| crowded.is_none_or(|crowded| *origin == crowded));
        let oldest = oldest.map(|(age, _)| *age);
        let (_, task) = oldest.and_then(|oldest| self.tasks.remove(&oldest))?;
        tracing::debug!(?crowded, "a handshake is dropped for a newer one");
        task.abort();
        Some(task)
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
