//! Writing to stdout and stderr. A reader that went away (`farshore ... | head`) is no error.

use std::io::{ErrorKind, Write, stderr, stdout};

/// Writes an answer to stdout.
///
/// # Errors
/// Stdout cannot be written, for another reason than a closed pipe.
pub(crate) fn answer(text: &str) -> std::io::Result<()> {
    let mut stdout = stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Writes one sentence to stderr; if that fails nobody is left to tell.
pub(crate) fn complain(sentence: &str) {
    let _ = writeln!(stderr().lock(), "farshore: {sentence}");
}
