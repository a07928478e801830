//! Control frames: a little-endian u32 length, then as many bytes.
//!
//! The empty frame is reserved: each side sends it once, first, to say that the session stands.

use bytes::{Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};

/// A frame is read in pieces of this size, so that a length alone does not make us reserve its space.
const PIECE_BYTES: usize = 64 << 10;

/// Why no further frame comes.
#[derive(Debug)]
pub(crate) enum FrameError {
    /// The peer finished the stream between two frames.
    Finished,
    /// The peer reset the stream, or ended it inside a frame.
    Torn,
    /// The connection is gone.
    Connection,
    /// The peer announced a frame that we do not take.
    Length {
        /// What it announced.
        bytes: u32,
        /// What we take.
        bytes_max: u32,
    },
}

impl From<ReadExactError> for FrameError {
    fn from(error: ReadExactError) -> Self {
        match error {
            ReadExactError::ReadError(ReadError::ConnectionLost(_)) => Self::Connection,
            ReadExactError::FinishedEarly(_) | ReadExactError::ReadError(_) => Self::Torn,
        }
    }
}

/// The next frame; `bytes_max` 0 takes the empty frame only.
pub(crate) async fn read(stream: &mut RecvStream, bytes_max: u32) -> Result<Bytes, FrameError> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(ReadExactError::FinishedEarly(0)) => return Err(FrameError::Finished),
        read => read?,
    }
    let bytes = u32::from_le_bytes(length);
    if bytes > bytes_max || (bytes == 0) != (bytes_max == 0) {
        return Err(FrameError::Length { bytes, bytes_max });
    }
    let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
    let mut frame = BytesMut::new();
    while left > 0 {
        let start = frame.len();
        frame.resize(start + left.min(PIECE_BYTES), 0);
        let piece = frame.get_mut(start..).unwrap_or_default();
        left -= piece.len();
        stream.read_exact(piece).await?;
    }
    Ok(frame.freeze())
}

/// Sends the empty frame.
pub(crate) async fn write_ready(stream: &mut SendStream) -> Result<(), WriteError> {
    stream.write_all(&0_u32.to_le_bytes()).await
}

/// Hands a frame to QUIC; not cancel-safe.
pub(crate) async fn write(stream: &mut SendStream, frame: Bytes) -> Result<(), WriteError> {
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    let length = Bytes::copy_from_slice(&length.to_le_bytes());
    stream.write_all_chunks(&mut [length, frame]).await
}
