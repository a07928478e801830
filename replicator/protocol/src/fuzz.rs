//! Entry points for fuzzers: outside bytes in, no panic out.

/// Feeds arbitrary bytes to the message and group-state decoders.
///
/// # Panics
/// If what was accepted does not encode to the same bytes: a defect.
pub fn message(data: &[u8]) {
    if let Ok(message) = crate::Message::decode(data) {
        assert_eq!(message.encode().as_ref(), data, "an accepted message encodes to itself");
    }
    if let Ok(state) = crate::GroupState::decode(data) {
        let bytes = state.encode();
        assert_eq!(crate::GroupState::decode(&bytes), Ok(state), "a state survives the round trip");
        // Older versions are raised.
        if bytes.get(..2) == data.get(..2) {
            assert_eq!(bytes, data, "an accepted state encodes to itself");
        }
    }
}
