//! Regions that the broker has and no donor of this process does any more: what a donor left behind, and what a list of the
//! broker's names that nobody here knows. The session has them withdrawn, and keeps their memory until they are returned.

use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::{
    convert,
    domain::{RegionId, SessionId},
    v1::{self, broker_client::BrokerClient},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tonic::{Code, transport::Channel};
use tracing::{debug, info};

use super::{Session, Shared, connection::Connection, rpc::is_refusal};
use crate::device::Memory;

/// How long to wait for the answer to one withdrawal.
const LIMIT: Duration = Duration::from_secs(5);
/// When to ask again for what could not be withdrawn.
const AGAIN: Duration = Duration::from_millis(200);

/// A region that its donor leaves behind.
pub(crate) struct Orphan {
    pub(crate) region: RegionId,
    /// What must stay until the region is returned, if anything must.
    pub(crate) memory: Option<Memory>,
    /// The broker has confirmed its offer. If it has not, the offer may yet arrive after the broker has said that it knows
    /// no such region, so that the memory stays until the session is over.
    pub(crate) known: bool,
    /// How long borrowers may take to move away; zero: the broker's default.
    pub(crate) drain: Duration,
}

/// All of a session's.
#[derive(Default)]
pub(super) struct Orphans {
    list: Mutex<BTreeMap<RegionId, Kept>>,
    more: Notify,
}

struct Kept {
    memory: Option<Memory>,
    known: bool,
    drain: Duration,
    /// The last connection on which the broker has said that it knows of the withdrawal, or of no such region.
    told: Option<u64>,
    since: Instant,
}

impl Session {
    /// Has regions withdrawn whose donor is going.
    pub(crate) fn adopt(&self, orphans: Vec<Orphan>) {
        let mut list = self.shared.orphans.list.lock();
        for orphan in orphans {
            let kept = Kept {
                memory: orphan.memory,
                known: orphan.known,
                drain: orphan.drain,
                told: None,
                since: Instant::now(),
            };
            list.insert(orphan.region, kept);
        }
        drop(list);
        self.shared.orphans.more.notify_one();
    }
}

impl Orphans {
    /// The broker has these regions, and no donor here does.
    pub(super) fn found(&self, regions: impl IntoIterator<Item = RegionId>) {
        let mut list = self.list.lock();
        for region in regions {
            list.entry(region).or_insert_with(|| {
                info!(%region, "the broker has a region that nobody here knows; withdrawing it");
                Kept {
                    memory: None,
                    known: true,
                    drain: Duration::ZERO,
                    told: None,
                    since: Instant::now(),
                }
            });
        }
    }

    /// The region is its donor's own again. What is returned is to be dropped where it may take a while.
    #[must_use]
    pub(super) fn returned(&self, region: RegionId) -> Option<Memory> {
        let kept = self.list.lock().remove(&region)?;
        info!(%region, took = ?kept.since.elapsed(), "a region without a donor given back");
        kept.memory
    }

    /// A new session, of which the broker knows nothing, has taken the place of the one that they belonged to.
    #[must_use]
    pub(super) fn forgotten(&self) -> Vec<Memory> {
        let list = std::mem::take(&mut *self.list.lock());
        list.into_values().filter_map(|kept| kept.memory).collect()
    }

    /// Those whose withdrawal is to be asked for on this connection.
    fn untold(&self, epoch: u64) -> Vec<(RegionId, Duration)> {
        let list = self.list.lock();
        let untold = list.iter().filter(|(_, kept)| kept.told != Some(epoch));
        untold.map(|(region, kept)| (*region, kept.drain)).collect()
    }

    /// The broker knows of the withdrawal, and says when it is done.
    fn told(&self, region: RegionId, epoch: u64) {
        if let Some(kept) = self.list.lock().get_mut(&region) {
            kept.told = Some(epoch);
        }
    }

    /// The broker knows no such region.
    fn unknown(&self, region: RegionId, epoch: u64) -> Option<Memory> {
        let certain = self.list.lock().get(&region).is_some_and(|kept| kept.known);
        if certain {
            return self.returned(region);
        }
        self.told(region, epoch);
        None
    }
}

/// Has them withdrawn, as long as one connection lasts.
pub(super) struct Withdrawer {
    client: BrokerClient<Channel>,
    session: SessionId,
    epoch: u64,
}

impl Withdrawer {
    pub(super) fn new(connection: &Connection) -> Self {
        Self {
            client: connection.client.clone(),
            session: connection.session,
            epoch: connection.epoch,
        }
    }

    pub(super) async fn run(mut self, shared: Arc<Shared>) {
        loop {
            let mut failed = false;
            for (region, drain) in shared.orphans.untold(self.epoch) {
                failed |= !self.withdraw(&shared, region, drain).await;
            }
            match failed {
                true => sleep(AGAIN).await,
                false => shared.orphans.more.notified().await,
            }
        }
    }

    /// True when the broker has answered.
    async fn withdraw(&mut self, shared: &Shared, region: RegionId, drain: Duration) -> bool {
        let request = v1::WithdrawRequest {
            session_id: self.session.0,
            region_ids: vec![region.0.to_vec().into()],
            drain_ms: convert::drain_request_ms(drain),
            ..v1::WithdrawRequest::default()
        };
        let gone = match timeout(LIMIT, self.client.withdraw(request)).await {
            Ok(Ok(answer)) => {
                let mut listed = answer.into_inner().region_ids.into_iter();
                match listed.any(|id| id[..] == region.0) {
                    true => {
                        shared.orphans.told(region, self.epoch);
                        None
                    }
                    false => shared.orphans.returned(region),
                }
            }
            Ok(Err(status)) if is_refusal(&status) && status.code() == Code::NotFound => {
                shared.orphans.unknown(region, self.epoch)
            }
            Ok(Err(status)) => {
                debug!(%status, %region, "a region without a donor is not withdrawn yet");
                return false;
            }
            Err(_) => return false,
        };
        shared.let_go(gone);
        true
    }
}

impl Shared {
    /// Drops memory where it keeps nobody waiting: freeing it takes the driver a while.
    pub(super) fn let_go<T: Send + 'static>(&self, memory: T) {
        drop(self.runtime.spawn_blocking(move || drop(memory)));
    }
}

impl fmt::Debug for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Orphan({}, {:?})", self.region, self.memory)
    }
}
