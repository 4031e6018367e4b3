//! An engine lends parts of its pool. They come back when no other process can access them any more, and not before.

#![allow(
    unsafe_code,
    reason = "an engine vouches for its own pool; this fixture does so in its place"
)]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak, mpsc},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use swiftcache_client::{
    device::{CopyStream, DeviceLayer, Memory, foreign},
    donor::Lender,
    session::{Session, SessionConfig},
};
use swiftcache_proto::domain::RegionId;
use swiftcache_tests::{
    PATIENCE,
    engine::{self, Engine, SLAB_BYTES, eventually},
    gate::{Fault, Gate, Stage},
    node::Node,
    operator::Operator,
    seed::Course,
    wire::Wire,
};
use tonic::Code;

const PAGE: u64 = 4096;
/// The byte that fills the engine's own KV.
const OWN: u8 = 0xe7;

/// The pool of an engine: two slabs with a page between them, all in use. It has a lender.
struct Pool {
    layer: Arc<dyn DeviceLayer>,
    stream: Arc<dyn CopyStream>,
    memory: Memory,
    lender: Lender,
}

/// A lent part of the pool. It is back when nobody holds it any more.
struct Part {
    region: RegionId,
    back: Weak<()>,
}

/// Does something when it is dropped.
struct Then<F: Fn()>(
    F,
    #[allow(dead_code, reason = "it is told of by its end")] Arc<()>,
);

impl<F: Fn()> Drop for Then<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Part {
    fn is_back(&self) -> bool {
        self.back.strong_count() == 0
    }
}

impl Pool {
    fn new(node: &Node, session: Session) -> Result<Self> {
        Self::with_drain(node, session, PATIENCE)
    }

    fn with_drain(node: &Node, session: Session, drain: Duration) -> Result<Self> {
        let layer = node.layer()?;
        let device = node.device(1);
        let bytes = 2 * SLAB_BYTES + PAGE;
        // Memory of the allocator, like the tensors of a CPU engine. It cannot be exported as it is.
        let tensor = vec![0_u8; (bytes + PAGE) as usize];
        let address = (tensor.as_ptr() as u64).next_multiple_of(PAGE);
        let owner = Box::new(tensor);
        // SAFETY: the owner is the tensor itself, whose bytes nothing but copies reaches from now on.
        let memory = unsafe { foreign::adopt_pool(&*layer, &device, address, bytes, owner) }?;
        let stream = layer.stream(&device)?;
        stream.write(&memory, 0, &vec![OWN; bytes as usize])?;
        let lender = Lender::open(session, Arc::clone(&layer), device, drain)?;
        Ok(Self {
            layer,
            stream,
            memory,
            lender,
        })
    }

    /// Lends the first slab or the second.
    fn lend(&self, number: u64) -> Result<Part> {
        self.lend_and(number, || {})
    }

    /// Lends the first slab or the second. When it is back, the engine does this.
    fn lend_and(&self, number: u64, then: impl Fn() + Send + Sync + 'static) -> Result<Part> {
        let token = Arc::new(());
        let back = Arc::downgrade(&token);
        let token = Then(then, token);
        let at = number * (SLAB_BYTES + PAGE);
        let (layer, token) = (&*self.layer, Box::new(token));
        // SAFETY: the engine only reads what it lends, by copies and to check it.
        let lent = unsafe { foreign::lend_pool(layer, &self.memory, at, SLAB_BYTES, token) }?;
        let region = self.lender.lend(lent)?;
        Ok(Part { region, back })
    }

    fn bytes(&self, number: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; SLAB_BYTES as usize];
        let at = number * (SLAB_BYTES + PAGE);
        self.stream.read(&self.memory, at, &mut bytes)?;
        Ok(bytes)
    }

    fn holds_only(&self, number: u64, byte: u8) -> Result<bool> {
        Ok(self.bytes(number)?.iter().all(|one| *one == byte))
    }
}

fn borrower(node: &Node, slabs: u64) -> Result<Engine> {
    let config = engine::config(node.device(0), slabs);
    Engine::new(Some(node.session("borrower")?), node.layer()?, config)
}

#[test]
fn what_is_lent_holds_others_blocks_and_comes_back_empty() -> Result<()> {
    let node = Node::start(&[])?;
    let pool = Pool::new(&node, node.session("lender")?)?;
    let borrower = borrower(&node, 2)?;
    let blocks = [1, 2, 3];
    // Two rounds, because a part that came back can be lent again.
    for round in 1..=2 {
        let part = pool.lend(1)?;
        ensure!(pool.holds_only(1, 0)?, "the engine's own KV is on offer");
        borrower.reserve(1)?;
        ensure!(borrower.store(&blocks)?.stored == 3);
        ensure!(borrower.fetch(&blocks)?.served == 3);
        ensure!(
            !pool.holds_only(1, 0)?,
            "the borrower's bytes are elsewhere"
        );
        ensure!(pool.holds_only(0, OWN)?, "what is not lent was touched");
        pool.lender.take_back(&[part.region]);
        eventually("the part", || Ok(part.is_back()))?;
        ensure!(pool.holds_only(1, 0)?, "a borrower's bytes are left in it");
        ensure!(borrower.fetch(&blocks)?.served == 0, "nothing is there");
        // The lender counts it when everything is over, a moment after the memory is back.
        eventually("it to be counted", || {
            Ok(pool.lender.status().returned == round)
        })?;
        let status = pool.lender.status();
        ensure!(status.offered_bytes + status.withdrawing_bytes == 0);
    }
    Ok(())
}

#[test]
fn parts_are_lent_to_several_and_given_back_one_by_one() -> Result<()> {
    let node = Node::start(&[])?;
    let pool = Pool::new(&node, node.session("lender")?)?;
    let parts = [pool.lend(0)?, pool.lend(1)?];
    let (one, other) = (borrower(&node, 1)?, borrower(&node, 1)?);
    one.reserve(1)?;
    other.reserve(1)?;
    for (engine, first) in [(&one, 100), (&other, 200)] {
        engine.store(&[first, first + 1])?;
        ensure!(engine.fetch(&[first, first + 1])?.served == 2);
    }
    pool.lender.take_back(&[parts[0].region]);
    eventually("the first part", || Ok(parts[0].is_back()))?;
    ensure!(!parts[1].is_back());
    // The borrower of the other part still has it.
    let left = one.fetch(&[100, 101])?.served + other.fetch(&[200, 201])?.served;
    ensure!(left >= 2, "{left}");
    ensure!(pool.lender.take_all_back(PATIENCE));
    ensure!(parts[1].is_back());
    Ok(())
}

#[test]
fn without_a_broker_nothing_is_lent_for_good() -> Result<()> {
    let mut node = Node::start(&[])?;
    node.kill_broker()?;
    let session = Session::start(SessionConfig {
        socket: node.socket(),
        name: "lender".to_owned(),
        tenant: String::new(),
    })?;
    let pool = Pool::new(&node, session)?;
    let part = pool.lend(0)?;
    pool.lender.take_back(&[part.region]);
    ensure!(part.is_back(), "nobody can have heard of it");
    // A part that waits for a broker is lent when the broker comes.
    let part = pool.lend(0)?;
    node.start_broker()?;
    let borrower = borrower(&node, 1)?;
    borrower.reserve(1)?;
    pool.lender.take_back(&[part.region]);
    eventually("the part", || Ok(part.is_back()))
}

#[test]
fn only_a_broker_that_knows_gives_back() -> Result<()> {
    let mut node = Node::start(&[])?;
    let pool = Pool::new(&node, node.session("lender")?)?;
    let part = pool.lend(0)?;
    let borrower = borrower(&node, 1)?;
    borrower.reserve(1)?;
    borrower.store(&[1])?;
    node.kill_broker()?;
    pool.lender.take_back(&[part.region]);
    // The borrower goes on writing, as it may.
    borrower.store(&[1, 2])?;
    ensure!(!part.is_back(), "it is still mapped");
    node.start_broker()?;
    eventually("the part", || Ok(part.is_back()))?;
    ensure!(pool.holds_only(0, 0)?);
    Ok(())
}

/// A lender without its own drain window uses the broker's window for borrowers, and waits as long itself when it
/// closes.
#[test]
fn closing_waits_as_long_as_borrowers_may_take() -> Result<()> {
    let window_ms = PATIENCE.as_millis().to_string();
    let node = Node::start(&["--drain-ms", &window_ms])?;
    let wire = Wire::new(&node.socket())?;
    let borrower = wire.member("a slow borrower", "")?;
    let mut stream = borrower.attach()?;
    let (device, block) = (node.device(0).to_string(), SLAB_BYTES / 16);
    for drain in [Duration::ZERO, Duration::from_millis(1)] {
        let pool = Pool::with_drain(&node, node.session("lender")?, drain)?;
        let part = pool.lend(0)?;
        let mut granted = None;
        eventually("the lease", || {
            let leased = borrower.lease("model", &device, SLAB_BYTES, block)?;
            granted = leased.grants.first().cloned();
            Ok(granted.is_some())
        })?;
        let grant = granted.context("granted")?;
        let (asked, answer) = mpsc::channel();
        let closing = thread::spawn(move || {
            asked.send(pool.lender.close(Duration::ZERO))?;
            anyhow::Ok(pool)
        });
        let revoked = stream.revocation()?;
        // The twin: a lender with a short drain window does not wait for a borrower that takes longer.
        let in_time = drain.is_zero();
        if in_time {
            ensure!(revoked.drain_ms > 1, "{revoked:?}");
            borrower.release(grant.lease_id)?;
        }
        ensure!(answer.recv()? == in_time, "{drain:?}");
        if !in_time {
            ensure!(!part.is_back());
            borrower.release(grant.lease_id)?;
        }
        eventually("the part", || Ok(part.is_back()))?;
        drop(closing.join());
    }
    Ok(())
}

/// What the broker refuses to take is the engine's again at once. What it may have taken is not.
#[test]
fn what_is_refused_is_back_and_what_may_be_lent_is_not() -> Result<()> {
    let mut node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let pool = Pool::new(&node, gate.session("lender")?)?;
    let operator = Operator::of(&node)?;
    gate.fail("Offer", Fault::Refuse(Code::ResourceExhausted), 1);
    let part = pool.lend(0)?;
    eventually("the part", || Ok(part.is_back()))?;
    ensure!(pool.lender.status().offered_bytes == 0);
    for fault in [Fault::CutAfter, Fault::Deny(Code::Internal)] {
        gate.hold("Register");
        gate.fail("Offer", fault, usize::MAX);
        let part = pool.lend(0)?;
        eventually("the offer to be taken", || {
            Ok(gate.count("Offer", Stage::Done) > 0 && !operator.regions()?.is_empty())
        })?;
        // The broker has it and is gone: its donor must not believe that it has not.
        node.kill_broker()?;
        gate.cut();
        pool.lender.take_back(&[part.region]);
        ensure!(!pool.lender.take_all_back(Duration::ZERO));
        ensure!(!part.is_back(), "{fault:?}");
        ensure!(pool.lender.status().withdrawing_bytes == SLAB_BYTES);
        gate.mend();
        gate.open();
        node.start_broker()?;
        eventually("the part", || Ok(part.is_back()))?;
        ensure!(operator.regions()?.is_empty());
    }
    Ok(())
}

/// Random loans and losses: what the engine has back, the broker never has.
#[test]
fn what_is_back_is_on_offer_never_again_whatever_is_lost() -> Result<()> {
    let mut course = Course::new("a lender's unknown outcomes", 40);
    let mut node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let session = gate.session("lender")?;
    let pool = Pool::new(&node, session.clone())?;
    let operator = Operator::of(&node)?;
    let back: Arc<Mutex<BTreeSet<String>>> = Arc::default();
    let mut parts: [Option<Part>; 2] = [None, None];
    while course.goes_on() {
        let rng = &mut course.rng;
        if rng.random_bool(0.8) {
            session.wait_connected(PATIENCE)?;
        }
        let lost = [
            Fault::CutBefore,
            Fault::CutAfter,
            Fault::Deny(Code::Internal),
            Fault::Refuse(Code::ResourceExhausted),
        ][rng.random_range(0..4)];
        match rng.random_range(0..8) {
            0 | 1 => gate.fail("Offer", lost, 1),
            2 => gate.fail("Withdraw", lost, 1),
            3 => gate.fail("Register", Fault::CutAfter, 1),
            4 => gate.fail("Returned", Fault::CutBefore, 1),
            5 => gate.cut(),
            6 => {
                node.kill_broker()?;
                node.start_broker()?;
            }
            _ => {}
        }
        for (number, place) in (0..).zip(&mut parts) {
            if place.as_ref().is_some_and(Part::is_back) {
                *place = None;
            }
            match place {
                Some(part) if rng.random_bool(0.5) => pool.lender.take_back(&[part.region]),
                None if rng.random_bool(0.5) => {
                    let name: Arc<OnceLock<String>> = Arc::default();
                    let (its, list) = (Arc::clone(&name), Arc::clone(&back));
                    let part = pool.lend_and(number, move || {
                        let mut list = list.lock().unwrap_or_else(PoisonError::into_inner);
                        list.extend(its.get().cloned());
                    })?;
                    name.get_or_init(|| part.region.to_string());
                    *place = Some(part);
                }
                _ => {}
            }
        }
        let back = (back.lock().unwrap_or_else(PoisonError::into_inner)).clone();
        for region in operator.regions()? {
            ensure!(!back.contains(&region.region_id), "{region:?} is back");
        }
    }
    gate.mend();
    ensure!(pool.lender.take_all_back(PATIENCE));
    ensure!(parts.iter().flatten().all(Part::is_back) && operator.regions()?.is_empty());
    ensure!(pool.holds_only(0, 0)? || pool.holds_only(0, OWN)?);
    Ok(())
}

#[test]
fn what_a_broker_forgot_is_never_used_again() -> Result<()> {
    let mut node = Node::start(&[])?;
    let pool = Pool::new(&node, node.session("lender")?)?;
    let part = pool.lend(0)?;
    borrower(&node, 1)?.reserve(1)?;
    node.kill_broker()?;
    node.lose_ledger()?;
    node.start_broker()?;
    eventually("the loss to be noticed", || {
        Ok(pool.lender.status().stranded_bytes == SLAB_BYTES)
    })?;
    pool.lender.take_back(&[part.region]);
    // The rest of the pool can still be lent.
    let other = pool.lend(1)?;
    let borrower = borrower(&node, 2)?;
    borrower.reserve(1)?;
    ensure!(borrower.borrower.reserve(2 * SLAB_BYTES) == SLAB_BYTES);
    pool.lender.take_back(&[other.region]);
    eventually("the other part", || Ok(other.is_back()))?;
    ensure!(!part.is_back(), "whoever had it mapped may write there yet");
    ensure!(!pool.lender.take_all_back(Duration::ZERO));
    Ok(())
}
