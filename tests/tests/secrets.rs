//! Only those who got a handle, a grant token or a session id can use it, and only the tenant that wrote bytes can read
//! them.

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_proto::{
    fd_socket,
    v1::{self, Shortfall},
};
use swiftcache_tests::{
    PATIENCE,
    crew::{BorrowerProcess, Job},
    engine::{SLAB_BYTES, eventually},
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
    wire::{Member, Wire, fetch},
};
use tonic::Code;

/// The forms in which bytes can appear in logs and answers.
fn shapes(secret: &[u8]) -> Vec<String> {
    let hexadecimal: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let list =
        |each: &dyn Fn(&u8) -> String| secret.iter().map(each).collect::<Vec<_>>().join(", ");
    let escaped: String = secret.escape_ascii().map(char::from).collect();
    vec![
        hexadecimal.to_uppercase(),
        hexadecimal,
        list(&|byte| byte.to_string()),
        list(&|byte| format!("{byte:#x}")),
        list(&|byte| format!("{byte:#04x}")),
        escaped,
    ]
}

/// The forms of a session id: as a number, and as bytes in both byte orders.
fn shapes_of_session(session: u64) -> Vec<String> {
    let mut all = vec![
        session.to_string(),
        format!("{session:x}"),
        format!("{session:X}"),
    ];
    all.extend(shapes(&session.to_le_bytes()));
    all.extend(shapes(&session.to_be_bytes()));
    all
}

/// The first secret that is in the text.
fn leak<'a>(text: &str, secrets: &'a [String]) -> Option<&'a String> {
    secrets.iter().find(|secret| text.contains(secret.as_str()))
}

#[test]
fn a_leak_would_be_seen() {
    let secret: Vec<u8> = (100..116).collect();
    for text in [
        format!("handle={secret:?}"),
        format!("handle={secret:x?}")
            .replace("[6", "[0x6")
            .replace(", 6", ", 0x6")
            .replace(", 7", ", 0x7"),
        "handle=6465666768696a6b6c6d6e6f70717273".to_owned(),
        "handle=b\"defghijklmnopqrs\"".to_owned(),
    ] {
        assert!(leak(&text, &shapes(&secret)).is_some(), "{text}");
    }
    let session = 0x0123_4567_89ab_cdef_u64;
    for text in [
        format!("{session}"),
        format!("{session:#x}"),
        format!("{:?}", session.to_le_bytes()),
    ] {
        assert!(leak(&text, &shapes_of_session(session)).is_some(), "{text}");
    }
    assert!(leak("session 0123", &shapes_of_session(session)).is_none());
}

/// All answers that an operator can get, as text.
fn everything(operator: &Operator, node: &Node) -> Result<String> {
    let mut text = format!(
        "{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n{:?}\n",
        operator.node()?,
        operator.sessions()?,
        operator.regions()?,
        operator.leases()?,
        operator.namespaces()?,
        operator.events()?,
    );
    for format in [None, Some("--json")] {
        let mut command = Command::new(program("swiftcache")?);
        command
            .arg("status")
            .args(format)
            .arg("--socket")
            .arg(node.socket());
        let output = command.output()?;
        ensure!(output.status.success(), "{output:?}");
        text += &String::from_utf8(output.stdout)?;
    }
    Ok(text)
}

/// A real donor, `swiftcache donate`, with its complete log in a file.
fn donate(node: &Node, log: &Path) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .args([
            "donate", "--device", "SIM-1", "--bytes", "2MiB", "--slab", "256KiB", "--socket",
        ])
        .arg(node.socket())
        .arg("--usage-dir")
        .arg(node.directory().join("usage"))
        .env("RUST_LOG", "trace")
        .stdout(Stdio::null())
        .stderr(fs::File::create(log)?);
    Program::start(&mut command)
}

#[test]
fn no_secret_is_logged_or_shown() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let logs = ["broker", "donor", "borrower"].map(|name| directory.path().join(name));
    let mut node = Node::start_with(Setup {
        options: ["--metrics-listen", "127.0.0.1:0", "--pin-ms", "100"]
            .map(str::to_owned)
            .into(),
        log: "trace".to_owned(),
        log_file: Some(logs[0].clone()),
        shell: None,
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let mut secrets = Vec::new();

    // A workload of real programs.
    let _donor = donate(&node, &logs[1])?;
    let mut job = Job::new("borrower", 1);
    job.log = "trace".to_owned();
    job.log_file = Some(logs[2].clone());
    let mut borrower = BorrowerProcess::start(&node, 0, &job)?;
    borrower.run("reserve 4")?;
    ensure!(borrower.run("mix 100")?.served > 0);

    // Handles and tokens that this test knows: some are used, some refused, some revoked.
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    let handle: Vec<u8> = (100..164).collect();
    let offer = v1::OfferRequest {
        session_id: donor.session,
        region_id: vec![7; 16].into(),
        device_uuid: "SIM-2".to_owned(),
        allocation_id: vec![7; 16].into(),
        offset: 0,
        bytes: 4 << 20,
        slab_bytes: 1 << 20,
        handle: Some(v1::Handle {
            kind: v1::HandleKind::CudaIpc.into(),
            opaque: handle.clone().into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    wire.wait(wire.broker().offer(offer.clone()))?;
    ensure!(
        wire.wait(wire.broker().offer(v1::OfferRequest { bytes: 1, ..offer }))
            .is_err()
    );
    // Eight bytes of the handle are already a leak.
    secrets.extend(handle.chunks(8).flat_map(shapes));
    donor.offer([8; 16], "SIM-2", 4, 1 << 20)?;
    let lessee = wire.member("lessee", "")?;
    let leased = lessee.lease("model", "SIM-2", 8 << 20, 64 << 10)?;
    let mut kinds = [0; 2];
    for grant in &leased.grants {
        let given = grant.handle.as_ref().context("a grant without a handle")?;
        if given.kind() == v1::HandleKind::CudaIpc {
            ensure!(given.opaque[..] == handle[..]);
            kinds[0] += 1;
        } else if given.kind() == v1::HandleKind::PosixFd {
            lessee.open(grant)?;
            ensure!(lessee.open(grant).is_err(), "a token was good twice");
            secrets.extend(shapes(&given.grant_token));
            kinds[1] += 1;
        }
    }
    ensure!(kinds[0] > 0 && kinds[1] > 0, "{kinds:?}");
    donor.withdraw(&[[7; 16]], 1)?;

    let mut shown = everything(&operator, &node)?;
    // Sessions come back after a restart. Refused requests may be logged too.
    node.kill_broker()?;
    node.start_broker()?;
    eventually("everyone to be back", || {
        Ok(operator
            .sessions()
            .is_ok_and(|sessions| sessions.iter().filter(|session| session.attached).count() == 2))
    })?;
    ensure!(borrower.run("mix 50")?.operations == 50);
    ensure!(wire.member("x", "")?.resume(&[4_711]).is_ok());
    let stranger = Member {
        wire: wire.clone(),
        session: 0x0102_0304_0506_0708,
    };
    ensure!(stranger.leave().is_err());
    shown += &everything(&operator, &node)?;
    shown += &metrics(&logs[0])?;

    let ledger = fs::read_to_string(node.directory().join("ledger"))?;
    let mut sessions = 0;
    for line in ledger
        .lines()
        .filter(|line| line.contains("\"record\":\"session\""))
    {
        let (record, _checksum) = line.split_once('\t').context("no checksum")?;
        let record: serde_json::Value = serde_json::from_str(record)?;
        secrets.extend(shapes_of_session(
            record["session"].as_u64().context("no id")?,
        ));
        sessions += 1;
    }
    ensure!(sessions >= 4, "{ledger}");
    // The ledger has session ids, which only its owner can read, and never a handle.
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &fs::metadata(node.directory().join("ledger"))?.permissions(),
    );
    ensure!(mode & 0o077 == 0, "{mode:o}");
    ensure!(
        handle
            .chunks(8)
            .all(|part| leak(&ledger, &shapes(part)).is_none())
    );
    borrower.finish()?;
    for log in &logs {
        let text = fs::read_to_string(log)?;
        ensure!(
            text.lines().count() > 5,
            "{} is no trace: {text}",
            log.display()
        );
        shown += &text;
    }
    ensure!(shown.contains("swiftcache_broker") && shown.contains("lessee"));
    ensure!(shown.len() > 100_000, "a trace of {} bytes", shown.len());
    if let Some(secret) = leak(&shown, &secrets) {
        let line = shown.lines().find(|line| line.contains(secret.as_str()));
        anyhow::bail!(
            "a secret was leaked: {secret} in {:.300}",
            line.unwrap_or_default()
        );
    }
    Ok(())
}

/// The broker's metrics, from the address that is in the log.
fn metrics(log: &Path) -> Result<String> {
    let log = fs::read_to_string(log)?;
    let address = log
        .rsplit("metrics=")
        .next()
        .and_then(|rest| rest.split_whitespace().next());
    let address = address
        .context("no metrics address")?
        .trim_matches(|c: char| !c.is_ascii_digit());
    let mut stream = TcpStream::connect(address).with_context(|| address.to_owned())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.contains("swiftcache_"), "{text}");
    Ok(text)
}

/// The other process of the test below.
#[test]
#[ignore = "run by another test, in a process of its own"]
fn tries_what_it_was_told() -> Result<()> {
    let Ok(told) = env::var("TOLD") else {
        return Ok(());
    };
    let [socket, session, lease, token] = told.split(' ').collect::<Vec<_>>()[..] else {
        anyhow::bail!("{told}");
    };
    let wire = Wire::new(Path::new(socket))?;
    let thief = Member {
        wire: wire.clone(),
        session: session.parse()?,
    };
    let token: Vec<u8> = token.split(',').map(str::parse).collect::<Result<_, _>>()?;
    let (status, descriptor) = fetch(wire.fd_socket(), &token)?;
    ensure!(
        status == fd_socket::Status::NoSuchToken && descriptor.is_none(),
        "{status:?}"
    );
    let lease: u64 = lease.parse()?;
    for refused in [
        thief.resume(&[lease]).map(drop),
        thief.leave(),
        thief.publish(lease, 1, &[[9; 16]]),
        thief.hits("model", &[[1; 16]]).map(drop),
        thief.lease("model", "SIM-0", 1, 1).map(drop),
        thief.withdraw(&[[1; 16]], 0),
    ] {
        let status = refused.err().context("was let in")?;
        ensure!(status.code() == Code::PermissionDenied, "{status:?}");
    }
    ensure!(thief.attach().is_err());
    ensure!(
        thief
            .upload([1; 16], &swiftcache_tests::wire::memory(4096)?)
            .is_err()
    );
    Ok(())
}

#[test]
fn another_process_can_use_neither_session_nor_lease_nor_token() -> Result<()> {
    let node = Node::start(&[])?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    let memory = donor.offer([1; 16], "SIM-1", 1, 1 << 20)?;
    let owner = wire.member("owner", "")?;
    let grant = owner.lease("model", "SIM-0", 1, 64 << 10)?.grants[0].clone();
    owner.publish(grant.lease_id, grant.generation, &[[1; 16]])?;
    let token = grant
        .handle
        .as_ref()
        .context("no handle")?
        .grant_token
        .clone();
    let token: Vec<String> = token.iter().map(u8::to_string).collect();
    let told = format!(
        "{} {} {} {}",
        node.socket().display(),
        owner.session,
        grant.lease_id,
        token.join(",")
    );
    let other = Command::new(env::current_exe()?)
        .args([
            "--exact",
            "tries_what_it_was_told",
            "--ignored",
            "--nocapture",
        ])
        .env("TOLD", told)
        .output()?;
    ensure!(
        other.status.success(),
        "{}",
        String::from_utf8_lossy(&other.stdout)
    );
    ensure!(String::from_utf8_lossy(&other.stdout).contains("1 passed"));
    // The owner can still use all of it.
    memory.write_all_at(b"mine", 0)?;
    let mut bytes = [0; 4];
    owner.open(&grant)?.read_exact_at(&mut bytes, 0)?;
    ensure!(&bytes == b"mine");
    ensure!(owner.hits("model", &[[1; 16]])? == 1);
    Ok(())
}

/// The bytes that the next lessee of a slab reads, after the tenant "one" has written to the slab.
fn what_the_next_one_reads(next_tenant: &str) -> Result<Vec<u8>> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: Duration::from_secs(1),
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    donor.grow(SLAB_BYTES)?;
    let wire = Wire::new(&node.socket())?;
    let first = wire.member("first", "one")?;
    let grant = first.lease("model", "SIM-0", SLAB_BYTES, 4096)?.grants[0].clone();
    first
        .open(&grant)?
        .write_all_at(&vec![0xa5; SLAB_BYTES as usize], grant.offset)?;
    first.leave()?;
    let next = wire.member("next", next_tenant)?;
    let mut granted = None;
    let mut told = Vec::new();
    eventually("the slab", || {
        let leased = next.lease("model", "SIM-0", SLAB_BYTES, 4096)?;
        told.push(leased.shortfall());
        granted = leased.grants.first().cloned();
        Ok(granted.is_some())
    })?;
    if next_tenant != "one" {
        ensure!(told[0] == Shortfall::Scrubbing, "{told:?}");
        ensure!(donor.status().scrubbed == 1);
    }
    let grant = granted.context("no slab")?;
    let mut bytes = vec![0; SLAB_BYTES as usize];
    next.open(&grant)?.read_exact_at(&mut bytes, grant.offset)?;
    operator.settled()?;
    Ok(bytes)
}

#[test]
fn a_slab_is_zeroed_before_another_tenant_maps_it() -> Result<()> {
    ensure!(
        what_the_next_one_reads("two")?
            .iter()
            .all(|byte| *byte == 0)
    );
    // Its twin: for the same tenant the slab is not zeroed, so the bytes are there to read.
    ensure!(
        what_the_next_one_reads("one")?
            .iter()
            .all(|byte| *byte == 0xa5)
    );
    Ok(())
}
