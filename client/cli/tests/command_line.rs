//! What `swiftcache` makes of its command line and its environment, as a user runs it. No broker answers here.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says where"
)]

use std::{
    net::TcpListener,
    path::Path,
    process::{Command, Output},
};

/// A socket that is not there.
const NOWHERE: &str = "/nowhere/of-the-environment.sock";

/// Runs `swiftcache` with a socket in its environment.
fn swiftcache(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swiftcache"));
    command.args(arguments).env("SWIFTCACHE_SOCKET", NOWHERE);
    command.output().unwrap()
}

/// Checks the exit status, and which of these parts the error has.
fn expect(output: &Output, status: i32, with: &[&str], without: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    for part in with {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    for part in without {
        assert!(!said.contains(part), "{part:?} is in {said:?}");
    }
}

#[test]
fn a_socket_from_the_environment_gives_way_to_an_address() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../broker/tests/broker/tls");
    let file = |name: &str| directory.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("client.pem"), file("client-key.pem"));
    let tls = ["--tls-ca", &ca, "--tls-cert", &cert, "--tls-key", &key];
    // Nobody listens on a port that was free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", free.local_addr().unwrap());
    drop(free);
    let at_address = [&["events", "--address", &address][..], &tls].concat();
    expect(
        &swiftcache(&at_address),
        3,
        &[&address, "Use --address for another address"],
        &["--socket", "SWIFTCACHE_SOCKET", NOWHERE],
    );
    // The twins: both on the command line are refused, and without an address the variable counts.
    let both = [&at_address[..], &["--socket", NOWHERE]].concat();
    expect(
        &swiftcache(&both),
        2,
        &["'--address <URL>' cannot be used with '--socket <PATH>'"],
        &["no broker"],
    );
    expect(
        &swiftcache(&["events"]),
        3,
        &[
            NOWHERE,
            "Use --socket or SWIFTCACHE_SOCKET for another socket",
        ],
        &["--address"],
    );
    let named = swiftcache(&["events", "--socket", "/nowhere/of-the-flag.sock"]);
    expect(&named, 3, &["/nowhere/of-the-flag.sock"], &[NOWHERE]);
}

#[test]
fn a_replay_on_a_running_node_names_only_the_flag_for_another_socket() {
    let trace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../workloads/chat.jsonl");
    let trace = trace.to_str().unwrap();
    let replay = ["replay", "--quiet", "--trace", trace, "--requests"];
    let socket = ["--socket", "/nowhere/of-the-flag.sock"];
    expect(
        &swiftcache(&[&replay[..], &["5"], &socket].concat()),
        3,
        &[
            "no broker at /nowhere/of-the-flag.sock",
            "Use --socket for another socket",
        ],
        &["SWIFTCACHE_SOCKET"],
    );
    // No row of a trace is refused before a broker is looked for, here and by a plan.
    for command in [
        [&replay[..], &["0"], &socket].concat(),
        [&["plan", "--trace", trace, "--requests", "0"][..]].concat(),
    ] {
        expect(&swiftcache(&command), 2, &["--requests: is 0"], &["broker"]);
    }
}
