//! The conformance suite on the host backend.

use std::sync::Arc;

use swiftcache_client::device::Piece;
use swiftcache_gpu_tests::{
    conformance::{self, CHECKS, PEER_CHECKS},
    pattern,
    subject::{Backend, Subject, simulated},
};

fn subject(usage_dir: &std::path::Path) -> Subject {
    let layer = Arc::new(simulated(usage_dir.to_owned()).expect("a usable directory"));
    let to_lose = Arc::clone(&layer);
    Subject {
        layer,
        backend: Backend::Host {
            usage_dir: usage_dir.to_owned(),
        },
        peer_program: env!("CARGO_BIN_EXE_swiftcache-gpu-check").into(),
        lose: Some(Box::new(move |device| {
            Ok(to_lose.lose(device, "pulled out")?)
        })),
    }
}

#[test]
fn the_host_backend_keeps_every_promise() {
    let failures: Vec<String> = CHECKS
        .iter()
        .chain(PEER_CHECKS)
        .filter_map(|(name, check)| {
            let dir = tempfile::tempdir().unwrap();
            let error = check(&subject(dir.path())).err()?;
            Some(format!("{name}: {error:#}"))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_wrong_byte_among_pieces_is_found() {
    const BYTES: u64 = 4096;
    let dir = tempfile::tempdir().unwrap();
    let subject = subject(dir.path());
    let kind = subject.layer.handle_kinds()[0];
    let device = subject.device().unwrap();
    let allocate = || subject.layer.allocate(&device, 64 * BYTES, kind).unwrap();
    let (from, to, stream) = (allocate(), allocate(), subject.stream().unwrap());
    let piece = |index: u64| Piece {
        from: index * BYTES,
        to: (63 - index) * BYTES,
        bytes: BYTES,
    };
    let pieces: Vec<Piece> = (0..64).map(piece).collect();
    pattern::write(&*stream, &from, 0, 64 * BYTES, 3).unwrap();
    stream.copy(&from, &to, &pieces).unwrap();
    pattern::verify_pieces(&*stream, &to, &pieces, 3).unwrap();
    let mut byte = [0];
    let last = 64 * BYTES - 1;
    stream.read(&to, last, &mut byte).unwrap();
    stream.write(&to, last, &[!byte[0]]).unwrap();
    let error = pattern::verify_pieces(&*stream, &to, &pieces, 3).unwrap_err();
    assert!(format!("{error:#}").contains("byte 4095"), "{error:#}");
}

#[test]
fn a_broken_promise_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let subject = subject(dir.path());
    let device = subject.device().unwrap();
    (subject.lose.as_ref().unwrap())(&device).unwrap();
    let error = conformance::run(&subject, "extents arrive byte for byte").unwrap_err();
    assert!(
        format!("{error:#}").contains("the device is lost: pulled out"),
        "{error:#}"
    );
}
