//! A node on a stub driver for one test. A donor's process is on the second device, and engines of the test's own
//! process are on the first. The test can hold copies, inject faults, and see the calls of the driver.

use std::{fmt, process::Command, sync::Arc};

use anyhow::{Result, ensure};
use swiftcache_client::{
    cache::{BorrowerConfig, Load, Store},
    device::{DeviceLayer, Ticket, cuda::CudaLayer},
    session::{Session, SessionConfig},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    PATIENCE,
    crew::{BorrowerProcess, Job},
    engine::{self, BLOCK_BYTES, Engine, LAYERS, POOL, SLAB_BYTES, eventually, hash},
    node::{Devices, Node, Setup},
    operator::Operator,
    programs::{Program, program},
    stub::{Call, Held, Injected, Stub},
};

/// The node of a test that [`alone`](crate::stub::alone) runs.
pub struct Scene<'a> {
    /// The stub driver's machine.
    pub stub: &'a Stub,
    /// The broker.
    pub node: Node,
    /// This process's devices.
    pub layer: Arc<dyn DeviceLayer>,
    /// A client of the broker's Admin service.
    pub operator: Operator,
    donors: Vec<Program>,
}

impl fmt::Debug for Scene<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scene({:?})", self.node.directory())
    }
}

/// Copies that are held. Drop releases them.
#[derive(Debug)]
pub struct Hold<'a> {
    stub: &'a Stub,
    fault: Option<Injected>,
}

impl Hold<'_> {
    /// Releases the copies.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn release(mut self) -> Result<()> {
        self.fault
            .take()
            .map_or(Ok(()), |fault| self.stub.lift(&fault))
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        // A test that has failed must not wait for the held copies.
        if let Some(fault) = self.fault.take() {
            let _ = self.stub.lift(&fault);
        }
    }
}

/// The calls that ask the driver whether copies are over.
const QUESTIONS: [&str; 2] = ["cuEventQuery", "cuStreamQuery"];

impl<'a> Scene<'a> {
    /// A node with a donor that offers `slabs` slabs.
    ///
    /// # Errors
    /// When a process does not start.
    pub fn new(stub: &'a Stub, slabs: u64) -> Result<Self> {
        let node = Node::start_with(Setup {
            devices: Devices::File(stub.topology_file()?),
            environment: stub.environment()?,
            ..Setup::default()
        })?;
        let mut scene = Self {
            stub,
            operator: Operator::of(&node)?,
            node,
            layer: Arc::new(CudaLayer::open()?),
            donors: Vec::new(),
        };
        scene.donate(1, slabs)?;
        Ok(scene)
    }

    /// Starts another donor's process, which offers slabs of a device. Returns the donor's number.
    ///
    /// # Errors
    /// When it does not start.
    pub fn donate(&mut self, device: usize, slabs: u64) -> Result<usize> {
        self.donate_on(&self.node.device(device), slabs)
    }

    /// The same for a device by its name, which may be host memory.
    ///
    /// # Errors
    /// When it does not start.
    pub fn donate_on(&mut self, device: &DeviceUuid, slabs: u64) -> Result<usize> {
        let before = self.offered()?;
        let mut command = Command::new(program("swiftcache")?);
        command
            .args(["donate", "--device", device.as_str()])
            .args(["--bytes", &(slabs * SLAB_BYTES).to_string()])
            .args(["--slab", &SLAB_BYTES.to_string()])
            // Nobody is in a hurry: what comes back comes because it was let go of.
            .args(["--leave-within", &format!("{}s", 2 * PATIENCE.as_secs())])
            .args(["--drain", &format!("{}s", PATIENCE.as_secs()), "--socket"])
            .arg(self.node.socket());
        let mut donor = Program::start(&mut command)?;
        eventually("the donor's offer", || {
            ensure!(!donor.has_ended()?, "swiftcache donate ended early");
            Ok(self.offered()? == before + slabs * SLAB_BYTES)
        })?;
        self.donors.push(donor);
        Ok(self.donors.len() - 1)
    }

    /// Kills the broker, and starts one that knows nothing of what is lent.
    ///
    /// # Errors
    /// When it does not start.
    pub fn forget_everything(&mut self) -> Result<()> {
        self.node.kill_broker()?;
        self.node.lose_ledger()?;
        self.node.start_broker()
    }

    fn offered(&self) -> Result<u64> {
        let total = self.operator.node()?.total.unwrap_or_default();
        Ok(total.offered_bytes)
    }

    /// A donor's process.
    pub fn donor(&mut self, number: usize) -> &mut Program {
        &mut self.donors[number]
    }

    /// The device that engines of this process compute on.
    pub fn device(&self) -> DeviceUuid {
        self.node.device(0)
    }

    /// A session of this process.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn session(&self, name: &str) -> Result<Session> {
        let session = Session::start(SessionConfig {
            socket: self.node.socket(),
            name: name.to_owned(),
            tenant: String::new(),
        })?;
        session.wait_connected(PATIENCE)?;
        Ok(session)
    }

    /// An engine of this process with these settings. It has leased all slabs that the settings allow.
    ///
    /// # Errors
    /// When there are not enough slabs to lease.
    pub fn engine_with(&self, config: BorrowerConfig) -> Result<Engine> {
        let slabs = config.max_leased_bytes / SLAB_BYTES;
        let session = self.session("engine")?;
        let engine = Engine::new(Some(session), Arc::clone(&self.layer), config)?;
        engine.reserve(slabs)?;
        Ok(engine)
    }

    /// An engine of this process that has leased `slabs` slabs, and has a host tier of `host_blocks` blocks.
    ///
    /// # Errors
    /// When there are not enough slabs to lease.
    pub fn engine(&self, slabs: u64, host_blocks: u64) -> Result<Engine> {
        let mut config = engine::config(self.device(), slabs);
        config.host_tier_bytes = host_blocks * BLOCK_BYTES;
        self.engine_with(config)
    }

    /// Starts a process of another tenant that wants one slab.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn rival(&self) -> Result<BorrowerProcess> {
        let job = Job {
            tenant: "rival".to_owned(),
            namespace: "a rival's".to_owned(),
            slabs: 1,
            host_blocks: 0,
            ..Job::new("rival", 1)
        };
        let mut rival = BorrowerProcess::start(&self.node, 0, &job)?;
        rival.tell("reserve 1")?;
        Ok(rival)
    }

    /// Holds the copies of this process that have not begun.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn hold(&self, held: Held) -> Result<Hold<'a>> {
        let fault = self.stub.hold(Some(std::process::id()), held)?;
        Ok(Hold {
            stub: self.stub,
            fault: Some(fault),
        })
    }

    /// Injects a fault into this process only.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn fault(&self, line: &str) -> Result<Injected> {
        self.stub.inject(Some(std::process::id()), line)
    }

    /// Makes the stub driver record, from now on, the calls that [`asked`](Self::asked) looks for.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn listen(&self) -> Result<()> {
        self.stub.trace(&QUESTIONS).map(|_| ())
    }

    /// Waits until threads whose names begin with `thread` have asked the driver a few more times whether copies are
    /// over. Checks all the time that `holds` succeeds.
    ///
    /// # Errors
    /// When they do not ask, or `holds` fails.
    pub fn asked(&self, thread: &str, holds: impl Fn() -> Result<()>) -> Result<()> {
        const A_FEW: usize = 5;
        let questions = |calls: &[Call]| {
            let its = |call: &&Call| {
                call.process == std::process::id() && call.thread_name.starts_with(thread)
            };
            calls.iter().filter(its).count()
        };
        let before = questions(&self.stub.calls()?);
        eventually(&format!("{thread} to ask whether copies are over"), || {
            holds()?;
            Ok(questions(&self.stub.calls()?) >= before + A_FEW)
        })?;
        holds()
    }
}

/// The pool block in which block `n` is computed. No two blocks lie side by side, so that each layer needs a launch of
/// the gather kernel.
#[must_use]
pub fn scattered(n: u32) -> u32 {
    2 * n % POOL
}

/// Computes the blocks of a sequence at [`scattered`] places.
///
/// # Errors
/// When the device layer fails.
pub fn compute(engine: &Engine, sequence: &[u32]) -> Result<()> {
    for n in sequence {
        engine.compute(*n, scattered(*n))?;
    }
    Ok(())
}

/// Begins to store a sequence that [`compute`] computed. Nothing has to be waited for, so all layers are one launch.
pub fn begin_store(engine: &Engine, sequence: &[u32]) -> Store {
    begin_store_by_layer(engine, sequence, &[])
}

/// As [`begin_store`], behind a mark for each layer: then each is a launch of its own.
pub fn begin_store_by_layer(engine: &Engine, sequence: &[u32], marks: &[Ticket]) -> Store {
    let blocks: Vec<_> = (sequence.iter())
        .map(|n| (hash(*n), scattered(*n)))
        .collect();
    let ready = |layer: usize| marks.get(layer).cloned();
    engine.borrower.store(&blocks, engine.kv(), &ready)
}

/// Begins to load a sequence to the places where it was computed.
///
/// # Errors
/// When not all of it is found.
pub fn begin_load(engine: &Engine, sequence: &[u32]) -> Result<Load> {
    let hit = engine.lookup(sequence);
    ensure!(hit.blocks() as usize == sequence.len(), "{hit:?}");
    let blocks: Vec<_> = sequence.iter().map(|n| scattered(*n)).collect();
    Ok(engine.borrower.load(&hit, &blocks, engine.kv()))
}

/// Whether pool block `block` holds block `n` in every layer, byte for byte.
///
/// # Errors
/// When the device layer fails.
pub fn holds(engine: &Engine, n: u32, block: u32) -> Result<bool> {
    for layer in 0..LAYERS.len() {
        if !engine.holds(n, layer, block)? {
            return Ok(false);
        }
    }
    Ok(true)
}
