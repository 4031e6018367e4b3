//! What the parts of the cache share: its settings, its state, and the way to its threads.

use std::{
    any::Any,
    fmt,
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender},
    },
};

use parking_lot::Mutex;
use rand::Rng;
use swiftcache_proto::domain::BorrowerId;
use tracing::warn;

use super::{BorrowerConfig, PagedKv, state::State, write::Write};
use crate::{
    Error, Result,
    device::{self, Origin, Touching},
    leases::{Flight, Leases},
    session::Session,
    transfer::{Plans, Refused, Routes},
};

/// What the keeper is asked to do.
#[derive(Debug)]
pub(super) enum KeeperTask {
    /// The session is connected (again).
    Connected {
        restarted: bool,
    },
    /// The broker does not know yet what the host tier has.
    Tell,
    Stop,
}

/// A transfer whose owner did not wait for it.
pub(super) enum Leftover {
    Load {
        flight: Arc<Flight>,
        /// Keeps the blocks in place meanwhile.
        hit: Arc<dyn Any + Send + Sync>,
    },
    Write(Arc<Write>),
}

impl Leftover {
    pub(super) fn flight(&self) -> &Arc<Flight> {
        match self {
            Self::Load { flight, .. } => flight,
            Self::Write(write) => &write.flight,
        }
    }
}

pub(super) struct Core {
    pub(super) id: BorrowerId,
    /// A child of this process finds nothing and moves nothing.
    pub(super) origin: Origin,
    pub(super) session: Option<Session>,
    pub(super) config: BorrowerConfig,
    pub(super) leases: Arc<Leases>,
    pub(super) routes: Arc<Routes>,
    /// Taken before the leases' lock, and never while that is held.
    pub(super) state: Mutex<State>,
    pub(super) plans: Plans,
    pub(super) keeper: Sender<KeeperTask>,
    /// `None` stops the settling thread.
    pub(super) leftovers: Sender<Option<Leftover>>,
}

/// The receiving ends of the cache's threads.
pub(super) struct Inboxes {
    pub(super) keeper: Receiver<KeeperTask>,
    pub(super) leftovers: Receiver<Option<Leftover>>,
}

impl Core {
    pub(super) fn new(
        session: Option<Session>,
        leases: Arc<Leases>,
        routes: Arc<Routes>,
        config: BorrowerConfig,
    ) -> (Arc<Self>, Inboxes) {
        let (keeper, keeper_inbox) = mpsc::channel();
        let (leftovers, leftover_inbox) = mpsc::channel();
        let core = Arc::new(Self {
            id: (config.id).unwrap_or_else(|| BorrowerId(rand::rng().random())),
            origin: Origin::here(),
            session,
            config,
            leases,
            state: Mutex::new(State::new(Arc::clone(&routes))),
            routes,
            plans: Plans::default(),
            keeper,
            leftovers,
        });
        let inboxes = Inboxes {
            keeper: keeper_inbox,
            leftovers: leftover_inbox,
        };
        (core, inboxes)
    }

    /// An engine's pool, to queue copies with it: see [`PagedKv::touch`].
    pub(super) fn touch(&self, kv: &PagedKv) -> Result<Option<Touching>> {
        match self.origin.is_here() {
            true => kv.touch(&self.config.layout.layer_bytes),
            false => Err(Error::Forked),
        }
    }

    /// The session, while it is connected.
    pub(super) fn connected(&self) -> Option<&Session> {
        self.session
            .as_ref()
            .filter(|session| session.is_connected())
    }

    /// Some copies of a transfer could not be queued.
    pub(super) fn refused(&self, flight: &Flight, refused: &Refused) {
        warn!(error = %refused.error, "copies could not be queued");
        if self.routes.note_refusal(&flight.transfer, refused) {
            self.state.lock().counts.failed_operations += 1;
        }
    }

    /// A transfer is known to be over. Called without the state's lock.
    pub(super) fn ended(&self, flight: &Arc<Flight>, outcome: &device::Result<()>) {
        self.leases.end(flight);
        if self.routes.note_outcome(&flight.transfer, outcome) {
            self.state.lock().counts.failed_operations += 1;
        }
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Borrower({})", self.config.layout.namespace)
    }
}
