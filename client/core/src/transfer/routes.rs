//! Routes: the streams to each memory, and which of them work.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;
use tracing::{info, warn};

use super::{
    breaker::{Breakers, RouteIndex, RouteNews, RouteSet},
    plan::Direction,
};
use crate::{
    Result,
    device::{CopyStream, DeviceLayer},
};

/// Where bytes come from or go to: one pair of streams for each, so that links work side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Device(DeviceUuid),
    Host,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(device) => device.fmt(f),
            Self::Host => f.write_str("host memory"),
        }
    }
}

/// The way to a source. It lasts as long as the routes it belongs to.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) source: Source,
    index: RouteIndex,
    load: Arc<dyn CopyStream>,
    store: Arc<dyn CopyStream>,
}

impl Route {
    /// The stream for copies out of the source, or the one for copies into it. Copies that must precede a write are queued with
    /// the writes: a slot whose old bytes are still being copied away on that stream can be taken again at once.
    pub(crate) fn stream(&self, direction: Direction) -> &Arc<dyn CopyStream> {
        match direction {
            Direction::Load => &self.load,
            Direction::Store => &self.store,
        }
    }

    /// Whether it is one of `routes`.
    pub(crate) fn is_in(&self, routes: RouteSet) -> bool {
        routes.contains(self.index)
    }
}

/// The routes from one device, and which of them work.
pub(crate) struct Routes {
    layer: Arc<dyn DeviceLayer>,
    device: DeviceUuid,
    list: Mutex<Vec<Arc<Route>>>,
    breakers: Mutex<Breakers>,
    /// The routes that are up, so that whoever asks for each block takes no lock.
    up: AtomicU64,
}

impl Routes {
    /// Routes for copies that `device` makes.
    pub(crate) fn new(layer: Arc<dyn DeviceLayer>, device: DeviceUuid) -> Self {
        Self {
            layer,
            device,
            list: Mutex::default(),
            breakers: Mutex::default(),
            up: AtomicU64::new(RouteSet::ALL.bits()),
        }
    }

    /// The way to a source.
    ///
    /// # Errors
    /// When the device gives no streams.
    pub(crate) fn to(&self, source: Source) -> Result<Arc<Route>> {
        let mut list = self.list.lock();
        if let Some(route) = list.iter().find(|route| route.source == source) {
            return Ok(Arc::clone(route));
        }
        let stream = || self.layer.stream(&self.device);
        let route = Arc::new(Route {
            source,
            index: RouteIndex(list.len()),
            load: stream()?,
            store: stream()?,
        });
        list.push(Arc::clone(&route));
        Ok(route)
    }

    /// Those that work, as far as is known.
    pub(crate) fn up(&self) -> RouteSet {
        RouteSet::of_bits(self.up.load(Ordering::Acquire))
    }

    /// How many do not work.
    pub(crate) fn down(&self) -> u32 {
        self.breakers.lock().down()
    }

    /// What the routes lead to that are not among these.
    pub(crate) fn sources_but(&self, routes: RouteSet) -> Vec<Source> {
        let list = self.list.lock();
        let others = list.iter().filter(|route| !route.is_in(routes));
        others.map(|route| route.source.clone()).collect()
    }

    /// Whether a route is down and to be tried now. Whoever is told so tries it: others are not, for a while.
    pub(crate) fn is_due(&self, route: &Route, now: Instant) -> bool {
        let mut breakers = self.breakers.lock();
        let due = breakers.is_due(route.index, now);
        if due {
            breakers.tries(route.index, now);
        }
        due
    }

    /// Copies have worked on these routes.
    pub(crate) fn worked(&self, routes: &[Arc<Route>]) {
        self.note(routes, Breakers::worked);
    }

    /// Copies have failed on these routes.
    pub(crate) fn failed(&self, routes: &[Arc<Route>]) {
        self.note(routes, Breakers::failed);
    }

    /// Whether none has failed since it last worked.
    pub(crate) fn all_work(&self) -> bool {
        self.breakers.lock().all_work()
    }

    /// Takes all for up: nobody uses them any more.
    pub(crate) fn forget(&self) {
        *self.breakers.lock() = Breakers::default();
        self.up.store(RouteSet::ALL.bits(), Ordering::Release);
    }

    fn note(
        &self,
        routes: &[Arc<Route>],
        happened: impl Fn(&mut Breakers, RouteIndex, Instant) -> Option<RouteNews>,
    ) {
        for route in routes {
            let mut breakers = self.breakers.lock();
            let news = happened(&mut breakers, route.index, Instant::now());
            self.up.store(breakers.up().bits(), Ordering::Release);
            drop(breakers);
            match news {
                Some(RouteNews::Down { pause }) => warn!(
                    source = %route.source, ?pause,
                    "copies fail repeatedly: nothing is found or stored there until one works"
                ),
                Some(RouteNews::Up) => info!(source = %route.source, "copies work again"),
                None => {}
            }
        }
    }
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&*self.list.lock()).finish()
    }
}
