//! What an ordinary member of the socket's group can do to the others: look, and nothing else. `docs/threat-model.md`.

use std::{
    env,
    fs::{self, Permissions},
    io::{self, Read, Write},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use swiftcache_proto::v1;
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
    wire::Wire,
};
use tonic::{Code, Status};

/// A user and a group that are nobody's else.
const MEMBER: u32 = 41_234;
const SLAB: u64 = 64 << 10;

/// What came of the calls of a process of user and group [`MEMBER`]: the name of each call, and its code.
fn calls_of_a_member(node: &Node) -> Result<Vec<(String, String)>> {
    fs::set_permissions(node.directory(), Permissions::from_mode(0o755))?;
    let member = Command::new(env::current_exe()?)
        .args([
            "--exact",
            "the_calls_of_a_member",
            "--ignored",
            "--nocapture",
        ])
        .env("SWIFTCACHE_TEST_SOCKET", node.socket())
        .uid(MEMBER)
        .gid(MEMBER)
        .output()?;
    ensure!(member.status.success(), "{member:?}");
    let said = String::from_utf8(member.stdout)?;
    let calls = said.lines().filter_map(|line| line.strip_prefix("call "));
    let calls = calls.filter_map(|line| line.split_once(' '));
    Ok(calls
        .map(|(call, code)| (call.to_owned(), code.to_owned()))
        .collect())
}

#[test]
#[ignore = "the process of another user in the tests of this file"]
fn the_calls_of_a_member() -> Result<()> {
    let socket = env::var_os("SWIFTCACHE_TEST_SOCKET").context("no socket")?;
    let wire = Wire::new(Path::new(&socket))?;
    let mut admin = wire.admin();
    let say = |call: &str, answer: Result<(), Status>| -> Result<()> {
        let code = answer.err().map_or(Code::Ok, |status| status.code());
        writeln!(io::stdout(), "call {call} {code:?}").map_err(anyhow::Error::from)
    };
    // The test's own name stands on this line.
    writeln!(io::stdout())?;
    let device = || "SIM-1".to_owned();
    say(
        "look",
        wire.wait(admin.get_node(v1::GetNodeRequest {})).map(drop),
    )?;
    let list = v1::ListLeasesRequest::default();
    say("list", wire.wait(admin.list_leases(list)).map(drop))?;
    // What it sees of the index is in the name of the call.
    let seen = wire.wait(async {
        let mut stream = admin.watch(v1::WatchRequest::default()).await?.into_inner();
        let mut seen = 0;
        while let Some(told) = stream.message().await? {
            seen += told
                .changes
                .iter()
                .map(|it| it.hashes.len() / 16)
                .sum::<usize>();
            if told.current {
                break;
            }
        }
        Ok::<_, Status>(seen)
    })?;
    say(&format!("sees-{seen}"), Ok(()))?;
    let others = v1::WatchRequest {
        tenant: "0".to_owned(),
        ..Default::default()
    };
    say("watch-others", wire.wait(admin.watch(others)).map(drop))?;
    let drain = v1::DrainRequest {
        target: Some(v1::drain_request::Target::DeviceUuid(device())),
        ..Default::default()
    };
    say("drain", wire.wait(admin.drain(drain)).map(drop))?;
    let undrain = v1::UndrainRequest {
        target: Some(v1::undrain_request::Target::DeviceUuid(device())),
    };
    say("undrain", wire.wait(admin.undrain(undrain)).map(drop))?;
    let evict = v1::EvictRequest {
        target: Some(v1::evict_request::Target::Namespace("model".to_owned())),
    };
    say("evict", wire.wait(admin.evict(evict)).map(drop))?;
    let forget = v1::ForgetRequest::default();
    say("forget", wire.wait(admin.forget(forget)).map(drop))?;
    let quota = v1::SetQuotaRequest {
        target: Some(v1::set_quota_request::Target::Tenant("0".to_owned())),
        bytes: Some(0),
    };
    say("quota", wire.wait(admin.set_quota(quota)).map(drop))?;
    for (call, hold_id, for_ms) in [
        ("hold", 7, 60_000),
        ("end-own-hold", 7, 0),
        ("end-hold", 0, 0),
    ] {
        let hold = v1::HoldRequest {
            device_uuid: device(),
            free_bytes: 0,
            for_ms,
            hold_id,
        };
        say(call, wire.wait(admin.hold(hold)).map(drop))?;
    }
    Ok(())
}

/// A node in whose socket's group [`MEMBER`] is, and on which something is lent and published.
fn node(options: &[&str]) -> Result<(Node, Operator)> {
    let group = MEMBER.to_string();
    let node = Node::start(&[&["--socket-group", &group], options].concat())?;
    let operator = Operator::of(&node)?;
    Ok((node, operator))
}

const REFUSED: [&str; 7] = [
    "drain",
    "undrain",
    "evict",
    "forget",
    "quota",
    "end-hold",
    "watch-others",
];

#[test]
fn a_member_looks_and_changes_nothing_of_others() -> Result<()> {
    if !rustix::process::getuid().is_root() {
        // Only root can be somebody else.
        return Ok(());
    }
    let (node, operator) = node(&[])?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", 2, SLAB)?;
    let lessee = wire.member("lessee", "")?;
    let grant = lessee.lease("model", "SIM-0", SLAB, SLAB)?.grants.remove(0);
    lessee.publish(grant.lease_id, grant.generation, &[[9; 16]])?;
    let calls = calls_of_a_member(&node)?;
    ensure!(calls.iter().any(|(call, _)| call == "sees-0"), "{calls:?}");
    for (call, code) in calls {
        let refused = REFUSED.contains(&call.as_str());
        ensure!((code == "PermissionDenied") == refused, "{call}: {code}");
        ensure!(refused || code == "Ok", "{call}: {code}");
    }
    ensure!(lessee.hits("model", &[[9; 16]])? == 1);
    let devices = operator.node()?.devices;
    ensure!(devices.iter().all(|device| !device.drained), "{devices:?}");
    ensure!(lessee.lease("model", "SIM-0", SLAB, SLAB)?.grants.len() == 1);
    Ok(())
}

/// The twin: who is in `admin_group` may. Then the same calls do what they say.
#[test]
fn a_member_of_the_admin_group_changes_what_others_have() -> Result<()> {
    if !rustix::process::getuid().is_root() {
        // Only root can be somebody else.
        return Ok(());
    }
    let (node, operator) = node(&["--admin-group", &MEMBER.to_string()])?;
    let wire = operator.wire();
    let donor = wire.member("donor", "")?;
    donor.offer([1; 16], "SIM-1", 2, SLAB)?;
    let lessee = wire.member("lessee", "")?;
    let grant = lessee.lease("model", "SIM-0", SLAB, SLAB)?.grants.remove(0);
    lessee.publish(grant.lease_id, grant.generation, &[[9; 16]])?;
    let calls = calls_of_a_member(&node)?;
    ensure!(calls.len() == 12, "{calls:?}");
    ensure!(calls.iter().any(|(call, _)| call == "sees-1"), "{calls:?}");
    ensure!(calls.iter().all(|(_, code)| code == "Ok"), "{calls:?}");
    ensure!(lessee.hits("model", &[[9; 16]])? == 0);
    ensure!(
        lessee
            .lease("model", "SIM-0", SLAB, SLAB)?
            .grants
            .is_empty()
    );
    Ok(())
}

/// A broker whose log nobody reads answers, and says afterwards how much of it is missing. A broker that waited for its
/// log would stop at the first line that the pipe does not take: the test makes sure that it came to that.
#[test]
fn a_log_that_nobody_reads_holds_up_nothing() -> Result<()> {
    const SLABS: u64 = 4_096;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("broker.sock");
    let (mut log, full) = std::io::pipe()?;
    let mut command = Command::new(program("swiftcache-broker")?);
    command.arg("--socket").arg(&socket);
    command.args(["--probe", "simulated", "--log", "debug"]);
    let _broker = Program::start(command.stderr(full.try_clone()?))?;
    eventually("the broker to listen", || Ok(socket.exists()))?;
    let wire = Wire::new(&socket)?;
    let donor = wire.member("donor", "")?;
    let lessee = wire.member("lessee", "")?;
    let node = wire
        .wait(wire.admin().get_node(v1::GetNodeRequest {}))?
        .into_inner();
    let device = node.devices[0].device.clone().context("no device")?.uuid;
    donor.offer([1; 16], &device, SLABS, SLAB)?;
    for _ in 0..4 {
        let grants = lessee.lease("model", &device, SLABS * SLAB, SLAB)?.grants;
        ensure!(grants.len() as u64 == SLABS);
        for grant in &grants {
            lessee.release(grant.lease_id)?;
        }
    }
    let mut room = [PollFd::new(&full, PollFlags::OUT)];
    ensure!(
        poll(&mut room, Some(&Timespec::default()))? == 0,
        "the log is not full"
    );
    drop(full);
    let mut read = String::new();
    let mut piece = [0; 1 << 16];
    while !read.contains("log lines were dropped") {
        let bytes = log.read(&mut piece)?;
        ensure!(bytes > 0, "the broker has ended");
        read.push_str(&String::from_utf8_lossy(&piece[..bytes]));
    }
    Ok(())
}

/// What happens thousands of times a second is not in the log of a broker that logs at its default level.
#[test]
fn a_lease_leaves_no_line_at_the_default_level() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let log_file = directory.path().join("log");
    let lines = |log: &str| -> Result<usize> {
        let node = Node::start_with(Setup {
            log: log.to_owned(),
            log_file: Some(log_file.clone()),
            ..Setup::default()
        })?;
        let operator = Operator::of(&node)?;
        let donor = operator.wire().member("donor", "")?;
        donor.offer([1; 16], "SIM-1", 64, SLAB)?;
        let lessee = operator.wire().member("lessee", "")?;
        for grant in lessee.lease("model", "SIM-0", 64 * SLAB, SLAB)?.grants {
            lessee.release(grant.lease_id)?;
        }
        // What it logs of its end comes last.
        lessee.leave()?;
        donor.leave()?;
        eventually("the log to be written", || {
            Ok(fs::read_to_string(&log_file)?.matches(" left").count() >= 2)
        })?;
        let text = fs::read_to_string(&log_file)?;
        fs::remove_file(&log_file)?;
        Ok(text.lines().filter(|line| line.contains("lease ")).count())
    };
    ensure!(lines("info")? == 0);
    // The twin: at debug level each lease has its lines.
    ensure!(lines("debug")? >= 2 * 64);
    Ok(())
}
