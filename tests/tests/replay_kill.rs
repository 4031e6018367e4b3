//! `swiftcache replay` on a node whose donors and broker are killed again and again. It goes on to its end, and every
//! byte that it reads is right.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, ensure};
use swiftcache_replay::{report::Report, serving::Tier};
use swiftcache_tests::{
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    programs::{Program, program},
};

/// Memory that each donor lends, as an option of `swiftcache donate`.
const LENT: &str = "8MiB";
/// How often a donor and the broker must be killed during replays.
const KILLS: usize = 5;
/// The most replays that may be needed for that.
const REPLAYS: usize = 20;
/// Lookups of the replay between two kills, about a tenth of all. They are enough that blocks on donors are read again.
const LOOKUPS: u64 = 40;

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

/// A chat that is too large for the local pool of the replay's GPU.
fn chat(node: &Node) -> Result<PathBuf> {
    let file = node.directory().join("chat.jsonl");
    let made = Command::new(program("swiftcache")?)
        .args(["generate", "chat", "--seed", "3", "--rate", "0.3"])
        .args(["--duration", "200s", "-o"])
        .arg(&file)
        .status()?;
    ensure!(made.success(), "generate: {made}");
    Ok(file)
}

/// A running `swiftcache replay --json` of one trace. Its output is read all the time.
struct Replay {
    process: Child,
    report: JoinHandle<String>,
    said: JoinHandle<Vec<String>>,
}

impl Replay {
    fn start(node: &Node, trace: &Path) -> Result<Self> {
        let mut process = Command::new(program("swiftcache")?)
            .args(["replay", "--json", "--scale", "65536", "--pace", "20"])
            .args(["--model", "qwen3-14b", "--device", "SIM-0", "--trace"])
            .arg(trace)
            .arg("--usage-dir")
            .arg(node.directory().join("usage"))
            .arg("--socket")
            .arg(node.socket())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut output = process.stdout.take().context("no standard output")?;
        let said = process.stderr.take().context("no standard error")?;
        Ok(Self {
            process,
            report: thread::spawn(move || {
                let mut text = String::new();
                let _ = output.read_to_string(&mut text);
                text
            }),
            said: thread::spawn(move || {
                BufReader::new(said).lines().map_while(Result::ok).collect()
            }),
        })
    }

    fn has_ended(&self) -> bool {
        self.report.is_finished()
    }

    fn report(mut self) -> Result<Report> {
        let status = self.process.wait()?;
        let said = self.said.join().unwrap_or_default();
        ensure!(status.success(), "{status}: {said:#?}");
        let text = self.report.join().unwrap_or_default();
        serde_json::from_str(&text).with_context(|| format!("{text}: {said:#?}"))
    }
}

#[test]
fn a_replay_outlives_its_donors_and_its_broker() -> Result<()> {
    let mut node = Node::start_with(Setup {
        // A long drain window. No process here stops for ever, so a revocation that is not acknowledged is a failure.
        options: vec!["--drain-ms".to_owned(), "30000".to_owned()],
        ..Setup::default()
    })?;
    let operator = Operator::of(&node)?;
    let mut donors = [donor(&node, 1)?, donor(&node, 2)?];
    let lent = |operator: &Operator| Ok(operator.account()?.offered_bytes == 16 << 20);
    eventually("both donors to lend", || lent(&operator))?;

    // Before each kill, the killed processes of the last one must be back, while the replay goes on. So the speed of
    // the machine decides how many kills one replay sees, and how many blocks it reads from donors. Replays follow one
    // another until there were enough kills and some blocks from donors.
    let trace = chat(&node)?;
    let (mut kills, mut from_donors) = (0, 0);
    for _ in 0..REPLAYS {
        if kills >= KILLS && from_donors > 0 {
            break;
        }
        let lookups =
            || -> Result<u64> { Ok(operator.node()?.counters.unwrap_or_default().lookups) };
        // The lookups of earlier replays. This replay must make some of its own before the first kill.
        let mut earlier = lookups()?;
        let replay = Replay::start(&node, &trace)?;
        loop {
            eventually("the replay to go on, or to end", || {
                Ok(replay.has_ended() || lookups()? >= earlier + LOOKUPS)
            })?;
            if replay.has_ended() {
                break;
            }
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
            earlier = 0;
            kills += 1;
        }
        let report = replay.report()?;
        let arm = report.arm("swiftcache").context("no such arm")?;
        ensure!(arm.verified_moved_bytes > 0, "{arm:?}");
        from_donors += [Tier::DonorNvlink, Tier::DonorPcie]
            .iter()
            .filter_map(|tier| arm.hit_blocks.get(tier))
            .sum::<u64>();
    }
    ensure!(
        kills >= KILLS && from_donors > 0,
        "{kills} kills of each and {from_donors} blocks from donors are too few for a test"
    );

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
