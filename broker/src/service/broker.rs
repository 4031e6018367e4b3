//! The `Broker` service: checks a request, lets its event happen, turns the reply into the answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::{
    convert::{
        self, InvalidField, MAX_BLOCKS, MAX_DEVICE_BYTES, MAX_DISK_WAIT_MS, MAX_LAYERS,
        MAX_NAME_BYTES, MAX_NAMESPACE_BYTES, MAX_PROBLEM_BYTES, MAX_TENANT_BYTES,
    },
    domain::{FoundRun, Generation, HandleKind, HomeBytes, LeaseId, SessionId},
    traffic::Traffic,
    v1::{self, broker_server::Broker},
};
use tonic::{Request, Response, Status, Streaming};

use super::{
    caller,
    node::{self, NodeFacts},
    peer,
    session::{OutgoingStream, open},
};
use crate::{
    core::{
        DiskBlocks, DiskSays, DiskState, DiskTakes, Event, InheritDemand, Keep, LeaseDemand,
        Lookup, Offer, Publish, Register, Reply, Withdraw, WithdrawWhat,
    },
    error::Refused,
    owner::{Owner, Reported},
};

/// The service. Answers FAILED_PRECONDITION on connections without a [`crate::peer::Peer`].
pub struct BrokerService {
    owner: Arc<Owner>,
    node: NodeFacts,
}

impl BrokerService {
    /// Serves the owner's state.
    pub fn new(owner: Arc<Owner>, node: NodeFacts) -> Self {
        Self { owner, node }
    }
}

#[tonic::async_trait]
impl Broker for BrokerService {
    type SessionStream = OutgoingStream;

    async fn register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<Response<v1::RegisterResponse>, Status> {
        let _timer = self.owner.metrics().time("Register");
        Ok(Response::new(self.do_register(request).await?))
    }

    async fn session(
        &self,
        request: Request<Streaming<v1::SessionRequest>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let _timer = self.owner.metrics().time("Session");
        let peer = peer(&request)?;
        let stream = open(Arc::clone(&self.owner), peer, request.into_inner()).await?;
        Ok(Response::new(stream))
    }

    async fn leave(
        &self,
        request: Request<v1::LeaveRequest>,
    ) -> Result<Response<v1::LeaveResponse>, Status> {
        let _timer = self.owner.metrics().time("Leave");
        let caller = caller(&peer(&request)?, request.get_ref().session_id);
        self.owner.apply(Event::Leave(caller)).await?;
        Ok(Response::new(v1::LeaveResponse {}))
    }

    async fn offer(
        &self,
        request: Request<v1::OfferRequest>,
    ) -> Result<Response<v1::OfferResponse>, Status> {
        let _timer = self.owner.metrics().time("Offer");
        self.do_offer(request).await?;
        let boot_id = self.owner.boot_id();
        Ok(Response::new(v1::OfferResponse { boot_id }))
    }

    async fn withdraw(
        &self,
        request: Request<v1::WithdrawRequest>,
    ) -> Result<Response<v1::WithdrawResponse>, Status> {
        let _timer = self.owner.metrics().time("Withdraw");
        Ok(Response::new(self.do_withdraw(request).await?))
    }

    async fn lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<Response<v1::LeaseResponse>, Status> {
        let _timer = self.owner.metrics().time("Lease");
        Ok(Response::new(self.do_lease(request).await?))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let _timer = self.owner.metrics().time("Release");
        self.do_release(request).await?;
        Ok(Response::new(v1::ReleaseResponse {}))
    }

    async fn share(
        &self,
        request: Request<v1::ShareRequest>,
    ) -> Result<Response<v1::ShareResponse>, Status> {
        let _timer = self.owner.metrics().time("Share");
        Ok(Response::new(self.do_share(request).await?))
    }

    async fn publish(
        &self,
        request: Request<v1::PublishRequest>,
    ) -> Result<Response<v1::PublishResponse>, Status> {
        let _timer = self.owner.metrics().time("Publish");
        Ok(Response::new(self.do_publish(request).await?))
    }

    async fn unpublish(
        &self,
        request: Request<v1::UnpublishRequest>,
    ) -> Result<Response<v1::UnpublishResponse>, Status> {
        let _timer = self.owner.metrics().time("Unpublish");
        Ok(Response::new(self.do_unpublish(request).await?))
    }

    async fn lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<Response<v1::LookupResponse>, Status> {
        let _timer = self.owner.metrics().time("Lookup");
        Ok(Response::new(self.do_lookup(request).await?))
    }

    async fn keep(
        &self,
        request: Request<v1::KeepRequest>,
    ) -> Result<Response<v1::KeepResponse>, Status> {
        let _timer = self.owner.metrics().time("Keep");
        self.do_keep(request).await?;
        Ok(Response::new(v1::KeepResponse {}))
    }

    async fn inherit(
        &self,
        request: Request<v1::InheritRequest>,
    ) -> Result<Response<v1::InheritResponse>, Status> {
        let _timer = self.owner.metrics().time("Inherit");
        Ok(Response::new(self.do_inherit(request).await?))
    }

    async fn disk(
        &self,
        request: Request<v1::DiskRequest>,
    ) -> Result<Response<v1::DiskResponse>, Status> {
        let _timer = self.owner.metrics().time("Disk");
        Ok(Response::new(self.do_disk(request).await?))
    }

    async fn report(
        &self,
        request: Request<v1::ReportRequest>,
    ) -> Result<Response<v1::ReportResponse>, Status> {
        let _timer = self.owner.metrics().time("Report");
        let caller = caller(&peer(&request)?, request.get_ref().session_id);
        let request = request.into_inner();
        let traffic = request.traffic.unwrap_or_default();
        let reported = Reported {
            traffic: Traffic::try_from(&traffic).map_err(Refused::from)?,
            routes_down: request.routes_down,
            homes: request.homes.map(HomeBytes::from),
        };
        self.owner.report(caller, &reported)?;
        Ok(Response::new(v1::ReportResponse {}))
    }
}

impl BrokerService {
    async fn do_register(
        &self,
        request: Request<v1::RegisterRequest>,
    ) -> Result<v1::RegisterResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let label = convert::optional_text("tenant", &request.tenant, MAX_TENANT_BYTES)?;
        let uid = peer.process.uid;
        let tenant = match label.as_str() {
            "" => uid.to_string(),
            label => format!("{uid}/{label}"),
        };
        let resume = request.resume_session_id;
        let register = Register {
            process: peer.process,
            connection: peer.connection,
            // 0 is "none" on the wire.
            fresh_id: SessionId(rand::random_range(1..=u64::MAX)),
            name: convert::text("name", &request.name, MAX_NAME_BYTES)?,
            tenant,
            resume: (resume != 0).then_some(SessionId(resume)),
            held: leases("held_lease_ids", &request.held_lease_ids)?,
            shared: leases("shared_lease_ids", &request.shared_lease_ids)?,
        };
        match self.owner.register(peer, register).await? {
            Reply::Registered {
                session,
                refused,
                regions,
            } => Ok(v1::RegisterResponse {
                session_id: session.0,
                boot_id: self.owner.boot_id(),
                devices: self.node.devices.clone(),
                links: self.node.links.clone(),
                fd_socket: self.node.fd_socket.clone(),
                refused_lease_ids: refused.into_iter().map(|lease| lease.0).collect(),
                region_ids: regions.iter().map(|id| id.0.to_vec().into()).collect(),
                default_drain_ms: self.node.drain_ms,
                host_devices: self.node.host_devices.clone(),
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_offer(&self, request: Request<v1::OfferRequest>) -> Result<(), Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let offer = Offer {
            caller: caller(&peer, request.session_id),
            region: convert::region_id("region_id", &request.region_id)?,
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            allocation: convert::allocation_id("allocation_id", &request.allocation_id)?,
            offset: request.offset,
            bytes: request.bytes,
            slab_bytes: request.slab_bytes,
            handle: convert::offered_handle(request.handle.as_ref())?,
            shared: request.shared_allocation,
            elastic: request.elastic,
        };
        let (session, allocation) = (offer.caller.session, offer.allocation);
        let by_descriptor = offer.handle.kind() == HandleKind::PosixFd;
        // Another process's session gets the core's answer, not one about descriptors.
        if by_descriptor && self.owner.is_session_of(session, peer.process) {
            self.owner.descriptors().check_offer(session, allocation)?;
        }
        self.owner.offer(offer, by_descriptor).await
    }

    async fn do_withdraw(
        &self,
        request: Request<v1::WithdrawRequest>,
    ) -> Result<v1::WithdrawResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let regions = convert::bounded("region_ids", &request.region_ids)?;
        let what = if regions.is_empty() {
            WithdrawWhat::Bytes {
                device: convert::device_uuid("device_uuid", &request.device_uuid)?,
                bytes: at_least_one("bytes", request.bytes)?,
            }
        } else {
            let regions = regions.iter();
            let regions = regions.map(|id| convert::region_id("region_ids", id));
            WithdrawWhat::Regions(regions.collect::<Result<_, _>>()?)
        };
        let withdraw = Withdraw {
            caller: caller(&peer, request.session_id),
            what,
            drain_ms: convert::drain_ms("drain_ms", request.drain_ms, self.node.drain_ms)?,
        };
        match self.owner.apply(Event::Withdraw(withdraw)).await? {
            Reply::Withdrawing { regions, bytes } => Ok(v1::WithdrawResponse {
                region_ids: regions.iter().map(|id| id.0.to_vec().into()).collect(),
                bytes,
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<v1::LeaseResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let caller = caller(&peer, request.session_id);
        let demand = LeaseDemand {
            caller,
            namespace: convert::text("namespace", &request.namespace, MAX_NAMESPACE_BYTES)?,
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            bytes: match request.host_bytes {
                0 => at_least_one("bytes", request.bytes)?,
                _ => request.bytes,
            },
            block_bytes: at_least_one("block_bytes", request.block_bytes)?,
            class: convert::lease_class("class", request.class)?,
            host_bytes: request.host_bytes,
        };
        match self.owner.apply(Event::Lease(demand)).await? {
            Reply::Leased { grants, shortfall } => {
                let grants = grants.into_iter();
                Ok(v1::LeaseResponse {
                    grants: grants
                        .map(|grant| node::grant(&self.owner, grant, caller))
                        .collect(),
                    shortfall: v1::Shortfall::from(shortfall).into(),
                })
            }
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_inherit(
        &self,
        request: Request<v1::InheritRequest>,
    ) -> Result<v1::InheritResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let caller = caller(&peer, request.session_id);
        let demand = InheritDemand {
            caller,
            namespace: convert::text("namespace", &request.namespace, MAX_NAMESPACE_BYTES)?,
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            bytes: request.bytes,
            host_bytes: request.host_bytes,
            block_bytes: at_least_one("block_bytes", request.block_bytes)?,
        };
        let Reply::Inherited { leases, more } = self.owner.apply(Event::Inherit(demand)).await?
        else {
            return Err(Refused::OutOfTurn);
        };
        let inherited = leases.into_iter().map(|its| {
            let (hashes, slots): (Vec<_>, Vec<_>) = its.blocks.into_iter().unzip();
            v1::InheritedLease {
                grant: Some(node::grant(&self.owner, its.grant, caller)),
                hashes: convert::pack_hashes(&hashes).into(),
                slots,
                retry_ms: its.retry_ms,
            }
        });
        Ok(v1::InheritResponse {
            leases: inherited.collect(),
            more,
        })
    }

    async fn do_release(&self, request: Request<v1::ReleaseRequest>) -> Result<(), Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let caller = caller(&peer, request.session_id);
        let leases = leases("lease_ids", &request.lease_ids)?;
        let release = Event::Release {
            caller,
            leases: leases.clone(),
            unmappable: request.unmappable,
            bequeath: request.bequeath,
        };
        self.owner.apply(release).await?;
        self.owner.descriptors().let_go(caller.session, &leases);
        Ok(())
    }

    async fn do_share(
        &self,
        request: Request<v1::ShareRequest>,
    ) -> Result<v1::ShareResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let caller = caller(&peer, request.session_id);
        let event = Event::Share {
            caller,
            lease: LeaseId(request.lease_id),
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
        };
        match self.owner.apply(event).await? {
            Reply::Shared(grant) => Ok(v1::ShareResponse {
                grant: Some(node::grant(&self.owner, grant, caller)),
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_publish(
        &self,
        request: Request<v1::PublishRequest>,
    ) -> Result<v1::PublishResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let hashes = convert::hashes("hashes", &request.hashes)?;
        let slots = convert::bounded("slots", &request.slots)?;
        if hashes.len() != slots.len() {
            let problem = format!("has {} entries for {} hashes", slots.len(), hashes.len());
            return Err(InvalidField::new("slots", problem).into());
        }
        let publish = Publish {
            caller: caller(&peer, request.session_id),
            lease: LeaseId(request.lease_id),
            generation: Generation(request.generation),
            blocks: hashes.zip(slots.iter().copied()).collect(),
        };
        match self.owner.apply(Event::Publish(publish)).await? {
            Reply::Published { duplicates } => Ok(v1::PublishResponse { duplicates }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_unpublish(
        &self,
        request: Request<v1::UnpublishRequest>,
    ) -> Result<v1::UnpublishResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        convert::bounded("slots", &request.slots)?;
        let event = Event::Unpublish {
            caller: caller(&peer, request.session_id),
            lease: LeaseId(request.lease_id),
            generation: Generation(request.generation),
            slots: request.slots,
        };
        match self.owner.apply(event).await? {
            Reply::Unpublished { pinned, retry_ms } => Ok(v1::UnpublishResponse {
                pinned_slots: pinned,
                retry_ms,
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_lookup(
        &self,
        request: Request<v1::LookupRequest>,
    ) -> Result<v1::LookupResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let device = &request.device_uuid;
        let device = (!device.is_empty()).then(|| convert::device_uuid("device_uuid", device));
        let borrower = &request.borrower_id;
        let borrower =
            (!borrower.is_empty()).then(|| convert::borrower_id("borrower_id", borrower));
        let lookup = Lookup {
            caller: caller(&peer, request.session_id),
            namespace: convert::text("namespace", &request.namespace, MAX_NAMESPACE_BYTES)?,
            hashes: convert::hashes("hashes", &request.hashes)?.collect(),
            device: device.transpose()?,
            borrower: borrower.transpose()?,
            unpinned: request.unpinned,
            host_memory: request.host_memory,
        };
        match self.owner.apply(Event::Lookup(lookup)).await? {
            Reply::Found {
                runs,
                pin,
                coming,
                coming_ms,
            } => Ok(v1::LookupResponse {
                coming_blocks: coming,
                coming_ms,
                hit_blocks: runs.iter().map(FoundRun::blocks).sum(),
                extents: runs.into_iter().map(v1::Extent::from).collect(),
                pin_id: pin.map_or(0, |pin| pin.0),
                pin_ms: pin.map_or(0, |_| self.node.pin_ms),
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    /// The answer waits for work, as long as the disk lets it.
    async fn do_disk(
        &self,
        request: Request<v1::DiskRequest>,
    ) -> Result<v1::DiskResponse, Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let caller = caller(&peer, request.session_id);
        let namespace = match request.namespace.as_str() {
            "" => None,
            name => Some(convert::text("namespace", name, MAX_NAMESPACE_BYTES)?),
        };
        let says = DiskSays {
            caller,
            name: convert::text("device_uuid", &request.device_uuid, MAX_DEVICE_BYTES)?,
            anew: request.anew,
            state: request.state.map(disk_state).transpose()?,
            block_bytes: match &namespace {
                Some(_) => at_least_one("block_bytes", request.block_bytes)?,
                None => 0,
            },
            namespace,
            stored: convert::hashes("stored_hashes", &request.stored_hashes)?.collect(),
            dropped: convert::hashes("dropped_hashes", &request.dropped_hashes)?.collect(),
        };
        let takes = DiskTakes {
            caller,
            to_store: at_most("take_to_store", request.take_to_store, MAX_BLOCKS as u32)? as usize,
            wanted: at_most("take_wanted", request.take_wanted, MAX_BLOCKS as u32)? as usize,
        };
        let wait = at_most("wait_ms", request.wait_ms, MAX_DISK_WAIT_MS)?;
        let deadline = Instant::now() + Duration::from_millis(wait.into());
        self.owner.apply(Event::DiskSays(says)).await?;
        if takes.to_store == 0 && takes.wanted == 0 {
            return Ok(v1::DiskResponse::default());
        }
        loop {
            let told = self.owner.disk_work().notified();
            let mut told = std::pin::pin!(told);
            // What comes from here on is heard.
            told.as_mut().enable();
            let work = self.owner.apply(Event::DiskTakes(takes.clone())).await?;
            let Reply::DiskWork { to_store, wanted } = work else {
                return Err(Refused::OutOfTurn);
            };
            let late = Instant::now() >= deadline;
            if late || !to_store.is_empty() || !wanted.is_empty() {
                let blocks = |its: Vec<DiskBlocks>| its.into_iter().map(disk_blocks).collect();
                return Ok(v1::DiskResponse {
                    to_store: blocks(to_store),
                    wanted: blocks(wanted),
                });
            }
            let _ = tokio::time::timeout_at(deadline.into(), told).await;
        }
    }

    async fn do_keep(&self, request: Request<v1::KeepRequest>) -> Result<(), Refused> {
        let peer = peer(&request)?;
        let request = request.into_inner();
        let keep = Keep {
            caller: caller(&peer, request.session_id),
            borrower: convert::borrower_id("borrower_id", &request.borrower_id)?,
            namespace: convert::text("namespace", &request.namespace, MAX_NAMESPACE_BYTES)?,
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            block_bytes: at_least_one("block_bytes", request.block_bytes)?,
            shares: request.shares,
            anew: request.anew,
            kept: convert::hashes("kept_hashes", &request.kept_hashes)?.collect(),
            dropped: convert::hashes("dropped_hashes", &request.dropped_hashes)?.collect(),
            closed: request.closed,
            down: convert::bounded("down_device_uuids", &request.down_device_uuids)?
                .iter()
                .map(|uuid| convert::device_uuid("down_device_uuids", uuid))
                .collect::<Result<_, _>>()?,
            host_down: request.host_memory_down,
            host_memory: request.host_memory,
            layer_bytes: match request.layer_bytes.len() {
                0..=MAX_LAYERS => request.layer_bytes,
                count => {
                    let problem = format!("has {count} entries; takes at most {MAX_LAYERS}");
                    return Err(InvalidField::new("layer_bytes", problem).into());
                }
            },
        };
        self.owner.apply(Event::Keep(keep)).await?;
        Ok(())
    }
}

fn disk_state(state: v1::DiskState) -> Result<DiskState, InvalidField> {
    Ok(DiskState {
        bytes: state.bytes,
        used_bytes: state.used_bytes,
        memory_bytes: state.memory_bytes,
        bytes_per_second: state.bytes_per_second,
        problem: convert::optional_text("state.problem", &state.problem, MAX_PROBLEM_BYTES)?,
        written_blocks: state.written_blocks,
        read_blocks: state.read_blocks,
        corrupt_blocks: state.corrupt_blocks,
        failed_blocks: state.failed_blocks,
        evicted_blocks: state.evicted_blocks,
        path: convert::optional_text("state.path", &state.path, MAX_PROBLEM_BYTES)?,
    })
}

fn disk_blocks(blocks: DiskBlocks) -> v1::DiskBlocks {
    v1::DiskBlocks {
        namespace: blocks.namespace.to_string(),
        layer_bytes: blocks.layer_bytes,
        hashes: convert::pack_hashes(&blocks.hashes).into(),
    }
}

fn at_most(field: &'static str, value: u32, most: u32) -> Result<u32, InvalidField> {
    match value <= most {
        true => Ok(value),
        false => Err(InvalidField::new(
            field,
            format!("is {value}; takes at most {most}"),
        )),
    }
}

fn leases(field: &'static str, ids: &[u64]) -> Result<Vec<LeaseId>, InvalidField> {
    let ids = convert::bounded(field, ids)?;
    Ok(ids.iter().map(|id| LeaseId(*id)).collect())
}

fn at_least_one(field: &'static str, value: u64) -> Result<u64, InvalidField> {
    match value {
        0 => Err(InvalidField::new(field, "is 0; takes at least 1")),
        value => Ok(value),
    }
}
