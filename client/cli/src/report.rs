//! How reports are shown: a table, JSON, and a file of HTML.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use clap::Args;

use super::{CliError, output};

/// How to show a report.
#[derive(Args, Clone, Debug)]
pub(super) struct ReportArgs {
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Write the report as one HTML file with charts, too
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,
    /// Show no progress
    #[arg(long, short)]
    pub(super) quiet: bool,
}

/// A report's file. Nothing is there under its name until the report is whole.
pub(super) struct ReportFile {
    file: tempfile::NamedTempFile,
    path: PathBuf,
}

impl ReportFile {
    /// Opens the file that is asked for: whoever waits for a report should not learn in the end that it cannot be written.
    pub(super) fn open(path: Option<&Path>) -> Result<Option<Self>, CliError> {
        let Some(path) = path else { return Ok(None) };
        let failed =
            |problem: String| CliError::Usage(format!("--report: {}: {problem}", path.display()));
        if path.is_dir() {
            return Err(failed("is a directory; takes a file".to_owned()));
        }
        let parent = path
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        let file = tempfile::Builder::new()
            .prefix(".swiftcache-report")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
            .tempfile_in(parent)
            .map_err(|error| failed(error.to_string()))?;
        Ok(Some(Self {
            file,
            path: path.to_owned(),
        }))
    }

    /// Writes the whole report.
    pub(super) fn write(mut self, page: &str) -> Result<(), CliError> {
        let written = (self.file.write_all(page.as_bytes())).and_then(|()| self.file.flush());
        let kept = written.and_then(|()| {
            let kept = self.file.persist(&self.path);
            kept.map(drop).map_err(|error| error.error)
        });
        kept.map_err(|error| {
            CliError::Failed(format!("--report: {}: {error}", self.path.display()))
        })?;
        let path = std::path::absolute(&self.path).unwrap_or(self.path);
        output::complain(&format!("The report with charts is {}", path.display()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_there_as_a_whole_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out.html");
        let dropped = ReportFile::open(Some(&path)).unwrap().unwrap();
        drop(dropped);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let file = ReportFile::open(Some(&path)).unwrap().unwrap();
        file.write("whole").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "whole");
        assert!(ReportFile::open(None).unwrap().is_none());
    }

    #[test]
    fn what_cannot_be_written_is_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let nowhere = directory.path().join("nowhere/out.html");
        for path in [directory.path(), nowhere.as_path()] {
            let Err(CliError::Usage(error)) = ReportFile::open(Some(path)) else {
                unreachable!("{} is no place for a report", path.display());
            };
            assert!(error.contains("--report"), "{error}");
        }
    }
}
