//! The command line.

use std::{net::SocketAddr, path::PathBuf};

use clap::Parser;
use serde::Serialize;
use swiftcache_proto::size::size;

use super::LogFormat;
use crate::probe::ProbeChoice;

/// The node's broker: tracks idle HBM, leases it out, and indexes the KV blocks kept in it.
///
/// Every setting can also be in the file given by --config (its name with underscores) or in the environment
/// (SWIFTCACHE_ and its name in capitals). Flags win over the environment, the environment over the file, the
/// file over the defaults. --print-config shows the result.
#[derive(Debug, Parser)]
#[command(name = "swiftcache-broker", version, max_term_width = 110)]
pub struct Flags {
    /// Read settings from this TOML file
    #[arg(long, value_name = "FILE", env = "SWIFTCACHE_CONFIG")]
    pub config: Option<PathBuf>,

    /// Print the merged settings as TOML and exit
    #[arg(long)]
    pub print_config: bool,

    /// Check the settings, the topology, groups and certificates that they name, and exit with status 0 if they are good, 2 if
    /// not
    #[arg(long, conflicts_with = "print_config")]
    pub check_config: bool,

    /// The settings.
    #[command(flatten)]
    pub settings: Settings,
}

/// One flag for each setting. A setting without its flag comes from the environment, the file or the defaults.
#[derive(Clone, Debug, Default, Parser, Serialize)]
pub struct Settings {
    /// Unix socket for gRPC [default: /run/swiftcache/broker.sock]
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,

    /// Unix socket that passes file descriptors [default: broker-fd.sock beside the socket]
    #[arg(long, value_name = "PATH")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fd_socket: Option<PathBuf>,

    /// Group whose members may connect [default: the broker's own group]
    #[arg(long, value_name = "NAME|GID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<String>,

    /// Group whose members may drain, undrain, evict and set quotas, beside root and the broker's own user
    /// [default: nobody]
    #[arg(long, value_name = "NAME|GID")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin_group: Option<String>,

    /// Directory of the ledger [default: the socket's directory]
    #[arg(long, value_name = "DIR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,

    /// Also serve Admin, health and reflection on this TCP address; other than loopback only with the tls flags
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen_tcp: Option<SocketAddr>,

    /// Certificate chain of the TCP server, PEM
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,

    /// Key of the TCP server, PEM
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,

    /// Certificate authority that must have signed the certificates of TCP clients, PEM
    #[arg(long, value_name = "FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_client_ca: Option<PathBuf>,

    /// Serve Prometheus metrics on this TCP address, at /metrics
    #[arg(long, value_name = "ADDR:PORT")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metrics_listen: Option<SocketAddr>,

    /// Send a span of every RPC to this OpenTelemetry collector (OTLP over gRPC), for example http://127.0.0.1:4317
    #[arg(long, value_name = "URL")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otlp_endpoint: Option<String>,

    /// How the broker finds devices [default: auto]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub probe: Option<ProbeChoice>,

    /// Simulate this node: hgx-8, pcie-4, or a TOML file
    #[arg(long, value_name = "NAME|FILE")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<String>,

    /// Time that borrowers have to move hot blocks away if the donor gives none, milliseconds [default: 5000]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drain_ms: Option<u32>,

    /// Time that a lookup protects the found slots of other sessions from being overwritten, milliseconds
    /// [default: 10000]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pin_ms: Option<u32>,

    /// Time that an unmet demand counts against sessions above their fair share, milliseconds [default: 2000]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_ms: Option<u32>,

    /// Time that the published blocks of a borrower that is gone are kept for its heir, milliseconds; 0: not at all
    /// [default: 600000]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estate_ttl_ms: Option<u32>,

    /// The most sessions at a time [default: 1024]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_sessions: Option<u32>,

    /// The most regions at a time [default: 65536]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_regions: Option<u32>,

    /// The most leases at a time [default: 262144]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_leases: Option<u32>,

    /// The most blocks in the index [default: 16777216]
    #[arg(long, value_name = "N")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_blocks: Option<u64>,

    /// The most bytes that one tenant's namespace may lease, e.g. 64GiB [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_quota_bytes: Option<u64>,

    /// The most bytes that one session may lease, e.g. 64GiB [default: unlimited]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_quota_bytes: Option<u64>,

    /// Weights of namespaces, which decide their shares when there is not enough for all, each 1 to 1000
    /// [default: 1 each]
    #[arg(long, value_name = "NAME=WEIGHT,...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_weights: Option<String>,

    /// Shares of users, and of the labels of one, when there is not enough for all: UID=3,UID/LABEL=2 [default: 1 each]
    #[arg(long, value_name = "TENANT=WEIGHT,...")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant_weights: Option<String>,

    /// Time that RPCs in flight have to finish after SIGTERM, milliseconds [default: 5000]
    #[arg(long, value_name = "MS")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shutdown_ms: Option<u64>,

    /// The log level (error, warn, info, debug, trace) or a filter like swiftcache_broker=debug [default: info]
    #[arg(long, value_name = "FILTER")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<String>,

    /// The format of log lines [default: text]
    #[arg(long, value_enum)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
}
