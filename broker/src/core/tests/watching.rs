//! Who watches the index knows what is in it.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{BlockHash, Medium};

use super::fixture::*;
use crate::core::{CoreConfig, Sight, State, Watched, Watcher, WithdrawWhat};

/// A block in a kind of memory, with its tenant and namespace.
type Known = BTreeSet<(String, String, bool, BlockHash)>;

/// What the index has.
pub(super) fn index(state: &State) -> Known {
    let books = &state.books;
    let leases = books.leases.iter();
    let blocks = leases.flat_map(|(key, lease)| {
        let namespace = books.index.namespace(lease.terms().namespace);
        let host = books.index.medium(key) == Medium::Host;
        let blocks = books.index.blocks_in(key);
        blocks.map(move |(_, hash)| {
            let (tenant, name) = (namespace.tenant(), namespace.name());
            (tenant.to_string(), name.to_string(), host, *hash)
        })
    });
    blocks.collect()
}

/// Somebody who watches, and what it knows.
pub(super) struct Follower {
    pub(super) watcher: Watcher,
    pub(super) known: Known,
    /// How often it could have read on.
    pub(super) turns: usize,
    /// It is told of nothing that is gone.
    deaf: bool,
}

impl Follower {
    pub(super) fn new(sight: Sight) -> Self {
        Self {
            watcher: Watcher::new(sight, None),
            known: Known::new(),
            turns: 0,
            deaf: false,
        }
    }

    pub(super) fn deaf() -> Self {
        Self {
            deaf: true,
            ..Self::new(Sight::default())
        }
    }

    /// Reads on, at most `most` entries.
    pub(super) fn read(&mut self, state: &State, most: usize) -> Watched {
        let watched = state.watch(&mut self.watcher, most);
        assert!(watched.changes.len() <= most);
        if watched.anew {
            self.known.clear();
        }
        for change in &watched.changes {
            let host = change.medium == Medium::Host;
            let (tenant, namespace) = (&change.scope.tenant, &change.scope.namespace);
            let block = (tenant.to_string(), namespace.to_string(), host, change.hash);
            if change.added {
                self.known.insert(block);
            } else if !self.deaf {
                self.known.remove(&block);
            }
        }
        watched
    }

    /// Reads until it knows all there is. Says whether it had to begin anew.
    fn read_all(&mut self, state: &State, most: usize) -> bool {
        let mut anew = false;
        for _ in 0..10_000 {
            let watched = self.read(state, most);
            anew |= watched.anew;
            if watched.current {
                assert_eq!(watched.sequence, Some(state.sequence()));
                return anew;
            }
        }
        panic!("it never knows all");
    }
}

/// A node on which two slabs of one borrower hold eight blocks.
fn published() -> (Bench, Vec<crate::core::Grant>, [crate::core::Caller; 2]) {
    let config = CoreConfig {
        max_journal: 16,
        ..CoreConfig::default()
    };
    let mut bench = Bench::with(config);
    let (donor, borrower) = (
        bench.join("donor", "1000"),
        bench.join("borrower", "1000/blue"),
    );
    bench.offer(donor, 1, 1, 1);
    bench.offer(donor, 2, 1, 1);
    let grants = bench.lease(borrower, 2);
    for (number, grant) in (0..).zip(&grants) {
        let blocks: Vec<_> = (0..4)
            .map(|slot| (4 * number + u64::from(slot), slot))
            .collect();
        bench.publish(borrower, grant, &blocks);
    }
    (bench, grants, [donor, borrower])
}

#[test]
fn a_watcher_knows_the_index_and_what_becomes_of_it() {
    for most in [1, 2, 3, 100] {
        let (mut bench, grants, [donor, borrower]) = published();
        let mut follower = Follower::new(Sight::default());
        assert!(follower.read_all(&bench.state, most));
        assert_eq!(follower.known.len(), 8);
        bench.unpublish(borrower, &grants[0], &[0, 3]);
        bench.publish(borrower, &grants[0], &[(20, 0)]);
        assert!(!follower.read_all(&bench.state, most));
        assert_eq!(follower.known, index(&bench.state));
        // A revocation takes a whole slab.
        bench.withdraw(donor, WithdrawWhat::Regions(vec![region(1)]));
        assert!(!follower.read_all(&bench.state, most));
        assert_eq!(follower.known, index(&bench.state));
        assert!([3, 4].contains(&follower.known.len()));
    }
}

/// While somebody reads the index, a block may move from a slot that is yet to come to one that has been read.
#[test]
fn what_moves_while_the_index_is_read_is_not_missed() {
    let (mut bench, grants, [_, borrower]) = published();
    let mut follower = Follower::new(Sight::default());
    // Three of the first slab's.
    follower.read(&bench.state, 3);
    assert_eq!(follower.known.len(), 3);
    bench.unpublish(borrower, &grants[1], &[3]);
    bench.unpublish(borrower, &grants[0], &[1]);
    bench.publish(borrower, &grants[0], &[(7, 1)]);
    assert!(!follower.read_all(&bench.state, 4));
    assert_eq!(follower.known, index(&bench.state));
    // The twin: who passes over the changes, and reads pages only, misses it.
    assert!(
        follower
            .known
            .iter()
            .any(|(_, _, _, block)| *block == hash(7))
    );
    let pages = |bench: &Bench| Watcher::new(Sight::default(), Some(bench.state.sequence()));
    let watched = bench.state.watch(&mut pages(&bench), 100);
    assert!(watched.changes.is_empty() && watched.current);
}

#[test]
fn who_falls_behind_or_names_another_number_begins_anew() {
    let (mut bench, grants, [_, borrower]) = published();
    let mut follower = Follower::new(Sight::default());
    follower.read_all(&bench.state, 100);
    // As many changes as are kept, then one more.
    for round in 0..8 {
        bench.unpublish(borrower, &grants[0], &[0]);
        bench.publish(borrower, &grants[0], &[(100 + round, 0)]);
    }
    assert!(!follower.read_all(&bench.state, 3));
    for round in 0..8 {
        bench.unpublish(borrower, &grants[0], &[0]);
        bench.publish(borrower, &grants[0], &[(200 + round, 0)]);
    }
    bench.unpublish(borrower, &grants[0], &[1]);
    assert!(follower.read_all(&bench.state, 3));
    assert_eq!(follower.known, index(&bench.state));
    let mut ahead = Watcher::new(Sight::default(), Some(bench.state.sequence() + 1));
    assert!(bench.state.watch(&mut ahead, 1).anew);
    // The twin: the number that it has goes on.
    let mut right = Watcher::new(Sight::default(), Some(bench.state.sequence()));
    let watched = bench.state.watch(&mut right, 1);
    assert!(!watched.anew && watched.current && watched.changes.is_empty());
}

#[test]
fn a_member_sees_the_blocks_of_its_user_only() {
    let (mut bench, _, [donor, _]) = published();
    let other = bench.join("other", "1001");
    bench.offer(donor, 3, 1, 1);
    let grants = bench.lease(other, 1);
    bench.publish(other, &grants[0], &[(0, 0), (77, 1)]);
    let seen = |sight: Sight| {
        let mut follower = Follower::new(sight);
        follower.read_all(&bench.state, 2);
        follower.known.len()
    };
    let named = |text: &str| Some(text.to_owned());
    let sight = Sight::default;
    assert_eq!(seen(sight()), 10);
    assert_eq!(
        seen(Sight {
            user: named("1000"),
            ..sight()
        }),
        8
    );
    assert_eq!(
        seen(Sight {
            user: named("1001"),
            ..sight()
        }),
        2
    );
    assert_eq!(
        seen(Sight {
            user: named("100"),
            ..sight()
        }),
        0
    );
    assert_eq!(
        seen(Sight {
            tenant: named("1000"),
            ..sight()
        }),
        0
    );
    assert_eq!(
        seen(Sight {
            tenant: named("1000/blue"),
            ..sight()
        }),
        8
    );
    assert_eq!(
        seen(Sight {
            namespaces: vec!["other".to_owned()],
            ..sight()
        }),
        0
    );
    let both = Sight {
        user: named("1001"),
        namespaces: vec!["none".to_owned(), "model".to_owned()],
        ..sight()
    };
    assert_eq!(seen(both), 2);
}

/// A block in two leases of one kind of memory is gone when both are.
#[test]
fn a_block_is_gone_with_its_last_copy() {
    let (mut bench, grants, [_, borrower]) = published();
    let copy = grants[1].clone();
    bench.unpublish(borrower, &copy, &[3]);
    // The core lets nobody publish twice what he can reach: so it is told at the index.
    let books = &mut bench.state.books;
    let (lease, _) = books.leases.find(copy.lease).unwrap();
    let at = crate::core::index::Location { lease, slot: 3 };
    books.index.insert(&mut books.journal, hash(0), at);
    let mut follower = Follower::new(Sight::default());
    follower.read_all(&bench.state, 3);
    let known = follower.known.clone();
    let books = &mut bench.state.books;
    books.index.remove(&mut books.journal, at);
    follower.read_all(&bench.state, 3);
    assert_eq!(follower.known, known);
    bench.unpublish(borrower, &grants[0], &[0]);
    follower.read_all(&bench.state, 3);
    assert_eq!(follower.known.len(), known.len() - 1);
}
