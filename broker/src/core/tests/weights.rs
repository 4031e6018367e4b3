//! Shares by weight, whoever comes first and with however many sessions, and that they come to rest.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::fixture::*;
use crate::core::{Caller, CoreConfig, Grant, LeaseDemand, Outgoing};

/// A namespace and the sessions that work for it.
#[derive(Clone, Debug)]
struct Crowd {
    weight: u32,
    replicas: usize,
}

/// Everybody wants everything, in this order each round. Returns what each namespace and each session ends with, in
/// slabs, and the last round in which a slab moved; `None` when slabs never came to rest.
fn settle(crowds: &[Crowd], slabs: u64, configured: bool, first: usize) -> Option<Vec<Vec<u64>>> {
    let name = |n: usize| format!("model-{n}");
    let weights = (0..).zip(crowds).map(|(n, crowd)| (name(n), crowd.weight));
    let mut bench = Bench::with(CoreConfig {
        namespace_weights: if configured {
            weights.collect()
        } else {
            BTreeMap::new()
        },
        ..CoreConfig::default()
    });
    let donor = bench.join("donor", "1000");
    bench.offer(donor, 1, 1, slabs);
    let mut sessions: Vec<(usize, Caller, Vec<Grant>)> = Vec::new();
    for (n, crowd) in crowds.iter().enumerate() {
        for _ in 0..crowd.replicas {
            sessions.push((n, bench.join("b", "1000"), Vec::new()));
        }
    }
    let count = sessions.len();
    let mut still = 0;
    for turn in 0..count * 60 {
        let who = (first + turn) % count;
        let (party, caller) = (sessions[who].0, sessions[who].1);
        let missing = slabs - sessions[who].2.len() as u64;
        let mut moved = false;
        if missing > 0 {
            let (grants, _) = bench.demanded(LeaseDemand {
                namespace: name(party),
                ..Bench::demand(caller, missing)
            });
            moved |= !grants.is_empty();
            sessions[who].2.extend(grants);
        }
        for (_, caller, held) in &mut sessions {
            for message in bench.heard(*caller) {
                let Outgoing::Revoke { lease, .. } = message else {
                    continue;
                };
                let place = held.iter().position(|grant| grant.lease == lease).unwrap();
                let grant = held.remove(place);
                bench.acknowledge(*caller, &grant);
                moved = true;
            }
        }
        still = if moved { 0 } else { still + 1 };
        if still > 2 * count {
            let of = |n| sessions.iter().filter(move |(party, ..)| *party == n);
            let held = |n| of(n).map(|(.., held)| held.len() as u64).collect();
            return Some((0..crowds.len()).map(held).collect());
        }
    }
    None
}

/// Nobody could have more without another ending with less for its weight; nobody is left with nothing.
fn is_fair(crowds: &[Crowd], held: &[Vec<u64>], slabs: u64) -> bool {
    let sums: Vec<u64> = held.iter().map(|sessions| sessions.iter().sum()).collect();
    let even = held.iter().all(|sessions| {
        let most = sessions.iter().max().unwrap();
        most - sessions.iter().min().unwrap() <= 1
    });
    let by_weight = (0..crowds.len()).all(|poor| {
        (0..crowds.len()).all(|rich| {
            let weight = |n: usize| u64::from(crowds[n].weight);
            let (its, theirs) = (weight(poor), weight(rich));
            poor == rich || sums[rich] == 0 || its * (sums[rich] - 1) < theirs * (sums[poor] + 1)
        })
    });
    let fed = slabs < crowds.len() as u64 || sums.iter().all(|sum| *sum > 0);
    even && by_weight && fed && sums.iter().sum::<u64>() == slabs
}

fn crowds() -> impl Strategy<Value = Vec<Crowd>> {
    let crowd = (1_u32..8, 1_usize..4).prop_map(|(weight, replicas)| Crowd { weight, replicas });
    prop::collection::vec(crowd, 2..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn shares_come_to_rest_by_weight(crowds in crowds(), slabs in 1_u64..24, first in 0_usize..8) {
        let held = settle(&crowds, slabs, true, first);
        let held = held.ok_or_else(|| TestCaseError::fail("slabs keep moving"))?;
        prop_assert!(is_fair(&crowds, &held, slabs), "{held:?}");
    }
}

#[test]
fn eight_slabs_between_three_and_one_are_six_and_two() {
    let crowds = [(3, 1), (1, 1)].map(|(weight, replicas)| Crowd { weight, replicas });
    for first in 0..2 {
        assert_eq!(
            settle(&crowds, 8, true, first),
            Some(vec![vec![6], vec![2]])
        );
        // The twin: nobody said so.
        assert_eq!(
            settle(&crowds, 8, false, first),
            Some(vec![vec![4], vec![4]])
        );
    }
}

#[test]
fn replicas_share_their_namespaces_share() {
    let crowds = [(1, 3), (1, 1)].map(|(weight, replicas)| Crowd { weight, replicas });
    let held = settle(&crowds, 12, true, 0).unwrap();
    assert_eq!(held, [vec![2, 2, 2], vec![6]]);
}

#[test]
fn the_lightest_is_not_starved() {
    let crowds = [(1_000, 1), (1, 1)].map(|(weight, replicas)| Crowd { weight, replicas });
    for first in 0..2 {
        assert_eq!(
            settle(&crowds, 8, true, first),
            Some(vec![vec![7], vec![1]])
        );
    }
}
