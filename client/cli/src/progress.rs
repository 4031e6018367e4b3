//! Shows progress on standard error.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output;
use swiftcache_replay::compare::Watch;

/// On a terminal, shows a bar for each arm. Otherwise prints a line for each arm. If quiet, shows nothing.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        Self { bar: None, quiet }
    }

    /// Prints a line, unless quiet.
    pub(super) fn say(&self, line: &str) {
        if !self.quiet {
            output::complain(line);
        }
    }
}

impl Watch for Progress {
    fn arm(&mut self, name: &str, requests: u64) {
        if let Some(bar) = self.bar.take() {
            bar.finish();
        }
        if self.quiet {
            return;
        }
        if !std::io::stderr().is_terminal() {
            output::complain(&format!("{name}: {requests} requests"));
            return;
        }
        let bar = ProgressBar::with_draw_target(Some(requests), ProgressDrawTarget::stderr());
        let style = "{prefix:>14} {bar:40} {pos}/{len} requests, {elapsed}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_prefix(name.to_owned());
        self.bar = Some(bar);
    }

    fn done(&mut self, requests: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(requests);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish();
        }
    }
}
