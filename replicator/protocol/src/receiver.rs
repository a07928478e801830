//! The chain of cuts that a target has received: which cut it may append next.

use block::{Position, Sequence, Tip};

/// The header fields of a cut that the chain depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// The cut's own tip.
    pub tip: Tip,
    /// The cut it follows.
    pub previous: Tip,
    /// The first sequence that it covers.
    pub first: Sequence,
    /// True if it commits itself and all staged cuts before it.
    pub commit: bool,
    /// The resync pass, 0 for none.
    pub pass: u64,
}

/// Why a cut may not be appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArrivalError {
    /// It is of another epoch or origin than the session.
    #[error("the cut at {0} is not of this session's epoch and origin")]
    WrongLineage(Position),
    /// It does not follow the last cut.
    #[error("the cut that ends at {found} follows {previous}, but the last one here ends at {expected}")]
    Gap {
        /// Its end.
        found: Position,
        /// What it claims to follow.
        previous: Position,
        /// What it would have to follow.
        expected: Position,
    },
    /// It covers sequences that overlap or leave a hole.
    #[error("the cut that ends at {0} does not begin where its predecessor ends")]
    Sequence(Position),
    /// It is staged without a pass, or of another pass than the one in progress.
    #[error("the cut that ends at {0} does not belong to the resync pass in progress")]
    Pass(Position),
}

/// The target's view of the chain.
#[derive(Clone, Copy, Debug)]
pub struct ReceiverChain {
    durable: Tip,
    staged: Option<(u64, Tip)>,
}

impl ReceiverChain {
    /// A chain that ends at `durable`, or at a staged cut after it.
    pub const fn new(durable: Tip, staged: Option<(u64, Tip)>) -> Self {
        Self { durable, staged }
    }

    /// The last committed cut.
    pub const fn durable(&self) -> Tip {
        self.durable
    }

    /// The pass in progress and its last staged cut.
    pub const fn staged(&self) -> Option<(u64, Tip)> {
        self.staged
    }

    /// The cut that the next one must follow.
    pub fn last(&self) -> Tip {
        self.staged.map_or(self.durable, |(_, tip)| tip)
    }

    /// True if `arrival` repeats the last cut: it is acknowledged again and not appended.
    pub fn is_repeat(&self, arrival: &Arrival) -> bool {
        arrival.tip == self.last() || arrival.tip == self.durable
    }

    /// Checks that `arrival`, sent in a session of `lineage` (epoch, origin), follows; then moves the chain over it.
    ///
    /// # Errors
    /// A cut of another lineage, a gap, a wrong first sequence or a wrong pass; the chain is unchanged.
    pub fn accept(&mut self, arrival: &Arrival, lineage: &Position) -> Result<(), ArrivalError> {
        let position = arrival.tip.position;
        if position.epoch != lineage.epoch || position.origin != lineage.origin {
            return Err(ArrivalError::WrongLineage(position));
        }
        let last = self.last();
        if arrival.previous != last {
            return Err(ArrivalError::Gap {
                found: position,
                previous: arrival.previous.position,
                expected: last.position,
            });
        }
        let expected =
            if last.position.same_lineage(&position) { last.position.sequence.next() } else { Sequence(1) };
        let backwards = position.order(&last.position).is_lt();
        if arrival.first != expected || position.sequence.next() < arrival.first || backwards {
            return Err(ArrivalError::Sequence(position));
        }
        let pass_fits = match self.staged {
            Some((pass, _)) => arrival.pass == pass,
            None => arrival.commit || arrival.pass != 0,
        };
        if !pass_fits {
            return Err(ArrivalError::Pass(position));
        }
        if arrival.commit {
            self.durable = arrival.tip;
            self.staged = None;
        } else {
            self.staged = Some((arrival.pass, arrival.tip));
        }
        Ok(())
    }

    /// Voids the staged cuts. Returns true if there were any.
    pub const fn abort_pass(&mut self) -> bool {
        self.staged.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use block::{ChainHash, Epoch, Incarnation};

    use super::*;

    fn tip(incarnation: u64, sequence: u64) -> Tip {
        let position = Position {
            epoch: Epoch(1),
            incarnation: Incarnation(incarnation),
            sequence: Sequence(sequence),
            ..Position::default()
        };
        Tip { position, chain: ChainHash([u8::try_from(sequence).unwrap(); 32]) }
    }

    fn cut(previous: Tip, end: Tip, commit: bool, pass: u64) -> Arrival {
        let same = previous.position.same_lineage(&end.position);
        let first = if same { previous.position.sequence.next() } else { Sequence(1) };
        Arrival { tip: end, previous, first, commit, pass }
    }

    #[test]
    fn cuts_follow_one_another_and_gaps_are_refused() {
        let lineage = tip(1, 0).position;
        let mut chain = ReceiverChain::new(tip(1, 0), None);
        chain.accept(&cut(tip(1, 0), tip(1, 4), true, 0), &lineage).unwrap();
        assert!(matches!(
            chain.accept(&cut(tip(1, 6), tip(1, 9), true, 0), &lineage),
            Err(ArrivalError::Gap { .. })
        ));
        assert!(chain.is_repeat(&cut(tip(1, 0), tip(1, 4), true, 0)));
        let heartbeat = Arrival { first: Sequence(5), ..cut(tip(1, 4), tip(1, 4), true, 0) };
        let heartbeat = Arrival { tip: Tip { chain: ChainHash([77; 32]), ..heartbeat.tip }, ..heartbeat };
        chain.accept(&heartbeat, &lineage).unwrap();
        assert_eq!(chain.durable(), heartbeat.tip);
    }

    #[test]
    fn a_pass_is_staged_until_its_commit_and_can_be_voided() {
        let lineage = tip(2, 0).position;
        let mut chain = ReceiverChain::new(tip(1, 50), None);
        assert!(matches!(
            chain.accept(&cut(tip(1, 50), tip(2, 3), false, 0), &lineage),
            Err(ArrivalError::Pass(_))
        ));
        chain.accept(&cut(tip(1, 50), tip(2, 3), false, 1), &lineage).unwrap();
        assert_eq!(chain.durable(), tip(1, 50));
        assert!(chain.accept(&cut(tip(2, 3), tip(2, 5), true, 0), &lineage).is_err(), "of another pass");
        assert!(chain.abort_pass());
        chain.accept(&cut(tip(1, 50), tip(2, 3), false, 4), &lineage).unwrap();
        chain.accept(&cut(tip(2, 3), tip(2, 8), true, 4), &lineage).unwrap();
        assert_eq!((chain.durable(), chain.staged()), (tip(2, 8), None));
    }

    #[test]
    fn an_older_incarnation_or_another_epoch_is_refused() {
        let lineage = tip(2, 0).position;
        let mut chain = ReceiverChain::new(tip(2, 5), None);
        assert!(matches!(
            chain.accept(&cut(tip(2, 5), tip(1, 9), true, 0), &lineage),
            Err(ArrivalError::Sequence(_))
        ));
        let mut other = tip(2, 9);
        other.position.epoch = Epoch(2);
        assert!(matches!(
            chain.accept(&cut(tip(2, 5), other, true, 0), &lineage),
            Err(ArrivalError::WrongLineage(_))
        ));
    }
}
