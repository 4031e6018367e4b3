//! `swiftcache doctor`: checks everything that sharing memory on this machine needs.

mod broker;
mod gpus;
mod host;
mod report;
mod sharing;
mod visibility;

use clap::Args;

use super::{CliError, args::SocketArg, output};
use report::Report;

/// Check what sharing HBM needs on this machine, and say what to do where something is missing
///
/// In an engine's container it checks what that engine sees, so run it there. It changes nothing and creates no
/// CUDA context.
#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
    #[command(flatten)]
    socket: SocketArg,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), CliError> {
    let mut report = Report::default();
    host::examine(&mut report);
    let answers = broker::examine(&args.socket.socket, &mut report);
    let node = answers.as_ref().map(|answers| &answers.node);
    let enumerated = gpus::examine(node, &mut report);
    visibility::examine(answers.as_ref(), enumerated.as_deref(), &mut report);
    sharing::examine(answers.as_ref(), &mut report);
    if args.json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text())?;
    }
    match report.failures() {
        0 => Ok(()),
        1 => Err(CliError::Failed("1 check failed".to_owned())),
        many => Err(CliError::Failed(format!("{many} checks failed"))),
    }
}
