//! Too many sessions, descriptors, slabs, unread messages and restarts.

use std::{collections::BTreeSet, os::unix::net::UnixStream, process::Command};

use anyhow::{Context, Result, bail, ensure};
use swiftcache_proto::v1::{self, session_response::Message};
use swiftcache_tests::{
    census::{Census, resident_bytes},
    crew::{BorrowerProcess, Job, donor_process},
    engine::{SLAB_BYTES, eventually},
    node::{Node, Setup},
    operator::Operator,
    programs::program,
    seed::Course,
    wire::{Member, Wire, memory},
};
use tonic::Code;

/// The smallest slab that the broker accepts, bytes.
const SLAB: u64 = 64 << 10;

#[test]
fn sessions_beyond_the_limit_are_refused_and_those_within_are_served() -> Result<()> {
    const SESSIONS: usize = 10_000;
    // One process gets all but sixteen, and the donor is one of its sessions.
    let node = Node::start(&["--max-sessions", &(SESSIONS + 17).to_string()])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", 1, SLAB)?;
    let before = Census::of(node.broker()?.pid())?;
    let mut members = Vec::new();
    let mut streams = Vec::new();
    while members.len() < SESSIONS {
        let connection = wire.another(&node.socket())?;
        for _ in 0..100 {
            let member = connection.member(&format!("member-{}", members.len()), "")?;
            streams.push(member.attach()?);
            members.push(member);
        }
    }
    for _ in 0..3 {
        let refused = wire
            .member("one too many", "")
            .err()
            .context("was let in")?;
        ensure!(refused.code() == Code::ResourceExhausted, "{refused:?}");
        ensure!(refused.message().contains("sessions"), "{refused:?}");
    }
    // The last session is served like the first, and no session costs a descriptor.
    for member in [&members[0], &members[SESSIONS - 1]] {
        let leased = member.lease("model", "SIM-0", SLAB, 4096)?;
        let grant = leased.grants.first().context("no slab")?;
        member.publish(grant.lease_id, grant.generation, &[[1; 16]])?;
        ensure!(members[SESSIONS / 2].hits("model", &[[1; 16]])? == 1);
        member.leave()?;
    }
    ensure!(operator.node()?.sessions as usize == SESSIONS - 1);
    let attached = operator.sessions()?;
    let attached = attached.iter().filter(|session| session.attached).count();
    ensure!(attached == SESSIONS - 2, "{attached} streams");
    // One of ten thousand sessions gets the revocation of the slab that the donor withdraws.
    let lessee = &members[1];
    let grant = lessee.lease("model", "SIM-0", SLAB, 4096)?.grants;
    let grant = grant.first().context("no slab")?.lease_id;
    donor.withdraw(&[[1; 16]], 60_000)?;
    let revoke = streams[1].revocation()?;
    ensure!(revoke.lease_id == grant, "{revoke:?}");
    streams[1].acknowledge(revoke.lease_id, revoke.generation)?;
    operator.eventually("the slab to be back", |account| account.offered_bytes == 0)?;
    donor.offer([2; 16], "SIM-1", 1, SLAB)?;
    // The broker watches each connection by a pidfd, and needs no pidfd for a session.
    let watched = Census::of(node.broker()?.pid())?.count("[pidfd]");
    ensure!(
        watched <= before.count("[pidfd]") + SESSIONS / 100,
        "{watched} pidfds"
    );
    wire.member("two have left", "")?;
    ensure!(operator.settled()?.free_bytes == SLAB);
    Ok(())
}

#[test]
fn a_broker_out_of_descriptors_serves_those_it_has() -> Result<()> {
    let node = Node::start_with(Setup {
        shell: Some("ulimit -n 96".to_owned()),
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    let mut stream = donor.attach()?;
    // Each connection and each upload takes a descriptor.
    let crowd = || -> Result<Vec<UnixStream>> {
        let sockets = [node.socket(), wire.fd_socket().to_owned()];
        let all = (0..150).flat_map(|_| sockets.iter().map(UnixStream::connect));
        // Connecting fails when the queue of connections that wait to be accepted is full. That is fine here.
        Ok(all.filter_map(Result::ok).collect())
    };
    let connections = crowd()?;
    let mut uploaded = 0_u8;
    while donor.upload([100 + uploaded; 16], &memory(4096)?).is_ok() && uploaded < 100 {
        uploaded += 1;
    }
    ensure!(uploaded < 100, "descriptors without end");
    operator.account()?;
    donor.hits("model", &[[1; 16]])?;
    drop(connections);
    eventually("new connections to be served", || {
        let fresh = Wire::new(&node.socket())?;
        Ok(fresh
            .member("fresh", "")
            .is_ok_and(|member| member.leave().is_ok()))
    })?;
    // Uploads that were never offered end with their session. Then there is room again.
    donor.leave()?;
    ensure!(stream.hear().is_err());
    let donor = wire.member("donor", "")?;
    eventually("uploads to be taken", || {
        Ok(donor.offer([9; 16], "SIM-1", 1, SLAB).is_ok())
    })?;
    let lessee = wire.member("lessee", "")?;
    let leased = lessee.lease("model", "SIM-0", SLAB, 4096)?;
    lessee.open(leased.grants.first().context("no slab")?)?;
    ensure!(operator.settled()?.leased_bytes == SLAB);
    Ok(())
}

/// The ids of all leases.
fn leased(operator: &Operator) -> Result<BTreeSet<u64>> {
    Ok((operator.leases()?.iter())
        .map(|lease| lease.lease_id)
        .collect())
}

/// Leases until no slab is left, at most `most` slabs at a time. Returns the grants.
fn lease_all(lessee: &Member, most: u64) -> Result<Vec<v1::Grant>> {
    let mut grants = Vec::new();
    loop {
        let leased = lessee.lease("model", "SIM-0", most * SLAB, 4096)?;
        if leased.grants.is_empty() {
            return Ok(grants);
        }
        grants.extend(leased.grants);
    }
}

#[test]
fn a_reader_too_slow_for_its_revocations_gets_them_again() -> Result<()> {
    // More slabs, and so more revocations, than a stream's queue holds.
    const SLABS: u64 = 16_384;
    let regions = [[1; 16], [2; 16], [3; 16]];
    let slabs = 3 * SLABS;
    let node = Node::start(&["--drain-ms", "60000"])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    for (region, device) in regions.iter().zip(["SIM-0", "SIM-1", "SIM-2"]) {
        donor.offer(*region, device, SLABS, SLAB)?;
    }
    let mut returns = donor.attach()?;
    let slow = Wire::holding_little(&node.socket())?.member("slow", "")?;
    let grants = lease_all(&slow, slabs)?;
    ensure!(grants.len() as u64 == slabs, "{} of {slabs}", grants.len());
    let account = operator.account()?;
    ensure!(account.leased_bytes == slabs * SLAB, "{account:?}");

    ensure!(
        operator.leases()?.len() as u64 == slabs,
        "pages are missing"
    );
    // The status of so many leases can be shown. It is tried again, because the program waits only seconds for an
    // answer.
    let mut said = String::new();
    eventually("the status of them all", || {
        let mut status = Command::new(program("swiftcache")?);
        let status = status.args(["status", "--json", "--socket"]);
        let status = status.arg(node.socket()).output()?;
        said = String::from_utf8_lossy(&status.stderr).into_owned();
        Ok(status.status.success())
    })
    .context(said)?;
    let mut unread = slow.attach()?;
    donor.withdraw(&regions, 60_000)?;
    // The slow session has not read anything, and everyone else is served.
    ensure!(operator.account()?.draining_bytes == slabs * SLAB);
    wire.member("prompt", "")?.leave()?;
    let mut told = 0;
    while let Ok(message) = unread.hear() {
        ensure!(matches!(message, Message::Revoke(_)), "{message:?}");
        told += 1;
    }
    ensure!(told < slabs, "its queue has no end");
    // After attaching again it gets all outstanding revocations, also those that it has read before. It may be too slow once
    // more, or the broker be too slow for what it says: its connection ends when too many small messages are unread, and those
    // are lost. So it attaches again until nothing is left.
    eventually("everything to be let go", || {
        let Ok(mut again) = slow.attach() else {
            return Ok(false);
        };
        let mut left: BTreeSet<u64> = leased(&operator)?;
        while !left.is_empty() {
            let Ok(message) = again.hear() else {
                break;
            };
            let Message::Revoke(revoke) = message else {
                bail!("not a revocation: {message:?}");
            };
            left.remove(&revoke.lease_id);
            if (again.acknowledge(revoke.lease_id, revoke.generation)).is_err() {
                break;
            }
        }
        // What it has said arrives meanwhile.
        let mut before = usize::MAX;
        loop {
            let now = leased(&operator)?.len();
            if now == 0 || now >= before {
                return Ok(now == 0);
            }
            before = now;
        }
    })?;
    let mut returned = [
        returns.returned()?,
        returns.returned()?,
        returns.returned()?,
    ];
    returned.sort();
    ensure!(returned == regions.map(Vec::from));
    ensure!(operator.settled()?.offered_bytes == 0);
    Ok(())
}

#[test]
fn a_broker_that_restarts_again_and_again_loses_nothing() -> Result<()> {
    let mut course = Course::new("restarts", 40);
    let mut node = Node::start(&["--pin-ms", "100"])?;
    let operator = Operator::of(&node)?;
    let mut donor = donor_process(&node, 1, 4)?;
    let mut borrower = BorrowerProcess::start(&node, 0, &Job::new("borrower", course.seed))?;
    borrower.run("reserve 4")?;
    let donors = Census::of(donor.pid())?;
    borrower.tell("mix 1000000000")?;
    while course.goes_on() {
        node.kill_broker()?;
        node.start_broker()?;
        borrower.advance(2)?;
    }
    eventually("everyone to be back", || {
        let sessions = operator.sessions()?;
        Ok(sessions.len() == 2 && sessions.iter().all(|session| session.attached))
    })?;
    let account = operator.account()?;
    ensure!(account.offered_bytes == 4 * SLAB_BYTES, "{account:?}");
    ensure!(
        account.leased_bytes == account.offered_bytes,
        "leases were lost: {account:?}"
    );
    let mut now = donors.clone();
    eventually("the donor to hold what it held", || {
        now = Census::of(donor.pid())?;
        Ok(now.beyond(&donors).is_empty())
    })
    .with_context(|| format!("{donors:?} {now:?}"))?;
    borrower.run("sweep-store")?;
    ensure!(borrower.run("sweep-fetch")?.served > 0);
    borrower.finish()?;
    donor.finish()?;
    operator.eventually("nothing to be on offer", |account| {
        account.offered_bytes == 0
    })
}

#[test]
fn a_busy_broker_keeps_its_size() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    let pid = node.broker()?.pid();
    let round = |n: u8| -> Result<()> {
        let donor = wire.member("donor", "")?;
        let mut stream = donor.attach()?;
        donor.offer([n; 16], "SIM-1", 512, SLAB)?;
        let lessee = wire.member("lessee", "")?;
        for grant in lease_all(&lessee, 512)? {
            let hashes: Vec<[u8; 16]> = (0..16)
                .map(|slot| [(grant.lease_id % 251) as u8, slot, n, 3].repeat(4))
                .map(|hash| hash.try_into().unwrap_or_default())
                .collect();
            lessee.publish(grant.lease_id, grant.generation, &hashes)?;
            lessee.hits("model", &hashes)?;
        }
        lessee.leave()?;
        donor.withdraw(&[[n; 16]], 1_000)?;
        stream.returned()?;
        donor.leave()?;
        Ok(())
    };
    for n in 0..3 {
        round(n)?;
    }
    let before = (resident_bytes(pid)?, Census::of(pid)?);
    for n in 3..13 {
        round(n)?;
    }
    let mut after = Census::of(pid)?;
    eventually("the broker to hold what it held", || {
        after = Census::of(pid)?;
        Ok(after.beyond(&before.1).is_empty())
    })
    .with_context(|| format!("{before:?} {after:?}"))?;
    // What is freed is handed back some seconds later.
    let mut grown = 0;
    eventually("the broker to be as large as it was", || {
        grown = resident_bytes(pid)?.saturating_sub(before.0);
        Ok(grown < 8 << 20)
    })
    .with_context(|| format!("grew by {grown} bytes"))?;
    Ok(())
}
