//! The results of the checks, and what to do about them.

use std::fmt::Write as _;

use serde::Serialize;

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Ok,
    /// Sharing may work, or the problem matters only in some cases.
    Warn,
    /// Sharing cannot work.
    Fail,
}

/// A check with its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    pub(super) check: &'static str,
    pub(super) verdict: Verdict,
    pub(super) found: String,
    /// What to do. None: there is nothing to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) advice: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict: Verdict::Ok,
            found: found.into(),
            advice: None,
        }
    }

    pub(super) fn warn(
        check: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Warn,
            advice: Some(advice.into()),
            ..Self::ok(check, found)
        }
    }

    pub(super) fn fail(
        check: &'static str,
        found: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            verdict: Verdict::Fail,
            ..Self::warn(check, found, advice)
        }
    }
}

/// All findings. This is the document of `--json`.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    findings: Vec<Finding>,
}

impl Report {
    pub(super) fn add(&mut self, finding: Finding) {
        self.findings.push(finding);
    }

    pub(super) fn failures(&self) -> usize {
        self.count(Verdict::Fail)
    }

    fn count(&self, verdict: Verdict) -> usize {
        let alike = self.findings.iter().filter(|f| f.verdict == verdict);
        alike.count()
    }

    pub(super) fn text(&self) -> String {
        let width = self.findings.iter().map(|f| f.check.len()).max();
        let width = width.unwrap_or_default();
        let mut text = String::new();
        for finding in &self.findings {
            let verdict = match finding.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let _ = writeln!(
                text,
                "{verdict}  {:width$}  {}",
                finding.check, finding.found
            );
            if let Some(advice) = &finding.advice {
                let _ = writeln!(text, "{:indent$}-> {advice}", "", indent = width + 8);
            }
        }
        let (well, warnings, failures) = (
            self.count(Verdict::Ok),
            self.count(Verdict::Warn),
            self.count(Verdict::Fail),
        );
        let _ = writeln!(text, "\n{well} ok, {warnings} warn, {failures} fail");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_that_is_not_ok_says_what_to_do() {
        let mut report = Report::default();
        report.add(Finding::ok("kernel", "6.12"));
        report.add(Finding::warn("shm", "64 MiB", "mount more"));
        report.add(Finding::fail("ipc", "MIG is on", "turn it off"));
        let expected = "\
ok    kernel  6.12
warn  shm     64 MiB
              -> mount more
FAIL  ipc     MIG is on
              -> turn it off

1 ok, 1 warn, 1 fail
";
        assert_eq!(report.text(), expected);
        assert_eq!(report.failures(), 1);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["findings"][2]["verdict"], "fail");
        assert_eq!(json["findings"][0].get("advice"), None);
    }
}
