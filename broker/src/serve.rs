//! Starts the broker: binds its sockets, restores the state from the ledger, and only then serves. Shuts it down too.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use http::Response;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use swiftcache_proto::{
    convert::MAX_MESSAGE_BYTES,
    domain::{Device, DeviceUuid},
    numa,
    topology::Topology,
    v1::{self, admin_server::AdminServer, broker_server::BrokerServer},
};
use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    service::Routes,
    transport::{self as tls, Server, ServerTlsConfig},
};
use tonic_health::server::HealthReporter;
use tower::{
    layer::util::{Identity, Stack},
    util::MapResponseLayer,
};

use crate::{
    authority::Operators,
    config::Config,
    core::{CoreConfig, Node, Record, State},
    error::BrokerError,
    fd_socket,
    ledger::{self, Ledger, Lock},
    listen::{
        Admission, BoundSocket, Limits, Places, bind_tcp, bind_unix, group_id, tcp_connections,
        unix_connections,
    },
    malformed,
    metrics::Metrics,
    owner::{Owner, Parts},
    probe::{Probe, ProbeChoice},
    scrape,
    service::{AdminService, BrokerService, NodeFacts},
    traces::SpanLayer,
    unread::Unread,
};

/// How often the core gets the time. Drain windows and pins may end this much too late.
const TICK: Duration = Duration::from_millis(50);
/// Ticks between two upkeeps of the metrics, which fold the samples of histograms.
const UPKEEP_TICKS: u32 = 100;
/// Ticks between two looks at processes that may have become other programs.
const LOOK_TICKS: u32 = 20;
/// The longest time of an RPC, with the arrival of its request. RPCs take microseconds.
const RPC_DEADLINE: Duration = Duration::from_secs(10);
/// The most RPCs of one connection at a time. An engine has a few.
const RPCS_PER_CONNECTION: u32 = 256;
/// HTTP/2 stream window, bytes. The largest message fits into it, so it need not wait for the window to move.
const STREAM_WINDOW: u32 = MAX_MESSAGE_BYTES as u32;
/// HTTP/2 connection window, bytes: two of the largest messages.
const CONNECTION_WINDOW: u32 = 2 * STREAM_WINDOW;
/// HTTP/2 frame size, bytes. With it, a lookup of 8,192 hashes is one frame instead of nine.
const FRAME: u32 = 256 << 10;
/// The most header bytes of one request. Ours take a few hundred.
const HEADERS: u32 = 16 << 10;
/// The most connections to the Unix socket at a time: one for each process, and some for people.
const UNIX_CONNECTIONS: usize = 4_096;
/// The most connections to the TCP address at a time, for probes and dashboards.
const TCP_CONNECTIONS: usize = 64;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most descriptors that are kept for donors at a time: enough for 1 TiB in allocations of 64 MiB.
const DESCRIPTORS: usize = 16_384;

/// A running broker.
pub struct Broker {
    owner: Arc<Owner>,
    health: HealthReporter,
    stop: CancellationToken,
    servers: JoinSet<()>,
    patience: Duration,
    tcp_address: Option<SocketAddr>,
    metrics_address: Option<SocketAddr>,
    _sockets: [BoundSocket; 2],
    _state_locks: [Lock; 2],
}

impl Broker {
    /// Starts everything and serves. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// When a file, a socket or a setting cannot be used. Then nothing is left behind.
    pub async fn start(config: &Config, probe: Arc<dyn Probe>) -> Result<Self, BrokerError> {
        let budget = descriptor_budget();
        let state_dir = config.state_dir();
        ledger::create_directory(state_dir)?;
        let what = format!("state directory {}", state_dir.display());
        // Brokers before this one lock only the file. Anybody who may write here can delete it.
        let state_locks = [
            Lock::take(state_dir.join("ledger.lock"), what.clone(), "state_dir")?,
            Lock::take_directory(state_dir, what, "state_dir")?,
        ];
        let group = config.socket_group.as_deref();
        let admins = config.admin_group.as_deref();
        let admins = admins
            .map(|name| group_id("admin_group", name))
            .transpose()?;
        let operators = Operators::new(admins.map(|group| group.as_raw()));
        let (unix, unix_socket) = bind_unix(&config.socket, group, "socket")?;
        let (descriptors, fd_socket) = bind_unix(&config.fd_socket(), group, "fd_socket")?;
        let traced = config.otlp_endpoint.is_some();
        let unread = Unread::new();
        let tcp_server = with_tls(grpc(traced, unread.clone()), config)?;
        let tcp = match config.listen_tcp {
            Some(address) => Some(bind_tcp(address, "listen_tcp").await?),
            None => None,
        };
        let scrapes = match config.metrics_listen {
            Some(address) => Some(bind_tcp(address, "metrics_listen").await?),
            None => None,
        };

        let metrics = Metrics::new().map_err(|error| BrokerError::Grpc(error.to_string()))?;
        for device in probe.devices() {
            let (uuid, name) = (&device.uuid, &device.name);
            tracing::info!(%uuid, name, bytes = device.hbm_bytes, "device");
        }
        let (state, ledger) = restore(config, state_dir, probe.as_ref())?;
        let (gone, deaths) = mpsc::unbounded_channel();
        let owner = Arc::new(Owner::new(Parts {
            state,
            ledger,
            deaths: gone,
            max_descriptors: DESCRIPTORS.min(budget / 2),
            metrics: Arc::new(metrics),
        }));
        let watched = owner.watch_restored().await;
        watched.map_err(|problem| BrokerError::Start(problem.to_string()))?;

        let facts = NodeFacts::new(
            probe.as_ref(),
            config.fd_socket().display().to_string(),
            config.drain_ms,
            config.pin_ms,
        );
        let (health, routes) = routes(&owner, probe, facts, operators, config.drain_ms).await?;
        let mut broker = Self {
            tcp_address: tcp.as_ref().and_then(|tcp| tcp.local_addr().ok()),
            metrics_address: scrapes.as_ref().and_then(|tcp| tcp.local_addr().ok()),
            owner,
            health,
            stop: CancellationToken::new(),
            servers: JoinSet::new(),
            patience: Duration::from_millis(config.shutdown_ms),
            _sockets: [unix_socket, fd_socket],
            _state_locks: state_locks,
        };
        broker.spawn_clock(deaths);
        let all = UNIX_CONNECTIONS.min(budget / 4);
        let incoming = unix_connections(
            unix,
            Admission::new(Limits {
                all,
                of_user: all / 4,
                reserved: all / 16,
            }),
        );
        let mut server = grpc(traced, unread);
        let server = server.add_routes(routes.clone());
        let stop = broker.stop.clone();
        broker.spawn("unix", async move {
            let stopped = stop.cancelled_owned();
            server.serve_with_incoming_shutdown(incoming, stopped).await
        });
        if let Some(tcp) = tcp {
            let mut server = tcp_server;
            let server = server.add_routes(routes);
            let incoming = tcp_connections(tcp, Places::new(TCP_CONNECTIONS));
            let stop = broker.stop.clone();
            broker.spawn("tcp", async move {
                let stopped = stop.cancelled_owned();
                server.serve_with_incoming_shutdown(incoming, stopped).await
            });
        }
        let (owner, stop) = (Arc::clone(&broker.owner), broker.stop.clone());
        broker
            .servers
            .spawn(fd_socket::serve(descriptors, owner, stop));
        if let Some(scrapes) = scrapes {
            let (owner, stop) = (Arc::clone(&broker.owner), broker.stop.clone());
            broker.servers.spawn(scrape::serve(scrapes, owner, stop));
        }
        Ok(broker)
    }

    /// The state's owner.
    pub fn owner(&self) -> &Arc<Owner> {
        &self.owner
    }

    /// The TCP address, if TCP is served. It has the real port, also when the setting has port 0.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp_address
    }

    /// The address of the metrics, if they are served.
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_address
    }

    /// Shuts down in good order: reports not serving, accepts no new connection, closes streams, lets RPCs in flight
    /// finish within the time in the settings, and removes the sockets. Sessions and leases stay in the ledger. Returns
    /// false if something had to be cut off.
    pub async fn drain(mut self) -> bool {
        for name in services() {
            let status = tonic_health::ServingStatus::NotServing;
            self.health.set_service_status(name, status).await;
        }
        self.stop.cancel();
        for name in services() {
            // This ends the streams of health watchers, which have already got the new status.
            self.health.clear_service_status(name).await;
        }
        let owner = Arc::clone(&self.owner);
        // All within the same time: the owner may be waiting for a disk that does not answer.
        let all = async {
            owner.close().await;
            while self.servers.join_next().await.is_some() {}
        };
        let in_time = tokio::time::timeout(self.patience, all).await.is_ok();
        if !in_time {
            tracing::warn!(
                after_ms = self.patience.as_millis(),
                "RPCs in flight were cut off"
            );
        }
        in_time
    }

    fn spawn(
        &mut self,
        name: &'static str,
        serving: impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    ) {
        self.servers.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(server = name, %error, "the gRPC server ended");
            }
        });
    }

    /// Tells the core the time, and which processes have died.
    fn spawn_clock(&mut self, mut deaths: mpsc::UnboundedReceiver<crate::core::Process>) {
        let (owner, stop) = (Arc::clone(&self.owner), self.stop.clone());
        self.servers.spawn(async move {
            let mut ticks = tokio::time::interval(TICK);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            let mut until_upkeep = UPKEEP_TICKS;
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    Some(process) = deaths.recv() => owner.process_gone(process).await,
                    _ = ticks.tick() => {
                        owner.tick().await;
                        until_upkeep -= 1;
                        if until_upkeep.is_multiple_of(LOOK_TICKS) {
                            owner.look_for_other_programs().await;
                        }
                        if until_upkeep == 0 {
                            until_upkeep = UPKEEP_TICKS;
                            owner.metrics().upkeep();
                        }
                    }
                }
            }
        });
    }
}

/// The services whose health is reported. "" stands for the whole broker.
fn services() -> [&'static str; 3] {
    ["", "swiftcache.v1.Broker", "swiftcache.v1.Admin"]
}

/// Restores the state from the ledger, and compacts the ledger.
fn restore(
    config: &Config,
    state_dir: &Path,
    probe: &dyn Probe,
) -> Result<(State, Ledger), BrokerError> {
    let since = Instant::now();
    let core = CoreConfig {
        pin_ms: config.pin_ms,
        default_drain_ms: config.drain_ms,
        wait_ms: config.wait_ms,
        estate_ttl_ms: config.estate_ttl_ms,
        pin_base: rand::random::<u64>() >> 1,
        session_quota_bytes: config.session_quota_bytes,
        namespace_quota_bytes: config.namespace_quota_bytes,
        // These cannot fail: the weights were checked when the settings were loaded.
        namespace_weights: config.namespace_weights().map_err(BrokerError::Config)?,
        tenant_weights: config.tenant_weights().map_err(BrokerError::Config)?,
        max_sessions: config.max_sessions as usize,
        max_regions: config.max_regions as usize,
        max_leases: config.max_leases as usize,
        max_blocks: config.max_blocks,
        ..CoreConfig::default()
    };
    let (mut ledger, records) = ledger::open(state_dir)?;
    let lines = records.len();
    let node = Node {
        devices: (probe.devices().iter().cloned())
            .chain(missed(&records, probe))
            .chain(numa::devices())
            .collect(),
        links: probe.links().to_vec(),
    };
    let state = match State::restore(core.clone(), node.clone(), records) {
        Ok(state) => state,
        Err(error) => {
            ledger::set_aside(ledger.path(), &error.to_string())?;
            ledger = ledger::open(state_dir)?.0;
            State::new(core, node)
        }
    };
    ledger.rewrite(&state.records());
    tracing::info!(
        ledger = %ledger.path().display(),
        lines,
        sessions = state.processes().count(),
        micros = since.elapsed().as_micros(),
        "ledger replayed"
    );
    Ok((state, ledger))
}

/// The devices that the ledger names and the probe left out. What is lent there is still mapped, and the same ledger
/// holds everybody's leases on the other devices. Such a device has no links: nobody elsewhere is lent anything of it.
///
/// A device is one of these when a GPU of its UUID was left out, or a GPU whose UUID the driver does not tell. A ledger
/// that names more devices than that is another machine's.
fn missed(records: &[Record], probe: &dyn Probe) -> Vec<Device> {
    let known = |uuid: &&DeviceUuid| probe.devices().iter().any(|device| device.uuid == **uuid);
    let named: BTreeSet<&DeviceUuid> = records.iter().filter_map(Record::device).collect();
    let mut nameless = probe.left_out().iter().filter(|gpu| gpu.uuid.is_none());
    let unknown = named.into_iter().filter(|uuid| !known(uuid));
    unknown
        .filter_map(|uuid| {
            let mut left_out = probe.left_out().iter();
            let gpu = left_out
                .find(|gpu| gpu.uuid.as_ref() == Some(uuid))
                .or_else(|| nameless.next())?;
            tracing::warn!(
                %uuid,
                reason = gpu.reason,
                "a GPU of the ledger is left out; what is lent there stays accounted for"
            );
            Some(Device {
                uuid: uuid.clone(),
                name: "left out".to_owned(),
                hbm_bytes: 0,
                ordinal: gpu.ordinal,
            })
        })
        .collect()
}

async fn routes(
    owner: &Arc<Owner>,
    probe: Arc<dyn Probe>,
    facts: NodeFacts,
    operators: Operators,
    drain_ms: u32,
) -> Result<(HealthReporter, Routes), BrokerError> {
    let (health, health_service) = tonic_health::server::health_reporter();
    for name in services() {
        let status = tonic_health::ServingStatus::Serving;
        health.set_service_status(name, status).await;
    }
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(v1::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let refused = |error: tonic_reflection::server::Error| BrokerError::Grpc(error.to_string());
    let broker = BrokerServer::new(BrokerService::new(Arc::clone(owner), facts))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let admin = AdminServer::new(AdminService::new(
        Arc::clone(owner),
        probe,
        operators,
        drain_ms,
    ))
    .max_decoding_message_size(MAX_MESSAGE_BYTES);
    let routes = Routes::new(broker)
        .add_service(admin)
        .add_service(health_service)
        .add_service(reflection().build_v1().map_err(refused)?)
        .add_service(reflection().build_v1alpha().map_err(refused)?);
    Ok((health, routes))
}

/// A server whose outermost layer makes the spans, so that a span begins before the request is read.
type TracedServer =
    Server<Stack<Unread, Stack<MapResponseLayer<Answer>, Stack<SpanLayer, Identity>>>>;

/// Changes an answer.
type Answer = fn(Response<Body>) -> Response<Body>;

fn grpc(traced: bool, unread: Unread) -> TracedServer {
    Server::builder()
        .timeout(RPC_DEADLINE)
        .concurrency_limit_per_connection(RPCS_PER_CONNECTION as usize)
        .max_concurrent_streams(RPCS_PER_CONNECTION)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .http2_max_header_list_size(HEADERS)
        .layer(SpanLayer { on: traced })
        .layer(MapResponseLayer::new(malformed::answer as Answer))
        .layer(unread)
}

/// How every part of a PEM file begins.
const BEGIN: &[u8] = b"-----BEGIN ";

/// Checks what of the settings only this machine can tell: the topology, the groups and the certificates.
///
/// # Errors
/// What a start would fail with.
pub fn check(config: &Config) -> Result<(), BrokerError> {
    if let (ProbeChoice::Auto | ProbeChoice::Simulated, Some(topology)) =
        (config.probe, &config.topology)
    {
        Topology::load(topology)?;
    }
    for (key, group) in [
        ("socket_group", &config.socket_group),
        ("admin_group", &config.admin_group),
    ] {
        if let Some(group) = group {
            group_id(key, group)?;
        }
    }
    with_tls(Server::builder(), config).map(drop)
}

/// Adds mutual TLS, if the settings ask for it.
fn with_tls<L>(server: Server<L>, config: &Config) -> Result<Server<L>, BrokerError> {
    let (Some(cert), Some(key), Some(ca)) =
        (&config.tls_cert, &config.tls_key, &config.tls_client_ca)
    else {
        return Ok(server);
    };
    let read = |name: &str, path: &Path| {
        let refuse =
            |problem: String| BrokerError::Config(format!("{name}: {}: {problem}", path.display()));
        let text = fs::read(path).map_err(|error| refuse(error.to_string()))?;
        // What is no PEM at all would be taken for an empty list of certificates.
        let begins = text.windows(BEGIN.len()).any(|window| window == BEGIN);
        begins
            .then_some(text)
            .ok_or_else(|| refuse("is no PEM file".to_owned()))
    };
    let tls = ServerTlsConfig::new()
        .timeout(HANDSHAKE)
        .identity(tls::Identity::from_pem(
            read("tls_cert", cert)?,
            read("tls_key", key)?,
        ))
        .client_ca_root(tls::Certificate::from_pem(read("tls_client_ca", ca)?));
    server
        .tls_config(tls)
        .map_err(|error| BrokerError::Config(format!("tls_cert, tls_key, tls_client_ca: {error}")))
}

/// Raises the limit of descriptors as far as this process may, and returns it.
fn descriptor_budget() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "the limit of open files cannot be raised");
    }
    let current = getrlimit(Resource::Nofile).current;
    current.map_or(usize::MAX, |limit| {
        usize::try_from(limit).unwrap_or(usize::MAX)
    })
}
