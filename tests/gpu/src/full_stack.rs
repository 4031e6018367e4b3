//! The full stack on GPUs: a broker, `swiftcache donate`, and a borrower that checks every byte.

use std::path::PathBuf;

use anyhow::{Context, Result};
use swiftcache_client::device::DeviceLayer;
use swiftcache_proto::domain::HandleKind;
use swiftcache_tests::{
    full_stack::{self, Places},
    node::{Devices, Setup},
};

/// Runs the full stack with each kind of handle. The donor is on the last device, the borrower on the first. Calls
/// `said` with a line for each kind. The broker finds the devices through NVML, or in the topology file. `apart`: each
/// process enumerates its own device only, so that only descriptors open.
///
/// # Errors
/// When a process does not start, or a byte is wrong.
pub fn run(
    layer: &dyn DeviceLayer,
    topology: Option<PathBuf>,
    apart: bool,
    said: &mut dyn FnMut(&str),
) -> Result<()> {
    let devices = layer.devices();
    let (first, last) = (devices.first(), devices.last());
    let (first, last) = first.zip(last).context("no device")?;
    let link = layer.link_kind(&first.uuid, &last.uuid);
    if apart && devices.len() < 2 {
        said("none    one GPU: no processes on two");
        return Ok(());
    }
    for &kind in layer.handle_kinds() {
        if apart && kind != HandleKind::PosixFd {
            continue;
        }
        let Some(handle) = full_stack::handle_name(kind) else {
            continue;
        };
        let setup = Setup {
            devices: match &topology {
                Some(path) => Devices::File(path.clone()),
                None => Devices::Gpus(devices.to_vec()),
            },
            ..Setup::default()
        };
        let places = Places {
            donor: devices.len() - 1,
            borrower: 0,
            apart,
        };
        let outcome = full_stack::run(setup, places, handle)
            .with_context(|| format!("full stack, {handle}"))?;
        said(&format!(
            "ok      full stack, {handle}{}: {} blocks stored on {} and {} read back by {} ({link}), every byte right; \
             the donor left with all of it after {:.0} ms",
            if apart {
                ", each process enumerates its own GPU only"
            } else {
                ""
            },
            outcome.stored,
            last.uuid,
            outcome.served,
            first.uuid,
            outcome.gave_back.as_secs_f64() * 1e3
        ));
    }
    Ok(())
}
