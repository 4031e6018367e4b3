//! Opening a stitched pool: the size of a unit is learnt from the first slab, slabs are leased, and host memory is taken.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::{HandleKind, LeaseClass, Medium};
use tracing::info;

use super::{
    config::StreamConfig,
    core::Core,
    holder::StreamHolder,
    home::Costs,
    homes::{Homes, HomesConfig},
    state::State,
};
use crate::{
    Error, Result,
    check::check_device,
    device::{AddressSpaces, DeviceLayer, Memory},
    leases::{Holder, LeaseSettings, LeaseThreads, Leases},
    session::{Demand, Grant, Session},
    transfer::Routes,
};

/// How often the broker is asked for what it had not.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// When nothing more was granted for so long, the broker has nothing more to lend.
const SETTLED: Duration = Duration::from_secs(1);

/// What opening has brought together.
pub(super) struct Opened {
    pub(super) core: Arc<Core>,
    pub(super) leasing: LeaseThreads,
    /// Host memory for as many units as slabs were leased.
    pub(super) floor: Vec<Memory>,
    pub(super) spares: Vec<Memory>,
}

/// The layer's address spaces.
///
/// # Errors
/// When it has none.
pub(super) fn spaces(layer: &dyn DeviceLayer) -> Result<&dyn AddressSpaces> {
    let spaces = layer.address_spaces();
    spaces.ok_or_else(|| {
        Error::pool(
            "this driver has no virtual memory (cuMemMap), so nothing can be stitched; use a driver since CUDA 10.2, and no vGPU \
             without unified memory",
        )
    })
}

/// Leases slabs for a pool, and takes the memory that stands in for each.
///
/// # Errors
/// When the broker is not there in time or lends nothing, the backend cannot stitch, a setting does not fit, or there is no room for
/// the host floor or the spare units. Nothing is held then.
pub(super) fn open(
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    config: StreamConfig,
) -> Result<Opened> {
    let deadline = Instant::now() + config.patience;
    check_device(&*layer, &config.device)?;
    let granularity = spaces(&*layer)?.granularity(&config.device)?;
    config.check(granularity)?;
    session
        .wait_connected(deadline.saturating_duration_since(Instant::now()))
        .map_err(|error| Error::pool(format!("{error}; it needs the broker to start")))?;
    let unit_bytes = match config.unit_bytes {
        Some(bytes) => bytes,
        None => learn_unit(&session, &config, granularity, deadline)?,
    };
    let most = config.stream_bytes / unit_bytes * unit_bytes;
    if most == 0 {
        let problem = format!(
            "is {}; slabs on offer have {unit_bytes} bytes",
            config.stream_bytes
        );
        return Err(Error::config("stream_bytes", problem));
    }
    let opened = with_slabs(session, layer, config, unit_bytes, most, deadline)?;
    let Opened { core, .. } = &opened;
    info!(
        namespace = %core.config.namespace, unit_bytes, units = opened.floor.len(), asked = most,
        "a stitched pool has slabs, and as much host memory"
    );
    Ok(opened)
}

/// Leases up to `most` bytes, and takes the memory that stands in for each slab.
fn with_slabs(
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    config: StreamConfig,
    unit_bytes: u64,
    most: u64,
    deadline: Instant,
) -> Result<Opened> {
    let routes = Arc::new(Routes::new(Arc::clone(&layer), config.device.clone()));
    let route = routes.to(Medium::Hbm, &config.device)?;
    let settings = LeaseSettings {
        namespace: config.namespace.clone(),
        device: config.device.clone(),
        layer_bytes: vec![unit_bytes],
        // While a slab is on its way back, another one takes its place.
        max_bytes: most.saturating_mul(2),
        max_host_bytes: 0,
        // One at a time, so that ranks that open together share what there is.
        step_bytes: unit_bytes,
        class: LeaseClass::WorkingSet,
        inherit: false,
    };
    let (leases, inboxes) = Leases::new(
        Some(session.clone()),
        Arc::clone(&layer),
        Arc::clone(&routes),
        settings,
    );
    let homes = Homes::new(HomesConfig {
        units: 0,
        spares: config.spare_units,
        costs: Costs::expected(unit_bytes),
    });
    let core = Arc::new(Core {
        config,
        unit_bytes,
        opened: Instant::now(),
        session: session.clone(),
        layer,
        leases,
        route,
        state: Mutex::new(State::new(homes)),
        changed: Condvar::new(),
        steps: OnceLock::new(),
        due: AtomicBool::new(false),
        adrift: AtomicBool::new(false),
        dead: AtomicBool::new(false),
        generation: AtomicU64::new(0),
    });
    core.leases.observe(&session);
    let holder: Arc<dyn Holder> = Arc::new(StreamHolder(Arc::clone(&core)));
    let mut leasing = LeaseThreads::start(&core.leases, &holder, inboxes)?;
    let units = lease(&core.leases, most, deadline) / unit_bytes;
    let memory = match units {
        0 => Err(Error::pool(format!(
            "no slab of {unit_bytes} bytes could be leased within {:?}; `swiftcache status` shows what is on offer. Donors must lend \
             slabs of this size by descriptor (`swiftcache donate --slab {unit_bytes} --handle posix-fd`)",
            core.config.patience
        ))),
        units => stand_ins(&core, units),
    };
    match memory {
        Ok((floor, spares)) => Ok(Opened {
            core,
            leasing,
            floor,
            spares,
        }),
        Err(error) => {
            leasing.stop_growing(&core.leases);
            core.leases.close();
            leasing.recall().join();
            Err(error)
        }
    }
}

/// The size of the first slab that can be had and mapped as a unit.
fn learn_unit(
    session: &Session,
    config: &StreamConfig,
    granularity: u64,
    deadline: Instant,
) -> Result<u64> {
    let mut problem = "nothing is on offer".to_owned();
    loop {
        let leased = session.lease(Demand {
            namespace: config.namespace.clone(),
            device: config.device.clone(),
            bytes: 1,
            block_bytes: granularity,
            class: LeaseClass::WorkingSet,
            host_bytes: 0,
        });
        match leased.wait() {
            Ok(leased) => {
                let (fits, others): (Vec<Grant>, Vec<Grant>) = (leased.grants.into_iter())
                    .partition(|grant| {
                        is_whole(grant) && grant.slab_bytes.is_multiple_of(granularity)
                    });
                let ids = |grants: &[Grant]| grants.iter().map(|grant| grant.lease).collect();
                if let Some(other) = others.first() {
                    problem = format!(
                        "slabs of {} bytes in allocations of {} are on offer; a unit is an allocation of its own, of a multiple of \
                         {granularity} bytes",
                        other.slab_bytes, other.map_bytes
                    );
                    session.cannot_map(ids(&others)).wait()?;
                }
                if let Some(fit) = fits.first() {
                    let bytes = fit.slab_bytes;
                    session.release(ids(&fits)).wait()?;
                    return Ok(bytes);
                }
            }
            Err(error) => problem = error.to_string(),
        }
        if Instant::now() >= deadline {
            return Err(Error::pool(format!(
                "no slab could be leased within {:?}, so the size of a unit is not known: {problem}",
                config.patience
            )));
        }
        thread::sleep(ASK_AGAIN);
    }
}

/// Whether a slab is an allocation of its own.
fn is_whole(grant: &Grant) -> bool {
    grant.offset == 0 && grant.map_bytes == grant.slab_bytes
}

/// Leases up to `most` bytes, until there is nothing more to lease. Returns how many are held.
fn lease(leases: &Leases, most: u64, deadline: Instant) -> u64 {
    let (mut held, mut since) = (0, Instant::now());
    loop {
        let now_held = leases.reserve(most);
        if now_held != held {
            (held, since) = (now_held, Instant::now());
        }
        let settled = held > 0 && since.elapsed() >= SETTLED;
        if held >= most || settled || Instant::now() >= deadline {
            return held;
        }
        thread::sleep(ASK_AGAIN);
    }
}

/// Host memory for each unit, and the spare slabs.
fn stand_ins(core: &Core, units: u64) -> Result<(Vec<Memory>, Vec<Memory>)> {
    let (device, unit) = (&core.config.device, core.unit_bytes);
    let spaces = spaces(&*core.layer)?;
    let floor = (0..units).map(|_| spaces.allocate_host_piece(device, unit));
    let floor: Vec<Memory> = floor.collect::<std::result::Result<_, _>>().map_err(|error| {
        Error::pool(format!(
            "there is no room for the host floor of {} bytes, to which units go when no donor has room: {error}. Make \
             stream_bytes smaller",
            units * unit
        ))
    })?;
    let spares = (0..core.config.spare_units)
        .map(|_| core.layer.allocate(device, unit, HandleKind::PosixFd));
    let spares = spares
        .collect::<std::result::Result<_, _>>()
        .map_err(|error| {
            Error::pool(format!(
                "there is no room for {} spare units of {unit} bytes in local HBM: {error}",
                core.config.spare_units
            ))
        })?;
    Ok((floor, spares))
}
