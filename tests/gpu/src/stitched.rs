//! A stitched pool on GPUs: an engine on the first device, whose units lie in slabs of a donor on the last one. The donor
//! takes all of them back, overwrites them, and lends others, several times, and the engine checks every byte in each step.

use std::{path::PathBuf, sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::DeviceLayer;
use swiftcache_tests::{
    node::{Devices, Node, Setup},
    stitched::{Poisoner, Stitched, config},
};

/// How often the donor takes everything back.
const ROUNDS: u32 = 3;

/// How much moves.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Bytes of a slab, and of a unit.
    pub unit_bytes: u64,
    /// Units of each of the two tensors.
    pub units: u32,
}

impl Scale {
    /// Half a gigabyte.
    pub const FULL: Self = Self {
        unit_bytes: 64 << 20,
        units: 4,
    };
    /// The least that the driver maps.
    pub const SMALL: Self = Self {
        unit_bytes: 2 << 20,
        units: 1,
    };
}

/// Runs it. The broker finds the devices through NVML, or in the topology file. Calls `said` with a line for each result.
///
/// # Errors
/// When a byte is wrong, or a slab does not come back.
pub fn run(
    layer: &Arc<dyn DeviceLayer>,
    topology: Option<PathBuf>,
    scale: Scale,
    said: &mut dyn FnMut(&str),
) -> Result<()> {
    let devices = layer.devices();
    let (first, last) = devices.first().zip(devices.last()).context("no device")?;
    let (first, last) = (first.uuid.clone(), last.uuid.clone());
    if first == last {
        said("none    one GPU: no neighbour to stitch to");
        return Ok(());
    }
    let link = layer.link_kind(&first, &last);
    let node = Node::start_with(Setup {
        devices: match topology {
            Some(path) => Devices::File(path),
            None => Devices::Gpus(devices.to_vec()),
        },
        ..Setup::default()
    })?;
    let units = 2 * u64::from(scale.units);
    let donor = Poisoner::new(
        node.session("donor")?,
        Arc::clone(layer),
        last.clone(),
        scale.unit_bytes,
    )?;
    donor.offer(units)?;
    let settings = config(first.clone(), units, scale.unit_bytes);
    let session = node.session("engine")?;
    let mut engine = Stitched::new(session, layer, settings, &[scale.units; 2])?;
    engine.step()?;
    for round in 1..=ROUNDS {
        let since = Instant::now();
        donor.ask_back_all()?;
        engine.step_until("slabs to come back", |_| Ok(donor.out() == 0))?;
        let took = since.elapsed();
        let homes = engine.pool.stats().homes;
        ensure!(homes.in_slabs == 0, "{homes:?}");
        engine.step()?;
        donor.offer(units)?;
        engine.step_until("units to come back", |pool| {
            Ok(u64::from(pool.stats().homes.in_slabs) == units)
        })?;
        said(&format!(
            "ok      stitched pool, round {round}: {units} units of {} MiB on {last} ({link} from {first}) left their slabs \
             within {:.0} ms of steps that check and write every byte, and came back",
            scale.unit_bytes >> 20,
            took.as_secs_f64() * 1e3,
        ));
    }
    let stats = engine.pool.stats();
    said(&format!(
        "ok      stitched pool: {} moves, the longest step waited {:.1} ms for them",
        stats.moved_units,
        stats.steps.max_us as f64 / 1e3
    ));
    Ok(())
}
