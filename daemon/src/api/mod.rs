//! The control API: HTTP with JSON bodies on a Unix socket, for the operator's commands.
//!
//! The module knows HTTP and the types of `control`; what a call does is behind [`Operations`]. Whatever comes in, what
//! goes out is an answer of the API or a problem document (RFC 9457). Who may open the socket may do everything: it is
//! made with mode 0600.

mod extract;
mod operations;
mod router;
mod socket;

#[cfg(test)]
mod tests;

pub use operations::{OperationError, Operations};
pub use router::{caller, router};
pub use socket::{ControlSocket, SocketError};
