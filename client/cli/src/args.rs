//! Arguments that several commands share.

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use swiftcache_proto::size::size;
use swiftcache_replay::{plan::Lending, sizing::SLAB_BYTES};

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

/// `--donor` of plan and replay: what each donor lends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Donor(pub(super) Lending);

impl FromStr for Donor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "elastic" => Ok(Self(Lending::Elastic)),
            "idle" => Ok(Self(Lending::Idle)),
            bytes => match size(bytes) {
                Ok(bytes) if bytes >= SLAB_BYTES => Ok(Self(Lending::Fixed(bytes))),
                _ => Err(format!(
                    "{text:?} is no donor; takes a size of at least 1GiB, elastic or idle"
                )),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_donor_is_a_size_or_a_kind() {
        let donor = |text: &str| text.parse::<Donor>();
        assert_eq!(donor("40GB"), Ok(Donor(Lending::Fixed(40_000_000_000))));
        assert_eq!(donor("elastic"), Ok(Donor(Lending::Elastic)));
        assert_eq!(donor("idle"), Ok(Donor(Lending::Idle)));
        for text in ["", "0", "12", "-1GB", "lots"] {
            assert!(donor(text).unwrap_err().contains("elastic"), "{text}");
        }
    }
}
