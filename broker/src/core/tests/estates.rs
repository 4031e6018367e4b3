//! What borrowers that are gone leave, who gets it, and what ends it.

use swiftcache_proto::domain::{LeaseId, Shortfall};

use super::fixture::*;
use crate::core::{
    Caller, CoreConfig, Event, EvictTarget, Forget, Grant, InheritDemand, Inherited, Need,
    Outgoing, QuotaTarget, Refusal, Reply, SetQuota,
};

/// A donor's slabs, and a session that holds two of them and has published two blocks in the first.
fn bench_with(config: CoreConfig, slabs: u64) -> (Bench, Caller, Caller, Vec<Grant>) {
    let mut bench = Bench::with(config);
    let donor = bench.join("donor", "1000");
    let lessee = bench.join("lessee", "1000");
    bench.offer(donor, 1, 1, slabs);
    let grants = bench.lease(lessee, 2);
    bench.publish(lessee, &grants[0], &[(1, 0), (2, 1)]);
    (bench, donor, lessee, grants)
}

fn bench(slabs: u64) -> (Bench, Caller, Caller, Vec<Grant>) {
    bench_with(CoreConfig::default(), slabs)
}

fn demand(caller: Caller) -> InheritDemand {
    InheritDemand {
        caller,
        namespace: "model".to_owned(),
        device: device(0),
        bytes: 64 * SLAB,
        host_bytes: 0,
        block_bytes: BLOCK,
    }
}

impl Bench {
    fn die(&mut self, caller: Caller) {
        self.apply(Event::ProcessGone(caller.process));
    }

    fn inherited(&mut self, demand: InheritDemand) -> (Vec<Inherited>, bool) {
        match self.apply(Event::Inherit(demand)) {
            Some(Reply::Inherited { leases, more }) => (leases, more),
            other => panic!("{other:?}"),
        }
    }

    fn inherits(&mut self, caller: Caller) -> Vec<LeaseId> {
        let (leases, _) = self.inherited(demand(caller));
        leases.iter().map(|its| its.grant.lease).collect()
    }

    fn estate(&self) -> u64 {
        self.state.total().estate
    }
}

#[test]
fn what_was_published_outlives_its_lessee_and_nothing_else_does() {
    let (mut bench, _, lessee, grants) = bench(4);
    bench.die(lessee);
    // The lease without a published block is free.
    let total = bench.state.total();
    assert_eq!(
        (total.estate, total.leased, total.free),
        (SLAB, 0, 3 * SLAB)
    );
    let leases: Vec<_> = bench.state.leases().collect();
    assert_eq!(leases.len(), 1);
    assert_eq!(leases[0].id, grants[0].lease);
    assert_eq!(leases[0].estate_left_ms, Some(600_000));
    // Whoever shares finds it at once.
    let heir = bench.join("heir", "1000");
    assert_eq!(bench.hits(heir, 1..4), 2);
    let (inherited, more) = bench.inherited(demand(heir));
    assert_eq!((inherited.len(), more), (1, false));
    assert_eq!(inherited[0].blocks, [(hash(1), 0), (hash(2), 1)]);
    assert_eq!(inherited[0].grant.generation, grants[0].generation);
    assert_eq!((bench.estate(), bench.state.total().leased), (0, SLAB));
    // It is the heir's as if it had leased and published it.
    let heir_grant = inherited[0].grant.clone();
    assert_eq!(bench.unpublish(heir, &heir_grant, &[1]), (vec![], 0));
    assert_eq!(bench.publish(heir, &heir_grant, &[(3, 1)]), [0u32; 0]);
    assert_eq!(bench.hits(heir, [1, 3]), 2);
    let counters = bench.state.counters();
    assert_eq!((counters.estate_leases, counters.inherited_leases), (1, 1));
}

/// The twin: what is not kept is free, and found by nobody.
#[test]
fn without_a_time_to_live_nothing_is_kept() {
    let config = CoreConfig {
        estate_ttl_ms: 0,
        ..CoreConfig::default()
    };
    let (mut bench, _, lessee, _) = bench_with(config, 4);
    bench.die(lessee);
    assert_eq!(bench.state.total().free, 4 * SLAB);
    let heir = bench.join("heir", "1000");
    assert_eq!(bench.hits(heir, 1..4), 0);
    assert!(bench.inherits(heir).is_empty());
}

#[test]
fn a_session_that_is_silent_or_leaves_leaves_no_estate_and_one_that_bequeaths_does() {
    let (mut bench, _, lessee, grants) = bench(4);
    let heir = bench.join("heir", "1000");
    bench.apply(Event::Detach(lessee.session));
    bench.tick(10_000);
    assert_eq!(bench.estate(), 0);
    assert!(bench.inherits(heir).is_empty());
    let give = |bench: &mut Bench, bequeath| {
        bench.done(Event::Release {
            caller: lessee,
            leases: grants.iter().map(|grant| grant.lease).collect(),
            unmappable: false,
            bequeath,
        });
    };
    give(&mut bench, true);
    assert_eq!(bench.estate(), SLAB);
    // Whoever gave it up is a stranger to it, though it lives.
    let refusal = bench.refused(Bench::publish_event(lessee, &grants[0], &[(5, 3)]));
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    assert_eq!(
        bench.resume(lessee, &[grants[0].lease], &[]).0,
        [grants[0].lease]
    );
    assert_eq!(bench.inherits(heir), [grants[0].lease]);
    bench.done(Event::Leave(heir));
    assert_eq!(bench.state.total().free, 4 * SLAB);
}

#[test]
fn each_lease_goes_to_one_heir_and_to_none_that_has_no_right_to_it() {
    let (mut bench, donor, lessee, grants) = bench(4);
    bench.publish(lessee, &grants[1], &[(3, 0)]);
    bench.die(lessee);
    let blue = bench.join("blue", "1000/blue");
    let other = bench.join("other", "2000");
    assert!(bench.inherits(blue).is_empty());
    assert!(bench.inherits(other).is_empty());
    assert_eq!(bench.hits(other, 1..4), 0);
    let heir = bench.join("heir", "1000");
    let of = |change: fn(&mut InheritDemand)| {
        let mut demand = demand(heir);
        change(&mut demand);
        demand
    };
    for stranger in [
        of(|its| its.namespace = "other".to_owned()),
        of(|its| its.block_bytes = BLOCK * 2),
        // No peer access to the donor's device.
        of(|its| its.device = device(3)),
        of(|its| its.bytes = SLAB - 1),
        // Nobody maps memory of its own.
        InheritDemand {
            caller: donor,
            ..demand(heir)
        },
    ] {
        assert_eq!(bench.inherited(stranger), (vec![], false));
    }
    // Two heirs, each with room for one.
    let twin = bench.join("twin", "1000");
    let one = InheritDemand {
        bytes: SLAB,
        ..demand(heir)
    };
    let first = bench.inherited(one).0;
    assert_eq!(first.len(), 1);
    let second = bench.inherits(twin);
    assert_eq!(second.len(), 1);
    assert_ne!(first[0].grant.lease, second[0]);
    assert!(bench.inherits(heir).is_empty());
}

#[test]
fn an_heir_writes_nothing_that_somebody_may_still_read() {
    let (mut bench, _, lessee, grants) = bench(4);
    let reader = bench.join("reader", "1000");
    assert_eq!(bench.hits(reader, 1..3), 2);
    let pin_ms = bench.config.pin_ms;
    assert_eq!(bench.unpublish(lessee, &grants[0], &[1]), (vec![1], pin_ms));
    bench.tick(1_000);
    bench.die(lessee);
    let heir = bench.join("heir", "1000");
    let (inherited, _) = bench.inherited(demand(heir));
    assert_eq!(inherited[0].blocks, [(hash(1), 0)]);
    assert_eq!(inherited[0].retry_ms, pin_ms - 1_000);
}

#[test]
fn what_an_heir_reads_already_it_does_not_get() {
    let (mut bench, _, lessee, grants) = bench(4);
    bench.die(lessee);
    let heir = bench.join("heir", "1000");
    assert_eq!(bench.hits(heir, 1..3), 2);
    // A pin alone is in nobody's way: without a share nothing is read under it.
    bench.share(heir, &grants[0]);
    assert!(bench.inherits(heir).is_empty());
    bench.release(heir, &[&grants[0]]);
    assert_eq!(bench.estate(), SLAB);
    assert_eq!(bench.inherits(heir), [grants[0].lease]);
}

#[test]
fn an_estate_ends_with_its_time_and_its_readers_are_asked() {
    let (mut bench, _, lessee, grants) = bench(4);
    let reader = bench.join("reader", "1000");
    bench.share(reader, &grants[0]);
    bench.die(lessee);
    bench.heard(reader);
    bench.tick(599_999);
    assert_eq!(bench.estate(), SLAB);
    bench.tick(1);
    let total = bench.state.total();
    assert_eq!((total.estate, total.draining), (0, SLAB));
    assert!(matches!(bench.heard(reader)[..], [Outgoing::Revoke { .. }]));
    bench.acknowledge(reader, &grants[0]);
    assert_eq!(bench.state.total().free, 4 * SLAB);
}

#[test]
fn whoever_lacks_a_slab_takes_an_estate_before_anybody_is_asked_for_one() {
    // One tenant: the slab is granted in the same breath.
    let (mut bench, _, lessee, grants) = bench(3);
    let alive = bench.join("alive", "1000");
    bench.lease(alive, 1);
    bench.die(lessee);
    assert_eq!(bench.estate(), SLAB);
    let asker = bench.join("asker", "1000");
    let mut got: Vec<_> = bench.lease(asker, 2).iter().map(|its| its.slab).collect();
    got.sort_unstable();
    let mut were: Vec<_> = grants.iter().map(|its| its.slab).collect();
    were.sort_unstable();
    assert_eq!(got, were);
    assert_eq!(bench.state.counters().revocations, 1);
    assert!(bench.heard(alive).is_empty());

    // Another tenant: it is zeroed first.
    let (mut bench, donor, lessee, _) = self::bench(3);
    let alive = bench.join("alive", "1000");
    bench.lease(alive, 1);
    bench.die(lessee);
    let asker = bench.join("asker", "2000");
    let (granted, shortfall) = bench.ask(asker, 2);
    assert_eq!((granted.len(), shortfall), (0, Shortfall::Scrubbing));
    assert_eq!(bench.estate(), 0);
    let scrubs = bench.heard(donor);
    let scrub = |said: &&Outgoing| matches!(said, Outgoing::Scrub { .. });
    assert_eq!(scrubs.iter().filter(scrub).count(), 2);
    assert!(bench.heard(alive).is_empty());
}

/// The twin: without an estate, the living are asked.
#[test]
fn without_an_estate_somebody_alive_is_asked() {
    let (mut bench, _, lessee, _) = bench(2);
    let asker = bench.join("asker", "2000");
    assert_eq!(bench.ask(asker, 1).0.len(), 0);
    assert!(matches!(bench.heard(lessee)[..], [Outgoing::Revoke { .. }]));
}

#[test]
fn a_donor_gets_an_estate_back_at_once_and_before_what_is_in_use() {
    let (mut bench, donor, lessee, _) = bench(2);
    bench.offer(donor, 2, 1, 2);
    let alive = bench.join("alive", "1000");
    let held = bench.lease(alive, 1);
    bench.publish(alive, &held[0], &[(9, 0)]);
    bench.die(lessee);
    let need = Need {
        device: device(1),
        bytes: SLAB,
        donor: None,
    };
    let preview = bench.state.preview_withdraw(&need).unwrap();
    assert_eq!(preview.regions[0].id, region(1));
    assert!(preview.leases[0].estate_left_ms.is_some());
    bench.heard(donor);
    bench.withdraw_region(donor, 1);
    assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
    assert_eq!(bench.estate(), 0);
    let heir = bench.join("heir", "1000");
    assert!(bench.inherits(heir).is_empty());
}

#[test]
fn operators_end_estates() {
    for way in 0..4 {
        let (mut bench, donor, lessee, grants) = bench(2);
        bench.die(lessee);
        let forget = |tenant: &str, namespace: &str| Forget {
            tenant: Some(tenant.to_owned()),
            namespace: Some(namespace.to_owned()),
        };
        let ended = match way {
            0 => Event::Evict(EvictTarget::Namespace("model".to_owned())),
            1 => Event::Evict(EvictTarget::Lease(grants[0].lease)),
            2 => Event::Drain {
                target: crate::core::DrainTarget::Donor(donor.session.label()),
                drain_ms: 100,
            },
            _ => {
                // Of others, nothing is dropped.
                for other in [forget("2000", "model"), forget("1000", "other")] {
                    let reply = bench.apply(Event::Forget(other));
                    assert!(matches!(reply, Some(Reply::Forgotten { leases: 0, .. })));
                }
                Event::Forget(forget("1000", "model"))
            }
        };
        assert_eq!(bench.estate(), SLAB);
        let reply = bench.apply(ended);
        if let Some(Reply::Forgotten {
            leases,
            bytes,
            blocks,
        }) = reply
        {
            assert_eq!((leases, bytes, blocks), (1, SLAB, 2));
        }
        assert_eq!((way, bench.state.total().free), (way, 2 * SLAB));
        assert_eq!(bench.state.indexed_blocks(), 0);
    }
}

#[test]
fn quotas_count_estates_and_end_them_first() {
    let (mut bench, _, lessee, _) = bench(4);
    let target = QuotaTarget::Tenant("1000".to_owned());
    let bytes = Some(SLAB);
    bench.apply(Event::SetQuota(SetQuota { target, bytes }));
    bench.die(lessee);
    let heir = bench.join("heir", "1000");
    // A slab is free, and the quota is used up by what is kept.
    assert_eq!(bench.lease(heir, 1).len(), 1);
    assert_eq!(bench.estate(), 0);
    assert_eq!(bench.ask(heir, 1).1, Shortfall::Quota);
    // An heir gets what counts already.
    let (mut bench, _, lessee, grants) = self::bench(4);
    bench.die(lessee);
    let target = QuotaTarget::Tenant("1000".to_owned());
    bench.apply(Event::SetQuota(SetQuota { target, bytes }));
    let heir = bench.join("heir", "1000");
    assert_eq!(bench.inherits(heir), [grants[0].lease]);
}

#[test]
fn a_full_index_ends_estates_first() {
    let config = CoreConfig {
        max_blocks: 3,
        ..CoreConfig::default()
    };
    let (mut bench, _, lessee, _) = bench_with(config, 4);
    bench.die(lessee);
    let other = bench.join("other", "1000");
    let grant = bench.lease(other, 1).remove(0);
    bench.publish(other, &grant, &[(7, 0)]);
    assert_eq!(bench.estate(), SLAB);
    bench.publish(other, &grant, &[(8, 1)]);
    assert_eq!((bench.estate(), bench.hits(other, 7..9)), (0, 2));
}

#[test]
fn an_estate_outlives_the_broker_and_one_that_nobody_noticed_is_free() {
    for compacted in [false, true] {
        let (mut bench, donor, lessee, grants) = bench(4);
        bench.die(lessee);
        if compacted {
            bench.ledger = bench.state.records();
        }
        bench.restart();
        bench.tick(1);
        assert_eq!(bench.estate(), SLAB);
        let heir = bench.join("heir", "1000");
        // Its donor has to come back first.
        assert_eq!(bench.inherited(demand(heir)), (vec![], true));
        bench.offer(donor, 1, 1, 4);
        assert_eq!(bench.hits(heir, 1..3), 2);
        let (inherited, _) = bench.inherited(demand(heir));
        assert_eq!(inherited[0].blocks, [(hash(1), 0), (hash(2), 1)]);
        // Pins of the broker before are unknown.
        assert!(inherited[0].retry_ms > 0);
        // What is inherited is published again, as any lessee does.
        bench.restart();
        bench.tick(1);
        assert_eq!((bench.estate(), bench.state.indexed_blocks()), (0, 0));
        let (refused, _) = bench.resume(heir, &[grants[0].lease], &[]);
        assert!(refused.is_empty());
    }
    // Broker and engine die together: nobody can say what is in the slabs.
    let (mut bench, donor, lessee, _) = bench(4);
    bench.restart();
    bench.offer(donor, 1, 1, 4);
    bench.die(lessee);
    assert_eq!(bench.state.total().free, 4 * SLAB);
}

#[test]
fn an_inheritance_comes_in_pages() {
    let config = CoreConfig {
        max_inherited: 1,
        ..CoreConfig::default()
    };
    let (mut bench, _, lessee, grants) = bench_with(config, 4);
    bench.publish(lessee, &grants[1], &[(3, 0)]);
    bench.die(lessee);
    let heir = bench.join("heir", "1000");
    let (first, more) = bench.inherited(demand(heir));
    assert_eq!((first.len(), more), (1, true));
    let (second, more) = bench.inherited(demand(heir));
    assert_eq!((second.len(), more), (1, false));
    assert_eq!(bench.hits(heir, 1..4), 3);
}
