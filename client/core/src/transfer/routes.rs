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
use swiftcache_proto::domain::{DeviceUuid, Medium};
use tracing::{info, warn};

use super::{
    breaker::{Breakers, RouteIndex, RouteNews, RouteSet},
    pipeline::Refused,
    queueing::Transfer,
    route::Route,
};
use crate::{
    Result,
    device::{self, DeviceLayer},
};

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

    /// The way to the memory of `device`, or to host memory.
    ///
    /// # Errors
    /// When the device gives no streams.
    pub(crate) fn to(&self, medium: Medium, device: &DeviceUuid) -> Result<Arc<Route>> {
        let mut list = self.list.lock();
        let same = |route: &&Arc<Route>| route.medium == medium && route.device == *device;
        if let Some(route) = list.iter().find(same) {
            return Ok(Arc::clone(route));
        }
        let stream = || self.layer.stream(&self.device);
        let route = Arc::new(Route {
            medium,
            device: device.clone(),
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

    /// The routes that are not among these.
    pub(crate) fn all_but(&self, routes: RouteSet) -> Vec<Arc<Route>> {
        let list = self.list.lock();
        let others = list.iter().filter(|route| !route.is_in(routes));
        others.cloned().collect()
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

    /// Some copies of a transfer could not be queued: it is worth nothing. True when nobody has noted a failure of it before.
    pub(crate) fn note_refusal(&self, transfer: &Transfer, refused: &Refused) -> bool {
        transfer.poison();
        self.note(refused.suspect.as_slice(), Breakers::failed);
        transfer.note_failure()
    }

    /// A transfer that is over has worked or failed on every route that it used. True when it has failed, and nobody has noted
    /// that before.
    pub(crate) fn note_outcome(&self, transfer: &Transfer, outcome: &device::Result<()>) -> bool {
        if outcome.is_err() {
            self.note(&transfer.failed_on(), Breakers::failed);
            return transfer.note_failure();
        }
        // What is known of a poisoned one is only that it is not in flight any more.
        if !transfer.is_poisoned() && !self.breakers.lock().all_work() {
            self.note(&transfer.worked_on(), Breakers::worked);
        }
        false
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
                    source = %route, ?pause,
                    "copies fail repeatedly: nothing is found or stored there until one works"
                ),
                Some(RouteNews::Up) => info!(source = %route, "copies work again"),
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
