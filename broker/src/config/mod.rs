//! The broker's settings: defaults, then the TOML file, then `SWIFTCACHE_*` variables, then flags. One flat
//! table: the key `drain_ms` is the variable `SWIFTCACHE_DRAIN_MS` and the flag `--drain-ms`.

mod flags;
mod weights;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

use figment::{
    Figment,
    error::Kind,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Deserializer, Serialize};
use swiftcache_proto::convert::MAX_DRAIN_MS;

pub use flags::{Flags, Settings};

use crate::{core::CoreConfig, error::BrokerError, probe::ProbeChoice, traces};

/// Before every variable's name.
const ENV_PREFIX: &str = "SWIFTCACHE_";

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Every setting, checked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The Unix socket that Broker, Admin, health and reflection are served on.
    pub socket: PathBuf,
    /// The Unix socket that passes descriptors; beside `socket` when not set.
    pub fd_socket: Option<PathBuf>,
    /// The group that may connect, by name or number; the broker's own when not set.
    #[serde(deserialize_with = "text_or_number")]
    pub socket_group: Option<String>,
    /// Where the ledger lies; the directory of `socket` when not set.
    pub state_dir: Option<PathBuf>,
    /// A TCP address for Admin, health and reflection; none when not set.
    pub listen_tcp: Option<SocketAddr>,
    /// The server's certificate chain, PEM.
    pub tls_cert: Option<PathBuf>,
    /// The server's key, PEM.
    pub tls_key: Option<PathBuf>,
    /// Who signs the certificates of clients, PEM.
    pub tls_client_ca: Option<PathBuf>,
    /// A TCP address for Prometheus; none when not set.
    pub metrics_listen: Option<SocketAddr>,
    /// An OpenTelemetry collector that is sent a span of every RPC; none when not set.
    pub otlp_endpoint: Option<String>,
    /// Where devices come from.
    pub probe: ProbeChoice,
    /// The simulated node: a bundled one by name, or a file.
    pub topology: Option<String>,
    /// How long lessees may take to move hot blocks away when a donor names no time, milliseconds.
    pub drain_ms: u32,
    /// How long a lookup keeps other sessions' slots from being written, milliseconds.
    pub pin_ms: u32,
    /// How long an unmet demand for slabs counts against those above their fair share, milliseconds.
    pub wait_ms: u32,
    /// Sessions at once.
    pub max_sessions: u32,
    /// Regions at once.
    pub max_regions: u32,
    /// Leases at once.
    pub max_leases: u32,
    /// Blocks in the index.
    pub max_blocks: u64,
    /// Bytes one tenant's namespace may lease; unlimited when not set.
    pub namespace_quota_bytes: Option<u64>,
    /// Bytes one session may lease; unlimited when not set.
    pub session_quota_bytes: Option<u64>,
    /// Shares of namespaces when there is not enough for all: "name=weight,..."; 1 where not named.
    pub namespace_weights: Option<String>,
    /// How long RPCs in flight may take to finish on SIGTERM, milliseconds.
    pub shutdown_ms: u64,
    /// What is logged, in the syntax of tracing's EnvFilter.
    pub log: String,
    /// How log lines look.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let core = CoreConfig::default();
        Self {
            socket: "/run/swiftcache/broker.sock".into(),
            fd_socket: None,
            socket_group: None,
            state_dir: None,
            listen_tcp: None,
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            metrics_listen: None,
            otlp_endpoint: None,
            probe: ProbeChoice::Auto,
            topology: None,
            drain_ms: core.default_drain_ms,
            pin_ms: core.pin_ms,
            wait_ms: core.wait_ms,
            max_sessions: 1_024,
            max_regions: 65_536,
            max_leases: 262_144,
            max_blocks: core.max_blocks,
            namespace_quota_bytes: core.namespace_quota_bytes,
            session_quota_bytes: core.session_quota_bytes,
            namespace_weights: None,
            shutdown_ms: 5_000,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

impl Config {
    /// Merges the layers and checks the result. `file` is the TOML file, if any.
    ///
    /// # Errors
    /// [`BrokerError::Config`] naming the key, its source and the problem.
    pub fn load(file: Option<&Path>, flags: &Settings) -> Result<Self, BrokerError> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(file) = file {
            // Read here: figment takes a missing file for an empty one.
            let text = std::fs::read_to_string(file).map_err(|error| {
                BrokerError::Config(format!("--config {}: {error}", file.display()))
            })?;
            figment = figment.merge(Toml::string(&text));
        }
        let keys = keys();
        let known: Vec<&str> = keys.iter().map(String::as_str).collect();
        let config: Self = figment
            // Only our own keys: Kubernetes sets variables of this prefix for a service of this name.
            .merge(Env::prefixed(ENV_PREFIX).only(&known))
            .merge(Serialized::defaults(flags))
            .extract()
            .map_err(|error| BrokerError::Config(explain(error, file)))?;
        config.check().map_err(BrokerError::Config)?;
        Ok(config)
    }

    /// The merged settings as TOML.
    ///
    /// # Errors
    /// When a value has no TOML form.
    pub fn to_toml(&self) -> Result<String, BrokerError> {
        toml::to_string(self).map_err(|error| BrokerError::Config(error.to_string()))
    }

    /// The directory of the sockets.
    pub fn socket_dir(&self) -> &Path {
        match self.socket.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => directory,
            _ => Path::new("."),
        }
    }

    /// Where descriptors are passed: `broker-fd.sock` beside `broker.sock`.
    pub fn fd_socket(&self) -> PathBuf {
        self.fd_socket.clone().unwrap_or_else(|| {
            let stem = self.socket.file_stem().unwrap_or_default();
            let mut name = stem.to_owned();
            name.push("-fd.sock");
            self.socket.with_file_name(name)
        })
    }

    /// Where the ledger lies.
    pub fn state_dir(&self) -> &Path {
        self.state_dir.as_deref().unwrap_or(self.socket_dir())
    }

    fn check(&self) -> Result<(), String> {
        /// The kernel's limit on a Unix socket's path, bytes, without the terminating zero.
        const MAX_SOCKET_PATH: usize = 107;
        for (key, path) in [("socket", &self.socket), ("fd_socket", &self.fd_socket())] {
            let bytes = path.as_os_str().len();
            if !(1..=MAX_SOCKET_PATH).contains(&bytes) {
                return Err(format!(
                    "{key}: is {bytes} bytes; takes 1 to {MAX_SOCKET_PATH}"
                ));
            }
        }
        if self.socket == self.fd_socket() {
            return Err("fd_socket: is the same as socket".to_owned());
        }
        let tls = [&self.tls_cert, &self.tls_key, &self.tls_client_ca];
        let given = tls.iter().filter(|path| path.is_some()).count();
        if given != 0 && given != tls.len() {
            return Err("tls_cert, tls_key, tls_client_ca: takes all three or none".to_owned());
        }
        match self.listen_tcp {
            None if given != 0 => {
                return Err("tls_cert: is of no use without listen_tcp".to_owned());
            }
            Some(address) if given == 0 && !address.ip().is_loopback() => {
                return Err(format!(
                    "listen_tcp: {address} is beyond loopback; takes tls_cert, tls_key and tls_client_ca \
                     with it (mutual TLS)"
                ));
            }
            _ => {}
        }
        if let Some(endpoint) = &self.otlp_endpoint {
            traces::check(endpoint).map_err(|problem| format!("otlp_endpoint: {problem}"))?;
        }
        if self.probe == ProbeChoice::Nvml && self.topology.is_some() {
            return Err("topology: is of no use with probe = \"nvml\"".to_owned());
        }
        within("drain_ms", self.drain_ms.into(), 1, MAX_DRAIN_MS.into())?;
        within("pin_ms", self.pin_ms.into(), 1, MAX_DRAIN_MS.into())?;
        within("wait_ms", self.wait_ms.into(), 0, MAX_DRAIN_MS.into())?;
        self.weights()?;
        within("max_blocks", self.max_blocks, 1, 1 << 32)?;
        within("shutdown_ms", self.shutdown_ms, 0, MAX_DRAIN_MS.into())?;
        for (key, limit) in [
            ("max_sessions", self.max_sessions),
            ("max_regions", self.max_regions),
            ("max_leases", self.max_leases),
        ] {
            within(key, limit.into(), 1, 1 << 24)?;
        }
        tracing_subscriber::EnvFilter::try_new(&self.log)
            .map(drop)
            .map_err(|error| format!("log: {:?}: {error}", self.log))
    }
}

/// A group in a file or variable may be a bare number.
fn text_or_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Text(String),
        Number(u32),
    }
    let either = Option::<Either>::deserialize(deserializer)?;
    Ok(either.map(|either| match either {
        Either::Text(text) => text,
        Either::Number(number) => number.to_string(),
    }))
}

fn within(key: &str, value: u64, least: u64, most: u64) -> Result<(), String> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(format!("{key}: is {value}; takes {least} to {most}"))
}

/// Every key there is: those of the flags, which are all of [`Config`]'s.
fn keys() -> Vec<String> {
    <Settings as clap::CommandFactory>::command()
        .get_arguments()
        .map(|argument| argument.get_id().to_string())
        .collect()
}

/// "key: problem (where it comes from)", one a line.
fn explain(errors: figment::Error, file: Option<&Path>) -> String {
    let lines = errors.into_iter().map(|error| {
        let key = match (&error.kind, error.path.is_empty()) {
            (Kind::UnknownField(key, _), _) => key.clone(),
            (_, false) => error.path.join("."),
            (_, true) => "file".to_owned(),
        };
        let problem = match &error.kind {
            Kind::UnknownField(..) => "is no setting".to_owned(),
            kind => kind.to_string(),
        };
        let origin = match error
            .metadata
            .as_ref()
            .map(|metadata| metadata.name.as_ref())
        {
            Some(name) if name.contains("environment") => {
                format!("{ENV_PREFIX}{}", key.to_uppercase())
            }
            Some(name) if name.contains("TOML") => match file {
                Some(file) => file.display().to_string(),
                None => name.to_owned(),
            },
            _ => match file {
                Some(file) => file.display().to_string(),
                None => "flags".to_owned(),
            },
        };
        format!("{key}: {problem} ({origin})")
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests;
