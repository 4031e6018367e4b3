//! Checks and measurements that need two devices: a donor's memory is on the other one.

use std::path::Path;

use swiftcache_gpu_tests::{conformance::PEER_CHECKS, subject::REQUIRE_PEERS_VARIABLE};

use crate::run::Run;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn report(path: &Path) -> serde_json::Value {
    let text = std::fs::read(path).expect("the report");
    serde_json::from_slice(&text).expect("it is JSON")
}

/// The cases of a group that took time.
fn cases<'a>(report: &'a serde_json::Value, group: &str) -> Vec<&'a str> {
    let rows = report["rows"].as_array().expect("it has rows").iter();
    rows.filter(|row| row["group"] == group)
        .filter(|row| row["seconds"].as_f64().is_some_and(|time| time > 0.0))
        .filter_map(|row| row["case"].as_str())
        .collect()
}

#[test]
fn peer_checks_run_over_pcie_too() {
    let output = Run::new("peers=pcie").arguments(&["conformance", "--only", "peer device"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert_eq!(
        said.matches("ok      ").count(),
        PEER_CHECKS.len(),
        "{said}"
    );
}

#[test]
fn a_machine_without_peers_is_told_of_and_fails_only_where_they_are_required() {
    for (setting, problem) in [
        ("devices=1", "one GPU: no peer copies"),
        ("peers=none", "no peer access to"),
    ] {
        let run = Run::new(setting);
        for arguments in [
            &["conformance", "--only", "peer device"][..],
            &["bench", "--small", "--only", "peers"],
            &["tune", "--small"],
        ] {
            let output = run.arguments(arguments);
            let told = text(&output.stdout) + &text(&output.stderr);
            assert!(output.status.success(), "{arguments:?}: {told}");
            assert!(told.contains(problem), "{arguments:?}: {told}");
            let mut command = run.command(arguments);
            let output = command.env(REQUIRE_PEERS_VARIABLE, "1").output();
            let output = output.expect("the check program runs");
            let told = text(&output.stdout) + &text(&output.stderr);
            assert!(!output.status.success(), "{arguments:?}: {told}");
            assert!(told.contains(problem), "{arguments:?}: {told}");
        }
    }
}

#[test]
fn copies_between_devices_are_measured_both_ways() {
    let run = Run::new("");
    let file = run.stub.directory().join("report.json");
    let path = file.to_str().expect("a plain path");
    let output = run.arguments(&["bench", "--small", "--only", "peers", "--json", path]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = report(&file);
    assert_eq!(report["failures"].as_array().map(Vec::len), Some(0));
    for group in [
        "peer extent",
        "peer scattered",
        "peer 16-token blocks",
        "peer layer pipeline",
    ] {
        let cases = cases(&report, group);
        for way in [
            "from a peer (NVLink, PosixFd)",
            "to a peer (NVLink, PosixFd)",
        ] {
            let found = cases.iter().any(|case| case.starts_with(way));
            assert!(found, "{group} has nothing {way}: {cases:?}");
        }
    }
    let extents = cases(&report, "peer extent");
    assert!(
        extents.iter().any(|case| case.contains("CudaIpc")),
        "{extents:?}"
    );
    assert!(!cases(&report, "peer latency").is_empty());
    let rows = report["rows"].as_array().expect("it has rows");
    let baseline = "plain peer copy over NVLink, peer access enabled";
    assert!(rows.iter().any(|row| row["against"] == baseline));
}

#[test]
fn a_copy_that_fails_is_told_beside_what_was_measured() {
    let run = Run::new("cuMemcpyPeerAsync=719");
    let file = run.stub.directory().join("report.json");
    let path = file.to_str().expect("a plain path");
    let output = run.arguments(&["bench", "--small", "--only", "peers", "--json", path]);
    assert!(!output.status.success());
    let report = report(&file);
    let failures = report["failures"].as_array().expect("it has failures");
    assert!(!failures.is_empty());
    for failure in failures {
        let told = failure.as_str().expect("words");
        let named = told.starts_with("peer ") && told.contains("cuMemcpyPeerAsync: CUDA error 719");
        assert!(named, "{told}");
    }
    // The measurements after it that do not need this call are in the report too.
    assert!(!cases(&report, "peer layer pipeline").is_empty());
}

#[test]
fn tuning_tries_every_method_on_every_piece() {
    let run = Run::new("");
    let file = run.stub.directory().join("report.json");
    let path = file.to_str().expect("a plain path");
    let output = run.arguments(&["tune", "--small", "--json", path]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = report(&file);
    let (alone, beside) = (
        cases(&report, "peer tune"),
        cases(&report, "peer tune pipeline"),
    );
    assert_eq!((alone.len(), beside.len()), (2 * 5 * 10, 2 * 2 * 10));
    for part in [
        "one by one",
        "batched",
        "kernel on 8 blocks",
        "kernel on 132 blocks",
    ] {
        assert!(alone.iter().any(|case| case.ends_with(part)), "{alone:?}");
        assert!(beside.iter().any(|case| case.contains(part)), "{beside:?}");
    }
}

#[test]
fn links_are_compared_with_the_brokers() {
    let run = Run::new("");
    let file = run.stub.directory().join("topology.toml");
    let devices = |kind: &str| {
        let uuid = |last: u8| format!("GPU-5a5a7374-7562-2d64-7269-7665722d30{last:02x}");
        let device = |last| {
            let uuid = uuid(last);
            format!("[[device]]\nuuid = {uuid:?}\nname = \"stub GPU\"\nhbm_gib = 1.0\n")
        };
        let (first, second) = (device(0), device(1));
        format!(
            "name = \"two\"\n{first}{second}[all_pairs]\nkind = {kind:?}\ngigabytes_per_second = 300.0\n"
        )
    };
    let path = file.to_str().expect("a plain path");
    let arguments = ["links", "--probe", "simulated", "--topology", path];
    for (kind, agrees) in [("nvlink", true), ("pcie", false)] {
        std::fs::write(&file, devices(kind)).expect("a topology");
        let output = run.arguments(&arguments);
        let told = text(&output.stdout);
        assert_eq!(output.status.success(), agrees, "{told}");
        assert!(told.contains("CUDA says NVLink"), "{told}");
        let marked = told
            .lines()
            .filter(|line| line.starts_with("FAILED"))
            .count();
        assert_eq!(marked, if agrees { 0 } else { 2 }, "{told}");
    }
    // A topology that names none of these GPUs describes another node.
    let output = run.arguments(&["links", "--probe", "simulated", "--topology", "hgx-8"]);
    assert!(text(&output.stdout).contains("does not show it"));
    assert!(!output.status.success());
}

#[test]
fn a_stitched_pool_keeps_its_bytes() {
    let check = |faults: &[&str]| {
        let run = Run::new("");
        for fault in faults {
            run.stub.inject(None, fault).expect("a file of faults");
        }
        let topology = run.stub.topology_file().expect("a directory");
        let mut command = run.command(&["stitched", "--small", "--topology"]);
        let output = (command.arg(topology).output()).expect("the check program runs");
        (
            output.status.success(),
            text(&output.stdout) + &text(&output.stderr),
        )
    };
    let (worked, said) = check(&[]);
    assert!(worked && said.contains("round 3"), "{said}");
    // The twin: copies that say that they have worked, and have not.
    let (worked, said) = check(&["cuMemcpyAsync=0", "cuMemcpyDtoDAsync_v2=0"]);
    assert!(!worked, "{said}");
}

/// Which devices the check program enumerates, by their last letters.
fn enumerated(run: &Run, visible: Option<&str>) -> Vec<char> {
    let topology = run.stub.topology_file().expect("a directory");
    let mut command = run.command(&["links", "--probe", "simulated", "--topology"]);
    command.arg(topology).env_remove("CUDA_VISIBLE_DEVICES");
    if let Some(visible) = visible {
        command.env("CUDA_VISIBLE_DEVICES", visible);
    }
    let output = command.output().expect("the check program runs");
    let said = text(&output.stdout);
    let lines = said
        .lines()
        .filter_map(|line| line.strip_prefix("ok      GPU-"));
    let uuids = lines.filter_map(|line| {
        line.strip_suffix(" (stub GPU): simulated (two stub GPUs) shows it too")
    });
    uuids.filter_map(|uuid| uuid.chars().next_back()).collect()
}

#[test]
fn processes_enumerate_what_the_variable_names() {
    let run = Run::new("");
    let uuid = |number: u32| format!("GPU-5a5a7374-7562-2d64-7269-7665722d300{number}");
    let both = format!("{},{}", uuid(1), uuid(0));
    for (visible, expected) in [
        (None, "01"),
        (Some("0"), "0"),
        (Some("1"), "1"),
        (Some("1,0"), "10"),
        (Some("0,7,1"), "0"),
        (Some(uuid(1).as_str()), "1"),
        (Some(both.as_str()), "10"),
        (Some(""), ""),
        (Some("none"), ""),
    ] {
        let found: String = enumerated(&run, visible).into_iter().collect();
        assert_eq!(found, expected, "{visible:?}");
    }
    let one = Run::new("nodes=1");
    assert_eq!(enumerated(&one, None), ['1']);
    assert_eq!(
        enumerated(&one, Some("0")),
        ['1'],
        "the only one is number 0"
    );
}
