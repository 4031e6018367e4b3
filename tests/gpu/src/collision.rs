//! Sharing between PID namespaces in which both processes have the same PID value.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::DeviceError;

use crate::{
    pattern,
    peer::{BackendUnavailable, Peer},
    subject::Subject,
};

const SIZE: u64 = 8 << 20;

/// Imports from a peer that is PID 1 of its own namespace, as this process is of its; says how each kind went. That a
/// kind does not work is an outcome, and so is a driver that does not start in such a namespace; that an import fails
/// without an explanation is an error.
///
/// # Errors
/// When this process is not PID 1, or bytes arrive wrong, or a refusal does not mention PIDs.
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
        // The driver reads /proc about itself, and does not start where that is another namespace's.
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
