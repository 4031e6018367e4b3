//! Runs `swiftcache replay` and `swiftcache demo` like a user: with real processes from start to end.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says where"
)]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    fd::OwnedFd,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use swiftcache_replay::{
    report::Report,
    serving::Tier,
    trace::{self, unbounded_hits},
};
use swiftcache_tests::programs::swiftcache_in;
use tempfile::TempDir;

/// The most replays until one of them is not disturbed by a busy machine.
const ATTEMPTS: u32 = 5;

/// `swiftcache` with its temporary files in a directory of its own.
fn swiftcache(directory: &Path, args: &[&str]) -> Command {
    swiftcache_in(directory, args).unwrap()
}

fn run(directory: &Path, args: &[&str]) -> Output {
    swiftcache(directory, args).output().unwrap()
}

/// A chat of a few hundred requests. It is too large for the local pool of the tests' GPU.
fn chat(directory: &Path) -> PathBuf {
    let file = directory.join("chat.jsonl");
    let path = file.to_str().unwrap();
    let flags = ["--rate", "0.3", "--duration", "200s", "-o", path];
    let made = run(
        directory,
        &[&["generate", "chat", "--seed", "3"], &flags[..]].concat(),
    );
    assert!(made.status.success(), "{}", text(&made.stderr));
    file
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn replay(directory: &Path, more: &[&str]) -> Output {
    let temporary = directory.join("tmp");
    fs::create_dir_all(&temporary).unwrap();
    let file = chat(directory);
    let mut args = vec!["replay", "--quiet", "--scale", "65536", "--pace", "200"];
    args.extend(["--model", "qwen3-14b", "--host-tier", "64GiB", "--trace"]);
    args.push(file.to_str().unwrap());
    args.extend(more);
    let output = run(&temporary, &args);
    let left: Vec<_> = fs::read_dir(&temporary).unwrap().collect();
    assert!(left.is_empty(), "left behind: {left:?}");
    output
}

#[test]
fn every_byte_of_a_replay_comes_back_right_and_the_report_adds_up() {
    let directory = TempDir::new().unwrap();
    let replayed = || -> Report {
        let output = replay(directory.path(), &["--json", "--donors", "2"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    // A replay is paced by the clock. If a busy machine stops a process for seconds, donors may come too late, or a
    // drain window may end without an acknowledgement. Then the replay is repeated.
    let as_planned = |report: &Report| {
        let arm = report.arm("swiftcache").unwrap();
        arm.hit_blocks.contains_key(&Tier::DonorNvlink) && report.donors.zombies == 0
    };
    let mut report = replayed();
    for _ in 1..ATTEMPTS {
        if as_planned(&report) {
            break;
        }
        report = replayed();
    }
    assert!(as_planned(&report), "{report:?}");
    let trace = trace::load(
        &directory.path().join("chat.jsonl"),
        &trace::Options::default(),
    );
    let requests = trace.unwrap().requests;
    let (hits, blocks) = unbounded_hits(&requests);
    assert_eq!(report.workload.requests, requests.len() as u64);
    assert_eq!(
        (report.workload.unbounded_hits, report.workload.blocks),
        (hits, blocks)
    );
    assert_eq!(report.workload.refused, 0);
    let arm = |name: &str| report.arm(name).unwrap();
    let (swiftcache, pcie, recompute) = (arm("swiftcache"), arm("pcie-offload"), arm("recompute"));
    let hits =
        |arm: &swiftcache_replay::report::ArmReport| -> u64 { arm.hit_blocks.values().sum() };
    assert!(pcie.hit_blocks[&Tier::Host] > 0, "{pcie:?}");
    assert!(hits(recompute) <= hits(pcie));
    assert!(hits(swiftcache) <= report.workload.unbounded_hits);
    for arm in [swiftcache, pcie] {
        let least = hits(arm) * report.capacity.block_moved_bytes;
        assert!(arm.verified_moved_bytes >= least, "{arm:?}");
    }
    assert_eq!(recompute.verified_moved_bytes, 0);
    // Every arm states what it holds blocks in, and one has as much as SwiftCache.
    let equal = arm("offload-equal-bytes");
    let (all, most) = (equal.holds.total(), swiftcache.holds.total());
    assert!(all.abs_diff(most) <= 2 << 30, "{equal:?} {swiftcache:?}");
    assert!(equal.holds.host_bytes > pcie.holds.host_bytes);
    assert!(report.arms.iter().all(|arm| arm.holds.pool_bytes > 0));
    assert!(
        report.lent.iter().any(|point| point.bytes > 0),
        "{:?}",
        report.lent
    );
}

#[test]
fn people_see_all_arms_and_what_is_modelled() {
    let directory = TempDir::new().unwrap();
    let page = directory.path().join("out.html");
    let page = page.to_str().unwrap();
    let args = ["--donors", "1", "--requests", "40", "--report", page];
    let output = replay(directory.path(), &args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let html = fs::read_to_string(page).unwrap();
    assert!(
        html.contains("<svg") && html.contains("SIMULATED"),
        "{html}"
    );
    assert!(text(&output.stderr).contains(page));
    let shown = text(&output.stdout);
    for line in shown.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    for part in [
        "swiftcache",
        "pcie-offload",
        "offload-equal-bytes",
        "vllm-offload",
        "recompute",
        "p99",
        "Modelled",
        "Revocations",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
}

#[test]
fn what_is_wrong_with_the_command_line_is_said_with_status_2() {
    let directory = TempDir::new().unwrap();
    let bad = directory.path().join("bad.jsonl");
    fs::write(&bad, "{\"timestamp\": 0, \"input_length\": 0}\n").unwrap();
    let bad = bad.to_str().unwrap();
    let cases: [(&[&str], &str); 4] = [
        (&["replay", "--trace", bad], "line 1: input_length: is 0"),
        (&["replay", "--trace", "/nowhere"], "/nowhere"),
        (&["replay", "--trace", bad, "--model", "gpt-9"], "qwen3-8b"),
        (
            &["replay", "--trace", bad, "--host-tier", "much"],
            "not a size",
        ),
    ];
    for (args, expected) in cases {
        let output = run(directory.path(), args);
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
    }
    let output = run(directory.path(), &["status", "--socket", "/nowhere.sock"]);
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("/nowhere.sock"));
}

#[test]
fn donors_that_have_nothing_to_lend_say_why() {
    let directory = TempDir::new().unwrap();
    let args = [
        "--donors",
        "1",
        "--requests",
        "5",
        "--donor-headroom",
        "70GiB",
    ];
    let output = replay(directory.path(), &args);
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    for part in [
        "donors: not ready",
        "SIM-1: ",
        "70.0 GiB for its own growth 0.0 GiB could be lent",
        "--donor-headroom",
    ] {
        assert!(said.contains(part), "{said:?} lacks {part:?}");
    }
    // What could not lend beside anybody is refused at once, and the donor's own words are shown.
    let args = ["--donors", "1", "--requests", "5", "--donor-headroom"];
    let output = replay(directory.path(), &[&args[..], &["79GiB"]].concat());
    assert_eq!(output.status.code(), Some(1));
    let said = text(&output.stderr);
    assert!(said.contains("SIM-1 would never lend anything"), "{said:?}");
}

/// A running demo: its processes have started, and its socket is known.
struct Demo {
    child: Child,
    processes: Vec<(String, OwnedFd)>,
    socket: String,
    directory: TempDir,
}

impl Demo {
    fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let mut command = swiftcache(directory.path(), &["demo"]);
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut processes = Vec::new();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let socket = loop {
            let line = lines.next().expect("the demo ended early").unwrap();
            if let Some((name, pid)) = line.split_once(" runs as process ") {
                let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
                let watch = pidfd_open(pid, PidfdFlags::empty()).unwrap();
                processes.push((name.to_owned(), watch));
            }
            if let Some((_, socket)) = line.split_once("--socket ") {
                break socket.to_owned();
            }
        };
        // Goes on reading, so that the demo never waits for a reader.
        std::thread::spawn(move || lines.map_while(Result::ok).count());
        Self {
            child,
            processes,
            socket,
            directory,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap();
    }

    /// Waits until every process of the demo is gone.
    fn wait_all(&mut self) -> Option<i32> {
        let status = self.child.wait().unwrap();
        for (_, watch) in &self.processes {
            let mut fds = [PollFd::new(watch, PollFlags::IN)];
            assert_eq!(poll(&mut fds, None).unwrap(), 1);
        }
        status.code()
    }
}

#[test]
fn a_demo_shows_its_node_and_leaves_nothing_when_interrupted() {
    let mut demo = Demo::start();
    let names: Vec<&str> = demo
        .processes
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    assert_eq!(names, ["swiftcache-broker", "donor-1", "donor-2"]);
    let output = run(
        demo.directory.path(),
        &["status", "--json", "--socket", &demo.socket],
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["devices"].as_array().unwrap().len(), 3);
    assert_eq!(status["donors"].as_array().unwrap().len(), 2);
    assert!(status["total"]["offered"].as_u64().unwrap() > 0);
    demo.signal(Signal::INT);
    assert_eq!(demo.wait_all(), Some(130));
    assert!(!demo.directory.path().join("swiftcache-demo").exists());
}

#[test]
fn the_nodes_processes_die_with_a_killed_demo() {
    let mut demo = Demo::start();
    demo.signal(Signal::KILL);
    assert_eq!(demo.wait_all(), None);
}
