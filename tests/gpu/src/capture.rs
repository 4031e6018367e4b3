//! An engine captures a graph while a borrower in its process leases, stores, loads and gives back.

use std::{path::PathBuf, sync::Arc, thread};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::Signal;
use swiftcache_client::{device::DeviceLayer, session::Session};
use swiftcache_tests::{
    engine,
    full_stack::{SLABS, donate, handle_name, offered},
    node::{Devices, Node, Setup},
    programs::Program,
};

use crate::{engine::Engine, pattern};

/// Bytes that the graph fills.
const SIZE: u64 = 1 << 20;
/// Blocks that are stored and loaded during the capture.
const BLOCKS: u32 = 100;

/// Runs this with each kind of handle. The donor is on the last device, engine and borrower are on the first. Calls
/// `said` with a line for each kind. The broker finds the devices through NVML, or in the topology file.
///
/// # Errors
/// When the capture is spoiled, or the borrower cannot do its work.
pub fn run(
    layer: &Arc<dyn DeviceLayer>,
    topology: Option<PathBuf>,
    said: &mut dyn FnMut(&str),
) -> Result<()> {
    let devices = layer.devices().to_vec();
    for &kind in layer.handle_kinds() {
        let Some(handle) = handle_name(kind) else {
            continue;
        };
        let node = Node::start_with(Setup {
            devices: match &topology {
                Some(path) => Devices::File(path.clone()),
                None => Devices::Gpus(devices.clone()),
            },
            ..Setup::default()
        })?;
        let mut donor = donate(&node, devices.len() - 1, handle)?;
        offered(&node, &mut donor)?;
        let session = node.session("captures")?;
        capture_beside(layer, session, donor).with_context(|| format!("a capture, {handle}"))?;
        said(&format!(
            "ok      a graph was captured while {BLOCKS} blocks were stored, loaded and given back, {handle}"
        ));
    }
    Ok(())
}

fn capture_beside(layer: &Arc<dyn DeviceLayer>, session: Session, donor: Program) -> Result<()> {
    let device = layer.devices().first().context("no device")?.uuid.clone();
    let engine = Engine::start()?;
    let compute = engine.stream()?;
    let address = engine.allocate(SIZE)?;
    let memory = engine.lend_memory(&**layer, &device, address, SIZE)?;
    let reads = layer.stream(&device)?;
    pattern::write(&*reads, &memory, 0, SIZE, 1)?;
    engine.begin_capture(compute)?;
    engine.fill(compute, address, 2, SIZE)?;
    let beside = thread::scope(|scope| {
        let borrower = scope.spawn(|| borrow(layer, session, donor));
        borrower.join().map_err(|_| anyhow!("a thread panicked"))?
    });
    let graph = (engine.end_capture(compute)).context("the engine's capture was spoiled")?;
    beside.context("the borrower")?;
    pattern::verify(&*reads, &memory, 0, SIZE, 1).context("captured work ran before its launch")?;
    engine.launch(graph, compute)?;
    engine.synchronize(compute)?;
    let mut found = vec![0; SIZE as usize];
    reads.read(&memory, 0, &mut found)?;
    pattern::expect(&found, &vec![2; SIZE as usize]).context("what the graph computed")
}

/// The whole life of a borrower: it opens, stores, loads, and gives back its last slab.
fn borrow(layer: &Arc<dyn DeviceLayer>, session: Session, mut donor: Program) -> Result<()> {
    let device = layer.devices().first().context("no device")?.uuid.clone();
    let config = engine::config(device, SLABS);
    let cache = engine::Engine::new(Some(session), Arc::clone(layer), config)?;
    cache.reserve(SLABS / 2)?;
    let sequence: Vec<u32> = (0..BLOCKS).collect();
    let stored = cache.store(&sequence)?;
    ensure!(stored.stored == BLOCKS, "{stored:?}");
    let fetched = cache.fetch(&sequence)?;
    ensure!(fetched.served == BLOCKS, "{fetched:?}");
    donor.signal(Signal::TERM)?;
    donor.finish().context("the donor")?;
    let left = cache.fetch(&sequence)?;
    ensure!(left.served == 0, "{left:?} of memory that was given back");
    Ok(())
}
