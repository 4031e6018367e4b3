//! The broker's settings. They come from the defaults, the TOML file, `SWIFTCACHE_*` variables and flags; the later one
//! wins. They are one flat table: the key `drain_ms` is the variable `SWIFTCACHE_DRAIN_MS` and the flag `--drain-ms`.

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
use swiftcache_proto::{convert::MAX_DRAIN_MS, size::size};

pub use flags::{Flags, Settings};

use crate::{core::CoreConfig, error::BrokerError, probe::ProbeChoice, traces};

/// The prefix of all variables.
const ENV_PREFIX: &str = "SWIFTCACHE_";

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// All settings. [`Config::load`] has checked them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The Unix socket for Broker, Admin, health and reflection.
    pub socket: PathBuf,
    /// The Unix socket that passes descriptors. None: beside `socket`.
    pub fd_socket: Option<PathBuf>,
    /// The group whose members may connect, by name or number. None: the broker's own group.
    #[serde(deserialize_with = "text_or_number")]
    pub socket_group: Option<String>,
    /// The group whose members may drain, undrain, evict and set quotas, by name or number. None: only root and the
    /// broker's own user may.
    #[serde(deserialize_with = "text_or_number")]
    pub admin_group: Option<String>,
    /// The directory of the ledger. None: the directory of `socket`.
    pub state_dir: Option<PathBuf>,
    /// The TCP address for Admin, health and reflection. None: they are not served over TCP.
    pub listen_tcp: Option<SocketAddr>,
    /// The server's certificate chain, PEM.
    pub tls_cert: Option<PathBuf>,
    /// The server's key, PEM.
    pub tls_key: Option<PathBuf>,
    /// The certificate authority that signs the certificates of clients, PEM.
    pub tls_client_ca: Option<PathBuf>,
    /// The TCP address for Prometheus. None: metrics are not served.
    pub metrics_listen: Option<SocketAddr>,
    /// The OpenTelemetry collector that gets a span of every RPC. None: no spans are sent.
    pub otlp_endpoint: Option<String>,
    /// How the broker finds devices.
    pub probe: ProbeChoice,
    /// The simulated node: the name of a bundled topology, or a file.
    pub topology: Option<String>,
    /// How long borrowers may take to move hot blocks away if the donor gives no time, milliseconds.
    pub drain_ms: u32,
    /// How long a lookup protects the found slots of other sessions from being overwritten, milliseconds.
    pub pin_ms: u32,
    /// How long an unmet demand for slabs counts against sessions above their fair share, milliseconds.
    pub wait_ms: u32,
    /// How long what a borrower that is gone has published is kept for its heir, milliseconds; 0: not at all.
    pub estate_ttl_ms: u32,
    /// The most sessions at a time.
    pub max_sessions: u32,
    /// The most regions at a time.
    pub max_regions: u32,
    /// The most leases at a time.
    pub max_leases: u32,
    /// The most blocks in the index.
    pub max_blocks: u64,
    /// The most bytes that one tenant's namespace may lease: a number, or a text such as "64GiB". None: unlimited.
    #[serde(deserialize_with = "optional_size")]
    pub namespace_quota_bytes: Option<u64>,
    /// The most bytes that one session may lease, likewise. None: unlimited.
    #[serde(deserialize_with = "optional_size")]
    pub session_quota_bytes: Option<u64>,
    /// Weights of namespaces, which decide their shares of what their tenant has when there is not enough for all:
    /// "name=weight,...". A namespace that is not named has weight 1.
    pub namespace_weights: Option<String>,
    /// Weights of users and their labels: "1000=weight,1000/batch=weight,...". Who is not named has weight 1.
    pub tenant_weights: Option<String>,
    /// How long RPCs in flight may take to finish after SIGTERM, milliseconds.
    pub shutdown_ms: u64,
    /// The log filter, in the syntax of tracing's EnvFilter.
    pub log: String,
    /// The format of log lines.
    pub log_format: LogFormat,
}

impl Default for Config {
    fn default() -> Self {
        let core = CoreConfig::default();
        Self {
            socket: "/run/swiftcache/broker.sock".into(),
            fd_socket: None,
            socket_group: None,
            admin_group: None,
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
            estate_ttl_ms: core.estate_ttl_ms,
            max_sessions: limit(core.max_sessions),
            max_regions: limit(core.max_regions),
            max_leases: limit(core.max_leases),
            max_blocks: core.max_blocks,
            namespace_quota_bytes: core.namespace_quota_bytes,
            session_quota_bytes: core.session_quota_bytes,
            namespace_weights: None,
            tenant_weights: None,
            shutdown_ms: 5_000,
            log: "info".to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

/// The longest that anything is kept for an heir, milliseconds: a week.
const MAX_ESTATE_MS: u64 = 7 * 24 * 3_600 * 1_000;

/// A limit of the core as a setting.
fn limit(core: usize) -> u32 {
    u32::try_from(core).unwrap_or(u32::MAX)
}

impl Config {
    /// Merges defaults, file, environment and flags, and checks the result. `file` is the TOML file, if there is one.
    ///
    /// # Errors
    /// [`BrokerError::Config`], which names the key, its source and the problem.
    pub fn load(file: Option<&Path>, flags: &Settings) -> Result<Self, BrokerError> {
        let mut figment = Figment::from(Serialized::defaults(Self::default()));
        if let Some(file) = file {
            // Read the file here, because figment treats a missing file like an empty one.
            let text = std::fs::read_to_string(file).map_err(|error| {
                BrokerError::Config(format!("--config {}: {error}", file.display()))
            })?;
            figment = figment.merge(Toml::string(&text));
        }
        let keys = keys();
        let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        if let Some(problem) = mistyped(variables, &keys) {
            return Err(BrokerError::Config(problem));
        }
        let known: Vec<&str> = keys.iter().map(String::as_str).collect();
        let config: Self = figment
            // Take only our own keys, because Kubernetes sets variables with this prefix for a service of this name.
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

    /// The socket that passes descriptors. By default it is `broker-fd.sock` beside `broker.sock`.
    pub fn fd_socket(&self) -> PathBuf {
        self.fd_socket.clone().unwrap_or_else(|| {
            let stem = self.socket.file_stem().unwrap_or_default();
            let mut name = stem.to_owned();
            name.push("-fd.sock");
            self.socket.with_file_name(name)
        })
    }

    /// The directory of the ledger.
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
        within("estate_ttl_ms", self.estate_ttl_ms.into(), 0, MAX_ESTATE_MS)?;
        self.namespace_weights()?;
        self.tenant_weights()?;
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

/// A number of bytes, or a text with a unit.
fn optional_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Text(String),
    }
    match Option::<Either>::deserialize(deserializer)? {
        None => Ok(None),
        Some(Either::Number(bytes)) => Ok(Some(bytes)),
        Some(Either::Text(text)) => size(&text).map(Some).map_err(serde::de::Error::custom),
    }
}

/// The first variable that is no setting and nearly one: whoever set it believes that it holds. Others with the prefix belong
/// to engines and tools, or are Kubernetes' for a service of this name.
fn mistyped(variables: impl Iterator<Item = String>, keys: &[String]) -> Option<String> {
    /// Variables that are no settings.
    const OTHERS: [&str; 3] = ["config", "libnvml", "libcuda"];
    let mut problems: Vec<String> = variables
        .filter_map(|variable| {
            let key = variable.strip_prefix(ENV_PREFIX)?.to_ascii_lowercase();
            if keys.contains(&key) || OTHERS.contains(&key.as_str()) {
                return None;
            }
            let distance = |known: &&String| strsim::damerau_levenshtein(&key, known);
            let nearest = keys.iter().min_by_key(distance)?;
            let near = distance(&nearest) <= (nearest.len() / 4).min(2);
            let meant = nearest.to_ascii_uppercase();
            near.then(|| format!("{variable}: is no setting; {ENV_PREFIX}{meant} is"))
        })
        .collect();
    problems.sort();
    problems.into_iter().next()
}

fn within(key: &str, value: u64, least: u64, most: u64) -> Result<(), String> {
    if (least..=most).contains(&value) {
        return Ok(());
    }
    Err(format!("{key}: is {value}; takes {least} to {most}"))
}

/// All keys. There is a flag for each key of [`Config`].
fn keys() -> Vec<String> {
    <Settings as clap::CommandFactory>::command()
        .get_arguments()
        .map(|argument| argument.get_id().to_string())
        .collect()
}

/// The problems, one on each line: "key: problem (source)".
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
