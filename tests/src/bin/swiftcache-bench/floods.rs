//! What a lookup takes while another process floods the broker, beside what it takes when all is quiet, on the same broker in
//! the same run. Each flood is a process of its own, of another user where the bench may be somebody else.

use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use swiftcache_proto::v1::{self, admin_client::AdminClient};
use swiftcache_tests::{
    node::{Node, Setup},
    programs::Program,
};
use tokio::{runtime::Runtime, task::JoinSet};
use tonic::transport::Channel;

use crate::{
    control::{self, Client, Party},
    report::{Latencies, Line, time},
};

/// Connections of a flood.
const CONNECTIONS: usize = 4;
/// Calls that are on their way on each of them.
const CALLS: usize = 16;
/// Leases that the node has meanwhile.
const LEASES: usize = 61_000;
/// Slabs that one call leases.
const GRANTS: usize = 4_096;
const SLAB: u64 = 64 << 10;
/// Blocks that a lookup asks for: a prompt of 8 Ki tokens.
const HASHES: u32 = 512;
/// How many times longer than quiet a lookup may take.
const BUDGET: f64 = 5.0;
/// A user that is nobody's else.
const MEMBER: u32 = 41_234;
/// Events in a list that nobody reads.
const EVENTS: u32 = 1_000;

/// What a process floods the broker with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Flood {
    /// Lists of all leases.
    Lists,
    /// The other questions of Admin, in turn.
    Reads,
    /// Watches of the index that begin anew again and again.
    Watches,
    /// Sessions that come and leave.
    Sessions,
    /// Regions that are offered and withdrawn.
    Offers,
    /// Lookups.
    Lookups,
    /// Answers that nobody reads.
    Unread,
}

impl Flood {
    fn name(self) -> &'static str {
        match self {
            Self::Lists => "lists of 61,000 leases",
            Self::Reads => "questions of Admin",
            Self::Watches => "watches of the index",
            Self::Sessions => "Register and Leave",
            Self::Offers => "Offer and Withdraw",
            Self::Lookups => "another's lookups",
            Self::Unread => "answers that nobody reads",
        }
    }
}

/// A node with so much HBM on each device, whose broker lets [`MEMBER`] in.
pub(crate) fn node(hbm_bytes: u64) -> Result<Node> {
    let member = rustix::process::getuid().is_root();
    let group = ["--socket-group".to_owned(), MEMBER.to_string()];
    let node = Node::start_with(Setup {
        hbm_bytes: Some(hbm_bytes),
        options: group.into_iter().filter(|_| member).collect(),
        // HTTP/2 warns of each call that is given up before it is answered.
        log: "error".to_owned(),
        ..Setup::default()
    })?;
    fs::set_permissions(node.directory(), Permissions::from_mode(0o755))?;
    Ok(node)
}

/// Measures lookups under each flood.
pub(crate) fn run(rounds: u32, runtime: &Runtime, node: &Node) -> Result<Vec<Line>> {
    let socket = node.socket();
    let mut victim = runtime.block_on(Victim::new(&socket))?;
    let mut lines = Vec::new();
    for flood in Flood::value_variants() {
        let quiet = runtime.block_on(victim.lookups(rounds))?;
        let process = start(*flood, node)?;
        // It is under way once the broker has had time for it only.
        runtime.block_on(victim.lookups(rounds / 4))?;
        let flooded = runtime.block_on(victim.lookups(rounds))?;
        drop(process);
        let ratio = flooded.at(0.99).as_secs_f64() / quiet.at(0.99).as_secs_f64();
        lines.push(Line {
            what: format!(
                "lookup of {HASHES} hashes under a flood of {}, p99",
                flood.name()
            ),
            measured: time(flooded.at(0.99)),
            baseline: format!("quiet, p99: {}", time(quiet.at(0.99))),
            ratio: Some(ratio),
            budget: format!("≤ {BUDGET} x quiet"),
            kept: Some(ratio <= BUDGET),
        });
    }
    Ok(lines)
}

/// Starts the process of a flood, and waits until it floods.
fn start(flood: Flood, node: &Node) -> Result<Program> {
    let flood = flood.to_possible_value().context("a flood has a name")?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--flood", flood.get_name(), "--socket"]);
    command.arg(node.socket());
    if rustix::process::getuid().is_root() {
        command.uid(MEMBER).gid(MEMBER);
    }
    Program::start(&mut command)
}

/// A session that looks up blocks which it has published.
struct Victim {
    borrower: Party,
    _donor: Party,
    hashes: Vec<u8>,
}

impl Victim {
    async fn new(socket: &Path) -> Result<Self> {
        let channel = control::connect(socket).await?;
        let mut donor = Party::join(channel.clone(), "bench donor", 1).await?;
        let mut borrower = Party::join(channel.clone(), "bench borrower", 0).await?;
        donor.offer_slabs(LEASES as u64 * SLAB, SLAB).await?;
        let mut leases = 0;
        while leases < LEASES {
            let most = GRANTS.min(LEASES - leases);
            leases += borrower.lease(most as u64 * SLAB).await?.len();
        }
        donor.offer(1 << 30).await?;
        let grants = borrower.lease(1 << 30).await?;
        let grant = grants.first().context("no grant")?;
        let hashes = borrower.publish(grant, HASHES).await?;
        Ok(Self {
            borrower,
            _donor: donor,
            hashes,
        })
    }

    async fn lookups(&mut self, rounds: u32) -> Result<Latencies> {
        let mut latencies = Latencies::new()?;
        for _ in 0..rounds {
            let request = v1::LookupRequest {
                session_id: self.borrower.id,
                namespace: "bench".into(),
                hashes: self.hashes.clone().into(),
                device_uuid: self.borrower.device.clone(),
                unpinned: true,
                ..v1::LookupRequest::default()
            };
            let began = Instant::now();
            let found = self.borrower.client.lookup(request).await?.into_inner();
            latencies.add(began.elapsed());
            ensure!(found.hit_blocks == HASHES, "the lookup missed");
            // An engine computes between two of its lookups.
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(latencies)
    }
}

/// Floods the broker until this process is killed. What is refused is asked again: a flood does not mind.
pub(crate) fn flood(flood: Flood, socket: &Path, runtime: &Runtime) -> Result<()> {
    runtime.block_on(async {
        let mut tasks = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let channel = match flood {
                Flood::Unread => control::connect_reading(socket, 0).await?,
                _ => control::connect(socket).await?,
            };
            for call in 0..CALLS {
                let channel = channel.clone();
                match flood {
                    Flood::Lists => tasks.spawn(lists(channel)),
                    Flood::Reads => tasks.spawn(reads(channel, call)),
                    Flood::Watches => tasks.spawn(watches(channel)),
                    Flood::Sessions => tasks.spawn(sessions(channel)),
                    Flood::Offers => tasks.spawn(offers(channel, call)),
                    Flood::Lookups => tasks.spawn(lookups(channel)),
                    Flood::Unread => tasks.spawn(unread(channel)),
                };
            }
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(())
    })
}

async fn lists(channel: Channel) -> Result<()> {
    let mut admin = AdminClient::new(channel).max_decoding_message_size(usize::MAX);
    let mut request = v1::ListLeasesRequest::default();
    loop {
        let page = admin.list_leases(request.clone()).await;
        request.page_token =
            page.map_or_else(|_| String::new(), |page| page.into_inner().next_page_token);
    }
}

async fn reads(channel: Channel, first: usize) -> Result<()> {
    let mut admin = AdminClient::new(channel).max_decoding_message_size(usize::MAX);
    for number in first.. {
        // Refused or not, the next one follows.
        match number % 5 {
            0 => drop(admin.get_node(v1::GetNodeRequest {}).await),
            1 => drop(
                admin
                    .list_sessions(v1::ListSessionsRequest::default())
                    .await,
            ),
            2 => drop(admin.list_regions(v1::ListRegionsRequest::default()).await),
            3 => drop(
                admin
                    .list_namespaces(v1::ListNamespacesRequest::default())
                    .await,
            ),
            _ => drop(admin.list_events(v1::ListEventsRequest::default()).await),
        }
    }
    Ok(())
}

async fn watches(channel: Channel) -> Result<()> {
    let mut admin = AdminClient::new(channel);
    loop {
        let Ok(stream) = admin.watch(v1::WatchRequest::default()).await else {
            continue;
        };
        let mut stream = stream.into_inner();
        while let Ok(Some(told)) = stream.message().await {
            if told.current {
                break;
            }
        }
    }
}

async fn register(client: &mut Client) -> Option<u64> {
    let request = v1::RegisterRequest {
        name: "flood".to_owned(),
        ..Default::default()
    };
    let registered = client.register(request).await.ok()?;
    Some(registered.into_inner().session_id)
}

async fn sessions(channel: Channel) -> Result<()> {
    let mut client = Client::new(channel);
    loop {
        if let Some(session_id) = register(&mut client).await {
            drop(client.leave(v1::LeaveRequest { session_id }).await);
        }
    }
}

async fn offers(channel: Channel, call: usize) -> Result<()> {
    let mut client = Client::new(channel);
    let session_id = register(&mut client).await.context("no session")?;
    for number in 0_u64.. {
        let id = (u128::from(session_id) << 64 | u128::from(number)).to_le_bytes();
        let offer = v1::OfferRequest {
            session_id,
            region_id: id.to_vec().into(),
            device_uuid: format!("SIM-{}", call % 2),
            allocation_id: id.to_vec().into(),
            offset: 0,
            bytes: SLAB,
            slab_bytes: SLAB,
            handle: Some(v1::Handle {
                kind: v1::HandleKind::CudaIpc.into(),
                opaque: vec![1; 64].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        drop(client.offer(offer).await);
        let withdraw = v1::WithdrawRequest {
            session_id,
            region_ids: vec![id.to_vec().into()],
            ..Default::default()
        };
        drop(client.withdraw(withdraw).await);
    }
    Ok(())
}

async fn lookups(channel: Channel) -> Result<()> {
    let mut client = Client::new(channel);
    let session_id = register(&mut client).await.context("no session")?;
    let hashes: Vec<u8> = (0..8_192).flat_map(control::spread).collect();
    loop {
        let request = v1::LookupRequest {
            session_id,
            namespace: "bench".into(),
            hashes: hashes.clone().into(),
            device_uuid: "SIM-0".to_owned(),
            unpinned: true,
            ..v1::LookupRequest::default()
        };
        drop(client.lookup(request).await);
    }
}

/// Each call's answer stays where it is, as nobody makes room for it.
async fn unread(channel: Channel) -> Result<()> {
    let admin = AdminClient::new(channel);
    loop {
        let mut calls = JoinSet::new();
        for _ in 0..CALLS {
            let mut admin = admin.clone();
            let list = v1::ListEventsRequest {
                limit: EVENTS,
                ..v1::ListEventsRequest::default()
            };
            calls.spawn(async move { admin.list_events(list).await.map(drop) });
        }
        // Those that are refused are over at once; the others are given up, and asked again.
        let wait = Duration::from_millis(100);
        drop(
            tokio::time::timeout(wait, async { while calls.join_next().await.is_some() {} }).await,
        );
    }
}
