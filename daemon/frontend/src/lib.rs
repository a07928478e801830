//! Wire protocols to and from host commands.
//!
//! A front end turns the bytes of a host's connection into [`block::HostCommand`]s and their outcomes into bytes.
//! It is pure: the caller moves bytes and payloads, runs commands and keeps deadlines; it knows exports by the
//! directory that the caller passes in, and nothing of engines, mirrors or devices.

pub mod nbd;
