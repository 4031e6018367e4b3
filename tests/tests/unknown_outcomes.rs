//! A call's answer is lost, and nobody knows what became of it. Whatever the broker did, it and its client agree again, and
//! until then nothing that may be lent is freed.

use std::{sync::Arc, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use swiftcache_client::{
    Error,
    device::DeviceLayer,
    donor::{Agent, AgentConfig, Donor, DonorConfig, DonorStatus, PolicyConfig},
    session::{Demand, OfferedRegion, Session, SessionConfig},
};
use swiftcache_proto::{
    domain::{AllocationId, RegionId},
    v1,
};
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

const GIB: u64 = 1 << 30;
/// Every way in which an answer can be lost, or be none. The call has arrived, but for the first.
const LOST: [Fault; 7] = [
    Fault::CutBefore,
    Fault::CutAfter,
    Fault::Deny(Code::Internal),
    Fault::Deny(Code::Unknown),
    Fault::Deny(Code::Cancelled),
    Fault::Deny(Code::Aborted),
    Fault::Deny(Code::DeadlineExceeded),
];
/// The broker's own ways to say no.
const REFUSALS: [Code; 5] = [
    Code::ResourceExhausted,
    Code::AlreadyExists,
    Code::PermissionDenied,
    Code::InvalidArgument,
    Code::FailedPrecondition,
];

/// A donor behind a gate.
struct Bench {
    node: Node,
    gate: Gate,
    operator: Operator,
    layer: Arc<dyn DeviceLayer>,
    /// HBM of the donor's device before it took any, bytes.
    idle: u64,
}

impl Bench {
    fn new(options: &[&str]) -> Result<Self> {
        let node = Node::start(options)?;
        let layer = node.layer()?;
        Ok(Self {
            gate: Gate::before(&node)?,
            operator: Operator::of(&node)?,
            idle: layer.hbm(&node.device(1))?.free,
            layer,
            node,
        })
    }

    fn config(&self) -> DonorConfig {
        DonorConfig {
            device: self.node.device(1),
            slab_bytes: SLAB_BYTES,
            drain: PATIENCE,
            handle: None,
        }
    }

    fn donor(&self, session: Session) -> Result<Donor> {
        Ok(Donor::open(
            session,
            Arc::clone(&self.layer),
            self.config(),
        )?)
    }

    /// HBM that the donor has taken, bytes.
    fn taken(&self) -> Result<u64> {
        Ok(self.idle - self.layer.hbm(&self.node.device(1))?.free)
    }

    fn regions(&self) -> Result<Vec<v1::RegionStatus>> {
        self.operator.regions()
    }

    /// What is on offer at the broker, and what is on its way back there, bytes.
    fn at_the_broker(&self) -> Result<(u64, u64)> {
        let mut bytes = (0, 0);
        for region in self.regions()? {
            match region.withdrawing {
                false => bytes.0 += region.bytes,
                true => bytes.1 += region.bytes,
            }
        }
        Ok(bytes)
    }

    /// Waits until both say the same, and checks all the while that no byte is on offer which the donor has freed.
    fn agree(&self, status: impl Fn() -> DonorStatus) -> Result<DonorStatus> {
        let mut seen = Default::default();
        eventually("the donor and the broker to agree", || {
            let taken = self.taken()?;
            let (offered, withdrawing) = self.at_the_broker()?;
            ensure!(
                offered + withdrawing <= taken,
                "{} bytes that the broker has are freed",
                offered + withdrawing - taken
            );
            let status = status();
            let same = status.offered_bytes == offered
                && status.withdrawing_bytes == withdrawing
                && status.unconfirmed_bytes == 0;
            seen = (status, taken);
            Ok(same)
        })
        .with_context(|| format!("{seen:?}, {:?}", self.at_the_broker()))?;
        Ok(seen.0)
    }

    /// Everything comes back, and the donor says so truly.
    fn close(&self, donor: Donor) -> Result<()> {
        ensure!(donor.close(PATIENCE), "stranded");
        ensure!(self.taken()? == 0 && self.regions()?.is_empty());
        Ok(())
    }

    fn demand(&self) -> Demand {
        Demand {
            namespace: "model".to_owned(),
            device: self.node.device(0),
            bytes: SLAB_BYTES,
            block_bytes: SLAB_BYTES / 16,
            class: Default::default(),
            host_bytes: 0,
        }
    }

    fn engine(&self, session: Session, slabs: u64) -> Result<Engine> {
        let config = engine::config(self.node.device(0), slabs);
        Engine::new(Some(session), Arc::clone(&self.layer), config)
    }
}

#[test]
fn memory_that_may_be_on_offer_is_kept_and_offered_again() -> Result<()> {
    let bench = Bench::new(&[])?;
    for fault in LOST {
        let donor = bench.donor(bench.gate.session("donor")?)?;
        bench.gate.fail("Offer", fault, 1);
        let added = donor.grow(SLAB_BYTES)?;
        ensure!(added == SLAB_BYTES, "{fault:?}: {added}");
        ensure!(bench.taken()? == SLAB_BYTES, "{fault:?}: freed");
        let status = bench.agree(|| donor.status())?;
        ensure!(status.offered_bytes == SLAB_BYTES, "{fault:?}: {status:?}");
        // It is lent like any other.
        let engine = bench.engine(bench.node.session("engine")?, 1)?;
        engine.reserve(1)?;
        engine.store(&[1, 2, 3])?;
        ensure!(engine.fetch(&[1, 2, 3])?.served == 3);
        bench.close(donor)?;
    }
    Ok(())
}

/// The twin: what the broker has refused it does not have.
#[test]
fn memory_whose_offer_is_refused_is_freed_at_once() -> Result<()> {
    let bench = Bench::new(&[])?;
    let donor = bench.donor(bench.gate.session("donor")?)?;
    for code in REFUSALS {
        bench.gate.fail("Offer", Fault::Refuse(code), 1);
        let refused = donor.grow(SLAB_BYTES);
        ensure!(
            matches!(refused, Err(Error::Refused { .. })),
            "{code}: {refused:?}"
        );
        ensure!(bench.taken()? == 0, "{code}");
        ensure!(donor.status() == DonorStatus::default(), "{code}");
    }
    // Nor has it heard of what could not be sent.
    bench.gate.cut();
    let mut absent = None;
    eventually("the broker to be missed", || {
        absent = donor.grow(SLAB_BYTES).err();
        Ok(absent.is_some())
    })?;
    ensure!(
        matches!(absent, Some(Error::Disconnected { .. })),
        "{absent:?}"
    );
    bench.agree(|| donor.status())?;
    bench.close(donor)
}

/// The broker has taken the offer and said so, and is killed before its answer is there.
#[test]
fn a_broker_that_is_killed_after_an_offer_has_it_still() -> Result<()> {
    let mut bench = Bench::new(&[])?;
    let donor = bench.donor(bench.gate.session("donor")?)?;
    donor.grow(SLAB_BYTES)?;
    bench.gate.fail("Offer", Fault::Swallow, 1);
    thread::scope(|scope| {
        let growing = scope.spawn(|| donor.grow(SLAB_BYTES));
        eventually("the offer to be taken", || {
            Ok(bench.gate.count("Offer", Stage::Done) == 1)
        })?;
        bench.node.kill_broker()?;
        bench.gate.cut();
        let added = growing.join().ok().context("a panic")??;
        ensure!(added == SLAB_BYTES);
        anyhow::Ok(())
    })?;
    ensure!(bench.taken()? == 2 * SLAB_BYTES, "freed");
    ensure!(donor.status().unconfirmed_bytes > 0);
    bench.node.start_broker()?;
    let status = bench.agree(|| donor.status())?;
    ensure!(status.offered_bytes == 2 * SLAB_BYTES, "{status:?}");
    bench.close(donor)
}

/// A withdrawal of so many bytes leaves it to the broker which regions come back. Asked for again before that is known, twice
/// as many would.
#[test]
fn what_is_asked_back_comes_back_once() -> Result<()> {
    let bench = Bench::new(&[])?;
    for fault in LOST {
        let donor = bench.donor(bench.gate.session("donor")?)?;
        donor.grow(4 * SLAB_BYTES)?;
        // Two of them are lent to somebody who keeps them.
        let wire = Wire::new(&bench.node.socket())?;
        let borrower = wire.member("borrower", "")?;
        let stream = borrower.attach()?;
        let device = bench.node.device(0).to_string();
        let leased = borrower.lease("model", &device, 2 * SLAB_BYTES, SLAB_BYTES / 16)?;
        ensure!(leased.grants.len() == 2);
        bench.gate.fail("Withdraw", fault, 1);
        let asked = donor.shrink(3 * SLAB_BYTES);
        ensure!(
            asked.as_ref().is_err_and(Error::may_be_done),
            "{fault:?}: {asked:?}"
        );
        let status = bench.agree(|| donor.status())?;
        let arrived = fault != Fault::CutBefore;
        let back = if arrived { 2 } else { 0 };
        ensure!(status.returned == back, "{fault:?}: {status:?}");
        let held = if arrived { SLAB_BYTES } else { 0 };
        ensure!(status.withdrawing_bytes == held, "{fault:?}: {status:?}");
        for grant in &leased.grants {
            borrower.release(grant.lease_id)?;
        }
        drop(stream);
        borrower.leave()?;
        bench.close(donor)?;
    }
    Ok(())
}

/// The agent asks for what a neighbour needs, and loses the answer: it gives back what it should, and not twice that.
#[test]
fn a_neighbours_demand_is_met_once() -> Result<()> {
    let bench = Bench::new(&[])?;
    let mut policy = PolicyConfig::new(GIB, GIB / 32);
    policy.settle = Duration::ZERO;
    policy.horizon = Duration::ZERO;
    policy.half_life = Duration::from_millis(10);
    policy.least_headroom_bytes = 0;
    let slab = policy.slab_bytes;
    policy.reserve_bytes = 8 * slab;
    policy.max_bytes = 8 * slab;
    bench.node.neighbour_uses(1, 10 * slab)?;
    let donor = DonorConfig {
        slab_bytes: slab,
        ..bench.config()
    };
    let config = AgentConfig {
        policy,
        period: Duration::from_millis(5),
    };
    let agent = Agent::start(
        bench.gate.session("agent")?,
        Arc::clone(&bench.layer),
        donor,
        config,
    )?;
    eventually("all to be on offer", || {
        let status = agent.status();
        Ok(status.offered_bytes == 8 * slab && status.unconfirmed_bytes == 0)
    })?;
    let wire = Wire::new(&bench.node.socket())?;
    let borrower = wire.member("borrower", "")?;
    let device = bench.node.device(0).to_string();
    for fault in [Fault::CutAfter, Fault::Deny(Code::Internal)] {
        // All of it is lent to somebody who takes a while: what is on its way back stays on its way.
        let leased = borrower.lease("model", &device, 8 * slab, slab / 16)?;
        ensure!(leased.grants.len() == 8);
        bench.gate.fail("Withdraw", fault, 1);
        // With the reserve, that leaves six.
        bench.node.neighbour_uses(1, 18 * slab)?;
        let mut least = u64::MAX;
        eventually("the neighbour to have its bytes", || {
            let status = agent.status();
            least = least.min(status.offered_bytes);
            Ok(status.offered_bytes <= 6 * slab && status.unconfirmed_bytes == 0)
        })?;
        let status = bench.agree(|| agent.status())?;
        ensure!(
            status.withdrawing_bytes == 2 * slab,
            "{fault:?}: {status:?}"
        );
        for grant in leased.grants {
            borrower.release(grant.lease_id)?;
        }
        // The hysteresis keeps it from rising again.
        let kept = status.offered_bytes.min(least);
        ensure!(kept == 6 * slab, "{fault:?}: {status:?}, {least}");
        bench.node.neighbour_uses(1, 10 * slab)?;
        eventually("all to be on offer again", || {
            let status = agent.status();
            Ok(status.offered_bytes == 8 * slab && status.unconfirmed_bytes == 0)
        })?;
    }
    ensure!(agent.stop(PATIENCE));
    Ok(())
}

/// Random deeds of a donor and random losses: no byte that the broker has is ever free, and in the end both agree.
#[test]
fn nothing_that_the_broker_has_is_freed_whatever_is_lost() -> Result<()> {
    let mut course = Course::new("unknown outcomes", 50);
    let mut bench = Bench::new(&[])?;
    let session = bench.gate.session("donor")?;
    let donor = bench.donor(session.clone())?;
    let wire = Wire::new(&bench.node.socket())?;
    let borrower = wire.member("borrower", "")?;
    let device = bench.node.device(0).to_string();
    let mut lent = Vec::new();
    while course.goes_on() {
        let rng = &mut course.rng;
        // Sometimes in the middle of it all, and sometimes when it works.
        if rng.random_bool(0.8) {
            session.wait_connected(PATIENCE)?;
        }
        let fault = LOST[rng.random_range(0..LOST.len())];
        match rng.random_range(0..10) {
            0 => bench.gate.fail("Offer", fault, 1),
            1 => bench.gate.fail("Withdraw", fault, 1),
            2 => bench.gate.fail("Register", fault, 1),
            3 => {
                let message = ["Returned", "Attached"][rng.random_range(0..2)];
                let cut = [Fault::CutBefore, Fault::CutAfter][rng.random_range(0..2)];
                bench.gate.fail(message, cut, 1);
            }
            4 => bench.gate.cut(),
            5 => {
                bench.node.kill_broker()?;
                bench.node.start_broker()?;
            }
            6 => {
                let call = ["Offer", "Withdraw"][rng.random_range(0..2)];
                let refusal = Fault::Refuse(Code::ResourceExhausted);
                bench.gate.fail(call, refusal, 1);
            }
            7 => {
                // A connection that is new to the broker may be in the way of the first call.
                if let Ok(leased) = borrower.lease("model", &device, SLAB_BYTES, 1024) {
                    lent.extend(leased.grants.into_iter().map(|grant| grant.lease_id));
                }
            }
            _ => {}
        }
        // Whether it works is the faults'; what it leaves behind is checked.
        match rng.random_range(0..3) {
            0 => drop(donor.grow(rng.random_range(1..3) * SLAB_BYTES)),
            1 => drop(donor.shrink(rng.random_range(1..3) * SLAB_BYTES)),
            _ => {
                while let Some(lease) = lent.pop() {
                    drop(borrower.release(lease));
                }
            }
        }
        let taken = bench.taken()?;
        let (offered, withdrawing) = bench.at_the_broker()?;
        ensure!(
            offered + withdrawing <= taken,
            "{} of {} bytes that the broker has are freed",
            offered + withdrawing - taken,
            offered + withdrawing
        );
    }
    bench.gate.mend();
    borrower.leave()?;
    bench.agree(|| donor.status())?;
    bench.close(donor)
}

/// Regions that are withdrawn by name are asked for until the broker has said that it knows.
#[test]
fn closing_tells_the_truth_whatever_becomes_of_the_asking() -> Result<()> {
    let mut bench = Bench::new(&[])?;
    for fault in LOST {
        for call in ["Withdraw", "Returned"] {
            // A message has no answer that could be denied.
            if call == "Returned" && matches!(fault, Fault::Deny(_)) {
                continue;
            }
            let donor = bench.donor(bench.gate.session("donor")?)?;
            donor.grow(2 * SLAB_BYTES)?;
            bench.gate.fail(call, fault, 1);
            bench
                .close(donor)
                .with_context(|| format!("{call}, {fault:?}"))?;
        }
    }
    // The broker gives them back and dies with its last words.
    let donor = bench.donor(bench.gate.session("donor")?)?;
    donor.grow(2 * SLAB_BYTES)?;
    bench.gate.fail("Returned", Fault::CutBefore, 1);
    bench.gate.fail("Withdraw", Fault::Swallow, 1);
    let closing = thread::spawn(move || donor.close(PATIENCE));
    eventually("them to be given back", || {
        Ok(bench.gate.count("Withdraw", Stage::Done) > 0 && bench.regions()?.is_empty())
    })?;
    bench.node.kill_broker()?;
    bench.gate.cut();
    bench.node.start_broker()?;
    ensure!(closing.join().ok().context("a panic")?, "stranded");
    ensure!(bench.taken()? == 0);
    Ok(())
}

/// The twin: while nobody can say whether it is back, it is not.
#[test]
fn closing_without_a_broker_says_so_and_keeps_the_memory() -> Result<()> {
    let mut bench = Bench::new(&[])?;
    let session = bench.gate.session("donor")?;
    let donor = bench.donor(session.clone())?;
    donor.grow(2 * SLAB_BYTES)?;
    bench.node.kill_broker()?;
    bench.gate.cut();
    ensure!(!donor.close(Duration::ZERO));
    ensure!(bench.taken()? == 2 * SLAB_BYTES, "freed what is lent");
    // It comes back when the broker does, although its donor is gone.
    bench.node.start_broker()?;
    eventually("both slabs", || {
        Ok(bench.taken()? == 0 && bench.regions()?.is_empty())
    })?;
    drop(session);
    Ok(())
}

/// A donor that is dropped leaves its regions to the session, and so does one whose session goes with it.
#[test]
fn a_donor_that_is_gone_has_its_regions_withdrawn() -> Result<()> {
    let bench = Bench::new(&[])?;
    for fault in [None, Some(Fault::CutBefore), Some(Fault::CutAfter)] {
        let session = bench.gate.session("donor")?;
        let donor = bench.donor(session.clone())?;
        donor.grow(2 * SLAB_BYTES)?;
        let wire = Wire::new(&bench.node.socket())?;
        let borrower = wire.member("borrower", "")?;
        let mut stream = borrower.attach()?;
        let device = bench.node.device(0).to_string();
        let leased = borrower.lease("model", &device, SLAB_BYTES, SLAB_BYTES / 16)?;
        let grant = leased.grants.first().context("a grant")?;
        if let Some(fault) = fault {
            bench.gate.fail("Withdraw", fault, 2);
        }
        drop(donor);
        let revoked = stream.revocation()?;
        ensure!(revoked.lease_id == grant.lease_id);
        eventually("the other slab", || Ok(bench.taken()? == SLAB_BYTES))?;
        ensure!(bench.at_the_broker()? == (0, SLAB_BYTES), "{fault:?}");
        borrower.release(grant.lease_id)?;
        eventually("the lent slab", || Ok(bench.taken()? == 0))?;
        ensure!(bench.regions()?.is_empty());
        drop((stream, session));
        borrower.leave()?;
    }
    Ok(())
}

/// An offer that this process has forgotten, as one of a donor that freed its memory too soon would be.
#[test]
fn what_only_the_broker_knows_is_withdrawn() -> Result<()> {
    let bench = Bench::new(&[])?;
    let session = bench.gate.session("forgetful")?;
    let donor = bench.donor(session.clone())?;
    donor.grow(SLAB_BYTES)?;
    let device = bench.node.device(1);
    let kinds = bench.layer.handle_kinds();
    let memory = bench.layer.allocate(&device, SLAB_BYTES, kinds[0])?;
    let offer = OfferedRegion {
        region: RegionId([7; 16]),
        device,
        allocation: AllocationId([7; 16]),
        offset: 0,
        bytes: SLAB_BYTES,
        slab_bytes: SLAB_BYTES,
        shared: false,
        elastic: false,
    };
    let export = bench.layer.export(&memory)?;
    session.offer(offer, &export, session.epoch()).wait()?;
    ensure!(bench.regions()?.len() == 2);
    let known = || -> Result<bool> {
        let id = "07".repeat(16);
        Ok(bench.regions()?.iter().any(|region| region.region_id == id))
    };
    ensure!(known()?, "{:?}", bench.regions());
    bench.gate.cut();
    eventually("it to be withdrawn", || Ok(!known()?))?;
    // What a donor knows stays.
    ensure!(bench.at_the_broker()? == (SLAB_BYTES, 0));
    drop(memory);
    bench.close(donor)
}

/// Slabs that the broker may have leased, to a process that holds none of them.
#[test]
fn leases_whose_outcome_is_unknown_are_taken_back() -> Result<()> {
    let bench = Bench::new(&[])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(4 * SLAB_BYTES)?;
    let session = bench.gate.session("engine")?;
    let engine = bench.engine(session.clone(), 1)?;
    engine.reserve(1)?;
    engine.store(&[1, 2, 3])?;
    for fault in LOST {
        let before = session.epoch();
        bench.gate.fail("Lease", fault, 1);
        let leased = session.lease(bench.demand()).wait();
        ensure!(
            leased.as_ref().is_err_and(Error::may_be_done),
            "{fault:?}: {leased:?}"
        );
        eventually("it to be taken back", || {
            Ok(session.epoch() > before
                && session.is_connected()
                && bench.operator.leases()?.len() == 1)
        })?;
        // What it does hold it keeps.
        ensure!(engine.fetch(&[1, 2, 3])?.served == 3, "{fault:?}");
    }
    let (before, calls) = (session.epoch(), bench.gate.count("Lease", Stage::Refused));
    bench
        .gate
        .fail("Lease", Fault::Refuse(Code::ResourceExhausted), 1);
    let refused = session.lease(bench.demand()).wait();
    ensure!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    ensure!(bench.gate.count("Lease", Stage::Refused) == calls + 1);
    session.release(Vec::new()).wait()?;
    ensure!(session.epoch() == before, "a refusal cost the connection");
    drop((engine, session));
    bench.close(donor)
}

/// A lease that was given back, perhaps: the broker must not keep it for a process that has unmapped it.
#[test]
fn a_release_whose_outcome_is_unknown_is_settled() -> Result<()> {
    let bench = Bench::new(&[])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(4 * SLAB_BYTES)?;
    let session = bench.gate.session("engine")?;
    for fault in LOST {
        let leased = session.lease(bench.demand()).wait()?;
        let lease = leased.grants.first().context("a grant")?.lease;
        let before = session.epoch();
        bench.gate.fail("Release", fault, 1);
        let released = session.release(vec![lease]).wait();
        ensure!(
            released.as_ref().is_err_and(Error::may_be_done),
            "{fault:?}: {released:?}"
        );
        eventually("it to be given back", || {
            let resumed = session.epoch() > before && session.is_connected();
            Ok(resumed && bench.operator.leases()?.is_empty())
        })?;
    }
    // The twin: one that was refused is held on, as it should be.
    let leased = session.lease(bench.demand()).wait()?;
    let lease = leased.grants.first().context("a grant")?.lease;
    let before = session.epoch();
    bench.gate.fail("Release", Fault::Refuse(Code::NotFound), 1);
    let refused = session.release(vec![lease]).wait();
    ensure!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    ensure!(bench.operator.leases()?.len() == 1);
    session.release(vec![lease]).wait()?;
    ensure!(session.epoch() == before && bench.operator.leases()?.is_empty());
    drop(session);
    bench.close(donor)
}

/// A replica that may have become a reader, or not.
#[test]
fn shares_whose_outcome_is_unknown_leave_no_reader_behind() -> Result<()> {
    let bench = Bench::new(&[])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(2 * SLAB_BYTES)?;
    let owner = bench.engine(bench.node.session("owner")?, 1)?;
    owner.reserve(1)?;
    owner.store(&[1, 2, 3])?;
    let readers = || -> Result<u32> {
        let leases = bench.operator.leases()?;
        Ok(leases.iter().map(|lease| lease.readers).sum())
    };
    for fault in LOST {
        let session = bench.gate.session("replica")?;
        let replica = bench.engine(session.clone(), 0)?;
        let before = session.epoch();
        bench.gate.fail("Share", fault, 1);
        ensure!(replica.fetch(&[1, 2, 3])?.served == 0, "{fault:?}");
        eventually("the reader to be gone", || {
            Ok(session.epoch() > before && session.is_connected() && readers()? == 0)
        })
        .with_context(|| format!("{fault:?}"))?;
        // Asked again, it reads.
        eventually("the blocks", || Ok(replica.fetch(&[1, 2, 3])?.served == 3))?;
        ensure!(readers()? == 1);
    }
    eventually("the last replica to be gone", || Ok(readers()? == 0))?;
    drop(owner);
    bench.close(donor)
}

/// Blocks that may be findable, in slots that may be written again.
#[test]
fn publishing_and_unpublishing_are_asked_again_and_serve_right_bytes() -> Result<()> {
    let bench = Bench::new(&["--pin-ms", "100"])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(SLAB_BYTES)?;
    for fault in [Fault::CutBefore, Fault::CutAfter] {
        let owner = bench.engine(bench.gate.session("owner")?, 1)?;
        let replica = bench.engine(bench.node.session("replica")?, 0)?;
        owner.reserve(1)?;
        bench.gate.fail("Publish", fault, 1);
        owner.store(&[1, 2, 3])?;
        eventually("a replica to find them", || {
            Ok(replica.fetch(&[1, 2, 3])?.served == 3)
        })?;
        // More than there are slots: every block's place is written again and again. Every byte that is served is checked.
        bench.gate.fail("Unpublish", fault, 2);
        for first in (0..200).step_by(8) {
            let sequence: Vec<u32> = (first..first + 8).collect();
            owner.store(&sequence)?;
            owner.fetch(&sequence)?;
            replica.fetch(&sequence)?;
            replica.fetch(&[1, 2, 3])?;
        }
        ensure!(bench.gate.count("Unpublish", Stage::Arrived) >= 1);
        bench.gate.mend();
    }
    bench.close(donor)
}

/// A publishing is not answered while the connection lasts. Nothing else would make the blocks known for hours.
#[test]
fn blocks_are_published_again_on_the_same_connection() -> Result<()> {
    let bench = Bench::new(&[])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(SLAB_BYTES)?;
    let session = bench.gate.session("owner")?;
    let owner = bench.engine(session.clone(), 1)?;
    let replica = bench.engine(bench.node.session("replica")?, 0)?;
    owner.reserve(1)?;
    let before = session.epoch();
    // Never received by the broker, which the owner cannot know.
    let lost = Fault::Refuse(Code::Internal);
    bench.gate.fail("Publish", lost, 1);
    owner.store(&[1, 2, 3])?;
    ensure!(bench.gate.count("Publish", Stage::Refused) == 1);
    // The twin: until they are published again, nobody finds them.
    ensure!(replica.fetch(&[1, 2, 3])?.found == 0);
    eventually("a replica to find them", || {
        Ok(replica.fetch(&[1, 2, 3])?.served == 3)
    })?;
    ensure!(session.epoch() == before, "by another connection");
    ensure!(bench.gate.count("Publish", Stage::Answered) == 1);
    drop((owner, replica, session));
    bench.close(donor)
}

/// A slab that was zeroed, or not; another tenant waits for it.
#[test]
fn a_slab_is_zeroed_once_whatever_becomes_of_the_word() -> Result<()> {
    let bench = Bench::new(&[])?;
    let mut scrubbed = 0;
    for fault in [Fault::CutBefore, Fault::CutAfter] {
        for message in ["Scrub", "Scrubbed"] {
            let donor = bench.donor(bench.gate.session("donor")?)?;
            donor.grow(SLAB_BYTES)?;
            let first = bench.engine(bench.node.session("first")?, 1)?;
            first.reserve(1)?;
            first.store(&[1, 2, 3])?;
            drop(first);
            bench.gate.fail(message, fault, 1);
            let stranger = Session::connect(SessionConfig {
                socket: bench.node.socket(),
                name: "stranger".to_owned(),
                tenant: "other".to_owned(),
            })?;
            let stranger = bench.engine(stranger, 1)?;
            stranger.reserve(1)?;
            ensure!(donor.status().scrubbed == 1, "{message}, {fault:?}");
            ensure!(stranger.fetch(&[1, 2, 3])?.found == 0);
            drop(stranger);
            bench.close(donor)?;
            scrubbed += 1;
        }
    }
    ensure!(scrubbed == 4);
    Ok(())
}

/// A region that a tenant wrote to is given back while its donor does not hear of it, and the broker forgets that it was:
/// offered again under its old name, the next tenant would find the bytes.
#[test]
fn what_was_returned_unheard_is_never_offered_with_a_tenants_bytes() -> Result<()> {
    for heard in [false, true] {
        let mut bench = Bench::new(&[])?;
        let donor = bench.donor(bench.gate.session("donor")?)?;
        donor.grow(SLAB_BYTES)?;
        let first = bench.engine(bench.node.session("first")?, 1)?;
        first.reserve(1)?;
        first.store(&[1, 2, 3])?;
        if heard {
            donor.shrink(SLAB_BYTES)?;
        } else {
            bench.gate.fail("Returned", Fault::Swallow, usize::MAX);
            bench.gate.fail("Withdraw", Fault::CutAfter, 1);
            bench.gate.hold("Register");
            let asked = donor.shrink(SLAB_BYTES);
            ensure!(asked.is_err_and(|error| error.may_be_done()));
        }
        eventually("the broker to give it back", || {
            Ok(bench.regions()?.is_empty())
        })?;
        ensure!(heard || bench.taken()? == SLAB_BYTES, "freed too soon");
        bench.node.kill_broker()?;
        bench.gate.cut();
        bench.node.start_broker()?;
        bench.gate.mend();
        bench.gate.open();
        // However the donor learns of it, it is given back, and not on offer.
        eventually("it to be given back", || Ok(donor.status().returned == 1))?;
        bench.agree(|| donor.status())?;
        ensure!(bench.taken()? == 0 && bench.regions()?.is_empty());
        bench.close(donor)?;
    }
    Ok(())
}

/// A session that is over, as far as its process is concerned.
#[test]
fn a_session_leaves_until_the_broker_has_heard() -> Result<()> {
    let mut bench = Bench::new(&[])?;
    let donor = bench.donor(bench.node.session("donor")?)?;
    donor.grow(4 * SLAB_BYTES)?;
    let others = bench.operator.sessions()?.len();
    let gone = || -> Result<bool> {
        Ok(bench.operator.sessions()?.len() == others && bench.operator.leases()?.is_empty())
    };
    for fault in LOST {
        let session = bench.gate.session("leaving")?;
        ensure!(session.lease(bench.demand()).wait()?.grants.len() == 1);
        bench.gate.fail("Leave", fault, 2);
        drop(session);
        eventually("it to have left", gone).with_context(|| format!("{fault:?}"))?;
    }
    // The twin: one whose process still wants it stays, whatever is lost.
    let session = bench.gate.session("staying")?;
    let engine = bench.engine(session.clone(), 1)?;
    engine.reserve(1)?;
    bench.gate.cut();
    eventually("it to be back", || {
        Ok(session.epoch() > 1 && session.is_connected())
    })?;
    ensure!(!gone()? && bench.operator.leases()?.len() == 1);
    drop((engine, session));
    eventually("it to have left", gone)?;
    // One that ends while there is no broker.
    let session = bench.gate.session("leaving late")?;
    ensure!(session.lease(bench.demand()).wait()?.grants.len() == 1);
    bench.node.kill_broker()?;
    bench.gate.cut();
    eventually("the broker to be missed", || Ok(!session.is_connected()))?;
    drop(session);
    bench.node.start_broker()?;
    eventually("the donor to be back", || {
        Ok(bench
            .operator
            .sessions()?
            .iter()
            .any(|session| session.attached))
    })?;
    eventually("it to have left", || {
        let sessions = bench.operator.sessions()?;
        Ok(sessions.len() == others && bench.operator.leases()?.is_empty())
    })?;
    bench.close(donor)
}

/// The client resumes a session that it was told of before its connection was lost, and opens no second one.
#[test]
fn a_session_that_was_opened_is_the_one_that_goes_on() -> Result<()> {
    let bench = Bench::new(&[])?;
    let watching = bench.operator.sessions()?.len();
    bench.gate.fail("Attached", Fault::CutBefore, 3);
    let session = bench.gate.session("hesitant")?;
    ensure!(bench.gate.count("Register", Stage::Answered) == 4);
    ensure!(bench.operator.sessions()?.len() == watching + 1);
    drop(session);
    Ok(())
}
