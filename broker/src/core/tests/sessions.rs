//! Sessions: who may speak, what a lost connection loses, and what a death proves.

use swiftcache_proto::domain::{RevokeReason, SessionId};

use super::fixture::*;
use crate::core::{
    Caller, Connection, CoreConfig, Effect, Event, Note, Outgoing, Process, Refusal, Register,
    Reply, Withdraw, WithdrawWhat,
};

fn revoked(message: &Outgoing) -> Option<RevokeReason> {
    match message {
        Outgoing::Revoke { reason, .. } => Some(*reason),
        _ => None,
    }
}

#[test]
fn only_its_own_process_speaks_for_a_session() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    let thief = Caller {
        session: borrower.session,
        process: donor.process,
        connection: Connection::default(),
    };
    let stranger = Caller {
        session: SessionId(1),
        process: donor.process,
        connection: Connection::default(),
    };
    for (caller, unknown) in [(thief, false), (stranger, true)] {
        let events = [
            Event::Attach(caller),
            Event::Leave(caller),
            Event::Offer(Bench::offer_event(caller, 2, 1, 1)),
            Event::Withdraw(Withdraw {
                caller,
                what: WithdrawWhat::Regions(vec![region(1)]),
                drain_ms: 1,
            }),
            Event::Lease(Bench::demand(caller, 1)),
            Event::Release {
                caller,
                leases: vec![grant.lease],
                unmappable: true,
                bequeath: false,
            },
            Bench::share_event(caller, &grant),
            Bench::publish_event(caller, &grant, &[(1, 0)]),
            Event::Unpublish {
                caller,
                lease: grant.lease,
                generation: grant.generation,
                slots: vec![0],
            },
            Event::Lookup(Bench::lookup_of(caller, 0..1)),
            Event::Keep(Bench::keep_of(caller, 1)),
        ];
        for event in events {
            let refusal = bench.refused(event);
            let right = match unknown {
                true => matches!(
                    refusal,
                    Refusal::Unknown {
                        what: "session",
                        ..
                    }
                ),
                false => matches!(
                    refusal,
                    Refusal::NotYours {
                        what: "session",
                        ..
                    }
                ),
            };
            assert!(right, "{refusal:?}");
        }
        // What travels on the stream is not answered, and changes nothing.
        bench.acknowledge(caller, &grant);
        let noted = |effect: &Effect| matches!(effect, Effect::Note(Note::Refused { .. }));
        assert!(bench.effects.iter().any(noted));
    }
    assert_eq!(bench.state.total().leased, SLAB);
}

#[test]
fn a_refusal_never_shows_a_session_id() {
    let mut bench = Bench::new();
    let caller = Caller {
        session: SessionId(0xabcd_1234_5678_9abc),
        process: Process {
            pid: 1,
            birth: 1,
            uid: 1,
        },
        connection: Connection::default(),
    };
    let text = format!("{:?}", bench.refused(Event::Leave(caller)));
    assert!(text.contains("abcd"), "{text}");
    assert!(!text.contains("1234"), "{text}");
}

#[test]
fn a_lost_stream_loses_nothing() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.apply(Event::Detach(borrower.session));
    bench.apply(Event::Detach(donor.session));
    bench.withdraw_region(donor, 1);
    assert_eq!(bench.heard(borrower), []);
    assert_eq!(bench.state.total().draining, SLAB);

    bench.now += 200;
    bench.done(Event::Attach(borrower));
    let left = Outgoing::Revoke {
        lease: grant.lease,
        generation: grant.generation,
        reason: RevokeReason::Withdrawn,
        drain_ms: 300,
    };
    assert_eq!(bench.heard(borrower), [left]);
    bench.acknowledge(borrower, &grant);
    assert_eq!(bench.heard(donor), []);
    // Said again at every attach: the stream may break before it arrives.
    for _ in 0..2 {
        bench.done(Event::Attach(donor));
        assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
    }
}

#[test]
fn resuming_settles_what_each_side_missed() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 3);
    let grants = bench.lease(borrower, 3);
    bench.share(reader, &grants[0]);
    bench.share(reader, &grants[1]);

    // The borrower never heard of the third grant; the reader has closed the second.
    let (refused, _) = bench.resume(borrower, &[grants[0].lease, grants[1].lease], &[]);
    assert_eq!(refused, []);
    assert_eq!(bench.state.total().leased, 2 * SLAB);
    let (refused, _) = bench.resume(
        reader,
        &[grants[2].lease],
        &[grants[0].lease, grants[2].lease],
    );
    assert_eq!(refused, [grants[2].lease]);
    assert_eq!(
        bench.state.leases().map(|lease| lease.readers).sum::<u32>(),
        1
    );
    let (_, regions) = bench.resume(donor, &[], &[]);
    assert_eq!(regions, [region(1)]);
}

#[test]
fn a_session_is_resumed_by_its_process_and_tenant_only() {
    let mut bench = Bench::new();
    let borrower = bench.join("borrower", "1000");
    let register = |process, tenant: &str, resume| {
        Event::Register(Register {
            process,
            fresh_id: SessionId(3),
            name: "borrower".to_owned(),
            tenant: tenant.to_owned(),
            resume: Some(resume),
            held: Vec::new(),
            shared: Vec::new(),
            connection: Connection::default(),
        })
    };
    let other = Process {
        birth: 8,
        ..borrower.process
    };
    let refusal = bench.refused(register(other, "1000", borrower.session));
    assert!(matches!(refusal, Refusal::NotYours { .. }), "{refusal:?}");
    let refusal = bench.refused(register(borrower.process, "1001", borrower.session));
    assert!(
        matches!(
            refusal,
            Refusal::Invalid {
                field: "tenant",
                ..
            }
        ),
        "{refusal:?}"
    );
    let refusal = bench.refused(register(borrower.process, "1000", SessionId(99)));
    assert!(matches!(refusal, Refusal::Unknown { .. }), "{refusal:?}");
}

#[test]
fn a_closed_stream_proves_nothing_and_a_death_everything() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    bench.lease(borrower, 1);
    bench.withdraw_region(donor, 1);
    bench.apply(Event::Detach(borrower.session));
    bench.tick(1_000_000);
    assert_eq!(bench.heard(donor), []);
    assert_eq!(bench.state.total().zombie, SLAB);
    assert_eq!(bench.state.counters().zombies, 1);
    bench.apply(Event::ProcessGone(borrower.process));
    assert_eq!(bench.heard(donor), [Outgoing::Returned(region(1))]);
}

#[test]
fn readers_of_a_dead_lessee_let_go_before_the_slab_is_free() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.share(reader, &grant);
    bench.apply(Event::ProcessGone(borrower.process));
    let heard = bench.heard(reader);
    assert_eq!(revoked(&heard[0]), Some(RevokeReason::LesseeGone));
    assert_eq!(bench.state.total().draining, SLAB);
    bench.acknowledge(reader, &grant);
    assert_eq!(bench.state.total().free, SLAB);
}

#[test]
fn a_released_slab_waits_for_its_readers() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    let reader = bench.join("reader", "1000");
    bench.offer(donor, 1, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.share(reader, &grant);
    bench.release(borrower, &[&grant]);
    assert_eq!(bench.heard(borrower), []);
    assert_eq!(
        revoked(&bench.heard(reader)[0]),
        Some(RevokeReason::Released)
    );
    assert_eq!(bench.ask(borrower, 1).0.len(), 0);
    // A reader may give its share back without being asked, too.
    bench.release(reader, &[&grant]);
    assert_eq!(bench.lease(borrower, 1)[0].generation.0, 2);
}

#[test]
fn the_bytes_of_a_dead_donor_are_accounted_until_everyone_let_go() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 2);
    bench.offer(donor, 2, 1, 1);
    let grants = bench.lease(borrower, 1);
    bench.apply(Event::ProcessGone(donor.process));
    let revocation = bench.heard(borrower).remove(0);
    assert_eq!(revoked(&revocation), Some(RevokeReason::DonorGone));
    assert_eq!(bench.state.regions().count(), 1);
    assert_eq!(bench.state.sessions().count(), 1);
    assert_eq!(bench.ask(borrower, 1).0.len(), 0);
    bench.acknowledge(borrower, &grants[0]);
    let closed = |effect: &Effect| matches!(effect, Effect::DropHandle(_));
    assert!(bench.effects.iter().any(closed));
    assert_eq!(bench.state.total().offered, 0);
}

#[test]
fn leaving_gives_everything_up_and_returns_what_it_can() {
    let mut bench = Bench::new();
    let donor = bench.join("donor", "1000");
    let borrower = bench.join("borrower", "1000");
    bench.offer(donor, 1, 1, 1);
    bench.offer(donor, 2, 1, 1);
    let grant = bench.lease(borrower, 1).remove(0);
    bench.done(Event::Leave(donor));
    assert_eq!(bench.heard(donor).len(), 1);
    bench.done(Event::Leave(borrower));
    // The stream is still up: the last region comes back on it.
    assert_eq!(bench.heard(donor), [Outgoing::Returned(grant.region)]);
    assert_eq!(bench.state.books.sessions.len(), 0);
    let refusal = bench.refused(Event::Lease(Bench::demand(borrower, 1)));
    assert!(matches!(refusal, Refusal::Unknown { .. }), "{refusal:?}");
}

#[test]
fn each_process_is_watched_once() {
    let mut bench = Bench::new();
    let first = bench.join("one", "1000");
    let watched = |bench: &Bench| {
        let watch = |effect: &&Effect| matches!(effect, Effect::Watch(_) | Effect::Unwatch(_));
        bench.effects.iter().filter(watch).count()
    };
    let second = bench.join_as(first.process, "two", "1000");
    assert_eq!(watched(&bench), 0);
    assert_eq!(bench.state.processes().collect::<Vec<_>>(), [first.process]);
    bench.done(Event::Leave(first));
    assert_eq!(watched(&bench), 0);
    bench.done(Event::Leave(second));
    assert_eq!(watched(&bench), 1);
    assert_eq!(bench.state.processes().count(), 0);
}

/// One user takes as many as it may; others are let in, root without such a bound. The twin: without it nobody is.
#[test]
fn one_user_cannot_take_all_sessions() {
    for (max_sessions_per_user, left) in [(2, true), (4, false)] {
        let mut bench = Bench::with(CoreConfig {
            max_sessions: 4,
            max_sessions_per_user,
            ..CoreConfig::default()
        });
        let first = bench.join("first", "1000");
        let register = |uid: u32, number: u64| {
            Event::Register(Register {
                process: Process {
                    pid: number as u32,
                    uid,
                    ..first.process
                },
                fresh_id: SessionId(number),
                name: "more".to_owned(),
                tenant: uid.to_string(),
                resume: None,
                held: Vec::new(),
                shared: Vec::new(),
                connection: Connection::default(),
            })
        };
        let mut joins = |uid, number| match bench.apply(register(uid, number)) {
            Some(Reply::Registered { .. }) => true,
            Some(Reply::Refused(Refusal::Limit { .. })) => false,
            other => panic!("{other:?}"),
        };
        let taken = (10..20).filter(|number| joins(1_000, *number)).count();
        assert_eq!(taken + 1, max_sessions_per_user);
        assert_eq!(joins(2_000, 20), left);
        assert_eq!(joins(0, 21), left);
    }
}

/// One process of root takes all sessions but a few, which another one gets. The twin: where none are kept, nobody does.
#[test]
fn no_process_alone_takes_all_sessions() {
    for (max_sessions, kept) in [(32, 2), (15, 0)] {
        let mut bench = Bench::with(CoreConfig {
            max_sessions,
            ..CoreConfig::default()
        });
        let mut joins = |pid, number: u64| {
            let register = Register {
                process: Process {
                    pid,
                    birth: 7,
                    uid: 0,
                },
                fresh_id: SessionId(number),
                name: "more".to_owned(),
                tenant: "0".to_owned(),
                resume: None,
                held: Vec::new(),
                shared: Vec::new(),
                connection: Connection::default(),
            };
            match bench.apply(Event::Register(register)) {
                Some(Reply::Registered { .. }) => true,
                Some(Reply::Refused(Refusal::Limit { .. })) => false,
                other => panic!("{other:?}"),
            }
        };
        let taken = (1..100).filter(|number| joins(1, *number)).count();
        assert_eq!(taken + kept, max_sessions);
        assert_eq!(joins(2, 1_000), kept > 0);
    }
}

#[test]
fn sessions_are_bounded() {
    let mut bench = Bench::with(CoreConfig {
        max_sessions: 1,
        ..CoreConfig::default()
    });
    let first = bench.join("one", "1000");
    let register = Register {
        process: first.process,
        fresh_id: SessionId(9),
        name: "two".to_owned(),
        tenant: "1000".to_owned(),
        resume: None,
        held: Vec::new(),
        shared: Vec::new(),
        connection: Connection::default(),
    };
    let refusal = bench.refused(Event::Register(register));
    assert_eq!(
        refusal,
        Refusal::Limit {
            what: "sessions",
            limit: 1
        }
    );
}

#[test]
fn a_silent_reader_gets_nothing_more_and_keeps_no_slab_but_the_one_it_reads() {
    for silent in [true, false] {
        let mut bench = Bench::with(CoreConfig {
            pin_ms: 100,
            ..CoreConfig::default()
        });
        let donor = bench.join("donor", "1000");
        let lessee = bench.join("lessee", "1000");
        let reader = bench.join("reader", "1000");
        for number in 1..=9 {
            bench.offer(donor, number, 1, 1);
        }
        let grants = bench.lease(lessee, 9);
        let shared = bench.share(reader, &grants[0]);
        let all: Vec<_> = grants[..8].iter().map(|grant| grant.region).collect();
        bench.withdraw(donor, WithdrawWhat::Regions(all));
        bench.heard(donor);
        for grant in &grants[..8] {
            bench.acknowledge(lessee, grant);
        }
        // One reader holds back one slab: the others are the donor's again at once.
        assert_eq!(bench.heard(donor).len(), 7);
        if !silent {
            bench.acknowledge(reader, &shared);
        }
        // The drain window of the slab is not over yet.
        bench.tick(100);
        let account = bench.state.total();
        assert_eq!(account.zombie, 0);
        assert_eq!(account.draining > 0, silent);
        let demand = Event::Lease(Bench::demand(reader, 1));
        let share = Bench::share_event(reader, &grants[8]);
        if silent {
            for event in [demand, share] {
                let refusal = bench.refused(event);
                assert!(
                    matches!(&refusal, Refusal::Stale(text) if text.contains("has acknowledged")),
                    "{refusal:?}"
                );
            }
            // What it may do is to let go. Then it is as good as any other.
            bench.acknowledge(reader, &shared);
        }
        let returned = Outgoing::Returned(shared.region);
        assert_eq!(bench.heard(donor), [returned]);
        bench.share(reader, &grants[8]);
        bench.ask(reader, 1);
    }
}
