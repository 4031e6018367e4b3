//! `swiftcache status`.

mod document;

use std::{fmt::Write as _, time::Duration};

use clap::Args;
use document::{Account, DonorRow, LeaseRow, Status, Traffic};

use super::{
    CliError, admin::Admin, args::SocketArg, operate::DRAIN_ENDS_WITH_PROCESS, output, watch,
};
use swiftcache_replay::report::{bytes, table};

/// Show the node: devices, donors, leases, namespaces, counters
#[derive(Args, Debug)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    socket: SocketArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Show it again every so often, e.g. --watch=500ms
    #[arg(
        long,
        value_name = "EVERY",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1s",
        value_parser = watch::every
    )]
    watch: Option<Duration>,
}

pub(super) fn run(args: &StatusArgs) -> Result<(), CliError> {
    let Some(every) = args.watch else {
        let status = Status::new(Admin::connect(&args.socket.socket)?.snapshot()?);
        return if args.json {
            output::print_json(&status)
        } else {
            output::print(&status.text()).map(|_| ())
        };
    };
    let mut admin = None;
    watch::repeat(every, || {
        let connected = match admin.take() {
            Some(connected) => connected,
            None => Admin::connect(&args.socket.socket)?,
        };
        let status = Status::new(connected.snapshot()?);
        admin = Some(connected);
        if args.json {
            // One document a line, for scripts that follow.
            serde_json::to_string(&status)
                .map(|line| line + "\n")
                .map_err(|error| CliError::Failed(format!("cannot write JSON: {error}")))
        } else {
            Ok(status.text())
        }
    })
}

impl Status {
    fn text(&self) -> String {
        let mut text = String::new();
        // Tables are copied into reports. So each one says that its figures are simulated.
        let heading = |what: &str| match self.simulated {
            true => format!("{what} (SIMULATED)"),
            false => what.to_owned(),
        };
        let [
            device_heading,
            donor_heading,
            borrower_heading,
            disk_heading,
            pool_heading,
            namespace_heading,
        ] = [
            "device",
            "donor",
            "borrower",
            "disk",
            "stitched pool of",
            "namespace",
        ]
        .map(heading);
        let uptime = Duration::from_secs(self.uptime_ms / 1000);
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "swiftcache-broker {}, up {}, devices: {}, {} sessions, {} blocks indexed\n",
            self.version,
            humantime::format_duration(uptime),
            self.source,
            self.sessions,
            self.indexed_blocks
        );
        let devices = self.devices.iter().map(|device| {
            let name = format!("{} ({})", device.uuid, device.name);
            let drained = if device.drained { ", drained" } else { "" };
            let held = device.hold.as_ref().map_or_else(String::new, |hold| {
                format!(", held for {} s", hold.left_ms.div_ceil(1000))
            });
            let known = |figure: Option<u64>| figure.map_or_else(|| "unknown".to_owned(), bytes);
            let used = format!("{} of {}", known(device.hbm_used), known(device.hbm));
            row([name + drained + &held, used], device.account)
        });
        let all = row(["all".to_owned(), String::new()], self.total);
        let header = [
            &device_heading,
            "HBM used",
            "offered",
            "free",
            "leased",
            "on its way back",
            "zombie",
        ];
        let _ = writeln!(text, "{}\n", table(header, devices.chain([all])));
        let unknown = self.devices.iter().filter(|row| !row.problem.is_empty());
        let unknown = unknown.map(|row| format!("{}: {}", row.uuid, row.problem));
        let left_out = self.left_out.iter().map(|row| row.line.clone());
        // A drain lasts until somebody ends it: nobody should forget it.
        let drained = self.devices.iter().filter(|row| row.drained);
        let drained = drained.map(|row| {
            let uuid = &row.uuid;
            format!(
                "{uuid} is drained: it lends nothing until `swiftcache undrain --device {uuid}`"
            )
        });
        let donors = self.donors.iter().flat_map(drained_of);
        let missing = left_out.chain(unknown).chain(drained).chain(donors);
        let missing: Vec<String> = missing.collect();
        if !missing.is_empty() {
            let _ = writeln!(text, "{}\n", missing.join("\n"));
        }
        let donors = self.donors.iter().map(|donor| {
            [
                format!("{} [{}]", donor.name, donor.label),
                donor.pid.to_string(),
                match donor.device.as_str() {
                    "" => "none".to_owned(),
                    device => device.to_owned(),
                },
                donor.regions.to_string(),
                bytes(donor.offered),
                bytes(donor.leased),
            ]
        });
        let header = [
            &donor_heading,
            "pid",
            "device",
            "regions",
            "offered",
            "leased",
        ];
        let _ = writeln!(text, "{}\n", table(header, donors));
        let mistaken = self
            .donors
            .iter()
            .filter(|donor| donor.unmappable_regions > 0);
        let mistaken: Vec<String> = mistaken.map(unmappable).collect();
        if !mistaken.is_empty() {
            let _ = writeln!(text, "{}\n", mistaken.join("\n"));
        }
        let leases = self.leases.iter().map(|lease| {
            [
                lease.borrower.clone(),
                lease.pid.to_string(),
                lease.device.clone(),
                lease.link.to_owned(),
                lease.class.to_owned(),
                lease.slabs.to_string(),
                bytes(lease.leased),
                revoked(lease),
                lease.blocks.to_string(),
            ]
        });
        let header = [
            &borrower_heading,
            "pid",
            "leases on",
            "over",
            "for",
            "slabs",
            "bytes",
            "revoked",
            "blocks",
        ];
        let _ = writeln!(text, "{}\n", table(header, leases));
        let disks = self.disks.iter().map(|disk| {
            [
                format!("{} [{}]", disk.disk, disk.session),
                disk.path.clone(),
                disk.tenant.clone(),
                format!("{} of {}", bytes(disk.used), bytes(disk.bytes)),
                disk.blocks.to_string(),
                format!("{} ({} waiting)", disk.written_blocks, disk.to_store_blocks),
                format!("{} ({} waiting)", disk.read_blocks, disk.wanted_blocks),
                format!("{}, {}", disk.corrupt_blocks, disk.failed_blocks),
            ]
        });
        let header = [
            &disk_heading,
            "in",
            "tenant",
            "used",
            "blocks",
            "written",
            "read",
            "corrupt, failed",
        ];
        if !self.disks.is_empty() {
            let _ = writeln!(text, "{}\n", table(header, disks));
            for disk in self.disks.iter().filter(|disk| !disk.problem.is_empty()) {
                let _ = writeln!(text, "{}: {}\n", disk.disk, disk.problem);
            }
        }
        let pools = self.pools.iter().map(|pool| {
            [
                pool.engine.clone(),
                pool.pid.to_string(),
                bytes(pool.leased),
                bytes(pool.spare),
                bytes(pool.host),
            ]
        });
        let header = [
            &pool_heading,
            "pid",
            "in leased HBM",
            "in spare HBM of its own",
            "in host memory",
        ];
        if !self.pools.is_empty() {
            let _ = writeln!(text, "{}\n", table(header, pools));
        }
        let namespaces = self.namespaces.iter().map(|space| {
            [
                space.namespace.clone(),
                space.tenant.clone(),
                space.blocks.to_string(),
                bytes(space.leased),
            ]
        });
        let header = [&namespace_heading, "tenant", "blocks", "leased"];
        let _ = writeln!(text, "{}\n", table(header, namespaces));
        let counters = &self.counters;
        let _ = writeln!(
            text,
            "leases granted {}, refused {}; revocations {}, acknowledged {}, zombies {}; blocks published {}",
            counters.leases_granted,
            counters.leases_refused,
            counters.revocations,
            counters.acknowledgements,
            counters.zombies,
            counters.published_blocks
        );
        for line in self.traffic.lines() {
            let _ = writeln!(text, "{line}");
        }
        let (failed, down) = (self.traffic.failed_operations, self.traffic.routes_down);
        if failed > 0 || down > 0 {
            let _ = writeln!(
                text,
                "engines report {failed} failed loads, stores and moves; {down} routes are down: the engines' logs name \
                 the devices"
            );
        }
        text
    }
}

/// What borrowers cannot map. Their own logs say why: they know the driver's word.
fn unmappable(donor: &DonorRow) -> String {
    let DonorRow {
        name,
        label,
        device,
        regions,
        unmappable_regions,
        ..
    } = donor;
    format!(
        "{name} [{label}]: borrowers cannot map {unmappable_regions} of its {regions} regions on {device}; their logs say why, \
         and they use others"
    )
}

/// A drain lasts until somebody ends it, or the donor's process: nobody should forget it.
fn drained_of(donor: &DonorRow) -> Vec<String> {
    let DonorRow {
        name,
        label,
        drained,
        drained_regions,
        ..
    } = donor;
    let mut lines = Vec::new();
    if *drained {
        lines.push(format!(
            "{name} [{label}] is drained: it lends nothing until `swiftcache undrain --donor {label}`; {DRAIN_ENDS_WITH_PROCESS}"
        ));
    }
    if !drained_regions.is_empty() {
        lines.push(format!(
            "{name} [{label}]: {} of its regions are drained: they lend nothing until the donor takes them back",
            drained_regions.len()
        ));
    }
    lines
}

/// How many leases are revoked, and the processes that they wait for: those are what an operator has to look at.
fn revoked(lease: &LeaseRow) -> String {
    let pids: Vec<String> = lease.waiting_for_pids.iter().map(u32::to_string).collect();
    match (lease.zombies, pids.is_empty()) {
        (0, true) => lease.revoked.to_string(),
        (0, false) => format!("{}: waits for {}", lease.revoked, pids.join(" ")),
        (zombies, _) => format!(
            "{}, zombie {zombies}: waits for {}",
            lease.revoked,
            pids.join(" ")
        ),
    }
}

impl Traffic {
    /// What engines found of what they asked for, and what they moved. The broker's own lookups say neither: an engine finds
    /// its own blocks without it.
    fn lines(&self) -> Vec<String> {
        let found = self.own_blocks + self.replica_blocks + self.host_blocks;
        let mut lines = Vec::new();
        if self.lookup_blocks > 0 {
            lines.push(format!(
                "engines found {found} of {} blocks ({:.0} %): {} in own leases, {} in replicas', {} in host memory",
                self.lookup_blocks,
                found as f64 * 100.0 / self.lookup_blocks as f64,
                self.own_blocks,
                self.replica_blocks,
                self.host_blocks
            ));
        }
        let links = self.links.iter().map(|row| {
            let (loaded, stored) = (bytes(row.loaded), bytes(row.stored));
            format!("{} {loaded} loaded, {stored} stored", row.link)
        });
        let links: Vec<String> = links.collect();
        if !links.is_empty() {
            lines.push(format!("engines moved: {}", links.join("; ")));
        }
        lines
    }
}

/// Offered, free, leased, on its way back, zombie.
fn cells(account: &Account) -> [String; 5] {
    [
        account.offered,
        account.free,
        account.leased,
        account.draining + account.scrubbing,
        account.zombie,
    ]
    .map(bytes)
}

fn row([name, used]: [String; 2], account: Account) -> [String; 7] {
    let [offered, free, leased, back, zombie] = cells(&account);
    [name, used, offered, free, leased, back, zombie]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::Snapshot;
    use swiftcache_proto::v1;

    fn snapshot() -> Snapshot {
        let account = v1::Account {
            offered_bytes: 4_000_000,
            free_bytes: 1_000_000,
            leased_bytes: 3_000_000,
            ..v1::Account::default()
        };
        let region = |device: &str| v1::RegionStatus {
            device_uuid: device.to_owned(),
            donor_label: "ab12".to_owned(),
            donor_name: "donor-1".to_owned(),
            account: Some(account),
            ..v1::RegionStatus::default()
        };
        let lease = |state: v1::LeaseState| v1::LeaseStatus {
            state: state.into(),
            bytes: 1_000_000,
            device_uuid: "SIM-1".to_owned(),
            link: v1::LinkKind::Nvlink.into(),
            borrower_label: "cd34".to_owned(),
            borrower_name: "replay".to_owned(),
            published_blocks: 5,
            waiting_for_pids: match state {
                v1::LeaseState::Draining => vec![4712],
                v1::LeaseState::Zombie => vec![4712, 4711],
                _ => Vec::new(),
            },
            ..v1::LeaseStatus::default()
        };
        Snapshot {
            node: v1::GetNodeResponse {
                version: "0.1.0".to_owned(),
                boot_id: 7,
                probe: "simulated (two)".to_owned(),
                devices: vec![v1::DeviceStatus {
                    device: Some(v1::Device {
                        uuid: "SIM-1".to_owned(),
                        ..v1::Device::default()
                    }),
                    account: Some(account),
                    hold: Some(v1::HoldStatus {
                        free_bytes: 7,
                        left_ms: 1_500,
                    }),
                    ..v1::DeviceStatus::default()
                }],
                traffic: Some(v1::Traffic {
                    links: vec![v1::LinkTraffic {
                        link: v1::LinkKind::Pcie.into(),
                        loaded_bytes: 2_000_000,
                        stored_bytes: 1_000_000,
                    }],
                    lookup_blocks: 30,
                    own_blocks: 20,
                    replica_blocks: 1,
                    host_blocks: 3,
                    failed_operations: 4,
                }),
                routes_down: 1,
                ..v1::GetNodeResponse::default()
            },
            sessions: vec![v1::SessionStatus {
                name: "worker".to_owned(),
                label: "ab12".to_owned(),
                pid: 4711,
                homes: Some(v1::Homes {
                    leased_bytes: 3_000_000,
                    spare_bytes: 0,
                    host_bytes: 7_500_000,
                }),
                ..v1::SessionStatus::default()
            }],
            regions: vec![
                v1::RegionStatus {
                    unmappable_sessions: 3,
                    ..region("SIM-1")
                },
                region("SIM-1"),
                region("SIM-2"),
            ],
            leases: vec![
                lease(v1::LeaseState::Active),
                lease(v1::LeaseState::Draining),
                lease(v1::LeaseState::Zombie),
                v1::LeaseStatus {
                    class: v1::LeaseClass::WorkingSet.into(),
                    ..lease(v1::LeaseState::Active)
                },
            ],
            namespaces: Vec::new(),
        }
    }

    #[test]
    fn regions_are_summed_by_donor_and_leases_by_borrower() {
        let status = Status::new(snapshot());
        assert_eq!(status.donors.len(), 2);
        let donor = &status.donors[0];
        assert_eq!(
            (donor.regions, donor.offered, donor.pid),
            (2, 8_000_000, 4711)
        );
        // Those of one class.
        assert_eq!(status.leases.len(), 2);
        let of = |class: &str| status.leases.iter().find(|lease| lease.class == class);
        assert_eq!(of("working set").unwrap().slabs, 1);
        let lease = of("cache").unwrap();
        assert_eq!((lease.slabs, lease.revoked, lease.zombies), (3, 2, 1));
        let waiting: Vec<u32> = lease.waiting_for_pids.iter().copied().collect();
        assert_eq!(
            waiting,
            [4711, 4712],
            "the alert sends people here for them"
        );
        assert_eq!(lease.blocks, 15);
    }

    #[test]
    fn people_see_the_accounts() {
        let text = Status::new(snapshot()).text();
        for part in [
            "devices: SIMULATED (two)",
            "device (SIMULATED)",
            "borrower (SIMULATED)",
            ", held for 2 s",
            "donor-1 [ab12]: borrowers cannot map 1 of its 2 regions on SIM-1",
            "replay [cd34]",
            "NVLink",
            "4.0 MB",
            "2, zombie 1: waits for 4711 4712",
            "stitched pool of (SIMULATED)",
            "worker [ab12]",
            "7.5 MB",
            "engines found 24 of 30 blocks (80 %): 20 in own leases, 1 in replicas', 3 in host memory",
            "engines moved: PCIe 2.0 MB loaded, 1.0 MB stored",
            "engines report 4 failed loads, stores and moves; 1 routes are down",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_disk_is_shown_with_its_place_its_figures_and_what_is_wrong() {
        assert!(!Status::new(snapshot()).text().contains("DISK"));
        let mut snapshot = snapshot();
        snapshot.node.disks = vec![v1::DiskStatus {
            device_uuid: "DISK-0".to_owned(),
            tenant: "1000".to_owned(),
            session: "ef56".to_owned(),
            state: Some(v1::DiskState {
                bytes: 5_000_000,
                used_bytes: 2_000_000,
                written_blocks: 41,
                read_blocks: 17,
                corrupt_blocks: 1,
                failed_blocks: 3,
                problem: "cannot write to it: it is full".to_owned(),
                path: "/var/lib/swiftcache".to_owned(),
                ..v1::DiskState::default()
            }),
            blocks: 36,
            to_store_blocks: 5,
            ..v1::DiskStatus::default()
        }];
        let status = Status::new(snapshot);
        let text = status.text();
        for part in [
            "disk (SIMULATED)",
            "DISK-0 [ef56]",
            "/var/lib/swiftcache",
            "2.0 MB of 5.0 MB",
            "41 (5 waiting)",
            "17 (0 waiting)",
            "1, 3",
            "DISK-0: cannot write to it: it is full",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        let disk = &json["disks"][0];
        assert_eq!(disk["path"], "/var/lib/swiftcache");
        assert_eq!(disk["problem"], "cannot write to it: it is full");
    }

    /// The broker answers only what engines do not find themselves: 0 of 8 there is no sign of trouble, and is not shown as
    /// if it were.
    #[test]
    fn what_the_broker_did_not_find_is_not_shown_as_missed() {
        let mut snapshot = snapshot();
        snapshot.node.counters = Some(v1::Counters {
            lookups: 2,
            lookup_blocks: 8,
            ..v1::Counters::default()
        });
        snapshot.namespaces = vec![v1::NamespaceStatus {
            namespace: "a-model".to_owned(),
            lookup_blocks: 8,
            ..v1::NamespaceStatus::default()
        }];
        let text = Status::new(snapshot).text();
        assert!(
            text.contains("a-model") && !text.contains("0 of 8"),
            "{text}"
        );
        assert!(text.contains("24 of 30"), "{text}");
    }

    #[test]
    fn what_is_drained_is_not_free_and_says_until_when() {
        let mut snapshot = snapshot();
        snapshot.sessions[0].drained = true;
        let whole = snapshot.regions[2].account.as_mut().unwrap();
        whole.drained_bytes = whole.free_bytes;
        snapshot.regions[2].drained = true;
        snapshot.regions[2].region_id = "00ff".to_owned();
        let total = v1::Account {
            free_bytes: 5_000_000,
            drained_bytes: 4_000_000,
            ..v1::Account::default()
        };
        snapshot.node.total = Some(total);
        let status = Status::new(snapshot);
        let text = status.text();
        for part in [
            "donor-1 [ab12] is drained: it lends nothing until `swiftcache undrain --donor ab12`; \
             the end of its process ends the drain too",
            "donor-1 [ab12]: 1 of its regions are drained: they lend nothing until the donor takes them back",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        let json = serde_json::to_value(&status).unwrap();
        let total = (&json["total"]["free"], &json["total"]["drained"]);
        assert_eq!(total, (&1_000_000.into(), &4_000_000.into()));
        assert_eq!(json["donors"][1]["drained_regions"][0], "00ff");
        assert_eq!(json["donors"][0]["drained"], true);
    }

    /// An elastic donor that is drained gives everything back. The twin: a donor with nothing on offer that nobody drains is
    /// not shown.
    #[test]
    fn a_drained_donor_with_nothing_on_offer_is_shown() {
        let told = |drained| {
            let mut snapshot = snapshot();
            snapshot.sessions.push(v1::SessionStatus {
                name: "elastic".to_owned(),
                label: "ef56".to_owned(),
                pid: 4713,
                drained,
                ..v1::SessionStatus::default()
            });
            let status = Status::new(snapshot);
            (status.text(), serde_json::to_value(&status).unwrap())
        };
        let drained =
            "elastic [ef56] is drained: it lends nothing until `swiftcache undrain --donor ef56`";
        let (text, json) = told(true);
        assert!(text.contains(drained), "{text}");
        let row = text.lines().find(|line| line.contains("4713"));
        assert!(row.is_some_and(|row| row.contains("none")), "{text}");
        assert_eq!(json["donors"].as_array().unwrap().len(), 3, "{json}");
        let donor = &json["donors"][2];
        let shown = (&donor["label"], &donor["pid"], &donor["device"]);
        assert_eq!(shown, (&"ef56".into(), &4713.into(), &"".into()));
        assert_eq!(
            (&donor["drained"], &donor["regions"]),
            (&true.into(), &0.into())
        );
        let (text, json) = told(false);
        assert!(!text.contains("ef56"), "{text}");
        assert_eq!(json["donors"].as_array().unwrap().len(), 2, "{json}");
    }

    #[test]
    fn what_is_unknown_is_not_0_and_what_is_left_out_is_named() {
        let mut snapshot = snapshot();
        snapshot.node.probe = "nvml".to_owned();
        let device = &mut snapshot.node.devices[0];
        device.hbm_used_unknown = true;
        device.drained = true;
        device.problem = "HBM use cannot be read: it is lost".to_owned();
        snapshot.node.left_out.push(v1::LeftOutDevice {
            ordinal: 2,
            reason: "it cannot be opened".to_owned(),
            ..v1::LeftOutDevice::default()
        });
        let status = Status::new(snapshot);
        let text = status.text();
        for part in [
            "unknown of unknown",
            "SIM-1: HBM use cannot be read: it is lost",
            "SIM-1 is drained: it lends nothing until `swiftcache undrain --device SIM-1`",
            "GPU 2 is left out: it cannot be opened",
            "devices: nvml",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(!text.contains("SIMULATED"), "{text}");
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["devices"][0]["hbm_used"], serde_json::Value::Null);
        assert_eq!(json["left_out"][0]["ordinal"], 2);
        assert_eq!(json["simulated"], false);
    }
}
