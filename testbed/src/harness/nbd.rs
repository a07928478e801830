//! A small blocking NBD client: fixed newstyle, GO, simple replies.
//!
//! It exists so that a test knows of each write whether it was acknowledged, and so that a test can send what no real
//! client would ([`NbdClient::begin`]); for everything else there are the real clients.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// FIXED_NEWSTYLE and NO_ZEROES.
const CLIENT_FLAGS: u32 = 3;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_ERROR_BIT: u32 = 1 << 31;
const INFO_EXPORT: u16 = 0;
const REPLY_BYTES_MAX: u32 = 64 << 10;
const IO_TIMEOUT: Duration = Duration::from_secs(60);

/// READ.
pub const COMMAND_READ: u16 = 0;
/// WRITE.
pub const COMMAND_WRITE: u16 = 1;
/// DISC.
pub const COMMAND_DISCONNECT: u16 = 2;
/// FLUSH.
pub const COMMAND_FLUSH: u16 = 3;
/// TRIM.
pub const COMMAND_TRIM: u16 = 4;
/// CACHE.
pub const COMMAND_CACHE: u16 = 5;
/// WRITE_ZEROES.
pub const COMMAND_WRITE_ZEROES: u16 = 6;
/// BLOCK_STATUS.
pub const COMMAND_BLOCK_STATUS: u16 = 7;
/// Force unit access, on any command.
pub const FLAG_FUA: u16 = 1;

/// Where a volume is served.
#[derive(Clone, Debug)]
pub struct Export {
    server: Server,
    volume: String,
}

#[derive(Clone, Debug)]
enum Server {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl Export {
    /// A volume served over TCP.
    pub fn tcp(address: SocketAddr, volume: &str) -> Self {
        Self { server: Server::Tcp(address), volume: volume.to_owned() }
    }

    /// A volume served on a Unix socket.
    pub fn unix(socket: PathBuf, volume: &str) -> Self {
        Self { server: Server::Unix(socket), volume: volume.to_owned() }
    }

    /// The URI for libnbd, fio and qemu.
    pub fn uri(&self) -> String {
        self.to_string()
    }

    /// A TCP connection to the server that has not said anything.
    ///
    /// # Errors
    /// If the server is not on TCP, or does not take it.
    pub fn dial(&self) -> io::Result<TcpStream> {
        let Server::Tcp(address) = &self.server else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let stream = TcpStream::connect_timeout(address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        Ok(stream)
    }

    /// The URI of the server without an export.
    pub fn server_uri(&self) -> String {
        match &self.server {
            Server::Tcp(address) => format!("nbd://{address}"),
            Server::Unix(socket) => format!("nbd+unix://?socket={}", socket.display()),
        }
    }
}

impl fmt::Display for Export {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.server {
            Server::Tcp(address) => write!(formatter, "nbd://{address}/{}", self.volume),
            Server::Unix(socket) => {
                write!(formatter, "nbd+unix:///{}?socket={}", self.volume, socket.display())
            }
        }
    }
}

/// Why a connection or a command failed.
#[derive(Debug, thiserror::Error)]
pub enum NbdError {
    /// The connection is gone.
    #[error("NBD connection: {0}")]
    Io(#[from] io::Error),
    /// The export was refused during the handshake.
    #[error("export refused with {code:#x}: {text}")]
    Refused {
        /// The option reply's type.
        code: u32,
        /// The server's text.
        text: String,
    },
    /// A command was answered with an error number.
    #[error("command failed with error {0}")]
    Command(u32),
    /// The server broke the protocol.
    #[error("protocol broken: {0}")]
    Protocol(&'static str),
}

trait Duplex: Read + Write + Send {}
impl<Stream: Read + Write + Send> Duplex for Stream {}

/// A connection in the transmission phase.
pub struct NbdClient {
    stream: Box<dyn Duplex>,
    size: u64,
    flags: u16,
    cookie: u64,
}

impl NbdClient {
    /// Connects and selects the export with GO.
    ///
    /// # Errors
    /// If the server cannot be reached or refuses.
    pub fn connect(export: &Export) -> Result<Self, NbdError> {
        let stream: Box<dyn Duplex> = match &export.server {
            Server::Tcp(_) => Box::new(export.dial()?),
            Server::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(IO_TIMEOUT))?;
                stream.set_write_timeout(Some(IO_TIMEOUT))?;
                Box::new(stream)
            }
        };
        Self::greet(stream, export)
    }

    /// Selects the export with GO on a connection that came from [`Export::dial`]: the test keeps a clone of it.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn over(stream: TcpStream, export: &Export) -> Result<Self, NbdError> {
        Self::greet(Box::new(stream), export)
    }

    fn greet(stream: Box<dyn Duplex>, export: &Export) -> Result<Self, NbdError> {
        let mut client = Self { stream, size: 0, flags: 0, cookie: 0 };
        client.handshake(&export.volume)?;
        Ok(client)
    }

    /// The export's size in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The export's transmission flags.
    pub const fn flags(&self) -> u16 {
        self.flags
    }

    /// Fills `buffer` from `offset` on.
    ///
    /// # Errors
    /// If the command fails.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), NbdError> {
        self.request(COMMAND_READ, 0, offset, length(buffer)?, &[])?;
        self.stream.read_exact(buffer)?;
        Ok(())
    }

    /// Writes `data`; returns when the server has acknowledged it.
    ///
    /// # Errors
    /// If the command fails, or the connection breaks before the acknowledgement.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.request(COMMAND_WRITE, 0, offset, length(data)?, data)
    }

    /// Writes `data` to stable media.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub fn write_durable(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        self.request(COMMAND_WRITE, FLAG_FUA, offset, length(data)?, data)
    }

    /// Brings all acknowledged writes to stable media.
    ///
    /// # Errors
    /// If the command fails.
    pub fn flush(&mut self) -> Result<(), NbdError> {
        self.request(COMMAND_FLUSH, 0, 0, 0, &[])
    }

    /// Gives up a range.
    ///
    /// # Errors
    /// If the command fails.
    pub fn trim(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.request(COMMAND_TRIM, 0, offset, length, &[])
    }

    /// Zeroes a range.
    ///
    /// # Errors
    /// If the command fails.
    pub fn write_zeroes(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        self.request(COMMAND_WRITE_ZEROES, 0, offset, length, &[])
    }

    /// Says goodbye.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn disconnect(mut self) -> Result<(), NbdError> {
        let header = self.header(COMMAND_DISCONNECT, 0, 0, 0);
        self.stream.write_all(&header)?;
        Ok(())
    }

    /// Asks for bytes and does not wait for them.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn begin_read(&mut self, offset: u64, length: u32) -> Result<(), NbdError> {
        let header = self.header(COMMAND_READ, 0, offset, length);
        Ok(self.stream.write_all(&header)?)
    }

    /// Announces a write of `length` bytes and sends only the beginning of its payload.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn begin_write(&mut self, offset: u64, length: u32, beginning: &[u8]) -> Result<(), NbdError> {
        let mut message = self.header(COMMAND_WRITE, 0, offset, length);
        message.extend_from_slice(beginning);
        Ok(self.stream.write_all(&message)?)
    }

    /// Sends more of a payload that [`Self::begin_write`] announced.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn send_payload(&mut self, more: &[u8]) -> Result<(), NbdError> {
        Ok(self.stream.write_all(more)?)
    }

    /// Sends any command, allowed or not, and does not wait for its reply; the cookie.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn begin(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<u64, NbdError> {
        let mut message = self.header(command, flags, offset, length);
        message.extend_from_slice(payload);
        self.stream.write_all(&message)?;
        Ok(self.cookie)
    }

    /// Takes the next reply: its cookie and its error number, 0 for success. The bytes of a read follow it.
    ///
    /// # Errors
    /// If the connection is gone, or this is no reply.
    pub fn reply(&mut self) -> Result<(u64, u32), NbdError> {
        if self.u32()? != SIMPLE_REPLY_MAGIC {
            return Err(NbdError::Protocol("no simple reply"));
        }
        let error = self.u32()?;
        Ok((self.u64()?, error))
    }

    /// Takes the bytes behind the reply to a read.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn receive(&mut self, buffer: &mut [u8]) -> Result<(), NbdError> {
        Ok(self.stream.read_exact(buffer)?)
    }

    /// The error number that a command without a payload in its reply is answered with, 0 for success.
    ///
    /// # Errors
    /// If the connection is gone, or the reply is another's.
    pub fn error_of(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<u32, NbdError> {
        match self.request(command, flags, offset, length, payload) {
            Ok(()) => Ok(0),
            Err(NbdError::Command(error)) => Ok(error),
            Err(other) => Err(other),
        }
    }

    fn header(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
        self.cookie += 1;
        let mut header = REQUEST_MAGIC.to_be_bytes().to_vec();
        header.extend(flags.to_be_bytes());
        header.extend(command.to_be_bytes());
        header.extend(self.cookie.to_be_bytes());
        header.extend(offset.to_be_bytes());
        header.extend(length.to_be_bytes());
        header
    }

    fn request(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) -> Result<(), NbdError> {
        let sent = self.begin(command, flags, offset, length, payload)?;
        let (cookie, error) = self.reply()?;
        if cookie != sent {
            return Err(NbdError::Protocol("reply to another command"));
        }
        if error == 0 { Ok(()) } else { Err(NbdError::Command(error)) }
    }

    fn handshake(&mut self, volume: &str) -> Result<(), NbdError> {
        if self.u64()? != NBD_MAGIC || self.u64()? != OPTION_MAGIC {
            return Err(NbdError::Protocol("no newstyle greeting"));
        }
        let _server_flags = self.u16()?;
        let name_length = u32::try_from(volume.len()).map_err(|_| NbdError::Protocol("name too long"))?;
        let mut message = CLIENT_FLAGS.to_be_bytes().to_vec();
        message.extend(OPTION_MAGIC.to_be_bytes());
        message.extend(OPTION_GO.to_be_bytes());
        message.extend((4 + name_length + 2).to_be_bytes());
        message.extend(name_length.to_be_bytes());
        message.extend(volume.as_bytes());
        message.extend(0_u16.to_be_bytes());
        self.stream.write_all(&message)?;
        loop {
            let (kind, data) = self.option_reply()?;
            match kind {
                REPLY_ACK => return Ok(()),
                REPLY_INFO => self.information(&data)?,
                code if code & REPLY_ERROR_BIT != 0 => {
                    let text = String::from_utf8_lossy(&data).into_owned();
                    return Err(NbdError::Refused { code, text });
                }
                _ => return Err(NbdError::Protocol("unknown option reply")),
            }
        }
    }

    fn option_reply(&mut self) -> Result<(u32, Vec<u8>), NbdError> {
        if self.u64()? != OPTION_REPLY_MAGIC || self.u32()? != OPTION_GO {
            return Err(NbdError::Protocol("no reply to GO"));
        }
        let kind = self.u32()?;
        let length = self.u32()?;
        if length > REPLY_BYTES_MAX {
            return Err(NbdError::Protocol("option reply too long"));
        }
        let mut data = vec![0; usize::try_from(length).unwrap_or_default()];
        self.stream.read_exact(&mut data)?;
        Ok((kind, data))
    }

    fn information(&mut self, data: &[u8]) -> Result<(), NbdError> {
        let mut data = data;
        let mut kind = [0; 2];
        data.read_exact(&mut kind)?;
        if u16::from_be_bytes(kind) == INFO_EXPORT {
            let (mut size, mut flags) = ([0; 8], [0; 2]);
            data.read_exact(&mut size)?;
            data.read_exact(&mut flags)?;
            self.size = u64::from_be_bytes(size);
            self.flags = u16::from_be_bytes(flags);
        }
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], NbdError> {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> Result<u16, NbdError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, NbdError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, NbdError> {
        self.array().map(u64::from_be_bytes)
    }
}

fn length(data: &[u8]) -> Result<u32, NbdError> {
    u32::try_from(data.len()).map_err(|_| NbdError::Protocol("command too long"))
}
