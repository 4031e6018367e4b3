//! The node's devices and the links between them. Nothing of it changes while the broker runs.
//!
//! Host memory is a device for each NUMA node. Every other device reaches it: a GPU over PCIe.

use std::collections::BTreeMap;

use swiftcache_proto::domain::{Device, DeviceUuid, Link, LinkKind, Medium};

use super::{config::Node, effect::Refusal};

/// How one device reaches another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Path {
    pub(super) kind: LinkKind,
    pub(super) bytes_per_second: u64,
}

/// The node's devices under dense numbers.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    list: Vec<Device>,
    /// The kind of memory that each has.
    media: Vec<Medium>,
    numbers: BTreeMap<DeviceUuid, usize>,
    /// From (row) to (column).
    links: Vec<Option<Path>>,
}

impl Devices {
    pub(super) fn new(node: Node) -> Self {
        let list = node.devices;
        let numbers: BTreeMap<_, _> = (list.iter().enumerate())
            .map(|(number, device)| (device.uuid.clone(), number))
            .collect();
        let mut links = vec![None; list.len() * list.len()];
        for number in 0..list.len() {
            links[number * list.len() + number] = Some(Path {
                kind: LinkKind::SameDevice,
                bytes_per_second: u64::MAX,
            });
        }
        for link in node.links {
            if let (Some(from), Some(to)) = (numbers.get(&link.from), numbers.get(&link.to))
                && from != to
            {
                links[from * list.len() + to] = Some(Path {
                    kind: link.kind,
                    bytes_per_second: link.bytes_per_second,
                });
            }
        }
        let media = list.iter().map(|device| device.uuid.medium()).collect();
        Self {
            list,
            media,
            numbers,
            links,
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

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.list.len()
    }

    pub(super) fn get(&self, number: usize) -> &Device {
        &self.list[number]
    }

    pub(super) fn uuid(&self, number: usize) -> &DeviceUuid {
        &self.list[number].uuid
    }

    /// The kind of memory that a device has.
    pub(super) fn medium(&self, number: usize) -> Medium {
        self.media[number]
    }

    /// How `from` reaches `to`: as the same device, by peer access, or because `to` is host memory; `None` when it cannot.
    pub(super) fn path(&self, from: usize, to: usize) -> Option<Path> {
        match (self.media[from], self.media[to]) {
            // A disk's agent works in host memory of one NUMA node, and reaches that of all.
            (_, Medium::Host) if from != to => Some(Path {
                kind: LinkKind::Host,
                bytes_per_second: 0,
            }),
            _ => (self.link(from, to)).filter(|path| path.kind != LinkKind::Host),
        }
    }

    fn link(&self, from: usize, to: usize) -> Option<Path> {
        self.links[from * self.list.len() + to]
    }

    /// The links between different devices as the probe found them, with peer access or not.
    pub(super) fn links(&self) -> Vec<Link> {
        let count = self.list.len();
        let pairs = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
        let apart = pairs.filter(|(from, to)| from != to);
        let links = apart.filter_map(|(from, to)| {
            let path = self.link(from, to)?;
            Some(Link {
                from: self.uuid(from).clone(),
                to: self.uuid(to).clone(),
                kind: path.kind,
                bytes_per_second: path.bytes_per_second,
            })
        });
        links.collect()
    }

    /// The devices of a kind of memory that `from` reaches, in tiers of equal links, best first.
    pub(super) fn tiers(&self, from: usize, medium: Medium) -> Vec<(LinkKind, Vec<usize>)> {
        let mut reached: Vec<_> = (0..self.list.len())
            .filter(|to| self.media[*to] == medium)
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
