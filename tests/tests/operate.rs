//! What operators do with `swiftcache`: drain, undrain, evict, quota, preview and events, over the socket and over TLS; and how
//! watches end.

use std::{
    io::{BufRead, BufReader},
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
};

const MIB: u64 = 1 << 20;

fn swiftcache(arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("swiftcache")?);
    command.args(arguments).env_remove("SWIFTCACHE_SOCKET");
    Ok(command.stdin(Stdio::null()).output()?)
}

fn at(node: &Node, arguments: &[&str]) -> Result<Output> {
    let socket = node.socket().to_string_lossy().into_owned();
    swiftcache(&[&arguments[..1], &["--socket", &socket], &arguments[1..]].concat())
}

/// What a command that must succeed prints as JSON.
fn json(node: &Node, arguments: &[&str]) -> Result<Value> {
    let output = at(node, &[arguments, &["--json"]].concat())?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn refused(output: &Output, status: i32, expected: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(status), "{output:?}");
    ensure!(said.contains(expected), "{said:?} lacks {expected:?}");
    Ok(())
}

fn donor(node: &Node) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg("donate").arg("--socket").arg(node.socket());
    command
        .arg("--usage-dir")
        .arg(node.directory().join("usage"));
    command.args(["--device=SIM-1", "--bytes=64MiB", "--slab=16MiB"]);
    Program::start(&mut command)
}

fn offered(operator: &Operator) -> Result<u64> {
    let regions = operator.regions()?;
    let accounts = regions.iter().filter_map(|region| region.account.as_ref());
    Ok(accounts.map(|account| account.offered_bytes).sum())
}

fn drained(operator: &Operator) -> Result<bool> {
    let devices = operator.node()?.devices;
    Ok(devices.iter().any(|device| device.drained))
}

#[test]
fn operators_act_with_one_command_and_are_asked_first() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let _donor = donor(&node)?;
    eventually("the donor to offer", || Ok(offered(&operator)? == 64 * MIB))?;

    let preview = json(&node, &["preview", "--device=SIM-1", "--bytes=20MiB"])?;
    ensure!(
        preview["bytes"] == 32 * MIB && preview["idle_bytes"] == 32 * MIB,
        "{preview}"
    );
    let shown = at(&node, &["preview", "--device=SIM-1", "--bytes=20MiB"])?;
    ensure!(
        String::from_utf8_lossy(&shown.stdout).contains("2 regions"),
        "{shown:?}"
    );

    // Nobody can be asked here, so nothing is done.
    let acts: [&[&str]; 4] = [
        &["drain", "--device=SIM-1"],
        &["evict", "--namespace=n"],
        &["quota", "--tenant=0", "--bytes=1GiB"],
        &["drain", "--donor=nobody"],
    ];
    for act in acts {
        refused(&at(&node, act)?, 2, "use --yes")?;
    }
    ensure!(!drained(&operator)?);
    // The twin: with --yes it is.
    let answer = json(&node, &["drain", "--device=SIM-1", "--within=2s", "--yes"])?;
    ensure!(answer["drained"] == "device SIM-1", "{answer}");
    ensure!(drained(&operator)?);
    let answer = json(&node, &["undrain", "--device=SIM-1"])?;
    ensure!(
        answer["undrained"] == "device SIM-1" && !drained(&operator)?,
        "{answer}"
    );

    let answer = json(&node, &["quota", "--namespace=n", "--bytes=1GiB", "--yes"])?;
    ensure!(
        answer["bytes"] == 1024 * MIB && answer["leased_bytes"] == 0,
        "{answer}"
    );
    let answer = json(&node, &["quota", "--namespace=n", "--none", "--yes"])?;
    ensure!(answer["bytes"] == Value::Null, "{answer}");

    let events = at(&node, &["events", "--kind=drain", "--kind=undrain"])?;
    let shown = String::from_utf8_lossy(&events.stdout).into_owned();
    ensure!(
        shown.lines().count() == 2 && shown.contains("SIM-1"),
        "{shown}"
    );
    let lines = at(&node, &["events", "--kind=drain", "--json"])?;
    let line: Value = serde_json::from_slice(&lines.stdout)?;
    ensure!(
        line["kind"] == "drain" && line["unix_ms"].as_u64() > Some(0),
        "{line}"
    );

    // What the broker does not know is an error that says so.
    for (act, expected) in [
        (&["drain", "--device=SIM-9", "--yes"][..], "SIM-9"),
        (&["drain", "--region=xyz", "--yes"], "region"),
        (&["undrain", "--donor=nobody"], "nobody"),
        (&["evict", "--lease=7", "--yes"], "lease"),
        (&["preview", "--device=SIM-9", "--bytes=1"], "SIM-9"),
    ] {
        refused(&at(&node, act)?, 1, expected)?;
    }
    Ok(())
}

/// A drain that nobody ended is shown by everything that operators look at, and says who began it. The twin: before it, and
/// after its end, nothing is.
#[test]
fn a_drain_that_nobody_ended_is_shown_everywhere() -> Result<()> {
    let node = Node::start_with(Setup {
        options: vec!["--metrics-listen".to_owned(), "127.0.0.1:0".to_owned()],
        log: "info".to_owned(),
        log_file: Some(tempfile::tempdir()?.keep().join("log")),
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let _donor = donor(&node)?;
    eventually("the donor to offer", || Ok(offered(&operator)? == 64 * MIB))?;
    let regions = operator.regions()?;
    let label = regions[0].donor_label.clone();
    let region = regions[0].region_id.clone();
    let gauge = |state: &str| -> Result<u64> {
        let name = format!("{{device=\"SIM-1\",state=\"{state}\"}} ");
        let metrics = node.metrics()?;
        let found = metrics.lines().find_map(|line| line.split_once(&name));
        Ok(found.context("no such gauge")?.1.parse()?)
    };
    let drains = |of: &str| -> Result<bool> {
        let line = format!("swiftcache_drains{{of=\"{of}\"}} 1");
        Ok(node.metrics()?.lines().any(|shown| shown == line))
    };
    let check = |free: u64, named: &str, of: &str, told: bool| -> Result<()> {
        let text = at(&node, &["status"])?;
        let text = String::from_utf8(text.stdout)?;
        ensure!(text.contains(named) == told, "{named:?}: {text}");
        let status = json(&node, &["status"])?;
        let total = &status["total"];
        ensure!(
            total["free"] == free && total["drained"] == 64 * MIB - free,
            "{status}"
        );
        ensure!(gauge("free")? == free && gauge("drained")? == 64 * MIB - free);
        ensure!(drains(of)? == told);
        Ok(())
    };
    let region_is_drained = "1 of its regions are drained";
    let ends_with = format!("`swiftcache undrain --donor {label}`");
    let of_device = "`swiftcache undrain --device SIM-1`";
    check(64 * MIB, &ends_with, "donor", false)?;
    let donor_flag = format!("--donor={label}");
    json(&node, &["drain", &donor_flag, "--yes"])?;
    check(0, &ends_with, "donor", true)?;
    json(&node, &["undrain", &donor_flag])?;
    check(64 * MIB, &ends_with, "donor", false)?;
    json(&node, &["drain", "--device=SIM-1", "--yes"])?;
    check(0, of_device, "device", true)?;
    json(&node, &["undrain", "--device=SIM-1"])?;
    check(64 * MIB, of_device, "device", false)?;
    json(&node, &["drain", &format!("--region={region}"), "--yes"])?;
    check(48 * MIB, region_is_drained, "region", true)?;

    let uid = rustix::process::getuid().as_raw();
    let events = operator.events()?;
    let deeds: Vec<_> = events
        .iter()
        .filter(|event| ["drain", "undrain"].contains(&event.kind.as_str()))
        .collect();
    ensure!(deeds.len() == 5, "{deeds:?}");
    let by = format!(", by uid {uid}, pid ");
    ensure!(
        deeds.iter().all(|deed| deed.text.contains(&by)),
        "{deeds:?}"
    );
    // What follows from it is nobody's deed.
    let others = events.iter().filter(|event| event.text.contains(&by));
    ensure!(others.count() == 5, "{events:?}");
    Ok(())
}

#[test]
fn operators_act_over_tls_with_a_certificate_and_not_without() -> Result<()> {
    let tls = Path::new(env!("CARGO_MANIFEST_DIR")).join("../broker/tests/broker/tls");
    let file = |name: &str| tls.join(name).to_string_lossy().into_owned();
    let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let options = [
        format!("--listen-tcp=127.0.0.1:{port}"),
        format!("--tls-cert={}", file("server.pem")),
        format!("--tls-key={}", file("server-key.pem")),
        format!("--tls-client-ca={}", file("ca.pem")),
    ];
    let node = Node::start(&options.iter().map(String::as_str).collect::<Vec<_>>())?;
    let operator = Operator::of(&node)?;
    let address = format!("https://localhost:{port}");
    let (ca, cert, key) = (file("ca.pem"), file("client.pem"), file("client-key.pem"));
    let with = |act: &[&str], ca: &str, cert: &str, key: &str| {
        let tls = ["--tls-ca", ca, "--tls-cert", cert, "--tls-key", key];
        swiftcache(&[&act[..1], &["--address", &address], &tls, &act[1..]].concat())
    };
    let act = ["drain", "--device=SIM-1", "--yes"];
    let done = with(&act, &ca, &cert, &key)?;
    ensure!(done.status.success(), "{done:?}");
    ensure!(drained(&operator)?);
    // The twins: without a certificate, with a key that is none, and by a name that is not the broker's.
    let without = swiftcache(&["undrain", "--device=SIM-1", "--address", &address])?;
    refused(&without, 2, "--tls-ca")?;
    let undrain = ["undrain", "--device=SIM-1"];
    refused(
        &with(&undrain, &ca, &cert, "/nowhere.pem")?,
        2,
        "--tls-key: /nowhere.pem",
    )?;
    let stranger = with(&undrain, &file("client.pem"), &cert, &key)?;
    ensure!(stranger.status.code() == Some(3), "{stranger:?}");
    ensure!(drained(&operator)?);
    Ok(())
}

#[test]
fn a_watch_ends_with_the_first_signal_and_says_so_and_none_is_without_pause() -> Result<()> {
    let node = Node::start(&[])?;
    for every in ["0", "0s", "0ms"] {
        let watch = format!("--watch={every}");
        refused(&at(&node, &["status", &watch])?, 2, "takes more than 0")?;
    }
    refused(&at(&node, &["top", "--every=0s"])?, 2, "takes more than 0")?;
    for (signal, pause) in [
        (Signal::INT, "1ms"),
        (Signal::TERM, "1ms"),
        (Signal::TERM, "1h"),
    ] {
        let mut command = Command::new(program("swiftcache")?);
        command.arg("status").arg("--socket").arg(node.socket());
        command
            .arg(format!("--watch={pause}"))
            .stdout(Stdio::piped());
        let mut watch = command.stderr(Stdio::null()).spawn()?;
        let mut lines = BufReader::new(watch.stdout.take().context("no output")?).lines();
        lines.next().context("it ended early")??;
        kill_process(Pid::from_child(&watch), signal)?;
        // Goes on reading, so that the watch never waits for a reader.
        lines.map_while(Result::ok).count();
        ensure!(watch.wait()?.code() == Some(130), "{signal:?} {pause}");
    }
    Ok(())
}

#[test]
fn a_watch_ends_although_the_broker_does_not_answer() -> Result<()> {
    let node = Node::start(&[])?;
    let mut command = Command::new(program("swiftcache")?);
    command.arg("status").arg("--socket").arg(node.socket());
    command.arg("--watch=1ms").stdout(Stdio::piped());
    let mut watch = command.stderr(Stdio::null()).spawn()?;
    let mut lines = BufReader::new(watch.stdout.take().context("no output")?).lines();
    lines.next().context("it ended early")??;
    node.broker()?.signal(Signal::STOP)?;
    kill_process(Pid::from_child(&watch), Signal::TERM)?;
    lines.map_while(Result::ok).count();
    let code = watch.wait()?.code();
    node.broker()?.signal(Signal::CONT)?;
    ensure!(code == Some(130), "{code:?}");
    Ok(())
}

#[test]
fn the_bench_checks_its_document_before_it_measures() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let plain = directory.path().join("plain.md");
    std::fs::write(&plain, "no table here\n")?;
    let nowhere = directory.path().join("nowhere.md");
    for (path, expected) in [
        (plain, "has no line <!-- make bench: begin -->"),
        (nowhere, "cannot read"),
    ] {
        // Were it to measure first, so many rounds would take for ever.
        let mut command = Command::new(program("swiftcache-bench")?);
        command.args(["--rounds=4000000000", "--write"]).arg(&path);
        refused(&command.output()?, 1, expected)?;
    }
    Ok(())
}

#[test]
fn a_watch_prints_the_index_and_goes_on_where_it_was() -> Result<()> {
    const SLAB: u64 = 64 << 10;
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let (donor, lessee) = (
        operator.wire().member("donor", "")?,
        operator.wire().member("lessee", "")?,
    );
    donor.offer([1; 16], "SIM-1", 1, SLAB)?;
    let grant = lessee
        .lease("model", "SIM-0", SLAB, SLAB / 4)?
        .grants
        .remove(0);
    lessee.publish(grant.lease_id, grant.generation, &[[0x1f; 16], [0x20; 16]])?;
    let printed = |arguments: &[&str]| -> Result<String> {
        let output = at(&node, &[&["watch", "--once"], arguments].concat())?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    let all = printed(&["--namespace", "model"])?;
    let lines: Vec<_> = all.lines().collect();
    let block = |byte: &str| format!(" model {}", byte.repeat(16));
    ensure!(lines.len() == 4, "{all}");
    ensure!(
        lines[1].starts_with("+ hbm ") && lines[1].ends_with(&block("1f")),
        "{all}"
    );
    ensure!(lines[2].ends_with(&block("20")), "{all}");
    let place = lines[3].split_whitespace().last().context("no place")?;
    ensure!(printed(&["--namespace", "other"])?.lines().count() == 2);

    lessee.release(grant.lease_id)?;
    let rest = printed(&["--after", place])?;
    let gone = rest.lines().filter(|line| line.starts_with("- hbm "));
    ensure!(gone.count() == 2 && !rest.contains('+'), "{rest}");
    let first: Value =
        serde_json::from_str(printed(&["--json"])?.lines().next().context("nothing")?)?;
    ensure!(
        first["anew"] == true && first["changes"] == serde_json::json!([]),
        "{first}"
    );
    refused(&at(&node, &["watch", "--after", "here"])?, 2, "is no place")
}
