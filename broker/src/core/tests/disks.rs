//! Disks: what they are told to write and to bring back, and who hears of what is on them.

use swiftcache_proto::domain::DeviceUuid;

use super::fixture::{BLOCK, Bench, SLAB, hash, hashes, node_with_host_memory};
use crate::core::{
    Caller, CoreConfig, DiskBlocks, DiskSays, DiskState, DiskTakes, Event, Keep, LeaseDemand,
    Lookup, Offer, Refusal, Reply,
};

fn bench() -> Bench {
    Bench::on(node_with_host_memory(), CoreConfig::default())
}

fn says(caller: Caller) -> DiskSays {
    DiskSays {
        caller,
        name: "DISK-0".to_owned(),
        anew: false,
        state: Some(DiskState {
            memory_bytes: 4 * BLOCK,
            bytes_per_second: 1_000 * BLOCK,
            ..DiskState::default()
        }),
        namespace: Some("model".to_owned()),
        block_bytes: BLOCK,
        stored: Vec::new(),
        dropped: Vec::new(),
    }
}

fn stores(bench: &mut Bench, caller: Caller, blocks: impl IntoIterator<Item = u64>) {
    bench.done(Event::DiskSays(DiskSays {
        stored: hashes(blocks),
        ..says(caller)
    }));
}

fn takes(
    bench: &mut Bench,
    caller: Caller,
    to_store: usize,
    wanted: usize,
) -> [Vec<DiskBlocks>; 2] {
    let takes = DiskTakes {
        caller,
        to_store,
        wanted,
    };
    match bench.apply(Event::DiskTakes(takes)) {
        Some(Reply::DiskWork { to_store, wanted }) => [to_store, wanted],
        other => panic!("{other:?}"),
    }
}

/// Found, coming, and for how long, milliseconds.
fn looks(bench: &mut Bench, caller: Caller, blocks: impl IntoIterator<Item = u64>) -> [u32; 3] {
    let lookup = Lookup {
        host_memory: true,
        device: Some(super::fixture::device(0)),
        ..Bench::lookup_of(caller, blocks)
    };
    match bench.apply(Event::Lookup(lookup)) {
        Some(Reply::Found {
            runs,
            coming,
            coming_ms,
            ..
        }) => [runs.iter().map(|run| run.blocks()).sum(), coming, coming_ms],
        other => panic!("{other:?}"),
    }
}

/// Publishes blocks in host memory.
fn in_host_memory(bench: &mut Bench, blocks: &[(u64, u32)]) -> Caller {
    let (donor, writer) = (bench.join("donor", ""), bench.join("writer", ""));
    bench.done(Event::Offer(Offer {
        device: DeviceUuid::of_host(0),
        ..Bench::offer_event(donor, 9, 0, 1)
    }));
    let (grants, _) = bench.demanded(LeaseDemand {
        host_bytes: SLAB,
        ..Bench::demand(writer, 0)
    });
    bench.publish(writer, &grants[0], blocks);
    writer
}

#[test]
fn what_lies_in_host_memory_is_to_be_written_once_and_only_by_its_tenants_disk() {
    let mut bench = bench();
    let (disk, strange) = (bench.join("disk", ""), bench.join("strange", "other"));
    stores(&mut bench, disk, [2]);
    stores(&mut bench, strange, []);
    let writer = in_host_memory(&mut bench, &[(1, 0), (2, 1), (3, 2)]);
    // Nobody has said yet what the blocks of another model look like: they wait.
    bench.done(Event::DiskSays(DiskSays {
        anew: true,
        ..says(disk)
    }));
    stores(&mut bench, disk, []);
    assert!(takes(&mut bench, disk, 100, 0)[0].is_empty());
    stores(&mut bench, disk, [2]);
    bench.done(Event::Keep(Keep {
        layer_bytes: vec![BLOCK / 2, BLOCK - BLOCK / 2],
        ..Bench::keep_of(writer, 1)
    }));
    let [to_store, wanted] = takes(&mut bench, disk, 100, 100);
    assert!(wanted.is_empty());
    assert_eq!(to_store.len(), 1);
    assert_eq!(to_store[0].hashes, hashes([1, 3]));
    assert_eq!(to_store[0].layer_bytes.iter().sum::<u64>(), BLOCK);
    for its in [disk, strange] {
        assert!(takes(&mut bench, its, 100, 100)[0].is_empty());
    }
    // A disk that begins anew is told of all that lies there.
    bench.done(Event::DiskSays(DiskSays {
        anew: true,
        ..says(disk)
    }));
    assert_eq!(takes(&mut bench, disk, 2, 0)[0][0].hashes.len(), 2);
    // The twin: layers that do not add up to a block are refused, and so nothing is written by them.
    let wrong = bench.refused(Event::Keep(Keep {
        layer_bytes: vec![BLOCK],
        block_bytes: BLOCK + 1,
        ..Bench::keep_of(writer, 2)
    }));
    assert!(matches!(
        wrong,
        Refusal::Invalid {
            field: "layer_bytes",
            ..
        }
    ));
}

#[test]
fn a_lookup_that_finds_blocks_only_on_disk_has_them_brought_back_once() {
    let mut bench = bench();
    let (disk, reader) = (bench.join("disk", ""), bench.join("reader", ""));
    stores(&mut bench, disk, [2, 3, 5]);
    in_host_memory(&mut bench, &[(1, 0), (4, 1)]);
    // 4 lies in memory behind what comes; 6 is nowhere.
    assert_eq!(looks(&mut bench, reader, 1..8), [1, 4, 3]);
    assert_eq!(looks(&mut bench, reader, 1..8), [1, 4, 3]);
    let [_, wanted] = takes(&mut bench, disk, 0, 2);
    assert_eq!(wanted[0].hashes, hashes([2, 3]));
    assert_eq!(looks(&mut bench, reader, 1..8), [1, 4, 3], "on its way");
    let [_, wanted] = takes(&mut bench, disk, 0, 9);
    assert_eq!(wanted[0].hashes, hashes([5]));
    // What was wrong on the disk is not on it, and nobody waits for it.
    bench.done(Event::DiskSays(DiskSays {
        dropped: vec![hash(2)],
        ..says(disk)
    }));
    assert_eq!(looks(&mut bench, reader, 1..8)[..2], [1, 0]);
    // No more is promised than comes into the memory that the disk leases.
    stores(&mut bench, disk, 10..20);
    assert_eq!(looks(&mut bench, reader, 10..20)[..2], [0, 4]);
    bench.done(Event::Leave(disk));
    assert_eq!(looks(&mut bench, reader, 10..20)[..2], [0, 0]);
}

#[test]
fn nobody_else_hears_of_what_is_on_a_disk() {
    let mut bench = bench();
    let (disk, reader) = (bench.join("disk", ""), bench.join("reader", ""));
    stores(&mut bench, disk, 1..5);
    let strange = bench.join("strange", "other");
    assert_eq!(looks(&mut bench, strange, 1..5)[..2], [0, 0]);
    let of = |caller, namespace: &str| Lookup {
        namespace: namespace.to_owned(),
        host_memory: true,
        ..Bench::lookup_of(caller, 1..5)
    };
    // An older client, which can map no host memory; another model; the disk itself.
    let old = Lookup {
        host_memory: false,
        ..of(reader, "model")
    };
    for lookup in [old, of(reader, "another"), of(disk, "model")] {
        let reply = bench.apply(Event::Lookup(lookup));
        assert!(matches!(reply, Some(Reply::Found { coming: 0, .. })));
    }
    assert!(takes(&mut bench, disk, 9, 9)[1].is_empty());
    // The twin.
    assert_eq!(looks(&mut bench, reader, 1..5)[..2], [0, 4]);
    let lookups = bench.state.counters().lookups;
    bench.apply(Event::Lookup(of(disk, "model")));
    assert_eq!(
        bench.state.counters().lookups,
        lookups,
        "a disk's are no use"
    );
    // Two disks of a tenant have two names.
    let second = bench.join("second", "");
    let taken = bench.refused(Event::DiskSays(says(second)));
    assert!(matches!(taken, Refusal::DiskTaken { .. }), "{taken:?}");
    assert_eq!(bench.state.disks().len(), 1);
}
