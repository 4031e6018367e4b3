//! Checks the sockets and the broker behind them.

use std::{
    fs, io,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use swiftcache_client::donor::{Forecast, PolicyConfig};
use swiftcache_proto::{
    domain::Device,
    v1::{GetNodeResponse, NamespaceStatus, RegionStatus},
};
use swiftcache_replay::report::bytes;

use super::{
    super::{
        admin::{self, Admin},
        donate,
    },
    report::{Finding, Report},
};

/// What the broker says.
pub(super) struct Answers {
    pub(super) node: GetNodeResponse,
    /// What is on offer.
    pub(super) regions: Vec<RegionStatus>,
    pub(super) namespaces: Vec<NamespaceStatus>,
}

/// Checks the sockets and the broker. Returns what the broker says, if it answers.
pub(super) fn examine(socket: &Path, report: &mut Report) -> Option<Answers> {
    if !directory(socket, report) || !connects(socket, report) {
        return None;
    }
    let asked = Admin::connect(socket).and_then(|admin| {
        Ok(Answers {
            node: admin.node()?,
            regions: admin.regions()?,
            namespaces: admin.namespaces()?,
        })
    });
    match asked {
        Ok(answers) => {
            report.add(speaks(&answers.node));
            report.add(devices(&answers.node));
            report.add(lending(&answers.node));
            Some(answers)
        }
        Err(error) => {
            report.add(Finding::fail(
                "broker",
                error.to_string(),
                "another program listens there, or the broker hangs: read the broker's log",
            ));
            None
        }
    }
}

fn speaks(node: &GetNodeResponse) -> Finding {
    const CHECK: &str = "broker";
    let ours = env!("CARGO_PKG_VERSION");
    let found = format!("version {}", node.version);
    if node.version == ours {
        Finding::ok(CHECK, found)
    } else {
        Finding::ok(
            CHECK,
            format!("{found}; this command is {ours}, and both speak swiftcache.v1"),
        )
    }
}

/// Checks the devices that the broker lends from.
fn devices(node: &GetNodeResponse) -> Finding {
    const CHECK: &str = "broker-devices";
    let all = node
        .devices
        .iter()
        .filter_map(|status| status.device.as_ref());
    let hosts = all.filter(|device| admin::is_host_memory(&device.uuid));
    let found = match hosts.count() {
        0 => format!("{}: {} devices", admin::source(node), node.devices.len()),
        hosts => format!(
            "{}: {} devices, and host memory of {hosts} NUMA nodes",
            admin::source(node),
            node.devices.len() - hosts
        ),
    };
    if node.devices.is_empty() {
        return Finding::fail(
            CHECK,
            found,
            "the broker's log says why its probe found none",
        );
    }
    if admin::simulated(node).is_some() {
        let advice = "this is good for a trial, but lends no GPU; on a node with GPUs, start the broker with --probe nvml";
        return Finding::warn(CHECK, found, advice);
    }
    let unknown = node.devices.iter().filter_map(|status| {
        let uuid = &status.device.as_ref()?.uuid;
        (!status.problem.is_empty()).then(|| format!("{uuid}: {}", status.problem))
    });
    let left_out = node.left_out.iter().map(admin::left_out);
    let missing: Vec<String> = left_out.chain(unknown).collect();
    if missing.is_empty() {
        return Finding::ok(CHECK, found);
    }
    Finding::warn(
        CHECK,
        format!("{found}; {}", missing.join("; ")),
        "the other GPUs are lent as usual. A lost GPU needs a reset or a reboot: nvidia-smi and the kernel's log (Xid) \
         say more. Restart the broker afterwards",
    )
}

/// Says who can lend: nobody should wait for memory that no donor will ever offer.
fn lending(node: &GetNodeResponse) -> Finding {
    const CHECK: &str = "lending";
    const ADVICE: &str = "a vLLM engine lends a part of its own pool with \"lend\" in its connector's configuration; an engine \
        with a smaller --gpu-memory-utilization leaves more to `swiftcache donate --elastic`; an idle GPU lends by it too";
    let mut nothing = Vec::new();
    let mut agents = Vec::new();
    let mut offered = 0;
    for status in &node.devices {
        offered += status.account.unwrap_or_default().offered_bytes;
        let Some(Ok(device)) = status.device.as_ref().map(Device::try_from) else {
            continue;
        };
        if status.hbm_used_unknown || device.hbm_bytes == 0 {
            continue;
        }
        let policy = PolicyConfig::new(device.hbm_bytes, 256 << 20);
        let Ok(forecast) = Forecast::new(policy, donate::observation(&device, status)) else {
            continue;
        };
        match forecast.is_nothing() {
            true => nothing.push(device.uuid.to_string()),
            false => agents.push(format!("{} {}", device.uuid, bytes(forecast.settled))),
        }
    }
    let found = format!("{} on offer now", bytes(offered));
    let found = match agents.is_empty() {
        true => found,
        false => format!(
            "{found}; `swiftcache donate --elastic` could come to lend: {}",
            agents.join(", ")
        ),
    };
    match (nothing.is_empty(), offered) {
        (true, _) => Finding::ok(CHECK, found),
        (false, 0) => Finding::warn(
            CHECK,
            format!(
                "{found}; beside what uses {} it lends nothing",
                nothing.join(", ")
            ),
            ADVICE,
        ),
        // Whoever lends otherwise needs no advice.
        (false, _) => Finding::ok(
            CHECK,
            format!(
                "{found}; beside what uses {} it lends nothing",
                nothing.join(", ")
            ),
        ),
    }
}

/// Checks the directory of the sockets. Returns whether there is one: otherwise the sockets need no checks.
fn directory(socket: &Path, report: &mut Report) -> bool {
    const CHECK: &str = "socket-dir";
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let shown = directory.display();
    match fs::metadata(directory) {
        Ok(found) if found.is_dir() => {
            let mode = found.permissions().mode() & 0o7777;
            let found = format!("{shown}: {}:{} {mode:04o}", found.uid(), found.gid());
            report.add(if mode & 0o002 == 0 {
                Finding::ok(CHECK, found)
            } else {
                Finding::warn(
                    CHECK,
                    format!("{found}, writable by everyone"),
                    "every user can put a socket there: chmod o-w",
                )
            });
            true
        }
        Ok(_) => {
            report.add(Finding::fail(
                CHECK,
                format!("{shown} is not a directory"),
                "mount the directory of the sockets, never a socket",
            ));
            false
        }
        Err(error) => {
            report.add(Finding::fail(
                CHECK,
                format!("{shown}: {error}"),
                "start swiftcache-broker; in a container, mount the directory of the sockets; if the socket is \
                 elsewhere, name it with --socket",
            ));
            false
        }
    }
}

fn connects(socket: &Path, report: &mut Report) -> bool {
    const CHECK: &str = "socket";
    let shown = socket.display();
    let stream = match UnixStream::connect(socket) {
        Ok(stream) => stream,
        Err(error) => {
            let advice = match error.kind() {
                io::ErrorKind::PermissionDenied => denied(socket),
                io::ErrorKind::NotFound => {
                    "start swiftcache-broker; if it runs, it listens elsewhere, or another directory than its own is \
                     mounted here"
                        .to_owned()
                }
                io::ErrorKind::ConnectionRefused => {
                    "the broker that made this socket is gone: start it; if the container mounts the socket itself, \
                     mount its directory instead"
                        .to_owned()
                }
                _ => "ls -l shows what is there".to_owned(),
            };
            report.add(Finding::fail(CHECK, format!("{shown}: {error}"), advice));
            return false;
        }
    };
    report.add(Finding::ok(CHECK, format!("{shown} accepts connections")));
    let pid = getsockopt(&stream, PeerCredentials).map(|peer| peer.pid());
    report.add(namespace(pid.unwrap_or_default()));
    report.add(descriptors(&fd_socket(socket)));
    true
}

fn denied(socket: &Path) -> String {
    let group = fs::metadata(socket).map(|found| found.gid());
    let group = group.map_or("the socket's group".to_owned(), |gid| {
        format!("group {gid}")
    });
    format!("join {group}: with usermod --append --groups, or supplementalGroups of the pod")
}

/// `broker` is the broker's pid as this process sees it, or 0 when it sees none.
fn namespace(broker: i32) -> Finding {
    const CHECK: &str = "pid-namespace";
    if broker > 0 {
        return Finding::ok(CHECK, format!("the broker is process {broker}"));
    }
    Finding::warn(
        CHECK,
        "the broker is in another PID namespace",
        "this works on Linux 6.9 or later, with one limit: if this process dies while the broker is down, nobody notices \
         until the node reboots (deathWatch.hostPID)",
    )
}

/// The default path of the socket that passes descriptors: `broker-fd.sock` beside `broker.sock`.
fn fd_socket(socket: &Path) -> PathBuf {
    let stem = socket.file_stem().unwrap_or_default();
    socket.with_file_name(format!("{}-fd.sock", stem.to_string_lossy()))
}

fn descriptors(socket: &Path) -> Finding {
    const CHECK: &str = "fd-socket";
    let shown = socket.display();
    match fs::metadata(socket) {
        Ok(found) if found.file_type().is_socket() => Finding::ok(CHECK, shown.to_string()),
        Ok(_) => Finding::fail(
            CHECK,
            format!("{shown} is not a socket"),
            "restart the broker",
        ),
        Err(error) => Finding::warn(
            CHECK,
            format!("{shown}: {error}"),
            "this is fine if the broker's fd_socket is set to another path",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::{super::report::Verdict, *};

    fn verdicts(socket: &Path) -> Vec<(String, Verdict)> {
        let mut report = Report::default();
        assert!(examine(socket, &mut report).is_none());
        let json = serde_json::to_value(&report).unwrap();
        let findings = json["findings"].as_array().unwrap();
        let verdict = |finding: &serde_json::Value| match finding["verdict"].as_str() {
            Some("ok") => Verdict::Ok,
            Some("warn") => Verdict::Warn,
            _ => Verdict::Fail,
        };
        let named = findings.iter().map(|finding| {
            (
                finding["check"].as_str().unwrap().to_owned(),
                verdict(finding),
            )
        });
        named.collect()
    }

    #[test]
    fn an_absent_broker_is_told_by_what_is_there_instead() {
        let directory = tempfile::tempdir().unwrap();
        let failed = |socket: &Path| {
            let verdicts = verdicts(socket);
            let failed = verdicts.iter().find(|(_, v)| *v == Verdict::Fail);
            failed.map(|(check, _)| check.clone()).unwrap()
        };
        assert_eq!(
            failed(&directory.path().join("none/broker.sock")),
            "socket-dir"
        );
        let socket = directory.path().join("broker.sock");
        assert_eq!(failed(&socket), "socket");
        let listener = UnixListener::bind(&socket).unwrap();
        drop(listener);
        assert_eq!(failed(&socket), "socket");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(
            verdicts(&socket)[0],
            ("socket-dir".to_owned(), Verdict::Warn)
        );
    }

    #[test]
    fn a_broker_without_devices_fails() {
        let mut node = GetNodeResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            probe: "nvml".to_owned(),
            ..GetNodeResponse::default()
        };
        assert_eq!(devices(&node).verdict, Verdict::Fail);
        node.devices
            .push(swiftcache_proto::v1::DeviceStatus::default());
        assert_eq!(devices(&node).verdict, Verdict::Ok);
        assert_eq!(speaks(&node).verdict, Verdict::Ok);
        node.version = "0.0.1".to_owned();
        assert!(speaks(&node).found.contains("swiftcache.v1"));
    }

    #[test]
    fn devices_that_are_not_real_or_not_all_are_warned_of() {
        let mut node = GetNodeResponse {
            probe: "nvml".to_owned(),
            devices: vec![swiftcache_proto::v1::DeviceStatus::default()],
            ..GetNodeResponse::default()
        };
        node.left_out.push(swiftcache_proto::v1::LeftOutDevice {
            ordinal: 4,
            uuid: "GPU-4".to_owned(),
            reason: "MIG is on".to_owned(),
        });
        let partly = devices(&node);
        assert_eq!(partly.verdict, Verdict::Warn);
        assert!(
            partly
                .found
                .contains("GPU 4 (GPU-4) is left out: MIG is on")
        );
        node.probe = "simulated (hgx-8)".to_owned();
        let simulated = devices(&node);
        assert_eq!(simulated.verdict, Verdict::Warn);
        assert!(
            simulated.found.starts_with("SIMULATED (hgx-8)"),
            "{simulated:?}"
        );
    }

    /// Beside an engine with 92 % an agent lends a little once it is settled, beside 99 % nothing, and an idle GPU most of it.
    #[test]
    fn who_can_lend_is_told_before_somebody_waits_for_it() {
        const HBM: u64 = 80 << 30;
        let device = |used: f64, offered: u64| swiftcache_proto::v1::DeviceStatus {
            device: Some(swiftcache_proto::v1::Device {
                uuid: "SIM-1".to_owned(),
                hbm_bytes: HBM,
                ..swiftcache_proto::v1::Device::default()
            }),
            hbm_used_bytes: (HBM as f64 * used) as u64 + offered,
            account: Some(swiftcache_proto::v1::Account {
                offered_bytes: offered,
                ..swiftcache_proto::v1::Account::default()
            }),
            ..swiftcache_proto::v1::DeviceStatus::default()
        };
        let told = |devices: &[swiftcache_proto::v1::DeviceStatus]| {
            lending(&GetNodeResponse {
                devices: devices.to_vec(),
                ..GetNodeResponse::default()
            })
        };
        let full = told(&[device(0.99, 0)]);
        assert_eq!(full.verdict, Verdict::Warn);
        let advice = serde_json::to_string(&full).unwrap();
        assert!(
            advice.contains("lend") && advice.contains("--gpu-memory-utilization"),
            "{advice}"
        );
        for lends in [device(0.92, 0), device(0.0, 0), device(0.5, 1 << 30)] {
            let told = told(&[lends]);
            assert!(
                told.verdict == Verdict::Ok && told.found.contains("SIM-1"),
                "{told:?}"
            );
        }
        // Engines that lend their own pools need no agent.
        let pool = told(&[device(0.9, 8 << 30)]);
        assert_eq!(pool.verdict, Verdict::Ok, "{pool:?}");
    }

    #[test]
    fn pid_namespaces_are_told_apart() {
        assert_eq!(namespace(17).verdict, Verdict::Ok);
        assert_eq!(namespace(0).verdict, Verdict::Warn);
    }
}
