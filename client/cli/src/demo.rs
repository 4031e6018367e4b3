//! `swiftcache demo`.

use std::path::{Path, PathBuf};

use clap::{Args, Parser};

use super::{
    CliError,
    progress::Progress,
    replay::{NodeArgs, Play, show},
    report::{ReportArgs, ReportFile},
};
use swiftcache_replay::{
    ReplayError,
    trace::{self, Options, Trace, TraceError},
};

/// The chat service that comes with SwiftCache. `swiftcache generate chat` made it.
const BUNDLED_CHAT: &[u8] = include_bytes!("../../workloads/chat.jsonl");
/// Trace seconds per second of wall clock. With this pace the demo takes about a minute.
const PACE: f64 = 30.0;
const DONORS: usize = 2;
/// The report, in the directory that the demo runs in.
const REPORT: &str = "swiftcache-demo.html";

/// Start a small node here, replay a sample chat service on it, and show the results
///
/// A broker, two donors and a borrower run as real processes on simulated devices; no GPU is needed. While the
/// demo runs, `swiftcache status` in another terminal shows the node; the demo prints the command for it. Charts go to
/// swiftcache-demo.html in this directory, unless --report names another file.
#[derive(Args, Debug)]
pub(super) struct DemoArgs {
    #[command(flatten)]
    report: ReportArgs,
}

pub(super) fn run(args: &DemoArgs) -> Result<(), CliError> {
    let interrupt = super::interrupt()?;
    let trace = chat().map_err(ReplayError::from)?;
    let named = ReportFile::open(args.report.report.as_deref())?;
    let mut node = Defaults::parse_from(["demo"]).node;
    node.pace = PACE;
    node.donors = DONORS;
    let play = Play::new(&node, trace, Some(directory()))?;
    let mut progress = Progress::new(args.report.quiet);
    let quiet = args.report.quiet;
    let report = play.on_private_node(&mut progress, &interrupt, &|node| {
        let hint = Progress::new(quiet);
        for (name, pid) in node.processes() {
            hint.say(&format!("{name} runs as process {pid}"));
        }
        hint.say(&format!(
            "\nWatch the node from another terminal:\n  swiftcache status --watch --socket {}\n",
            node.socket().display()
        ));
    })?;
    drop(progress);
    let file = match named {
        Some(named) => Some(named),
        // Nobody asked for it by name: a directory that cannot be written costs the charts only.
        None => ReportFile::open(Some(Path::new(REPORT))).unwrap_or_default(),
    };
    show(&report, &args.report, file)
}

/// The defaults of `swiftcache replay`.
#[derive(Parser)]
struct Defaults {
    #[command(flatten)]
    node: NodeArgs,
}

fn chat() -> Result<Trace, TraceError> {
    trace::read(BUNDLED_CHAT, "a bundled chat service", &Options::default())
}

/// The directory of the demo's socket, which another terminal must find.
fn directory() -> PathBuf {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
    let parent = runtime.map_or_else(|| PathBuf::from("/tmp"), PathBuf::from);
    parent.join("swiftcache-demo")
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiftcache_replay::trace::unbounded_hits;

    #[test]
    fn the_bundled_chat_is_sound_and_repeats_itself() {
        let requests = chat().unwrap().requests;
        assert!(requests.len() > 300, "{}", requests.len());
        let (hits, all) = unbounded_hits(&requests);
        assert!(hits * 2 > all, "{hits} of {all}");
    }

    #[test]
    fn the_demo_goes_with_the_defaults() {
        let node = Defaults::parse_from(["demo"]).node;
        assert_eq!(node.donors, 3);
    }
}
