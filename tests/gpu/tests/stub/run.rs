//! Runs the check program with the stub driver.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use swiftcache_client::device::cuda::LIBRARY_VARIABLE;
use swiftcache_tests::stub::Stub;

use crate::PROGRAM;

/// A machine of the stub driver, and the driver to load.
pub(crate) struct Run {
    pub(crate) stub: Stub,
    pub(crate) driver: PathBuf,
}

impl Run {
    /// A machine with this fault, or none.
    pub(crate) fn new(fault: &str) -> Self {
        let stub = Stub::new().expect("a directory");
        if !fault.is_empty() {
            stub.inject(None, fault).expect("a file of faults");
        }
        let environment = stub.environment().expect("the stub driver");
        let driver = environment[LIBRARY_VARIABLE].clone().into();
        Self { stub, driver }
    }

    pub(crate) fn arguments(&self, arguments: &[&str]) -> Output {
        self.command(arguments)
            .output()
            .expect("the check program runs")
    }

    /// The check program, to be run with these.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(arguments)
            .envs(self.stub.environment().expect("the stub driver"))
            .env(LIBRARY_VARIABLE, &self.driver)
            .env_remove("RUST_BACKTRACE");
        command
    }

    /// The error message of an `operation` that fails. Panics if it succeeds, or fails in another way.
    pub(crate) fn failure(&self, operation: &str) -> String {
        let output = self.arguments(&["do", operation]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{operation}: {text}");
        assert!(text.starts_with("Error: "), "{operation}: {text}");
        text
    }

    pub(crate) fn success(&self, operation: &str) {
        let output = self.arguments(&["do", operation]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{operation}: {text}");
    }
}
