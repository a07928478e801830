//! A provider on a thread of its own, and the deadline that every call of it has.
//!
//! A provider may be a library that talks to a token over a network, and hang in a call that nothing can end. Then that
//! thread is lost until the call returns; callers are not. While a call is overdue, others are refused at once, so that a
//! start with many volumes does not wait for each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crypto::RootKind;

use crate::{KeyProvider, KeystoreError};

/// Calls that may wait for one another.
const CALLS_MAX: usize = 64;

type Job = Box<dyn FnOnce(&mut dyn KeyProvider) + Send>;

/// The way to a provider.
#[derive(Clone)]
pub struct ProviderHandle {
    kind: RootKind,
    name: Arc<str>,
    deadline: Duration,
    jobs: SyncSender<Job>,
    /// A call is overdue.
    overdue: Arc<AtomicBool>,
}

impl std::fmt::Debug for ProviderHandle {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "ProviderHandle({})", self.name)
    }
}

impl ProviderHandle {
    /// Gives the provider its thread, which ends with the last handle. Nothing is asked of it yet.
    ///
    /// # Errors
    /// [`KeystoreError::NoThread`].
    pub fn start(provider: impl KeyProvider + 'static, deadline: Duration) -> Result<Self, KeystoreError> {
        let (kind, name) = (provider.kind(), provider.name());
        let (jobs, received) = sync_channel::<Job>(CALLS_MAX);
        let overdue = Arc::new(AtomicBool::new(false));
        let answered = Arc::clone(&overdue);
        let mut provider = provider;
        let work = move || {
            while let Ok(job) = received.recv() {
                job(&mut provider);
                answered.store(false, Ordering::Release);
            }
        };
        std::thread::Builder::new()
            .name("key-provider".to_owned())
            .spawn(work)
            .map_err(|_| KeystoreError::NoThread { provider: name.clone() })?;
        Ok(Self { kind, name: name.into(), deadline, jobs, overdue })
    }

    /// What kind the provider is.
    pub const fn kind(&self) -> RootKind {
        self.kind
    }

    /// Its address, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Has the provider do something, and waits for it, at most until the deadline. Blocks: not for a thread that must not.
    ///
    /// # Errors
    /// What the call gives; [`KeystoreError::NoAnswer`] after the deadline, or at once while an earlier call is overdue.
    pub fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut dyn KeyProvider) -> Result<T, KeystoreError> + Send + 'static,
    ) -> Result<T, KeystoreError> {
        let no_answer =
            || KeystoreError::NoAnswer { provider: self.name.to_string(), seconds: self.deadline.as_secs() };
        let no_thread = || KeystoreError::NoThread { provider: self.name.to_string() };
        if self.overdue.load(Ordering::Acquire) {
            return Err(no_answer());
        }
        let (answer, answered) = sync_channel(1);
        // A caller that has gone does not mind.
        let job: Job = Box::new(move |provider| drop(answer.send(call(provider))));
        self.jobs.try_send(job).map_err(|refused| match refused {
            TrySendError::Full(_) => no_answer(),
            TrySendError::Disconnected(_) => no_thread(),
        })?;
        match answered.recv_timeout(self.deadline) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => {
                self.overdue.store(true, Ordering::Release);
                Err(no_answer())
            }
            // The call panicked, and its thread ended with it.
            Err(RecvTimeoutError::Disconnected) => Err(no_thread()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender};
    use std::time::Instant;

    use block::TenantId;
    use crypto::{DataKey, DomainKey, WrappedKey};

    use super::*;

    /// Answers a fingerprint when it is told to.
    struct Slow {
        release: Receiver<()>,
    }

    impl KeyProvider for Slow {
        fn kind(&self) -> RootKind {
            RootKind::Pkcs11
        }

        fn name(&self) -> String {
            "pkcs11:slow".to_owned()
        }

        fn wrap_domain(&mut self, _: &DomainKey, _: TenantId) -> Result<Vec<u8>, KeystoreError> {
            Ok(vec![1])
        }

        fn unwrap_domain(&mut self, _: &[u8], _: TenantId) -> Result<DomainKey, KeystoreError> {
            panic!("a bug in a provider")
        }

        fn unwrap_data(&mut self, _: &WrappedKey) -> Result<DataKey, KeystoreError> {
            Err(KeystoreError::Unsupported { provider: self.name(), what: "do it" })
        }

        fn fingerprint(&mut self) -> Result<String, KeystoreError> {
            self.release.recv().unwrap();
            Ok("done".to_owned())
        }

        fn make_root(&mut self) -> Result<(), KeystoreError> {
            Ok(())
        }
    }

    fn slow(deadline: Duration) -> (ProviderHandle, SyncSender<()>) {
        let (release, released) = sync_channel(8);
        (ProviderHandle::start(Slow { release: released }, deadline).unwrap(), release)
    }

    #[test]
    fn a_call_that_hangs_is_given_up_and_those_behind_it_do_not_wait() {
        let (handle, release) = slow(Duration::from_millis(50));
        let hung = handle.call(|provider| provider.fingerprint()).unwrap_err();
        assert!(matches!(hung, KeystoreError::NoAnswer { .. }), "{hung}");
        let asked = Instant::now();
        for _ in 0..1000 {
            assert!(handle.call(|provider| provider.fingerprint()).is_err());
        }
        assert!(asked.elapsed() < Duration::from_secs(10), "1000 deadlines are 50 s");
        release.send(()).unwrap();
        release.send(()).unwrap();
        // It answers again when the overdue call has ended.
        let patience = Instant::now();
        while handle.call(|provider| provider.make_root()).is_err() {
            assert!(patience.elapsed() < Duration::from_secs(30));
            std::thread::yield_now();
        }
        assert_eq!(handle.call(|provider| provider.fingerprint()).unwrap(), "done");
    }

    #[test]
    fn a_provider_that_panics_is_reported() {
        let (handle, _release) = slow(Duration::from_secs(30));
        let outcome = handle.call(|provider| provider.unwrap_domain(&[], TenantId::default()).map(drop));
        assert!(matches!(outcome.unwrap_err(), KeystoreError::NoThread { .. }));
        let outcome = handle.call(|provider| provider.make_root());
        assert!(matches!(outcome.unwrap_err(), KeystoreError::NoThread { .. }));
    }
}
