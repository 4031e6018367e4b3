//! Compares the screen, as text, with the files in `src/snapshots`. `SWIFTCACHE_WRITE_SNAPSHOTS=1 cargo test -p
//! swiftcache-cli top` writes the files anew. Read the differences before you commit them.

use std::path::PathBuf;

use ratatui::{Terminal, backend::TestBackend};

use super::*;

const GB: u64 = 1_000_000_000;

fn drawn(screen: &Screen, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen.render(frame)).unwrap();
    let buffer = terminal.backend().buffer();
    let mut text = String::new();
    for y in 0..height {
        let line: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn looks_like(name: &str, text: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("src/snapshots")
        .join(name);
    if std::env::var_os("SWIFTCACHE_WRITE_SNAPSHOTS").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, expected, "{name} was\n{expected}\nand is now\n{text}");
}

fn device(
    ordinal: u32,
    others: u64,
    [leased, draining, zombie, free]: [u64; 4],
) -> v1::DeviceStatus {
    let offered = leased + draining + zombie + free;
    v1::DeviceStatus {
        device: Some(v1::Device {
            uuid: format!("GPU-{ordinal}f3c1a2b-5d6e"),
            name: "simulated".to_owned(),
            hbm_bytes: 141 * GB,
            ordinal,
        }),
        account: Some(v1::Account {
            offered_bytes: offered * GB,
            leased_bytes: leased * GB,
            draining_bytes: draining * GB,
            zombie_bytes: zombie * GB,
            free_bytes: free * GB,
            ..v1::Account::default()
        }),
        hbm_used_bytes: (others + offered) * GB,
        drained: ordinal == 6,
        ..v1::DeviceStatus::default()
    }
}

fn lease(borrower: u32, on: u32, state: v1::LeaseState) -> v1::LeaseStatus {
    let zombie = state == v1::LeaseState::Zombie;
    v1::LeaseStatus {
        bytes: 2 * GB,
        state: state.into(),
        device_uuid: format!("GPU-{on}f3c1a2b-5d6e"),
        link: v1::LinkKind::Nvlink.into(),
        borrower_label: format!("c{borrower:03}"),
        borrower_name: format!("vllm-{borrower}"),
        namespace: "llama-3-70b/fp8/tp1".to_owned(),
        published_blocks: 1_000,
        waiting_for_pids: if zombie { vec![4_711] } else { Vec::new() },
        ..v1::LeaseStatus::default()
    }
}

fn link(link: v1::LinkKind, bytes: u64) -> v1::LinkTraffic {
    v1::LinkTraffic {
        link: link.into(),
        loaded_bytes: bytes,
        stored_bytes: bytes / 4,
    }
}

fn snapshot(uptime_ms: u64) -> Snapshot {
    let devices = (0..8).map(|ordinal| match ordinal {
        3 => device(3, 40, [30, 10, 2, 20]),
        6 => device(6, 100, [0, 0, 0, 30]),
        7 => device(7, 120, [0, 0, 0, 0]),
        _ => device(ordinal, 60, [10 + u64::from(ordinal) * 5, 0, 0, 20]),
    });
    let mut leases: Vec<_> = (0..12)
        .map(|number| lease(number % 4, number % 3, v1::LeaseState::Active))
        .collect();
    leases.push(lease(1, 3, v1::LeaseState::Draining));
    leases.push(lease(2, 3, v1::LeaseState::Zombie));
    Snapshot {
        node: v1::GetNodeResponse {
            version: "0.1.0".to_owned(),
            boot_id: 7,
            uptime_ms,
            probe: "nvml".to_owned(),
            devices: devices.collect(),
            sessions: 6,
            indexed_blocks: 14_000,
            counters: Some(v1::Counters {
                // What engines do not find themselves.
                lookups: uptime_ms / 10,
                lookup_blocks: uptime_ms * 2,
                published_blocks: uptime_ms / 5,
                ..v1::Counters::default()
            }),
            traffic: Some(v1::Traffic {
                links: vec![
                    link(v1::LinkKind::Nvlink, uptime_ms * 40_000_000),
                    link(v1::LinkKind::Pcie, uptime_ms * 12_500_000),
                    link(v1::LinkKind::Host, uptime_ms * 3_000_000),
                ],
                lookup_blocks: uptime_ms * 10,
                own_blocks: uptime_ms * 6,
                host_blocks: uptime_ms * 2,
                ..v1::Traffic::default()
            }),
            ..v1::GetNodeResponse::default()
        },
        sessions: Vec::new(),
        regions: Vec::new(),
        leases,
        namespaces: vec![v1::NamespaceStatus {
            namespace: "llama-3-70b/fp8/tp1".to_owned(),
            lookup_blocks: 200,
            hit_blocks: 174,
            ..v1::NamespaceStatus::default()
        }],
    }
}

fn screen() -> Screen {
    let event = |sequence: u64, kind: &str, text: &str| v1::EventRecord {
        sequence,
        unix_ms: 1_700_000_000_000 + sequence * 1_000,
        kind: kind.to_owned(),
        text: text.to_owned(),
        lease_short: None,
    };
    let events = vec![
        event(1, "register", "session c002 (vllm-2) registered"),
        event(
            2,
            "lease",
            "lease 12: 2.0 GiB of region 00ff on GPU-3f3c1a2b-5d6e over NVLink",
        ),
        event(3, "revoke", "lease 12: 2.0 GiB, withdrawn"),
        event(
            4,
            "short",
            "session c001 (vllm-1) was granted 0 bytes of 4.0 GiB for llama: it is at a quota or a bound",
        ),
        event(
            5,
            "zombie",
            "lease 12: 2.0 GiB still mapped past the drain window by [4711]",
        ),
    ];
    let mut screen = Screen::default();
    screen.update(snapshot(3_600_000), events.clone());
    screen.update(snapshot(3_605_000), events);
    screen
}

#[test]
fn it_works_on_the_smallest_usual_terminal() {
    looks_like("top-80x24.txt", &drawn(&screen(), 80, 24));
}

#[test]
fn it_uses_the_room_of_a_larger_one() {
    looks_like("top-120x40.txt", &drawn(&screen(), 120, 40));
}

#[test]
fn a_simulated_node_says_so_first_and_unknown_use_is_no_idle_hbm() {
    let shown = |change: &dyn Fn(&mut v1::GetNodeResponse)| {
        let mut screen = Screen::default();
        let mut seen = snapshot(3_600_000);
        change(&mut seen.node);
        screen.update(seen, Vec::new());
        drawn(&screen, 80, 24)
    };
    let real = shown(&|_| ());
    assert!(!real.contains("SIMULATED") && !real.contains('?'), "{real}");
    let simulated = shown(&|node| node.probe = "simulated (hgx-8)".to_owned());
    assert!(simulated.starts_with("SIMULATED"), "{simulated}");
    let partly = shown(&|node| {
        node.devices[7].hbm_used_unknown = true;
        node.devices[7].hbm_used_bytes = 0;
        node.left_out.push(v1::LeftOutDevice::default());
    });
    let line = partly.lines().find(|line| line.starts_with("7 ")).unwrap();
    assert!(line.contains("[???"), "{partly}");
    assert!(partly.contains("1 GPU left out"), "{partly}");
}

#[test]
fn a_broker_that_went_away_is_said_over_what_was_known() {
    let mut screen = screen();
    screen.problem = Some("no broker at /run/swiftcache/broker.sock".to_owned());
    let text = drawn(&screen, 80, 24);
    assert!(text.starts_with("no broker at /run"), "{text}");
    assert!(text.contains("vllm-2"), "{text}");
    let text = drawn(&Screen::default(), 80, 24);
    assert!(text.starts_with("asking the broker"), "{text}");
}

fn disk(number: u32, problem: &str) -> v1::DiskStatus {
    v1::DiskStatus {
        device_uuid: format!("DISK-{number}"),
        state: Some(v1::DiskState {
            bytes: 500 * GB,
            used_bytes: 120 * GB,
            written_blocks: 60_000,
            read_blocks: 7_000,
            corrupt_blocks: 2,
            failed_blocks: 3,
            problem: problem.to_owned(),
            path: "/var/lib/swiftcache".to_owned(),
            ..v1::DiskState::default()
        }),
        blocks: 57_000,
        ..v1::DiskStatus::default()
    }
}

#[test]
fn disks_have_a_line_each_and_say_what_is_wrong_with_them() {
    let shown = |disks: Vec<v1::DiskStatus>| {
        let mut screen = Screen::default();
        let mut seen = snapshot(3_600_000);
        seen.node.disks = disks;
        screen.update(seen, Vec::new());
        drawn(&screen, 120, 40)
    };
    assert!(!shown(Vec::new()).contains("DISK"));
    let text = shown(vec![
        disk(0, ""),
        disk(1, "cannot write to /mnt/x: it is read-only"),
    ]);
    for line in [
        "DISK-0 120 GB of 500 GB  57000 blocks, 60000 written 7000 read 5 lost  /var/lib/swiftcache\n",
        "DISK-1 120 GB of 500 GB  57000 blocks, 60000 written 7000 read 5 lost  cannot write to /mnt/x: it is read-only\n",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    let many = shown((0..5).map(|number| disk(number, "")).collect());
    assert!(
        many.contains("DISK-1") && !many.contains("DISK-2") && many.contains("and 3 more disks"),
        "{many}"
    );
}

#[test]
fn no_size_breaks_it() {
    let mut screen = screen();
    if let Some(snapshot) = &mut screen.snapshot {
        snapshot.node.disks = vec![disk(0, ""); 9];
    }
    for (width, height) in [(1, 1), (10, 3), (20, 5), (44, 12), (300, 2), (40, 100)] {
        drawn(&screen, width, height);
    }
    let narrow = drawn(&screen, 80, 16);
    assert!(narrow.contains("more devices"), "{narrow}");
}

/// A name or an event cannot turn the text around it, or move the cursor: the screen shows none of the characters that do.
#[test]
fn nobody_turns_the_screen() {
    let deceiving = "a\u{202e}b\u{1b}[2Jc\u{2066}d";
    let event = v1::EventRecord {
        text: deceiving.to_owned(),
        ..v1::EventRecord::default()
    };
    let lease = v1::LeaseStatus {
        borrower_name: deceiving.to_owned(),
        namespace: deceiving.to_owned(),
        bytes: GB,
        ..v1::LeaseStatus::default()
    };
    let mut screen = Screen::default();
    let snapshot = Snapshot {
        node: v1::GetNodeResponse::default(),
        sessions: Vec::new(),
        regions: Vec::new(),
        leases: vec![lease],
        namespaces: Vec::new(),
    };
    screen.update(snapshot, vec![event]);
    let shown = drawn(&screen, 120, 40);
    // The twin: the names are there.
    assert!(shown.matches("ab[2Jcd").count() >= 2, "{shown}");
    let turns = |character: char| {
        character != '\n'
            && (character.is_control() || swiftcache_proto::convert::reorders(character))
    };
    assert!(!shown.chars().any(turns), "{shown:?}");
}
