use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use swiftcache_proto::{domain::BlockHash, v1};
use tonic::{Code, Status};

use super::{
    store::{DiskStore, Put},
    store_tests::{SMALL, config, hash, put},
    telling::{Agent, Telling},
};
use crate::{Error, Result, session::DiskCall};

/// Room for all that a test stores.
const AMPLE: u64 = 4 << 20;

/// What becomes of a call that the broker does not answer as it should.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fails {
    /// It refuses, always.
    Refused(Code),
    /// There is no connection.
    Disconnected,
    /// The call after so many others is lost, having been done or not.
    Lost { after: u32, done: bool },
}

/// A disk, and a broker that takes blocks of it as the broker's core does.
struct Bench {
    telling: Telling,
    store: DiskStore,
    /// The most blocks of all disks.
    limit: Cell<usize>,
    /// Blocks of other disks.
    others: Cell<usize>,
    known: RefCell<BTreeMap<String, BTreeSet<BlockHash>>>,
    shown: RefCell<String>,
    calls: Cell<u32>,
    fails: Cell<Option<Fails>>,
    epoch: Cell<u64>,
    now: Cell<Instant>,
}

impl Bench {
    fn new(dir: &Path, bytes: u64, limit: usize) -> Self {
        Self {
            telling: Telling::new("DISK-0".to_owned()),
            store: DiskStore::open(&config(dir, bytes)).unwrap(),
            limit: Cell::new(limit),
            others: Cell::default(),
            known: RefCell::default(),
            shown: RefCell::default(),
            calls: Cell::default(),
            fails: Cell::default(),
            epoch: Cell::new(1),
            now: Cell::new(Instant::now()),
        }
    }

    fn put(&self, blocks: impl IntoIterator<Item = u32>) {
        for n in blocks {
            assert_eq!(put(&self.store, "a", n), Put::Stored);
        }
    }

    fn tell(&self) -> bool {
        self.telling.tell(&self.store, self)
    }

    /// The calls of a telling that the broker takes.
    fn calls_of_telling(&self) -> u32 {
        let before = self.calls.get();
        assert!(self.tell());
        self.calls.get() - before
    }

    fn passes(&self, time: Duration) {
        self.now.set(self.now.get() + time);
    }

    fn known_blocks(&self) -> usize {
        self.known.borrow().values().map(BTreeSet::len).sum()
    }

    /// Whether all that the broker knows is on the disk. Nothing may have happened there since it was told.
    fn known_is_there(&self) -> bool {
        let all = self.store.all().into_iter();
        let all: BTreeMap<String, BTreeSet<BlockHash>> = all
            .map(|(namespace, hashes)| (namespace.to_string(), hashes.into_iter().collect()))
            .collect();
        let known = self.known.borrow();
        known.iter().all(|(namespace, known)| {
            let there = all.get(namespace);
            known.is_empty() || there.is_some_and(|there| known.is_subset(there))
        })
    }

    fn knows(&self, n: u32) -> bool {
        self.known.borrow()["a"].contains(&hash(n))
    }

    fn take(&self, call: DiskCall) -> Result<()> {
        if call.anew {
            self.known.borrow_mut().clear();
        }
        if self.known_blocks() + self.others.get() + call.stored.len() > self.limit.get() {
            let limit = format!("blocks on disks: the limit is {}", self.limit.get());
            return Err(refused(Code::ResourceExhausted, &limit));
        }
        if let Some(state) = call.state {
            *self.shown.borrow_mut() = state.problem;
        }
        if !call.namespace.is_empty() {
            let mut known = self.known.borrow_mut();
            let its = known.entry(call.namespace).or_default();
            for hash in &call.dropped {
                its.remove(hash);
            }
            its.extend(call.stored);
        }
        Ok(())
    }
}

fn refused(code: Code, said: &str) -> Error {
    Error::Refused {
        call: "Disk",
        status: Box::new(Status::new(code, said)),
    }
}

impl Agent for Bench {
    fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    fn state(&self) -> v1::DiskState {
        v1::DiskState {
            problem: self.telling.problem().unwrap_or_default(),
            ..v1::DiskState::default()
        }
    }

    fn say(&self, call: DiskCall) -> Result<()> {
        assert_eq!(call.name, "DISK-0");
        self.calls.set(self.calls.get() + 1);
        match self.fails.get() {
            None => self.take(call),
            Some(Fails::Refused(code)) => Err(refused(code, "no")),
            Some(Fails::Disconnected) => Err(Error::Disconnected {
                socket: "broker.sock".into(),
                problem: "gone".to_owned(),
            }),
            Some(Fails::Lost { after: 0, done }) => {
                if done {
                    self.take(call)?;
                }
                Err(Error::Lost {
                    call: "Disk",
                    problem: "cut".to_owned(),
                })
            }
            Some(Fails::Lost { after, done }) => {
                let after = after - 1;
                self.fails.set(Some(Fails::Lost { after, done }));
                self.take(call)
            }
        }
    }

    fn now(&self) -> Instant {
        self.now.get()
    }
}

#[test]
fn a_full_broker_keeps_what_it_took_and_is_told_no_more_until_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), AMPLE, 100);
    bench.put(0..90);
    assert_eq!(bench.calls_of_telling(), 2);
    // The limit is crossed while it runs. The first that do not fit any more follow those that do.
    bench.put(90..200);
    assert!(bench.calls_of_telling() < 16);
    assert_eq!(bench.known_blocks(), 100);
    assert!(bench.knows(0) && bench.knows(99));
    let shown = bench.shown.borrow().clone();
    assert!(
        shown.contains("max_blocks") && shown.contains("limit is 100"),
        "{shown}"
    );
    // Nothing is told that would be refused.
    assert_eq!(bench.calls_of_telling(), 0);
    for n in 200..220 {
        bench.put([n]);
        assert_eq!(bench.calls_of_telling(), 0);
    }
    // Nor on a new connection, beyond what it takes to find the limit.
    bench.epoch.set(2);
    assert!(bench.calls_of_telling() < 16);
    assert_eq!(bench.known_blocks(), 100);
    assert_eq!(bench.calls_of_telling(), 0);
    // Another disk has gone. One block finds out that there is room now and then, and the others follow.
    bench.limit.set(1_000);
    assert_eq!(bench.calls_of_telling(), 0);
    bench.passes(Duration::from_secs(30));
    assert!(bench.calls_of_telling() < 16);
    assert_eq!(bench.known_blocks(), 220);
    assert!(bench.shown.borrow().is_empty() && bench.telling.problem().is_none());
}

#[test]
fn a_broker_with_room_is_told_all_at_once() {
    // The twin of the test before.
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), AMPLE, 1_000);
    bench.put(0..90);
    assert_eq!(bench.calls_of_telling(), 2);
    bench.put(90..200);
    assert_eq!(bench.calls_of_telling(), 1);
    assert_eq!(bench.known_blocks(), 200);
    assert!(bench.shown.borrow().is_empty());
    bench.epoch.set(2);
    assert_eq!(bench.calls_of_telling(), 2);
    assert_eq!(bench.known_blocks(), 200);
}

#[test]
fn a_full_broker_is_told_what_goes_and_then_what_came_last() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), SMALL, 20);
    let mut there = 0;
    while bench.store.stats().evicted_blocks == 0 {
        bench.put([there]);
        there += 1;
    }
    assert!(bench.tell());
    assert_eq!(bench.known_blocks(), 20);
    assert!(there > 25, "the file takes more than the broker");
    let mut came = 0;
    for n in there..200 {
        let before = bench.known.borrow()["a"].clone();
        bench.put([n]);
        // What goes, and what comes into its place or does not.
        assert!(bench.calls_of_telling() < 4);
        assert_eq!(bench.known_blocks(), 20);
        assert!(bench.known_is_there());
        let went = !bench.known.borrow()["a"].is_superset(&before);
        assert_eq!(bench.knows(n), went);
        came += u32::from(went);
    }
    assert!(came > 20);
}

#[test]
fn a_problem_of_telling_is_over_when_the_broker_takes_what_it_is_told() {
    for code in [
        Code::Unimplemented,
        Code::AlreadyExists,
        Code::ResourceExhausted,
    ] {
        for upgraded in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            let bench = Bench::new(dir.path(), AMPLE, 100);
            bench.put(0..10);
            bench.fails.set(Some(Fails::Refused(code)));
            assert!(!bench.tell());
            let problem = bench.telling.problem().unwrap();
            assert_eq!(
                problem.contains("upgrade it"),
                code == Code::Unimplemented,
                "{problem}"
            );
            bench.epoch.set(2);
            if upgraded {
                bench.fails.set(None);
            }
            // The twin: it stays while the broker refuses.
            assert_eq!(bench.tell(), upgraded);
            assert_eq!(bench.telling.problem().is_none(), upgraded);
            assert!(bench.shown.borrow().is_empty());
        }
    }
}

#[test]
fn a_broker_that_refuses_all_is_asked_seldom_and_one_that_comes_back_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let bench = Bench::new(dir.path(), AMPLE, 100);
    bench.put(0..10);
    bench.fails.set(Some(Fails::Refused(Code::AlreadyExists)));
    let step = Duration::from_millis(100);
    let asked = |steps| {
        let before = bench.calls.get();
        for _ in 0..steps {
            assert!(!bench.tell());
            bench.passes(step);
        }
        bench.calls.get() - before
    };
    // 0, 100, 300, 700, ... 25,500 ms, and then every 30 s: until ten minutes are over.
    assert_eq!(asked(6_000), 9 + 19);
    // On another connection it is told at once, and what it takes ends the pauses.
    bench.epoch.set(2);
    assert_eq!(asked(8), 4);
    bench.fails.set(None);
    bench.passes(Duration::from_secs(30));
    assert!(bench.tell());
    bench.put(10..11);
    bench.fails.set(Some(Fails::Refused(Code::AlreadyExists)));
    assert_eq!(asked(2), 2);
    // Where nothing can be sent no pause is made: a connection may come at any time.
    bench.epoch.set(3);
    bench.fails.set(Some(Fails::Disconnected));
    assert_eq!(asked(100), 100);
    assert!(bench.telling.problem().is_none(), "the session has its own");
    bench.fails.set(None);
    assert!(bench.tell());
    assert_eq!(bench.known_blocks(), 11);
    // A call that is not answered may end the connection: the next one is no reason to send it all again at once.
    let before = bench.calls.get();
    for epoch in 4..304 {
        bench.epoch.set(epoch);
        let done = true;
        bench.fails.set(Some(Fails::Lost { after: 0, done }));
        assert!(!bench.tell());
        bench.passes(step);
    }
    // 0, 100, 300, ... 25,500 ms.
    assert_eq!(bench.calls.get() - before, 9);
}

proptest! {
    /// Whatever is refused, lost or cut off: what the broker knows is on the disk, and it knows as much as it takes.
    #[test]
    fn the_broker_knows_what_is_there_and_as_much_as_it_takes(
        limit in 0_usize..50,
        steps in prop::collection::vec((0..13_u8, 0..40_u32), 1..150),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let bench = Bench::new(dir.path(), SMALL, limit);
        // Whether it may know less until it is asked again: nobody says when another disk leaves room.
        let mut behind = false;
        for (step, n) in steps {
            match step {
                0..=4 => { put(&bench.store, ["a", "bb"][usize::from(step == 0)], n); }
                5 => {
                    let free = limit - bench.known_blocks();
                    let others = n as usize % (free + 1);
                    behind |= others < bench.others.get();
                    bench.others.set(others);
                }
                6 => {
                    let done = n % 2 == 0;
                    bench.fails.set(Some(Fails::Lost { after: n / 8, done }));
                }
                7 => bench.epoch.set(bench.epoch.get() + 1),
                8 => bench.passes(Duration::from_secs(30)),
                _ => {
                    let before = bench.calls.get();
                    let told = bench.tell();
                    prop_assert!(bench.calls.get() - before < 40);
                    if !told {
                        // What was lost comes again after a pause.
                        bench.fails.set(None);
                        bench.passes(Duration::from_secs(30));
                        prop_assert!(bench.tell());
                        behind = false;
                    }
                    prop_assert!(bench.known_is_there());
                    let there = bench.store.stats().blocks as usize;
                    let takes = there.min(limit - bench.others.get());
                    prop_assert!(bench.known_blocks() == takes || behind);
                    prop_assert_eq!(bench.telling.problem().is_some(), bench.known_blocks() < there);
                    prop_assert_eq!(bench.telling.problem().unwrap_or_default(), bench.shown.borrow().clone());
                }
            }
        }
        bench.fails.set(None);
        bench.epoch.set(bench.epoch.get() + 1);
        prop_assert!(bench.tell());
        prop_assert_eq!(bench.known_blocks(), (bench.store.stats().blocks as usize).min(limit - bench.others.get()));
    }
}
