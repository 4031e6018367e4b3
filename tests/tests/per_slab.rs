//! Giving back is by allocation. Donors that are made of one allocation for each slab have every slab back as soon as nobody
//! can touch that one; and a reader that does not answer pays for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::v1::{self, session_response::Message};
use swiftcache_tests::{
    PATIENCE,
    engine::{SLAB_BYTES, eventually},
    node::Node,
    operator::Operator,
    wire::{Member, Stream, Wire},
};
use tonic::Code;

const SLABS: u64 = 8;

fn lease(of: &Member, slabs: u64) -> Result<Vec<v1::Grant>> {
    let leased = of.lease("model", "SIM-0", slabs * SLAB_BYTES, SLAB_BYTES / 4)?;
    ensure!(leased.grants.len() as u64 == slabs, "{leased:?}");
    Ok(leased.grants)
}

/// Acknowledges what is revoked, but for one lease.
fn let_go(stream: &mut Stream, revocations: u64, but: u64) -> Result<()> {
    for _ in 0..revocations {
        let heard = stream.hear()?;
        let Message::Revoke(revoke) = heard else {
            anyhow::bail!("{heard:?}");
        };
        if revoke.lease_id != but {
            stream.acknowledge(revoke.lease_id, revoke.generation)?;
        }
    }
    Ok(())
}

#[test]
fn one_unacknowledged_slab_of_eight_holds_back_none_of_the_others() -> Result<()> {
    let node = Node::start(&[])?;
    let layer = node.layer()?;
    let before = layer.hbm(&node.device(1))?.free;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(SLABS * SLAB_BYTES)? == SLABS * SLAB_BYTES);
    let lessee = Wire::new(&node.socket())?.member("lessee", "")?;
    let mut stream = lessee.attach()?;
    let kept = lease(&lessee, SLABS)?.remove(0);
    donor.shrink(SLABS * SLAB_BYTES)?;
    let_go(&mut stream, SLABS, kept.lease_id)?;
    eventually("seven of them to be free HBM again", || {
        Ok(layer.hbm(&node.device(1))?.free == before - SLAB_BYTES)
    })?;
    ensure!(donor.status().withdrawing_bytes == SLAB_BYTES);
    stream.acknowledge(kept.lease_id, kept.generation)?;
    ensure!(donor.wait_returned(PATIENCE));
    ensure!(layer.hbm(&node.device(1))?.free == before);
    Ok(())
}

/// The twin: eight slabs of one allocation, which CUDA frees as a whole or not at all.
#[test]
fn slabs_of_one_allocation_come_back_together() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    let mut returns = donor.attach()?;
    donor.offer([7; 16], "SIM-1", SLABS, SLAB_BYTES)?;
    let lessee = wire.member("lessee", "")?;
    let mut stream = lessee.attach()?;
    let kept = lease(&lessee, SLABS)?.remove(0);
    donor.withdraw(&[[7; 16]], 60_000)?;
    let_go(&mut stream, SLABS, kept.lease_id)?;
    operator.eventually("seven slabs to be nobody's", |account| {
        account.free_bytes == (SLABS - 1) * SLAB_BYTES && account.draining_bytes == SLAB_BYTES
    })?;
    ensure!(operator.regions()?.len() == 1, "it was returned");
    stream.acknowledge(kept.lease_id, kept.generation)?;
    let heard = returns.hear()?;
    ensure!(matches!(heard, Message::Returned(_)), "{heard:?}");
    Ok(())
}

#[test]
fn a_silent_reader_gets_nothing_more_long_before_its_donor_is_kept_waiting_for_good() -> Result<()>
{
    let node = Node::start(&["--pin-ms", "100", "--drain-ms", "600000"])?;
    let operator = Operator::of(&node)?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: Duration::from_secs(600),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(2 * SLAB_BYTES)? == 2 * SLAB_BYTES);
    let wire = Wire::new(&node.socket())?;
    let (lessee, reader) = (wire.member("lessee", "")?, wire.member("reader", "")?);
    let grants = lease(&lessee, 2)?;
    let mut stream = reader.attach()?;
    let share = |lease_id| {
        wire.wait(wire.broker().share(v1::ShareRequest {
            session_id: reader.session,
            lease_id,
            device_uuid: "SIM-0".to_owned(),
        }))
    };
    share(grants[0].lease_id)?;
    lessee.release(grants[0].lease_id)?;
    let heard = stream.hear()?;
    let Message::Revoke(revoke) = heard else {
        anyhow::bail!("{heard:?}");
    };
    // It hears of it, and says nothing.
    let mut refusal = None;
    eventually("it to be refused", || {
        refusal = share(grants[1].lease_id).err();
        Ok(refusal.is_some())
    })?;
    let refusal = refusal.context("no refusal")?;
    ensure!(
        refusal.code() == Code::FailedPrecondition
            && refusal
                .message()
                .contains(&format!("lease {}", revoke.lease_id)),
        "{refusal:?}"
    );
    let asked = reader.lease("model", "SIM-0", SLAB_BYTES, SLAB_BYTES / 4);
    ensure!(asked.is_err_and(|status| status.code() == Code::FailedPrecondition));
    let account = operator.account()?;
    ensure!(
        account.zombie_bytes == 0 && account.draining_bytes == SLAB_BYTES,
        "{account:?}"
    );
    // The twin: once it has answered, it is served again, and the slab is free.
    stream.acknowledge(revoke.lease_id, revoke.generation)?;
    operator.eventually("the slab to be free", |account| {
        account.free_bytes == SLAB_BYTES
    })?;
    share(grants[1].lease_id)?;
    Ok(())
}
