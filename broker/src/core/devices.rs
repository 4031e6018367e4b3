//! Devices, the links between them, and which of their regions can be lent from.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use swiftcache_proto::domain::{Device, DeviceUuid, LinkKind, RegionId};

use super::{
    Node, Refusal, account::Account, arena::Key, holds::Hold, regions::Region, state::State,
};

/// The tenant whose bytes a slab may still hold; `None` when it was never leased or has been zeroed.
pub(super) type Dirt = Option<Arc<str>>;

/// A region's place in the order in which regions are lent from: those in use before whole ones, so that whole ones
/// stay cheap to give back; then the fullest; then by id.
pub(super) type Rank = (bool, u64, RegionId, Key<Region>);

/// How one device reaches another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) kind: LinkKind,
    pub(super) bytes_per_second: u64,
}

#[derive(Clone, Debug)]
pub(super) struct DeviceState {
    pub(super) device: Device,
    /// An operator drains it.
    pub(super) drained: bool,
    /// An engine starts on it.
    pub(super) hold: Option<Hold>,
    /// Over all its regions.
    pub(super) account: Account,
    /// Over the regions that can be lent from.
    pub(super) lendable: Account,
    /// The regions that can be lent from and have a free slab, by what that slab may still hold.
    pub(super) free: BTreeMap<Dirt, BTreeSet<Rank>>,
    /// How many regions that can be lent from have slabs of this many bytes.
    pub(super) slab_sizes: BTreeMap<u64, u32>,
}

/// The node's devices under dense numbers.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    pub(super) list: Vec<DeviceState>,
    numbers: BTreeMap<DeviceUuid, usize>,
    /// From (row) to (column).
    paths: Vec<Option<Path>>,
}

impl Devices {
    pub(super) fn new(node: Node) -> Self {
        let list: Vec<_> = node
            .devices
            .into_iter()
            .map(|device| DeviceState {
                device,
                drained: false,
                hold: None,
                account: Account::default(),
                lendable: Account::default(),
                free: BTreeMap::new(),
                slab_sizes: BTreeMap::new(),
            })
            .collect();
        let numbers: BTreeMap<_, _> = list
            .iter()
            .enumerate()
            .map(|(number, state)| (state.device.uuid.clone(), number))
            .collect();
        let mut paths = vec![None; list.len() * list.len()];
        for number in 0..list.len() {
            paths[number * list.len() + number] = Some(Path {
                kind: LinkKind::SameDevice,
                bytes_per_second: u64::MAX,
            });
        }
        for link in node.links {
            if let (Some(from), Some(to)) = (numbers.get(&link.from), numbers.get(&link.to))
                && from != to
            {
                paths[from * list.len() + to] = Some(Path {
                    kind: link.kind,
                    bytes_per_second: link.bytes_per_second,
                });
            }
        }
        Self {
            list,
            numbers,
            paths,
        }
    }

    pub(super) fn number(&self, uuid: &DeviceUuid) -> Result<usize, Refusal> {
        self.numbers
            .get(uuid)
            .copied()
            .ok_or_else(|| Refusal::Unknown {
                what: "device",
                which: uuid.to_string(),
            })
    }

    pub(super) fn uuid(&self, number: usize) -> &DeviceUuid {
        &self.list[number].device.uuid
    }

    /// How `from` reaches `to`: as the same device or by peer access; `None` when it cannot.
    pub(super) fn path(&self, from: usize, to: usize) -> Option<Path> {
        self.link(from, to)
            .filter(|path| path.kind != LinkKind::Host)
    }

    /// The link from one device to another as the probe found it, peer access or not.
    pub(super) fn link(&self, from: usize, to: usize) -> Option<Path> {
        self.paths[from * self.list.len() + to]
    }

    /// The devices that `from` reaches, in tiers of equal links, best first.
    pub(super) fn tiers(&self, from: usize) -> Vec<(LinkKind, Vec<usize>)> {
        let mut reached: Vec<_> = (0..self.list.len())
            .filter_map(|to| Some((self.path(from, to)?, to)))
            .collect();
        reached
            .sort_by_key(|(path, to)| (path.kind, std::cmp::Reverse(path.bytes_per_second), *to));
        reached
            .chunk_by(|(a, _), (b, _)| a == b)
            .map(|tier| (tier[0].0.kind, tier.iter().map(|(_, to)| *to).collect()))
            .collect()
    }
}

impl State {
    /// Changes a region and keeps its device's accounts and lending order in step.
    pub(super) fn edit_region<R>(
        &mut self,
        key: Key<Region>,
        edit: impl FnOnce(&mut Region) -> R,
    ) -> R {
        self.unlist(key);
        let result = edit(&mut self.regions[key]);
        self.list(key);
        result
    }

    /// Whether new leases may be taken from the region.
    pub(super) fn can_lend(&self, region: &Region) -> bool {
        let donor_lends = |donor: &super::sessions::Session| {
            !donor.over && !self.drained_donors.contains(&region.donor.label())
        };
        region.handle.is_some()
            && !region.withdrawing
            && !region.drained
            && !self.devices.list[region.device].drained
            && self.sessions.get(&region.donor).is_some_and(donor_lends)
    }

    pub(super) fn unlist(&mut self, key: Key<Region>) {
        let region = &mut self.regions[key];
        let device = &mut self.devices.list[region.device];
        device.account -= region.account;
        let Some(rank) = region.listed.take() else {
            return;
        };
        device.lendable -= region.account;
        if let Some(count) = device.slab_sizes.get_mut(&region.slab_bytes) {
            *count -= 1;
            if *count == 0 {
                device.slab_sizes.remove(&region.slab_bytes);
            }
        }
        for dirt in region.free.keys() {
            if let Some(ranks) = device.free.get_mut(dirt) {
                ranks.remove(&rank);
                if ranks.is_empty() {
                    device.free.remove(dirt);
                }
            }
        }
    }

    pub(super) fn list(&mut self, key: Key<Region>) {
        let lends = self.can_lend(&self.regions[key]);
        let region = &mut self.regions[key];
        let device = &mut self.devices.list[region.device];
        device.account += region.account;
        if !lends {
            return;
        }
        let rank = region.rank(key);
        region.listed = Some(rank);
        device.lendable += region.account;
        *device.slab_sizes.entry(region.slab_bytes).or_default() += 1;
        for dirt in region.free.keys() {
            device.free.entry(dirt.clone()).or_default().insert(rank);
        }
    }
}
