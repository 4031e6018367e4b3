//! Control messages. Each is compared with a no-op RPC of the same broker over the same socket in the same run.
//!
//! Regions are offered with made-up handles. The broker passes handles on without reading them, so a 64 GiB lease can
//! be timed on a machine without a GPU. Nothing is mapped and no byte moves: the budgets are for the control messages
//! alone.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use hyper_util::rt::TokioIo;
use swiftcache_proto::{
    convert::SLAB_BYTES,
    v1::{self, session_request, session_response},
};
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use tower::service_fn;

use crate::report::{Latencies, Line, time};

/// A prompt of 128 Ki tokens in 16-token blocks.
const LOOKUP_HASHES: u32 = 8192;
/// Bytes of a block in its slab.
const BLOCK_BYTES: u64 = 64 << 10;
const GIB: u64 = 1 << 30;

pub(crate) type Client = v1::broker_client::BrokerClient<Channel>;

/// A donor's or a borrower's session with its stream.
pub(crate) struct Party {
    pub(crate) client: Client,
    pub(crate) id: u64,
    pub(crate) device: String,
    outgoing: mpsc::Sender<v1::SessionRequest>,
    incoming: Streaming<v1::SessionResponse>,
    /// How many regions were offered so far. Each offer uses the next number as its id, so no id is used twice.
    offered: u128,
}

impl Party {
    pub(crate) async fn join(channel: Channel, name: &str, device: usize) -> Result<Self> {
        let mut client = Client::new(channel)
            .max_decoding_message_size(swiftcache_proto::convert::MAX_MESSAGE_BYTES);
        let registered = client
            .register(v1::RegisterRequest {
                name: name.to_owned(),
                ..Default::default()
            })
            .await?
            .into_inner();
        let device = registered
            .devices
            .get(device)
            .context("the node has too few devices")?
            .uuid
            .clone();
        let (outgoing, requests) = mpsc::channel(64);
        let id = registered.session_id;
        let attach = session_request::Message::Attach(v1::Attach { session_id: id });
        send(&outgoing, attach).await?;
        let mut incoming = client
            .session(ReceiverStream::new(requests))
            .await?
            .into_inner();
        let first = incoming.message().await?.and_then(|m| m.message);
        ensure!(
            matches!(first, Some(session_response::Message::Attached(_))),
            "the stream began with {first:?}"
        );
        Ok(Self {
            client,
            id,
            device,
            outgoing,
            incoming,
            offered: 0,
        })
    }

    async fn next(&mut self) -> Result<session_response::Message> {
        let message = self.incoming.message().await?;
        message
            .and_then(|message| message.message)
            .context("the session stream ended")
    }

    /// Offers one region with the largest slabs that the protocol allows. Returns the region's id.
    pub(crate) async fn offer(&mut self, bytes: u64) -> Result<Vec<u8>> {
        self.offer_slabs(bytes, bytes.min(*SLAB_BYTES.end())).await
    }

    /// Offers one region with slabs of this size. Returns the region's id.
    pub(crate) async fn offer_slabs(&mut self, bytes: u64, slab_bytes: u64) -> Result<Vec<u8>> {
        self.offered += 1;
        let region = self.offered.to_le_bytes().to_vec();
        self.client
            .offer(v1::OfferRequest {
                session_id: self.id,
                region_id: region.clone().into(),
                device_uuid: self.device.clone(),
                allocation_id: region.clone().into(),
                offset: 0,
                bytes,
                slab_bytes,
                handle: Some(v1::Handle {
                    kind: v1::HandleKind::CudaIpc.into(),
                    opaque: vec![1; 64].into(),
                    ..Default::default()
                }),
                ..Default::default()
            })
            .await?;
        Ok(region)
    }

    pub(crate) async fn lease(&mut self, bytes: u64) -> Result<Vec<v1::Grant>> {
        let response = self
            .client
            .lease(v1::LeaseRequest {
                session_id: self.id,
                namespace: "bench".into(),
                device_uuid: self.device.clone(),
                bytes,
                block_bytes: BLOCK_BYTES,
                ..Default::default()
            })
            .await?
            .into_inner();
        let shortfall = response.shortfall();
        ensure!(
            shortfall == v1::Shortfall::None,
            "not all was granted: {}",
            shortfall.as_str_name()
        );
        Ok(response.grants)
    }

    /// Publishes so many blocks in one slab. Returns their hashes.
    pub(crate) async fn publish(&mut self, grant: &v1::Grant, blocks: u32) -> Result<Vec<u8>> {
        ensure!(grant.slots >= blocks, "the slab is too small");
        let hashes: Vec<u8> = (0..blocks).flat_map(spread).collect();
        let published = v1::PublishRequest {
            session_id: self.id,
            lease_id: grant.lease_id,
            generation: grant.generation,
            hashes: hashes.clone().into(),
            slots: (0..blocks).collect(),
        };
        self.client.publish(published).await?;
        Ok(hashes)
    }
}

async fn send(
    outgoing: &mpsc::Sender<v1::SessionRequest>,
    message: session_request::Message,
) -> Result<()> {
    let request = v1::SessionRequest {
        message: Some(message),
    };
    outgoing.send(request).await.context("the stream is closed")
}

/// Runs every bench of control messages over `channel`, which leads to a new broker's socket.
pub(crate) async fn run(channel: Channel, rounds: u32) -> Result<Vec<Line>> {
    let mut donor = Party::join(channel.clone(), "bench donor", 1).await?;
    let mut borrower = Party::join(channel.clone(), "bench borrower", 0).await?;
    let noop = no_op(channel, rounds).await?;
    let mut lines = vec![
        lookup(&mut donor, &mut borrower, rounds, &noop).await?,
        lease(&mut donor, &mut borrower, rounds, &noop).await?,
    ];
    for (label, bytes) in [("64 MiB", GIB / 16), ("64 GiB", 64 * GIB)] {
        lines.push(revoke(&mut donor, &mut borrower, label, bytes, rounds, &noop).await?);
    }
    Ok(lines)
}

/// The baseline: a health check, for which the broker does no work.
async fn no_op(channel: Channel, rounds: u32) -> Result<Latencies> {
    let mut client = HealthClient::new(channel);
    let mut latencies = Latencies::new()?;
    for _ in 0..rounds {
        let began = Instant::now();
        client.check(HealthCheckRequest::default()).await?;
        latencies.add(began.elapsed());
    }
    Ok(latencies)
}

async fn lookup(
    donor: &mut Party,
    borrower: &mut Party,
    rounds: u32,
    noop: &Latencies,
) -> Result<Line> {
    let region = donor.offer(GIB).await?;
    let grants = borrower.lease(GIB).await?;
    let grant = grants.first().context("no grant")?;
    let hashes = borrower.publish(grant, LOOKUP_HASHES).await?;
    let mut latencies = Latencies::new()?;
    for _ in 0..rounds {
        let request = v1::LookupRequest {
            session_id: borrower.id,
            namespace: "bench".into(),
            hashes: hashes.clone().into(),
            device_uuid: "SIM-0".into(),
            ..v1::LookupRequest::default()
        };
        let began = Instant::now();
        let found = borrower.client.lookup(request).await?.into_inner();
        latencies.add(began.elapsed());
        ensure!(found.hit_blocks == LOOKUP_HASHES, "the lookup missed");
        let unpin = v1::Unpin {
            pin_ids: vec![found.pin_id],
        };
        send(&borrower.outgoing, session_request::Message::Unpin(unpin)).await?;
    }
    give_back(donor, borrower, region, &grants).await?;
    Ok(line(
        "lookup of 8,192 hashes, p50",
        latencies.at(0.5),
        Baseline {
            what: "no-op RPC, p50",
            took: noop.at(0.5),
        },
        Duration::from_micros(300),
    ))
}

async fn lease(
    donor: &mut Party,
    borrower: &mut Party,
    rounds: u32,
    noop: &Latencies,
) -> Result<Line> {
    let region = donor.offer(GIB / 16).await?;
    let mut latencies = Latencies::new()?;
    for _ in 0..rounds {
        let began = Instant::now();
        let grants = borrower.lease(GIB / 16).await?;
        latencies.add(began.elapsed());
        borrower
            .client
            .release(v1::ReleaseRequest {
                session_id: borrower.id,
                lease_ids: grants.iter().map(|grant| grant.lease_id).collect(),
                unmappable: false,
                bequeath: false,
            })
            .await?;
    }
    withdraw(donor, region).await?;
    donor.next().await?;
    Ok(line(
        "lease of one slab, p99",
        latencies.at(0.99),
        Baseline {
            what: "no-op RPC, p99",
            took: noop.at(0.99),
        },
        Duration::from_millis(2),
    ))
}

/// Measures the time from a donor's demand until the donor owns its bytes again. The borrower acknowledges at once.
async fn revoke(
    donor: &mut Party,
    borrower: &mut Party,
    label: &str,
    bytes: u64,
    rounds: u32,
    noop: &Latencies,
) -> Result<Line> {
    let mut latencies = Latencies::new()?;
    for _ in 0..rounds {
        let region = donor.offer(bytes).await?;
        let grants = borrower.lease(bytes).await?;
        let began = Instant::now();
        give_back(donor, borrower, region, &grants).await?;
        latencies.add(began.elapsed());
    }
    Ok(line(
        &format!("revoke until the donor owns {label} again, p99"),
        latencies.at(0.99),
        Baseline {
            what: "no-op RPC, p99",
            took: noop.at(0.99),
        },
        Duration::from_millis(5),
    ))
}

async fn withdraw(donor: &mut Party, region: Vec<u8>) -> Result<()> {
    donor
        .client
        .withdraw(v1::WithdrawRequest {
            session_id: donor.id,
            region_ids: vec![region.into()],
            ..Default::default()
        })
        .await?;
    Ok(())
}

async fn give_back(
    donor: &mut Party,
    borrower: &mut Party,
    region: Vec<u8>,
    grants: &[v1::Grant],
) -> Result<()> {
    withdraw(donor, region).await?;
    for _ in grants {
        let revoke = borrower.next().await?;
        let session_response::Message::Revoke(revoke) = revoke else {
            anyhow::bail!("expected a revocation, got {revoke:?}");
        };
        ensure!(
            grants.iter().any(|grant| revoke.lease_id == grant.lease_id),
            "another lease was revoked"
        );
        let acknowledge = v1::Acknowledge {
            lease_id: revoke.lease_id,
            generation: revoke.generation,
        };
        send(
            &borrower.outgoing,
            session_request::Message::Acknowledge(acknowledge),
        )
        .await?;
    }
    let returned = donor.next().await?;
    ensure!(
        matches!(returned, session_response::Message::Returned(_)),
        "expected the region back, got {returned:?}"
    );
    Ok(())
}

struct Baseline {
    what: &'static str,
    took: Duration,
}

fn line(what: &str, measured: Duration, baseline: Baseline, budget: Duration) -> Line {
    Line {
        what: what.to_owned(),
        measured: time(measured),
        baseline: format!("{}: {}", baseline.what, time(baseline.took)),
        ratio: Some(measured.as_secs_f64() / baseline.took.as_secs_f64()),
        budget: format!("≤ {}", time(budget)),
        kept: Some(measured <= budget),
    }
}

/// Publishes `messages` times `per_message` blocks. Returns how many blocks the broker has indexed afterwards.
pub(crate) async fn fill_index(channel: Channel, messages: u32, per_message: u32) -> Result<u64> {
    let mut donor = Party::join(channel.clone(), "bench donor", 1).await?;
    let mut borrower = Party::join(channel.clone(), "bench borrower", 0).await?;
    let slab = u64::from(per_message) * BLOCK_BYTES;
    for message in 0..messages {
        donor.offer(slab).await?;
        let grants = borrower.lease(slab).await?;
        let grant = grants.first().context("no grant")?;
        let first = message * per_message;
        let published = v1::PublishRequest {
            session_id: borrower.id,
            lease_id: grant.lease_id,
            generation: grant.generation,
            hashes: (first..first + per_message).flat_map(spread).collect(),
            slots: (0..per_message).collect(),
        };
        borrower.client.publish(published).await?;
    }
    let mut admin = v1::admin_client::AdminClient::new(channel);
    let node = admin.get_node(v1::GetNodeRequest {}).await?.into_inner();
    Ok(node.indexed_blocks)
}

/// The hash of a block. Hashes of consecutive blocks are far apart, like those of real hash functions, so that the
/// index cannot profit from their order.
pub(crate) fn spread(block: u32) -> [u8; 16] {
    u128::from(block + 1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
        .to_le_bytes()
}

/// Waits until a starting broker listens on its Unix socket, and returns a channel to it.
pub(crate) async fn connect(socket: &Path) -> Result<Channel> {
    connect_reading(socket, 4 << 20).await
}

/// The same for a channel whose other end may send so many bytes before somebody reads them.
pub(crate) async fn connect_reading(socket: &Path, window: u32) -> Result<Channel> {
    let endpoint = Endpoint::from_static("http://localhost")
        .initial_connection_window_size(window.max(1 << 16))
        .initial_stream_window_size(window);
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        let socket: PathBuf = socket.into();
        let connector = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        match endpoint.connect_with_connector(connector).await {
            Ok(channel) => return Ok(channel),
            Err(error) if Instant::now() >= patience => {
                return Err(error).context("no broker listens");
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}
