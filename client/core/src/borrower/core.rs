//! What the parts of a borrower share: its settings, its state, its streams, and the way to its threads.

use std::{
    fmt,
    sync::{Arc, mpsc},
};

use parking_lot::Mutex;
use rand::Rng;
use swiftcache_proto::domain::{BorrowerId, DeviceUuid};

use super::{
    BorrowerConfig,
    drain::DrainTask,
    keeper::KeeperTask,
    mapping::Mappings,
    plan::Plan,
    routes::{RouteIndex, RouteSet},
    settle::Leftover,
    state::State,
};
use crate::{
    Result,
    device::{CopyStream, DeviceLayer},
    session::Session,
};

/// Where bytes come from or go to: one pair of streams for each, so that links work side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Device(DeviceUuid),
    Host,
}

/// For loads, and for stores.
pub(super) type Streams = [Arc<dyn CopyStream>; 2];

/// The way to a source.
#[derive(Clone, Debug)]
pub(super) struct Route {
    pub(super) index: RouteIndex,
    pub(super) streams: Streams,
}

pub(super) struct Core {
    pub(super) id: BorrowerId,
    pub(super) session: Option<Session>,
    pub(super) layer: Arc<dyn DeviceLayer>,
    pub(super) config: BorrowerConfig,
    pub(super) state: Mutex<State>,
    pub(super) mappings: Arc<Mappings>,
    routes: Mutex<Vec<(Source, Streams)>>,
    plans: Mutex<Vec<Plan>>,
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
        let core = Arc::new(Self {
            id: (config.id).unwrap_or_else(|| BorrowerId(rand::rng().random())),
            session,
            layer,
            config,
            state: Mutex::new(State::new()),
            mappings: Arc::default(),
            routes: Mutex::default(),
            plans: Mutex::default(),
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

    /// The way to a source, which lasts as long as the borrower.
    pub(super) fn route(&self, source: Source) -> Result<Route> {
        let mut routes = self.routes.lock();
        if let Some(at) = routes.iter().position(|(other, _)| *other == source) {
            return Ok(Route {
                index: RouteIndex(at),
                streams: routes[at].1.clone(),
            });
        }
        let stream = || self.layer.stream(&self.config.device);
        let streams = [stream()?, stream()?];
        routes.push((source, streams.clone()));
        Ok(Route {
            index: RouteIndex(routes.len() - 1),
            streams,
        })
    }

    /// The routes that these streams belong to, each once.
    pub(super) fn routes_of(&self, streams: &[Arc<dyn CopyStream>]) -> Vec<RouteIndex> {
        let has_one = |(_, pair): &&(Source, Streams)| {
            let mut pair = pair.iter();
            pair.any(|its| streams.iter().any(|stream| Arc::ptr_eq(its, stream)))
        };
        let routes = self.routes.lock();
        let its = (0..).zip(&*routes).filter(|(_, route)| has_one(route));
        its.map(|(at, _)| RouteIndex(at)).collect()
    }

    /// What the routes lead to that are not among these.
    pub(super) fn sources_but(&self, routes: RouteSet) -> Vec<Source> {
        if routes == RouteSet::ALL {
            return Vec::new();
        }
        let all = self.routes.lock();
        let others = (0..)
            .zip(&*all)
            .filter(|(at, _)| !routes.contains(RouteIndex(*at)));
        others.map(|(_, (source, _))| source.clone()).collect()
    }

    /// What a route leads to, for people.
    pub(super) fn source(&self, route: RouteIndex) -> String {
        match self.routes.lock().get(route.0) {
            Some((Source::Device(device), _)) => device.to_string(),
            Some((Source::Host, _)) => "host memory".to_owned(),
            None => "?".to_owned(),
        }
    }

    /// An empty plan, with the buffers of an earlier one.
    pub(super) fn plan(&self) -> Plan {
        self.plans.lock().pop().unwrap_or_default()
    }

    pub(super) fn put_back(&self, mut plan: Plan) {
        plan.clear();
        self.plans.lock().push(plan);
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Borrower({})", self.config.layout.namespace)
    }
}
