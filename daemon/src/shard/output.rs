//! What a connection has to send: reply heads, and read data between them, gathered into few sends.

use bytes::{Bytes, BytesMut};

/// Replies that may wait for a client that does not read them: then no more is read from it.
const UNSENT_PIECES_MAX: usize = 2048;
const UNSENT_HEADS_MAX: usize = 64 << 10;
/// Pieces gathered into one send; the kernel takes 1024.
const PIECES_MAX: usize = 512;

/// Replies in order, and the send on its way.
#[derive(Default)]
pub(super) struct Output {
    /// Heads behind the last piece.
    heads: BytesMut,
    pieces: Vec<Bytes>,
    /// Bytes of each piece that count as memory of requests: those of data, not of heads.
    charges: Vec<usize>,
    /// The list of a send that ended, to be used again.
    spare: Vec<Bytes>,
    sending: bool,
    /// Charged bytes of the send on its way.
    sending_charge: usize,
}

impl Output {
    /// Where to write the next head.
    pub(super) const fn heads(&mut self) -> &mut BytesMut {
        &mut self.heads
    }

    /// Appends data behind the heads written so far.
    pub(super) fn push_data(&mut self, data: Bytes) {
        self.seal_heads();
        self.charges.push(data.len());
        self.pieces.push(data);
    }

    /// The client does not read its replies as fast as it asks.
    pub(super) fn is_clogged(&self) -> bool {
        self.pieces.len() > UNSENT_PIECES_MAX || self.heads.len() > UNSENT_HEADS_MAX
    }

    /// True if nothing is left to be sent.
    pub(super) fn is_flushed(&self) -> bool {
        !self.sending && self.pieces.is_empty() && self.heads.is_empty()
    }

    /// True while a send is on its way.
    pub(super) const fn is_sending(&self) -> bool {
        self.sending
    }

    /// The pieces of the next send, of at most `bytes_max` bytes, which is not 0; `None` if there are none, or a send is
    /// on its way.
    pub(super) fn begin_send(&mut self, bytes_max: usize) -> Option<Vec<Bytes>> {
        if self.sending {
            return None;
        }
        self.seal_heads();
        if self.pieces.is_empty() {
            return None;
        }
        let mut send = std::mem::take(&mut self.spare);
        let (count, room) = self.count_within(bytes_max);
        if count == self.pieces.len() {
            std::mem::swap(&mut send, &mut self.pieces);
            self.sending_charge = self.charges.drain(..).sum();
        } else {
            send.extend(self.pieces.drain(..count));
            self.sending_charge = self.charges.drain(..count).sum();
            self.begin_part(&mut send, room);
        }
        self.sending = true;
        Some(send)
    }

    /// Adds the beginning of the next piece, which is longer than `room`, to a send.
    fn begin_part(&mut self, send: &mut Vec<Bytes>, room: usize) {
        if let (Some(piece), Some(charge)) = (self.pieces.first_mut(), self.charges.first_mut())
            && room > 0
            && send.len() < PIECES_MAX
        {
            send.push(piece.split_to(room.min(piece.len())));
            let charged = room.min(*charge);
            *charge -= charged;
            self.sending_charge += charged;
        }
    }

    /// Claims the sending direction for bytes that are no replies; false if a send is on its way.
    pub(super) const fn begin_other(&mut self) -> bool {
        !std::mem::replace(&mut self.sending, true)
    }

    /// The send ended; returns its charged bytes. `sent` is its list of pieces.
    pub(super) fn end_send(&mut self, mut sent: Vec<Bytes>) -> usize {
        assert!(self.sending, "a send ends that began");
        sent.clear();
        self.spare = sent;
        self.sending = false;
        std::mem::take(&mut self.sending_charge)
    }

    /// Drops what is not on its way; returns its charged bytes.
    pub(super) fn abandon(&mut self) -> usize {
        self.heads.clear();
        self.pieces.clear();
        self.charges.drain(..).sum()
    }

    /// How many pieces fit, and how many bytes are left behind them.
    fn count_within(&self, bytes_max: usize) -> (usize, usize) {
        let mut room = bytes_max;
        let fitting = self.pieces.iter().take(PIECES_MAX).map_while(|piece| {
            room = room.checked_sub(piece.len())?;
            Some(())
        });
        let count = fitting.count();
        (count, room)
    }

    fn seal_heads(&mut self) {
        if !self.heads.is_empty() {
            self.charges.push(0);
            self.pieces.push(self.heads.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_leave_in_order_and_only_data_is_charged() {
        for most in [usize::MAX, 100, 1] {
            leave_in_order(most);
        }
    }

    fn leave_in_order(most: usize) {
        let mut output = Output::default();
        let mut expected = Vec::new();
        for number in 0..400_u16 {
            output.heads().extend_from_slice(&number.to_be_bytes());
            output.push_data(Bytes::from(vec![7; 3]));
            expected.extend_from_slice(&number.to_be_bytes());
            expected.extend_from_slice(&[7; 3]);
        }
        output.heads().extend_from_slice(b"last");
        expected.extend_from_slice(b"last");
        let (mut sent, mut charged) = (Vec::new(), 0);
        while let Some(pieces) = output.begin_send(most) {
            assert!(output.begin_send(most).is_none() && !output.is_flushed());
            assert!((1..=PIECES_MAX).contains(&pieces.len()) && pieces.concat().len() <= most);
            sent.extend(pieces.concat());
            charged += output.end_send(pieces);
        }
        assert_eq!((sent, charged), (expected, 1200));
        assert!(output.is_flushed());
    }

    #[test]
    fn what_is_abandoned_is_given_back_once() {
        let mut output = Output::default();
        output.push_data(Bytes::from(vec![0; 10]));
        let sending = output.begin_send(usize::MAX).unwrap();
        output.push_data(Bytes::from(vec![0; 5]));
        assert_eq!(output.abandon(), 5);
        assert_eq!(output.end_send(sending), 10);
        assert!(output.is_flushed());
    }
}
