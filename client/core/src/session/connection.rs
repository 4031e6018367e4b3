//! One connection: opened, registered or resumed, attached.

use std::{io, path::PathBuf, sync::atomic::AtomicBool, time::Duration};

use hyper_util::rt::TokioIo;
use swiftcache_proto::{
    convert,
    domain::{Device, LeaseId, Link, RegionId, SessionId},
    v1::{self, broker_client::BrokerClient, session_request::Message},
};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};

use super::{Held, SessionConfig};

/// Flow-control windows and frames large enough that a lookup's 128 KiB of hashes never waits for an update.
const WINDOW_BYTES: u32 = 4 << 20;
/// The window of the whole connection, bytes. Of small frames that wait to be read h2 takes so many that each of them, counted as
/// 256 bytes, fits into half of it, and then ends the connection ("too_many_data_frames"). A revocation is such a frame when
/// the broker has nothing else to say yet, and its queue holds 16,384: they fit.
const CONNECTION_WINDOW_BYTES: u32 = 2 * 16_384 * 256;
const FRAME_BYTES: u32 = 1 << 20;
/// A broker that answers no ping for this long (stopped, say) is as good as gone.
const PING_EVERY: Duration = Duration::from_secs(5);
const PING_LIMIT: Duration = Duration::from_secs(5);

/// A registered and attached connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) client: BrokerClient<Channel>,
    /// What the client speaks over.
    pub(super) channel: Channel,
    pub(super) session: SessionId,
    pub(super) boot_id: u64,
    pub(super) epoch: u64,
    pub(super) fd_socket: PathBuf,
    /// The broker's default, milliseconds.
    pub(super) drain_ms: u32,
    pub(super) devices: Vec<Device>,
    pub(super) links: Vec<Link>,
    /// Its host memory, one device for each NUMA node. An older broker names none.
    pub(super) host_devices: Vec<Device>,
    /// Observers have been told: what they do about a new connection comes before what others do with it.
    pub(super) announced: AtomicBool,
    /// Cancelled when it is served no more.
    pub(super) over: CancellationToken,
    /// Cancelled when the broker must be told anew what is held, which only another connection does.
    pub(super) given_up: CancellationToken,
    outgoing: mpsc::UnboundedSender<v1::SessionRequest>,
}

/// The session as the broker may know it.
#[derive(Clone, Copy)]
pub(super) struct Past {
    pub(super) session: SessionId,
    /// The boot id of the broker of the last connection that was served.
    pub(super) boot_id: Option<u64>,
}

impl Past {
    /// A session that the broker has just opened. It is resumed from here on, also if the connection is lost before it is
    /// served: nothing else would end it while this process lives.
    fn opened(session: SessionId) -> Self {
        Self {
            session,
            boot_id: None,
        }
    }
}

/// A connection just opened, with what the broker said about the past.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) incoming: Streaming<v1::SessionResponse>,
    pub(super) refused: Vec<LeaseId>,
    pub(super) regions: Vec<RegionId>,
}

/// Why a connection did not open.
pub(super) enum OpenError {
    /// The session to resume is over.
    SessionOver,
    /// The broker refuses for good.
    Refused(String),
    /// It may work later.
    Failed(String),
}

impl From<tonic::Status> for OpenError {
    fn from(status: tonic::Status) -> Self {
        let text = format!("{} ({})", status.message(), status.code());
        match status.code() {
            Code::InvalidArgument | Code::FailedPrecondition | Code::Unauthenticated => {
                Self::Refused(text)
            }
            _ => Self::Failed(text),
        }
    }
}

impl Connection {
    /// Opens a connection and a session on it, or resumes that of the `past` with what is still `held`. The session counts
    /// as past as soon as the broker has opened it.
    pub(super) async fn open(
        config: &SessionConfig,
        epoch: u64,
        past: &mut Option<Past>,
        held: Held,
    ) -> Result<Opened, OpenError> {
        let channel = channel(config).await.map_err(OpenError::Failed)?;
        let mut client = BrokerClient::new(channel.clone())
            .max_decoding_message_size(convert::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(convert::MAX_MESSAGE_BYTES);
        let request = v1::RegisterRequest {
            name: config.name.clone(),
            tenant: config.tenant.clone(),
            resume_session_id: past.map_or(0, |past| past.session.0),
            held_lease_ids: held.leases.iter().map(|lease| lease.0).collect(),
            shared_lease_ids: held.shared.iter().map(|lease| lease.0).collect(),
        };
        let registered = match client.register(request).await {
            Ok(registered) => registered.into_inner(),
            Err(status)
                if past.is_some()
                    && matches!(status.code(), Code::NotFound | Code::PermissionDenied) =>
            {
                return Err(OpenError::SessionOver);
            }
            Err(status) => return Err(status.into()),
        };
        let session = SessionId(registered.session_id);
        past.get_or_insert(Past::opened(session));
        let (outgoing, requests) = mpsc::unbounded_channel();
        let attach = Message::Attach(v1::Attach {
            session_id: session.0,
        });
        // The receiver is alive: it is handed to the stream below.
        let _ = outgoing.send(v1::SessionRequest {
            message: Some(attach),
        });
        let mut incoming = client
            .session(UnboundedReceiverStream::new(requests))
            .await?
            .into_inner();
        match incoming.message().await?.and_then(|first| first.message) {
            Some(v1::session_response::Message::Attached(attached))
                if attached.boot_id == registered.boot_id => {}
            Some(v1::session_response::Message::Attached(_)) => {
                let problem = "the broker restarted during the handshake";
                return Err(OpenError::Failed(problem.to_owned()));
            }
            _ => {
                let problem = "the session stream did not begin with Attached";
                return Err(OpenError::Failed(problem.to_owned()));
            }
        }
        let invalid = |invalid: convert::InvalidField| OpenError::Failed(invalid.to_string());
        let connection = Self {
            client,
            channel,
            session,
            boot_id: registered.boot_id,
            epoch,
            fd_socket: registered.fd_socket.into(),
            drain_ms: match registered.default_drain_ms {
                0 => convert::DEFAULT_DRAIN_MS,
                said => said,
            },
            devices: (registered.devices.iter().map(Device::try_from))
                .collect::<Result<_, _>>()
                .map_err(invalid)?,
            links: (registered.links.iter().map(Link::try_from))
                .collect::<Result<_, _>>()
                .map_err(invalid)?,
            host_devices: (registered.host_devices.iter().map(Device::try_from))
                .collect::<Result<_, _>>()
                .map_err(invalid)?,
            announced: AtomicBool::new(false),
            over: CancellationToken::new(),
            given_up: CancellationToken::new(),
            outgoing,
        };
        Ok(Opened {
            connection,
            incoming,
            refused: registered
                .refused_lease_ids
                .into_iter()
                .map(LeaseId)
                .collect(),
            regions: (registered.region_ids.iter())
                .map(|id| convert::region_id("region_ids", id))
                .collect::<Result<_, _>>()
                .map_err(invalid)?,
        })
    }

    /// Sends on the stream. Lost with it, in which case the broker asks again.
    pub(super) fn send(&self, message: Message) {
        let _ = self.outgoing.send(v1::SessionRequest {
            message: Some(message),
        });
    }
}

async fn channel(config: &SessionConfig) -> Result<Channel, String> {
    let socket = UnixStream::connect(&config.socket).await;
    // Used once: a channel that connected anew by itself would speak to a restarted broker before resuming.
    let mut once = Some(socket.map_err(|error| error.to_string())?);
    let connector = tower::service_fn(move |_| {
        let socket = once.take().map(TokioIo::new);
        async { socket.ok_or_else(|| io::Error::other("the connection was lost")) }
    });
    Endpoint::from_static("http://localhost")
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_LIMIT)
        .keep_alive_while_idle(true)
        .connect_with_connector(connector)
        .await
        .map_err(|error| error.to_string())
}
