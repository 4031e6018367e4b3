//! Sockets: binds them safely, and tells the services of every connection who is at its other end.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use rustix::{
    fs::{Gid, Mode, chmod, chown, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::{
    error::BrokerError,
    ledger::{Lock, create_directory},
    peer::Peer,
};

/// How many connections may wait to be accepted. The kernel's own limit may be lower.
const BACKLOG: i32 = 4096;
/// Only owner and group may connect.
const SOCKET_MODE: u32 = 0o660;

/// A Unix socket that is bound and locked against other brokers. Drop removes it.
pub struct BoundSocket {
    path: PathBuf,
    _lock: Lock,
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the socket could not be removed");
        }
    }
}

/// Binds a Unix socket. Replaces a stale one.
///
/// # Errors
/// When another process serves the socket, or it cannot be created.
pub fn bind_unix(
    path: &Path,
    group: Option<&str>,
    key: &'static str,
) -> Result<(UnixListener, BoundSocket), BrokerError> {
    if let Some(directory) = path.parent().filter(|path| !path.as_os_str().is_empty()) {
        create_directory(directory)?;
    }
    let mut lock_path = path.as_os_str().to_owned();
    lock_path.push(".lock");
    let what = format!("socket {}", path.display());
    let lock = Lock::take(lock_path.into(), what.clone(), key)?;
    clear_stale(path, what, key)?;
    let group = group.map(group_id).transpose()?;

    let listener =
        bind_closed(path).map_err(|error| BrokerError::file("bind", path)(error.into()))?;
    let bound = BoundSocket {
        path: path.to_owned(),
        _lock: lock,
    };
    if let Some(group) = group {
        chown(path, None, Some(group))
            .map_err(|error| BrokerError::file("change the group of", path)(error.into()))?;
    }
    chmod(path, Mode::from_raw_mode(SOCKET_MODE))
        .map_err(|error| BrokerError::file("change the mode of", path)(error.into()))?;
    listener
        .set_nonblocking(true)
        .and_then(|()| UnixListener::from_std(listener))
        .map(|listener| (listener, bound))
        .map_err(BrokerError::file("listen on", path))
}

/// Binds a socket that nobody may connect to yet. The mode of the socket itself becomes the mode of its file.
fn bind_closed(path: &Path) -> rustix::io::Result<StdUnixListener> {
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    fchmod(&socket, Mode::empty())?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes a socket that nobody serves any more.
fn clear_stale(path: &Path, what: String, key: &'static str) -> Result<(), BrokerError> {
    let kind = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(BrokerError::file("look at", path)(error)),
        Ok(metadata) => metadata.file_type(),
    };
    if !kind.is_socket() {
        return Err(BrokerError::NotASocket(path.to_owned()));
    }
    // We have the lock, but another kind of server may use the socket.
    if StdUnixStream::connect(path).is_ok() {
        return Err(BrokerError::Taken {
            what,
            lock: path.to_owned(),
            key,
        });
    }
    fs::remove_file(path).map_err(BrokerError::file("remove the stale socket", path))
}

fn group_id(name: &str) -> Result<Gid, BrokerError> {
    if let Ok(id) = name.parse() {
        return Ok(Gid::from_raw(id));
    }
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(Gid::from_raw(group.gid.as_raw())),
        Ok(None) => Err(BrokerError::Config(format!(
            "socket_group: there is no group {name:?}"
        ))),
        Err(error) => Err(BrokerError::Config(format!(
            "socket_group: {name:?}: {error}"
        ))),
    }
}

/// Binds a TCP address; `key` is its setting.
///
/// # Errors
/// When it cannot be bound.
pub async fn bind_tcp(address: SocketAddr, key: &'static str) -> Result<TcpListener, BrokerError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| BrokerError::Listen {
            address,
            key,
            source,
        })
}

/// A connection with information for its services about the other end.
pub struct Connection<S, I> {
    stream: S,
    info: I,
    _permit: OwnedSemaphorePermit,
}

/// Connections to the gRPC Unix socket, each with its [`Peer`]. Closes connections beyond the limit, and those whose
/// process cannot be identified.
pub fn unix_connections(
    listener: UnixListener,
    limit: Arc<Semaphore>,
) -> impl Stream<Item = io::Result<Connection<tokio::net::UnixStream, Peer>>> {
    UnixListenerStream::new(listener).filter_map(move |accepted| {
        let (stream, permit) = admit(accepted, &limit)?;
        match Peer::of(&stream) {
            Ok(info) => Some(Ok(Connection {
                stream,
                info,
                _permit: permit,
            })),
            Err(error) => {
                tracing::warn!(%error, "a connection was closed, because its process cannot be identified");
                None
            }
        }
    })
}

/// Connections to a TCP address. Closes connections beyond the limit.
pub fn tcp_connections(
    listener: TcpListener,
    limit: Arc<Semaphore>,
) -> impl Stream<Item = io::Result<Connection<tokio::net::TcpStream, TcpConnectInfo>>> {
    TcpListenerStream::new(listener).filter_map(move |accepted| {
        let (stream, permit) = admit(accepted, &limit)?;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
        let info = stream.connect_info();
        Some(Ok(Connection {
            stream,
            info,
            _permit: permit,
        }))
    })
}

fn admit<S>(accepted: io::Result<S>, limit: &Arc<Semaphore>) -> Option<(S, OwnedSemaphorePermit)> {
    let stream = accepted
        .inspect_err(|error| tracing::warn!(%error, "a connection could not be accepted"))
        .ok()?;
    match Arc::clone(limit).try_acquire_owned() {
        Ok(permit) => Some((stream, permit)),
        Err(_) => {
            tracing::warn!("too many connections: one was closed");
            None
        }
    }
}

impl<S, I: Clone + Send + Sync + 'static> Connected for Connection<S, I> {
    type ConnectInfo = I;

    fn connect_info(&self) -> I {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin, I: Unpin> AsyncRead for Connection<S, I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin, I: Unpin> AsyncWrite for Connection<S, I> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn bind(path: &Path) -> Result<(UnixListener, BoundSocket), BrokerError> {
        bind_unix(path, None, "socket")
    }

    #[tokio::test]
    async fn a_socket_is_for_owner_and_group_and_goes_with_the_broker() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/broker.sock");
        let bound = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, SOCKET_MODE);
        drop(bound);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_one_in_use_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broker.sock");
        let other = StdUnixListener::bind(&path).unwrap();
        let refused = bind(&path).err().unwrap().to_string();
        assert!(refused.contains("broker.sock"), "{refused}");
        drop(other);
        // A child that another test is just starting may still hold the socket for a moment.
        while let Err(error) = bind(&path) {
            assert!(matches!(error, BrokerError::Taken { .. }), "{error}");
            std::thread::yield_now();
        }
    }

    #[tokio::test]
    async fn a_second_broker_is_told_so_and_a_file_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("broker.sock");
        let first = bind(&path).unwrap();
        assert!(matches!(
            bind(&path).err(),
            Some(BrokerError::Taken { key: "socket", .. })
        ));
        drop(first);
        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            bind(&path).err(),
            Some(BrokerError::NotASocket(_))
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[test]
    fn a_group_that_is_not_there_is_named() {
        let refused = group_id("no-such-group-here").unwrap_err().to_string();
        assert!(refused.contains("socket_group") && refused.contains("no-such-group-here"));
        assert_eq!(group_id("0").unwrap().as_raw(), 0);
    }
}
