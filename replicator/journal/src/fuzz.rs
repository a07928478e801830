//! Entry points for fuzz targets: each takes any bytes and must not panic, and what decodes must encode to the
//! same bytes again.

use bytes::{Bytes, BytesMut};

use crate::{CUT_HEADER_BYTES, Checkpoint, SegmentHeader, SpillIndex, decode, encode, header_only, peek};

/// Decodes `data` as a cut.
///
/// # Panics
/// If the decoder is wrong.
pub fn decode_cut(data: &[u8]) {
    let bytes = Bytes::copy_from_slice(data);
    let Ok(cut) = decode(&bytes) else { return };
    let size = data.get(..CUT_HEADER_BYTES).map(peek);
    assert!(size.is_some_and(|size| size.is_ok()), "a good cut has a good header");
    if cut.header_only {
        assert_eq!(header_only(&bytes).as_ref(), Ok(&bytes), "the encoding is canonical");
        return;
    }
    let encoded = encode(&cut.meta, &cut.records);
    assert_eq!(encoded.tip, cut.tip, "the tip names the content");
    let mut again = BytesMut::from(encoded.head.as_ref());
    for payload in &encoded.payloads {
        again.extend_from_slice(payload);
    }
    assert_eq!(again, data, "the encoding is canonical");
    if cut.meta.initial {
        let head = header_only(&bytes).and_then(|head| decode(&head));
        assert!(head.is_ok_and(|head| head.tip == cut.tip), "the tip stays the same");
    }
}

/// Decodes `data` as a checkpoint page, and as two slots.
///
/// # Panics
/// If the decoder is wrong.
pub fn checkpoint(data: &[u8]) {
    if let Ok(checkpoint) = Checkpoint::decode(data) {
        assert_eq!(checkpoint.encode(), data, "the encoding is canonical");
    }
    let (slot_0, slot_1) = data.split_at(data.len() / 2);
    // Any outcome but a panic is right.
    let _newest = Checkpoint::newest(slot_0, slot_1);
}

/// Decodes `data` as a segment header page.
///
/// # Panics
/// If the decoder is wrong.
pub fn segment_header(data: &[u8]) {
    if let Ok(header) = SegmentHeader::decode(data) {
        assert_eq!(header.encode(), data, "the encoding is canonical");
    }
}

/// Decodes `data` as the index of a spill file.
///
/// # Panics
/// If the decoder is wrong.
pub fn spill_index(data: &[u8]) {
    if let Ok(index) = SpillIndex::decode(data) {
        assert_eq!(index.encode(), data, "the encoding is canonical");
    }
}
