//! HTTP over the control socket; one connection a request, as the daemon may restart between two.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use control::{Call, CallError};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1;
use hyper::{Request, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// The longest answer read, in bytes: lists of some ten thousand objects.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// The daemon, by its socket.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
}

/// Why a call did not end as wished.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon listens on '{}': start it with 'farshored --config FILE' or 'farshored --dev DIR', \
         or name its socket with --socket or FARSHORE_SOCKET", .0.display()
    )]
    NotRunning(PathBuf),
    /// The socket cannot be used.
    #[error("the control socket '{}' cannot be used: {source}", .socket.display())]
    Socket { socket: PathBuf, source: std::io::Error },
    /// The daemon went away, or something else listens.
    #[error("the daemon at '{}' did not answer {request}: {source}", .socket.display())]
    Http { socket: PathBuf, request: String, source: hyper::Error },
    /// The answer is longer than any of ours.
    #[error("the answer to {request} is longer than {ANSWER_BYTES_MAX} bytes: something else listens on '{}'", .socket.display())]
    TooLong { socket: PathBuf, request: String },
    /// The daemon refused, or its answer is not understood.
    #[error(transparent)]
    Call(#[from] CallError),
}

impl ClientError {
    /// True if the daemon may just be restarting.
    pub(crate) const fn is_absence(&self) -> bool {
        matches!(self, Self::NotRunning(_) | Self::Http { .. })
    }
}

impl Client {
    /// The daemon that listens at `socket`.
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// Sends the request and reads the answer.
    ///
    /// # Errors
    /// The daemon is not there, or refused.
    pub(crate) async fn send<Answer: DeserializeOwned>(
        &self,
        call: &Call<Answer>,
    ) -> Result<Answer, ClientError> {
        let stream = self.connect().await?;
        let (status, body) = self.exchange(stream, call).await?;
        Ok(call.answer(status, &body)?)
    }

    async fn connect(&self) -> Result<UnixStream, ClientError> {
        UnixStream::connect(&self.socket).await.map_err(|source| {
            let socket = self.socket.clone();
            if matches!(source.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) {
                ClientError::NotRunning(socket)
            } else {
                ClientError::Socket { socket, source }
            }
        })
    }

    async fn exchange<Answer>(
        &self,
        stream: UnixStream,
        call: &Call<Answer>,
    ) -> Result<(u16, Bytes), ClientError> {
        let failed =
            |source| ClientError::Http { socket: self.socket.clone(), request: call.to_string(), source };
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        // It ends with the sender; its error reaches the request below.
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request(call)).await.map_err(failed)?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        connection.abort();
        let body = body.map_err(|error| match error.downcast::<hyper::Error>() {
            Ok(error) => failed(*error),
            Err(other) => {
                assert!(other.is::<LengthLimitError>(), "a limited body fails by its body or by its limit");
                ClientError::TooLong { socket: self.socket.clone(), request: call.to_string() }
            }
        })?;
        Ok((status, body.to_bytes()))
    }
}

fn request<Answer>(call: &Call<Answer>) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(Bytes::copy_from_slice(&call.body)));
    *request.method_mut() = match call.method {
        control::Method::Get => hyper::Method::GET,
        control::Method::Post => hyper::Method::POST,
        control::Method::Delete => hyper::Method::DELETE,
    };
    // Paths are built from checked names, so they parse; the fallback would be answered with 404.
    *request.uri_mut() = call.path.parse().unwrap_or_default();
    let headers = request.headers_mut();
    headers.insert(header::HOST, header::HeaderValue::from_static("farshore"));
    if !call.body.is_empty() {
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
    }
    request
}
