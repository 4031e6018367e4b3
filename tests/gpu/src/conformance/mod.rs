//! The promises that every backend must keep.

mod copies;
mod engines;
mod graphs;
mod memory;
mod peers;
mod processes;
mod spaces;
mod streams;

use anyhow::Result;

use crate::subject::Subject;

/// A promise: its name, and the check that a backend keeps it.
pub type Check = (&'static str, fn(&Subject) -> Result<()>);

/// All checks, in order. Those that break a device come last.
pub const CHECKS: &[Check] = &[
    (
        "devices are named and unknown ones refused",
        memory::devices,
    ),
    (
        "new memory is zeroed and counted",
        memory::zeroed_and_counted,
    ),
    ("more than there is is refused", memory::out_of_memory),
    ("host memory copies both ways", memory::host_memory),
    (
        "copies outside a memory are refused before any is queued",
        copies::bounds,
    ),
    ("extents arrive byte for byte", copies::extents),
    ("many small pieces arrive byte for byte", copies::scattered),
    ("one call copies pieces of many memories", copies::parts),
    ("copies cross devices", copies::across_devices),
    ("random pieces match a naive model", copies::random_pieces),
    ("zeroing touches its range only", copies::zeroing),
    ("a stream waits for another's ticket", streams::waits),
    ("streams run side by side", streams::concurrent),
    (
        "memory outlives its last handle while copies are queued",
        streams::lifetime,
    ),
    (
        "another process reads and writes an export",
        processes::shared,
    ),
    ("a wrong size is refused on import", processes::wrong_size),
    ("foreign handles are refused", processes::foreign_handles),
    ("only own allocations can be exported", processes::exports),
    (
        "a donor's bytes outlive it while mapped",
        processes::donor_killed,
    ),
    (
        "a borrower's death leaves the donor's bytes",
        processes::borrower_killed,
    ),
    (
        "an engine's stream and the layer's wait for each other",
        engines::streams_and_memory,
    ),
    (
        "an engine's pool lives as long as copies, and its stream is marked and gated",
        engines::foreign_pool_and_stream,
    ),
    (
        "an engine's pool is offered with its place in the allocation",
        engines::pool_on_offer,
    ),
    (
        "a part of an engine's pool is lent in place, zero before and after",
        engines::part_of_a_pool_lent,
    ),
    (
        "an engine's graph capture goes on while others map, copy, poll and let go",
        graphs::captured_while_others_work,
    ),
    (
        "an address space holds memories of every kind side by side",
        spaces::side_by_side,
    ),
    (
        "bytes of an address space move, and its addresses stay",
        spaces::moved,
    ),
    (
        "an address space refuses what it cannot map",
        spaces::refused,
    ),
    (
        "an address space gives its memories back",
        spaces::given_back,
    ),
    (
        "a lost device fails its streams for good",
        streams::lost_device,
    ),
];

/// The checks that need a second device whose memory the first one reaches ([`Subject::neighbour`]).
pub const PEER_CHECKS: &[Check] = &[
    (
        "a peer device's memory is copied both ways, byte for byte",
        peers::copies,
    ),
    (
        "a peer device's memory is read, written and zeroed in place",
        peers::direct,
    ),
    (
        "a peer device's bytes outlive their donor while mapped",
        peers::donor_killed,
    ),
    (
        "an importer makes no context on a peer device",
        peers::no_context,
    ),
    (
        "a peer device that a process does not enumerate is mapped by descriptor",
        peers::not_enumerated,
    ),
];

/// Runs the check with this name.
///
/// # Errors
/// When the backend breaks the promise, or there is no such check.
pub fn run(subject: &Subject, name: &str) -> Result<()> {
    let mut all = CHECKS.iter().chain(PEER_CHECKS);
    let check = all.find(|(candidate, _)| *candidate == name);
    let (_, check) = check.ok_or_else(|| anyhow::anyhow!("no check is called {name:?}"))?;
    check(subject)
}
