//! What operators do to a node: `drain`, `undrain`, `evict`, `forget`, `quota`, `preview`, `events`.

use std::{
    fmt::Write as _,
    io::{BufRead, IsTerminal, Write as _},
    path::PathBuf,
    time::Duration,
};

use clap::{
    ArgGroup, ArgMatches, Args, Command, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use serde_json::{Value, json};
use swiftcache_proto::{size::size, v1};

use super::{
    CliError,
    admin::{Admin, Tls},
    output,
};
use swiftcache_replay::report::bytes;

/// The last moment that can be shown: the end of the year 9999, milliseconds since 1970.
const LATEST_MS: u64 = 253_402_300_799_000;

/// What ends a donor's drain beside `undrain`: a donor is named by its session's label, and a new process has a new one.
pub(super) const DRAIN_ENDS_WITH_PROCESS: &str = "the end of its process ends the drain too";

/// Which broker, and as whom.
#[derive(Clone, Debug)]
pub(super) struct BrokerArg(BrokerFlags);

#[derive(Args, Clone, Debug)]
struct BrokerFlags {
    /// The broker's Unix socket
    #[arg(
        long,
        value_name = "PATH",
        env = "SWIFTCACHE_SOCKET",
        default_value = "/run/swiftcache/broker.sock"
    )]
    socket: PathBuf,
    /// The broker's TCP address instead, https://HOST:PORT (its listen_tcp), with the certificates below
    #[arg(long, value_name = "URL", requires_all = ["tls_ca", "tls_cert", "tls_key"])]
    address: Option<String>,
    /// The authority that signed the broker's certificate, PEM
    #[arg(long, value_name = "FILE", requires = "address")]
    tls_ca: Option<PathBuf>,
    /// This client's certificate, PEM
    #[arg(long, value_name = "FILE", requires = "address")]
    tls_cert: Option<PathBuf>,
    /// Its key, PEM
    #[arg(long, value_name = "FILE", requires = "address")]
    tls_key: Option<PathBuf>,
}

impl BrokerArg {
    pub(super) fn connect(&self) -> Result<Admin, CliError> {
        let flags = &self.0;
        match (
            &flags.address,
            &flags.tls_ca,
            &flags.tls_cert,
            &flags.tls_key,
        ) {
            (Some(address), Some(ca), Some(cert), Some(key)) => {
                Admin::connect_tls(address, &Tls { ca, cert, key })
            }
            _ => Admin::connect(&flags.socket),
        }
    }
}

impl Args for BrokerArg {
    fn augment_args(command: Command) -> Command {
        BrokerFlags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        BrokerFlags::augment_args_for_update(command)
    }
}

impl FromArgMatches for BrokerArg {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        one_broker(matches)?;
        BrokerFlags::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        one_broker(matches)?;
        self.0.update_from_arg_matches(matches)
    }
}

/// Refuses two brokers. `conflicts_with` would refuse `--address` beside a socket from the environment too, and that one gives way.
fn one_broker(matches: &ArgMatches) -> Result<(), clap::Error> {
    let given = |flag| matches.value_source(flag) == Some(ValueSource::CommandLine);
    if !(given("socket") && given("address")) {
        return Ok(());
    }
    let mut error = clap::Error::new(ErrorKind::ArgumentConflict);
    for (kind, flag) in [
        (ContextKind::InvalidArg, "--address <URL>"),
        (ContextKind::PriorArg, "--socket <PATH>"),
    ] {
        error.insert(kind, ContextValue::String(flag.to_owned()));
    }
    Err(error)
}

/// Whether to ask, and how to answer.
#[derive(Args, Clone, Copy, Debug)]
struct Manner {
    /// Do not ask before it is done
    #[arg(long, short)]
    yes: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Manner {
    /// Asks whether `what` may be done. Where nobody can answer, `--yes` must say so.
    fn confirm(self, what: &str) -> Result<(), CliError> {
        if self.yes {
            return Ok(());
        }
        if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
            let problem = format!("{what} Nobody can be asked here: use --yes");
            return Err(CliError::Usage(problem));
        }
        // Whether the question can be shown, the answer tells.
        let _ = write!(
            std::io::stderr().lock(),
            "{} Go on? [y/N] ",
            output::shown(what)
        );
        let mut answer = String::new();
        let read = std::io::stdin().lock().read_line(&mut answer);
        match (read, answer.trim()) {
            (Ok(_), "y" | "Y" | "yes") => Ok(()),
            _ => Err(CliError::Interrupted),
        }
    }
}

/// Says what was done, in words or as JSON.
fn answer(json: bool, text: &str, document: &Value) -> Result<(), CliError> {
    match json {
        true => output::print_json(document),
        false => output::print(&format!("{text}\n")).map(drop),
    }
}

/// Take back everything that is lent of a device, a donor or a region, and lend nothing more of it
///
/// Borrowers move their hottest blocks elsewhere while the drain window lasts; nothing else is lost but cached blocks. A drain of a
/// device lasts until undrain, also over restarts of its donors; one of a donor ends with that donor's process.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("target").required(true).args(["device", "donor", "region"]))]
pub(super) struct DrainArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// A device, as `swiftcache status` names it
    #[arg(long, value_name = "UUID")]
    device: Option<String>,
    /// A donor: the label that `swiftcache status` shows in brackets
    #[arg(long, value_name = "LABEL")]
    donor: Option<String>,
    /// One region, by its hexadecimal id
    #[arg(long, value_name = "ID")]
    region: Option<String>,
    /// How long borrowers may take to move blocks away [default: the broker's]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    within: Option<Duration>,
    #[command(flatten)]
    manner: Manner,
}

impl DrainArgs {
    /// For people: how long the drain lasts.
    fn until(&self) -> String {
        const UNDRAIN: &str = "; it lends nothing until `swiftcache undrain`";
        match (&self.donor, &self.region) {
            (Some(_), _) => format!("{UNDRAIN}; {DRAIN_ENDS_WITH_PROCESS}"),
            (_, Some(_)) => String::new(),
            _ => UNDRAIN.to_owned(),
        }
    }
}

pub(super) fn drain(args: &DrainArgs) -> Result<(), CliError> {
    use v1::drain_request::Target;
    let admin = args.broker.connect()?;
    let (target, name) = match (&args.device, &args.donor, &args.region) {
        (Some(uuid), _, _) => (Target::DeviceUuid(uuid.clone()), format!("device {uuid}")),
        (_, Some(label), _) => (Target::DonorLabel(label.clone()), format!("donor {label}")),
        (_, _, Some(id)) => (Target::RegionId(id.clone()), format!("region {id}")),
        _ => return Err(CliError::Usage("--device: is missing".to_owned())),
    };
    let drain_ms = match args.within {
        None => 0,
        Some(within) => match u32::try_from(within.as_millis()) {
            Ok(ms) if ms > 0 => ms,
            _ => {
                let problem = "--within: takes more than 0, and less than 49 days";
                return Err(CliError::Usage(problem.to_owned()));
            }
        },
    };
    let question = match &args.device {
        Some(uuid) => {
            let leases = admin.snapshot()?.leases;
            let its = leases.iter().filter(|lease| lease.device_uuid == *uuid);
            let (count, sum) =
                its.fold((0, 0), |(count, sum), lease| (count + 1, sum + lease.bytes));
            format!(
                "Drain {name}: {count} leases with {} are revoked.",
                bytes(sum)
            )
        }
        None => format!("Drain {name}: its leases are revoked."),
    };
    args.manner.confirm(&question)?;
    let done = admin.drain(&v1::DrainRequest {
        target: Some(target),
        drain_ms,
    })?;
    let until = args.until();
    let text = format!(
        "{name}: {} leases with {} are on their way back{until}",
        done.revoked_leases,
        bytes(done.revoked_bytes)
    );
    let document = json!({
        "drained": name,
        "revoked_leases": done.revoked_leases,
        "revoked_bytes": done.revoked_bytes,
    });
    answer(args.manner.json, &text, &document)
}

/// End a drain: the device or donor lends again
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("target").required(true).args(["device", "donor"]))]
pub(super) struct UndrainArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// A device, as `swiftcache status` names it
    #[arg(long, value_name = "UUID")]
    device: Option<String>,
    /// A donor: the label that `swiftcache status` shows in brackets
    #[arg(long, value_name = "LABEL")]
    donor: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn undrain(args: &UndrainArgs) -> Result<(), CliError> {
    use v1::undrain_request::Target;
    let (target, name) = match (&args.device, &args.donor) {
        (Some(uuid), _) => (Target::DeviceUuid(uuid.clone()), format!("device {uuid}")),
        (_, Some(label)) => (Target::DonorLabel(label.clone()), format!("donor {label}")),
        _ => return Err(CliError::Usage("--device: is missing".to_owned())),
    };
    args.broker.connect()?.undrain(&v1::UndrainRequest {
        target: Some(target),
    })?;
    answer(
        args.json,
        &format!("{name} lends again"),
        &json!({ "undrained": name }),
    )
}

/// Forget a namespace's blocks, or revoke one lease
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("target").required(true).args(["namespace", "lease"]))]
pub(super) struct EvictArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// Every tenant's namespace of this name: nobody finds its blocks any more
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// One lease, by its number
    #[arg(long, value_name = "NUMBER")]
    lease: Option<u64>,
    #[command(flatten)]
    manner: Manner,
}

pub(super) fn evict(args: &EvictArgs) -> Result<(), CliError> {
    use v1::evict_request::Target;
    let (target, name) = match (&args.namespace, args.lease) {
        (Some(name), _) => (Target::Namespace(name.clone()), format!("namespace {name}")),
        (_, Some(lease)) => (Target::LeaseId(lease), format!("lease {lease}")),
        _ => return Err(CliError::Usage("--namespace: is missing".to_owned())),
    };
    let admin = args.broker.connect()?;
    args.manner
        .confirm(&format!("Evict {name}: its cached blocks are lost."))?;
    let done = admin.evict(&v1::EvictRequest {
        target: Some(target),
    })?;
    let text = format!(
        "{name}: {} blocks forgotten, {} leases revoked",
        done.evicted_blocks, done.revoked_leases
    );
    let document = json!({
        "evicted": name,
        "evicted_blocks": done.evicted_blocks,
        "revoked_leases": done.revoked_leases,
    });
    answer(args.manner.json, &text, &document)
}

/// Drop what engines that are gone have left for their successors
///
/// Their memory is free at once, or when those that read it have let go. Without a flag, everything that was left is dropped.
#[derive(Args, Debug)]
pub(super) struct ForgetArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// Only of this tenant: a uid, or uid/label
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// Only of namespaces of this name
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    #[command(flatten)]
    manner: Manner,
}

pub(super) fn forget(args: &ForgetArgs) -> Result<(), CliError> {
    let admin = args.broker.connect()?;
    let tenant = args.tenant.as_ref();
    let namespace = args.namespace.as_ref();
    let of = [
        tenant.map(|tenant| format!(" of tenant {tenant}")),
        namespace.map(|name| format!(" of namespace {name}")),
    ];
    let of = of.into_iter().flatten().collect::<String>();
    args.manner.confirm(&format!(
        "Drop what engines that are gone have left{of}: their successors start cold."
    ))?;
    let done = admin.forget(&v1::ForgetRequest {
        tenant: tenant.cloned().unwrap_or_default(),
        namespace: namespace.cloned().unwrap_or_default(),
    })?;
    let text = format!(
        "{} leases with {} and {} blocks{of} are dropped",
        done.leases,
        bytes(done.bytes),
        done.blocks
    );
    let document = json!({
        "forgotten_leases": done.leases,
        "forgotten_bytes": done.bytes,
        "forgotten_blocks": done.blocks,
    });
    answer(args.manner.json, &text, &document)
}

/// Bound what a namespace or a tenant may hold; revokes nothing and outlives the broker
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("target").required(true).args(["namespace", "tenant"]))]
#[command(group = ArgGroup::new("quota").required(true).args(["bytes", "none"]))]
pub(super) struct QuotaArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// Each tenant's namespace of this name
    #[arg(long, value_name = "NAME")]
    namespace: Option<String>,
    /// All namespaces of a tenant: a uid, or uid/label
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// The most it may hold; 0: nothing more is granted
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bytes: Option<u64>,
    /// No more than the configured quota, if there is one
    #[arg(long)]
    none: bool,
    #[command(flatten)]
    manner: Manner,
}

pub(super) fn quota(args: &QuotaArgs) -> Result<(), CliError> {
    use v1::set_quota_request::Target;
    let (target, name) = match (&args.namespace, &args.tenant) {
        (Some(name), _) => (Target::Namespace(name.clone()), format!("namespace {name}")),
        (_, Some(tenant)) => (Target::Tenant(tenant.clone()), format!("tenant {tenant}")),
        _ => return Err(CliError::Usage("--namespace: is missing".to_owned())),
    };
    let most = match args.bytes {
        Some(most) => format!("holds {} at most", bytes(most)),
        None => "has no quota of its own".to_owned(),
    };
    let admin = args.broker.connect()?;
    args.manner
        .confirm(&format!("From now on {name} {most}."))?;
    let done = admin.set_quota(&v1::SetQuotaRequest {
        target: Some(target),
        bytes: args.bytes,
    })?;
    let text = format!("{name} {most}; it holds {} now", bytes(done.leased_bytes));
    let document = json!({
        "quota_of": name,
        "bytes": args.bytes,
        "leased_bytes": done.leased_bytes,
    });
    answer(args.manner.json, &text, &document)
}

/// Say what would be given back and revoked if a device needed so much; changes nothing
#[derive(Args, Debug)]
pub(super) struct PreviewArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// The device, as `swiftcache status` names it
    #[arg(long, value_name = "UUID")]
    device: String,
    /// How much it needs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    bytes: u64,
    /// Only this donor's regions: the label that `swiftcache status` shows in brackets
    #[arg(long, value_name = "LABEL", default_value = "")]
    donor: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn preview(args: &PreviewArgs) -> Result<(), CliError> {
    let done = args
        .broker
        .connect()?
        .preview(&v1::PreviewWithdrawRequest {
            device_uuid: args.device.clone(),
            bytes: args.bytes,
            donor_label: args.donor.clone(),
        })?;
    let mut text = format!(
        "{}: {} would come back from {} regions, {} of it at once; {} leases with {} would be revoked, and {} blocks no longer found \
         unless they are moved",
        args.device,
        bytes(done.bytes),
        done.regions.len(),
        bytes(done.idle_bytes),
        done.leases.len(),
        bytes(done.revoked_bytes),
        done.lost_blocks
    );
    if done.on_disk_blocks > 0 {
        let _ = write!(
            text,
            "; {} more blocks would be found on a disk only",
            done.on_disk_blocks
        );
    }
    if done.disk_bytes > 0 {
        let _ = write!(
            text,
            "; {} of the leases bring blocks back from a disk, where these stay",
            bytes(done.disk_bytes)
        );
    }
    if done.on_disk_blocks + done.disk_bytes > 0 && done.host_left_bytes == 0 {
        text += "; nothing would come back from a disk until host memory is lent again";
    }
    let document = json!({
        "device": args.device,
        "bytes": done.bytes,
        "idle_bytes": done.idle_bytes,
        "regions": done.regions.len(),
        "revoked_leases": done.leases.len(),
        "revoked_bytes": done.revoked_bytes,
        "lost_blocks": done.lost_blocks,
        "on_disk_blocks": done.on_disk_blocks,
        "disk_bytes": done.disk_bytes,
        "host_left_bytes": done.host_left_bytes,
    });
    answer(args.json, &text, &document)
}

/// List what happened last, oldest first
#[derive(Args, Debug)]
pub(super) struct EventsArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// At most this many, the newest, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    /// Only of this kind, e.g. short, zombie, drain; may be given several times
    #[arg(long, value_name = "KIND")]
    kind: Vec<String>,
    /// Only events after this sequence number
    #[arg(long, value_name = "N", default_value_t = 0)]
    after: u64,
    /// Print one JSON document a line
    #[arg(long)]
    json: bool,
}

pub(super) fn events(args: &EventsArgs) -> Result<(), CliError> {
    let events = args.broker.connect()?.list_events(&v1::ListEventsRequest {
        after_sequence: args.after,
        limit: args.limit,
        kinds: args.kind.clone(),
    })?;
    if args.json {
        let lines = events.iter().map(|event| {
            let document = json!({
                "sequence": event.sequence,
                "unix_ms": event.unix_ms,
                "kind": event.kind,
                "text": event.text,
            });
            format!("{document}\n")
        });
        return output::print(&lines.collect::<String>()).map(drop);
    }
    let lines = events.iter().map(|event| {
        let at = std::time::UNIX_EPOCH + Duration::from_millis(event.unix_ms.min(LATEST_MS));
        let at = humantime::format_rfc3339_millis(at);
        format!("{at}  {:<11}  {}\n", event.kind, event.text)
    });
    output::print(&lines.collect::<String>()).map(drop)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;

    #[derive(Parser)]
    struct Drain {
        #[command(flatten)]
        args: DrainArgs,
    }

    #[test]
    fn a_drain_says_what_ends_it() {
        let until = |flag, what| Drain::parse_from(["drain", flag, what]).args.until();
        let donor = until("--donor", "ab12");
        for part in ["until `swiftcache undrain`", DRAIN_ENDS_WITH_PROCESS] {
            assert!(donor.contains(part), "{donor}");
        }
        // The twins: a device's drain outlives its donors, and a region is not lent again.
        let device = until("--device", "SIM-1");
        assert!(device.ends_with("until `swiftcache undrain`"), "{device}");
        assert_eq!(until("--region", "00ff"), "");
        let help = Drain::command().render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in [
            "device lasts until undrain, also over restarts of its donors",
            "one of a donor ends with that donor's process",
        ] {
            assert!(help.contains(part), "{help}");
        }
    }
}
