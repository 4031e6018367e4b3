//! Disks: what they are told to write and to bring back, and who hears of what is on them.

use std::collections::BTreeSet;

use proptest::prelude::*;
use swiftcache_proto::domain::{DeviceUuid, LeaseId};

use super::fixture::{BLOCK, Bench, SLAB, hash, hashes, node_with_host_memory};
use crate::core::{
    BlocksGone, Caller, CoreConfig, DiskBlocks, DiskSays, DiskState, DiskTakes, DrainTarget, Event,
    Grant, Keep, LeaseDemand, Lookup, Need, Refusal, Reply, WithdrawPreview,
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
    bench.offer_host(donor, 9, 1);
    let grant = lease_host(bench, writer);
    bench.publish(writer, &grant, blocks);
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

/// What asking back so many slabs of host memory would do.
fn preview(bench: &Bench, slabs: u64) -> (WithdrawPreview, BlocksGone) {
    let need = Need {
        device: DeviceUuid::of_host(0),
        bytes: slabs * SLAB,
        donor: None,
    };
    let preview = bench.state.preview_withdraw(&need).unwrap();
    let going: BTreeSet<LeaseId> = preview.leases.iter().map(|lease| lease.id).collect();
    let mut gone = BlocksGone::default();
    for lease in &going {
        let its = bench.state.blocks_gone(*lease, &going);
        gone.lost += its.lost;
        gone.on_disk += its.on_disk;
    }
    (preview, gone)
}

fn drain_host_memory(bench: &mut Bench) {
    let drained = bench.apply(Event::Drain {
        target: DrainTarget::Device(DeviceUuid::of_host(0)),
        drain_ms: 1_000,
    });
    assert!(matches!(drained, Some(Reply::Drained { .. })));
}

/// Leases host memory for a borrower of the model.
fn lease_host(bench: &mut Bench, caller: Caller) -> Grant {
    let (mut grants, _) = bench.demanded(LeaseDemand {
        host_bytes: SLAB,
        ..Bench::demand(caller, 0)
    });
    grants.remove(0)
}

#[test]
fn a_preview_counts_what_disks_agents_hold_and_what_is_left_for_them() {
    let mut bench = bench();
    let (donor, disk) = (bench.join("donor", ""), bench.join("disk", ""));
    for number in [1, 2, 3] {
        bench.offer_host(donor, number, 1);
    }
    let writer = bench.join("writer", "");
    lease_host(&mut bench, writer);
    lease_host(&mut bench, disk);
    // The twin: until it says that it has a disk, it is a borrower like any other.
    assert_eq!(preview(&bench, 3).0.disk_bytes, 0);
    stores(&mut bench, disk, [1]);
    let all = preview(&bench, 3).0;
    assert_eq!((all.disk_bytes, all.host_left_bytes), (SLAB, 0));
    let idle = preview(&bench, 1).0;
    assert!(idle.leases.is_empty());
    assert_eq!((idle.disk_bytes, idle.host_left_bytes), (0, 2 * SLAB));
    drain_host_memory(&mut bench);
    assert_eq!(preview(&bench, 1).0.host_left_bytes, 0, "it is drained");
}

#[test]
fn a_disk_is_named_as_what_lends_no_memory() {
    let mut bench = bench();
    let name = || -> DeviceUuid { "DISK-0".parse().unwrap() };
    let drain = || Event::Drain {
        target: DrainTarget::Device(name()),
        drain_ms: 1_000,
    };
    let need = || Need {
        device: name(),
        bytes: 1,
        donor: None,
    };
    // The twin: without a disk of this name nobody knows it.
    let unknown = |refusal| matches!(refusal, Refusal::Unknown { what: "device", .. });
    assert!(unknown(bench.refused(drain())));
    assert!(unknown(bench.state.preview_withdraw(&need()).unwrap_err()));
    let disk = bench.join("disk", "");
    stores(&mut bench, disk, [1]);
    for refusal in [
        bench.refused(drain()),
        bench.refused(Event::Undrain(DrainTarget::Device(name()))),
        bench.state.preview_withdraw(&need()).unwrap_err(),
    ] {
        let Refusal::Invalid { field, problem } = refusal else {
            panic!("{refusal:?}");
        };
        assert_eq!(field, "device_uuid");
        assert!(problem.contains("DISK-0, a disk"), "{problem}");
    }
    bench.done(Event::Leave(disk));
    assert!(unknown(bench.refused(drain())));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// What a preview says of blocks is what lookups say when the memory is gone: of host memory, with copies in it and in HBM,
    /// with the tenant's disk, and another tenant's.
    #[test]
    fn blocks_that_a_preview_calls_lost_are_those_that_no_lookup_finds_any_more(
        published in prop::collection::vec((0_usize..4, 0_u64..8), 0..24),
        on_disk in prop::collection::btree_set(0_u64..8, 0..8),
        on_others in prop::collection::btree_set(0_u64..8, 0..8),
    ) {
        let mut bench = bench();
        let donor = bench.join("donor", "");
        for number in [1, 2, 3] {
            bench.offer_host(donor, number, 1);
        }
        bench.offer(donor, 4, 1, 1);
        // Two that share, and one that keeps copies of its own.
        let writers = [0, 1, 2].map(|_| bench.join("writer", ""));
        bench.done(Event::Keep(Keep { shares: false, ..Bench::keep_of(writers[2], 9) }));
        let mut leases: Vec<_> = writers
            .iter()
            .map(|writer| (*writer, lease_host(&mut bench, *writer)))
            .collect();
        leases.push((writers[0], bench.lease(writers[0], 1).remove(0)));
        let mut slots = [0..4, 0..4, 0..4, 0..4];
        for (lease, number) in published {
            let (writer, grant) = &leases[lease];
            if let Some(slot) = slots[lease].next() {
                bench.publish(*writer, grant, &[(number, slot)]);
            }
        }
        let (disk, strange) = (bench.join("disk", ""), bench.join("strange", "other"));
        stores(&mut bench, disk, on_disk);
        stores(&mut bench, strange, on_others);
        let reader = bench.join("reader", "");
        let mut known = Vec::new();
        for number in 0..8 {
            if looks(&mut bench, reader, [number])[0] == 1 {
                known.push(number);
            }
        }
        let (_, gone) = preview(&bench, 3);
        drain_host_memory(&mut bench);
        let mut naive = BlocksGone::default();
        for number in known {
            match looks(&mut bench, reader, [number])[..2] {
                [0, 0] => naive.lost += 1,
                [0, 1] => naive.on_disk += 1,
                _ => {}
            }
        }
        prop_assert_eq!(gone, naive);
    }
}
