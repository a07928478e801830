//! Entry points of fuzz targets: what the daemon decodes of outside bytes beside the network's.

use crypto::KeyRecord;

use crate::audit::{Entry, verify};

/// A wrapped-key record: what decodes encodes to the same bytes.
///
/// # Panics
/// If it does not.
pub fn key_record(input: &[u8]) {
    if let Ok(record) = KeyRecord::decode(input) {
        assert!(record.encode() == input, "a record has one form");
    }
}

/// An audit log: what reads as a line is written as that line; a log is whole or has a damage.
///
/// # Panics
/// If it is not.
pub fn audit_log(input: &[u8]) {
    if let Ok((entry, _)) = Entry::read(input) {
        let line = entry.line();
        assert!(line.strip_suffix(b"\n") == Some(input), "a line has one form");
    }
    assert!(verify(input, None).is_ok(), "memory can be read");
}
