//! Memory that a borrower cannot map: its donor's owner hears of it, operators see it, and another donor is used meanwhile.

use std::{
    fs::{self, File},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use swiftcache_proto::v1;
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
    wire::{Member, Wire},
};

const SLAB: u64 = 1 << 20;

struct Scene {
    node: Node,
    operator: Operator,
    /// A real donor with one slab on the better link.
    _donor: Program,
    /// Another one's slab, on the worse link.
    _other: Member,
    borrower: Member,
    lease: v1::Grant,
}

impl Scene {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let node = Node::start_with(Setup {
            options: ["--metrics-listen", "127.0.0.1:0"]
                .map(str::to_owned)
                .into(),
            log: "info".to_owned(),
            log_file: Some(directory.keep().join("broker.log")),
            ..Setup::default()
        })?;
        let operator = Operator::of(&node)?;
        let mut command = Command::new(program("swiftcache")?);
        command.arg("donate").arg("--socket").arg(node.socket());
        command.args(["--device=SIM-1", "--bytes=1MiB", "--slab=1MiB"]);
        command
            .arg("--usage-dir")
            .arg(node.directory().join("usage"));
        command.stderr(File::create(node.directory().join("donor.log"))?);
        let donor = Program::start(&mut command)?;
        let wire = Wire::new(&node.socket())?;
        let other = wire.member("other", "")?;
        other.offer([9; 16], "SIM-2", 1, SLAB)?;
        eventually("both slabs", || {
            Ok(operator.account()?.free_bytes == 2 * SLAB)
        })?;
        let borrower = wire.member("borrower", "")?;
        let lease = lease(&borrower)?.context("nothing was granted")?;
        ensure!(lease.device_uuid == "SIM-1", "{lease:?}");
        Ok(Self {
            node,
            operator,
            _donor: donor,
            _other: other,
            borrower,
            lease,
        })
    }

    fn give_back(&self, unmappable: bool) -> Result<()> {
        let wire = &self.borrower.wire;
        wire.wait(wire.broker().release(v1::ReleaseRequest {
            session_id: self.borrower.session,
            lease_ids: vec![self.lease.lease_id],
            unmappable,
            bequeath: false,
        }))?;
        Ok(())
    }

    fn said_by_the_donor(&self) -> Result<String> {
        Ok(fs::read_to_string(self.node.directory().join("donor.log"))?)
    }

    fn events(&self) -> Result<usize> {
        let events = self.operator.events()?.into_iter();
        Ok(events.filter(|event| event.kind == "cannot-map").count())
    }
}

fn lease(of: &Member) -> Result<Option<v1::Grant>> {
    Ok(of.lease("model", "SIM-0", SLAB, SLAB / 4)?.grants.pop())
}

const SHOWN: &str = "borrowers cannot map 1 of its 1 regions on SIM-1";
const COUNTED: &str = "swiftcache_unmappable_regions{device=\"SIM-1\"} 1";

#[test]
fn who_cannot_map_a_slab_tells_its_donor_and_gets_another() -> Result<()> {
    let scene = Scene::new()?;
    scene.give_back(true)?;
    eventually("the donor to say so", || {
        let said = scene.said_by_the_donor()?;
        Ok(said.contains("borrowers say that they cannot map a slab") && said.contains("SIM-1"))
    })?;
    // Operators see it.
    let shown = scene.node.status(&[])?;
    ensure!(shown.contains(SHOWN), "{shown}");
    let json: serde_json::Value = serde_json::from_str(&scene.node.status(&["--json"])?)?;
    let donors = json["donors"].as_array().context("no donors")?;
    let count = |device: &str| -> Option<u64> {
        let mut its = donors.iter().filter(|donor| donor["device"] == device);
        its.next()?["unmappable_regions"].as_u64()
    };
    ensure!(
        (count("SIM-1"), count("SIM-2")) == (Some(1), Some(0)),
        "{json}"
    );
    let metrics = scene.node.metrics()?;
    ensure!(metrics.contains(COUNTED), "{metrics}");
    ensure!(scene.events()? == 1);
    let devices = scene.operator.node()?.devices;
    ensure!(devices[1].unmappable_regions == 1, "{devices:?}");
    // A good donor is used meanwhile, and the slab goes to whoever can map it.
    let granted = lease(&scene.borrower)?.context("the good donor sits idle")?;
    ensure!(granted.device_uuid == "SIM-2", "{granted:?}");
    ensure!(lease(&scene.borrower)?.is_none());
    let able = scene.borrower.wire.member("able", "")?;
    let granted = lease(&able)?.context("nobody else gets it")?;
    ensure!(granted.device_uuid == "SIM-1", "{granted:?}");
    Ok(())
}

/// The twin: what is given back for another reason is no news to anybody, and is granted again.
#[test]
fn who_gives_a_slab_back_tells_nobody() -> Result<()> {
    let scene = Scene::new()?;
    scene.give_back(false)?;
    let granted = lease(&scene.borrower)?.context("nothing was granted")?;
    ensure!(granted.device_uuid == "SIM-1", "{granted:?}");
    ensure!(!scene.node.status(&[])?.contains("cannot map"));
    ensure!(!scene.node.metrics()?.contains(COUNTED));
    ensure!(scene.events()? == 0);
    ensure!(!scene.said_by_the_donor()?.contains("cannot map"));
    Ok(())
}
