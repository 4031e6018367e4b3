//! A client that reads none of its answers costs the broker little memory.

use std::{
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use anyhow::{Result, ensure};
use prost::Message;
use swiftcache_proto::v1;
use swiftcache_tests::{
    census::resident_bytes,
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::program,
    wire::Wire,
};
use tonic::Code;

/// Blocks that one lookup asks for. Found in the opposite order, each is an extent of its own in the answer.
const BLOCKS: u64 = 4_096;
const BLOCK: u64 = 64;
const CONNECTIONS: usize = 6;
const CALLS: usize = 100;

/// Lookups that the broker has answered.
fn answered(node: &Node) -> Result<usize> {
    let text = node.metrics()?;
    let is_count =
        |line: &&str| line.starts_with("swiftcache_rpc_duration_seconds_count{rpc=\"Lookup\"");
    let line = text.lines().find(is_count);
    let count = line.and_then(|line| line.split_ascii_whitespace().last());
    count.map_or(Ok(0), |count| Ok(count.parse::<f64>()? as usize))
}

/// Makes the same call on all connections, and leaves the answers where they are. Returns how many were refused, and by how
/// much the broker has grown meanwhile, bytes.
fn calls(node: &Node, wires: &[Wire], lookup: &v1::LookupRequest) -> Result<(usize, u64)> {
    let before = (answered(node)?, resident_bytes(node.broker()?.pid())?);
    let (refused, read) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    for wire in wires {
        wire.wait(async {
            for _ in 0..CALLS {
                let (mut client, lookup) = (wire.broker(), lookup.clone());
                let (refused, read) = (Arc::clone(&refused), Arc::clone(&read));
                tokio::spawn(async move {
                    match client.lookup(lookup).await {
                        Err(status) if status.code() == Code::ResourceExhausted => {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        _ => {
                            read.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
    }
    eventually("every call to be answered or refused", || {
        let answered = answered(node)? - before.0;
        Ok(answered + refused.load(Ordering::Relaxed) >= wires.len() * CALLS)
    })?;
    let after = resident_bytes(node.broker()?.pid())?;
    Ok((
        refused.load(Ordering::Relaxed),
        after.saturating_sub(before.1),
    ))
}

#[test]
fn answers_that_nobody_reads_cost_little() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let node = Node::start_with(Setup {
        options: ["--metrics-listen", "127.0.0.1:0"]
            .map(str::to_owned)
            .into(),
        log: "info".to_owned(),
        log_file: Some(directory.path().join("log")),
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", 1, BLOCKS * BLOCK)?;
    let lessee = wire.member("lessee", "")?;
    let grant = lessee
        .lease("model", "SIM-0", BLOCKS * BLOCK, BLOCK)?
        .grants
        .remove(0);
    let mut hashes: Vec<[u8; 16]> = (1..=BLOCKS).map(|n| u128::from(n).to_le_bytes()).collect();
    lessee.publish(grant.lease_id, grant.generation, &hashes)?;
    hashes.reverse();
    let reader = wire.member("reader", "")?;
    let lookup = v1::LookupRequest {
        session_id: reader.session,
        namespace: "model".to_owned(),
        hashes: hashes.concat().into(),
        device_uuid: "SIM-0".to_owned(),
        unpinned: true,
        ..v1::LookupRequest::default()
    };
    let answer = wire
        .wait(wire.broker().lookup(lookup.clone()))?
        .into_inner();
    let all = (answer.encoded_len() * CONNECTIONS * CALLS) as u64;
    ensure!(answer.extents.len() as u64 == BLOCKS);

    // Who reads gets them all, and the broker does not grow with them.
    let reading = (0..CONNECTIONS).map(|_| Wire::new(&node.socket()));
    let reading: Vec<_> = reading.collect::<Result<_>>()?;
    let (refused, _) = calls(&node, &reading, &lookup)?;
    ensure!(refused == 0, "{refused} calls of a reader were refused");
    drop(reading);

    let idlers = (0..CONNECTIONS).map(|_| Wire::reading_nothing(&node.socket()));
    let idlers: Vec<_> = idlers.collect::<Result<_>>()?;
    let (refused, grown) = calls(&node, &idlers, &lookup)?;
    ensure!(refused > 0, "nothing was refused");
    ensure!(
        grown < all / 2,
        "{grown} bytes for {all} bytes of unread answers"
    );
    // Another process is served as ever.
    let mut status = Command::new(program("swiftcache")?);
    let status = status.args(["status", "--socket"]).arg(node.socket());
    ensure!(status.output()?.status.success());
    drop(idlers);
    // The reader is served again once what nobody read is gone.
    eventually("room for answers", || {
        let found = wire.wait(wire.broker().lookup(lookup.clone()));
        Ok(found.is_ok_and(|found| found.into_inner().extents.len() as u64 == BLOCKS))
    })
}
