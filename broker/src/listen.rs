//! Sockets: binds them safely, and tells the services of every connection who is at its other end.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::SocketAddr,
    os::unix::{
        fs::FileTypeExt,
        net::{UnixListener as StdUnixListener, UnixStream as StdUnixStream},
    },
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rustix::{
    fs::{Gid, Mode, chmod, chown, fchmod},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, UnixListener},
    time::Sleep,
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{TcpListenerStream, UnixListenerStream},
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::{
    calls::Calls,
    core::{Connection, Process},
    error::BrokerError,
    ledger::{Lock, create_directory},
    logging::Sparse,
    peer::{Peer, next_connection},
};

/// Anybody who may connect can cause these warnings, so they are rate-limited.
static UNKNOWN: Sparse = Sparse::new();
static TOO_MANY: Sparse = Sparse::new();
static NOT_ACCEPTED: Sparse = Sparse::new();

/// How many connections may wait to be accepted. The kernel's own limit may be lower.
const BACKLOG: i32 = 4096;
/// How long a new connection may be silent. Every client of gRPC speaks first.
const SILENCE: Duration = Duration::from_secs(10);
/// How long a connection may have no call under way. A session has one all the time, its stream, and so has who watches
/// health; commands that look now and then connect anew.
const IDLE: Duration = Duration::from_secs(120);
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
    let group = group
        .map(|name| group_id("socket_group", name))
        .transpose()?;

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

/// The id of a group, which `key` names or has the number of.
///
/// # Errors
/// When there is no group of this name.
pub fn group_id(key: &'static str, name: &str) -> Result<Gid, BrokerError> {
    if let Ok(id) = name.parse() {
        return Ok(Gid::from_raw(id));
    }
    match nix::unistd::Group::from_name(name) {
        Ok(Some(group)) => Ok(Gid::from_raw(group.gid.as_raw())),
        Ok(None) => Err(BrokerError::Config(format!(
            "{key}: there is no group {name:?}"
        ))),
        Err(error) => Err(BrokerError::Config(format!("{key}: {name:?}: {error}"))),
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

/// How many connections there may be, in all and of one user, so that nobody takes them all.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All connections.
    pub all: usize,
    /// Those of one user who is neither root nor the broker's own. Those two always have [`Self::reserved`] left.
    pub of_user: usize,
    /// How many only root and the broker's own user may take: for operators and probes. No process of theirs takes these if
    /// it has all the others.
    pub reserved: usize,
}

/// Lets connections in. Clones count together.
#[derive(Clone)]
pub struct Admission {
    limits: Limits,
    broker_uid: u32,
    open: Arc<Mutex<Open>>,
}

/// The open connections.
#[derive(Default)]
struct Open {
    of_users: HashMap<u32, usize>,
    of_processes: HashMap<Process, usize>,
}

impl Open {
    fn add(&mut self, process: Process) {
        *self.of_users.entry(process.uid).or_default() += 1;
        *self.of_processes.entry(process).or_default() += 1;
    }

    fn subtract(&mut self, process: Process) {
        if let Some(its) = self.of_users.get_mut(&process.uid) {
            *its -= 1;
            if *its == 0 {
                self.of_users.remove(&process.uid);
            }
        }
        if let Some(its) = self.of_processes.get_mut(&process) {
            *its -= 1;
            if *its == 0 {
                self.of_processes.remove(&process);
            }
        }
    }
}

impl Admission {
    /// Lets connections in up to these limits.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            broker_uid: rustix::process::geteuid().as_raw(),
            open: Arc::default(),
        }
    }

    /// Whether a user is root or the broker's own.
    pub fn trusts(&self, uid: u32) -> bool {
        uid == 0 || uid == self.broker_uid
    }

    /// Lets a connection of the process in, if there is room.
    pub fn admit(&self, process: Process) -> Option<Permit> {
        let mut open = self.open.lock();
        let all: usize = open.of_users.values().sum();
        let unreserved = self.limits.all.saturating_sub(self.limits.reserved);
        let room = match self.trusts(process.uid) {
            true => {
                let its = open.of_processes.get(&process).copied().unwrap_or(0);
                all < self.limits.all && its < unreserved
            }
            false => {
                let its = open.of_users.get(&process.uid).copied().unwrap_or(0);
                all < unreserved && its < self.limits.of_user
            }
        };
        if !room {
            return None;
        }
        open.add(process);
        Some(Permit {
            open: Arc::clone(&self.open),
            process,
        })
    }
}

/// An open connection. Drop makes room for another one.
pub struct Permit {
    open: Arc<Mutex<Open>>,
    process: Process,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.open.lock().subtract(self.process);
    }
}

/// Places for connections of which nobody can tell whose they are. The newest always gets one: where all are taken, the oldest
/// connection is cut. So whoever holds them all keeps nobody out who asks and leaves, as probes and scrapers do.
#[derive(Clone)]
pub struct Places {
    most: usize,
    /// What ends each connection that has a place, the oldest first.
    taken: Arc<Mutex<BTreeMap<Connection, CancellationToken>>>,
}

impl Places {
    /// So many places.
    pub fn new(most: usize) -> Self {
        Self {
            most,
            taken: Arc::default(),
        }
    }

    /// A place for a connection that is newer than all that have one. Says whether another was cut for it.
    pub fn take(&self, connection: Connection, cut: CancellationToken) -> (Place, bool) {
        let mut taken = self.taken.lock();
        let oldest = (taken.len() >= self.most).then(|| taken.pop_first());
        let oldest = oldest.flatten();
        if let Some((_, cut)) = &oldest {
            cut.cancel();
        }
        taken.insert(connection, cut);
        let place = Place {
            taken: Arc::clone(&self.taken),
            connection,
        };
        (place, oldest.is_some())
    }
}

/// The place of a connection. Drop makes room for another one.
pub struct Place {
    taken: Arc<Mutex<BTreeMap<Connection, CancellationToken>>>,
    connection: Connection,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.taken.lock().remove(&self.connection);
    }
}

/// How long a connection may be good for nothing.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// Until it says something.
    silence: Duration,
    /// Without any call.
    idle: Duration,
}

const PATIENCE: Patience = Patience {
    silence: SILENCE,
    idle: IDLE,
};

/// A connection with information for its services about the other end.
pub struct Known<S, I, P> {
    stream: S,
    info: I,
    calls: Calls,
    patience: Patience,
    /// Whether the other end has said anything.
    spoken: bool,
    /// When to look whether the connection is good for anything.
    looks: Pin<Box<Sleep>>,
    /// Comes when the connection is to end.
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    _permit: P,
}

/// What services know of a connection over TCP.
#[derive(Clone, Debug, Default)]
pub struct TcpPeer {
    /// The connection.
    pub connection: Connection,
    /// Ends the connection.
    pub cut: CancellationToken,
    /// Its calls.
    pub calls: Calls,
}

impl<S, I, P> Known<S, I, P> {
    fn new(
        stream: S,
        info: I,
        permit: P,
        (cut, calls): (CancellationToken, Calls),
        patience: Patience,
    ) -> Self {
        Self {
            stream,
            info,
            calls,
            patience,
            spoken: false,
            looks: Box::pin(tokio::time::sleep(patience.silence)),
            cut: Box::pin(cut.cancelled_owned()),
            _permit: permit,
        }
    }

    /// The other end has said something.
    fn hears(&mut self) {
        if !self.spoken {
            self.spoken = true;
            self.looks
                .as_mut()
                .reset((Instant::now() + self.patience.idle).into());
        }
    }

    /// Ready when the connection is good for nothing.
    fn poll_useless(&mut self, context: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.looks.as_mut().poll(context));
            let left = self.patience.idle.saturating_sub(self.calls.idle());
            if !self.spoken || left.is_zero() {
                return Poll::Ready(());
            }
            self.looks.as_mut().reset((Instant::now() + left).into());
        }
    }
}

/// Connections to the gRPC Unix socket, each with its [`Peer`]. Closes connections beyond the limits, and those whose
/// process cannot be identified.
pub fn unix_connections(
    listener: UnixListener,
    admission: Admission,
) -> impl Stream<Item = io::Result<Known<tokio::net::UnixStream, Peer, Permit>>> {
    UnixListenerStream::new(listener).filter_map(move |accepted| {
        let stream = accepted_or_said(accepted)?;
        let info = match Peer::of(&stream) {
            Ok(info) => info,
            Err(error) => {
                if let Some(withheld) = UNKNOWN.turn() {
                    tracing::warn!(%error, withheld, "a connection was closed, because its process cannot be identified");
                }
                return None;
            }
        };
        let permit = admission.admit(info.process).or_else(|| {
            if let Some(withheld) = TOO_MANY.turn() {
                let uid = info.process.uid;
                tracing::warn!(uid, withheld, "too many connections: one was closed");
            }
            None
        })?;
        let ends = (info.cut.clone(), info.calls.clone());
        Some(Ok(Known::new(stream, info, permit, ends, PATIENCE)))
    })
}

/// Connections to a TCP address. Cuts the oldest for one that finds no place.
pub fn tcp_connections(
    listener: TcpListener,
    places: Places,
) -> impl Stream<Item = io::Result<Known<tokio::net::TcpStream, TcpPeer, Place>>> {
    TcpListenerStream::new(listener).filter_map(move |accepted| {
        let stream = accepted_or_said(accepted)?;
        let info = TcpPeer {
            connection: next_connection(),
            cut: CancellationToken::new(),
            calls: Calls::default(),
        };
        let (place, full) = places.take(info.connection, info.cut.clone());
        if full && let Some(withheld) = TOO_MANY.turn() {
            tracing::warn!(withheld, "too many TCP connections: the oldest was closed");
        }
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "TCP_NODELAY cannot be set");
        }
        let ends = (info.cut.clone(), info.calls.clone());
        Some(Ok(Known::new(stream, info, place, ends, PATIENCE)))
    })
}

fn accepted_or_said<S>(accepted: io::Result<S>) -> Option<S> {
    let said = accepted.inspect_err(|error| {
        if let Some(withheld) = NOT_ACCEPTED.turn() {
            tracing::warn!(%error, withheld, "a connection could not be accepted");
        }
    });
    said.ok()
}

impl<S, I: Clone + Send + Sync + 'static, P> Connected for Known<S, I, P> {
    type ConnectInfo = I;

    fn connect_info(&self) -> I {
        self.info.clone()
    }
}

impl<S: AsyncRead + Unpin, I: Unpin, P: Unpin> AsyncRead for Known<S, I, P> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        match read {
            Poll::Ready(Ok(())) if buffer.filled().len() > before => self.hears(),
            Poll::Pending => {
                ready!(self.poll_useless(context));
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            _ => {}
        }
        read
    }
}

impl<S: AsyncWrite + Unpin, I: Unpin, P: Unpin> AsyncWrite for Known<S, I, P> {
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
    fn one_user_cannot_take_all_connections_and_operators_always_get_in() {
        let limits = Limits {
            all: 10,
            of_user: 4,
            reserved: 2,
        };
        let mut admission = Admission::new(limits);
        admission.broker_uid = 900;
        // Each call stands for another process.
        let pids = std::cell::Cell::new(0);
        let process = |uid| {
            pids.set(pids.get() + 1);
            Process {
                pid: pids.get(),
                birth: 1,
                uid,
            }
        };
        let take =
            |process| -> Vec<_> { (0..100).map_while(|_| admission.admit(process)).collect() };
        let taken = |uid| take(process(uid));
        let first = taken(1_000);
        assert_eq!(first.len(), 4);
        let others: Vec<_> = (2_000..2_100).map(taken).collect();
        assert_eq!(
            others.iter().flatten().count(),
            4,
            "what is reserved is left"
        );
        for operator in [0, 900] {
            assert_eq!(taken(operator).len(), 2, "uid {operator}");
        }
        drop(others);
        assert_eq!(taken(3_000).len(), 4, "who leaves makes room");
        assert_eq!(admission.open.lock().of_users.len(), 1);
        assert_eq!(admission.open.lock().of_processes.len(), 1);
        // The twin: without a bound of its own, the first user takes everything.
        let limits = Limits {
            of_user: 10,
            reserved: 0,
            ..limits
        };
        let all = Admission::new(limits);
        let (one, other) = (process(1_000), process(2_000));
        let taken: Vec<_> = (0..100).map_while(|_| all.admit(one)).collect();
        assert_eq!((taken.len(), all.admit(other).is_none()), (10, true));
        drop((first, taken));
        // A process of root that takes all it can leaves some for root's others. The twin: where none are reserved, it does not.
        for (admission, left) in [(admission, 2), (all, 0)] {
            let take =
                |process| -> Vec<_> { (0..100).map_while(|_| admission.admit(process)).collect() };
            let greedy = take(process(0));
            assert_eq!((greedy.len(), take(process(0)).len()), (10 - left, left));
        }
    }

    #[test]
    fn the_newest_connection_always_finds_a_place() {
        let cuts: Vec<_> = (0..6).map(|_| CancellationToken::new()).collect();
        let places = Places::new(2);
        let taken: Vec<_> = (1..)
            .zip(&cuts)
            .map(|(n, cut)| places.take(Connection(n), cut.clone()))
            .collect();
        let cut: Vec<_> = cuts.iter().map(CancellationToken::is_cancelled).collect();
        assert_eq!(cut, [true, true, true, true, false, false]);
        assert_eq!(taken.iter().filter(|(_, full)| *full).count(), 4);
        // Who leaves makes room, and those that were cut leave nothing behind.
        drop(taken);
        assert!(places.taken.lock().is_empty());
        let last = CancellationToken::new();
        let (_place, full) = places.take(Connection(7), last.clone());
        assert!(!full && !last.is_cancelled());
    }

    #[tokio::test]
    async fn a_connection_that_never_speaks_is_closed_and_one_that_has_spoken_is_not() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let silence = Duration::from_millis(1);
        let patience = Patience {
            silence,
            idle: IDLE,
        };
        let ends = || (CancellationToken::new(), Calls::default());
        let (_other, stream) = tokio::net::UnixStream::pair().unwrap();
        let mut silent = Known::new(stream, (), (), ends(), patience);
        let closed = silent.read_u8().await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::TimedOut);
        let (mut other, stream) = tokio::net::UnixStream::pair().unwrap();
        other.write_u8(1).await.unwrap();
        let mut speaks = Known::new(stream, (), (), ends(), patience);
        assert_eq!(speaks.read_u8().await.unwrap(), 1);
        tokio::time::sleep(silence * 10).await;
        let read = tokio::spawn(async move { speaks.read_u8().await });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!read.is_finished(), "it was closed although it has spoken");
        other.write_u8(2).await.unwrap();
        assert_eq!(read.await.unwrap().unwrap(), 2);
    }

    #[tokio::test]
    async fn a_connection_without_calls_is_closed_and_one_with_a_call_is_not() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let patience = Patience {
            silence: SILENCE,
            idle: Duration::from_millis(1),
        };
        let (mut other, stream) = tokio::net::UnixStream::pair().unwrap();
        let calls = Calls::default();
        let ends = (CancellationToken::new(), calls.clone());
        let mut known = Known::new(stream, (), (), ends, patience);
        let call = calls.begin();
        other.write_u8(1).await.unwrap();
        assert_eq!(known.read_u8().await.unwrap(), 1);
        let read = tokio::spawn(async move { known.read_u8().await });
        // As often as it would be looked at without a call.
        tokio::time::sleep(patience.idle * 10).await;
        assert!(!read.is_finished(), "it was closed in the middle of a call");
        let second = calls.begin();
        drop(call);
        tokio::time::sleep(patience.idle * 10).await;
        assert!(!read.is_finished(), "another call is under way");
        drop(second);
        let closed = read.await.unwrap().unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::TimedOut);
        // One that says something, and never calls.
        let (mut other, stream) = tokio::net::UnixStream::pair().unwrap();
        let ends = (CancellationToken::new(), Calls::default());
        let mut idle = Known::new(stream, (), (), ends, patience);
        other.write_u8(1).await.unwrap();
        assert_eq!(idle.read_u8().await.unwrap(), 1);
        let closed = idle.read_u8().await.unwrap_err();
        assert_eq!(closed.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn a_connection_that_is_cut_ends_whatever_its_other_end_does() {
        use tokio::io::AsyncReadExt;
        let (_other, stream) = tokio::net::UnixStream::pair().unwrap();
        let cut = CancellationToken::new();
        let ends = (cut.clone(), Calls::default());
        let mut connection = Known::new(stream, (), (), ends, PATIENCE);
        let read = tokio::spawn(async move { connection.read_u8().await });
        tokio::task::yield_now().await;
        assert!(!read.is_finished());
        cut.cancel();
        let ended = read.await.unwrap().unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::ConnectionAborted);
    }

    #[test]
    fn a_group_that_is_not_there_is_named() {
        let refused = group_id("socket_group", "no-such-group-here")
            .unwrap_err()
            .to_string();
        assert!(refused.contains("socket_group") && refused.contains("no-such-group-here"));
        assert_eq!(group_id("socket_group", "0").unwrap().as_raw(), 0);
    }
}
