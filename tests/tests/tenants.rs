//! Slabs change tenants for as long as the course says, over broker restarts, and nobody ever reads a byte of another.

use std::{collections::HashMap, os::unix::fs::FileExt};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::v1::{self, session_request, session_response};
use swiftcache_tests::{
    PATIENCE,
    engine::{SLAB_BYTES, eventually},
    node::Node,
    seed::Course,
    wire::{Member, Wire},
};

const SLABS: u64 = 4;
const TENANTS: [&str; 3] = ["red", "green", "blue"];

/// What a tenant writes.
fn ink(tenant: usize) -> u8 {
    0xa1 + tenant as u8
}

fn lease(of: &Member) -> Result<Vec<v1::Grant>> {
    let mut grants = Vec::new();
    eventually("a slab", || {
        // A broker that is away is asked again.
        if let Ok(leased) = of.lease("model", "SIM-0", SLABS * SLAB_BYTES, SLAB_BYTES / 4) {
            grants.extend(leased.grants);
        }
        Ok(!grants.is_empty())
    })?;
    Ok(grants)
}

/// A byte in the slab that is neither zero nor the tenant's own.
fn leaked(of: &Member, tenant: usize, grant: &v1::Grant) -> Result<Option<u8>> {
    let memory = of.open(grant)?;
    let mut bytes = vec![0; SLAB_BYTES as usize];
    memory.read_exact_at(&mut bytes, grant.offset)?;
    let foreign = bytes.iter().find(|byte| ![0, ink(tenant)].contains(byte));
    memory.write_all_at(&vec![ink(tenant); SLAB_BYTES as usize], grant.offset)?;
    Ok(foreign.copied())
}

#[test]
fn slabs_change_tenants_and_no_byte_leaks() -> Result<()> {
    let mut course = Course::new("slabs change tenants", 40);
    let mut node = Node::start(&[])?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    donor.keep(SLABS * SLAB_BYTES);
    let mut last: HashMap<Vec<u8>, usize> = HashMap::new();
    let mut handed_over = 0;
    while course.goes_on() {
        let tenant = course.rng.random_range(0..TENANTS.len());
        let member = Wire::new(&node.socket())?.member("a tenant", TENANTS[tenant])?;
        let grants = lease(&member)?;
        for grant in &grants {
            let before = last.insert(grant.region_id.to_vec(), tenant);
            handed_over += u32::from(before.is_some_and(|before| before != tenant));
            let foreign = leaked(&member, tenant, grant)?;
            ensure!(foreign.is_none(), "{foreign:?} of {before:?} is {tenant}'s");
        }
        if course.rng.random_ratio(1, 10) {
            // While the slabs are lent. Who leases them is in the ledger.
            node.kill_broker()?;
            node.start_broker()?;
            let wire = Wire::new(&node.socket())?;
            let held: Vec<u64> = grants.iter().map(|grant| grant.lease_id).collect();
            let again = Member {
                wire,
                session: member.session,
            };
            let refused = wire_resume(&again, TENANTS[tenant], &held)?;
            ensure!(refused.is_empty(), "{refused:?}");
            again.leave()?;
            continue;
        }
        if course.rng.random() {
            for grant in &grants {
                member.release(grant.lease_id)?;
            }
        }
        member.leave()?;
    }
    ensure!(handed_over > 0, "no slab has changed its tenant");
    ensure!(donor.status().scrubbed > 0);
    ensure!(donor.close(PATIENCE));
    Ok(())
}

fn wire_resume(member: &Member, tenant: &str, held: &[u64]) -> Result<Vec<u64>> {
    let request = v1::RegisterRequest {
        name: "a tenant".to_owned(),
        tenant: tenant.to_owned(),
        resume_session_id: member.session,
        held_lease_ids: held.to_vec(),
        ..Default::default()
    };
    let registered = member.wire.wait(member.wire.broker().register(request))?;
    Ok(registered.into_inner().refused_lease_ids)
}

/// The twin: a donor that says that it has zeroed a slab, and has not.
#[test]
fn a_leak_between_tenants_is_noticed() -> Result<()> {
    let node = Node::start(&[])?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("a lazy donor", "")?;
    let mut stream = donor.attach()?;
    donor.offer([7; 16], "SIM-1", 1, SLAB_BYTES)?;
    let (red, blue) = (wire.member("red", "red")?, wire.member("blue", "blue")?);
    let grant = lease(&red)?.pop().context("no grant")?;
    ensure!(leaked(&red, 0, &grant)?.is_none());
    red.leave()?;
    let asked = blue.lease("model", "SIM-0", SLAB_BYTES, SLAB_BYTES / 4)?;
    ensure!(asked.grants.is_empty(), "{asked:?}");
    let heard = stream.hear()?;
    let session_response::Message::Scrub(scrub) = heard else {
        anyhow::bail!("{heard:?}");
    };
    stream.say(session_request::Message::Scrubbed(v1::Scrubbed {
        region_id: scrub.region_id,
        slab: scrub.slab,
        generation: scrub.generation,
    }))?;
    let grant = lease(&blue)?.pop().context("no grant")?;
    ensure!(leaked(&blue, 2, &grant)? == Some(ink(0)));
    Ok(())
}
