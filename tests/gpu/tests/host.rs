//! The conformance suite on the host backend.

use std::sync::Arc;

use swiftcache_gpu_tests::{
    conformance::{self, CHECKS},
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
        .filter_map(|(name, check)| {
            let dir = tempfile::tempdir().unwrap();
            let error = check(&subject(dir.path())).err()?;
            Some(format!("{name}: {error:#}"))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
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
