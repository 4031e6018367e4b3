//! What the parts of a borrower share: its settings, its state, its streams, and the way to its threads.

use std::{
    fmt,
    sync::{Arc, mpsc},
};

use parking_lot::Mutex;
use rand::Rng;
use swiftcache_proto::domain::BorrowerId;

use super::{
    BorrowerConfig, drain::DrainTask, keeper::KeeperTask, mapping::Mappings, settle::Leftover,
    state::State,
};
use crate::{
    device::DeviceLayer,
    session::Session,
    transfer::{Plans, Routes},
};

pub(super) struct Core {
    pub(super) id: BorrowerId,
    pub(super) session: Option<Session>,
    pub(super) layer: Arc<dyn DeviceLayer>,
    pub(super) config: BorrowerConfig,
    pub(super) state: Mutex<State>,
    pub(super) mappings: Arc<Mappings>,
    pub(super) routes: Arc<Routes>,
    pub(super) plans: Plans,
    pub(super) drains: mpsc::Sender<DrainTask>,
    pub(super) keeper: mpsc::Sender<KeeperTask>,
    /// `None` stops the settling thread.
    pub(super) leftovers: mpsc::Sender<Option<Leftover>>,
}

/// The receiving ends of a core's threads.
pub(super) struct Inboxes {
    pub(super) drains: mpsc::Receiver<DrainTask>,
    pub(super) keeper: mpsc::Receiver<KeeperTask>,
    pub(super) leftovers: mpsc::Receiver<Option<Leftover>>,
}

impl Core {
    pub(super) fn new(
        session: Option<Session>,
        layer: Arc<dyn DeviceLayer>,
        config: BorrowerConfig,
    ) -> (Arc<Self>, Inboxes) {
        let (drains, drain_inbox) = mpsc::channel();
        let (keeper, keeper_inbox) = mpsc::channel();
        let (leftovers, leftover_inbox) = mpsc::channel();
        let routes = Arc::new(Routes::new(Arc::clone(&layer), config.device.clone()));
        let core = Arc::new(Self {
            id: (config.id).unwrap_or_else(|| BorrowerId(rand::rng().random())),
            session,
            layer,
            config,
            state: Mutex::new(State::new(Arc::clone(&routes))),
            mappings: Arc::default(),
            routes,
            plans: Plans::default(),
            drains,
            keeper,
            leftovers,
        });
        let inboxes = Inboxes {
            drains: drain_inbox,
            keeper: keeper_inbox,
            leftovers: leftover_inbox,
        };
        (core, inboxes)
    }

    /// The session, while it is connected.
    pub(super) fn connected(&self) -> Option<&Session> {
        self.session
            .as_ref()
            .filter(|session| session.is_connected())
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Borrower({})", self.config.layout.namespace)
    }
}
