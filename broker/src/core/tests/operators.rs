//! What operators ask and set: what a withdrawal would do, quotas, and holds.

use swiftcache_proto::domain::{RegionId, SessionId, Shortfall};

use super::fixture::*;
use crate::core::{
    Caller, Connection, CoreConfig, DrainTarget, Effect, Event, HoldDemand, HoldId, LeaseDemand,
    Need, Note, Outgoing, Process, QuotaTarget, Record, Refusal, Register, Reply, SetQuota,
    WithdrawWhat,
};

fn need(donor: Option<Caller>, slabs: u64) -> Need {
    Need {
        device: device(1),
        bytes: slabs * SLAB,
        donor: donor.map(|donor| donor.session.label()),
    }
}

/// Two donors on device 1 and a borrower that filled some of each.
fn lent() -> (Bench, [Caller; 2], Caller) {
    let mut bench = Bench::new();
    let donors = [bench.join("first", "1000"), bench.join("second", "1000")];
    let borrower = bench.join("borrower", "1000");
    for number in 1..=3 {
        bench.offer(donors[0], number, 1, 2);
        bench.offer(donors[1], 10 + number, 1, 1);
    }
    bench.offer(donors[0], 20, 2, 8);
    let grants = bench.lease(borrower, 8);
    for (number, grant) in (0..).zip(&grants) {
        let blocks: Vec<_> = (0..number % 4)
            .map(|slot| (u64::from(10 * number + slot), slot))
            .collect();
        bench.publish(borrower, grant, &blocks);
    }
    bench.now += 10;
    bench.hits(borrower, 10..11);
    (bench, donors, borrower)
}

fn regions_revoked(bench: &Bench) -> Vec<u64> {
    let leases = bench.effects.iter().filter_map(|effect| match effect {
        Effect::Note(Note::Revoked { lease, .. }) => Some(lease.0),
        _ => None,
    });
    leases.collect()
}

#[test]
fn a_withdrawal_does_what_its_preview_said() {
    for slabs in 1..=7 {
        let (mut bench, [donor, _], _) = lent();
        let records = bench.state.records();
        let preview = bench
            .state
            .preview_withdraw(&need(Some(donor), slabs))
            .unwrap();
        let regions: Vec<RegionId> = preview.regions.iter().map(|region| region.id).collect();
        let leases: Vec<u64> = preview.leases.iter().map(|lease| lease.id.0).collect();
        assert!(!leases.is_empty() && !regions.contains(&region(20)));
        assert_eq!(bench.state.records(), records, "a preview changes nothing");
        let what = WithdrawWhat::Bytes {
            device: device(1),
            bytes: slabs * SLAB,
        };
        assert_eq!(bench.withdraw(donor, what), regions);
        assert_eq!(regions_revoked(&bench), leases);
        // What is on its way back already is not promised again.
        let rest = bench
            .state
            .preview_withdraw(&need(Some(donor), 100))
            .unwrap();
        assert!(
            rest.regions
                .iter()
                .all(|region| !regions.contains(&region.id))
        );
        assert_eq!(rest.regions.len() + regions.len(), 3);
    }
}

#[test]
fn a_device_is_asked_across_its_donors() {
    let (bench, donors, _) = lent();
    let all = bench.state.preview_withdraw(&need(None, 100)).unwrap();
    assert_eq!(all.regions.len(), 6, "not those on other devices");
    let cheapest = bench.state.preview_withdraw(&need(None, 1)).unwrap();
    let of_each = donors.map(|donor| {
        let preview = bench.state.preview_withdraw(&need(Some(donor), 1)).unwrap();
        preview.regions[0].id
    });
    assert!(of_each.contains(&cheapest.regions[0].id));
    assert_ne!(of_each[0], of_each[1]);
}

#[test]
fn a_preview_names_what_is_wrong_with_the_question() {
    let (bench, _, _) = lent();
    let ask = |need| bench.state.preview_withdraw(&need).unwrap_err();
    assert!(matches!(
        ask(need(None, 0)),
        Refusal::Invalid { field: "bytes", .. }
    ));
    let nobody = Need {
        donor: Some("ffff".to_owned()),
        ..need(None, 1)
    };
    assert!(matches!(
        ask(nobody),
        Refusal::Unknown { what: "donor", .. }
    ));
    let nowhere = Need {
        device: device(9),
        ..need(None, 1)
    };
    assert!(matches!(
        ask(nowhere),
        Refusal::Unknown { what: "device", .. }
    ));
}

fn set(bench: &mut Bench, target: QuotaTarget, slabs: Option<u64>) -> u64 {
    let bytes = slabs.map(|slabs| slabs * SLAB);
    match bench.apply(Event::SetQuota(SetQuota { target, bytes })) {
        Some(Reply::QuotaSet { leased_bytes }) => leased_bytes / SLAB,
        other => panic!("{other:?}"),
    }
}

fn model() -> QuotaTarget {
    QuotaTarget::Namespace("model".to_owned())
}

/// A node with a configured quota of three slabs a namespace, ten slabs on offer, and a tenant's borrower.
fn bounded() -> (Bench, Caller, Caller) {
    let mut bench = Bench::with(CoreConfig {
        namespace_quota_bytes: Some(3 * SLAB),
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    bench.offer(donor, 1, 1, 10);
    let borrower = bench.join("borrower", "1000");
    (bench, donor, borrower)
}

#[test]
fn a_namespace_quota_takes_the_place_of_the_configured_one() {
    let (mut bench, _, borrower) = bounded();
    assert_eq!(bench.ask(borrower, 9).0.len(), 3);
    assert_eq!(set(&mut bench, model(), Some(5)), 3);
    let (grants, shortfall) = bench.ask(borrower, 9);
    assert_eq!((grants.len(), shortfall), (2, Shortfall::Quota));
    // Nothing is revoked by a smaller one, and nothing granted.
    assert_eq!(set(&mut bench, model(), Some(1)), 5);
    assert_eq!(regions_revoked(&bench), [0u64; 0]);
    assert_eq!(bench.ask(borrower, 1), (Vec::new(), Shortfall::Quota));
    let view = bench.state.namespaces().next().unwrap();
    assert_eq!(
        (view.quota_bytes, view.leased_bytes),
        (Some(SLAB), 5 * SLAB)
    );
    assert_eq!(set(&mut bench, model(), None), 5);
    let view = bench.state.namespaces().next().unwrap();
    assert_eq!(view.quota_bytes, Some(3 * SLAB));
    assert_eq!(bench.state.quotas().count(), 0);
}

#[test]
fn a_tenant_quota_bounds_its_namespaces_together_and_nobody_else() {
    let (mut bench, _, borrower) = bounded();
    let other = bench.join("other", "2000");
    set(&mut bench, QuotaTarget::Tenant("1000".to_owned()), Some(4));
    bench.lease(borrower, 3);
    let second = LeaseDemand {
        namespace: "second".to_owned(),
        ..Bench::demand(borrower, 3)
    };
    let (grants, shortfall) = bench.demanded(second);
    assert_eq!((grants.len(), shortfall), (1, Shortfall::Quota));
    bench.lease(other, 3);
}

/// Labels are the caller's own invention, so a user has one quota under all of them.
#[test]
fn a_users_quota_bounds_all_labels_of_the_user_together() {
    let (mut bench, _, borrower) = bounded();
    let labelled: Vec<_> = (0..8)
        .map(|number| bench.join("labelled", &format!("1000/{number}")))
        .collect();
    let other = bench.join("other", "10001");
    // The twin: quotas of the labels alone add up.
    let label = QuotaTarget::Tenant("1000/0".to_owned());
    assert_eq!(set(&mut bench, label.clone(), Some(1)), 0);
    let granted = |bench: &mut Bench, caller| bench.ask(caller, 1).0.len();
    assert_eq!(granted(&mut bench, labelled[0]), 1);
    assert_eq!(granted(&mut bench, labelled[1]), 1);
    assert_eq!(granted(&mut bench, borrower), 1);
    let user = QuotaTarget::Tenant("1000".to_owned());
    assert_eq!(set(&mut bench, user, Some(4)), 3);
    assert_eq!(granted(&mut bench, labelled[2]), 1);
    for caller in labelled.iter().copied().chain([borrower]) {
        assert_eq!(bench.ask(caller, 1), (Vec::new(), Shortfall::Quota));
    }
    // A uid that begins with the same digits is another user.
    assert_eq!(granted(&mut bench, other), 1);
}

#[test]
fn a_quota_is_set_for_a_user_or_for_a_label_that_has_a_session() {
    let (mut bench, ..) = bounded();
    let of = |tenant: &str, bytes| {
        let target = QuotaTarget::Tenant(tenant.to_owned());
        Event::SetQuota(SetQuota { target, bytes })
    };
    for nobody in [
        "1000/batch",
        "batch",
        "",
        "/",
        "-1",
        "1000x",
        "01000",
        "+1000",
        "01000/batch",
    ] {
        let refused = bench.refused(of(nobody, Some(1)));
        let fits = matches!(
            refused,
            Refusal::Unknown { what: "tenant", .. }
                | Refusal::Invalid {
                    field: "tenant",
                    ..
                }
        );
        assert!(fits, "{nobody:?}: {refused:?}");
        // It can be taken back, since one may have been set before its sessions ended.
        assert!(bench.apply(of(nobody, None)).is_some());
    }
    bench.join("labelled", "1000/batch");
    for somebody in ["1000/batch", "1000", "77"] {
        let set = bench.apply(of(somebody, Some(1)));
        assert!(
            matches!(set, Some(Reply::QuotaSet { .. })),
            "{somebody}: {set:?}"
        );
    }
}

#[test]
fn a_label_that_two_sessions_have_is_refused_as_ambiguous() {
    let (mut bench, donor, _) = bounded();
    let label = donor.session.label();
    let drain = |label: &str| Event::Drain {
        target: DrainTarget::Donor(label.to_owned()),
        drain_ms: 100,
    };
    let twin = SessionId(donor.session.0 + 1);
    assert_eq!(twin.label(), label);
    let register = Register {
        process: Process {
            pid: 4_711,
            birth: 7,
            uid: 1_000,
        },
        fresh_id: twin,
        name: "twin".to_owned(),
        tenant: "1000".to_owned(),
        resume: None,
        held: Vec::new(),
        shared: Vec::new(),
        connection: Connection::default(),
    };
    bench.apply(Event::Register(register)).unwrap();
    let refused = bench.refused(drain(&label)).to_string();
    assert!(refused.contains("2 sessions"), "{refused}");
    let leave = Caller {
        session: twin,
        process: Process {
            pid: 4_711,
            birth: 7,
            uid: 1_000,
        },
        connection: Connection::default(),
    };
    bench.done(Event::Leave(leave));
    assert!(bench.apply(drain(&label)).is_some());
}

#[test]
fn quotas_outlive_the_broker_also_in_a_compacted_ledger() {
    let (mut bench, donor, borrower) = bounded();
    set(&mut bench, model(), Some(2));
    set(&mut bench, QuotaTarget::Tenant("9".to_owned()), Some(0));
    set(&mut bench, QuotaTarget::Tenant("9".to_owned()), Some(0));
    set(&mut bench, QuotaTarget::Tenant("8".to_owned()), Some(1));
    set(&mut bench, QuotaTarget::Tenant("8".to_owned()), None);
    let quota = |record: &&Record| matches!(record, Record::Quota { .. });
    assert_eq!(
        bench.ledger.iter().filter(quota).count(),
        4,
        "what changes nothing is not written"
    );
    let before: Vec<_> = bench.state.quotas().map(|(t, b)| (t.clone(), b)).collect();
    for _ in 0..2 {
        bench.restart();
        let after: Vec<_> = bench.state.quotas().map(|(t, b)| (t.clone(), b)).collect();
        assert_eq!(after, before);
        bench.ledger = bench.state.records();
        assert_eq!(bench.ledger.iter().filter(quota).count(), 2);
    }
    bench.offer(donor, 1, 1, 10);
    assert_eq!(bench.ask(borrower, 9).0.len(), 2);
}

#[test]
fn a_shortfall_says_who_asked_for_what() {
    let (mut bench, _, borrower) = bounded();
    bench.ask(borrower, 9);
    let short = bench.effects.iter().find_map(|effect| match effect {
        Effect::Note(note @ Note::LeaseShort { .. }) => Some(note.clone()),
        _ => None,
    });
    let expected = Note::LeaseShort {
        session: borrower.session,
        name: "borrower".to_owned(),
        tenant: "1000".to_owned(),
        namespace: "model".to_owned(),
        device: device(0),
        asked_bytes: 9 * SLAB,
        granted_bytes: 3 * SLAB,
        shortfall: Shortfall::Quota,
    };
    assert_eq!(short, Some(expected));
}

fn hold(hold: u64, free_bytes: u64, for_ms: u32) -> Event {
    Event::Hold(HoldDemand {
        device: device(1),
        free_bytes,
        for_ms,
        hold: (hold != 0).then_some(HoldId(hold)),
    })
}

fn told(free_bytes: u64, left_ms: u32) -> Outgoing {
    Outgoing::Hold {
        device: device(1),
        free_bytes,
        left_ms,
    }
}

#[test]
fn a_hold_is_told_to_everybody_and_to_those_that_come_later() {
    let mut bench = Bench::new();
    let early = bench.join("early", "1000");
    bench.done(hold(7, SLAB, 5_000));
    assert_eq!(bench.heard(early), [told(SLAB, 5_000)]);
    bench.tick(2_000);
    let late = bench.join("late", "1000");
    assert_eq!(bench.heard(late), [told(SLAB, 3_000)]);
    // Its owner changes it, and nobody else.
    bench.done(hold(7, 0, 4_000));
    assert_eq!(bench.heard(early), [told(0, 4_000)]);
    let refused = bench.refused(hold(8, SLAB, 1_000));
    assert!(
        matches!(&refused, Refusal::Stale(why) if why.contains("4.0 s")),
        "{refused}"
    );
    let view = bench.state.devices()[1].hold.unwrap();
    assert_eq!((view.free_bytes, view.left_ms), (0, 4_000));
    // It ends by itself, without a word: its end was told at its start.
    bench.heard(late);
    bench.tick(4_000);
    assert!(bench.heard(late).is_empty());
    assert_eq!(bench.state.devices()[1].hold, None);
    let later = bench.join("later", "1000");
    assert!(bench.heard(later).is_empty());
    bench.done(hold(8, SLAB, 1_000));
}

#[test]
fn a_hold_is_ended_by_its_owner_or_by_an_operator() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    for by in [7, 0] {
        bench.done(hold(7, SLAB, 5_000));
        bench.heard(donor);
        bench.refused(hold(8, 0, 0));
        bench.done(hold(by, 0, 0));
        let heard = bench.heard(donor);
        assert!(
            matches!(heard[..], [Outgoing::Hold { left_ms: 0, .. }]),
            "{heard:?}"
        );
    }
    // There is none to end.
    bench.done(hold(0, 0, 0));
    assert!(bench.heard(donor).is_empty());
}
