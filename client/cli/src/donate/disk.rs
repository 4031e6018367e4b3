//! A disk: its agent keeps blocks in a file until a signal comes.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use swiftcache_client::{
    device,
    disk::{DiskAgent, DiskConfig, StoreConfig},
    session::SessionConfig,
};
use swiftcache_proto::domain::DeviceUuid;
use swiftcache_replay::report::bytes;

use super::args::DonateArgs;
use crate::{CliError, backend, output};

/// How often to look for a signal.
const NAP: Duration = Duration::from_millis(50);

/// Keeps blocks in a file until a signal comes.
pub(super) fn keep_on_disk(
    args: &DonateArgs,
    config: SessionConfig,
    disk: &DeviceUuid,
    path: &Path,
    interrupt: &AtomicBool,
) -> Result<(), CliError> {
    survive_file_limit()?;
    let label = config.tenant.clone();
    let (session, _) = backend::connect(config)?;
    let known = session.host_devices().unwrap_or_default();
    let Some(host) = known.first() else {
        return Err(CliError::Usage(
            "--device: the broker names no host memory, through which blocks go to a disk: it is too old".to_owned(),
        ));
    };
    let layer = device::open_host_memory(&known).map_err(swiftcache_client::Error::from)?;
    let uid = rustix::process::getuid().as_raw();
    let agent = DiskAgent::start(
        session,
        layer,
        DiskConfig {
            name: disk.to_string(),
            store: StoreConfig {
                path: path.to_owned(),
                bytes: args.bytes.unwrap_or(0),
                // As the broker calls the tenant.
                tenant: match label.as_str() {
                    "" => uid.to_string(),
                    label => format!("{uid}/{label}"),
                },
                direct: !args.buffered,
            },
            device: host.uuid.clone(),
            memory_bytes: args.memory,
        },
    )?;
    let stats = agent.stats();
    // Nobody has to read it.
    let _ = output::print(&format!(
        "{disk}: keeps {} blocks, and at most {}, in {}\n",
        stats.blocks,
        bytes(stats.bytes),
        path.display()
    ));
    let mut said = None;
    while !interrupt.load(Ordering::Relaxed) {
        let problem = agent.problem();
        if problem != said {
            if let Some(problem) = &problem {
                output::complain(&format!("swiftcache: {disk}: {problem}"));
            }
            said = problem;
        }
        thread::sleep(NAP);
    }
    drop(agent);
    Ok(())
}

/// A file that may not grow (`ulimit -f`) is a full disk, and no reason to die: the signal is caught, and the write fails.
fn survive_file_limit() -> Result<(), CliError> {
    use tokio::signal::unix::{SignalKind, signal};
    let failed = |error: std::io::Error| CliError::Failed(format!("cannot catch signals: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(failed)?;
    let _entered = runtime.enter();
    // What is caught once stays caught.
    let caught = signal(SignalKind::from_raw(libc::SIGXFSZ)).map_err(failed)?;
    drop(caught);
    Ok(())
}
