//! The check program over the stub driver.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use swiftcache_client::device::cuda::LIBRARY_VARIABLE;
use swiftcache_gpu_tests::subject::STUB_DIR_VARIABLE;

use crate::PROGRAM;

/// The stub driver, which cargo builds beside this test.
pub(crate) fn driver() -> PathBuf {
    let test = std::env::current_exe().expect("this test's path");
    test.with_file_name("libswiftcache_stub_driver.so")
}

/// A directory of the stub driver, and the driver to load.
pub(crate) struct Run {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) driver: PathBuf,
}

impl Run {
    pub(crate) fn new(faults: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("faults"), faults).expect("a file of faults");
        Self {
            dir,
            driver: driver(),
        }
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
            .env(LIBRARY_VARIABLE, &self.driver)
            .env(STUB_DIR_VARIABLE, self.dir.path())
            .env_remove("RUST_BACKTRACE");
        command
    }

    /// What people are told when `operation` fails; panics if it does not, or not by an error.
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
