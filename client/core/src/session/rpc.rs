//! The typed calls of a session. Each has a deadline; none hangs.

use std::{
    error::Error as _,
    future::Future,
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::{
    convert,
    domain::{BlockHash, DeviceUuid, FoundRun, Generation, Handle, HandleKind, LeaseId, PinId},
    fd_socket, v1,
};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::{
    Asker, Call, Coming, Demand, DiskBlocks, DiskCall, DiskWork, Found, Grant, Inheritance,
    Inherited, Keep, Leased, Left, LinkState, OfferedRegion, Opening, Session, Unpublished,
    WithdrawWhat, Withdrawing, connection::Connection, fd,
};
use crate::{Error, Result, device::Export};

/// The longest a call other than a lookup may take.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// What settles a call whose outcome stays unknown (see [`Error::may_be_done`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settled {
    /// Its caller, who asks again or assumes the worse; or time, at the broker.
    ByCaller,
    /// The next connection, for which this one is given up: resuming tells the broker which leases this process holds,
    /// and the broker takes the others back.
    ByResuming,
}

/// As what leases are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Giving {
    Back,
    ToHeir,
    Unmappable,
}

/// Why a call failed, before it is known which one it was.
enum Fault {
    Status(Box<Status>),
    Answer(String),
}

impl Fault {
    /// What a status says about the call: that the broker has not done it, or that nobody here knows.
    fn error(self, call: &'static str) -> Error {
        match self {
            Self::Answer(problem) => Error::Answer { call, problem },
            Self::Status(status) if is_lost(&status) => Error::Lost {
                call,
                problem: status.message().to_owned(),
            },
            Self::Status(status) if is_refusal(&status) => Error::Refused { call, status },
            Self::Status(status) => Error::Answer {
                call,
                problem: format!("{} ({})", status.message(), status.code()),
            },
        }
    }
}

/// Whether it is no broker that says so. A lost connection has many codes, but always a cause below gRPC.
pub fn is_lost(status: &Status) -> bool {
    status.code() == Code::Unavailable || status.source().is_some()
}

/// Whether the broker says that it has not done what was asked: one of the codes that it refuses with before it changes
/// anything (`broker/src/error.rs`). Whatever else comes, from it or from what lies between, proves nothing.
pub(super) fn is_refusal(status: &Status) -> bool {
    let refuses = matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Unimplemented
            | Code::Unauthenticated
    );
    refuses && !is_lost(status)
}

impl From<Status> for Fault {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

impl From<convert::InvalidField> for Fault {
    fn from(invalid: convert::InvalidField) -> Self {
        Self::Answer(invalid.to_string())
    }
}

impl Session {
    /// Leases slabs, best link first.
    pub fn lease(&self, demand: Demand) -> Call<Leased> {
        let settled = Settled::ByResuming;
        self.call("Lease", CALL_LIMIT, settled, move |connection| async move {
            let request = v1::LeaseRequest {
                session_id: connection.session.0,
                namespace: demand.namespace,
                device_uuid: demand.device.to_string(),
                bytes: demand.bytes,
                block_bytes: demand.block_bytes,
                class: v1::LeaseClass::from(demand.class).into(),
                host_bytes: demand.host_bytes,
            };
            let leased = connection.client.clone().lease(request).await?.into_inner();
            let grants = leased.grants.iter().map(Grant::read);
            Ok(Leased {
                grants: grants.collect::<std::result::Result<_, _>>()?,
                shortfall: leased.shortfall().into(),
                epoch: connection.epoch,
            })
        })
    }

    /// Gives leases back, or shares: nothing of this process touches them any more.
    pub fn release(&self, leases: Vec<LeaseId>) -> Call<()> {
        self.give_back(leases, Giving::Back)
    }

    /// Gives leases back, and lets the broker keep what is published there for an heir: nothing of this process touches them any
    /// more. An older broker frees them.
    pub fn bequeath(&self, leases: Vec<LeaseId>) -> Call<()> {
        self.give_back(leases, Giving::ToHeir)
    }

    /// Gives leases back, or shares, whose memory this process cannot map. The broker grants this session no slab of
    /// their regions any more, and promises it nothing there, until their donors offer them anew.
    pub fn cannot_map(&self, leases: Vec<LeaseId>) -> Call<()> {
        self.give_back(leases, Giving::Unmappable)
    }

    fn give_back(&self, leases: Vec<LeaseId>, giving: Giving) -> Call<()> {
        self.call(
            "Release",
            CALL_LIMIT,
            Settled::ByResuming,
            move |connection| async move {
                let request = v1::ReleaseRequest {
                    session_id: connection.session.0,
                    lease_ids: leases.iter().map(|lease| lease.0).collect(),
                    unmappable: giving == Giving::Unmappable,
                    bequeath: giving == Giving::ToHeir,
                };
                connection.client.clone().release(request).await?;
                Ok(())
            },
        )
    }

    /// Takes over what borrowers of the tenant and namespace have left that are gone.
    pub fn inherit(&self, demand: Demand) -> Call<Inheritance> {
        let settled = Settled::ByResuming;
        self.call(
            "Inherit",
            CALL_LIMIT,
            settled,
            move |connection| async move {
                let request = v1::InheritRequest {
                    session_id: connection.session.0,
                    namespace: demand.namespace,
                    device_uuid: demand.device.to_string(),
                    bytes: demand.bytes,
                    block_bytes: demand.block_bytes,
                    host_bytes: demand.host_bytes,
                };
                let client = &mut connection.client.clone();
                let inherited = client.inherit(request).await?.into_inner();
                let now = Instant::now();
                let leases = inherited.leases.iter().map(|its| read_inherited(its, now));
                Ok(Inheritance {
                    leases: leases.collect::<std::result::Result<_, _>>()?,
                    more: inherited.more,
                    epoch: connection.epoch,
                })
            },
        )
    }

    /// Opens another session's lease for reading. The number is the connection it came by.
    pub(crate) fn share(&self, lease: LeaseId, device: DeviceUuid) -> Call<(Grant, u64)> {
        self.call(
            "Share",
            CALL_LIMIT,
            Settled::ByResuming,
            move |connection| async move {
                let request = v1::ShareRequest {
                    session_id: connection.session.0,
                    lease_id: lease.0,
                    device_uuid: device.to_string(),
                };
                let shared = connection.client.clone().share(request).await?.into_inner();
                let missing = || Fault::Answer("no grant".to_owned());
                let grant = Grant::read(shared.grant.as_ref().ok_or_else(missing)?)?;
                Ok((grant, connection.epoch))
            },
        )
    }

    /// Makes blocks findable: `hashes[i]` lies in `slots[i]`. Returns the indexes of those that another lease
    /// already holds, which were not published.
    pub fn publish(
        &self,
        lease: LeaseId,
        generation: Generation,
        hashes: &[BlockHash],
        slots: Vec<u32>,
    ) -> Call<Vec<u32>> {
        let hashes = convert::pack_hashes(hashes).into();
        self.call(
            "Publish",
            CALL_LIMIT,
            Settled::ByCaller,
            move |connection| async move {
                let request = v1::PublishRequest {
                    session_id: connection.session.0,
                    lease_id: lease.0,
                    generation: generation.0,
                    hashes,
                    slots,
                };
                let published = connection
                    .client
                    .clone()
                    .publish(request)
                    .await?
                    .into_inner();
                Ok(published.duplicates)
            },
        )
    }

    /// Makes blocks unfindable so that their slots can be written again.
    pub fn unpublish(
        &self,
        lease: LeaseId,
        generation: Generation,
        slots: Vec<u32>,
    ) -> Call<Unpublished> {
        self.call(
            "Unpublish",
            CALL_LIMIT,
            Settled::ByCaller,
            move |connection| async move {
                let request = v1::UnpublishRequest {
                    session_id: connection.session.0,
                    lease_id: lease.0,
                    generation: generation.0,
                    slots,
                };
                let unpublished = connection
                    .client
                    .clone()
                    .unpublish(request)
                    .await?
                    .into_inner();
                Ok(Unpublished {
                    pinned: unpublished.pinned_slots,
                    retry_after: Duration::from_millis(unpublished.retry_ms.into()),
                })
            },
        )
    }

    /// Finds the longest prefix run of blocks that the asker can load, of the first [`convert::MAX_BLOCKS`] hashes, and
    /// pins it. Fails when it takes longer than `limit`.
    pub fn lookup(&self, asker: &Asker, hashes: &[BlockHash], limit: Duration) -> Call<Found> {
        self.find(asker, hashes, limit, false)
    }

    pub(super) fn find(
        &self,
        asker: &Asker,
        hashes: &[BlockHash],
        limit: Duration,
        unpinned: bool,
    ) -> Call<Found> {
        // Pins count from before the request leaves.
        let sent = Instant::now();
        let hashes = convert::pack_hashes(&hashes[..hashes.len().min(convert::MAX_BLOCKS)]).into();
        let Asker {
            namespace,
            device,
            borrower,
        } = asker.clone();
        let settled = Settled::ByCaller;
        self.call("Lookup", limit, settled, move |connection| async move {
            let request = v1::LookupRequest {
                session_id: connection.session.0,
                namespace,
                hashes,
                device_uuid: device.map_or_else(String::new, String::from),
                unpinned,
                borrower_id: borrower.map_or_else(Vec::new, |id| id.0.to_vec()).into(),
                host_memory: true,
            };
            let found = connection
                .client
                .clone()
                .lookup(request)
                .await?
                .into_inner();
            let pin_for = Duration::from_millis(found.pin_ms.into());
            Ok(Found {
                runs: found.extents.iter().map(FoundRun::from).collect(),
                pin: (found.pin_id != 0).then_some(PinId(found.pin_id)),
                pinned_until: sent + pin_for,
                pin_for,
                coming: Coming {
                    blocks: found.coming_blocks,
                    within: Duration::from_millis(found.coming_ms.into()),
                },
            })
        })
    }

    /// Says what a borrower of this process is, and what it keeps in its own host memory. Whoever says it must wait for
    /// each answer before the next, so that they arrive in order.
    pub fn keep(&self, keep: Keep) -> Call<()> {
        let settled = Settled::ByCaller;
        self.call("Keep", CALL_LIMIT, settled, move |connection| async move {
            let request = v1::KeepRequest {
                session_id: connection.session.0,
                borrower_id: keep.borrower.0.to_vec().into(),
                namespace: keep.namespace,
                device_uuid: keep.device.into(),
                block_bytes: keep.block_bytes,
                shares: keep.shares,
                anew: keep.anew,
                kept_hashes: convert::pack_hashes(&keep.kept).into(),
                dropped_hashes: convert::pack_hashes(&keep.dropped).into(),
                closed: keep.closed,
                down_device_uuids: keep.down.into_iter().map(Into::into).collect(),
                host_memory_down: keep.host_down,
                host_memory: true,
                layer_bytes: keep.layer_bytes,
            };
            connection.client.clone().keep(request).await?;
            Ok(())
        })
    }

    /// Says what a disk of this process has, and takes what it has to do. Whoever says it must wait for each answer before the next.
    pub fn disk(&self, call: DiskCall) -> Call<DiskWork> {
        let settled = Settled::ByCaller;
        self.call("Disk", CALL_LIMIT, settled, move |connection| async move {
            let request = v1::DiskRequest {
                session_id: connection.session.0,
                device_uuid: call.name,
                anew: call.anew,
                state: call.state,
                namespace: call.namespace,
                block_bytes: call.block_bytes,
                stored_hashes: convert::pack_hashes(&call.stored).into(),
                dropped_hashes: convert::pack_hashes(&call.dropped).into(),
                take_to_store: call.take_to_store,
                take_wanted: call.take_wanted,
                wait_ms: u32::try_from(call.wait.as_millis()).unwrap_or(u32::MAX),
            };
            let work = connection.client.clone().disk(request).await?.into_inner();
            let read = |its: Vec<v1::DiskBlocks>| -> std::result::Result<Vec<DiskBlocks>, Fault> {
                let its = its.into_iter().map(|blocks| {
                    Ok(DiskBlocks {
                        hashes: convert::hashes("hashes", &blocks.hashes)?.collect(),
                        namespace: blocks.namespace,
                        layer_bytes: blocks.layer_bytes,
                    })
                });
                its.collect()
            };
            Ok(DiskWork {
                to_store: read(work.to_store)?,
                wanted: read(work.wanted)?,
            })
        })
    }

    /// Offers a region on the connection of that number, and on no other. Its descriptor, if it has one, goes over the fd
    /// socket first, on the calling thread.
    pub fn offer(&self, offer: OfferedRegion, export: &Export, epoch: u64) -> Call<()> {
        let connection = match self.connection() {
            Ok(connection) if connection.epoch == epoch => connection,
            Ok(_) => {
                let problem = "there is another connection now".to_owned();
                let socket = self.shared.config.socket.clone();
                return Call::failed("Offer", Error::Disconnected { socket, problem });
            }
            Err(error) => return Call::failed("Offer", error),
        };
        let (kind, opaque) = match export {
            Export::Fd(descriptor) => {
                let request = fd_socket::Request::Upload {
                    session: connection.session,
                    allocation: offer.allocation,
                };
                let uploaded = fd::upload(&connection.fd_socket, request, descriptor.as_fd());
                if let Err(error) = uploaded {
                    return Call::failed("Offer", error);
                }
                (HandleKind::PosixFd, Vec::new())
            }
            Export::Opaque(handle) => match handle {
                Handle::CudaIpc(opaque) | Handle::Fabric(opaque) => {
                    (handle.kind(), opaque.0.to_vec())
                }
                Handle::PosixFd => {
                    let problem = "a descriptor handle came without its descriptor";
                    return Call::failed("Offer", Error::config("export", problem));
                }
            },
        };
        self.call_on(
            &connection,
            "Offer",
            CALL_LIMIT,
            Settled::ByCaller,
            move |connection| async move {
                let request = v1::OfferRequest {
                    session_id: connection.session.0,
                    region_id: offer.region.0.to_vec().into(),
                    device_uuid: offer.device.to_string(),
                    allocation_id: offer.allocation.0.to_vec().into(),
                    offset: offer.offset,
                    bytes: offer.bytes,
                    slab_bytes: offer.slab_bytes,
                    handle: Some(v1::Handle {
                        kind: v1::HandleKind::from(kind).into(),
                        opaque: opaque.into(),
                        grant_token: Vec::new().into(),
                    }),
                    shared_allocation: offer.shared,
                    elastic: offer.elastic,
                };
                connection.client.clone().offer(request).await?;
                Ok(())
            },
        )
    }

    /// Asks for bytes back, giving lessees `drain` to move away (zero: the broker's default).
    pub fn withdraw(&self, what: WithdrawWhat, drain: Duration) -> Call<Withdrawing> {
        self.call(
            "Withdraw",
            CALL_LIMIT,
            Settled::ByCaller,
            move |connection| async move {
                let mut request = v1::WithdrawRequest {
                    session_id: connection.session.0,
                    drain_ms: convert::drain_request_ms(drain),
                    ..v1::WithdrawRequest::default()
                };
                match what {
                    WithdrawWhat::Regions(regions) => {
                        request.region_ids = (regions.iter())
                            .map(|region| region.0.to_vec().into())
                            .collect();
                    }
                    WithdrawWhat::Bytes { device, bytes } => {
                        request.bytes = bytes;
                        request.device_uuid = device.to_string();
                    }
                }
                let withdrawing = connection
                    .client
                    .clone()
                    .withdraw(request)
                    .await?
                    .into_inner();
                Ok(Withdrawing {
                    regions: (withdrawing.region_ids.iter())
                        .map(|id| convert::region_id("region_ids", id))
                        .collect::<std::result::Result<_, _>>()?,
                    bytes: withdrawing.bytes,
                })
            },
        )
    }

    /// Turns a grant into what the device layer imports, fetching its descriptor on the calling thread if it has
    /// one.
    ///
    /// # Errors
    /// When there is no connection, or the token is no longer good.
    pub fn open(&self, grant: &Grant) -> Result<Export> {
        match &grant.opening {
            Opening::Opaque(handle) => Ok(Export::Opaque(handle.clone())),
            Opening::Token(token) => {
                fd::fetch(&self.connection()?.fd_socket, *token).map(Export::Fd)
            }
        }
    }

    fn connection(&self) -> Result<Arc<Connection>> {
        self.check_origin()?;
        match &*self.shared.link.lock() {
            LinkState::Up(connection) => Ok(Arc::clone(connection)),
            down => Err(self.shared.down(down)),
        }
    }

    /// Puts one call on its way on the session's thread.
    fn call<T, Work>(
        &self,
        name: &'static str,
        limit: Duration,
        settled: Settled,
        work: impl FnOnce(Arc<Connection>) -> Work,
    ) -> Call<T>
    where
        T: Send + 'static,
        Work: Future<Output = std::result::Result<T, Fault>> + Send + 'static,
    {
        match self.connection() {
            Ok(connection) => self.call_on(&connection, name, limit, settled, work),
            Err(error) => Call::failed(name, error),
        }
    }

    fn call_on<T, Work>(
        &self,
        connection: &Arc<Connection>,
        name: &'static str,
        limit: Duration,
        settled: Settled,
        work: impl FnOnce(Arc<Connection>) -> Work,
    ) -> Call<T>
    where
        T: Send + 'static,
        Work: Future<Output = std::result::Result<T, Fault>> + Send + 'static,
    {
        let connection = Arc::clone(connection);
        let work = work(Arc::clone(&connection));
        let task = self.shared.runtime.spawn(async move {
            let outcome = match timeout(limit, work).await {
                Ok(outcome) => outcome.map_err(|fault| fault.error(name)),
                Err(_) => Err(Error::Deadline { call: name, limit }),
            };
            if settled == Settled::ByResuming && outcome.as_ref().is_err_and(Error::may_be_done) {
                connection.given_up.cancel();
            }
            outcome
        });
        Call::running(name, task, *self.shared.thread.lock())
    }
}

/// What lies in a slab that was left, as the broker says. It must be able to lie there.
fn read_inherited(
    inherited: &v1::InheritedLease,
    now: Instant,
) -> std::result::Result<Inherited, Fault> {
    let missing = || Fault::Answer("no grant".to_owned());
    let grant = Grant::read(inherited.grant.as_ref().ok_or_else(missing)?)?;
    let hashes = convert::hashes("leases.hashes", &inherited.hashes)?;
    let slots = &inherited.slots;
    let mut sorted = slots.clone();
    sorted.sort_unstable();
    let twice = sorted.windows(2).any(|pair| pair[0] == pair[1]);
    let beyond = sorted.last().is_some_and(|slot| *slot >= grant.slots);
    if hashes.len() != slots.len() || twice || beyond {
        let problem = format!(
            "lease {} is said to hold {} blocks in slots {sorted:?} of {}",
            grant.lease,
            hashes.len(),
            grant.slots
        );
        return Err(Fault::Answer(problem));
    }
    let retry = Duration::from_millis(inherited.retry_ms.into());
    Ok(Inherited {
        left: Left {
            blocks: hashes.zip(slots.iter().copied()).collect(),
            readers_until: (!retry.is_zero()).then(|| now + retry),
        },
        grant,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(status: Status) -> Error {
        Fault::from(status).error("Offer")
    }

    #[test]
    fn only_a_brokers_own_no_says_that_nothing_was_done() {
        for number in 0..=16 {
            let code = Code::from_i32(number);
            // What `broker/src/error.rs` refuses with, and what gRPC says of a method that is not there.
            let refuses = matches!(number, 3 | 5 | 6 | 7 | 8 | 9 | 12 | 16);
            let error = of(Status::new(code, "said"));
            assert_eq!(error.may_be_done(), !refuses, "{code:?}: {error}");
            assert_eq!(matches!(error, Error::Refused { .. }), refuses);
            // The same code, made up below gRPC when the connection was lost.
            let mut lost = Status::new(code, "said");
            lost.set_source(Arc::new(std::io::Error::other("reset")));
            let error = of(lost);
            assert!(matches!(error, Error::Lost { .. }) && error.may_be_done());
        }
        let unreadable = Fault::Answer("no grant".to_owned()).error("Share");
        assert!(unreadable.may_be_done());
    }
}
