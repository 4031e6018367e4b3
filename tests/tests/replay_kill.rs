//! `swiftcache replay` on a node whose donors and broker are killed under it, again and again: it goes on to its end,
//! and every byte it reads is right.

use std::{
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::replay::{report::Report, serving::Tier};
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
};

/// Memory that each donor lends, as `swiftcache donate` reads it.
const LENT: &str = "8MiB";
/// Requests of the replay, about, between one kill and the next.
const LOOKUPS: u64 = 10;

fn donor(node: &Node, number: usize) -> Result<Program> {
    let mut command = Command::new(program("swiftcache")?);
    command
        .args(["donate", "--slab", "1MiB", "--bytes", LENT, "--device"])
        .arg(node.device(number).as_str())
        .arg("--usage-dir")
        .arg(node.directory().join("usage"))
        .arg("--socket")
        .arg(node.socket());
    Program::start(&mut command)
}

/// A chat that no local pool of the replay's GPU holds.
fn chat(node: &Node) -> Result<std::path::PathBuf> {
    let file = node.directory().join("chat.jsonl");
    let made = Command::new(program("swiftcache")?)
        .args(["generate", "chat", "--seed", "3", "--rate", "0.3"])
        .args(["--duration", "200s", "-o"])
        .arg(&file)
        .status()?;
    ensure!(made.success(), "generate: {made}");
    Ok(file)
}

#[test]
fn a_replay_outlives_its_donors_and_its_broker() -> Result<()> {
    let mut node = Node::start_with(Setup {
        // Nobody here stops for good, so a drain that is not acknowledged is a failure, not an impatience.
        options: vec!["--drain-ms".to_owned(), "30000".to_owned()],
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let mut donors = [donor(&node, 1)?, donor(&node, 2)?];
    let lent = |operator: &Operator| Ok(operator.account()?.offered_bytes == 16 << 20);
    eventually("both donors to lend", || lent(&operator))?;

    let mut replay = Command::new(program("swiftcache")?)
        .args(["replay", "--json", "--scale", "65536", "--pace", "20"])
        .args(["--model", "qwen3-14b", "--device", "SIM-0", "--trace"])
        .arg(chat(&node)?)
        .arg("--usage-dir")
        .arg(node.directory().join("usage"))
        .arg("--socket")
        .arg(node.socket())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let output = replay.stdout.take().context("no standard output")?;
    let (ended, report) = mpsc::channel();
    let reader = thread::spawn(move || {
        let mut text = String::new();
        let _ = BufReader::new(output).read_to_string(&mut text);
        let _ = ended.send(text);
    });
    let said = replay.stderr.take().context("no standard error")?;
    let listener = thread::spawn(move || -> Vec<String> {
        BufReader::new(said).lines().map_while(Result::ok).collect()
    });

    // What a killed party held comes to rest before the next is killed; the replay goes on meanwhile.
    let mut ended = None;
    let mut kills = 0;
    while ended.is_none() {
        eventually("the replay to go on", || {
            ended = report.try_recv().ok();
            let counters = operator.node()?.counters.unwrap_or_default();
            Ok(ended.is_some() || counters.lookups >= LOOKUPS)
        })?;
        let number = kills % 2;
        donors[number].kill()?;
        eventually("a killed donor's memory to be gone", || {
            Ok(operator.account()?.offered_bytes == 8 << 20)
        })?;
        donors[number] = donor(&node, 1 + number)?;
        eventually("a new donor to lend", || lent(&operator))?;
        node.kill_broker()?;
        node.start_broker()?;
        eventually("the donors to be back", || lent(&operator))?;
        kills += 1;
    }
    ensure!(kills > 4, "{kills} kills of each are no test");
    let text = ended.context("the replay said nothing")?;
    let status = replay.wait()?;
    let said = listener.join().unwrap_or_default();
    ensure!(status.success(), "{status}: {said:#?}");
    ensure!(reader.join().is_ok());
    let report: Report = serde_json::from_str(&text)?;
    let arm = report.arm("swiftcache").context("no such arm")?;
    let from_donors: u64 = [Tier::DonorNvlink, Tier::DonorPcie]
        .iter()
        .filter_map(|tier| arm.hit_blocks.get(tier))
        .sum();
    ensure!(from_donors > 0, "{arm:?}");
    ensure!(arm.verified_moved_bytes > 0, "{arm:?}");

    operator.eventually("every slab to be free", |account| {
        account.free_bytes == 16 << 20 && account.offered_bytes == account.free_bytes
    })?;
    for donor in &mut donors {
        donor.signal(rustix::process::Signal::TERM)?;
    }
    operator.eventually("the donors to have left", |account| {
        account.offered_bytes == 0
    })
}
