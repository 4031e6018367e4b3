//! The broker's Admin service, asked from synchronous code.

use std::{error::Error as _, path::Path};

use swiftcache_proto::{
    domain::{DeviceUuid, Medium},
    v1::{self, admin_client::AdminClient},
};
use tokio::runtime::Runtime;
use tonic::{
    Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use super::{CliError, Naming};
use swiftcache_client::session::is_lost;

/// The longest an answer may take.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// A connection to Admin. Connects again by itself after a broker restart.
pub(super) struct Admin {
    runtime: Runtime,
    client: AdminClient<Channel>,
    place: Place,
}

/// Where the broker is.
struct Place {
    name: String,
    naming: Naming,
}

impl Place {
    fn absent(&self, problem: String) -> CliError {
        CliError::NoBroker {
            place: self.name.clone(),
            problem,
            naming: self.naming,
        }
    }
}

/// The files of a connection with certificates, PEM.
pub(super) struct Tls<'a> {
    pub(super) ca: &'a Path,
    pub(super) cert: &'a Path,
    pub(super) key: &'a Path,
}

/// Everything Admin tells in one go.
pub(super) struct Snapshot {
    pub(super) node: v1::GetNodeResponse,
    pub(super) sessions: Vec<v1::SessionStatus>,
    pub(super) regions: Vec<v1::RegionStatus>,
    pub(super) leases: Vec<v1::LeaseStatus>,
    pub(super) namespaces: Vec<v1::NamespaceStatus>,
}

/// The topology of a node that the broker simulates; nothing for a node of real GPUs.
pub(super) fn simulated(node: &v1::GetNodeResponse) -> Option<&str> {
    let topology = node.probe.strip_prefix("simulated")?;
    Some(topology.trim_matches([' ', '(', ')']))
}

/// Where the devices come from. Nobody should take a simulated GPU for a real one.
pub(super) fn source(node: &v1::GetNodeResponse) -> String {
    match simulated(node) {
        Some(topology) => format!("SIMULATED ({topology})"),
        None => node.probe.clone(),
    }
}

/// Whether a device is a NUMA node's host memory.
pub(super) fn is_host_memory(uuid: &str) -> bool {
    uuid.parse::<DeviceUuid>()
        .is_ok_and(|uuid| uuid.medium() == Medium::Host)
}

/// A GPU that the broker does not use, and why.
pub(super) fn left_out(gpu: &v1::LeftOutDevice) -> String {
    let uuid = match gpu.uuid.as_str() {
        "" => String::new(),
        uuid => format!(" ({uuid})"),
    };
    format!("GPU {}{uuid} is left out: {}", gpu.ordinal, gpu.reason)
}

impl Admin {
    pub(super) fn connect(socket: &Path) -> Result<Self, CliError> {
        let place = Place {
            name: socket.display().to_string(),
            naming: Naming::Socket,
        };
        let absolute =
            std::path::absolute(socket).map_err(|error| place.absent(error.to_string()))?;
        let endpoint = Endpoint::try_from(format!("unix://{}", absolute.display()))
            .map_err(|error| place.absent(error.to_string()))?;
        Self::open(endpoint, place)
    }

    /// Connects over TCP, with a certificate that the broker asks for.
    pub(super) fn connect_tls(address: &str, tls: &Tls<'_>) -> Result<Self, CliError> {
        let read = |flag: &str, path: &Path| {
            let refuse = |error| CliError::Usage(format!("{flag}: {}: {error}", path.display()));
            std::fs::read(path).map_err(refuse)
        };
        let ca = Certificate::from_pem(read("--tls-ca", tls.ca)?);
        let (cert, key) = (read("--tls-cert", tls.cert)?, read("--tls-key", tls.key)?);
        let refuse = |problem: &str| CliError::Usage(format!("--address: {address:?}: {problem}"));
        if !address.starts_with("https://") {
            return Err(refuse("takes https://HOST:PORT"));
        }
        let config = ClientTlsConfig::new()
            .ca_certificate(ca)
            .identity(Identity::from_pem(cert, key));
        let endpoint = Endpoint::try_from(address.to_owned())
            .map_err(|error| refuse(&reason(&error)))?
            .tls_config(config)
            .map_err(|error| refuse(&reason(&error)))?;
        let place = Place {
            name: address.to_owned(),
            naming: Naming::Address,
        };
        Self::open(endpoint, place)
    }

    fn open(endpoint: Endpoint, place: Place) -> Result<Self, CliError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CliError::Failed(format!("cannot start: {error}")))?;
        let endpoint = endpoint.timeout(LIMIT).connect_timeout(LIMIT);
        let channel = runtime
            .block_on(endpoint.connect())
            .map_err(|error| place.absent(reason(&error)))?;
        Ok(Self {
            runtime,
            // The broker is trusted, and its lists grow with the node: a quarter of a million leases are 30 MB.
            client: AdminClient::new(channel).max_decoding_message_size(usize::MAX),
            place,
        })
    }

    fn refused(&self, status: &Status) -> CliError {
        if is_lost(status) {
            let said = || status.message().to_owned();
            let problem = status.source().map_or_else(said, reason);
            return self.place.absent(problem);
        }
        let (code, message) = (status.code(), status.message());
        CliError::Failed(format!("the broker refused: {message} ({code})"))
    }

    /// Asks, and asks once more over a new connection when the old one is dead: that is noticed only while somebody
    /// asks. Every question may be asked twice.
    fn ask<T>(
        &self,
        question: impl AsyncFn(AdminClient<Channel>) -> Result<T, Status>,
    ) -> Result<T, CliError> {
        let answer = self.runtime.block_on(async {
            match question(self.client.clone()).await {
                Err(status) if status.source().is_some() => question(self.client.clone()).await,
                answer => answer,
            }
        });
        answer.map_err(|status| self.refused(&status))
    }

    pub(super) fn node(&self) -> Result<v1::GetNodeResponse, CliError> {
        self.ask(async |mut client| Ok(client.get_node(v1::GetNodeRequest {}).await?.into_inner()))
    }

    pub(super) fn regions(&self) -> Result<Vec<v1::RegionStatus>, CliError> {
        self.ask(async |mut client| all_regions(&mut client).await)
    }

    pub(super) fn namespaces(&self) -> Result<Vec<v1::NamespaceStatus>, CliError> {
        self.ask(async |mut client| all_namespaces(&mut client).await)
    }

    /// The newest events, at most `limit`, oldest first.
    pub(super) fn events(&self, limit: u32) -> Result<Vec<v1::EventRecord>, CliError> {
        self.ask(async |mut client| {
            let request = v1::ListEventsRequest {
                limit,
                ..v1::ListEventsRequest::default()
            };
            Ok(client.list_events(request).await?.into_inner().events)
        })
    }

    /// Events as they are asked for.
    pub(super) fn list_events(
        &self,
        request: &v1::ListEventsRequest,
    ) -> Result<Vec<v1::EventRecord>, CliError> {
        self.ask(async |mut client| {
            Ok(client
                .list_events(request.clone())
                .await?
                .into_inner()
                .events)
        })
    }

    /// Hands over what the broker says of its index, until `heard` returns false or the broker hangs up.
    pub(super) fn watch(
        &self,
        request: v1::WatchRequest,
        mut heard: impl FnMut(v1::WatchResponse) -> Result<bool, CliError>,
    ) -> Result<(), CliError> {
        self.runtime.block_on(async {
            let refused = |status| self.refused(&status);
            let stream = self.client.clone().watch(request).await;
            let mut stream = stream.map_err(refused)?.into_inner();
            while let Some(message) = stream.message().await.map_err(refused)? {
                if !heard(message)? {
                    return Ok(());
                }
            }
            Err(self.place.absent("it has ended the stream".to_owned()))
        })
    }

    /// Drains what the request names.
    pub(super) fn drain(&self, request: &v1::DrainRequest) -> Result<v1::DrainResponse, CliError> {
        self.ask(async |mut client| Ok(client.drain(request.clone()).await?.into_inner()))
    }

    /// Ends a drain.
    pub(super) fn undrain(&self, request: &v1::UndrainRequest) -> Result<(), CliError> {
        self.ask(async |mut client| client.undrain(request.clone()).await.map(drop))
    }

    /// Drops the estates that the request names.
    pub(super) fn forget(
        &self,
        request: &v1::ForgetRequest,
    ) -> Result<v1::ForgetResponse, CliError> {
        self.ask(async |mut client| Ok(client.forget(request.clone()).await?.into_inner()))
    }

    /// Evicts what the request names.
    pub(super) fn evict(&self, request: &v1::EvictRequest) -> Result<v1::EvictResponse, CliError> {
        self.ask(async |mut client| Ok(client.evict(request.clone()).await?.into_inner()))
    }

    /// Sets a quota.
    pub(super) fn set_quota(
        &self,
        request: &v1::SetQuotaRequest,
    ) -> Result<v1::SetQuotaResponse, CliError> {
        self.ask(async |mut client| Ok(client.set_quota(request.clone()).await?.into_inner()))
    }

    /// What a withdrawal would do.
    pub(super) fn preview(
        &self,
        request: &v1::PreviewWithdrawRequest,
    ) -> Result<v1::PreviewWithdrawResponse, CliError> {
        self.ask(async |mut client| {
            let answer = client.preview_withdraw(request.clone()).await?;
            Ok(answer.into_inner())
        })
    }

    /// Begins, changes or ends a hold.
    pub(super) fn hold(&self, request: &v1::HoldRequest) -> Result<(), CliError> {
        self.ask(async |mut client| client.hold(request.clone()).await.map(drop))
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, CliError> {
        self.ask(async |mut client| {
            Ok(Snapshot {
                node: client.get_node(v1::GetNodeRequest {}).await?.into_inner(),
                sessions: all_sessions(&mut client).await?,
                regions: all_regions(&mut client).await?,
                leases: all_leases(&mut client).await?,
                namespaces: all_namespaces(&mut client).await?,
            })
        })
    }
}

/// Every page of the sessions. A broker that knows no pages has everything in the first.
async fn all_sessions(client: &mut AdminClient<Channel>) -> Result<Vec<v1::SessionStatus>, Status> {
    let mut request = v1::ListSessionsRequest::default();
    let mut all = Vec::new();
    loop {
        let page = client.list_sessions(request.clone()).await?.into_inner();
        all.extend(page.sessions);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

/// The same for regions.
async fn all_regions(client: &mut AdminClient<Channel>) -> Result<Vec<v1::RegionStatus>, Status> {
    let mut request = v1::ListRegionsRequest::default();
    let mut all = Vec::new();
    loop {
        let page = client.list_regions(request.clone()).await?.into_inner();
        all.extend(page.regions);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

/// The same for leases.
async fn all_leases(client: &mut AdminClient<Channel>) -> Result<Vec<v1::LeaseStatus>, Status> {
    let mut request = v1::ListLeasesRequest::default();
    let mut all = Vec::new();
    loop {
        let page = client.list_leases(request.clone()).await?.into_inner();
        all.extend(page.leases);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

/// The same for namespaces.
async fn all_namespaces(
    client: &mut AdminClient<Channel>,
) -> Result<Vec<v1::NamespaceStatus>, Status> {
    let mut request = v1::ListNamespacesRequest::default();
    let mut all = Vec::new();
    loop {
        let page = client.list_namespaces(request.clone()).await?.into_inner();
        all.extend(page.namespaces);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

/// The innermost reason: what the system said, rather than "transport error".
fn reason(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
