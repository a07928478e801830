//! The chain of cuts that a primary has sent: what it may continue from, and what an acknowledgement releases.

use std::collections::VecDeque;

use block::{Sequence, Tip};

/// A cut that was sent and is not acknowledged as committed.
#[derive(Clone, Copy, Debug)]
struct SentCut {
    tip: Tip,
    commit: bool,
}

/// What an acknowledgement means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AckOutcome {
    /// Records up to here are on the target's stable media: the ring may release them.
    pub stored_through: Sequence,
    /// The newest cut that is committed by it; `None` if it only acknowledges staged cuts.
    pub committed: Option<Tip>,
}

/// The primary's memory of the chain, from the last committed acknowledgement on.
#[derive(Clone, Debug)]
pub struct SenderChain {
    committed: Tip,
    /// The last acknowledged cut, staged or committed.
    stored: Tip,
    sent: VecDeque<SentCut>,
}

impl SenderChain {
    /// A chain that continues from what the target holds.
    pub const fn new(committed: Tip) -> Self {
        Self { committed, stored: committed, sent: VecDeque::new() }
    }

    /// A chain that goes on after a restart: what the target had acknowledged, and the cuts that were sent after it.
    pub fn continued(committed: Tip, sent: Vec<Tip>) -> Self {
        let sent = sent.into_iter().map(|tip| SentCut { tip, commit: true }).collect();
        Self { committed, stored: committed, sent }
    }

    /// The cuts that were sent after the last acknowledged one; `None` if some cut was only staged.
    pub fn sent_commits(&self) -> Option<Vec<Tip>> {
        let all = self.stored == self.committed && self.sent.iter().all(|cut| cut.commit);
        all.then(|| self.sent.iter().map(|cut| cut.tip).collect())
    }

    /// The last cut that the target acknowledged as committed.
    pub const fn committed(&self) -> Tip {
        self.committed
    }

    /// The last cut that the target acknowledged, committed or staged.
    pub const fn stored(&self) -> Tip {
        self.stored
    }

    /// The cut that the next one follows.
    pub fn last(&self) -> Tip {
        self.sent.back().map_or(self.stored, |cut| cut.tip)
    }

    /// Cuts sent and not yet acknowledged.
    pub fn outstanding(&self) -> usize {
        self.sent.len()
    }

    /// Notes a cut that follows [`SenderChain::last`].
    pub fn sent(&mut self, tip: Tip, commit: bool) {
        self.sent.push_back(SentCut { tip, commit });
    }

    /// The outcome of an acknowledgement, or `None` if it names no cut that was sent (a defect or a wrong peer).
    /// Acknowledgements of cuts acknowledged before are harmless repeats.
    pub fn acknowledged(&mut self, tip: &Tip, staged: bool) -> Option<AckOutcome> {
        if *tip == self.stored {
            let committed = (!staged && *tip == self.committed).then_some(*tip);
            return Some(AckOutcome { stored_through: tip.position.sequence, committed });
        }
        let index = self.sent.iter().position(|cut| cut.tip == *tip)?;
        let cut = *self.sent.get(index)?;
        if cut.commit == staged {
            return None;
        }
        self.sent.drain(..=index);
        self.stored = *tip;
        if cut.commit {
            self.committed = *tip;
        }
        Some(AckOutcome { stored_through: tip.position.sequence, committed: cut.commit.then_some(*tip) })
    }

    /// Continues a session after a reconnect: the target's committed tip, and its staged one if the pass goes on.
    /// Returns false if the target names a cut that this side did not send: the chain must be started anew.
    pub fn resume(&mut self, durable: &Tip, staged: Option<&Tip>) -> bool {
        let known = |tip: &Tip| *tip == self.stored || self.sent.iter().any(|cut| cut.tip == *tip);
        let durable_known =
            *durable == self.committed || self.sent.iter().any(|cut| cut.commit && cut.tip == *durable);
        if !durable_known || staged.is_some_and(|tip| !known(tip)) {
            return false;
        }
        self.committed = *durable;
        self.stored = staged.copied().unwrap_or(*durable);
        self.sent.clear();
        true
    }
}

#[cfg(test)]
mod tests {
    use block::{ChainHash, Position};

    use super::*;

    fn tip(sequence: u64) -> Tip {
        let position = Position { sequence: Sequence(sequence), ..Position::default() };
        Tip { position, chain: ChainHash([u8::try_from(sequence).unwrap(); 32]) }
    }

    #[test]
    fn an_ack_releases_everything_up_to_its_cut() {
        let mut chain = SenderChain::new(tip(0));
        for sequence in [5, 9, 12] {
            chain.sent(tip(sequence), true);
        }
        assert_eq!(chain.last(), tip(12));
        let outcome = chain.acknowledged(&tip(9), false).unwrap();
        assert_eq!(outcome, AckOutcome { stored_through: Sequence(9), committed: Some(tip(9)) });
        assert_eq!(chain.outstanding(), 1);
        assert!(chain.acknowledged(&tip(5), false).is_none(), "older than what was released");
        assert!(chain.acknowledged(&tip(9), false).is_some(), "a repeat is harmless");
    }

    #[test]
    fn a_staged_ack_commits_nothing() {
        let mut chain = SenderChain::new(tip(0));
        chain.sent(tip(5), false);
        chain.sent(tip(9), true);
        assert_eq!(chain.acknowledged(&tip(5), true).unwrap().committed, None);
        assert_eq!(chain.committed(), tip(0));
        assert!(chain.acknowledged(&tip(9), true).is_none(), "a commit cut cannot be acknowledged as staged");
        assert_eq!(chain.acknowledged(&tip(9), false).unwrap().committed, Some(tip(9)));
    }

    #[test]
    fn a_session_resumes_only_from_cuts_that_were_sent() {
        let mut chain = SenderChain::new(tip(0));
        chain.sent(tip(5), true);
        chain.sent(tip(7), false);
        assert!(!chain.clone().resume(&tip(6), None));
        assert!(!chain.clone().resume(&tip(7), None), "a staged cut is no durable tip");
        assert!(!chain.clone().resume(&tip(5), Some(&tip(8))));
        let mut continued = chain.clone();
        assert!(continued.resume(&tip(5), Some(&tip(7))));
        assert_eq!(continued.last(), tip(7));
        assert!(chain.resume(&tip(5), None));
        assert_eq!(chain.last(), tip(5));
    }
}
