//! Measures memory of another process on another GPU, as a borrower uses a donor's memory.

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, Memory};
use swiftcache_proto::domain::{DeviceUuid, HandleKind, LinkKind};

use super::{Bench, Course, Rows, copies, latencies, pipeline};
use crate::{engine::Place, peer::Peer};

const KIB: u64 = 1 << 10;

/// Sizes of scattered pieces, bytes.
const PIECES: [u64; 6] = [
    16 * KIB,
    32 * KIB,
    64 * KIB,
    256 * KIB,
    1024 * KIB,
    4096 * KIB,
];

/// The neighbour of the first GPU, and an allocation of the engine on it.
pub(super) struct Neighbour {
    owner: DeviceUuid,
    link: LinkKind,
    place: Place,
}

/// A donor process on the neighbour, and its memory, mapped for the first GPU.
pub(super) struct Lent {
    _donor: Peer,
    pub(super) memory: Memory,
    kind: HandleKind,
}

impl Neighbour {
    /// Finds the neighbour. On a machine where no GPU reaches another it says so and returns none, or fails when peers
    /// are required.
    pub(super) fn find(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<Option<Self>> {
        let (owner, link) = match bench.subject.neighbour() {
            Ok(found) => found,
            Err(problem) => {
                rows.say(&problem.excused()?);
                return Ok(None);
            }
        };
        let devices = bench.layer.devices().iter();
        let ordinal = devices
            .filter(|device| device.uuid == owner)
            .map(|device| device.ordinal)
            .next()
            .unwrap_or_default();
        let place = bench.engine.allocate_far(ordinal, bench.scale.memory)?;
        Ok(Some(Self { owner, link, place }))
    }

    /// Starts a donor on the neighbour, and maps the memory that it lends.
    pub(super) fn lend(&self, bench: &Bench<'_>, kind: HandleKind) -> Result<Lent> {
        let bytes = bench.scale.memory;
        let mut donor = Peer::start(bench.subject)?;
        let (_, export) = donor.donate(&self.owner, bytes, kind, None)?;
        let memory = (bench.layer).import(&bench.device, &self.owner, export, bytes)?;
        Ok(Lent {
            _donor: donor,
            memory,
            kind,
        })
    }

    /// The courses of both directions: from the peer, then to the peer.
    pub(super) fn courses<'a>(&self, bench: &'a Bench<'a>, lent: &'a Lent) -> [Course<'a>; 2] {
        let ours = &bench.memories[1];
        let near = bench.engine.near(bench.addresses[1]);
        let against = format!("plain peer copy over {}, peer access enabled", self.link);
        let course = |way: &str, from, to, plain_from, plain_to| Course {
            bench,
            prefix: "peer ",
            way: format!("{way} a peer ({}, {:?}), ", self.link, lent.kind),
            from,
            to,
            plain_from,
            plain_to,
            against: against.clone(),
        };
        [
            course("from", &lent.memory, ours, self.place, near),
            course("to", ours, &lent.memory, near, self.place),
        ]
    }
}

pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let Some(neighbour) = Neighbour::find(bench, rows)? else {
        return Ok(());
    };
    for (index, &kind) in bench.layer.handle_kinds().iter().enumerate() {
        let lent = neighbour.lend(bench, kind)?;
        for course in neighbour.courses(bench, &lent) {
            let outcome = copies::extents(&course, rows);
            rows.check("peer extents", outcome);
            // One handle kind is enough here: the kind with which an allocation was opened makes no difference to the
            // copies, whatever the size of their pieces.
            if index == 0 {
                let outcome = copies::scattered(&course, &PIECES, rows);
                rows.check("peer pieces", outcome);
                let outcome = copies::models(&course, rows);
                rows.check("peer blocks", outcome);
            }
        }
        if index == 0 {
            let place = format!("a peer ({}, {kind:?})", neighbour.link);
            let outcome = pipeline::across(bench, &lent.memory, &place, rows);
            rows.check("peer pipeline", outcome);
        }
        drop(lent);
        latencies::across(bench, &neighbour.owner, kind, rows)?;
    }
    Ok(())
}
