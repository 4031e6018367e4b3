//! Lending memory of devices until a signal comes, and asking for it back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use swiftcache_client::{
    device::{self, DeviceError, DeviceLayer},
    donor::{Agent, AgentConfig, Donor, DonorConfig, DonorStatus},
    session::{Session, SessionConfig},
};
use swiftcache_proto::domain::{Device, DeviceUuid, HandleKind};
use swiftcache_replay::report::bytes;
use tracing::info;

use super::args::DonateArgs;
use crate::{CliError, backend, output};

/// What leaving takes at most beyond the time that borrowers have to move away: copies under way, and a few messages.
const LEAVE_MARGIN: Duration = Duration::from_secs(5);
/// How often to look for a signal.
const NAP: Duration = Duration::from_millis(50);
/// What is on offer is said when it has been the same for this long.
const STEADY: Duration = Duration::from_secs(2);

/// Whichever kind of donor runs.
enum Running {
    Fixed(Donor),
    Elastic(Agent),
}

impl Running {
    fn status(&self) -> DonorStatus {
        match self {
            Self::Fixed(donor) => donor.status(),
            Self::Elastic(agent) => agent.status(),
        }
    }

    /// Why it has no more on offer, for people.
    fn why(&self) -> String {
        match self {
            Self::Fixed(donor) => (donor.problem()).unwrap_or_else(|| "it is closing".to_owned()),
            Self::Elastic(agent) => agent.problem().unwrap_or_else(|| agent.explain()),
        }
    }

    /// How long it waits for everything to come back, if nobody says otherwise.
    fn patience(&self) -> Duration {
        let window = match self {
            Self::Fixed(donor) => donor.drain_window(),
            Self::Elastic(agent) => agent.drain_window(),
        };
        window + LEAVE_MARGIN
    }

    fn close(self, limit: Duration) -> bool {
        match self {
            Self::Fixed(donor) => donor.close(limit),
            Self::Elastic(agent) => agent.stop(limit),
        }
    }
}

/// Says what a donor has on offer, whenever that has come to rest.
#[derive(Debug)]
struct Herald {
    seen: u64,
    since: Instant,
    said: Option<u64>,
}

impl Herald {
    fn new() -> Self {
        Self {
            seen: 0,
            since: Instant::now(),
            said: None,
        }
    }

    /// Whether `offered` is news, and has been the same for long enough.
    fn hears(&mut self, offered: u64, now: Instant) -> bool {
        if offered != self.seen {
            (self.seen, self.since) = (offered, now);
        }
        let news = self.said != Some(offered);
        let rests = now.saturating_duration_since(self.since) >= STEADY;
        if news && rests {
            self.said = Some(offered);
        }
        news && rests
    }
}

/// Lends until a signal comes, from a session for each device.
pub(super) fn lend(
    args: &DonateArgs,
    session: SessionConfig,
    interrupt: &AtomicBool,
) -> Result<(), CliError> {
    let (first, shape) = backend::connect(session.clone())?;
    let mut known = shape.0.clone();
    known.extend(first.host_devices().unwrap_or_default());
    let devices = args.device.among(&known)?;
    let layer = match args.device.is_host_memory() {
        true => device::open_host_memory(&known).map_err(swiftcache_client::Error::from)?,
        false => backend::open(&shape, args.usage_dir.clone())?,
    };
    // A session for each device: one that fails takes no other with it.
    let mut first = Some(first);
    let mut running = Vec::new();
    let mut failed = None;
    for device in devices {
        let session = match first.take() {
            Some(session) => Ok(session),
            None => backend::connect(session.clone()).map(|(session, _)| session),
        };
        match session.and_then(|session| start(args, session, Arc::clone(&layer), device)) {
            Ok(donor) => running.push((device.uuid.clone(), donor)),
            Err(error) => {
                output::complain(&format!("swiftcache: {}: {error}", device.uuid));
                failed = Some(error);
            }
        }
    }
    if let (true, Some(error)) = (running.is_empty(), failed) {
        return Err(error);
    }
    let mut heralds: Vec<Herald> = running.iter().map(|_| Herald::new()).collect();
    while !interrupt.load(Ordering::Relaxed) {
        for ((device, donor), herald) in running.iter().zip(&mut heralds) {
            let offered = donor.status().offered_bytes;
            if herald.hears(offered, Instant::now()) {
                // Nobody has to read it.
                let _ = output::print(&match offered {
                    0 => format!("{device}: lends nothing now: {}\n", donor.why()),
                    offered => format!("{device}: lends {}\n", bytes(offered)),
                });
            }
        }
        thread::sleep(NAP);
    }
    leave(running, args.leave_within)
}

fn start(
    args: &DonateArgs,
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    device: &Device,
) -> Result<Running, CliError> {
    let config = DonorConfig {
        device: device.uuid.clone(),
        slab_bytes: args.slab,
        drain: args.drain.unwrap_or(Duration::ZERO),
        handle: args.handle.map(HandleKind::from),
    };
    let total = match device.hbm_bytes {
        // The broker's driver did not say.
        0 => {
            (layer.hbm(&device.uuid))
                .map_err(swiftcache_client::Error::from)?
                .total
        }
        total => total,
    };
    args.check_for(&device.uuid, total)?;
    let Some(bytes) = args.bytes else {
        let agent = AgentConfig {
            policy: args.elastic_args.policy(total, args.slab),
            period: args
                .elastic_args
                .period
                .unwrap_or(Duration::from_millis(250)),
        };
        return Ok(Running::Elastic(Agent::start(
            session, layer, config, agent,
        )?));
    };
    let held = session.hold(&device.uuid).is_some();
    let donor = Donor::open(session, layer, config)?;
    // What can never work ends the command at once. What else it meets is logged, and tried again.
    if !held
        && let Err(error) = donor.grow(args.slab)
        && !may_pass(&error)
    {
        return Err(error.into());
    }
    donor.keep(bytes);
    Ok(Running::Fixed(donor))
}

/// Whether what failed may work later: the device is full, the broker away or at a limit.
fn may_pass(error: &swiftcache_client::Error) -> bool {
    use swiftcache_client::Error;
    match error {
        Error::Device(error) => matches!(error, DeviceError::OutOfMemory { .. }),
        Error::Config { .. } | Error::Closed | Error::Thread(_) => false,
        _ => true,
    }
}

/// Asks for everything back, from all devices at once.
fn leave(running: Vec<(DeviceUuid, Running)>, limit: Option<Duration>) -> Result<(), CliError> {
    let leaving: Vec<_> = running
        .into_iter()
        .map(|(device, donor)| {
            let held = donor.status().offered_bytes;
            info!(bytes = held, %device, "asking for everything back");
            let limit = limit.unwrap_or_else(|| donor.patience());
            (device, limit, thread::spawn(move || donor.close(limit)))
        })
        .collect();
    let late: Vec<String> = leaving
        .into_iter()
        .filter_map(|(device, limit, donor)| {
            let returned = donor.join().unwrap_or(false);
            let limit = humantime::format_duration(limit);
            (!returned).then(|| format!("{device} within {limit}"))
        })
        .collect();
    if late.is_empty() {
        return Ok(());
    }
    Err(CliError::Failed(format!(
        "not everything came back on {}: borrowers still map it until they let go",
        late.join(", "),
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_offer_is_said_once_it_rests() {
        let mut herald = Herald::new();
        let start = herald.since;
        let at = |ms: u64| start + Duration::from_millis(ms);
        assert!(!herald.hears(0, at(0)));
        assert!(!herald.hears(64, at(100)), "it still rises");
        assert!(!herald.hears(128, at(1_900)));
        assert!(!herald.hears(128, at(3_800)));
        assert!(herald.hears(128, at(3_900)));
        assert!(!herald.hears(128, at(9_000)), "no news");
        assert!(!herald.hears(0, at(9_100)));
        assert!(herald.hears(0, at(12_000)), "it lends nothing now");
    }
}
