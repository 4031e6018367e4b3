//! One lookup contract: what is promised is what can be loaded, own tiers first, and trying in vain leaves nothing
//! behind.

use std::{fs, path::PathBuf};

use anyhow::{Result, ensure};
use swiftcache_client::{
    cache::{Borrower, BorrowerConfig, Medium},
    session::{Asker, Session},
};
use swiftcache_proto::domain::BlockHash;
use swiftcache_tests::{
    PATIENCE,
    crew::{BorrowerProcess, Job, donor},
    engine::{self, BLOCK_BYTES, Engine, Fetched, NAMESPACE, SLAB_BYTES, eventually},
    full_stack,
    gate::{Fault, Gate, Stage},
    node::{Devices, Node, Setup},
    operator::Operator,
    programs::Program,
    stub::{Call, Stub},
};
use tonic::Code;

/// Four devices: 1 is linked to 0 and to 3; 2 is linked to none, and to 1 by no peer access.
const TOPOLOGY: &str = r#"
name = "a node without all links"

[[device]]
uuid = "SIM-0"
name = "simulated GPU"
hbm_bytes = 1073741824

[[device]]
uuid = "SIM-1"
name = "simulated GPU"
hbm_bytes = 1073741824

[[device]]
uuid = "SIM-2"
name = "simulated GPU"
hbm_bytes = 1073741824

[[device]]
uuid = "SIM-3"
name = "simulated GPU"
hbm_bytes = 1073741824

[[link]]
between = ["SIM-0", "SIM-1"]
kind = "nvlink"
gigabytes_per_second = 380.0

[[link]]
between = ["SIM-1", "SIM-2"]
kind = "host"
gigabytes_per_second = 20.0

[[link]]
between = ["SIM-1", "SIM-3"]
kind = "pcie"
gigabytes_per_second = 50.0
"#;

const BLOCKS: u32 = 8;

fn sequence() -> Vec<u32> {
    (0..BLOCKS).collect()
}

fn hashes() -> Vec<BlockHash> {
    sequence().into_iter().map(engine::hash).collect()
}

fn all(blocks: u32) -> Fetched {
    Fetched {
        found: blocks,
        served: blocks,
    }
}

fn node_without_all_links() -> Result<(tempfile::TempDir, Node)> {
    let directory = tempfile::tempdir()?;
    let file: PathBuf = directory.path().join("topology.toml");
    fs::write(&file, TOPOLOGY)?;
    let node = Node::start_with(Setup {
        devices: Devices::File(file),
        ..Setup::default()
    })?;
    Ok((directory, node))
}

/// An engine on a device, which leases one slab and has so many blocks of host memory.
fn config(node: &Node, device: usize, host_blocks: u64) -> BorrowerConfig {
    let mut config = engine::config(node.device(device), 1);
    config.host_tier_bytes = host_blocks * BLOCK_BYTES;
    config
}

fn engine_on(node: &Node, session: Session, device: usize) -> Result<Engine> {
    Engine::new(Some(session), node.layer()?, config(node, device, 0))
}

/// What a scheduler is promised for a borrower.
fn promised(scheduler: &Session, borrower: &Borrower) -> u32 {
    let asker = Asker {
        borrower: Some(borrower.id()),
        ..Asker::new(NAMESPACE)
    };
    scheduler.count_hits(&[asker], &hashes(), PATIENCE)
}

/// Waits until nobody reads others' leases.
fn nobody_reads(operator: &Operator) -> Result<()> {
    eventually("readers to be forgotten", || {
        let leases = operator.leases()?;
        Ok(!leases.is_empty() && leases.iter().all(|lease| lease.readers == 0))
    })
}

#[test]
fn a_replica_without_a_link_is_promised_nothing_and_leaves_no_reader() -> Result<()> {
    let (_directory, node) = node_without_all_links()?;
    let (operator, gate) = (Operator::of(&node)?, Gate::before(&node)?);
    let _donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let scheduler = node.session("scheduler")?;

    let far = engine_on(&node, gate.session("far")?, 2)?;
    // As soon as the broker knows it: until then it is promised nothing either.
    eventually("the far borrower to be known", || {
        Ok(gate.count("Keep", Stage::Answered) > 0)
    })?;
    for _ in 0..3 {
        ensure!(far.fetch(&sequence())? == all(0));
        ensure!(promised(&scheduler, &far.borrower) == 0);
    }
    ensure!(gate.count("Lookup", Stage::Answered) == 3);
    ensure!(gate.count("Share", Stage::Arrived) == 0, "{:?}", gate.log());
    ensure!(operator.leases()?.iter().all(|lease| lease.readers == 0));
    // One that does not say where it is asks as ever.
    let anywhere = scheduler.count_hits(&[Asker::new(NAMESPACE)], &hashes(), PATIENCE);
    ensure!(anywhere == BLOCKS);

    // The twin: with a link it is promised and found, byte for byte.
    let near = engine_on(&node, gate.session("near")?, 3)?;
    eventually("the near borrower's promise", || {
        Ok(promised(&scheduler, &near.borrower) == BLOCKS)
    })?;
    ensure!(near.fetch(&sequence())? == all(BLOCKS));
    ensure!(gate.count("Share", Stage::Answered) == 1);
    ensure!(operator.leases()?.iter().any(|lease| lease.readers == 1));
    Ok(())
}

#[test]
fn what_only_an_unreachable_replica_has_is_stored_and_found_where_it_can_be_reached() -> Result<()>
{
    let (_directory, node) = node_without_all_links()?;
    let _donors = [donor(&node, 1, 1)?, donor(&node, 2, 1)?];
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    let far = engine_on(&node, node.session("far")?, 2)?;
    far.reserve(1)?;
    let near = engine_on(&node, node.session("near")?, 3)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let stored = far.store(&sequence())?;
    ensure!(stored.stored == BLOCKS, "{stored:?}");
    let hit = far.lookup(&sequence());
    ensure!(hit.blocks() == BLOCKS && hit.runs()[0].medium == Medium::Hbm);
    ensure!(far.fetch(&sequence())? == all(BLOCKS));
    let scheduler = node.session("scheduler")?;
    eventually("the far borrower's promise", || {
        Ok(promised(&scheduler, &far.borrower) == BLOCKS)
    })?;
    ensure!(near.fetch(&sequence())? == all(BLOCKS));
    // The twin: what it can read in the writer's lease, the near one does not keep for itself.
    let _third = donor(&node, 3, 1)?;
    near.reserve(1)?;
    let stored = near.store(&sequence())?;
    ensure!(stored.stored == 0 && stored.lost == BLOCKS, "{stored:?}");
    Ok(())
}

/// A node of the stub's devices, and a donor that lends memory of the second by legacy handles.
fn lent_on(stub: &Stub) -> Result<(Node, Program)> {
    let node = Node::start_with(Setup {
        devices: Devices::File(stub.topology_file()?),
        environment: stub.environment()?,
        ..Setup::default()
    })?;
    let mut donor = full_stack::donate(&node, 1, "cuda-ipc")?;
    full_stack::offered(&node, &mut donor)?;
    Ok((node, donor))
}

/// How often a process has tried to open a legacy handle.
fn tries(stub: &Stub, pid: u32) -> Result<usize> {
    let calls = stub.calls()?;
    let opens = |call: &&Call| call.is(pid, "cuIpcOpenMemHandle_v2");
    Ok(calls.iter().filter(opens).count())
}

#[test]
fn a_lease_that_cannot_be_mapped_is_tried_once_and_given_back() -> Result<()> {
    let stub = Stub::new()?;
    let (node, _donor) = lent_on(&stub)?;
    let operator = Operator::of(&node)?;
    let job = |name| Job {
        host_blocks: 0,
        conversations: 2,
        ..Job::new(name, 1)
    };
    let mut writer = BorrowerProcess::start(&node, 0, &job("writer"))?;
    writer.run("reserve 4")?;
    let stored = writer.run("sweep-store")?.stored;
    ensure!(stored > 0);

    let mut reader = BorrowerProcess::start(
        &node,
        0,
        &Job {
            slabs: 0,
            ..job("reader")
        },
    )?;
    stub.trace(&["cuIpcOpenMemHandle_v2"])?;
    // CUDA_ERROR_INVALID_CONTEXT: what a driver says of a handle that it will not open.
    let fault = stub.inject(Some(reader.pid()), "cuIpcOpenMemHandle_v2=201")?;
    let found = reader.run("sweep-fetch")?.found;
    ensure!(found == 0, "{found} blocks of memory that is not mapped");
    nobody_reads(&operator)?;
    let pid = reader.pid();
    let first = tries(&stub, pid)?;
    ensure!(first > 0, "it was never tried");
    // Whatever the driver says now: these leases are not promised to it again.
    stub.lift(&fault)?;
    for _ in 0..2 {
        ensure!(reader.run("sweep-fetch")?.found == 0);
    }
    ensure!(tries(&stub, pid)? == first, "it was tried again");
    ensure!(operator.leases()?.iter().all(|lease| lease.readers == 0));

    // The twin: without the fault everything is found.
    let mut twin = BorrowerProcess::start(
        &node,
        0,
        &Job {
            slabs: 0,
            ..job("twin")
        },
    )?;
    let fetched = twin.run("sweep-fetch")?;
    ensure!(
        fetched.found == stored && fetched.served == stored,
        "{fetched:?} of {stored}"
    );
    ensure!(operator.leases()?.iter().any(|lease| lease.readers == 1));
    Ok(())
}

#[test]
fn what_a_process_cannot_map_is_not_granted_to_it_again() -> Result<()> {
    let stub = Stub::new()?;
    let (node, _donor) = lent_on(&stub)?;
    let operator = Operator::of(&node)?;
    let job = Job {
        host_blocks: 0,
        conversations: 2,
        ..Job::new("borrower", 1)
    };
    stub.trace(&["cuIpcOpenMemHandle_v2"])?;
    // For whoever comes from now on.
    let fault = stub.inject(None, "cuIpcOpenMemHandle_v2=201")?;
    let cannot = BorrowerProcess::start(&node, 0, &job)?;
    // Every region is tried once. Then there is nothing left that could be granted, and the broker says so.
    let regions = operator.regions()?.len();
    eventually("every region to be tried", || {
        Ok(tries(&stub, cannot.pid())? >= regions)
    })?;
    let short = || -> Result<usize> {
        let events = operator.events()?;
        Ok(events.iter().filter(|event| event.kind == "short").count())
    };
    let said = short()?;
    eventually("the broker to say that it has nothing", || {
        Ok(short()? > said + 2)
    })?;
    let tried = tries(&stub, cannot.pid())?;
    ensure!(tried == regions, "{tried} tries of {regions}");
    ensure!(operator.account()?.leased_bytes == 0);
    // The twin: another process is granted all of it.
    stub.lift(&fault)?;
    let mut able = BorrowerProcess::start(&node, 0, &job)?;
    able.run("reserve 4")?;
    ensure!(operator.account()?.leased_bytes == 4 * SLAB_BYTES);
    Ok(())
}

#[test]
fn a_lookup_misses_what_is_not_mapped_yet_and_waits_for_nobody() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let _donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let reader = engine_on(&node, gate.session("reader")?, 0)?;
    gate.hold("Share");
    // The lease cannot be opened now, and the lookup returns.
    ensure!(reader.borrower.lookup(&hashes()).blocks() == 0);
    eventually("the share to be asked for", || {
        Ok(gate.count("Share", Stage::Arrived) == 1)
    })?;
    ensure!(reader.borrower.lookup(&hashes()).blocks() == 0);
    // The twin: one that was promised the blocks waits for them.
    std::thread::scope(|scope| -> Result<()> {
        let asked = gate.count("Lookup", Stage::Answered);
        let patient = scope.spawn(|| reader.lookup(&sequence()).blocks());
        eventually("the broker to have answered it", || {
            Ok(gate.count("Lookup", Stage::Answered) > asked)
        })?;
        ensure!(!patient.is_finished(), "it has not waited");
        gate.open();
        ensure!(patient.join().is_ok_and(|blocks| blocks == BLOCKS));
        Ok(())
    })?;
    // It was opened once, and whoever comes later finds it at once.
    ensure!(reader.borrower.lookup(&hashes()).blocks() == BLOCKS);
    ensure!(gate.count("Share", Stage::Arrived) == 1, "{:?}", gate.log());
    ensure!(reader.fetch(&sequence())? == all(BLOCKS));
    Ok(())
}

#[test]
fn a_lease_of_other_blocks_is_opened_once_and_given_back() -> Result<()> {
    let node = Node::start(&[])?;
    let (operator, gate) = (Operator::of(&node)?, Gate::before(&node)?);
    let _donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let other = || -> Result<_> {
        let mut config = config(&node, 0, 0);
        config.layout.layer_bytes.push(4_096);
        Ok(Borrower::open(
            Some(gate.session("other")?),
            node.layer()?,
            config,
        )?)
    };
    // A broker that does not know what the borrower's blocks look like promises it the writer's.
    gate.fail("Keep", Fault::Refuse(Code::Unimplemented), usize::MAX);
    let unknown = other()?;
    for _ in 0..3 {
        ensure!(unknown.lookup_within(&hashes(), PATIENCE).blocks() == 0);
    }
    ensure!(
        gate.count("Share", Stage::Answered) == 1,
        "{:?}",
        gate.log()
    );
    nobody_reads(&operator)?;
    drop(unknown);
    // One that does know it does not.
    gate.mend();
    let kept = gate.count("Keep", Stage::Answered);
    let known = other()?;
    eventually("the borrower to be known", || {
        Ok(gate.count("Keep", Stage::Answered) > kept)
    })?;
    ensure!(known.lookup_within(&hashes(), PATIENCE).blocks() == 0);
    ensure!(
        gate.count("Share", Stage::Answered) == 1,
        "{:?}",
        gate.log()
    );
    Ok(())
}

#[test]
fn a_share_that_fails_at_the_broker_is_not_asked_for_at_once_again() -> Result<()> {
    let node = Node::start(&[])?;
    let (operator, gate) = (Operator::of(&node)?, Gate::before(&node)?);
    let _donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let reader = engine_on(&node, gate.session("reader")?, 0)?;
    gate.fail("Share", Fault::Refuse(Code::ResourceExhausted), 1);
    ensure!(reader.fetch(&sequence())? == all(0));
    // What may pass is tried again, but not with every lookup.
    let mut lookups = 1;
    eventually("the lease to be tried again", || {
        lookups += 1;
        Ok(reader.fetch(&sequence())? == all(BLOCKS))
    })?;
    ensure!(lookups > 2, "it was left alone for no moment");
    ensure!(gate.count("Share", Stage::Arrived) == 2, "{:?}", gate.log());
    ensure!(operator.leases()?[0].readers == 1);
    Ok(())
}

#[test]
fn a_share_whose_answer_is_lost_leaves_no_reader() -> Result<()> {
    let node = Node::start(&[])?;
    let (operator, gate) = (Operator::of(&node)?, Gate::before(&node)?);
    let _donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    for fault in [Fault::Deny(Code::Internal), Fault::CutAfter] {
        let reader = engine_on(&node, gate.session("reader")?, 0)?;
        let done = gate.count("Share", Stage::Done);
        gate.fail("Share", fault, 1);
        ensure!(reader.fetch(&sequence())? == all(0));
        // The broker took it for a reader, and has heard since that it is none.
        ensure!(
            gate.count("Share", Stage::Done) == done + 1,
            "{:?}",
            gate.log()
        );
        nobody_reads(&operator)?;
        gate.mend();
        eventually("the lease to be tried again", || {
            Ok(reader.fetch(&sequence())? == all(BLOCKS))
        })?;
        ensure!(operator.leases()?[0].readers == 1);
    }
    Ok(())
}

#[test]
fn a_lease_that_is_revoked_while_it_is_opened_leaves_no_reader() -> Result<()> {
    let node = Node::start(&[])?;
    let (operator, gate) = (Operator::of(&node)?, Gate::before(&node)?);
    let donor = donor(&node, 1, 1)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let reader = engine_on(&node, gate.session("reader")?, 0)?;
    gate.hold("Share");
    std::thread::scope(|scope| -> Result<()> {
        let lookup = scope.spawn(|| reader.lookup(&sequence()).blocks());
        eventually("the share to be asked for", || {
            Ok(gate.count("Share", Stage::Arrived) == 1)
        })?;
        donor.shrink(SLAB_BYTES)?;
        operator.eventually("the slab to come back", |account| {
            account.offered_bytes == 0
        })?;
        gate.open();
        ensure!(lookup.join().is_ok_and(|blocks| blocks == 0));
        Ok(())
    })?;
    ensure!(operator.leases()?.is_empty());
    Ok(())
}

#[test]
fn a_scheduler_finds_what_its_worker_keeps_in_host_memory() -> Result<()> {
    let mut node = Node::start(&[])?;
    let scheduler = node.session("scheduler")?;
    let config = config(&node, 0, 10);
    let worker = Engine::new(Some(node.session("worker")?), node.layer()?, config)?;
    ensure!(worker.store(&sequence())?.stored == BLOCKS);
    let finds = |worker: &Engine, blocks| {
        eventually("the scheduler's promise", || {
            Ok(promised(&scheduler, &worker.borrower) == blocks)
        })
    };
    finds(&worker, BLOCKS)?;
    // What is promised is what is loaded.
    ensure!(worker.fetch(&sequence())? == all(BLOCKS));
    // Nobody else is promised it: neither those who ask for themselves nor another worker.
    ensure!(scheduler.count_hits(&[Asker::new(NAMESPACE)], &hashes(), PATIENCE) == 0);
    let other = engine_on(&node, node.session("other")?, 0)?;
    ensure!(promised(&scheduler, &other.borrower) == 0);
    // A broker that starts anew is told.
    node.kill_broker()?;
    node.start_broker()?;
    finds(&worker, BLOCKS)?;
    // What has to go is promised no more: the host tier has room for ten.
    let more: Vec<u32> = (100..106).collect();
    worker.store(&more)?;
    eventually("what has gone to be promised no more", || {
        let left = worker.lookup(&sequence()).blocks();
        Ok(left < BLOCKS && promised(&scheduler, &worker.borrower) == left)
    })?;
    // A worker that is gone has nothing.
    let id = worker.borrower.id();
    drop(worker);
    let asker = Asker {
        borrower: Some(id),
        ..Asker::new(NAMESPACE)
    };
    ensure!(scheduler.count_hits(&[asker], &hashes(), PATIENCE) == 0);
    Ok(())
}

#[test]
fn one_that_does_not_share_is_promised_its_own_only() -> Result<()> {
    let node = Node::start(&[])?;
    let gate = Gate::before(&node)?;
    let _donor = donor(&node, 1, 2)?;
    let writer = engine_on(&node, node.session("writer")?, 0)?;
    writer.reserve(1)?;
    ensure!(writer.store(&sequence())?.stored == BLOCKS);
    let mut alone = config(&node, 0, 0);
    alone.share = false;
    let alone = Engine::new(Some(gate.session("alone")?), node.layer()?, alone)?;
    let scheduler = node.session("scheduler")?;
    eventually("the borrower to be known", || {
        Ok(gate.count("Keep", Stage::Answered) > 0)
    })?;
    ensure!(promised(&scheduler, &alone.borrower) == 0);
    // It could not read the writer's blocks, so its own are no duplicates.
    alone.reserve(1)?;
    let stored = alone.store(&sequence())?;
    ensure!(stored.stored == BLOCKS, "{stored:?}");
    ensure!(promised(&scheduler, &alone.borrower) == BLOCKS);
    ensure!(alone.fetch(&sequence())? == all(BLOCKS));
    Ok(())
}

#[test]
fn what_only_the_host_tier_has_goes_to_donors_when_they_come() -> Result<()> {
    let node = Node::start(&[])?;
    let (scheduler, gate) = (node.session("scheduler")?, Gate::before(&node)?);
    let worker = Engine::new(
        Some(gate.session("worker")?),
        node.layer()?,
        config(&node, 0, 10),
    )?;
    ensure!(worker.store(&sequence())?.stored == BLOCKS);
    let replica = engine_on(&node, node.session("replica")?, 0)?;
    // Without a donor they stay where they are, however often the broker is asked for room.
    let asked = gate.count("Lease", Stage::Answered);
    eventually("the broker to be asked for room again", || {
        Ok(gate.count("Lease", Stage::Answered) > asked + 2)
    })?;
    ensure!(worker.lookup(&sequence()).runs()[0].medium == Medium::Host);
    ensure!(replica.fetch(&sequence())? == all(0));
    // One slab for each of them.
    let _donor = donor(&node, 1, 2)?;
    eventually("the blocks to be stored again", || {
        Ok(worker.borrower.stats().promoted_blocks == u64::from(BLOCKS))
    })?;
    let hit = worker.lookup(&sequence());
    ensure!(hit.blocks() == BLOCKS && hit.runs()[0].medium == Medium::Hbm);
    ensure!(worker.fetch(&sequence())? == all(BLOCKS));
    ensure!(worker.borrower.stats().host_blocks == 0);
    // Others find them now, byte for byte, and the scheduler finds each once.
    eventually("the replica to find them", || {
        Ok(replica.lookup(&sequence()).blocks() == BLOCKS)
    })?;
    ensure!(replica.fetch(&sequence())? == all(BLOCKS));
    ensure!(promised(&scheduler, &worker.borrower) == BLOCKS);
    // The host tier has room again for what donors have none for.
    let more: Vec<u32> = (100..110).collect();
    worker.store(&more)?;
    ensure!(worker.fetch(&more)? == all(10));
    Ok(())
}
