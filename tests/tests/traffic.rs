//! The bytes that engines move, as operators see them. Sessions report these bytes, because the broker sees no copies.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use swiftcache_client::{
    cache::BorrowerConfig,
    donor::{Donor, DonorConfig},
    session::{Asker, Session},
};
use swiftcache_proto::{domain::LinkKind, traffic::Traffic};
use swiftcache_tests::{
    PATIENCE,
    engine::{self, BLOCK_BYTES, Engine, SLAB_BYTES, eventually},
    node::{Node, Setup},
    operator::Operator,
    programs::program,
    wire::Wire,
};
use tonic::Code;

const SEQUENCE: [u32; 6] = [1, 2, 3, 4, 5, 6];
const BYTES: u64 = SEQUENCE.len() as u64 * BLOCK_BYTES;

fn donor(node: &Node) -> Result<Donor> {
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    donor.grow(SLAB_BYTES)?;
    Ok(donor)
}

/// An engine that has stored and fetched [`SEQUENCE`].
fn engine(node: &Node, session: Session) -> Result<Engine> {
    let config = engine::config(node.device(0), 1);
    let engine = Engine::new(Some(session), node.layer()?, config)?;
    engine.reserve(1)?;
    ensure!(engine.store(&SEQUENCE)?.stored == SEQUENCE.len() as u32);
    ensure!(engine.fetch(&SEQUENCE)?.served == SEQUENCE.len() as u32);
    Ok(engine)
}

fn seen(operator: &Operator) -> Result<Traffic> {
    let traffic = operator.node()?.traffic.context("no traffic")?;
    Ok(Traffic::try_from(&traffic)?)
}

#[test]
fn the_node_knows_what_its_engines_move_over_which_link() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node)?;
    let operator = Operator::of(&node)?;
    ensure!(seen(&operator)? == Traffic::default());
    let engine = engine(&node, node.session("engine")?)?;
    eventually("the engine's report", || {
        let traffic = seen(&operator)?;
        Ok(traffic.loaded[LinkKind::Nvlink] == BYTES && traffic.stored[LinkKind::Nvlink] == BYTES)
    })?;
    let traffic = seen(&operator)?;
    ensure!(
        traffic.own_blocks == 6 && traffic.lookup_blocks >= 6,
        "{traffic:?}"
    );
    ensure!(traffic.loaded.total() == BYTES, "{traffic:?}");
    let sessions = operator.sessions()?;
    let of = |name: &str| sessions.iter().find(|session| session.name == name);
    let engines = of("engine").context("no engine")?;
    let reported = engines.traffic.as_ref().context("it reported nothing")?;
    ensure!(Traffic::try_from(reported)? == traffic);
    ensure!(of("donor").context("no donor")?.traffic.is_none());

    // The session reports its last bytes before it leaves. The broker keeps them in its totals.
    ensure!(engine.fetch(&SEQUENCE)?.served == 6);
    drop(engine);
    eventually("the engine to leave", || {
        Ok(operator
            .sessions()?
            .iter()
            .all(|session| session.name != "engine"))
    })?;
    let traffic = seen(&operator)?;
    ensure!(traffic.loaded[LinkKind::Nvlink] == 2 * BYTES, "{traffic:?}");
    Ok(())
}

#[test]
fn a_restarted_broker_counts_from_nothing() -> Result<()> {
    let mut node = Node::start(&[])?;
    let _donor = donor(&node)?;
    let session = node.session("engine")?;
    let engine = engine(&node, session.clone())?;
    let operator = Operator::of(&node)?;
    eventually("the engine's report", || {
        let traffic = seen(&operator)?;
        Ok(traffic.stored[LinkKind::Nvlink] == BYTES && traffic.loaded[LinkKind::Nvlink] == BYTES)
    })?;
    // When a later call is answered, the report is answered too. So these bytes are not reported again.
    session
        .lookup(&Asker::new("another"), &[engine::hash(1)], PATIENCE)
        .wait()?;
    node.kill_broker()?;
    node.start_broker()?;
    let operator = Operator::of(&node)?;
    eventually("the engine's blocks in the new index", || {
        Ok(operator.node()?.indexed_blocks == 6)
    })?;
    ensure!(engine.fetch(&SEQUENCE)?.served == 6);
    eventually("the engine's next report", || {
        Ok(seen(&operator)?.loaded[LinkKind::Nvlink] > 0)
    })?;
    let traffic = seen(&operator)?;
    ensure!(traffic.loaded[LinkKind::Nvlink] == BYTES, "{traffic:?}");
    ensure!(
        traffic.stored.total() == 0,
        "these bytes were reported to the broker before: {traffic:?}"
    );
    Ok(())
}

/// What a scheduler in a process of its own asks and finds is told once, by tier: its worker's loads of it are not asked for
/// anew. The twin: a worker that looks for itself is counted.
#[test]
fn what_a_scheduler_finds_for_its_worker_is_counted_once() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node)?;
    let operator = Operator::of(&node)?;
    let engine = engine(&node, node.session("worker")?)?;
    eventually("the worker's own lookups", || {
        Ok(seen(&operator)?.own_blocks == 6)
    })?;
    let before = seen(&operator)?;
    let scheduler = node.session("scheduler")?;
    let asker = Asker {
        borrower: Some(engine.borrower.id()),
        ..Asker::new(engine::NAMESPACE)
    };
    let asked: Vec<_> = SEQUENCE.iter().chain(&[91, 92]).copied().collect();
    let asked: Vec<_> = asked.into_iter().map(engine::hash).collect();
    // Of two ranks: both look for their own part.
    let ranks = [asker.clone(), asker.clone()];
    ensure!(scheduler.count_hits(&ranks, &asked, PATIENCE) == 6);
    ensure!(
        engine
            .borrower
            .lookup_promised(&asked[..6], PATIENCE)
            .blocks()
            == 6
    );
    let told = |lookup_blocks, own_blocks| {
        let expected = (
            before.lookup_blocks + lookup_blocks,
            before.own_blocks + own_blocks,
        );
        let what = format!("{expected:?} blocks asked for and found");
        eventually(&what, || {
            let traffic = seen(&operator)?;
            Ok((traffic.lookup_blocks, traffic.own_blocks) == expected)
        })
    };
    told(16, 12)?;
    // What nobody has is asked for and not found.
    ensure!(scheduler.count_hits(&[asker], &asked[6..], PATIENCE) == 0);
    told(18, 12)?;
    let stats = engine.borrower.stats();
    ensure!(stats.promised_hits.donor == 6, "{stats:?}");
    ensure!(engine.lookup(&SEQUENCE).blocks() == 6);
    told(24, 18)
}

/// The broker is asked only for what an engine does not find itself, and finds none of it; `swiftcache status` shows what
/// engines found.
#[test]
fn status_shows_what_engines_found_and_not_what_the_broker_did() -> Result<()> {
    let node = Node::start(&[])?;
    let _donor = donor(&node)?;
    let operator = Operator::of(&node)?;
    let config = BorrowerConfig {
        share: true,
        ..engine::config(node.device(0), 1)
    };
    let engine = Engine::new(Some(node.session("engine")?), node.layer()?, config)?;
    engine.reserve(1)?;
    ensure!(engine.store(&SEQUENCE)?.stored == 6);
    let asked: Vec<_> = SEQUENCE.iter().chain(&[91, 92]).copied().collect();
    ensure!(engine.lookup(&asked).blocks() == 6);
    eventually("the engine's report", || {
        Ok(seen(&operator)?.lookup_blocks == 8)
    })?;
    let counters = operator.node()?.counters.context("no counters")?;
    ensure!(
        counters.lookup_blocks > 0 && counters.hit_blocks == 0,
        "the broker should have been asked in vain: {counters:?}"
    );
    let mut status = Command::new(program("swiftcache")?);
    let shown = status
        .args(["status", "--socket"])
        .arg(node.socket())
        .output()?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(
        shown.contains("engines found 6 of 8 blocks (75 %): 6 in own leases"),
        "{shown}"
    );
    for part in ["0 of 2", "0 %"] {
        ensure!(!shown.contains(part), "{part:?} is in\n{shown}");
    }
    Ok(())
}

#[test]
fn prometheus_is_told_by_link_and_direction() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let options = ["--metrics-listen", "127.0.0.1:0"];
    let node = Node::start_with(Setup {
        options: options.map(str::to_owned).into(),
        log: "info".to_owned(),
        log_file: Some(directory.path().join("log")),
        ..Setup::default()
    })?;
    let _donor = donor(&node)?;
    let before = node.metrics()?;
    let counter = |link: &str, direction: &str| {
        format!("swiftcache_link_bytes_total{{link=\"{link}\",direction=\"{direction}\"}} ")
    };
    for link in ["same-device", "nvlink", "pcie", "host"] {
        for direction in ["load", "store"] {
            let line = counter(link, direction) + "0";
            ensure!(before.contains(&line), "{line} is not in {before}");
        }
    }
    let _engine = engine(&node, node.session("engine")?)?;
    let operator = Operator::of(&node)?;
    eventually("the engine's report", || {
        Ok(seen(&operator)?.loaded[LinkKind::Nvlink] == BYTES)
    })?;
    let after = node.metrics()?;
    for line in [
        counter("nvlink", "load") + &BYTES.to_string(),
        counter("nvlink", "store") + &BYTES.to_string(),
        "swiftcache_engine_hit_blocks_total{tier=\"own\"} 6".to_owned(),
    ] {
        ensure!(after.contains(&line), "{line} is not in {after}");
    }
    Ok(())
}

#[test]
fn only_its_own_process_speaks_for_a_session() -> Result<()> {
    let node = Node::start(&[])?;
    let wire = Wire::new(&node.socket())?;
    let report = |session_id| {
        let request = swiftcache_proto::v1::ReportRequest {
            session_id,
            // An older client may send a report without traffic.
            traffic: None,
            ..Default::default()
        };
        wire.wait(wire.broker().report(request)).map(drop)
    };
    let member = wire.member("member", "")?;
    report(member.session)?;
    member.leave()?;
    let gone = report(member.session).err().context("taken")?;
    ensure!(gone.code() == Code::NotFound, "{gone:?}");
    Ok(())
}
