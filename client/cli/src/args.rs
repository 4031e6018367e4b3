//! Arguments that several commands share.

use std::path::PathBuf;

use clap::Args;

/// Where the broker is.
#[derive(Args, Clone, Debug)]
pub(super) struct SocketArg {
    /// The broker's Unix socket
    #[arg(
        long,
        value_name = "PATH",
        env = "SWIFTCACHE_SOCKET",
        default_value = "/run/swiftcache/broker.sock"
    )]
    pub(super) socket: PathBuf,
}
