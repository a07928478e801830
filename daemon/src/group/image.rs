//! Reads of the target's committed image, home overlaid by the redo that is not at home yet, and of a drill's copy.
//!
//! Guarantees: a read gives every byte as of a committed tip no older than the one when it began; redo that a read
//! needs is not released before the read has ended.

use std::collections::BTreeMap;

use block::{ByteRange, DATA_UNIT_BYTES, HostError, VolumeIndex};
use bytes::{Bytes, BytesMut};
use engine::overlay::RedoPlace;
use journal::Placement;

use super::drill::DrillIo;
use super::effect::{Effect, IoFailure, IoRequest, Outbox, Purpose};
use super::secondary::Secondary;

/// Whom a read is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// A hash request.
    Hash(u64),
    /// A request of a verify.
    Verify(u64),
    /// A request to a drill's copy.
    Drill(DrillIo),
    /// What a drill keeps of blocks that a later cut changes.
    Preserve { volume: VolumeIndex, range: ByteRange },
}

/// Where a piece of an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Home,
    Zeros,
    Redo(RedoPlace),
    Scratch,
}

/// A piece of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImagePiece {
    pub(super) range: ByteRange,
    pub(super) source: Source,
}

/// A read under way.
#[derive(Debug)]
struct ImageRead {
    reader: Reader,
    range: ByteRange,
    pieces: Vec<ImagePiece>,
    /// Home's bytes, then those of each piece that redo or scratch holds, with what was read around it.
    parts: BTreeMap<u32, Bytes>,
    outstanding: usize,
    failure: Option<IoFailure>,
    /// The oldest segment that it reads.
    pin: Option<u64>,
}

/// All reads under way, and the release that waits for them.
#[derive(Debug, Default)]
pub(super) struct ImageReads {
    last: u64,
    reads: BTreeMap<u64, ImageRead>,
    pins: BTreeMap<u64, usize>,
    held: Option<Placement>,
}

impl ImageReads {
    /// A release of redo waits for a read.
    pub(super) const fn holds_release(&self) -> bool {
        self.held.is_some()
    }

    fn pin(&mut self, segment: Option<u64>) {
        if let Some(segment) = segment {
            *self.pins.entry(segment).or_default() += 1;
        }
    }

    fn unpin(&mut self, segment: Option<u64>) {
        let Some(segment) = segment else { return };
        let count = self.pins.entry(segment).or_default();
        *count = count.saturating_sub(1);
        if *count == 0 {
            self.pins.remove(&segment);
        }
    }
}

/// The part of home in a read; piece n of redo is part n + 1.
const HOME_PART: u32 = 0;

impl Secondary {
    /// Begins a read of the image at the durable tip; `range` is whole data units.
    pub(super) fn read_image(
        &mut self,
        reader: Reader,
        volume: VolumeIndex,
        range: ByteRange,
        out: &mut Outbox,
    ) {
        let pieces = self.overlay.pieces(volume, range).into_iter().map(ImagePiece::from).collect();
        self.read_pieces(reader, volume, range, pieces, out);
    }

    /// Begins a read of what the pieces say; they make up the range.
    pub(super) fn read_pieces(
        &mut self,
        reader: Reader,
        volume: VolumeIndex,
        range: ByteRange,
        pieces: Vec<ImagePiece>,
        out: &mut Outbox,
    ) {
        self.images.last += 1;
        let read = self.images.last;
        let mut outstanding = 0;
        let mut pin = None;
        if pieces.iter().any(|piece| piece.source == Source::Home) {
            outstanding += 1;
            let part = HOME_PART;
            out.io(Purpose::ImageRead { read, part }, IoRequest::HomeRead { volume, range });
        }
        for (part, piece) in (1_u32..).zip(&pieces) {
            // Payloads stand on page borders in the file as in the volume, so whole units can be read.
            let whole = piece.range.unit_outward();
            let request = match piece.source {
                Source::Home | Source::Zeros => continue,
                Source::Redo(place) => {
                    let offset = place.offset - (piece.range.offset() - whole.offset());
                    pin = Some(pin.map_or(place.segment, |oldest: u64| oldest.min(place.segment)));
                    IoRequest::RedoRead { file: place.file, offset, length: whole.length() }
                }
                Source::Scratch => IoRequest::ScratchRead { volume, range: whole },
            };
            outstanding += 1;
            out.io(Purpose::ImageRead { read, part }, request);
        }
        self.images.pin(pin);
        let parts = BTreeMap::new();
        let state = ImageRead { reader, range, pieces, parts, outstanding, failure: None, pin };
        self.images.reads.insert(read, state);
        if outstanding == 0 {
            self.image_ended(read, out);
        }
    }

    /// A part of a read was answered.
    pub(super) fn image_part(
        &mut self,
        read: u64,
        part: u32,
        data: Result<Bytes, IoFailure>,
        out: &mut Outbox,
    ) {
        let Some(state) = self.images.reads.get_mut(&read) else {
            return;
        };
        state.outstanding = state.outstanding.saturating_sub(1);
        match data {
            Ok(data) => {
                state.parts.insert(part, data);
            }
            Err(failure) => state.failure = Some(failure),
        }
        if state.outstanding == 0 {
            self.image_ended(read, out);
        }
    }

    fn image_ended(&mut self, read: u64, out: &mut Outbox) {
        let Some(state) = self.images.reads.remove(&read) else {
            return;
        };
        self.images.unpin(state.pin);
        if let Some(held) = self.images.held.take() {
            self.release(held);
        }
        let reader = state.reader;
        let data = match state.failure {
            Some(failure) => Err(failure),
            None => compose(state),
        };
        match reader {
            Reader::Hash(request) => self.hash_read(request, data, out),
            Reader::Verify(request) => self.verify_hashed(request, data, out),
            Reader::Drill(request) => {
                out.push(Effect::DrillDone { request, result: data.map_err(|_| HostError::Io) });
                self.applying.unguard();
            }
            Reader::Preserve { volume, range } => self.preserve_read(volume, range, data, out),
        }
    }

    /// Drops the reads of a drill; gives the requests that wait for them.
    pub(super) fn forget_drill_reads(&mut self) -> Vec<DrillIo> {
        let mut requests = Vec::new();
        let of_drill = |read: &ImageRead| !matches!(read.reader, Reader::Hash(_) | Reader::Verify(_));
        let gone: Vec<u64> =
            self.images.reads.iter().filter(|(_, read)| of_drill(read)).map(|(id, _)| *id).collect();
        for id in gone {
            let Some(read) = self.images.reads.remove(&id) else {
                continue;
            };
            self.images.unpin(read.pin);
            if let Reader::Drill(request) = read.reader {
                requests.push(request);
            }
        }
        if let Some(held) = self.images.held.take() {
            self.release(held);
        }
        requests
    }

    /// The newest read begun.
    pub(super) const fn images_last(&self) -> u64 {
        self.images.last
    }

    /// True while a read of a drill that began no later than this one is under way.
    pub(super) fn drill_reads_until(&self, last: u64) -> bool {
        self.images
            .reads
            .range(..=last)
            .any(|(_, read)| !matches!(read.reader, Reader::Hash(_) | Reader::Verify(_)))
    }

    /// Releases redo up to a cut, now or when no read needs it any more.
    pub(super) fn release(&mut self, through: Placement) {
        let oldest = self.images.pins.keys().next();
        if oldest.is_some_and(|oldest| *oldest <= through.segment_number) {
            self.images.held = Some(through);
        } else {
            self.log.release(&through);
        }
    }
}

/// Puts the parts of a read together.
fn compose(mut state: ImageRead) -> Result<Bytes, IoFailure> {
    let short = IoFailure { operation: "reading the image", errno: 0 };
    let home = state.parts.remove(&HOME_PART);
    if let ([ImagePiece { source: Source::Home, .. }], Some(home)) = (&state.pieces[..], &home) {
        return Ok(home.clone());
    }
    let length = usize::try_from(state.range.length()).map_err(|_| short)?;
    let mut image = home.map_or_else(|| BytesMut::zeroed(length), |home| BytesMut::from(&home[..]));
    for (part, piece) in (1_u32..).zip(&state.pieces) {
        let start = usize::try_from(piece.range.offset() - state.range.offset()).map_err(|_| short)?;
        let length = usize::try_from(piece.range.length()).map_err(|_| short)?;
        let place = image.get_mut(start..start + length).ok_or(short)?;
        match piece.source {
            Source::Home => {}
            Source::Zeros => place.fill(0),
            Source::Redo(_) | Source::Scratch => {
                let lead = usize::try_from(piece.range.offset() % DATA_UNIT_BYTES).map_err(|_| short)?;
                let data = state.parts.get(&part).and_then(|data| data.get(lead..lead + length));
                place.copy_from_slice(data.ok_or(short)?);
            }
        }
    }
    Ok(image.freeze())
}
