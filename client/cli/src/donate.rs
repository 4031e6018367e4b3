//! `swiftcache donate`.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::{ArgGroup, Args, ValueEnum};
use serde::Serialize;
use swiftcache_proto::{
    convert::{MAX_DRAIN_MS, SLAB_BYTES},
    domain::{Device, DeviceUuid, HandleKind, Medium},
    size::size,
    v1,
};
use tracing::info;

use super::{CliError, admin::Admin, args::SocketArg, backend, chosen::Chosen, output};
use swiftcache_client::{
    device::{self, DeviceError, DeviceLayer},
    disk::{DiskAgent, DiskConfig, StoreConfig},
    donor::{
        Agent, AgentConfig, Donor, DonorConfig, DonorStatus, Forecast, Observation, PolicyConfig,
        Settled,
    },
    session::{Session, SessionConfig},
};
use swiftcache_replay::report::bytes;

/// What leaving takes at most beyond the time that borrowers have to move away: copies under way, and a few messages.
const LEAVE_MARGIN: Duration = Duration::from_secs(5);
/// How often to look for a signal.
const NAP: Duration = Duration::from_millis(50);
/// What is on offer is said when it has been the same for this long.
const STEADY: Duration = Duration::from_secs(2);

/// Lend a device's idle HBM: a fixed amount, or as much as stays idle; or a fixed amount of host memory, or of a disk
///
/// Runs until SIGTERM or SIGINT, then asks for everything back and waits until nobody can touch it any more.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("amount").required(true).args(["bytes", "elastic"]))]
pub(super) struct DonateArgs {
    #[command(flatten)]
    socket: SocketArg,
    /// The device, as `swiftcache status` names it, or all of the node's; HOST-0, HOST-1, ...: host memory of that NUMA
    /// node, which engines lease where HBM falls short; DISK-0, DISK-1, ...: a file, to which blocks in host memory are
    /// written, and from which they come back when a lookup wants them
    #[arg(long, value_name = "UUID|all|HOST-N|DISK-N")]
    device: Chosen,
    /// Lend this much, whole slabs; what is missing is offered as soon as it can be. Of a disk: the most that its file takes
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bytes: Option<u64>,
    /// Of a disk: the directory of its file. It stays when the command ends, and is found again
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// Of a disk: the most host memory to lease for blocks of one model (of each rank) that come back
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    memory: u64,
    /// Of a disk: write and read through the kernel's cache, which takes memory from engines and gives it back slowly
    #[arg(long, requires = "path")]
    buffered: bool,
    /// Follow idle HBM: up slowly, down at once
    #[arg(long)]
    elastic: bool,
    /// Say what --elastic would come to lend, by what the broker sees of each device now, and why; lend nothing
    #[arg(long, conflicts_with = "bytes")]
    explain: bool,
    /// With --explain: print JSON
    #[arg(long, requires = "explain")]
    json: bool,
    /// For people: shown in status and logs
    #[arg(long, value_name = "NAME", default_value = "donate")]
    name: String,
    /// Sub-division of this user's tenant
    #[arg(long, value_name = "LABEL", default_value = "")]
    tenant: String,
    /// What is lent and given back at a time, 64KiB to 16GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    slab: u64,
    /// How long borrowers may take to move blocks away [default: the broker's]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    drain: Option<Duration>,
    /// How borrowers open what is lent; cuda-ipc opens only in processes that enumerate this GPU and share the PID
    /// namespace [default: posix-fd, or cuda-ipc where the driver exports no descriptors]
    #[arg(long, value_name = "KIND", value_enum)]
    handle: Option<Opened>,
    /// How long to wait for everything to come back in the end [default: what borrowers may take, and 5s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    leave_within: Option<Duration>,
    #[command(flatten)]
    elastic_args: ElasticArgs,
    /// On a simulated device: where its use is written, the topology's usage_dir
    #[arg(long, value_name = "DIR")]
    usage_dir: Option<PathBuf>,
}

/// How borrowers open an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Opened {
    /// By a legacy CUDA handle
    CudaIpc,
    /// By a file descriptor
    PosixFd,
}

impl From<Opened> for HandleKind {
    fn from(opened: Opened) -> Self {
        match opened {
            Opened::CudaIpc => Self::CudaIpc,
            Opened::PosixFd => Self::PosixFd,
        }
    }
}

/// The policy of `--elastic`; what is not given follows from the device's size.
#[derive(Args, Debug)]
#[command(next_help_heading = "With --elastic")]
struct ElasticArgs {
    /// Never lent [default: a twentieth of the device; beside settled neighbours at most an eighth of what is idle]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    reserve: Option<u64>,
    /// Kept free for neighbours' growth, even if none was seen; restored when they are quiet [default: as the
    /// reserve]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    headroom: Option<u64>,
    /// The most to lend [default: all that is idle]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    most: Option<u64>,
    /// How often to look [default: 250ms]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    period: Option<Duration>,
    /// HBM must have been idle for this long before it is lent [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    settle: Option<Duration>,
    /// Headroom is what neighbours were seen to grow within this time [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    horizon: Option<Duration>,
    /// Half of a seen growth is forgotten in this time [default: 2m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    half_life: Option<Duration>,
    /// Neighbours are settled when they have held what they have for this long: an engine that takes its memory when it
    /// starts. What --reserve and --headroom name is kept beside settled neighbours too [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    settled_after: Option<Duration>,
}

impl ElasticArgs {
    fn policy(&self, total: u64, slab: u64) -> PolicyConfig {
        let usual = PolicyConfig::new(total, slab);
        PolicyConfig {
            reserve_bytes: self.reserve.unwrap_or(usual.reserve_bytes),
            least_headroom_bytes: self.headroom.unwrap_or(usual.least_headroom_bytes),
            max_bytes: self.most.unwrap_or(usual.max_bytes),
            settle: self.settle.unwrap_or(usual.settle),
            horizon: self.horizon.unwrap_or(usual.horizon),
            half_life: self.half_life.unwrap_or(usual.half_life),
            settled: usual.settled.map(|settled| Settled {
                after: self.settled_after.unwrap_or(settled.after),
                reserve_part: match self.reserve {
                    Some(_) => 0,
                    None => settled.reserve_part,
                },
                headroom_part: match self.headroom {
                    Some(_) => 0,
                    None => settled.headroom_part,
                },
            }),
            ..usual
        }
    }
}

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

impl DonateArgs {
    /// Refuses what cannot work on any device.
    fn check(&self) -> Result<(), CliError> {
        let refuse = |problem: String| Err(CliError::Usage(problem));
        match (self.device.disk(), &self.path) {
            (Some(_), Some(_)) => return self.check_disk(),
            (Some(disk), None) => {
                return refuse(format!("--path: {disk} needs the directory of its file"));
            }
            (None, Some(_)) => {
                return refuse("--path: goes with --device DISK-0, DISK-1, ...".to_owned());
            }
            (None, None) => {}
        }
        let (least, most) = (SLAB_BYTES.start(), SLAB_BYTES.end());
        if !SLAB_BYTES.contains(&self.slab) {
            let (slab, least, most) = (bytes(self.slab), bytes(*least), bytes(*most));
            return refuse(format!("--slab: is {slab}; takes {least} to {most}"));
        }
        for (flag, given) in [("--bytes", self.bytes), ("--most", self.elastic_args.most)] {
            match given {
                Some(0) => return refuse(format!("{flag}: takes more than 0")),
                Some(given) if given < self.slab => {
                    let (given, slab) = (bytes(given), bytes(self.slab));
                    return refuse(format!(
                        "{flag}: {given} is less than one slab, --slab {slab}"
                    ));
                }
                _ => {}
            }
        }
        for (flag, given) in [
            ("--drain", self.drain),
            ("--leave-within", self.leave_within),
            ("--period", self.elastic_args.period),
            ("--half-life", self.elastic_args.half_life),
        ] {
            if given.is_some_and(|given| given.is_zero()) {
                return refuse(format!("{flag}: takes more than 0s"));
            }
        }
        if self.device.is_host_memory() {
            if self.elastic {
                return refuse(
                    "--elastic: follows idle HBM; of host memory lend --bytes".to_owned(),
                );
            }
            if self.handle == Some(Opened::CudaIpc) {
                return refuse("--handle: host memory is opened by descriptor only".to_owned());
            }
        }
        let longest = Duration::from_millis(MAX_DRAIN_MS.into());
        if self.drain.is_some_and(|drain| drain > longest) {
            let longest = humantime::format_duration(longest);
            return refuse(format!("--drain: takes at most {longest}"));
        }
        Ok(())
    }

    /// Refuses what cannot work on a disk.
    fn check_disk(&self) -> Result<(), CliError> {
        let refuse = |problem: &str| Err(CliError::Usage(problem.to_owned()));
        if self.elastic {
            return refuse("--elastic: follows idle HBM; of a disk lend --bytes");
        }
        if self.handle.is_some() {
            return refuse("--handle: nobody opens a disk but this command");
        }
        if self.memory == 0 {
            return refuse("--memory: takes more than 0: blocks come back to host memory");
        }
        Ok(())
    }

    /// Refuses what cannot work on a device of `total` bytes.
    fn check_for(&self, device: &DeviceUuid, total: u64) -> Result<(), CliError> {
        for (flag, given) in [
            ("--bytes", self.bytes),
            ("--most", self.elastic_args.most),
            ("--slab", Some(self.slab)),
        ] {
            if let Some(given) = given.filter(|given| *given > total) {
                let (given, total) = (bytes(given), bytes(total));
                let memory = match device.medium() {
                    Medium::Hbm => "HBM",
                    Medium::Host => "memory",
                };
                return Err(CliError::Usage(format!(
                    "{flag}: {device} has {total} of {memory}, which is less than {given}"
                )));
            }
        }
        if self.bytes.is_some() {
            return Ok(());
        }
        // On a device that nobody else uses.
        let policy = self.elastic_args.policy(total, self.slab);
        let kept = policy
            .reserve_bytes
            .saturating_add(policy.least_headroom_bytes);
        if total.saturating_sub(kept) < self.slab {
            let [reserve, headroom, slab, total] = [
                policy.reserve_bytes,
                policy.least_headroom_bytes,
                self.slab,
                total,
            ]
            .map(bytes);
            return Err(CliError::Usage(format!(
                "--reserve, --headroom: {device} would never lend anything: of {total} a reserve of {reserve} and a headroom of \
                 {headroom} leave less than one slab of {slab}"
            )));
        }
        Ok(())
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

pub(super) fn run(args: &DonateArgs) -> Result<(), CliError> {
    args.check()?;
    if args.explain {
        return explain_all(args);
    }
    let interrupt = super::interrupt()?;
    let session = SessionConfig {
        socket: args.socket.socket.clone(),
        name: args.name.clone(),
        tenant: args.tenant.clone(),
    };
    if let (Some(disk), Some(path)) = (args.device.disk(), &args.path) {
        return keep_on_disk(args, session, disk, path, &interrupt);
    }
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

/// Keeps blocks in a file until a signal comes.
fn keep_on_disk(
    args: &DonateArgs,
    config: SessionConfig,
    disk: &DeviceUuid,
    path: &Path,
    interrupt: &AtomicBool,
) -> Result<(), CliError> {
    survive_file_limit()?;
    let label = config.tenant.clone();
    let (session, _) = backend::connect(config)?;
    let known = session.host_devices().unwrap_or_default();
    let Some(host) = known.first() else {
        return Err(CliError::Usage(
            "--device: the broker names no host memory, through which blocks go to a disk: it is too old".to_owned(),
        ));
    };
    let layer = device::open_host_memory(&known).map_err(swiftcache_client::Error::from)?;
    let uid = rustix::process::getuid().as_raw();
    let agent = DiskAgent::start(
        session,
        layer,
        DiskConfig {
            name: disk.to_string(),
            store: StoreConfig {
                path: path.to_owned(),
                bytes: args.bytes.unwrap_or(0),
                // As the broker calls the tenant.
                tenant: match label.as_str() {
                    "" => uid.to_string(),
                    label => format!("{uid}/{label}"),
                },
                direct: !args.buffered,
            },
            device: host.uuid.clone(),
            memory_bytes: args.memory,
        },
    )?;
    let stats = agent.stats();
    // Nobody has to read it.
    let _ = output::print(&format!(
        "{disk}: keeps {} blocks, and at most {}, in {}\n",
        stats.blocks,
        bytes(stats.bytes),
        path.display()
    ));
    let mut said = None;
    while !interrupt.load(Ordering::Relaxed) {
        let problem = agent.problem();
        if problem != said {
            if let Some(problem) = &problem {
                output::complain(&format!("swiftcache: {disk}: {problem}"));
            }
            said = problem;
        }
        thread::sleep(NAP);
    }
    drop(agent);
    Ok(())
}

/// A file that may not grow (`ulimit -f`) is a full disk, and no reason to die: the signal is caught, and the write fails.
fn survive_file_limit() -> Result<(), CliError> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| CliError::Failed(format!("cannot catch signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let _entered = runtime.enter();
    // What is caught once stays caught.
    let caught = signal(SignalKind::from_raw(libc::SIGXFSZ)).map_err(failed)?;
    drop(caught);
    Ok(())
}

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
fn explain_all(args: &DonateArgs) -> Result<(), CliError> {
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
pub(super) fn observation(device: &Device, seen: &v1::DeviceStatus) -> Observation {
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
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        donate: DonateArgs,
    }

    fn parse(flags: &str) -> Result<DonateArgs, String> {
        let args = format!("donate --device SIM-1 {flags}");
        let parsed = Cli::try_parse_from(args.split_whitespace());
        parsed
            .map(|cli| cli.donate)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_donor_is_either_fixed_or_elastic() {
        assert_eq!(parse("--bytes 1GiB").unwrap().bytes, Some(1 << 30));
        assert!(parse("--elastic").unwrap().elastic);
        for flags in [
            "",
            "--elastic --json",
            "--bytes 1GiB --settled-after 1m",
            "--bytes 1GiB --elastic",
            "--bytes 1GiB --explain",
            "--bytes 1GiB --reserve 1",
        ] {
            assert!(parse(flags).is_err(), "{flags}");
        }
    }

    #[test]
    fn what_cannot_work_is_refused_and_the_flag_is_named() {
        let refused = |flags: &str| {
            parse(flags)
                .unwrap()
                .check()
                .err()
                .map(|error| error.to_string())
        };
        for (flags, flag) in [
            ("--bytes 0", "--bytes: takes more than 0"),
            ("--bytes 1MiB", "--bytes: 1.0 MB is less than one slab"),
            (
                "--bytes 1GiB --slab 2GiB",
                "--bytes: 1.1 GB is less than one slab",
            ),
            ("--bytes 1GiB --slab 1", "--slab: is 1 B; takes 65.5 kB"),
            ("--elastic --slab 32GiB", "--slab: is 34.4 GB"),
            (
                "--bytes 1GiB --leave-within 0s",
                "--leave-within: takes more than 0s",
            ),
            (
                "--elastic --leave-within 0s",
                "--leave-within: takes more than 0s",
            ),
            ("--elastic --period 0s", "--period: takes more than 0s"),
            (
                "--elastic --half-life 0s",
                "--half-life: takes more than 0s",
            ),
            ("--elastic --most 0", "--most: takes more than 0"),
            (
                "--elastic --most 1MiB",
                "--most: 1.0 MB is less than one slab",
            ),
            ("--bytes 1GiB --drain 0s", "--drain: takes more than 0s"),
            ("--bytes 1GiB --drain 11m", "--drain: takes at most 10m"),
        ] {
            let problem = refused(flags).unwrap_or_default();
            assert!(problem.contains(flag), "{flags}: {problem:?}");
        }
        // The twin: next to each of them lies one that works.
        for flags in [
            "--bytes 256MiB",
            "--bytes 1GiB --slab 1GiB",
            "--bytes 1GiB --slab 64KiB",
            "--elastic --leave-within 1ms --period 1ms --half-life 1ms --settle 0s",
            "--elastic --most 256MiB",
            "--bytes 1GiB --drain 10m",
        ] {
            assert_eq!(refused(flags), None, "{flags}");
        }
    }

    #[test]
    fn more_than_a_device_has_is_refused() {
        let device: DeviceUuid = "SIM-1".parse().unwrap();
        for (flags, flag) in [
            ("--bytes 2GiB", "--bytes"),
            ("--elastic --most 2GiB", "--most"),
            ("--elastic --slab 2GiB", "--slab"),
        ] {
            let args = parse(flags).unwrap();
            let problem = args.check_for(&device, 1 << 30).unwrap_err().to_string();
            assert!(
                problem.starts_with(&format!("{flag}: SIM-1 has 1.1 GB")),
                "{problem}"
            );
            args.check_for(&device, 4 << 30).unwrap();
        }
    }

    #[test]
    fn what_would_never_lend_is_refused() {
        let device: DeviceUuid = "SIM-1".parse().unwrap();
        let refused = |flags: &str| {
            let args = parse(flags).unwrap();
            args.check_for(&device, 1 << 30)
                .err()
                .map(|error| error.to_string())
        };
        for flags in [
            "--elastic --reserve 1GiB",
            "--elastic --headroom 1GiB",
            "--elastic --reserve 512MiB --headroom 257MiB",
        ] {
            let problem = refused(flags).unwrap_or_default();
            assert!(
                problem.contains("--reserve, --headroom: SIM-1"),
                "{flags}: {problem}"
            );
        }
        // The twin: what leaves a slab.
        for flags in ["--elastic", "--elastic --reserve 512MiB --headroom 256MiB"] {
            assert_eq!(refused(flags), None, "{flags}");
        }
    }

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

    #[test]
    fn the_way_that_borrowers_open_it_can_be_chosen() {
        assert_eq!(parse("--bytes 1GiB").unwrap().handle, None);
        let kind =
            |text: &str| parse(&format!("--elastic --handle {text}")).map(|args| args.handle);
        assert_eq!(kind("cuda-ipc").unwrap(), Some(Opened::CudaIpc));
        assert_eq!(kind("posix-fd").unwrap(), Some(Opened::PosixFd));
        assert!(kind("fabric").is_err());
    }

    #[test]
    fn a_device_is_named_or_all_are_meant() {
        let device = |uuid: &str| Device {
            uuid: uuid.parse().unwrap(),
            name: "simulated".to_owned(),
            hbm_bytes: 1 << 30,
            ordinal: 0,
        };
        let known = [device("SIM-0"), device("SIM-1")];
        let chosen = |text: &str| text.parse::<Chosen>().unwrap();
        assert_eq!(chosen("all").among(&known).unwrap().len(), 2);
        assert_eq!(chosen("SIM-1").among(&known).unwrap(), [&known[1]]);
        let refused = chosen("SIM-7").among(&known).unwrap_err().to_string();
        assert!(refused.contains("SIM-7") && refused.contains("SIM-0, SIM-1, or all"));
        assert!(chosen("all").among(&[]).is_err());
    }

    #[test]
    fn what_is_not_given_follows_from_the_device() {
        let args = parse("--elastic --reserve 3GiB --settle 200ms").unwrap();
        let policy = args.elastic_args.policy(80 << 30, 1 << 30);
        assert_eq!(policy.reserve_bytes, 3 << 30);
        assert_eq!(policy.settle, Duration::from_millis(200));
        assert_eq!(policy.least_headroom_bytes, 4 << 30);
        assert_eq!(policy.slab_bytes, 1 << 30);
    }
}
