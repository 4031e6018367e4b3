//! A donor's driver fails while a slab is zeroed for another tenant. The slab is zeroed again, and nobody else gets it before
//! that has worked.

use std::{fs::File, os::unix::fs::FileExt, sync::Arc};

use anyhow::{Context, Result, bail, ensure};
use swiftcache_client::{
    device::cuda::CudaLayer,
    donor::{Donor, DonorConfig},
};
use swiftcache_proto::{
    domain::HandleKind,
    v1::{self, Shortfall, session_request, session_response},
};
use swiftcache_tests::{
    PATIENCE,
    engine::{SLAB_BYTES, eventually},
    gate::{Gate, Stage},
    node::{Devices, Node, Setup},
    stub::{Held, Stub, alone},
    wire::{Member, Wire},
};

/// What the first tenant writes.
const SECRET: u8 = 0xa5;

/// Ways in which the driver fails for a moment while a slab is zeroed.
const FAILURES: [&str; 5] = [
    "cuMemsetD8Async=719@1",
    "cuMemsetD8Async=1@1-3",
    "cuStreamCreateWithPriority=2@1",
    "cuCtxPushCurrent_v2=999@1",
    "cuCtxPushCurrent_v2=999@2",
];

/// Ways in which the driver does not say for a moment whether a slab is zeroed.
const SILENCES: [&str; 3] = [
    "cuEventRecord=999@1-3",
    "cuEventQuery=999@1-3",
    "cuEventQuery=719@1",
];

/// A node on a stub driver, whose only donor is this process.
struct Bench {
    node: Node,
    gate: Gate,
    wire: Wire,
    donor: Donor,
}

impl Bench {
    fn new(stub: &Stub, slabs: u64) -> Result<Self> {
        let node = Node::start_with(Setup {
            devices: Devices::File(stub.topology_file()?),
            environment: stub.environment()?,
            ..Setup::default()
        })?;
        let gate = Gate::before(&node)?;
        let config = DonorConfig {
            device: node.device(1),
            slab_bytes: SLAB_BYTES,
            drain: PATIENCE,
            handle: Some(HandleKind::PosixFd),
        };
        let layer = Arc::new(CudaLayer::open()?);
        let donor = Donor::open(gate.session("donor")?, layer, config)?;
        ensure!(donor.grow(slabs * SLAB_BYTES)? == slabs * SLAB_BYTES);
        Ok(Self {
            wire: Wire::new(&node.socket())?,
            node,
            gate,
            donor,
        })
    }

    fn tenant(&self, tenant: &str) -> Result<Tenant> {
        Ok(Tenant {
            member: self.wire.member(tenant, tenant)?,
            device: self.node.device(0).to_string(),
        })
    }
}

/// A borrower that reads and writes raw bytes.
struct Tenant {
    member: Member,
    device: String,
}

impl Tenant {
    fn lease(&self) -> Result<(Option<v1::Grant>, Shortfall)> {
        let leased = self
            .member
            .lease("model", &self.device, SLAB_BYTES, SLAB_BYTES / 16)?;
        Ok((leased.grants.first().cloned(), leased.shortfall()))
    }

    fn eventually_lease(&self) -> Result<v1::Grant> {
        let mut granted = None;
        eventually("a slab", || {
            granted = self.lease()?.0;
            Ok(granted.is_some())
        })?;
        granted.context("no slab")
    }

    /// Leases a slab and fills it with [`SECRET`]. Keeps its descriptor.
    fn soil(&self) -> Result<Soiled> {
        let grant = self.eventually_lease()?;
        let file = self.member.open(&grant)?;
        let soiled = Soiled {
            file,
            offset: grant.offset,
        };
        soiled
            .file
            .write_all_at(&vec![SECRET; SLAB_BYTES as usize], grant.offset)?;
        self.member.leave()?;
        Ok(soiled)
    }

    /// The bytes that a slab has when it is granted. Gives it back.
    fn read(&self) -> Result<Vec<u8>> {
        let grant = self.eventually_lease()?;
        let granted = Soiled {
            file: self.member.open(&grant)?,
            offset: grant.offset,
        };
        let bytes = granted.bytes()?;
        self.member.leave()?;
        Ok(bytes)
    }
}

/// Where the first tenant's bytes were.
struct Soiled {
    file: File,
    offset: u64,
}

impl Soiled {
    fn bytes(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![1; SLAB_BYTES as usize];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(bytes)
    }
}

fn are_all(bytes: &[u8], byte: u8) -> bool {
    bytes.iter().all(|each| *each == byte)
}

#[test]
fn a_slab_that_could_not_be_zeroed_is_zeroed_again() -> Result<()> {
    alone("a_slab_that_could_not_be_zeroed_is_zeroed_again", |stub| {
        for (fault, fails) in (FAILURES.iter().map(|fault| (fault, true)))
            .chain(SILENCES.iter().map(|fault| (fault, false)))
        {
            let bench = Bench::new(stub, 1)?;
            bench.tenant("one")?.soil()?;
            let line = stub.inject(Some(std::process::id()), fault)?;
            let bytes = bench.tenant("two")?.read().context(*fault)?;
            ensure!(are_all(&bytes, 0), "{fault}: the slab holds bytes");
            let status = bench.donor.status();
            ensure!(status.scrubbed == 1, "{fault}: {status:?}");
            ensure!((status.failed_scrubs > 0) == fails, "{fault}: {status:?}");
            stub.lift(&line)?;
            ensure!(bench.donor.close(PATIENCE), "{fault}: stranded");
        }
        Ok(())
    })
}

/// The broker asks again whenever the donor's stream is new. The donor must not take what it has tried for done.
#[test]
fn a_slab_is_said_to_be_zeroed_only_when_it_is() -> Result<()> {
    alone("a_slab_is_said_to_be_zeroed_only_when_it_is", |stub| {
        for restarted in [false, true] {
            let mut bench = Bench::new(stub, 1)?;
            let soiled = bench.tenant("one")?.soil()?;
            let fault = stub.inject(Some(std::process::id()), "cuMemsetD8Async=719")?;
            let (granted, shortfall) = bench.tenant("two")?.lease()?;
            ensure!(granted.is_none() && shortfall == Shortfall::Scrubbing);
            let fail = |times| {
                eventually("the driver to fail", || {
                    Ok(bench.donor.status().failed_scrubs >= times)
                })
            };
            fail(1)?;
            let asked = bench.gate.count("Scrub", Stage::Answered);
            if restarted {
                bench.node.kill_broker()?;
                bench.gate.cut();
                bench.node.start_broker()?;
            } else {
                bench.gate.cut();
            }
            eventually("the broker to ask again", || {
                Ok(bench.gate.count("Scrub", Stage::Answered) > asked)
            })?;
            let tried = bench.donor.status().failed_scrubs;
            eventually("the driver to fail again", || {
                Ok(bench.donor.status().failed_scrubs > tried)
            })?;
            let next = bench.tenant("two")?;
            let (granted, shortfall) = next.lease()?;
            ensure!(
                granted.is_none(),
                "the next tenant reads the last one's bytes"
            );
            ensure!(shortfall == Shortfall::Scrubbing, "{shortfall:?}");
            ensure!(bench.gate.count("Scrubbed", Stage::Answered) == 0);
            ensure!(are_all(&soiled.bytes()?, SECRET), "who has zeroed it?");
            stub.lift(&fault)?;
            ensure!(are_all(&next.read()?, 0) && are_all(&soiled.bytes()?, 0));
            ensure!(bench.donor.status().scrubbed == 1);
            ensure!(bench.donor.close(PATIENCE), "stranded");
        }
        Ok(())
    })
}

/// The twin: the broker believes its donors, and a donor that says so too early gives one tenant's bytes to the next.
#[test]
fn a_donor_that_says_so_without_zeroing_gives_bytes_away() -> Result<()> {
    let node = Node::start(&[])?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    let mut stream = donor.attach()?;
    donor.offer([1; 16], node.device(1).as_str(), 1, SLAB_BYTES)?;
    let tenant = |name| -> Result<Tenant> {
        Ok(Tenant {
            member: wire.member(name, name)?,
            device: node.device(0).to_string(),
        })
    };
    tenant("one")?.soil()?;
    let next = tenant("two")?;
    ensure!(next.lease()?.1 == Shortfall::Scrubbing);
    let scrub = match stream.hear()? {
        session_response::Message::Scrub(scrub) => scrub,
        other => bail!("{other:?}"),
    };
    stream.say(session_request::Message::Scrubbed(v1::Scrubbed {
        region_id: scrub.region_id,
        slab: scrub.slab,
        generation: scrub.generation,
    }))?;
    ensure!(are_all(&next.read()?, SECRET));
    Ok(())
}

/// Zeroing holds up nothing else: neither while it goes on, nor while the donor waits to try again.
#[test]
fn a_donor_gives_back_while_a_slab_is_zeroed() -> Result<()> {
    alone("a_donor_gives_back_while_a_slab_is_zeroed", |stub| {
        let bench = Bench::new(stub, 3)?;
        let soiling: Vec<_> = (0..3).map(|_| bench.tenant("one")).collect::<Result<_>>()?;
        let grants: Vec<_> = (soiling.iter())
            .map(Tenant::eventually_lease)
            .collect::<Result<_>>()?;
        ensure!(grants.len() == 3);
        for tenant in &soiling {
            tenant.member.leave()?;
        }
        let hold = stub.hold(Some(std::process::id()), Held::All)?;
        stub.trace(&["cuMemsetD8Async"])?;
        let next = bench.tenant("two")?;
        ensure!(next.lease()?.1 == Shortfall::Scrubbing);
        stub.wait_for("a slab to be zeroed", |calls| !calls.is_empty())?;
        ensure!(bench.donor.shrink(2 * SLAB_BYTES)? == 2 * SLAB_BYTES);
        ensure!(bench.donor.wait_returned(PATIENCE), "held up by a scrub");
        stub.lift(&hold)?;
        ensure!(are_all(&next.read()?, 0));
        bench.tenant("one")?.soil()?;
        // The last slab goes back although it cannot be zeroed.
        let fault = stub.inject(Some(std::process::id()), "cuMemsetD8Async=719")?;
        ensure!(bench.tenant("two")?.lease()?.1 == Shortfall::Scrubbing);
        eventually("the driver to fail", || {
            Ok(bench.donor.status().failed_scrubs > 0)
        })?;
        ensure!(bench.donor.close(PATIENCE), "held up by a scrub that fails");
        stub.lift(&fault)
    })
}
