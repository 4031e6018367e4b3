//! The session with the node's broker: one connection over its Unix socket, registered, resumed after every loss,
//! and driven by one background thread.
//!
//! * [`Session`]: the typed calls (`rpc`), each a [`Call`] to await or to wait for.
//! * [`Observer`]: what the broker says unasked, on the session's thread.
//! * `connection`: one connection's life; `run`: the loop that replaces it, with backoff.

mod backoff;
mod call;
mod connection;
mod count;
mod fd;
mod grant;
mod index;
mod messages;
mod observer;
mod orphans;
mod report;
mod rpc;
mod run;

use std::{
    collections::HashMap,
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::{
    convert,
    domain::{Device, DeviceUuid, Generation, LeaseId, Link, PinId},
    v1,
};
use tokio_util::sync::CancellationToken;

pub use call::Call;
use connection::Connection;
pub use count::Counted;
pub use grant::{Grant, Opening};
pub use index::{Findable, IndexWatch};
pub use messages::{
    Asker, Coming, Demand, DiskBlocks, DiskCall, DiskWork, Found, Inheritance, Inherited, Keep,
    Leased, Left, OfferedRegion, Unpublished, WithdrawWhat, Withdrawing,
};
use observer::Observers;
pub use observer::{Connected, Held, Hold, Observer, Revocation, Scrub};
pub(crate) use orphans::Orphan;
use orphans::Orphans;
use report::Tally;
pub use rpc::is_lost;

use crate::{Error, Result, device::Origin};

/// How long [`Session::connect`] keeps trying.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Who connects, and where.
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// The broker's Unix socket.
    pub socket: PathBuf,
    /// For people: shown in status and logs. 1 to 128 bytes.
    pub name: String,
    /// Sub-division of the peer's tenant; may be empty. At most [`MAX_TENANT_BYTES`](swiftcache_proto::convert::MAX_TENANT_BYTES).
    pub tenant: String,
}

/// A session with the node's broker. Clones share it; when the last one goes, the session leaves.
#[derive(Clone)]
pub struct Session {
    shared: Arc<Shared>,
    /// Ends the background thread when the last clone goes.
    _life: Arc<Life>,
}

/// What clones of a session and its background thread share.
pub(crate) struct Shared {
    config: SessionConfig,
    /// A child of this process has no thread that would answer.
    origin: Origin,
    /// Counts connections: moves on the moment one is lost, before anything is said to the next.
    epoch: AtomicU64,
    /// The default drain window of the last broker, milliseconds.
    drain_ms: AtomicU32,
    link: Mutex<LinkState>,
    changed: Condvar,
    observers: Observers,
    /// As the broker told them; some may be over.
    holds: Mutex<HashMap<DeviceUuid, Hold>>,
    tally: Tally,
    orphans: Orphans,
    runtime: tokio::runtime::Handle,
    thread: Mutex<Option<thread::ThreadId>>,
}

enum LinkState {
    /// Not connected; `problem` is what the last attempt met.
    Down {
        problem: String,
        /// The broker refused for good: trying again will not help.
        refused: bool,
    },
    Up(Arc<Connection>),
    Closed,
}

struct Life {
    token: Option<CancellationToken>,
    origin: Origin,
}

impl Drop for Life {
    fn drop(&mut self) {
        let Some(token) = self.token.take() else {
            return;
        };
        match self.origin.is_here() {
            true => token.cancel(),
            // The session goes on in the process that it belongs to.
            false => std::mem::forget(token),
        }
    }
}

impl Session {
    /// Opens a session, waiting up to five seconds for the broker.
    ///
    /// # Errors
    /// When a field breaks its bound, when no broker answers, or when it refuses.
    pub fn connect(config: SessionConfig) -> Result<Self> {
        let session = Self::start(config)?;
        session.wait_connected(CONNECT_LIMIT)?;
        Ok(session)
    }

    /// Opens a session that connects in the background, now or when a broker appears. Until then every call
    /// fails at once.
    ///
    /// # Errors
    /// When a field breaks its bound, or the operating system refuses a thread.
    pub fn start(config: SessionConfig) -> Result<Self> {
        let bound = |result: std::result::Result<String, convert::InvalidField>| {
            result.map_err(|invalid| Error::config(invalid.field, invalid.problem))
        };
        bound(convert::text("name", &config.name, convert::MAX_NAME_BYTES))?;
        bound(convert::optional_text(
            "tenant",
            &config.tenant,
            convert::MAX_TENANT_BYTES,
        ))?;
        // One thread drives everything: unary calls over a Unix socket have far better tails there than on a
        // pool of workers.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::Thread)?;
        let life = CancellationToken::new();
        let shared = Arc::new(Shared {
            config,
            origin: Origin::here(),
            epoch: AtomicU64::new(1),
            drain_ms: AtomicU32::new(convert::DEFAULT_DRAIN_MS),
            link: Mutex::new(LinkState::Down {
                problem: "still connecting".to_owned(),
                refused: false,
            }),
            changed: Condvar::new(),
            observers: Observers::default(),
            holds: Mutex::default(),
            tally: Tally::default(),
            orphans: Orphans::default(),
            runtime: runtime.handle().clone(),
            thread: Mutex::new(None),
        });
        let (its_shared, its_life) = (Arc::clone(&shared), life.clone());
        thread::Builder::new()
            .name("swiftcache-session".to_owned())
            .spawn(move || {
                *its_shared.thread.lock() = Some(thread::current().id());
                runtime.block_on(run::run(&its_shared, its_life));
                // Calls still running end here, rather than hang.
                runtime.shutdown_background();
            })
            .map_err(Error::Thread)?;
        Ok(Self {
            shared,
            _life: Arc::new(Life {
                token: Some(life),
                origin: Origin::here(),
            }),
        })
    }

    /// What it was opened with.
    pub fn config(&self) -> &SessionConfig {
        &self.shared.config
    }

    /// Blocks until the session is connected.
    ///
    /// # Errors
    /// When it is not within `limit`, or the broker refuses it for good: what the last attempt met.
    pub fn wait_connected(&self, limit: Duration) -> Result<()> {
        self.check_origin()?;
        let deadline = Instant::now() + limit;
        let mut link = self.shared.link.lock();
        loop {
            match &*link {
                LinkState::Up(up) if up.announced.load(Ordering::Acquire) => return Ok(()),
                LinkState::Closed => return Err(Error::Closed),
                LinkState::Down { refused: true, .. } => return Err(self.shared.down(&link)),
                LinkState::Up(_) | LinkState::Down { .. } => {}
            }
            if (self.shared.changed.wait_until(&mut link, deadline)).timed_out() {
                return match &*link {
                    LinkState::Up(_) => Ok(()),
                    _ => Err(self.shared.down(&link)),
                };
            }
        }
    }

    /// Whether the session is connected now.
    pub fn is_connected(&self) -> bool {
        self.is_here() && matches!(&*self.shared.link.lock(), LinkState::Up(_))
    }

    /// Whether this is the process that opened the session. Otherwise it is a child of that process, in which every call fails at
    /// once: it has to open a session of its own.
    pub fn is_here(&self) -> bool {
        self.shared.origin.is_here()
    }

    fn check_origin(&self) -> Result<()> {
        match self.is_here() {
            true => Ok(()),
            false => Err(Error::Forked),
        }
    }

    /// What the last attempt to connect met, while there is no connection.
    pub fn problem(&self) -> Option<String> {
        if !self.is_here() {
            return Some(Error::Forked.to_string());
        }
        match &*self.shared.link.lock() {
            LinkState::Up(_) => None,
            down => Some(self.shared.down(down).to_string()),
        }
    }

    /// The broker's boot id, while connected.
    pub fn boot_id(&self) -> Option<u64> {
        self.check_origin().ok()?;
        match &*self.shared.link.lock() {
            LinkState::Up(connection) => Some(connection.boot_id),
            _ => None,
        }
    }

    /// The session's name for people, while connected.
    pub fn label(&self) -> Option<String> {
        self.check_origin().ok()?;
        match &*self.shared.link.lock() {
            LinkState::Up(connection) => Some(connection.session.label()),
            _ => None,
        }
    }

    /// The node's devices and links as the broker told them, while connected.
    pub fn node(&self) -> Option<(Vec<Device>, Vec<Link>)> {
        self.check_origin().ok()?;
        match &*self.shared.link.lock() {
            LinkState::Up(connection) => {
                Some((connection.devices.clone(), connection.links.clone()))
            }
            _ => None,
        }
    }

    /// The node's host memory, one device for each NUMA node, as the broker told it, while connected.
    pub fn host_devices(&self) -> Option<Vec<Device>> {
        self.check_origin().ok()?;
        match &*self.shared.link.lock() {
            LinkState::Up(connection) => Some(connection.host_devices.clone()),
            _ => None,
        }
    }

    /// Which connection this is. A reply that names an older one may speak of leases that the broker has since
    /// been told are not held.
    pub fn epoch(&self) -> u64 {
        self.shared.epoch.load(Ordering::SeqCst)
    }

    /// How long borrowers may take to move away when they are given `drain`: zero stands for the broker's default. It is
    /// the last broker's while there is none.
    pub fn drain_window(&self, drain: Duration) -> Duration {
        let asked = convert::drain_request_ms(drain);
        let default = self.shared.drain_ms.load(Ordering::Relaxed);
        let window = convert::drain_ms("drain", asked, default).unwrap_or(default);
        Duration::from_millis(window.into())
    }

    /// Adds an observer, for as long as it lives. It is told of connections from the next one on.
    pub fn observe(&self, observer: &Arc<dyn Observer>) {
        self.shared.observers.add(observer);
    }

    /// The device's hold, while it lasts. It outlives the connection by which it was told.
    pub fn hold(&self, device: &DeviceUuid) -> Option<Hold> {
        self.check_origin().ok()?;
        let hold = self.shared.holds.lock().get(device).copied();
        hold.filter(|hold| hold.until > Instant::now())
    }

    /// Acknowledges a revocation: nothing of this process touches the slab any more. Lost with the connection, in
    /// which case the broker asks again.
    pub fn acknowledge(&self, lease: LeaseId, generation: Generation) {
        self.shared.acknowledge(lease, generation);
    }

    /// Says that a slab is zeroed. Lost with the connection, in which case the broker asks again.
    pub fn scrubbed(&self, scrub: &Scrub) {
        self.shared
            .send(v1::session_request::Message::Scrubbed(v1::Scrubbed {
                region_id: scrub.region.0.to_vec().into(),
                slab: scrub.slab,
                generation: scrub.generation.0,
            }));
    }

    /// Says that the reads of these lookups are over.
    pub fn unpin(&self, pins: &[PinId]) {
        if !pins.is_empty() {
            self.shared
                .send(v1::session_request::Message::Unpin(v1::Unpin {
                    pin_ids: pins.iter().map(|pin| pin.0).collect(),
                }));
        }
    }
}

impl Shared {
    fn acknowledge(&self, lease: LeaseId, generation: Generation) {
        self.send(v1::session_request::Message::Acknowledge(v1::Acknowledge {
            lease_id: lease.0,
            generation: generation.0,
        }));
    }

    fn send(&self, message: v1::session_request::Message) {
        if !self.origin.is_here() {
            return;
        }
        if let LinkState::Up(connection) = &*self.link.lock() {
            connection.send(message);
        }
    }

    /// What to tell a caller while there is no connection.
    fn down(&self, link: &LinkState) -> Error {
        let problem = match link {
            LinkState::Down { problem, .. } => problem.clone(),
            LinkState::Up(_) => "the connection was lost".to_owned(),
            LinkState::Closed => return Error::Closed,
        };
        Error::Disconnected {
            socket: self.config.socket.clone(),
            problem,
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.shared.config.name)
    }
}
