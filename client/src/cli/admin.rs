//! The broker's Admin service, asked from synchronous code.

use std::path::{Path, PathBuf};

use swiftcache_proto::v1::{self, admin_client::AdminClient};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use super::CliError;

/// The longest an answer may take.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(5);

/// A connection to Admin. Connects again by itself after a broker restart.
pub(super) struct Admin {
    runtime: Runtime,
    client: AdminClient<Channel>,
    socket: PathBuf,
}

/// Everything Admin tells in one go.
pub(super) struct Snapshot {
    pub(super) node: v1::GetNodeResponse,
    pub(super) sessions: Vec<v1::SessionStatus>,
    pub(super) regions: Vec<v1::RegionStatus>,
    pub(super) leases: Vec<v1::LeaseStatus>,
    pub(super) namespaces: Vec<v1::NamespaceStatus>,
}

impl Admin {
    pub(super) fn connect(socket: &Path) -> Result<Self, CliError> {
        let absent = |problem: String| CliError::NoBroker {
            socket: socket.to_owned(),
            problem,
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| CliError::Failed(format!("cannot start: {error}")))?;
        let absolute = std::path::absolute(socket).map_err(|error| absent(error.to_string()))?;
        let endpoint = Endpoint::try_from(format!("unix://{}", absolute.display()))
            .map_err(|error| absent(error.to_string()))?
            .timeout(LIMIT)
            .connect_timeout(LIMIT);
        let channel = runtime
            .block_on(endpoint.connect())
            .map_err(|error| absent(reason(&error)))?;
        Ok(Self {
            runtime,
            // The broker is trusted, and its lists grow with the node: a quarter of a million leases are 30 MB.
            client: AdminClient::new(channel).max_decoding_message_size(usize::MAX),
            socket: socket.to_owned(),
        })
    }

    fn refused(&self, status: &tonic::Status) -> CliError {
        match status.code() {
            tonic::Code::Unavailable => CliError::NoBroker {
                socket: self.socket.clone(),
                problem: status.message().to_owned(),
            },
            code => CliError::Failed(format!("the broker refused: {} ({code})", status.message())),
        }
    }

    pub(super) fn node(&self) -> Result<v1::GetNodeResponse, CliError> {
        let mut client = self.client.clone();
        let answer = self
            .runtime
            .block_on(client.get_node(v1::GetNodeRequest {}));
        Ok(answer.map_err(|status| self.refused(&status))?.into_inner())
    }

    pub(super) fn regions(&self) -> Result<Vec<v1::RegionStatus>, CliError> {
        let mut client = self.client.clone();
        let request = v1::ListRegionsRequest::default();
        let answer = self.runtime.block_on(client.list_regions(request));
        let answer = answer.map_err(|status| self.refused(&status))?;
        Ok(answer.into_inner().regions)
    }

    /// The newest events, at most `limit`, oldest first.
    pub(super) fn events(&self, limit: u32) -> Result<Vec<v1::EventRecord>, CliError> {
        let mut client = self.client.clone();
        let request = v1::ListEventsRequest {
            limit,
            ..v1::ListEventsRequest::default()
        };
        let answer = self.runtime.block_on(client.list_events(request));
        let answer = answer.map_err(|status| self.refused(&status))?;
        Ok(answer.into_inner().events)
    }

    pub(super) fn snapshot(&self) -> Result<Snapshot, CliError> {
        let mut client = self.client.clone();
        let all = async {
            Ok(Snapshot {
                node: client.get_node(v1::GetNodeRequest {}).await?.into_inner(),
                sessions: client
                    .list_sessions(v1::ListSessionsRequest {})
                    .await?
                    .into_inner()
                    .sessions,
                regions: client
                    .list_regions(v1::ListRegionsRequest::default())
                    .await?
                    .into_inner()
                    .regions,
                leases: client
                    .list_leases(v1::ListLeasesRequest::default())
                    .await?
                    .into_inner()
                    .leases,
                namespaces: client
                    .list_namespaces(v1::ListNamespacesRequest {})
                    .await?
                    .into_inner()
                    .namespaces,
            })
        };
        self.runtime
            .block_on(all)
            .map_err(|status| self.refused(&status))
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
