//! A child of `fork` has its parent's borrower and none of its threads: it finds nothing, at once, and maps nothing of others.
#![allow(unsafe_code, reason = "a program that forks is what is tested")]

use std::{fs, io, os::unix::process::CommandExt, process::Command, sync::Arc, time::Duration};

use anyhow::{Context, Result, ensure};
use swiftcache_client::donor::{Donor, DonorConfig};
use swiftcache_tests::{
    PATIENCE,
    engine::{self, Engine, SLAB_BYTES},
    node::Node,
};

/// Does this in a child, before that becomes another program, and returns what it says.
fn in_child(work: impl Fn() -> io::Result<String> + Send + Sync + 'static) -> Result<String> {
    let (read, write) = io::pipe()?;
    let mut command = Command::new("true");
    // SAFETY: the child takes locks that no other thread of this test holds: they wait for it. What else could be held is what
    // the test is about.
    unsafe {
        command.pre_exec(move || {
            let said = work()?;
            rustix::io::write(&write, said.as_bytes())?;
            Ok(())
        });
    }
    let mut child = command.spawn().context("the child failed")?;
    ensure!(child.wait()?.success());
    // Its copy of the writing end is gone with it, and ours with this.
    drop(command);
    Ok(io::read_to_string(read)?)
}

fn mappings() -> io::Result<usize> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    Ok(maps
        .lines()
        .filter(|line| line.contains("swiftcache-hbm"))
        .count())
}

#[test]
fn a_forked_child_finds_nothing_and_maps_nothing() -> Result<()> {
    let node = Node::start(&[])?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    ensure!(donor.grow(SLAB_BYTES)? == SLAB_BYTES);
    let session = node.session("engine")?;
    let config = engine::config(node.device(0), 1);
    let engine = Arc::new(Engine::new(Some(session.clone()), node.layer()?, config)?);
    engine.reserve(1)?;
    ensure!(engine.store(&[1, 2, 3])?.stored == 3);
    let said = |engine: &Engine, session: &swiftcache_client::session::Session| {
        let found = engine.lookup(&[1, 2, 3]).blocks();
        let stored = engine.store_computed(&[4]).stored;
        let connected = session.is_connected();
        let called = session.release(Vec::new()).wait().err();
        let called = called.map_or_else(String::new, |error| error.to_string());
        let waited = session.wait_connected(Duration::from_secs(3600)).is_ok();
        let maps = mappings()? > 0;
        Ok::<_, io::Error>(format!(
            "{found} found, {stored} stored, connected {connected} {waited}, maps {maps}: {called}"
        ))
    };
    let (its_engine, its_session) = (Arc::clone(&engine), session.clone());
    let child = in_child(move || said(&its_engine, &its_session))?;
    let expected =
        "0 found, 0 stored, connected false false, maps false: the session is another process's";
    ensure!(child.starts_with(expected), "{child}");
    // The twin: the process itself.
    let own = said(&engine, &session)?;
    ensure!(
        own == "3 found, 1 stored, connected true true, maps true: ",
        "{own}"
    );
    ensure!(engine.fetch(&[1, 2, 3])?.served == 3);
    Ok(())
}
