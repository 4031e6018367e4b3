//! Nodes that a plan is for: known ones by name, or one from a topology.

use swiftcache_proto::{domain::LinkKind, topology::Topology};

use crate::{
    ReplayError,
    roofline::Gpu,
    serving::{LinkRates, Tier},
};

/// A node as a plan sees it, from the busy model's GPU, which is the first.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeShape {
    /// Its name.
    pub name: String,
    /// The type of every GPU.
    pub gpu: Gpu,
    /// The other GPUs, in the node's order: the tier that each one's memory would be.
    pub others: Vec<Tier>,
    /// The links' rates.
    pub rates: LinkRates,
}

/// A node known by name.
struct Known {
    name: &'static str,
    gpu: &'static str,
    gpus: usize,
    /// GPUs that NVLink reaches from the first, and its rate in one direction, bytes/s.
    nvlink: (usize, f64),
    /// The rate to the others over PCIe, bytes/s.
    pcie: f64,
}

/// Rates are about 85 % of the data sheets' for NVLink and 80 % for PCIe, which large copies reach.
const KNOWN: [Known; 5] = [
    Known {
        name: "hgx-h100",
        gpu: "h100-sxm",
        gpus: 8,
        nvlink: (7, 380e9),
        pcie: 50e9,
    },
    Known {
        name: "hgx-h200",
        gpu: "h200",
        gpus: 8,
        nvlink: (7, 380e9),
        pcie: 50e9,
    },
    Known {
        name: "hgx-a100",
        gpu: "a100-80g",
        gpus: 8,
        nvlink: (7, 255e9),
        pcie: 25e9,
    },
    Known {
        name: "pcie-h100-nvl",
        gpu: "h100-nvl",
        gpus: 4,
        nvlink: (1, 250e9),
        pcie: 50e9,
    },
    Known {
        name: "pcie-l40s",
        gpu: "l40s",
        gpus: 8,
        nvlink: (0, 25e9),
        pcie: 25e9,
    },
];

impl NodeShape {
    /// The names of the known nodes.
    pub fn names() -> String {
        KNOWN.map(|known| known.name).join(", ")
    }

    /// The node of that name.
    ///
    /// # Errors
    /// When there is none. The error lists all names.
    pub fn by_name(name: &str) -> Result<Self, String> {
        let known = KNOWN.iter().find(|known| known.name == name);
        let known = known.ok_or_else(|| {
            format!(
                "no node {name:?}; takes one of {}, or use --topology FILE",
                Self::names()
            )
        })?;
        let gpu = *Gpu::by_name(known.gpu)?;
        let (linked, rate) = known.nvlink;
        Ok(Self {
            name: known.name.to_owned(),
            gpu,
            others: (1..known.gpus)
                .map(|other| match other <= linked {
                    true => Tier::DonorNvlink,
                    false => Tier::DonorPcie,
                })
                .collect(),
            rates: LinkRates {
                nvlink: rate,
                pcie: known.pcie,
                host: gpu.host_bytes_per_second as f64,
            },
        })
    }

    /// A node of `gpu`s that are linked as a topology says: a bundled one by name, or a file.
    ///
    /// # Errors
    /// When the topology cannot be read.
    pub fn of_topology(name_or_path: &str, gpu: Gpu) -> Result<Self, ReplayError> {
        let topology = Topology::load(name_or_path)?;
        let busy = &topology.devices[0].uuid;
        let host = gpu.host_bytes_per_second as f64;
        let link = |other: &swiftcache_proto::domain::Device| {
            let mut links = topology.links.iter();
            links.find(|link| link.to == *busy && link.from == other.uuid)
        };
        let best = |kind: LinkKind| {
            let rates = topology.devices[1..].iter().filter_map(link);
            let rates = rates.filter(|link| link.kind == kind);
            let best = rates.map(|link| link.bytes_per_second).max();
            best.filter(|rate| *rate > 0)
                .map_or(host, |rate| rate as f64)
        };
        let tier = |other| link(other).map_or(Tier::DonorHost, |link| Tier::of_donor(link.kind));
        Ok(Self {
            name: topology.name.clone(),
            gpu,
            others: topology.devices[1..].iter().map(tier).collect(),
            rates: LinkRates {
                nvlink: best(LinkKind::Nvlink),
                pcie: best(LinkKind::Pcie),
                host,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_node_is_whole_and_an_unknown_one_is_answered_with_their_names() {
        for known in KNOWN {
            let node = NodeShape::by_name(known.name).unwrap();
            assert_eq!(node.others.len() + 1, known.gpus);
            let linked = node.others.iter().filter(|t| **t == Tier::DonorNvlink);
            assert_eq!(linked.count(), known.nvlink.0);
        }
        let error = NodeShape::by_name("abacus").unwrap_err();
        assert!(error.contains("hgx-h200") && error.contains("abacus"));
    }

    #[test]
    fn a_topology_gives_the_same_node_as_its_name() {
        let gpu = *Gpu::by_name("h100-sxm").unwrap();
        let file = NodeShape::of_topology("hgx-8", gpu).unwrap();
        let name = NodeShape::by_name("hgx-h100").unwrap();
        assert_eq!((file.others, file.rates), (name.others, name.rates));
        let pairs = NodeShape::of_topology("pcie-4", gpu).unwrap();
        assert_eq!(
            pairs.others,
            [Tier::DonorNvlink, Tier::DonorPcie, Tier::DonorPcie]
        );
    }
}
