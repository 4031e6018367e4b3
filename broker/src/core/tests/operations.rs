//! What operators do in a history.

use super::{
    fixture::region,
    history::{History, Outcome},
    steps::any_device,
};
use crate::core::{DrainTarget, Event, EvictTarget};
use swiftcache_proto::domain::LeaseId;

impl History {
    pub(super) fn drain(&mut self, a: u8, b: u8) -> Outcome {
        let target = self.drain_target(a, b);
        let drain_ms = u32::from(b);
        self.apply(Event::Drain { target, drain_ms }).map(drop)
    }

    pub(super) fn undrain(&mut self, a: u8, b: u8) -> Outcome {
        let target = self.drain_target(a, b);
        self.apply(Event::Undrain(target)).map(drop)
    }

    fn drain_target(&self, a: u8, b: u8) -> DrainTarget {
        let client = self.any_client(b);
        let label = client.as_ref().map(|client| client.caller.session.label());
        let offered = client.and_then(|client| client.offers.keys().next().copied());
        match a % 3 {
            0 => DrainTarget::Device(any_device(b)),
            1 => DrainTarget::Donor(label.unwrap_or_default()),
            _ => DrainTarget::Region(offered.unwrap_or(region(b.into()))),
        }
    }

    pub(super) fn evict(&mut self, a: u8, b: u8) -> Outcome {
        let client = self.any_client(b);
        let lease = client.and_then(|client| client.mapped.keys().next().copied());
        let target = match a % 2 {
            0 => EvictTarget::Namespace("model".to_owned()),
            _ => EvictTarget::Lease(lease.unwrap_or(LeaseId(u64::from(b)))),
        };
        self.apply(Event::Evict(target)).map(drop)
    }
}
