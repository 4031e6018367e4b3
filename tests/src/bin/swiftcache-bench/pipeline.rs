//! The layer pipeline: the compute of layer l overlaps the transfer of later layers. Transfers are real copies on the
//! host backend, and its link model sets their pace. Compute is modelled by sleeping.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, Piece, host::HostLayer};
use swiftcache_proto::{domain::HandleKind, topology::Topology};

use crate::report::{Latencies, Line, time};

const LAYERS: u32 = 32;
const LAYER_BYTES: u64 = 4 << 20;

/// Compares the total time of loading and computing with max(compute, transfer) + one layer. In one case the transfer
/// is slower, in the other the compute.
pub(crate) fn run(rounds: u32) -> Result<Vec<Line>> {
    let rate = 1.0; // GB/s, slow enough that pacing dominates copying
    let text = format!(
        "name = \"bench\"\n[all_pairs]\nkind = \"nvlink\"\ngigabytes_per_second = {rate}\n\
         [[device]]\nuuid = \"SIM-0\"\nname = \"s\"\nhbm_gib = 1\n\
         [[device]]\nuuid = \"SIM-1\"\nname = \"s\"\nhbm_gib = 1\n"
    );
    let topology = Topology::parse(&text, "bench")?;
    let layer = HostLayer::from_topology(&topology, true)?;
    let [own, donor] = [&topology.devices[0].uuid, &topology.devices[1].uuid];
    let bytes = u64::from(LAYERS) * LAYER_BYTES;
    let slab = layer.allocate(donor, bytes, HandleKind::PosixFd)?;
    let pool = layer.allocate(own, bytes, HandleKind::PosixFd)?;
    let stream = layer.stream(own)?;
    let transfer = Duration::from_secs_f64(LAYER_BYTES as f64 / (rate * 1e9));

    let mut lines = Vec::new();
    for (label, compute) in [("half the", transfer / 2), ("twice the", transfer * 2)] {
        let mut took = Latencies::new()?;
        for _ in 0..rounds {
            let began = Instant::now();
            let tickets = (0..LAYERS)
                .map(|index| {
                    let at = u64::from(index) * LAYER_BYTES;
                    let piece = Piece {
                        from: at,
                        to: at,
                        bytes: LAYER_BYTES,
                    };
                    stream.copy(&slab, &pool, &[piece])?;
                    stream.record()
                })
                .collect::<Result<Vec<_>, _>>()?;
            for ticket in tickets {
                ticket.wait()?;
                thread::sleep(compute);
            }
            took.add(began.elapsed());
        }
        let ideal = transfer.max(compute) * LAYERS + transfer.min(compute);
        let measured = took.at(0.5);
        let ratio = measured.as_secs_f64() / ideal.as_secs_f64();
        lines.push(Line {
            what: format!("layer pipeline, compute {label} transfer, median (link model)"),
            measured: time(measured),
            baseline: format!("max(compute, transfer) + one layer: {}", time(ideal)),
            ratio: Some(ratio),
            budget: "≤ 1.05".to_owned(),
            kept: Some(ratio <= 1.05),
        });
    }
    Ok(lines)
}
