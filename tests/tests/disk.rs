//! Blocks on a disk: they come from host memory, come back byte for byte, outlive every process, and whatever happens to the disk costs
//! hits only.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use rand::Rng;
use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::Value;
use swiftcache_client::{
    cache::{BorrowerConfig, Hold, Medium},
    session::{Session, SessionConfig},
};
use swiftcache_proto::v1;
use swiftcache_tests::{
    crew::{disk_agent, disk_command, host_donor},
    engine::{self, Engine, SLAB_BYTES, eventually, pattern},
    node::Node,
    operator::Operator,
    programs::{Program, program},
    seed::Course,
};

/// What a file of a disk is called.
const FILE: &str = "swiftcache-kv.disk";
/// Room for everything that a test stores.
const AMPLE: u64 = 16 << 20;

/// A node whose borrowers leave nothing behind: what a later one finds has been on a disk.
fn node() -> Result<Node> {
    Node::start(&["--estate-ttl-ms", "0", "--pin-ms", "100"])
}

fn donate(node: &Node, slabs: u64) -> Result<Program> {
    host_donor(node, slabs, &[])
}

/// `swiftcache donate` with a disk that the broker knows.
fn disk(node: &Node, dir: &Path, bytes: u64) -> Result<Program> {
    disk_agent(node, disk_command(node, dir, bytes)?)
}

/// What the disk's agent tells of it.
fn state(operator: &Operator) -> Result<v1::DiskState> {
    let state = operator.disk()?.and_then(|disk| disk.state);
    state.context("the disk's state")
}

/// What is wrong with the disk, as its agent tells.
fn problem(operator: &Operator) -> Result<String> {
    Ok(state(operator)?.problem)
}

/// Waits until nobody finds a block in memory.
fn memory_is_empty(operator: &Operator) -> Result<()> {
    eventually("memory without a block", || {
        Ok(operator.node()?.indexed_blocks == 0)
    })
}

/// Waits until the disk has written what it was to write, or has left it alone.
fn nothing_to_write(operator: &Operator) -> Result<()> {
    eventually("nothing to be written", || {
        Ok(operator
            .disk()?
            .is_some_and(|disk| disk.to_store_blocks == 0))
    })
}

fn settings(node: &Node, host_slabs: u64) -> BorrowerConfig {
    engine::config_with_host(node.device(0), 0, host_slabs)
}

fn borrower(node: &Node, name: &str, host_slabs: u64) -> Result<Engine> {
    Engine::new(
        Some(node.session(name)?),
        node.layer()?,
        settings(node, host_slabs),
    )
}

fn sequence(conversation: u32, blocks: u32) -> Vec<u32> {
    (0..blocks).map(|n| conversation * 1_000 + n).collect()
}

/// Stores a sequence in host memory, all of it.
fn store(engine: &Engine, sequence: &[u32]) -> Result<()> {
    eventually("room for all of it", || {
        Ok(engine.store(sequence)?.unplaced == 0)
    })
}

/// Stores a sequence, waits until it is on the disk, and has it leave memory.
fn spill(node: &Node, sequence: &[u32]) -> Result<()> {
    let operator = Operator::of(node)?;
    let before = operator.disk()?.map_or(0, |disk| disk.blocks);
    let writer = borrower(node, "writer", 2)?;
    store(&writer, sequence)?;
    operator.on_disk(before + sequence.len() as u64)?;
    drop(writer);
    memory_is_empty(&operator)
}

/// Stores new conversations until `done`, each of which is found whatever becomes of the disk.
fn store_until(
    writer: &Engine,
    newest: &mut u32,
    what: &str,
    done: impl Fn() -> Result<bool>,
) -> Result<()> {
    eventually(what, || {
        *newest += 1;
        store(writer, &sequence(*newest, 12))?;
        ensure!(writer.fetch(&sequence(*newest, 12))?.served == 12);
        done()
    })
}

/// Asks for conversations until something of them is there. Every byte is checked.
fn something_comes_back(
    engine: &Engine,
    conversations: impl Iterator<Item = u32> + Clone,
) -> Result<()> {
    let mut served = 0;
    eventually("something to come back", || {
        for conversation in conversations.clone() {
            served += engine.fetch(&sequence(conversation, 12))?.served;
        }
        Ok(served > 0)
    })
}

/// Asks for a sequence until all of it is there. Every byte is checked.
fn comes_back(engine: &Engine, sequence: &[u32]) -> Result<()> {
    eventually("all of it to come back", || {
        let fetched = engine.fetch(sequence)?;
        Ok(fetched.served == sequence.len() as u32)
    })
}

#[test]
fn what_has_left_memory_comes_back_from_disk_byte_for_byte_to_its_own_model_and_tenant_only()
-> Result<()> {
    let dir = tempfile::tempdir()?;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 8)?;
    let _disk = disk(&node, dir.path(), AMPLE)?;
    let conversation = sequence(1, 20);
    spill(&node, &conversation)?;
    // Another model and another tenant that ask for the same hashes wait for nothing, and get nothing.
    let mut config = settings(&node, 0);
    config.layout.namespace = "another model".to_owned();
    let other_model = Engine::new(Some(node.session("other model")?), node.layer()?, config)?;
    let stranger = Session::connect(SessionConfig {
        socket: node.socket(),
        name: "stranger".to_owned(),
        tenant: "another".to_owned(),
    })?;
    let other_tenant = Engine::new(Some(stranger), node.layer()?, settings(&node, 0))?;
    for other in [&other_model, &other_tenant] {
        ensure!(other.fetch(&conversation)?.found == 0);
    }
    ensure!(operator.disk()?.is_some_and(|disk| disk.asked_blocks == 0));
    let reader = borrower(&node, "reader", 0)?;
    // It is in no memory: what is found has come from the disk.
    ensure!(reader.fetch(&conversation)?.found == 0);
    comes_back(&reader, &conversation)?;
    for run in reader.lookup(&conversation).runs() {
        ensure!((run.medium, run.hold) == (Medium::Host, Hold::Shared));
    }
    for other in [&other_model, &other_tenant] {
        ensure!(other.fetch(&conversation)?.found == 0);
    }
    let shown = node.status(&[])?;
    let path = fs::canonicalize(dir.path())?.display().to_string();
    ensure!(shown.contains("DISK-0") && shown.contains(&path), "{shown}");
    let told = operator.disk()?.context("a disk")?;
    let state = told.state.context("its state")?;
    ensure!(state.path == path, "{state:?}");
    ensure!(
        told.asked_blocks == 20 && state.read_blocks == 20,
        "{state:?}"
    );
    ensure!(
        (state.corrupt_blocks, state.failed_blocks) == (0, 0),
        "{state:?}"
    );
    ensure!(state.bytes_per_second > 0);
    Ok(())
}

#[test]
fn without_a_disk_nothing_comes_back() -> Result<()> {
    // The twin of the test before.
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 8)?;
    let conversation = sequence(1, 20);
    let writer = borrower(&node, "writer", 2)?;
    store(&writer, &conversation)?;
    ensure!(writer.fetch(&conversation)?.served == 20);
    drop(writer);
    operator.eventually("all to be free", |account| account.leased_bytes == 0)?;
    let reader = borrower(&node, "reader", 0)?;
    ensure!(reader.fetch(&conversation)?.found == 0);
    ensure!(operator.disk()?.is_none());
    Ok(())
}

#[test]
fn everything_is_killed_and_started_again_and_the_blocks_are_found() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let conversation = sequence(1, 20);
    {
        let node = node()?;
        let mut donor = donate(&node, 8)?;
        let mut agent = disk(&node, dir.path(), AMPLE)?;
        spill(&node, &conversation)?;
        agent.kill()?;
        donor.kill()?;
    }
    // Another broker, other sockets, other processes: what is the same is the file.
    let node = node()?;
    let _donor = donate(&node, 8)?;
    let reader = borrower(&node, "reader", 0)?;
    // The twin: before the disk is there again, nothing is.
    ensure!(reader.fetch(&conversation)?.found == 0);
    let _disk = disk(&node, dir.path(), AMPLE)?;
    Operator::of(&node)?.on_disk(20)?;
    comes_back(&reader, &conversation)
}

#[test]
fn the_broker_restarts_and_is_told_anew_what_is_on_the_disk() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let mut node = node()?;
    let _donor = donate(&node, 8)?;
    let _disk = disk(&node, dir.path(), AMPLE)?;
    let conversation = sequence(1, 12);
    spill(&node, &conversation)?;
    node.kill_broker()?;
    node.start_broker()?;
    Operator::of(&node)?.on_disk(12)?;
    let reader = borrower(&node, "reader", 0)?;
    comes_back(&reader, &conversation)
}

#[test]
fn the_agent_is_killed_in_mid_write_and_no_wrong_byte_ever_comes_back() -> Result<()> {
    let mut course = Course::new("disk", 6);
    let dir = tempfile::tempdir()?;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 12)?;
    let mut conversations = Vec::new();
    let written = || -> Result<u64> {
        let state = operator.disk()?.and_then(|disk| disk.state);
        Ok(state.map_or(0, |state| state.written_blocks))
    };
    while course.goes_on() {
        // A file that is too small for all of it: slots are written over.
        let mut agent = disk(&node, dir.path(), 2 << 20)?;
        let writer = borrower(&node, "writer", 4)?;
        let until = written()? + course.rng.random_range(1..30);
        while written()? < until {
            let conversation = sequence(conversations.len() as u32 + 1, 12);
            store(&writer, &conversation)?;
            conversations.push(conversation);
        }
        agent.kill()?;
        eventually("the broker to hear of it", || {
            Ok(operator.disk()?.is_none())
        })?;
    }
    let _disk = disk(&node, dir.path(), 2 << 20)?;
    memory_is_empty(&operator)?;
    // `fetch` checks every byte. What there is comes back within a few questions.
    let reader = borrower(&node, "reader", 0)?;
    let newest = conversations.last().context("a conversation")?;
    something_comes_back(&reader, (1..=conversations.len() as u32).rev())?;
    ensure!(!newest.is_empty());
    let state = state(&operator)?;
    ensure!(state.used_bytes <= 2 << 20, "{state:?}");
    Ok(())
}

#[test]
fn a_wrong_byte_on_the_disk_is_a_miss_and_is_counted() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let conversation = sequence(1, 12);
    {
        let node = node()?;
        let _donor = donate(&node, 8)?;
        let mut agent = disk(&node, dir.path(), AMPLE)?;
        spill(&node, &conversation)?;
        agent.kill()?;
    }
    let path = dir.path().join(FILE);
    let whole = fs::read(&path)?;
    let wanted = pattern(conversation[5], 0);
    let at = whole
        .windows(wanted.len())
        .position(|bytes| bytes == wanted)
        .context("the block in the file")?;
    let file = OpenOptions::new().write(true).open(&path)?;
    file.write_all_at(&[whole[at + 1_000] ^ 1], at as u64 + 1_000)?;
    // The twin: what would be given out without the check is wrong.
    ensure!(fs::read(&path)?[at..at + wanted.len()] != wanted);
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 8)?;
    let _disk = disk(&node, dir.path(), AMPLE)?;
    operator.on_disk(12)?;
    let reader = borrower(&node, "reader", 0)?;
    eventually("what is right to come back", || {
        Ok(reader.fetch(&conversation)?.served == 5)
    })?;
    eventually("the wrong block to be counted", || {
        let told = operator.disk()?;
        let corrupt = told.as_ref().and_then(|disk| disk.state.as_ref());
        Ok(corrupt.is_some_and(|state| state.corrupt_blocks == 1)
            && told.is_some_and(|disk| disk.blocks == 11))
    })?;
    // It can be computed and kept anew.
    let writer = borrower(&node, "writer", 2)?;
    store(&writer, &conversation)?;
    operator.on_disk(12)?;
    comes_back(&writer, &conversation)
}

#[test]
fn a_disk_that_is_full_costs_hits_only() -> Result<()> {
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 12)?;
    let writer = borrower(&node, "writer", 4)?;
    // Bounded by itself; and by the system, which ends a process that does not catch the signal.
    let bounded = tempfile::tempdir()?;
    let limited = tempfile::tempdir()?;
    for (dir, limit, bytes) in [(&bounded, None, 600_000), (&limited, Some(512_000), AMPLE)] {
        let command = disk_command(&node, dir.path(), bytes)?;
        let command = match limit {
            None => command,
            Some(most) => with_small_files(&command, most),
        };
        let mut agent = disk_agent(&node, command)?;
        let full = || {
            let state = state(&operator)?;
            Ok(state.evicted_blocks > 0 || limit.is_some() && state.failed_blocks > 0)
        };
        let mut newest = if limit.is_some() { 1_000 } else { 1 };
        store_until(&writer, &mut newest, "the disk to be full", full)?;
        ensure!(!agent.has_ended()?);
        let file = fs::metadata(dir.path().join(FILE))?;
        ensure!(file.len() <= 600_000, "{} bytes", file.len());
        ensure!(writer.fetch(&sequence(newest, 12))?.served == 12);
        agent.kill()?;
        eventually("the broker to hear of it", || {
            Ok(operator.disk()?.is_none())
        })?;
    }
    Ok(())
}

/// A command whose files lie on a small file system of its own in `dir`, where the system lets somebody mount one.
fn on_a_small_disk(command: &Command, dir: &Path, bytes: u64) -> Result<Option<Command>> {
    let mount = format!("mount -t tmpfs -o size={bytes} none \"$0\" && exec \"$@\"");
    mounted(command, dir, &mount)
}

/// A command for which `dir` cannot be written, where the system lets somebody mount.
fn on_a_read_only_disk(command: &Command, dir: &Path) -> Result<Option<Command>> {
    let mount = "mount --bind \"$0\" \"$0\" && mount -o remount,bind,ro \"$0\" && exec \"$@\"";
    mounted(command, dir, mount)
}

/// A command that a shell script starts (`exec "$@"`) which may mount at `dir` (`$0`), seen by nobody else.
fn mounted(command: &Command, dir: &Path, mount: &str) -> Result<Option<Command>> {
    let root = &["--mount"][..];
    let user = &["--mount", "--user", "--map-current-user", "--keep-caps"];
    for how in [root, user] {
        let inside = || {
            let mut inside = Command::new("unshare");
            inside.args(how).args(["sh", "-c", mount]).arg(dir);
            inside
        };
        if inside().arg("true").output()?.status.success() {
            let mut found = inside();
            found.arg(command.get_program()).args(command.get_args());
            return Ok(Some(found));
        }
    }
    Ok(None)
}

/// A command whose files may not grow beyond `bytes`.
fn with_small_files(command: &Command, bytes: u64) -> Command {
    let mut shell = Command::new("sh");
    shell
        .args([
            "-c",
            &format!("ulimit -f {}; exec \"$@\"", bytes / 512),
            "sh",
        ])
        .arg(command.get_program())
        .args(command.get_args());
    shell
}

#[test]
fn a_disk_without_space_left_keeps_what_fits_and_says_so() -> Result<()> {
    // Two extents of 512 KiB fit, of the eight that it may have.
    const MAY: u64 = 4 << 20;
    const FITS: u64 = 1_200 << 10;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 16)?;
    let (small, limited) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let mut ways = Vec::new();
    match on_a_small_disk(&disk_command(&node, small.path(), MAY)?, small.path(), FITS)? {
        Some(command) => ways.push((command, "No space left on device")),
        None => {
            eprintln!("nobody may mount here: a limit of the process stands in for a full disk")
        }
    }
    let command = disk_command(&node, limited.path(), MAY)?;
    ways.push((with_small_files(&command, FITS), "File too large"));
    for (round, (command, why)) in ways.into_iter().enumerate() {
        let mut agent = disk_agent(&node, command)?;
        let writer = borrower(&node, "writer", 4)?;
        let before = 1_000 * round as u32;
        let mut newest = before;
        let full = || Ok(state(&operator)?.evicted_blocks > 0);
        store_until(&writer, &mut newest, "the disk to be full", full)?;
        let told = state(&operator)?;
        ensure!(
            told.problem.contains("cannot grow beyond") && told.problem.contains(why),
            "{told:?}"
        );
        ensure!(told.used_bytes < FITS && told.bytes > FITS, "{told:?}");
        // What is on it is served.
        nothing_to_write(&operator)?;
        drop(writer);
        memory_is_empty(&operator)?;
        let reader = borrower(&node, "reader", 0)?;
        something_comes_back(&reader, (before + 1..=newest).rev())?;
        ensure!(state(&operator)?.corrupt_blocks == 0 && !agent.has_ended()?);
        agent.kill()?;
        eventually("the broker to hear of it", || {
            Ok(operator.disk()?.is_none())
        })?;
    }
    Ok(())
}

/// A broker that takes no more blocks of disks keeps those that it took, and the disk works with them. The twin: a broker with room knows
/// all of them.
#[test]
fn a_disk_with_more_blocks_than_the_broker_takes_serves_those_that_it_took() -> Result<()> {
    let dir = tempfile::tempdir()?;
    {
        let node = node()?;
        let _donor = donate(&node, 8)?;
        let mut agent = disk(&node, dir.path(), AMPLE)?;
        for conversation in 1..=5 {
            spill(&node, &sequence(conversation, 12))?;
        }
        agent.kill()?;
    }
    for (options, known) in [(&["--max-blocks", "40"][..], 40), (&[], 60)] {
        let full = known < 60;
        let node = Node::start(&[&["--estate-ttl-ms", "0", "--pin-ms", "100"], options].concat())?;
        let operator = Operator::of(&node)?;
        let _donor = donate(&node, 8)?;
        let mut agent = disk(&node, dir.path(), AMPLE)?;
        operator.on_disk(known)?;
        eventually("the disk to say what is wrong, if anything", || {
            Ok(
                problem(&operator)?.contains("max_blocks (blocks on disks: the limit is 40)")
                    == full,
            )
        })?;
        ensure!(node.status(&[])?.contains("raise its max_blocks") == full);
        // It is told what to write, and the broker of that as much as it takes.
        let before = state(&operator)?.written_blocks;
        let writer = borrower(&node, "writer", 2)?;
        store(&writer, &sequence(if full { 6 } else { 7 }, 12))?;
        eventually("new blocks to be written", || {
            Ok(state(&operator)?.written_blocks == before + 12)
        })?;
        nothing_to_write(&operator)?;
        match full {
            true => ensure!(operator.disk()?.context("a disk")?.blocks == known),
            false => operator.on_disk(known + 12)?,
        }
        ensure!(problem(&operator)?.is_empty() != full);
        drop(writer);
        memory_is_empty(&operator)?;
        let reader = borrower(&node, "reader", 0)?;
        something_comes_back(&reader, 1..=5)?;
        agent.kill()?;
    }
    Ok(())
}

#[test]
fn a_disk_that_does_not_answer_holds_nobody_up() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 12)?;
    let agent = disk(&node, dir.path(), AMPLE)?;
    let (on_disk_only, in_memory) = (sequence(1, 20), sequence(2, 12));
    spill(&node, &on_disk_only)?;
    let writer = borrower(&node, "writer", 2)?;
    store(&writer, &in_memory)?;
    operator.on_disk(32)?;
    agent.signal(Signal::STOP)?;
    let reader = borrower(&node, "reader", 0)?;
    // It is told that they are coming, and is not made to wait for them.
    let hit = reader.lookup(&on_disk_only);
    ensure!((hit.blocks(), hit.coming().blocks) == (0, 20), "{hit:?}");
    drop(hit);
    comes_back(&reader, &in_memory)?;
    let meanwhile = sequence(3, 12);
    store(&writer, &meanwhile)?;
    ensure!(writer.fetch(&meanwhile)?.served == 12);
    comes_back(&reader, &meanwhile)?;
    ensure!(reader.fetch(&on_disk_only)?.found == 0);
    let told = operator.disk()?.context("a disk")?;
    ensure!(told.wanted_blocks == 20, "{told:?}");
    // The twin: with a disk that answers, they come.
    agent.signal(Signal::CONT)?;
    comes_back(&reader, &on_disk_only)?;
    operator.on_disk(44)?;
    Ok(())
}

#[test]
fn a_disk_that_takes_no_writes_any_more_is_read_and_takes_them_again_when_it_can() -> Result<()> {
    // Two extents of 512 KiB, which are full: what is new would have to go where something is.
    let dir = tempfile::tempdir()?;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 16)?;
    let mut agent = disk(&node, dir.path(), 1_200 << 10)?;
    let writer = borrower(&node, "writer", 4)?;
    let mut newest = 1;
    let evicted = || Ok(state(&operator)?.evicted_blocks > 0);
    store_until(&writer, &mut newest, "the disk to be full", evicted)?;
    nothing_to_write(&operator)?;
    ensure!(problem(&operator)?.is_empty());
    // The kernel refuses every write of the agent from here on. The agent holds the file open, so no mount can be made read-only.
    let its = Pid::from_raw(i32::try_from(agent.pid())?);
    let before = getrlimit(Resource::Fsize);
    let none = Rlimit {
        current: Some(0),
        maximum: before.maximum,
    };
    prlimit(its, Resource::Fsize, none)?;
    let refused = || Ok(problem(&operator)?.contains("cannot write to"));
    store_until(&writer, &mut newest, "the disk to say so", refused)?;
    nothing_to_write(&operator)?;
    let failed = || Ok::<_, anyhow::Error>(state(&operator)?.failed_blocks);
    let mut again = |what: &str| -> Result<u64> {
        let until = failed()? + 1;
        store_until(&writer, &mut newest, what, || Ok(failed()? >= until))?;
        nothing_to_write(&operator)?;
        Ok(operator.disk()?.context("a disk")?.blocks)
    };
    // It is tried again now and then, and no block makes room for what is not written.
    let kept = again("a second try")?;
    ensure!(again("a third try")? == kept);
    drop(writer);
    memory_is_empty(&operator)?;
    // What lies on it comes back, every byte right.
    let reader = borrower(&node, "reader", 0)?;
    something_comes_back(&reader, 2..newest)?;
    ensure!(!agent.has_ended()? && !problem(&operator)?.is_empty());
    // The twin: when the kernel lets it, it writes again.
    prlimit(its, Resource::Fsize, before)?;
    let writer = borrower(&node, "writer", 4)?;
    let well = || Ok(problem(&operator)?.is_empty());
    store_until(&writer, &mut newest, "the disk to write again", well)?;
    ensure!(state(&operator)?.corrupt_blocks == 0);
    Ok(())
}

#[test]
fn a_disk_that_is_read_only_at_start_is_read_and_written_when_it_can_be() -> Result<()> {
    // Eight extents of 512 KiB.
    const MAY: u64 = 4 << 20;
    let dir = tempfile::tempdir()?;
    let node = node()?;
    let operator = Operator::of(&node)?;
    let _donor = donate(&node, 16)?;
    let conversation = sequence(1, 20);
    let mut first = disk(&node, dir.path(), MAY)?;
    spill(&node, &conversation)?;
    first.signal(Signal::TERM)?;
    first.finish()?;
    eventually("the broker to hear of it", || {
        Ok(operator.disk()?.is_none())
    })?;
    // An empty directory is of no use to anybody while nothing can be written there.
    let empty = tempfile::tempdir()?;
    let command = disk_command(&node, empty.path(), AMPLE)?;
    let Some(mut command) = on_a_read_only_disk(&command, empty.path())? else {
        eprintln!("nobody may mount here: a read-only disk cannot be had");
        return Ok(());
    };
    let refused = command.output()?;
    let said = String::from_utf8(refused.stderr)?;
    ensure!(
        !refused.status.success() && said.contains("Read-only file system"),
        "{said}"
    );
    let command = disk_command(&node, dir.path(), MAY)?;
    let command = on_a_read_only_disk(&command, dir.path())?.context("a mount")?;
    let mut agent = disk_agent(&node, command)?;
    operator.on_disk(20)?;
    let said = problem(&operator)?;
    ensure!(
        said.contains("cannot write to") && said.contains("Read-only file system"),
        "{said}"
    );
    ensure!(node.status(&[])?.contains("Read-only file system"));
    let reader = borrower(&node, "reader", 0)?;
    comes_back(&reader, &conversation)?;
    // What is new is not kept, and that is all.
    let writer = borrower(&node, "writer", 4)?;
    let mut newest = 1;
    let failed = || Ok(state(&operator)?.failed_blocks > 0);
    store_until(&writer, &mut newest, "a write to be tried", failed)?;
    ensure!(operator.disk()?.context("a disk")?.blocks == 20);
    ensure!(!agent.has_ended()?);
    // The twin: the same disk can be written again, and the agent notices, also where the file has to grow.
    let remount = |how: &[&str]| {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &agent.pid().to_string(), "--mount"])
            .args(how)
            .args(["mount", "-o", "remount,bind,rw"])
            .arg(dir.path());
        command.output()
    };
    // As the mount was made: by root, or by a user in a namespace of its own.
    let mut remounted = remount(&[])?;
    if !remounted.status.success() {
        remounted = remount(&["--user", "--preserve-credentials"])?;
    }
    ensure!(remounted.status.success(), "{remounted:?}");
    let grown = || Ok(operator.disk()?.is_some_and(|disk| disk.blocks > 60));
    store_until(&writer, &mut newest, "the file to grow", grown)?;
    ensure!(problem(&operator)?.is_empty());
    comes_back(&reader, &conversation)
}

/// Runs `swiftcache`.
fn command(node: &Node, arguments: &[&str]) -> Result<Output> {
    let mut command = Command::new(program("swiftcache")?);
    command.arg(arguments[0]).arg("--socket").arg(node.socket());
    Ok(command.args(&arguments[1..]).output()?)
}

/// What `swiftcache preview` says of all host memory, in words and as JSON.
fn preview(node: &Node) -> Result<(String, Value)> {
    let ask = ["preview", "--device=HOST-0", "--bytes=1TiB"];
    let shown = command(node, &ask)?;
    let document = command(node, &[&ask[..], &["--json"]].concat())?;
    ensure!(
        shown.status.success() && document.status.success(),
        "{shown:?}"
    );
    Ok((
        String::from_utf8(shown.stdout)?,
        serde_json::from_slice(&document.stdout)?,
    ))
}

/// Blocks are found on a disk, and nothing comes back from there while all host memory is drained. The twin: without a disk the
/// preview says that they are lost, and they are.
#[test]
fn a_preview_of_host_memory_says_what_stays_on_the_disk_and_it_does() -> Result<()> {
    for with_disk in [true, false] {
        let dir = tempfile::tempdir()?;
        let node = node()?;
        let operator = Operator::of(&node)?;
        let _donor = donate(&node, 8)?;
        let agent = match with_disk {
            true => Some(disk(&node, dir.path(), AMPLE)?),
            false => None,
        };
        let conversation = sequence(1, 20);
        let writer = borrower(&node, "writer", 2)?;
        store(&writer, &conversation)?;
        if with_disk {
            operator.on_disk(20)?;
        }
        let (shown, told) = preview(&node)?;
        let (lost, on_disk_only) = if with_disk { (0, 20) } else { (20, 0) };
        ensure!(
            told["lost_blocks"] == lost && told["on_disk_blocks"] == on_disk_only,
            "{told}"
        );
        ensure!(
            told["disk_bytes"] == 0 && told["host_left_bytes"] == 0,
            "{told}"
        );
        for words in [
            "20 more blocks would be found on a disk only",
            "nothing would come back from a disk until host memory is lent again",
        ] {
            ensure!(shown.contains(words) == with_disk, "{shown}");
        }
        let drained = command(&node, &["drain", "--device=HOST-0", "--yes"])?;
        ensure!(drained.status.success(), "{drained:?}");
        memory_is_empty(&operator)?;
        let reader = borrower(&node, "reader", 0)?;
        let hit = reader.lookup(&conversation);
        ensure!(
            (hit.blocks(), hit.coming().blocks) == (0, on_disk_only),
            "{hit:?}"
        );
        drop(hit);
        if agent.is_some() {
            eventually("the disk to say that it has no memory", || {
                reader.fetch(&conversation)?;
                Ok(problem(&operator)?.contains("no host memory"))
            })?;
        }
        let undrained = command(&node, &["undrain", "--device=HOST-0"])?;
        ensure!(undrained.status.success(), "{undrained:?}");
        if agent.is_none() {
            ensure!(reader.fetch(&conversation)?.found == 0);
            continue;
        }
        comes_back(&reader, &conversation)?;
        // What the agent holds is on the disk as well. It lets go of it when nobody wants it for a while.
        eventually("the agent's leases in a preview", || {
            comes_back(&reader, &conversation)?;
            let (shown, told) = preview(&node)?;
            ensure!(
                told["lost_blocks"] == 0 && told["on_disk_blocks"] == 20,
                "{told}"
            );
            let held = told["disk_bytes"].as_u64() >= Some(SLAB_BYTES);
            Ok(held && shown.contains("of the leases bring blocks back"))
        })?;
        // Of the disk itself nothing is lent.
        for act in [
            &["preview", "--device=DISK-0", "--bytes=1"][..],
            &["drain", "--device=DISK-0", "--yes"],
        ] {
            let refused = command(&node, act)?;
            let said = String::from_utf8(refused.stderr)?;
            ensure!(
                refused.status.code() == Some(1) && said.contains("DISK-0, a disk"),
                "{said}"
            );
        }
    }
    Ok(())
}

fn refused(node: &Node, dir: &Path, more: &[&str]) -> Result<String> {
    let Output { status, stderr, .. } = disk_command(node, dir, AMPLE)?.args(more).output()?;
    ensure!(!status.success());
    Ok(String::from_utf8(stderr)?)
}

#[test]
fn what_cannot_be_used_is_refused_with_its_name() -> Result<()> {
    let node = node()?;
    let dir = tempfile::tempdir()?;
    // Nobody can write there, whoever it is.
    let said = refused(&node, Path::new("/proc/swiftcache"), &[])?;
    ensure!(said.contains("/proc/swiftcache"), "{said}");
    let file = dir.path().join("file");
    fs::write(&file, "")?;
    let said = refused(&node, &file, &[])?;
    ensure!(said.contains("file"), "{said}");
    let held = dir.path().join("held");
    let mut agent = disk(&node, &held, AMPLE)?;
    let said = refused(&node, &held, &[])?;
    ensure!(said.contains("in use by another process"), "{said}");
    agent.signal(Signal::TERM)?;
    agent.finish()?;
    // Another tenant's agent does not serve what is in it.
    let said = refused(&node, &held, &["--tenant", "another"])?;
    ensure!(
        said.contains("another") && said.contains("tenant"),
        "{said}"
    );
    let foreign = dir.path().join("foreign");
    fs::create_dir(&foreign)?;
    fs::write(foreign.join(FILE), vec![7; 10_000])?;
    let said = refused(&node, &foreign, &[])?;
    ensure!(said.contains("not a file of SwiftCache"), "{said}");
    for (flags, named) in [
        (&["--device", "DISK-0", "--bytes", "1GiB"][..], "--path"),
        (
            &["--device", "HOST-0", "--bytes", "1GiB", "--path", "/tmp"],
            "--path",
        ),
        (
            &["--device", "DISK-0", "--elastic", "--path", "/tmp"],
            "--elastic",
        ),
    ] {
        let mut command = Command::new(program("swiftcache")?);
        let output = command
            .arg("donate")
            .args(flags)
            .arg("--socket")
            .arg(node.socket())
            .output()?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(
            output.status.code() == Some(2) && said.contains(named),
            "{said}"
        );
    }
    Ok(())
}
