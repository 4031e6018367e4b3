//! The link model: when a link of a given rate would be done with a copy.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{DeviceUuid, Link};

use super::arena::Place;

/// Rates of links, and until when each is busy.
#[derive(Debug)]
pub(super) struct LinkModel {
    bytes_per_second: HashMap<(DeviceUuid, DeviceUuid), u64>,
    host_bytes_per_second: u64,
    busy_until: Mutex<HashMap<Route, Instant>>,
}

/// What a copy occupies.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Route {
    Link(DeviceUuid, DeviceUuid),
    FromHost(DeviceUuid),
    ToHost(DeviceUuid),
}

impl LinkModel {
    pub(super) fn new(links: &[Link], host_bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: links
                .iter()
                .map(|link| ((link.from.clone(), link.to.clone()), link.bytes_per_second))
                .collect(),
            host_bytes_per_second,
            busy_until: Mutex::default(),
        }
    }

    /// When a copy of `bytes` that could start at `ready` ends; its link is busy until then. Copies on one device
    /// and links of unknown rate are not paced.
    pub(super) fn reserve(&self, from: &Place, to: &Place, bytes: u64, ready: Instant) -> Instant {
        let (route, rate) = match (from, to) {
            (Place::Device(from), Place::Device(to)) if from == to => return ready,
            (Place::Device(from), Place::Device(to)) => {
                let pair = (from.clone(), to.clone());
                // Without a link the bytes are staged through host memory.
                let rate = self.bytes_per_second.get(&pair);
                let rate = rate.copied().unwrap_or(self.host_bytes_per_second);
                (Route::Link(pair.0, pair.1), rate)
            }
            (Place::Host(_), Place::Device(to)) => {
                (Route::FromHost(to.clone()), self.host_bytes_per_second)
            }
            (Place::Device(from), Place::Host(_)) => {
                (Route::ToHost(from.clone()), self.host_bytes_per_second)
            }
            (Place::Host(_), Place::Host(_)) => return ready,
        };
        if rate == 0 {
            return ready;
        }
        let duration = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut busy_until = self.busy_until.lock();
        let free = busy_until.entry(route).or_insert(ready);
        *free = ready.max(*free) + duration;
        *free
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::LinkKind;

    use super::*;

    fn uuid(name: &str) -> DeviceUuid {
        name.parse().unwrap()
    }

    #[test]
    fn a_copy_takes_its_links_time_and_queues_behind_the_one_before() {
        let link = Link {
            from: uuid("A"),
            to: uuid("B"),
            kind: LinkKind::Nvlink,
            bytes_per_second: 1000,
        };
        let model = LinkModel::new(&[link], 100);
        let (a, b) = (Place::Device(uuid("A")), Place::Device(uuid("B")));
        let host = Place::Host(uuid("A"));
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);

        assert_eq!(model.reserve(&a, &b, 2000, now), after(2));
        assert_eq!(
            model.reserve(&a, &b, 1000, now),
            after(3),
            "the link is shared"
        );
        assert_eq!(
            model.reserve(&a, &b, 1000, after(9)),
            after(10),
            "and then idle"
        );
        assert_eq!(
            model.reserve(&b, &a, 100, now),
            after(1),
            "no link: staged by the host"
        );
        assert_eq!(model.reserve(&host, &a, 100, now), after(1));
        assert_eq!(
            model.reserve(&a, &host, 100, now),
            after(1),
            "directions are separate"
        );
        assert_eq!(
            model.reserve(&a, &a, 1 << 40, now),
            now,
            "HBM itself is not paced"
        );
    }
}
