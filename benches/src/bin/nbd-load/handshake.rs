//! Opening a connection: fixed newstyle negotiation with the option GO alone (NBD protocol, "Handshake").

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::target::{Address, Target};

const TIMEOUT: Duration = Duration::from_secs(30);
const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Fixed newstyle and no zeroes: both sides must have them.
const HANDSHAKE_FLAGS: u16 = 0b11;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
/// More than any information that a server has.
const REPLY_BYTES_MAX: u32 = 1 << 16;

/// A connection in the transmission phase.
pub(crate) struct Opened {
    /// The socket, which does not block.
    pub(crate) socket: OwnedFd,
    pub(crate) size_bytes: u64,
}

/// Connects to a server and opens the export.
///
/// # Errors
/// When the server is not there, refuses, or does not speak the protocol.
pub(crate) fn open(target: &Target) -> Result<Opened> {
    connect(target).with_context(|| format!("cannot open {target}"))
}

fn connect(target: &Target) -> Result<Opened> {
    match &target.address {
        Address::Unix(path) => {
            let mut stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let size_bytes = negotiate(&mut stream, &target.export)?;
            stream.set_nonblocking(true)?;
            Ok(Opened { socket: stream.into(), size_bytes })
        }
        Address::Tcp(host) => {
            let mut stream = TcpStream::connect(host)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(TIMEOUT))?;
            let size_bytes = negotiate(&mut stream, &target.export)?;
            stream.set_nonblocking(true)?;
            Ok(Opened { socket: stream.into(), size_bytes })
        }
    }
}

/// Goes to the transmission phase; returns the export's size.
fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<u64> {
    ensure!(u64::from_be_bytes(take(stream)?) == MAGIC, "this is no NBD server");
    ensure!(u64::from_be_bytes(take(stream)?) == OPTION_MAGIC, "this server speaks the old style only");
    let flags = u16::from_be_bytes(take(stream)?);
    ensure!(flags & HANDSHAKE_FLAGS == HANDSHAKE_FLAGS, "this server does not speak fixed newstyle");
    let name_bytes = u32::try_from(export.len())?;
    let mut message = u32::from(HANDSHAKE_FLAGS).to_be_bytes().to_vec();
    message.extend(OPTION_MAGIC.to_be_bytes());
    message.extend(OPTION_GO.to_be_bytes());
    message.extend((name_bytes + 6).to_be_bytes());
    message.extend(name_bytes.to_be_bytes());
    message.extend(export.as_bytes());
    message.extend([0, 0]);
    stream.write_all(&message)?;
    let mut size_bytes = None;
    loop {
        ensure!(u64::from_be_bytes(take(stream)?) == OPTION_REPLY_MAGIC, "this is no reply to an option");
        ensure!(u32::from_be_bytes(take(stream)?) == OPTION_GO, "this is a reply to another option");
        let kind = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?);
        ensure!(length <= REPLY_BYTES_MAX, "a reply of {length} bytes is too long");
        let mut data = vec![0; usize::try_from(length)?];
        stream.read_exact(&mut data)?;
        match kind {
            REPLY_ACK => return size_bytes.context("the server did not say the export's size"),
            REPLY_INFO => size_bytes = export_size(&data).or(size_bytes),
            error => bail!("the server refuses (reply {error:#x}): {}", String::from_utf8_lossy(&data)),
        }
    }
}

fn export_size(data: &[u8]) -> Option<u64> {
    let (kind, rest) = data.split_first_chunk()?;
    let (size, _flags) = rest.split_first_chunk()?;
    (u16::from_be_bytes(*kind) == INFO_EXPORT).then(|| u64::from_be_bytes(*size))
}

fn take<const N: usize>(stream: &mut impl Read) -> Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read, Result, Write};

    use super::{MAGIC, OPTION_GO, OPTION_MAGIC, OPTION_REPLY_MAGIC, negotiate};

    /// A server that has said everything already.
    struct Script {
        said: Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, bytes: &mut [u8]) -> Result<usize> {
            self.said.read(bytes)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> Result<usize> {
            self.heard.write(bytes)
        }

        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }

    fn script(replies: &[(u32, &[u8])]) -> Script {
        let mut said = MAGIC.to_be_bytes().to_vec();
        said.extend(OPTION_MAGIC.to_be_bytes());
        said.extend([0, 3]);
        for (kind, data) in replies {
            said.extend(OPTION_REPLY_MAGIC.to_be_bytes());
            said.extend(OPTION_GO.to_be_bytes());
            said.extend(kind.to_be_bytes());
            said.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
            said.extend(*data);
        }
        Script { said: Cursor::new(said), heard: Vec::new() }
    }

    #[test]
    fn the_size_of_the_export_is_found_among_other_information() {
        let export = [0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0, 0, 1];
        let mut server = script(&[(3, &[0, 3, 0, 0]), (3, &export), (3, &[0, 1, 65]), (1, &[])]);
        assert_eq!(negotiate(&mut server, "disk").unwrap(), 4096);
        assert_eq!(server.heard.len(), 4 + 16 + 4 + 4 + 2);
    }

    #[test]
    fn a_refusal_and_a_silent_server_are_errors() {
        let refusal = negotiate(&mut script(&[((1 << 31) + 6, b"no such export")]), "disk").unwrap_err();
        assert!(refusal.to_string().contains("no such export"));
        assert!(negotiate(&mut script(&[(1, &[])]), "disk").is_err());
        assert!(negotiate(&mut script(&[]), "disk").is_err());
    }
}
