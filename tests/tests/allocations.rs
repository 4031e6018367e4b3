//! Slabs of one allocation, two tenants, and what each can reach through the descriptor of its own grant.

use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use swiftcache_proto::v1::{self, Shortfall};
use swiftcache_tests::{
    engine::eventually,
    node::Node,
    wire::{Member, Wire},
};

const SLAB: u64 = 64 << 10;
const SECRET: &[u8] = b"what the first tenant keeps";

/// A node on which a donor offers two slabs of one allocation, to tenants that may share it or not.
struct Scene {
    donor: Member,
    first: Member,
    second: Member,
    _node: Node,
}

impl Scene {
    fn new(shared: bool) -> Result<Self> {
        let node = Node::start(&[])?;
        let wire = Wire::new(&node.socket())?;
        let donor = wire.member("donor", "")?;
        donor.offer_to([7; 16], "SIM-1", 2, SLAB, shared)?;
        Ok(Self {
            donor,
            first: wire.member("first", "first")?,
            second: wire.member("second", "second")?,
            _node: node,
        })
    }
}

fn lease(of: &Member) -> Result<v1::LeaseResponse> {
    Ok(of.lease("model", "SIM-1", SLAB, SLAB / 4)?)
}

#[test]
fn a_tenant_gets_no_neighbour_of_anothers_slab() -> Result<()> {
    let scene = Scene::new(false)?;
    let grant = lease(&scene.first)?.grants.remove(0);
    scene
        .first
        .open(&grant)?
        .write_all_at(SECRET, grant.offset)?;
    let leased = lease(&scene.second)?;
    ensure!(leased.grants.is_empty(), "{leased:?}");
    ensure!(leased.shortfall() == Shortfall::NoFreeSlab, "{leased:?}");
    // The other slab is there: for the first tenant.
    let more = lease(&scene.first)?.grants.remove(0);
    // Both are zeroed before the second tenant has one of them.
    let mut stream = scene.donor.attach()?;
    for lease in [grant.lease_id, more.lease_id] {
        scene.first.release(lease)?;
    }
    let leased = lease(&scene.second)?;
    ensure!(leased.shortfall() == Shortfall::Scrubbing, "{leased:?}");
    for _ in 0..2 {
        let heard = stream.hear()?;
        let v1::session_response::Message::Scrub(scrub) = heard else {
            anyhow::bail!("{heard:?}");
        };
        ensure!(lease(&scene.second)?.grants.is_empty());
        stream.say(v1::session_request::Message::Scrubbed(v1::Scrubbed {
            region_id: scrub.region_id,
            slab: scrub.slab,
            generation: scrub.generation,
        }))?;
    }
    eventually("the second tenant to have one", || {
        Ok(lease(&scene.second)?.grants.len() == 1)
    })
}

/// The twin: with its donor's word that tenants may share it, the second tenant reads the first one's bytes.
#[test]
fn a_donor_that_lets_tenants_share_exposes_them_to_each_other() -> Result<()> {
    let scene = Scene::new(true)?;
    let grant = lease(&scene.first)?.grants.remove(0);
    scene
        .first
        .open(&grant)?
        .write_all_at(SECRET, grant.offset)?;
    let mut leased = lease(&scene.second)?;
    let neighbour = leased.grants.pop().context("nothing was granted")?;
    let mut read = [0; SECRET.len()];
    let memory = scene.second.open(&neighbour)?;
    memory.read_exact_at(&mut read, grant.offset)?;
    ensure!(read == *SECRET, "{read:?}");
    Ok(())
}
