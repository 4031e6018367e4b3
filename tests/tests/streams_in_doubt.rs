//! The promises of a stream of the CUDA backend when the driver fails. Whether its copies are over is known or unknown,
//! and never guessed. Until it is known, the memories of the copies stay mapped. A failure affects only the operation
//! that met it.

use std::{sync::Arc, time::Instant};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::{
    CopyStream, DeviceLayer, Memory, Piece, Ticket, cuda::CudaLayer, foreign,
};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};
use swiftcache_tests::{
    PATIENCE,
    engine::eventually,
    stub::{Held, Injected, Stub, alone},
};

const SIZE: usize = 64 << 10;

/// Many small pieces, which go through one launch of the gather kernel.
fn pieces() -> Vec<Piece> {
    let bytes = 1 << 10;
    let piece = |n| Piece {
        from: n * bytes,
        to: n * bytes,
        bytes,
    };
    (0..SIZE as u64 / bytes).map(piece).collect()
}

/// Two memories, and a stream that copies from one to the other.
struct Copies<'a> {
    stub: &'a Stub,
    layer: CudaLayer,
    device: DeviceUuid,
    from: Memory,
    to: Memory,
    stream: Arc<dyn CopyStream>,
}

impl<'a> Copies<'a> {
    fn new(stub: &'a Stub) -> Result<Self> {
        let layer = CudaLayer::open()?;
        let device = layer.devices().first().context("no device")?.uuid.clone();
        let memory = || layer.allocate(&device, SIZE as u64, HandleKind::CudaIpc);
        let (from, to) = (memory()?, memory()?);
        let stream = layer.stream(&device)?;
        stream.write(&from, 0, &[1; SIZE])?;
        Ok(Self {
            stub,
            device,
            from,
            to,
            stream,
            layer,
        })
    }

    fn fault(&self, line: &str) -> Result<Injected> {
        self.stub.inject(Some(std::process::id()), line)
    }

    fn copy(&self) -> swiftcache_client::device::Result<()> {
        self.stream.copy(&self.from, &self.to, &pieces())
    }

    /// Whether the copy has arrived, read by another stream.
    fn has_arrived(&self) -> Result<bool> {
        let mut bytes = [0; SIZE];
        self.layer
            .stream(&self.device)?
            .read(&self.to, 0, &mut bytes)?;
        Ok(bytes == [1; SIZE])
    }
}

/// Asks a ticket a few times whether it is over. It must not be.
fn stays_open(ticket: &Ticket) -> Result<()> {
    for _ in 0..5 {
        ensure!(ticket.outcome().is_none(), "it counts as over");
    }
    Ok(())
}

fn ends_well(ticket: &Ticket) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    Ok(ticket.wait_until(deadline).context("never over")??)
}

/// Calls that can fail between a copy and the knowledge that it is over.
const FAULTS: [&str; 9] = [
    "cuLaunchKernel=701@2",
    "cuEventCreate=2@1",
    "cuEventRecord=999@1",
    "cuEventRecord=999",
    "cuEventQuery=999@1-3",
    "cuEventQuery=719@1",
    "cuEventQuery=999",
    "cuStreamQuery=999@1-3",
    "cuCtxPushCurrent_v2=999@4-6",
];

#[test]
fn the_end_of_a_stream_is_known_and_never_guessed() -> Result<()> {
    alone("the_end_of_a_stream_is_known_and_never_guessed", |stub| {
        for fault in FAULTS {
            let copies = Copies::new(stub)?;
            let hold = stub.hold(None, Held::Kernels)?;
            let in_force = copies.fault(fault)?;
            copies.copy()?;
            // This copy may fail. The first one is in flight in any case.
            let _ = copies.copy();
            let end = copies.stream.end();
            stays_open(&end).context(fault)?;
            ensure!(!copies.has_arrived()?, "{fault}: nothing was held");
            stub.lift(&hold)?;
            ends_well(&end).context(fault)?;
            ensure!(copies.has_arrived()?, "{fault}");
            stub.lift(&in_force)?;
        }
        Ok(())
    })
}

/// The twin: a copy that nobody waits for arrives after another write to its target.
#[test]
fn a_held_copy_overwrites_whoever_does_not_wait_for_it() -> Result<()> {
    alone(
        "a_held_copy_overwrites_whoever_does_not_wait_for_it",
        |stub| {
            let copies = Copies::new(stub)?;
            let hold = stub.hold(None, Held::Kernels)?;
            copies.copy()?;
            let mut bytes = [0; SIZE];
            let other = copies.layer.stream(&copies.device)?;
            other.write(&copies.to, 0, &[2; SIZE])?;
            other.read(&copies.to, 0, &mut bytes)?;
            ensure!(bytes == [2; SIZE], "plain copies go on");
            stub.lift(&hold)?;
            ends_well(&copies.stream.end())?;
            ensure!(copies.has_arrived()?, "what the other wrote is lost");
            Ok(())
        },
    )
}

#[test]
fn a_failure_costs_the_operation_that_met_it() -> Result<()> {
    alone("a_failure_costs_the_operation_that_met_it", |stub| {
        let faults = [
            "cuLaunchKernel=701@1",
            "cuLaunchKernel=719@1",
            "cuCtxPushCurrent_v2=999@1",
        ];
        for fault in faults {
            let copies = Copies::new(stub)?;
            copies.fault(fault)?;
            ensure!(copies.copy().is_err(), "{fault} was not met");
            copies.copy().context(fault)?;
            ends_well(&copies.stream.record()?).context(fault)?;
            ensure!(copies.has_arrived()?, "{fault}");
        }
        let copies = Copies::new(stub)?;
        copies.fault("cuEventRecord=999@1")?;
        copies.copy()?;
        ensure!(copies.stream.record().is_err());
        ends_well(&copies.stream.record()?)?;
        // The same holds for an engine's stream. Here it is the device's default stream.
        copies.fault("cuEventRecord=999@1")?;
        let mark = || mark_default(&copies.layer, &copies.device);
        ensure!(mark().is_err());
        let marked = mark()?.context("CUDA has streams")?;
        copies.fault("cuEventQuery=999@1")?;
        stays_unknown_once(&marked)?;
        ends_well(&marked)?;
        copies.stream.wait_for(&marked)?;
        copies.fault("cuStreamWaitEvent=999@1")?;
        let other = copies.layer.stream(&copies.device)?;
        let end = copies.stream.end();
        ensure!(other.wait_for(&end).is_err() || end.is_over());
        other.wait_for(&end)?;
        Ok(())
    })
}

/// Marks the device's default stream, as if it were the stream of an engine.
#[allow(unsafe_code, reason = "a raw stream is the caller's word")]
fn mark_default(
    layer: &CudaLayer,
    device: &DeviceUuid,
) -> swiftcache_client::device::Result<Option<Ticket>> {
    // SAFETY: 0 is the default stream of the device's primary context, which lives as long as that.
    unsafe { foreign::mark(layer, device, 0) }
}

fn stays_unknown_once(ticket: &Ticket) -> Result<()> {
    ensure!(
        ticket.outcome().is_none(),
        "a failed question was an answer"
    );
    Ok(())
}

/// How often memory was freed.
fn freed(stub: &Stub) -> Result<usize> {
    let calls = stub.calls()?;
    Ok(calls
        .iter()
        .filter(|call| call.symbol == "cuMemFree_v2")
        .count())
}

#[test]
fn what_a_dropped_stream_copies_stays_mapped_until_that_is_over() -> Result<()> {
    alone(
        "what_a_dropped_stream_copies_stays_mapped_until_that_is_over",
        |stub| {
            stub.trace(&["cuMemFree_v2"])?;
            for held in [true, false] {
                let before = freed(stub)?;
                let copies = Copies::new(stub)?;
                let hold = if held {
                    Some(stub.hold(None, Held::Kernels)?)
                } else {
                    None
                };
                copies.copy()?;
                let Copies {
                    layer,
                    device,
                    from,
                    to,
                    stream,
                    ..
                } = copies;
                drop((from, to, stream));
                if let Some(hold) = hold {
                    ensure!(freed(stub)? == before, "freed under a copy");
                    stub.lift(&hold)?;
                }
                // Without a hold, which is the twin, the memory is freed at once. Otherwise each new stream checks
                // whether the copies of dropped streams are over.
                eventually("the memory to be freed", || {
                    if held {
                        layer.stream(&device)?;
                    }
                    Ok(freed(stub)? == before + 2)
                })?;
            }
            Ok(())
        },
    )
}

#[test]
fn copies_of_a_dead_context_are_over_and_have_failed() -> Result<()> {
    alone(
        "copies_of_a_dead_context_are_over_and_have_failed",
        |stub| {
            let copies = Copies::new(stub)?;
            // The twin comes first: while other calls work, the code of a dead context is only the failure of one call.
            for call in [
                "cuLaunchKernel",
                "cuEventRecord",
                "cuEventQuery",
                "cuCtxPushCurrent_v2",
            ] {
                let fault = copies.fault(&format!("{call}=719"))?;
                let _ = copies.copy();
                let end = copies.stream.end();
                let _ = end.outcome();
                stub.lift(&fault)?;
                ends_well(&end).context(call)?;
            }
            copies.fault("execute=719@1")?;
            copies.copy()?;
            let outcome = copies.stream.end().wait_until(Instant::now() + PATIENCE);
            let error = outcome.context("never over")?.err();
            let text = error.context("it did not fail")?.to_string();
            ensure!(text.contains("unspecified launch failure"), "{text}");
            ensure!(text.contains("restart it"), "{text}");
            ensure!(copies.copy().is_err() && copies.stream.end().is_over());
            Ok(())
        },
    )
}
