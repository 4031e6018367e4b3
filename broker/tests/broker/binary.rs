//! The daemon as its operator meets it.

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

fn broker(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swiftcache-broker"));
    command.args(arguments).env_clear();
    command
}

fn output(arguments: &[&str]) -> Output {
    broker(arguments).output().unwrap()
}

/// A daemon that has said it is ready.
fn ready(directory: &Path, arguments: &[&str]) -> (Child, BufReader<impl Read>) {
    let socket = directory.join("broker.sock");
    let mut child = broker(&["--topology=pcie-4", "--log-format=json", "--socket"])
        .arg(&socket)
        .args(arguments)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("\"ready\"") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended instead");
    }
    (child, log)
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn help_version_and_settings_are_printed() {
    let help = output(&["--help"]);
    let text = String::from_utf8(help.stdout).unwrap();
    for flag in ["--socket", "--listen-tcp", "--print-config", "--drain-ms"] {
        assert!(text.contains(flag), "{text} lacks {flag}");
    }
    assert!(output(&["--version"]).status.success());
    let printed = output(&["--print-config", "--drain-ms=77"]);
    assert!(printed.status.success());
    let text = String::from_utf8(printed.stdout).unwrap();
    assert!(text.contains("drain_ms = 77\n"), "{text}");
}

#[test]
fn a_wrong_setting_ends_with_status_2_and_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("broker.toml");
    std::fs::write(&file, "pin_ms = \"soon\"").unwrap();
    let config = format!("--config={}", file.display());
    for (arguments, named) in [
        (vec!["--check-config", config.as_str()], "pin_ms"),
        (
            vec!["--check-config", "--listen-tcp=0.0.0.0:1"],
            "listen_tcp",
        ),
        (vec!["--print-config", "--log==,="], "log"),
        (
            vec![
                "--probe=simulated",
                "--topology=/nowhere",
                "--socket=/tmp/unused/x.sock",
            ],
            "/nowhere",
        ),
        (vec!["--no-such-flag"], "--no-such-flag"),
    ] {
        let output = output(&arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(named), "{text:?} lacks {named}");
    }
    assert!(output(&["--check-config"]).status.success());
}

#[test]
fn a_signal_drains_it_and_a_second_broker_is_refused_meanwhile() {
    for end in [Signal::TERM, Signal::INT] {
        let directory = tempfile::tempdir().unwrap();
        let (mut child, mut log) = ready(directory.path(), &[]);
        let socket = directory.path().join("broker.sock");
        assert!(socket.exists());
        let second = format!("--socket={}", socket.display());
        let second = output(&["--topology=pcie-4", &second]);
        assert_eq!(second.status.code(), Some(1));
        let text = String::from_utf8(second.stderr).unwrap();
        assert!(text.contains("another broker"), "{text}");

        signal(&child, end);
        assert!(child.wait().unwrap().success());
        let mut rest = String::new();
        log.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("\"drained\""), "{rest}");
        assert!(!socket.exists());
    }
}

#[test]
fn nvml_on_demand_is_nvml_or_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = format!("--socket={}", directory.path().join("b.sock").display());
    let nvml = swiftcache_broker::probe::Nvml::open();
    if nvml.is_ok() {
        return;
    }
    let output = output(&["--probe=nvml", &socket]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("NVML cannot be used"), "{text}");
    assert!(!directory.path().join("b.sock").exists());
}
