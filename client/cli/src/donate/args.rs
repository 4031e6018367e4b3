//! The flags of `swiftcache donate`, and what is refused of them.

use std::{path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, ValueEnum};
use swiftcache_client::donor::{PolicyConfig, Settled};
use swiftcache_proto::{
    convert::{MAX_DRAIN_MS, SLAB_BYTES},
    domain::{DeviceUuid, HandleKind, Medium},
    size::size,
};
use swiftcache_replay::report::bytes;

use crate::{CliError, args::SocketArg, chosen::Chosen};

/// Lend a device's idle HBM: a fixed amount, or as much as stays idle; or a fixed amount of host memory, or of a disk
///
/// Runs until SIGTERM or SIGINT, then asks for everything back and waits until nobody can touch it any more.
#[derive(Args, Debug)]
#[command(group = ArgGroup::new("amount").required(true).args(["bytes", "elastic"]))]
pub(crate) struct DonateArgs {
    #[command(flatten)]
    pub(super) socket: SocketArg,
    /// The device, as `swiftcache status` names it, or all of the node's; HOST-0, HOST-1, ...: host memory of that NUMA
    /// node, which engines lease where HBM falls short; DISK-0, DISK-1, ...: a file, to which blocks in host memory are
    /// written, and from which they come back when a lookup wants them
    #[arg(long, value_name = "UUID|all|HOST-N|DISK-N")]
    pub(super) device: Chosen,
    /// Lend this much, whole slabs; what is missing is offered as soon as it can be. Of a disk: the most that its file takes
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) bytes: Option<u64>,
    /// Of a disk: the directory of its file. It stays when the command ends, and is found again
    #[arg(long, value_name = "DIR")]
    pub(super) path: Option<PathBuf>,
    /// Of a disk: the most host memory to lease for blocks of one model (of each rank) that come back
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size)]
    pub(super) memory: u64,
    /// Of a disk: write and read through the kernel's cache, which takes memory from engines and gives it back slowly
    #[arg(long, requires = "path")]
    pub(super) buffered: bool,
    /// Follow idle HBM: up slowly, down at once
    #[arg(long)]
    pub(super) elastic: bool,
    /// Say what --elastic would come to lend, by what the broker sees of each device now, and why; lend nothing
    #[arg(long, conflicts_with = "bytes")]
    pub(super) explain: bool,
    /// With --explain: print JSON
    #[arg(long, requires = "explain")]
    pub(super) json: bool,
    /// For people: shown in status and logs
    #[arg(long, value_name = "NAME", default_value = "donate")]
    pub(super) name: String,
    /// Sub-division of this user's tenant
    #[arg(long, value_name = "LABEL", default_value = "")]
    pub(super) tenant: String,
    /// What is lent and given back at a time, 64KiB to 16GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size)]
    pub(super) slab: u64,
    /// How long borrowers may take to move blocks away [default: the broker's]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(super) drain: Option<Duration>,
    /// How borrowers open what is lent; cuda-ipc opens only in processes that enumerate this GPU and share the PID
    /// namespace [default: posix-fd, or cuda-ipc where the driver exports no descriptors]
    #[arg(long, value_name = "KIND", value_enum)]
    pub(super) handle: Option<Opened>,
    /// How long to wait for everything to come back in the end [default: what borrowers may take, and 5s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub(super) leave_within: Option<Duration>,
    #[command(flatten)]
    pub(super) elastic_args: ElasticArgs,
    /// On a simulated device: where its use is written, the topology's usage_dir
    #[arg(long, value_name = "DIR")]
    pub(super) usage_dir: Option<PathBuf>,
}

/// How borrowers open an allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Opened {
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
pub(super) struct ElasticArgs {
    /// Never lent [default: a twentieth of the device; beside settled neighbours at most an eighth of what is idle]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    pub(super) reserve: Option<u64>,
    /// Kept free for neighbours' growth, even if none was seen; restored when they are quiet [default: as the
    /// reserve]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    pub(super) headroom: Option<u64>,
    /// The most to lend [default: all that is idle]
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "bytes")]
    pub(super) most: Option<u64>,
    /// How often to look [default: 250ms]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    pub(super) period: Option<Duration>,
    /// HBM must have been idle for this long before it is lent [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    pub(super) settle: Option<Duration>,
    /// Headroom is what neighbours were seen to grow within this time [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    pub(super) horizon: Option<Duration>,
    /// Half of a seen growth is forgotten in this time [default: 2m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    pub(super) half_life: Option<Duration>,
    /// Neighbours are settled when they have held what they have for this long: an engine that takes its memory when it
    /// starts. What --reserve and --headroom name is kept beside settled neighbours too [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, conflicts_with = "bytes")]
    pub(super) settled_after: Option<Duration>,
}

impl ElasticArgs {
    pub(super) fn policy(&self, total: u64, slab: u64) -> PolicyConfig {
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

impl DonateArgs {
    /// Refuses what cannot work on any device.
    pub(super) fn check(&self) -> Result<(), CliError> {
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
    pub(super) fn check_for(&self, device: &DeviceUuid, total: u64) -> Result<(), CliError> {
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

#[cfg(test)]
mod tests {
    use clap::Parser;

    use swiftcache_proto::domain::Device;

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
