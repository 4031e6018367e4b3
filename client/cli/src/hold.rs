//! `swiftcache hold`.

use std::{
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use clap::{ArgGroup, Args};
use swiftcache_proto::{domain::Device, size::size, v1};

use super::{CliError, admin::Admin, args::SocketArg, chosen::Place, output};
use swiftcache_replay::report::bytes;

/// How often to look.
const PERIOD: Duration = Duration::from_millis(500);
/// The longest hold that brokers take.
const LONGEST: Duration = Duration::from_secs(3600);
/// How often to say how far it is.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// How often to look for a signal.
const NAP: Duration = Duration::from_millis(20);
/// How many looks in a row must find enough free. A donor may be in the middle of an offer when it hears of the hold; the
/// second look sees what that took.
const LOOKS: u32 = 2;

/// Make room on a device for an engine that starts there, and keep it while the engine starts
///
/// Elastic donors of the device give back first, until so much is free. Then they offer nothing more, and give nothing
/// more back, for the given time. Exits when the room is there: start the engine then. Fixed donors and engines that lend
/// parts of their own pool are not asked.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("what").required(true).args(["free", "end"]))]
pub(super) struct HoldArgs {
    #[command(flatten)]
    socket: SocketArg,
    /// The device: as `swiftcache status` names it, or its number
    #[arg(long, value_name = "UUID|NUMBER")]
    device: Place,
    /// How much must be free: what the engine will take, for vLLM gpu_memory_utilization times the device's HBM
    #[arg(long, value_name = "SIZE", value_parser = size)]
    free: Option<u64>,
    /// How long donors stay as they are after that: what the engine's start takes
    #[arg(long = "for", value_name = "TIME", default_value = "120s", value_parser = humantime::parse_duration)]
    lasting: Duration,
    /// How long to wait for the room
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    within: Duration,
    /// End the device's hold now, whoever began it
    #[arg(long)]
    end: bool,
}

pub(super) fn run(args: &HoldArgs) -> Result<(), CliError> {
    let interrupt = super::interrupt()?;
    let admin = Admin::connect(&args.socket.socket)?;
    let device = args.device.of(&devices(&admin.node()?)?)?;
    let request = |free_bytes, for_ms, hold_id| v1::HoldRequest {
        device_uuid: device.uuid.to_string(),
        free_bytes,
        for_ms,
        hold_id,
    };
    let Some(free) = args.free else {
        return admin.hold(&request(0, 0, 0));
    };
    let hold = rand::random_range(1..=u64::MAX);
    let (lasting, longest) = times(args.lasting, args.within)?;
    let total = device.hbm_bytes;
    if total > 0 && free > total {
        return Err(CliError::Usage(format!(
            "--free: {} has {} of HBM, which is less than {}",
            device.uuid,
            bytes(total),
            bytes(free)
        )));
    }
    let waiting = Waiting {
        admin: &admin,
        device: &device,
        free,
        deadline: Instant::now() + args.within,
        interrupted: &|| interrupt.load(Ordering::Relaxed),
    };
    waiting.take(&request(free, longest, hold))?;
    match waiting.room() {
        Ok(room) => {
            // From now on the engine takes the room, so donors need not keep it free.
            admin.hold(&request(0, lasting, hold))?;
            output::print(&format!(
                "{}: {} free; donors stay as they are for {}\n",
                device.uuid,
                bytes(room),
                humantime::format_duration(args.lasting)
            ))?;
            Ok(())
        }
        Err(error) => {
            // No engine starts now. If this fails too, the hold ends by itself.
            let _ = admin.hold(&request(0, 0, hold));
            Err(error)
        }
    }
}

/// How long the hold lasts once the room is there, and how long with the wait for it, milliseconds.
fn times(lasting: Duration, within: Duration) -> Result<(u32, u32), CliError> {
    let longest = lasting.saturating_add(within);
    Ok((milliseconds(lasting)?, milliseconds(longest)?))
}

fn milliseconds(time: Duration) -> Result<u32, CliError> {
    match u32::try_from(time.as_millis()) {
        Ok(0) => Err(CliError::Usage("--for: takes more than 0".to_owned())),
        Ok(ms) if time <= LONGEST => Ok(ms),
        _ => Err(CliError::Usage(format!(
            "--for and --within: a hold lasts at most {} in all",
            humantime::format_duration(LONGEST)
        ))),
    }
}

fn devices(node: &v1::GetNodeResponse) -> Result<Vec<Device>, CliError> {
    let read = |seen: &v1::DeviceStatus| {
        let device = seen.device.as_ref();
        let device = device.and_then(|device| device.try_into().ok());
        device.ok_or_else(|| CliError::Failed("the broker named a device badly".to_owned()))
    };
    node.devices.iter().map(read).collect()
}

/// Waits until the device has room.
struct Waiting<'a> {
    admin: &'a Admin,
    device: &'a Device,
    free: u64,
    deadline: Instant,
    interrupted: &'a dyn Fn() -> bool,
}

/// How much of the device is free, and who has the rest.
struct Seen {
    free: u64,
    used: u64,
    /// On its way back, bytes.
    coming: u64,
    /// Label and name of each donor, and what it has on offer, bytes.
    donors: Vec<(String, u64)>,
}

impl Waiting<'_> {
    /// Begins the hold, after the one that there is.
    fn take(&self, request: &v1::HoldRequest) -> Result<(), CliError> {
        let mut said = false;
        loop {
            match self.admin.hold(request) {
                Err(CliError::Failed(problem)) if problem.contains("is held") => {
                    if Instant::now() >= self.deadline {
                        return Err(CliError::Failed(problem));
                    }
                    if !said {
                        output::complain(&format!("swiftcache: {problem}; waiting for that"));
                        said = true;
                    }
                    self.sleep()?;
                }
                answer => return answer,
            }
        }
    }

    /// Returns what is free, bytes, when it is enough and nothing more is on its way.
    fn room(&self) -> Result<u64, CliError> {
        let mut looks = 0;
        let mut said: Option<Instant> = None;
        loop {
            let seen = self.look()?;
            let enough = seen.free >= self.free;
            looks = if enough && seen.coming == 0 {
                looks + 1
            } else {
                0
            };
            if looks >= LOOKS {
                return Ok(seen.free);
            }
            if Instant::now() >= self.deadline {
                return if enough && looks > 0 {
                    Ok(seen.free)
                } else {
                    Err(CliError::Failed(self.missing(&seen)))
                };
            }
            if looks == 0 && said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
                output::complain(&format!(
                    "swiftcache: {}: {} of {} free, {} on its way back",
                    self.device.uuid,
                    bytes(seen.free),
                    bytes(self.free),
                    bytes(seen.coming)
                ));
                said = Some(Instant::now());
            }
            self.sleep()?;
        }
    }

    fn look(&self) -> Result<Seen, CliError> {
        let regions = self.admin.regions()?;
        let node = self.admin.node()?;
        let uuid = self.device.uuid.as_str();
        let named = |seen: &&v1::DeviceStatus| {
            (seen.device.as_ref()).is_some_and(|device| device.uuid == uuid)
        };
        let Some(seen) = node.devices.iter().find(named) else {
            let problem = format!("the broker no longer has device {uuid}");
            return Err(CliError::Failed(problem));
        };
        if seen.hbm_used_unknown {
            let problem = format!("nobody can tell what is free on {uuid}: {}", seen.problem);
            return Err(CliError::Failed(problem));
        }
        let mut coming = 0;
        let mut donors: Vec<(String, u64)> = Vec::new();
        for region in regions.iter().filter(|region| region.device_uuid == uuid) {
            if region.withdrawing {
                coming += region.bytes;
            }
            let donor = format!("{} [{}]", region.donor_name, region.donor_label);
            match donors.iter_mut().find(|(known, _)| *known == donor) {
                Some((_, bytes)) => *bytes += region.bytes,
                None => donors.push((donor, region.bytes)),
            }
        }
        Ok(Seen {
            free: self.device.hbm_bytes.saturating_sub(seen.hbm_used_bytes),
            used: seen.hbm_used_bytes,
            coming,
            donors,
        })
    }

    /// For people: who has what is missing.
    fn missing(&self, seen: &Seen) -> String {
        let mut text = format!(
            "{} has {} free, which is less than {}",
            self.device.uuid,
            bytes(seen.free),
            bytes(self.free)
        );
        if seen.free >= self.free {
            text = format!(
                "{} has {} on its way back still",
                self.device.uuid,
                bytes(seen.coming)
            );
        }
        let lent: u64 = seen.donors.iter().map(|(_, bytes)| *bytes).sum();
        for (donor, offered) in &seen.donors {
            text += &format!("; donor {donor} has {} on offer", bytes(*offered));
        }
        if !seen.donors.is_empty() {
            text += " (only elastic donors give back for a hold; stop a fixed donor, or wait for borrowers that \
                     `swiftcache status` shows as revoked)";
        }
        text + &format!(
            "; other processes use {}",
            bytes(seen.used.saturating_sub(lent))
        )
    }

    fn sleep(&self) -> Result<(), CliError> {
        let until = Instant::now() + PERIOD;
        while Instant::now() < until {
            if (self.interrupted)() {
                return Err(CliError::Interrupted);
            }
            thread::sleep(NAP);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_of_any_length_is_taken_or_refused() {
        let read = |text: &str| humantime::parse_duration(text).unwrap();
        let times = |lasting: &str, within: &str| {
            times(read(lasting), read(within))
                .map_err(|error| (error.exit_code(), error.to_string()))
        };
        assert_eq!(times("2m", "58m"), Ok((120_000, 3_600_000)));
        assert_eq!(times("1ms", "0s"), Ok((1, 1)));
        let longest = "18446744073709551615s";
        for (lasting, within) in [
            ("120s", longest),
            (longest, "60s"),
            (longest, longest),
            ("2m", "3480001ms"),
        ] {
            let (status, said) = times(lasting, within).unwrap_err();
            assert_eq!(status, 2, "{lasting} {within}");
            for part in ["--for and --within", "at most 1h in all"] {
                assert!(said.contains(part), "{said}");
            }
        }
        let (status, said) = times("0s", "60s").unwrap_err();
        assert!(
            status == 2 && said.contains("--for: takes more than 0"),
            "{said}"
        );
    }
}
