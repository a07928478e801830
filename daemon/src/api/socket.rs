//! The control socket: made with mode 0600 from its first moment, one daemon a path.

use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::os::unix::net::{UnixListener as StdListener, UnixStream};
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::IncomingStream;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};
use tokio::net::UnixListener;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why the socket cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A daemon answers on it.
    #[error("control socket '{}' is served by another daemon: stop that one first, or name another socket", .0.display())]
    InUse(PathBuf),
    /// Something that is no socket has its name.
    #[error("'{}' is in the way of the control socket and is no socket: move it away, or name another socket", .0.display())]
    NotASocket(PathBuf),
    /// The system refused.
    #[error("control socket '{}' cannot be made: {source}", .path.display())]
    System {
        /// The socket's path.
        path: PathBuf,
        /// The failure.
        source: io::Error,
    },
}

/// Who is at the other end of a connection, as the kernel says.
#[derive(Clone, Debug, Default)]
pub(super) struct Caller {
    user: Option<u32>,
    process: Option<i32>,
}

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        let credentials = stream.io().peer_cred().ok();
        Self {
            user: credentials.map(|credentials| credentials.uid()),
            process: credentials.and_then(|credentials| credentials.pid()),
        }
    }
}

impl std::fmt::Display for Caller {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.user, self.process) {
            (Some(user), Some(process)) => write!(formatter, "user {user}, process {process}"),
            (Some(user), None) => write!(formatter, "user {user}"),
            (None, _) => formatter.write_str("unknown"),
        }
    }
}

/// The listening control socket; its file is removed when it is dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: Option<StdListener>,
    path: PathBuf,
}

impl ControlSocket {
    /// Listens at `path`. The file of a daemon that is gone is replaced.
    ///
    /// # Errors
    /// A daemon answers there, something else has the name, or the system refuses.
    pub fn bind(path: &Path) -> Result<Self, SocketError> {
        let failed = |source| SocketError::System { path: path.to_owned(), source };
        make_folder(path).map_err(failed)?;
        make_way(path)?;
        let listener = listener(path).map_err(failed)?;
        Ok(Self { listener: Some(listener), path: path.to_owned() })
    }

    /// Serves the API until `stop` ends, then finishes the requests that run. Must be called on a tokio runtime.
    ///
    /// # Errors
    /// The socket cannot be used.
    pub async fn serve(
        mut self,
        router: Router,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        let listener = UnixListener::from_std(listener)?;
        let router = router.into_make_service_with_connect_info::<Caller>();
        axum::serve(listener, router).with_graceful_shutdown(stop).await
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // If it cannot be removed the next daemon finds nobody behind it and replaces it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Makes the folder that holds the socket, for its owner only.
fn make_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => {
            std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)
        }
        _ => Ok(()),
    }
}

/// Removes the socket of a daemon that is gone.
fn make_way(path: &Path) -> Result<(), SocketError> {
    let failed = |source| SocketError::System { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed(error)),
    }
}

/// A listener whose file never had another mode than 0600: on Linux the file takes the mode of the unbound socket.
fn listener(path: &Path) -> io::Result<StdListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(StdListener::from(socket))
}
