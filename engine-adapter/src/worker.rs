//! A cache's life: it opens on a thread of its own once the broker is there, and tries again until it is closed.

use std::{
    fmt,
    sync::Arc,
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex, RwLock};
use swiftcache_client::{
    Error,
    cache::{Borrower, BorrowerConfig, PagedKv},
    device::{Choice, DeviceLayer, Origin, Ticket, open_node},
    donor::{NotLent, PoolLender},
    session::{Connected, Observer, Session},
};
use swiftcache_proto::domain::DeviceUuid;
use tracing::{info, warn};

use crate::{
    failure::{Failure, Result},
    place::Place,
    pool::Pool,
    promised::{Lendable, UnusedRange},
    starter::Starter,
};

/// The shortest and the longest pause before opening is tried again.
const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// What a cache is told when it is made.
#[derive(Debug)]
pub(crate) struct Settings {
    /// Its device is a placeholder if `device` is not set.
    pub(crate) config: BorrowerConfig,
    /// The backend's first when not set.
    pub(crate) device: Option<DeviceUuid>,
    pub(crate) choice: Choice,
    /// How long borrowers may take to move away from what the engine lends.
    pub(crate) lend_drain: Duration,
}

/// A cache, open or not.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) settings: Settings,
    /// A child of this process finds and does nothing: it has none of the cache's threads.
    origin: Origin,
    phase: Mutex<Phase>,
    /// The phase, or the connection.
    changed: Condvar,
    /// Read by whoever uses it, written when it opens and closes: closing waits for uses, not for copies.
    opened: RwLock<Option<Opened>>,
    /// Held while a pool is adopted, so that the last one registered is the one in use.
    adopting: Mutex<()>,
    pub(crate) lending: Arc<PoolLender<Lendable>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    pub(crate) starter: Starter,
}

#[derive(Debug)]
struct Phase {
    /// Nothing once closed.
    session: Option<Session>,
    open: bool,
    /// Why it is not open, or has no pool.
    problem: String,
    pool: Option<Arc<Pool>>,
}

/// What an open cache has.
pub(crate) struct Opened {
    pub(crate) borrower: Arc<Borrower>,
    pub(crate) place: Arc<Place>,
    kv: Mutex<Option<Arc<PagedKv>>>,
}

impl Opened {
    /// The engine's pool, once it has been registered.
    pub(crate) fn kv(&self) -> Option<Arc<PagedKv>> {
        self.kv.lock().clone()
    }

    fn adopt(&self, pool: &Pool) -> Result<()> {
        let kv = pool.adopt(&*self.place.layer, &self.place.device)?;
        *self.kv.lock() = Some(Arc::new(kv));
        Ok(())
    }
}

impl Worker {
    pub(crate) fn start(session: Session, settings: Settings) -> Result<Arc<Self>> {
        let phase = Phase {
            session: Some(session.clone()),
            open: false,
            problem: String::new(),
            pool: None,
        };
        let worker = Arc::new(Self {
            settings,
            origin: Origin::here(),
            phase: Mutex::new(phase),
            changed: Condvar::new(),
            opened: RwLock::new(None),
            adopting: Mutex::new(()),
            lending: Arc::default(),
            thread: Mutex::new(None),
            starter: Starter::start()?,
        });
        let observer: Arc<dyn Observer> = Arc::clone(&worker) as _;
        session.observe(&observer);
        let its = Arc::clone(&worker);
        let thread = thread::Builder::new()
            .name("swiftcache-open".to_owned())
            .spawn(move || its.run(&session))
            .map_err(Error::Thread)?;
        *worker.thread.lock() = Some(thread);
        Ok(worker)
    }

    /// Layers of a block.
    pub(crate) fn layers(&self) -> usize {
        self.settings.config.layout.layer_bytes.len()
    }

    /// Uses it, if it is open.
    pub(crate) fn with_open<T>(&self, using: impl FnOnce(&Opened) -> Option<T>) -> Option<T> {
        if !self.is_here() {
            return None;
        }
        self.opened.read().as_ref().and_then(using)
    }

    /// Whether this is the process that opened it. Asked before any lock is taken.
    pub(crate) fn is_here(&self) -> bool {
        self.origin.is_here()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.is_here() && self.phase.lock().open
    }

    pub(crate) fn is_connected(&self) -> bool {
        if !self.is_here() {
            return false;
        }
        let phase = self.phase.lock();
        phase.session.as_ref().is_some_and(Session::is_connected)
    }

    pub(crate) fn wait_open(&self, limit: Duration) -> bool {
        if !self.is_here() {
            return false;
        }
        let deadline = Instant::now() + limit;
        let mut phase = self.phase.lock();
        while !phase.open && phase.session.is_some() {
            if self.changed.wait_until(&mut phase, deadline).timed_out() {
                break;
            }
        }
        phase.open
    }

    pub(crate) fn problem(&self) -> String {
        if !self.is_here() {
            return Error::Forked.to_string();
        }
        let phase = self.phase.lock();
        let Some(session) = &phase.session else {
            return "the cache is closed".to_owned();
        };
        if !phase.problem.is_empty() {
            return phase.problem.clone();
        }
        if !phase.open {
            return session
                .problem()
                .unwrap_or_else(|| "still opening".to_owned());
        }
        match &phase.pool {
            Some(_) => String::new(),
            None => "no pool is registered".to_owned(),
        }
    }

    /// Remembers where the pool is, and adopts it if there is something to adopt it with.
    pub(crate) fn set_pool(&self, pool: Pool) -> Result<()> {
        self.check_origin()?;
        let _adopting = self.adopting.lock();
        if let Some(opened) = &*self.opened.read() {
            opened.adopt(&pool)?;
        }
        let mut phase = self.phase.lock();
        if phase.session.is_some() {
            if phase.open {
                phase.problem.clear();
            }
            phase.pool = Some(Arc::new(pool));
        }
        Ok(())
    }

    fn check_origin(&self) -> Result<()> {
        match self.is_here() {
            true => Ok(()),
            false => Err(Error::Forked.into()),
        }
    }

    /// Lends ranges of the registered pool, once what the engine does there now is over.
    pub(crate) fn lend(
        &self,
        loan: u64,
        ranges: Vec<UnusedRange>,
        after: Option<Ticket>,
    ) -> Result<()> {
        self.check_origin()?;
        let pool = self.phase.lock().pool.clone();
        let pool = pool.ok_or_else(|| Failure::argument("ranges", "no pool is registered"))?;
        let ranges = pool.lendable(&ranges)?;
        (self.lending.lend(loan, ranges, after)).map_err(|not_lent| match not_lent {
            NotLent::Number(_) => Failure::argument("loan", not_lent),
            NotLent::Lent { index, .. } => Failure::argument(format!("ranges[{index}]"), not_lent),
            NotLent::Thread(error) => Error::Thread(error).into(),
        })
    }

    /// Stops opening, takes back what is lent, waits for copies, gives leases back and lets go of the pool. Every call
    /// returns only then.
    pub(crate) fn close(&self) {
        if !self.is_here() {
            return;
        }
        let (session, pool) = {
            let mut phase = self.phase.lock();
            phase.open = false;
            (phase.session.take(), phase.pool.take())
        };
        self.changed.notify_all();
        let mut thread = self.thread.lock();
        if let Some(thread) = thread.take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        self.lending.close();
        let opened = self.opened.write().take();
        drop((opened, pool, session));
    }

    fn run(&self, session: &Session) {
        let mut pause = PAUSES[0];
        loop {
            let (devices, links) = {
                let mut phase = self.phase.lock();
                loop {
                    if phase.session.is_none() {
                        return;
                    }
                    if let Some(node) = session.node() {
                        break node;
                    }
                    self.changed.wait(&mut phase);
                }
            };
            let opened = open_node(self.settings.choice, &devices, &links, None)
                .map_err(Error::from)
                .and_then(|layer| self.open(session, layer));
            match opened {
                Ok(opened) => {
                    let (layer, device) = (&opened.place.layer, &opened.place.device);
                    let drain = self.settings.lend_drain;
                    (self.lending).open(session.clone(), Arc::clone(layer), device.clone(), drain);
                    return self.install(opened);
                }
                Err(error) => {
                    let problem = error.to_string();
                    let mut phase = self.phase.lock();
                    if phase.problem != problem {
                        warn!(problem, "the cache does not open; trying again");
                        phase.problem = problem;
                    }
                    if phase.session.is_some() {
                        self.changed.wait_for(&mut phase, pause);
                    }
                    pause = PAUSES[1].min(pause * 2);
                }
            }
        }
    }

    fn open(
        &self,
        session: &Session,
        layer: Arc<dyn DeviceLayer>,
    ) -> std::result::Result<Opened, Error> {
        let first = layer.devices().first().map(|device| device.uuid.clone());
        let device = self.settings.device.clone().or(first);
        let mut config = self.settings.config.clone();
        if let Some(device) = device {
            config.device = device;
        }
        let device = config.device.clone();
        let borrower = Borrower::open(Some(session.clone()), Arc::clone(&layer), config)?;
        Ok(Opened {
            borrower,
            place: Arc::new(Place { layer, device }),
            kv: Mutex::new(None),
        })
    }

    /// Puts it to use, with the pool that was registered meanwhile.
    fn install(&self, opened: Opened) {
        let _adopting = self.adopting.lock();
        let pool = self.phase.lock().pool.clone();
        let adopted = pool.map_or(Ok(()), |pool| opened.adopt(&pool));
        let (backend, device) = (opened.place.layer.name(), opened.place.device.clone());
        *self.opened.write() = Some(opened);
        let mut phase = self.phase.lock();
        phase.problem = match adopted {
            Ok(()) => String::new(),
            Err(error) => {
                warn!(%error, "the engine's pool cannot be used: nothing is loaded or stored");
                error.to_string()
            }
        };
        // Closing waits for this thread, and then takes what was put there.
        phase.open = phase.session.is_some();
        drop(phase);
        self.changed.notify_all();
        info!(backend, %device, "the cache is open");
    }
}

impl Observer for Worker {
    fn connected(&self, _connected: &Connected) {
        // Under the lock that the opening thread looks under, or it could miss it.
        drop(self.phase.lock());
        self.changed.notify_all();
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opened({:?} on {:?})", self.borrower, self.place)
    }
}
