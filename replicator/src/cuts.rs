//! Cuts on a data stream: back to back, each read whole into one aligned buffer.
//!
//! A cut tells its own length in its first 256 bytes; how, the caller's measuring function knows.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use quinn::{ReadError, ReadExactError, RecvStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The length of a cut's header, from which the cut's total length is known.
pub const CUT_HEADER_BYTES: usize = 256;
/// Alignment of a cut's buffer, for direct writes to the redo journal.
const ALIGNMENT_BYTES: usize = 4096;

/// Where the caller wants incoming cuts to be put.
///
/// [`take`](Self::take) applies back-pressure: it waits while the budget is spent, and the peer's sending stops as
/// soon as the receive window is full. It must be able to serve any length up to the setting `cut_bytes_max`.
pub trait CutBuffers: Send + Sync + 'static {
    /// A buffer that is being filled.
    type Buffer: AsMut<[u8]> + Send + 'static;

    /// A buffer of exactly `length` bytes that starts at a multiple of 4096.
    fn take(&self, length: usize) -> impl Future<Output = Self::Buffer> + Send;

    /// The filled buffer, shared and immutable; its space returns when the last clone drops.
    fn freeze(buffer: Self::Buffer) -> Bytes;
}

/// What became of a data stream.
#[derive(Debug)]
pub(crate) enum IntakeError {
    /// The peer finished the stream between two cuts.
    Finished,
    /// The peer reset the stream or ended it inside a cut.
    Torn,
    /// The connection is gone.
    Connection,
    /// The bytes are no cut that we take.
    Refused(String),
}

impl From<ReadError> for IntakeError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Reset(_) | ReadError::ClosedStream => Self::Torn,
            ReadError::ConnectionLost(_) => Self::Connection,
            ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                Self::Refused(format!("data stream unusable: {error}"))
            }
        }
    }
}

impl From<ReadExactError> for IntakeError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::FinishedEarly(_) => Self::Torn,
            ReadExactError::ReadError(error) => error.into(),
        }
    }
}

/// How to measure cuts and where to put them; shared by all sessions of an endpoint.
#[derive(Clone)]
pub struct CutIntake(Arc<dyn ReadCut>);

impl CutIntake {
    /// `measure` gives the total length of a cut, header included, from its header.
    pub fn new<B: CutBuffers>(
        buffers: Arc<B>,
        measure: fn(&[u8; CUT_HEADER_BYTES]) -> Result<usize, String>,
    ) -> Self {
        Self(Arc::new(Reader { buffers, measure }))
    }

    /// The next cut, whole.
    pub(crate) async fn next(&self, stream: &mut RecvStream, bytes_max: usize) -> Result<Bytes, IntakeError> {
        self.0.read(stream, bytes_max).await
    }
}

impl std::fmt::Debug for CutIntake {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("CutIntake")
    }
}

type ReadFuture<'a> = Pin<Box<dyn Future<Output = Result<Bytes, IntakeError>> + Send + 'a>>;

/// Hides the buffer type, so that endpoints and sessions need not carry it.
trait ReadCut: Send + Sync {
    fn read<'a>(&'a self, stream: &'a mut RecvStream, bytes_max: usize) -> ReadFuture<'a>;
}

struct Reader<B> {
    buffers: Arc<B>,
    measure: fn(&[u8; CUT_HEADER_BYTES]) -> Result<usize, String>,
}

impl<B: CutBuffers> ReadCut for Reader<B> {
    fn read<'a>(&'a self, stream: &'a mut RecvStream, bytes_max: usize) -> ReadFuture<'a> {
        Box::pin(async move {
            let mut header = [0; CUT_HEADER_BYTES];
            match stream.read_exact(&mut header).await {
                Err(ReadExactError::FinishedEarly(0)) => return Err(IntakeError::Finished),
                read => read?,
            }
            let length = (self.measure)(&header).map_err(IntakeError::Refused)?;
            if !(CUT_HEADER_BYTES..=bytes_max).contains(&length) {
                let text = format!("a cut of {length} bytes is outside {CUT_HEADER_BYTES} to {bytes_max}");
                return Err(IntakeError::Refused(text));
            }
            let mut buffer = self.buffers.take(length).await;
            let space = buffer.as_mut();
            assert_eq!(space.len(), length, "CutBuffers::take gives the length asked for");
            assert_eq!(space.as_ptr().align_offset(ALIGNMENT_BYTES), 0, "CutBuffers::take aligns to 4096");
            let (head, rest) = space.split_at_mut(CUT_HEADER_BYTES);
            head.copy_from_slice(&header);
            stream.read_exact(rest).await?;
            Ok(B::freeze(buffer))
        })
    }
}

/// Cut buffers from the heap under one budget of bytes, counted until the last [`Bytes`] of a cut drops.
#[derive(Debug)]
pub struct BudgetedBuffers {
    budget: Arc<Semaphore>,
    bytes_max: u32,
}

impl BudgetedBuffers {
    /// Buffers for `bytes_max` bytes of cuts in all; at least one cut of the largest size.
    pub fn new(bytes_max: u32) -> Self {
        let permits = usize::try_from(bytes_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { budget: Arc::new(Semaphore::new(permits)), bytes_max }
    }

    /// Bytes that are still to be had.
    pub fn available_bytes(&self) -> usize {
        self.budget.available_permits()
    }
}

/// One buffer of [`BudgetedBuffers`].
#[derive(Debug)]
pub struct BudgetedBuffer {
    storage: Vec<u8>,
    start: usize,
    length: usize,
    _permit: OwnedSemaphorePermit,
}

impl BudgetedBuffer {
    fn range(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.length
    }
}

impl AsMut<[u8]> for BudgetedBuffer {
    fn as_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        self.storage.get_mut(range).unwrap_or_default()
    }
}

impl AsRef<[u8]> for BudgetedBuffer {
    fn as_ref(&self) -> &[u8] {
        self.storage.get(self.range()).unwrap_or_default()
    }
}

impl CutBuffers for BudgetedBuffers {
    type Buffer = BudgetedBuffer;

    async fn take(&self, length: usize) -> BudgetedBuffer {
        let permits = u32::try_from(length).unwrap_or(u32::MAX);
        assert!(permits <= self.bytes_max, "the budget of cut buffers is below the longest cut");
        let permit = Arc::clone(&self.budget).acquire_many_owned(permits).await;
        let Ok(_permit) = permit else { unreachable!("the budget's semaphore is never closed") };
        let storage = vec![0; length + ALIGNMENT_BYTES];
        let start = storage.as_ptr().align_offset(ALIGNMENT_BYTES);
        BudgetedBuffer { storage, start, length, _permit }
    }

    fn freeze(buffer: BudgetedBuffer) -> Bytes {
        Bytes::from_owner(buffer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn buffers_are_aligned_and_wait_for_the_budget() {
        let buffers = BudgetedBuffers::new(10_000);
        let mut one = buffers.take(6_000).await;
        assert_eq!(one.as_mut().as_ptr().align_offset(4096), 0);
        assert_eq!(one.as_mut().len(), 6_000);
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(20), buffers.take(6_000)).await;
        assert!(waiting.is_err());
        let frozen = BudgetedBuffers::freeze(one);
        let clone = frozen.clone();
        drop(frozen);
        assert_eq!(buffers.available_bytes(), 4_000);
        drop(clone);
        assert_eq!(buffers.available_bytes(), 10_000);
    }
}
