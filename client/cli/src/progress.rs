//! Progress on standard error, for people who watch.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::output;
use swiftcache_replay::compare::Watch;

/// A bar for each arm on a terminal; a line for each arm otherwise; nothing when quiet.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
}

impl Progress {
    pub(super) fn new(quiet: bool) -> Self {
        Self { bar: None, quiet }
    }

    /// A line of its own.
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
