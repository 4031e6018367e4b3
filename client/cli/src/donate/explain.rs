//! `--explain`: what an elastic donor would come to lend, and why.

use std::time::Duration;

use serde::Serialize;
use swiftcache_client::donor::{Forecast, Observation};
use swiftcache_proto::{
    domain::{Device, DeviceUuid},
    v1,
};

use super::args::DonateArgs;
use crate::{CliError, admin::Admin, output};

/// What an elastic donor would come to lend on a device. Sizes are bytes.
#[derive(Debug, Serialize)]
struct Explained {
    device: DeviceUuid,
    /// What nobody can tell, and why; then there are no figures.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    #[serde(flatten)]
    figures: Option<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    total: u64,
    free: u64,
    offered: u64,
    reserve: u64,
    headroom: u64,
    /// What could be on offer by what is known now.
    could_offer: u64,
    /// The same once neighbours have held what they have for `settled_after_ms`.
    could_offer_settled: u64,
    settled_after_ms: Option<u64>,
    /// It would never come to lend a slab as things are.
    lends_nothing: bool,
}

impl Figures {
    fn new(forecast: &Forecast) -> Self {
        let Forecast {
            now,
            settled,
            after,
        } = forecast;
        Self {
            total: now.observation.total,
            free: now.observation.free,
            offered: now.observation.offered,
            reserve: now.reserve,
            headroom: now.headroom,
            could_offer: now.ceiling,
            could_offer_settled: *settled,
            settled_after_ms: after.map(|after| after.as_millis() as u64),
            lends_nothing: forecast.is_nothing(),
        }
    }
}

/// By what the broker's probe sees: a process that looked for itself would take half a gigabyte of each GPU for its own
/// context.
pub(super) fn explain_all(args: &DonateArgs) -> Result<(), CliError> {
    let seen = Admin::connect(&args.socket.socket)?.node()?.devices;
    let read = |seen: &v1::DeviceStatus| {
        let device = seen
            .device
            .as_ref()
            .and_then(|device| device.try_into().ok());
        device.ok_or_else(|| CliError::Failed("the broker named a device badly".to_owned()))
    };
    let known: Vec<Device> = seen.iter().map(read).collect::<Result<_, _>>()?;
    let mut explained = Vec::new();
    for device in args.device.among(&known)? {
        let seen = (known.iter().zip(&seen)).find(|(known, _)| known.uuid == device.uuid);
        let Some((_, seen)) = seen else { continue };
        if seen.hbm_used_unknown || device.hbm_bytes == 0 {
            explained.push(Explained {
                device: device.uuid.clone(),
                problem: Some(seen.problem.clone()),
                figures: None,
            });
            if !args.json {
                let text = format!("{}: nobody can tell: {}\n", device.uuid, seen.problem);
                output::print(&text)?;
            }
            continue;
        }
        let policy = args.elastic_args.policy(device.hbm_bytes, args.slab);
        let forecast = Forecast::new(policy, observation(device, seen))?;
        explained.push(Explained {
            device: device.uuid.clone(),
            problem: None,
            figures: Some(Figures::new(&forecast)),
        });
        if !args.json {
            output::print(&format!("{}: {forecast}\n", device.uuid))?;
        }
    }
    match args.json {
        true => output::print_json(&explained),
        false => Ok(()),
    }
}

/// A device as the broker's probe sees it.
pub(crate) fn observation(device: &Device, seen: &v1::DeviceStatus) -> Observation {
    let offered = seen.account.unwrap_or_default().offered_bytes;
    Observation {
        now: Duration::ZERO,
        free: device.hbm_bytes.saturating_sub(seen.hbm_used_bytes),
        total: device.hbm_bytes,
        // What is lent already is not a neighbour's.
        donated: offered,
        offered,
        held: seen.hold.map(|hold| hold.free_bytes),
    }
}
