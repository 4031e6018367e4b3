//! What becomes of a borrower when copies fail: the operation has failed, and a route that fails repeatedly is down.

use std::{sync::Arc, time::Instant};

use tracing::{debug, info, warn};

use super::{
    core::Core,
    op::{Op, Purpose},
    pipeline::Refused,
    routes::{RouteIndex, RouteNews, Routes},
    slab::Kind,
    state::State,
};
use crate::device::{CopyStream, Result};

impl Core {
    /// Some copies of an op could not be queued.
    pub(super) fn refused(&self, op: &Op, refused: &Refused) {
        match op.purpose {
            Purpose::Probe => debug!(error = %refused.error, "a route still fails"),
            purpose => warn!(error = %refused.error, ?purpose, "copies could not be queued"),
        }
        op.poison();
        let streams = refused.stream.as_slice();
        self.failed(op, streams);
    }

    /// An op that is over has worked or failed on every stream that it used. Called outside the state's lock.
    pub(super) fn note_outcome(&self, op: &Op, outcome: &Result<()>) {
        if outcome.is_err() {
            self.failed(op, &op.streams(false));
            return;
        }
        // What is known of a poisoned op is only that it is not in flight any more.
        if op.is_poisoned() || self.state.lock().routes.all_work() {
            return;
        }
        let routes = self.routes_of(&op.streams(true));
        let now = Instant::now();
        let mut state = self.state.lock();
        let news = (routes.into_iter()).filter_map(|route| state.routes.worked(route, now));
        let news = news.collect();
        drop(state);
        self.tell_of_routes(news);
    }

    fn failed(&self, op: &Op, streams: &[Arc<dyn CopyStream>]) {
        let routes = self.routes_of(streams);
        let now = Instant::now();
        let mut state = self.state.lock();
        if op.purpose != Purpose::Probe && op.note_failure() {
            state.counts.failed_operations += 1;
        }
        let routes = match op.purpose {
            Purpose::Move => state.suspects(op),
            Purpose::Load | Purpose::Store | Purpose::Probe => routes,
        };
        let news = (routes.into_iter()).filter_map(|route| state.routes.failed(route, now));
        let news = news.collect();
        drop(state);
        self.tell_of_routes(news);
    }

    /// A borrower that is closed has no routes, so none that is down.
    pub(super) fn forget_routes(&self) {
        self.state.lock().routes = Routes::default();
    }

    /// Tells people which routes went down or came back.
    fn tell_of_routes(&self, news: Vec<RouteNews>) {
        for news in news {
            match news {
                RouteNews::Down { route, pause } => warn!(
                    source = %self.source(route), ?pause,
                    "copies fail repeatedly: nothing is found or stored there until one works"
                ),
                RouteNews::Up { route } => {
                    info!(source = %self.source(route), "copies work again");
                }
            }
        }
    }
}

impl State {
    /// The route that a failed move is put down to. A move touches memory at both ends, on the stream of one of them. Between
    /// a donor and host memory it is the donor's; between donors nobody knows, and loads will show it.
    fn suspects(&self, op: &Op) -> Vec<RouteIndex> {
        let slabs = op.slabs.iter().filter_map(|slab| self.slabs.get(*slab));
        let donors = slabs.filter(|slab| slab.kind != Kind::Host);
        let mut routes: Vec<RouteIndex> = donors.map(|slab| slab.route).collect();
        routes.sort_unstable();
        routes.dedup();
        match routes.len() {
            1 => routes,
            _ => Vec::new(),
        }
    }
}
