//! A state directory that cannot be written: from the start, and from some moment on.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    wire::Wire,
};
use tonic::Code;

const SLAB: u64 = 64 << 10;
/// The broker's user, where the test may choose one: root writes to what is read-only.
const USER: u32 = 41_235;

struct Scene {
    directory: tempfile::TempDir,
}

impl Scene {
    fn new() -> Result<Self> {
        let scene = Self {
            directory: tempfile::tempdir()?,
        };
        fs::create_dir(scene.state())?;
        if rustix::process::getuid().is_root() {
            chown(scene.state(), Some(USER), Some(USER))?;
            scene.permit(scene.directory.path().into(), 0o755)?;
        }
        Ok(scene)
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn permit(&self, path: PathBuf, mode: u32) -> Result<()> {
        Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
    }

    fn said(&self) -> Result<String> {
        Ok(fs::read_to_string(self.directory.path().join("log"))?)
    }

    fn start(&self) -> Result<Node> {
        // The broker makes its sockets in the node's own directory.
        let as_somebody = format!(
            "for word; do [ \"$before\" != --socket ] || chown {USER} \"$(dirname \"$word\")\"; before=$word; done; \
             exec setpriv --reuid {USER} --regid {USER} --clear-groups \"$0\" \"$@\""
        );
        Node::start_with(Setup {
            options: vec!["--state-dir".to_owned(), self.state().display().to_string()],
            log_file: Some(self.directory.path().join("log")),
            shell: rustix::process::getuid().is_root().then_some(as_somebody),
            ..Setup::default()
        })
    }
}

#[test]
fn a_broker_does_not_start_on_a_directory_that_it_cannot_write() -> Result<()> {
    let scene = Scene::new()?;
    scene.permit(scene.state(), 0o555)?;
    let started = scene.start();
    ensure!(started.is_err(), "it runs without a ledger");
    let said = scene.said()?;
    let ledger = scene.state().join("ledger");
    ensure!(
        said.contains(&ledger.display().to_string()) && said.contains("Permission denied"),
        "{said}"
    );
    // The twin: the same directory, writable.
    scene.permit(scene.state(), 0o755)?;
    scene.start()?;
    Ok(())
}

#[test]
fn a_directory_that_turns_read_only_stops_lending_and_nothing_else() -> Result<()> {
    let scene = Scene::new()?;
    let node = scene.start()?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", 4, SLAB)?;
    let lessee = wire.member("lessee", "")?;
    let lease = || lessee.lease("model", "SIM-0", SLAB, SLAB / 4);
    let held = lease()?.grants.remove(0);
    // The twin of what follows: a ledger that is lost where another can be written costs nothing.
    fs::remove_file(scene.state().join("ledger"))?;
    eventually("the ledger to be written anew", || {
        Ok(scene.state().join("ledger").exists())
    })?;
    lessee.release(lease()?.grants.remove(0).lease_id)?;
    scene.permit(scene.state(), 0o555)?;
    // A file that is open stays writable. It is lost, so that the broker has to make another.
    fs::remove_file(scene.state().join("ledger"))?;
    let mut refusal = None;
    eventually("lending to stop", || {
        match lease() {
            Ok(leased) => {
                for grant in leased.grants {
                    lessee.release(grant.lease_id)?;
                }
            }
            Err(status) => refusal = Some(status),
        }
        Ok(refusal.is_some())
    })?;
    let refusal = refusal.context("no refusal")?;
    ensure!(refusal.code() == Code::ResourceExhausted, "{refusal:?}");
    let ledger = scene.state().join("ledger").display().to_string();
    for part in [&*ledger, "Permission denied", "make it writable again"] {
        ensure!(
            refusal.message().contains(part),
            "{part} is not in {refusal:?}"
        );
    }
    ensure!(scene.said()?.contains(&ledger), "{}", scene.said()?);
    // What was lent before is used and given back.
    lessee.publish(held.lease_id, held.generation, &[[5; 16]])?;
    ensure!(lessee.hits("model", &[[5; 16]])? == 1);
    lessee.release(held.lease_id)?;
    // And lending goes on by itself.
    scene.permit(scene.state(), 0o755)?;
    eventually("lending to go on", || {
        Ok(lease().is_ok_and(|leased| leased.grants.len() == 1))
    })
}
