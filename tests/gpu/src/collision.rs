//! Shares memory between two processes that have the same PID in different PID namespaces.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::DeviceError;

use crate::{
    pattern,
    peer::{BackendUnavailable, Peer},
    subject::Subject,
};

const SIZE: u64 = 8 << 20;

/// Imports from a peer that is PID 1 of its namespace, like this process in its own. Returns a line with the result of
/// each handle kind. It is a valid result that a kind does not work, or that the driver does not start in such a
/// namespace. It is an error if an import fails without an explanation.
///
/// # Errors
/// When this process is not PID 1, bytes arrive wrong, or a refusal does not mention PIDs.
pub fn run(program: PathBuf) -> Result<String> {
    ensure!(
        std::process::id() == 1,
        "run it as PID 1: unshare --pid --fork --mount-proc {} pid-collision",
        program.display()
    );
    let outcome = Subject::cuda(program).and_then(|subject| check(&subject));
    match outcome {
        Err(error) if unavailable(&error) => Ok(format!("not possible here: {error:#}")),
        outcome => outcome,
    }
}

fn unavailable(error: &anyhow::Error) -> bool {
    error.is::<BackendUnavailable>()
        || matches!(error.downcast_ref(), Some(DeviceError::Unavailable { .. }))
}

fn check(subject: &Subject) -> Result<String> {
    let (layer, device) = (&subject.layer, subject.device()?);
    let mut outcomes = Vec::new();
    for &kind in layer.handle_kinds() {
        let mut command = Command::new("unshare");
        // The driver reads about itself in /proc, and does not start if /proc belongs to another namespace.
        command.args(["--pid", "--fork", "--mount-proc", "--kill-child"]);
        command.arg(&subject.peer_program);
        let mut peer = Peer::start_as(command, subject)?;
        let theirs = peer.own_pid()?;
        ensure!(theirs == std::process::id(), "the peer is PID {theirs}");
        let (_, export) = peer.donate(&device, SIZE, kind, Some(1))?;
        match layer.import(&device, &device, export, SIZE) {
            Ok(theirs) => {
                pattern::verify(&*subject.stream()?, &theirs, 0, SIZE, 1)?;
                outcomes.push(format!("ok      {kind:?}: works between equal PID values"));
            }
            Err(error @ DeviceError::Handle { .. }) => {
                let told = error.to_string();
                ensure!(told.contains("PID"), "{told} does not mention PIDs");
                outcomes.push(format!("ok      {kind:?}: refused, and explained: {told}"));
            }
            Err(error) => return Err(error).context("an import between equal PID values"),
        }
    }
    Ok(outcomes.join("\n"))
}
