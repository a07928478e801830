//! Tests of the whole server side against a client's view of the protocol.

mod handshake;
mod replies;
mod session;
mod transmission;
