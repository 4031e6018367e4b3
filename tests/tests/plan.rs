//! `swiftcache plan` like a user runs it, and against `swiftcache replay` with real processes: what was planned is what is found.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on has failed, and says where"
)]

use std::{path::Path, process::Output};

use swiftcache_replay::{plan::PlanReport, report::Report};
use swiftcache_tests::programs::swiftcache_in;
use tempfile::TempDir;

/// How much faster than the trace a replay is: slower and slower, until leases come as soon as a plan has them. On a busy
/// machine, and from a donor of a whole GPU, they take a while, which is 60 times as long in the trace.
const PACES: [&str; 3] = ["60", "30", "15"];
/// How far a planned hit rate may be from a replayed one: a point.
const POINT: f64 = 0.01;

fn run(directory: &Path, args: &[&str]) -> Output {
    swiftcache_in(directory, args).unwrap().output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The chat service that comes with SwiftCache.
fn bundled() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../client/workloads/chat.jsonl");
    path.to_str().unwrap().to_owned()
}

fn plan(directory: &Path, args: &[&str]) -> PlanReport {
    let output = run(directory, &[&["plan", "--json"], args].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn replay(directory: &Path, pace: &str, args: &[&str]) -> Report {
    let fixed = ["replay", "--json", "--quiet", "--pace", pace];
    let output = run(directory, &[&fixed[..], args].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_was_planned_is_what_a_replay_with_real_processes_finds() {
    let directory = TempDir::new().unwrap();
    let trace = bundled();
    let other = directory.path().join("other.jsonl");
    let other = other.to_str().unwrap();
    let flags = ["--seed", "11", "--rate", "0.3", "--duration", "10min"];
    let made = ["generate", "chat", "--documents", "0.5", "-o", other];
    assert!(
        run(directory.path(), &[&made[..], &flags].concat())
            .status
            .success()
    );
    // The smaller the tiers, the more a wrong rule of eviction shows.
    let cases: [(&str, &str, &[&str]); 5] = [
        (
            &trace,
            "2",
            &["--host-tier", "128GiB", "--requests", "1500"],
        ),
        (&trace, "1", &["--host-tier", "8GiB", "--requests", "1200"]),
        (
            other,
            "2",
            &["--host-tier", "16GiB", "--model", "qwen3-14b"],
        ),
        // The other kinds of donors: a part of an engine's own pool, and a GPU that nobody uses.
        (
            &trace,
            "2",
            &[
                "--host-tier",
                "8GiB",
                "--requests",
                "900",
                "--donor",
                "40GiB",
            ],
        ),
        (
            &trace,
            "1",
            &[
                "--host-tier",
                "8GiB",
                "--requests",
                "900",
                "--donor",
                "idle",
            ],
        ),
    ];
    for (file, donors, more) in cases {
        let args = [&["--trace", file, "--donors", donors], more].concat();
        let planned = plan(directory.path(), &args);
        let arm = planned.arm(&format!("swiftcache-{donors}")).unwrap();
        let mut apart = Vec::new();
        for pace in PACES {
            let replayed = replay(directory.path(), pace, &args);
            let found = replayed.arm("swiftcache").unwrap();
            assert_eq!(replayed.workload.stretch, planned.workload.stretch);
            let recomputed = replayed.arm("recompute").unwrap();
            assert_eq!(recomputed.hit_rate, planned.arm("vllm").unwrap().hit_rate);
            apart.push((arm.hit_rate, found.hit_rate));
            if (arm.hit_rate - found.hit_rate).abs() <= POINT {
                break;
            }
        }
        let (planned_rate, found) = apart.last().unwrap();
        assert!(
            (planned_rate - found).abs() <= POINT,
            "{file}, {donors} donors: planned and found {apart:?}"
        );
        // The twin: a point is little beside what a tier gives, so a plan that knew nothing of it would be found out.
        let own = planned.arm("vllm").unwrap().hit_rate;
        assert!(planned_rate - own > 2.0 * POINT, "{planned_rate} {own}");
    }
}

#[test]
fn a_plan_answers_with_a_sentence_a_table_of_80_columns_and_the_same_as_json() {
    let directory = TempDir::new().unwrap();
    let trace = bundled();
    let args = ["--trace", &trace, "--requests", "400", "--donor", "40GB"];
    let output = run(directory.path(), &[&["plan"], &args[..]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(output.stderr.is_empty(), "{}", text(&output.stderr));
    let shown = text(&output.stdout);
    for line in shown.lines() {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let planned = plan(directory.path(), &args);
    for arm in &planned.arms {
        assert!(shown.contains(&arm.what), "{}\n{shown}", arm.what);
        let found = format!("{:.1} %", arm.hit_rate * 100.0);
        assert!(shown.contains(&found), "{found}\n{shown}");
    }
    // The file has the same figures.
    let page = directory.path().join("plan.html");
    let with_page = [&["plan", "--report", page.to_str().unwrap()], &args[..]].concat();
    let output = run(directory.path(), &with_page);
    assert!(text(&output.stderr).contains("plan.html"), "{output:?}");
    let html = std::fs::read_to_string(&page).unwrap();
    for arm in &planned.arms {
        let found = format!("<td>{:.1} %</td>", arm.hit_rate * 100.0);
        assert!(html.contains(&found), "{found}");
    }
    let flat = shown.replace('\n', " ");
    assert!(flat.starts_with(&planned.advice), "{shown}");
    assert_eq!(planned.ladder().count(), 4);
}

#[test]
fn what_cannot_be_planned_is_refused_by_name_with_status_2() {
    let directory = TempDir::new().unwrap();
    let trace = bundled();
    let cases: [(&[&str], &str); 8] = [
        (&["--format", "clay tablets"], "burstgpt"),
        (&["--format", "azure"], "header: takes the columns"),
        (
            &["--report", "/nowhere/out.html"],
            "--report: /nowhere/out.html",
        ),
        (&["--node", "abacus"], "hgx-h200"),
        (&["--donors", "9"], "--donors"),
        (&["--donor", "little"], "elastic"),
        (&["--model", "llama-3.1-70b"], "--tensor-parallel"),
        (&["--topology", "/nowhere.toml"], "/nowhere.toml"),
    ];
    for (args, expected) in cases {
        let output = run(
            directory.path(),
            &[&["plan", "--trace", &trace], args].concat(),
        );
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        let said = text(&output.stderr);
        assert!(said.contains(expected), "{said:?} lacks {expected:?}");
    }
}
