//! Requests of a connection that is lost may arrive after their process has resumed its session on another one. Then they are
//! old: they change nothing, and are refused with a reason.

use anyhow::{Context, Result, ensure};
use swiftcache_proto::v1;
use swiftcache_tests::{
    node::Node,
    operator::Operator,
    wire::{Member, Wire},
};
use tonic::{Code, Status};

const SLAB: u64 = 1 << 20;
const REGION: [u8; 16] = [1; 16];

/// A session on two connections, with a lease, a published block and a region of its own.
struct Scene {
    node: Node,
    operator: Operator,
    old: Member,
    new: Member,
    grant: v1::Grant,
}

/// A request, made when it is called.
type Ask<'a> = Box<dyn Fn() -> Result<(), Status> + 'a>;

impl Scene {
    fn new() -> Result<Self> {
        let node = Node::start(&[])?;
        let operator = Operator::of(&node)?;
        let first = Wire::new(&node.socket())?;
        let old = first.member("member", "")?;
        old.offer(REGION, node.device(1).as_str(), 4, SLAB)?;
        // Nobody is lent what is its own.
        let donor = first.member("donor", "")?;
        donor.offer([2; 16], node.device(1).as_str(), 4, SLAB)?;
        let leased = old.lease("model", node.device(0).as_str(), SLAB, 64 << 10)?;
        let grant = leased.grants.first().cloned().context("a grant")?;
        old.publish(grant.lease_id, grant.generation, &[[1; 16]])?;
        // Accepted after the first, because it connects now.
        let second = first.another(&node.socket())?;
        let new = Member {
            wire: second,
            session: old.session,
        };
        ensure!(new.hits("model", &[[1; 16]])? == 1);
        Ok(Self {
            node,
            operator,
            old,
            new,
            grant,
        })
    }

    /// Everything that a client may ask for, each by the old connection.
    fn requests(&self) -> Vec<(&'static str, Ask<'_>)> {
        let Self { old, grant, .. } = self;
        let device = self.node.device(0).to_string();
        vec![
            ("Register", Box::new(|| old.resume(&[]).map(drop))),
            ("Lease", {
                let device = device.clone();
                Box::new(move || old.lease("model", &device, SLAB, 64 << 10).map(drop))
            }),
            (
                "Lookup",
                Box::new(|| old.hits("model", &[[1; 16]]).map(drop)),
            ),
            ("Publish", {
                Box::new(|| old.publish(grant.lease_id, grant.generation, &[[1; 16], [2; 16]]))
            }),
            ("Release", Box::new(|| old.release(grant.lease_id))),
            ("Withdraw", Box::new(|| old.withdraw(&[REGION], 1))),
            ("Leave", Box::new(|| old.leave())),
        ]
    }
}

#[test]
fn what_comes_by_an_older_connection_changes_nothing() -> Result<()> {
    let scene = Scene::new()?;
    scene.new.resume(&[scene.grant.lease_id])?;
    for (call, ask) in scene.requests() {
        let refused = ask().err().with_context(|| format!("{call} was heard"))?;
        ensure!(refused.code() == Code::Aborted, "{call}: {refused:?}");
        ensure!(
            refused.message().contains("newer connection"),
            "{call}: {refused:?}"
        );
    }
    ensure!(scene.old.attach().is_err());
    // All is as it was said to be by the newer one.
    ensure!(scene.operator.leases()?.len() == 1 && scene.operator.regions()?.len() == 2);
    ensure!(scene.new.hits("model", &[[1; 16]])? == 1);
    ensure!(scene.new.hits("model", &[[2; 16]])? == 0);
    scene.new.release(scene.grant.lease_id)?;
    scene.new.leave()?;
    Ok(())
}

/// The twin: as long as the session was not registered on the newer connection, the older one is heard.
#[test]
fn a_newer_connection_alone_makes_nothing_late() -> Result<()> {
    let asks = Scene::new()?.requests().len();
    for number in 0..asks {
        let scene = Scene::new()?;
        let (call, ask) = scene.requests().swap_remove(number);
        ask().with_context(|| call)?;
    }
    Ok(())
}

/// The worst of them: it says that nothing is held, and what was leased since would be another's while it is written to.
#[test]
fn a_late_resumption_costs_no_newer_lease() -> Result<()> {
    let scene = Scene::new()?;
    scene.new.resume(&[scene.grant.lease_id])?;
    let device = scene.node.device(0).to_string();
    let newer = scene.new.lease("model", &device, SLAB, 64 << 10)?;
    ensure!(newer.grants.len() == 1);
    ensure!(
        scene
            .old
            .resume(&[])
            .is_err_and(|status| status.code() == Code::Aborted)
    );
    ensure!(scene.operator.leases()?.len() == 2);
    // The twin: said by the newest connection, it gives both back.
    scene.new.resume(&[])?;
    ensure!(scene.operator.leases()?.is_empty());
    Ok(())
}
