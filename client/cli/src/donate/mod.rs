//! `swiftcache donate`.

mod args;
mod disk;
mod explain;
mod lend;

use swiftcache_client::session::SessionConfig;

use super::CliError;
pub(super) use args::DonateArgs;
pub(super) use explain::observation;

pub(super) fn run(args: &DonateArgs) -> Result<(), CliError> {
    args.check()?;
    if args.explain {
        return explain::explain_all(args);
    }
    let interrupt = super::interrupt()?;
    let session = SessionConfig {
        socket: args.socket.socket.clone(),
        name: args.name.clone(),
        tenant: args.tenant.clone(),
    };
    if let (Some(disk), Some(path)) = (args.device.disk(), &args.path) {
        return disk::keep_on_disk(args, session, disk, path, &interrupt);
    }
    lend::lend(args, session, &interrupt)
}
