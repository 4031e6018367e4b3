//! Calls and messages of the protocol without the client library, for requests that the library never makes.

use std::{
    fs::File,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use swiftcache_proto::{
    domain::{AllocationId, SessionId},
    fd_socket,
    v1::{
        self, admin_client::AdminClient, broker_client::BrokerClient, session_request,
        session_response,
    },
};
use tokio::{runtime::Runtime, sync::mpsc};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use crate::PATIENCE;
pub use crate::descriptors::{exchange, fetch, memory};

/// A connection to the broker.
#[derive(Clone, Debug)]
pub struct Wire {
    runtime: Arc<Runtime>,
    channel: Channel,
    fd_socket: PathBuf,
}

impl Wire {
    /// A connection to the broker at `socket`. It connects when it is first used, and again after the broker has
    /// restarted.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn new(socket: &Path) -> Result<Self> {
        Self::open(socket, |endpoint| endpoint)
    }

    /// A connection like [`Self::new`] that holds little of what its user has not read yet. The rest waits at the broker.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn holding_little(socket: &Path) -> Result<Self> {
        // The smallest that HTTP/2 allows by default.
        let window = u32::from(u16::MAX);
        Self::open(socket, |endpoint| {
            let endpoint = endpoint.initial_stream_window_size(window);
            endpoint.initial_connection_window_size(window)
        })
    }

    /// A connection that has no room for any answer.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn reading_nothing(socket: &Path) -> Result<Self> {
        Self::open(socket, |endpoint| endpoint.initial_stream_window_size(0))
    }

    fn open(socket: &Path, adjust: impl FnOnce(Endpoint) -> Endpoint) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let channel = {
            let _inside = runtime.enter();
            let endpoint = Endpoint::try_from(format!("unix://{}", socket.display()))?;
            adjust(endpoint).timeout(PATIENCE).connect_lazy()
        };
        Ok(Self {
            runtime: Arc::new(runtime),
            channel,
            fd_socket: socket.with_file_name("broker-fd.sock"),
        })
    }

    /// Another connection to the same broker, on the same thread. A connection takes no more than 200 streams.
    ///
    /// # Errors
    /// When `socket` is not a valid path of a socket.
    pub fn another(&self, socket: &Path) -> Result<Self> {
        let _inside = self.runtime.enter();
        let channel = Endpoint::try_from(format!("unix://{}", socket.display()))?
            .timeout(PATIENCE)
            .connect_lazy();
        Ok(Self {
            channel,
            ..self.clone()
        })
    }

    /// Waits for an answer.
    pub fn wait<F: Future>(&self, answer: F) -> F::Output {
        self.runtime.block_on(answer)
    }

    /// The gRPC channel of the connection.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The Broker service.
    pub fn broker(&self) -> BrokerClient<Channel> {
        BrokerClient::new(self.channel())
    }

    /// The Admin service.
    pub fn admin(&self) -> AdminClient<Channel> {
        // Some answers list everything on the node, so their size has no bound.
        AdminClient::new(self.channel()).max_decoding_message_size(usize::MAX)
    }

    /// The fd socket.
    pub fn fd_socket(&self) -> &Path {
        &self.fd_socket
    }

    /// Registers a session of this process.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn member(&self, name: &str, tenant: &str) -> Result<Member, Status> {
        let request = v1::RegisterRequest {
            name: name.to_owned(),
            tenant: tenant.to_owned(),
            ..Default::default()
        };
        let registered = self.wait(self.broker().register(request))?.into_inner();
        Ok(Member {
            wire: self.clone(),
            session: registered.session_id,
        })
    }
}

/// A session of this process that does nothing by itself: it attaches no stream and acknowledges no revocation.
#[derive(Clone, Debug)]
pub struct Member {
    /// The connection.
    pub wire: Wire,
    /// The session's id.
    pub session: u64,
}

impl Member {
    /// Offers a region that is a whole new allocation. Both have this `id`. Returns the memory.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn offer(&self, id: [u8; 16], device: &str, slabs: u64, slab_bytes: u64) -> Result<File> {
        self.offer_to(id, device, slabs, slab_bytes, false)
    }

    /// The same. Tenants may share the allocation, or not.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn offer_to(
        &self,
        id: [u8; 16],
        device: &str,
        slabs: u64,
        slab_bytes: u64,
        shared: bool,
    ) -> Result<File> {
        let memory = memory(slabs * slab_bytes)?;
        self.upload(id, &memory)?;
        let offer = v1::OfferRequest {
            session_id: self.session,
            region_id: id.to_vec().into(),
            device_uuid: device.to_owned(),
            allocation_id: id.to_vec().into(),
            offset: 0,
            bytes: slabs * slab_bytes,
            slab_bytes,
            handle: Some(v1::Handle {
                kind: v1::HandleKind::PosixFd.into(),
                ..Default::default()
            }),
            shared_allocation: shared,
            ..Default::default()
        };
        self.wire.wait(self.wire.broker().offer(offer))?;
        Ok(memory)
    }

    /// Uploads an allocation's descriptor.
    ///
    /// # Errors
    /// When the broker does not take it.
    pub fn upload(&self, allocation: [u8; 16], memory: &File) -> Result<()> {
        let request = fd_socket::Request::Upload {
            session: SessionId(self.session),
            allocation: AllocationId(allocation),
        };
        let descriptors = [memory.as_fd()];
        let (status, _) = exchange(self.wire.fd_socket(), &request, &descriptors)?;
        ensure!(status == fd_socket::Status::Ok, "{status:?}");
        Ok(())
    }

    /// Leases up to `bytes` for `namespace`, for an engine that computes on `device`.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn lease(
        &self,
        namespace: &str,
        device: &str,
        bytes: u64,
        block_bytes: u64,
    ) -> Result<v1::LeaseResponse, Status> {
        let demand = v1::LeaseRequest {
            session_id: self.session,
            namespace: namespace.to_owned(),
            device_uuid: device.to_owned(),
            bytes,
            block_bytes,
            ..Default::default()
        };
        let leased = self.wire.wait(self.wire.broker().lease(demand))?;
        Ok(leased.into_inner())
    }

    /// Fetches the memory that a grant names.
    ///
    /// # Errors
    /// When the broker does not give it.
    pub fn open(&self, grant: &v1::Grant) -> Result<File> {
        let handle = grant.handle.as_ref().context("a grant without a handle")?;
        match fetch(self.wire.fd_socket(), &handle.grant_token)? {
            (fd_socket::Status::Ok, Some(memory)) => Ok(File::from(memory)),
            (status, _) => bail!("fetching a descriptor: {status:?}"),
        }
    }

    /// Publishes blocks in a lease. The first block is in slot 0.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn publish(&self, lease: u64, generation: u64, hashes: &[[u8; 16]]) -> Result<(), Status> {
        let publish = v1::PublishRequest {
            session_id: self.session,
            lease_id: lease,
            generation,
            hashes: hashes.concat().into(),
            slots: (0..).zip(hashes).map(|(slot, _)| slot).collect(),
        };
        self.wire
            .wait(self.wire.broker().publish(publish))
            .map(drop)
    }

    /// Looks these blocks up. Returns how many of them, counted from the first, the broker finds.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn hits(&self, namespace: &str, hashes: &[[u8; 16]]) -> Result<u32, Status> {
        let lookup = v1::LookupRequest {
            session_id: self.session,
            namespace: namespace.to_owned(),
            hashes: hashes.concat().into(),
            ..v1::LookupRequest::default()
        };
        let found = self.wire.wait(self.wire.broker().lookup(lookup))?;
        Ok(found.into_inner().hit_blocks)
    }

    /// Gives a lease back.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn release(&self, lease: u64) -> Result<(), Status> {
        let release = v1::ReleaseRequest {
            session_id: self.session,
            lease_ids: vec![lease],
            unmappable: false,
            bequeath: false,
        };
        let released = self.wire.wait(self.wire.broker().release(release));
        released.map(drop)
    }

    /// Withdraws regions.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn withdraw(&self, regions: &[[u8; 16]], drain_ms: u32) -> Result<(), Status> {
        let withdraw = v1::WithdrawRequest {
            session_id: self.session,
            region_ids: regions.iter().map(|id| id.to_vec().into()).collect(),
            drain_ms,
            ..Default::default()
        };
        self.wire
            .wait(self.wire.broker().withdraw(withdraw))
            .map(drop)
    }

    /// Resumes the session and claims the leases `held`. Returns those that are not the session's.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn resume(&self, held: &[u64]) -> Result<Vec<u64>, Status> {
        let request = v1::RegisterRequest {
            name: "resumed".to_owned(),
            resume_session_id: self.session,
            held_lease_ids: held.to_vec(),
            ..Default::default()
        };
        let registered = self.wire.wait(self.wire.broker().register(request))?;
        Ok(registered.into_inner().refused_lease_ids)
    }

    /// Ends the session.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn leave(&self) -> Result<(), Status> {
        let leave = v1::LeaveRequest {
            session_id: self.session,
        };
        self.wire.wait(self.wire.broker().leave(leave)).map(drop)
    }

    /// Attaches the session's stream.
    ///
    /// # Errors
    /// When the broker refuses.
    pub fn attach(&self) -> Result<Stream> {
        let (send, requests) = mpsc::unbounded_channel();
        let attach = session_request::Message::Attach(v1::Attach {
            session_id: self.session,
        });
        send.send(v1::SessionRequest {
            message: Some(attach),
        })?;
        let requests = UnboundedReceiverStream::new(requests);
        let mut broker = self.wire.broker();
        let receive = self.wire.wait(broker.session(requests))?.into_inner();
        let mut stream = Stream {
            wire: self.wire.clone(),
            send,
            receive,
        };
        let first = stream.hear()?;
        ensure!(
            matches!(first, session_response::Message::Attached(_)),
            "{first:?}"
        );
        Ok(stream)
    }
}

/// A session's stream.
#[derive(Debug)]
pub struct Stream {
    wire: Wire,
    send: mpsc::UnboundedSender<v1::SessionRequest>,
    receive: Streaming<v1::SessionResponse>,
}

impl Stream {
    /// Waits for the broker's next message about regions and leases. Holds of a device are passed over: anybody may
    /// begin one at any time.
    ///
    /// # Errors
    /// When the stream ends, or no message comes within [`PATIENCE`].
    pub fn hear(&mut self) -> Result<session_response::Message> {
        loop {
            let receive = &mut self.receive;
            let next = self
                .wire
                .wait(async { tokio::time::timeout(PATIENCE, receive.message()).await });
            let message = next.context("the broker sends no message")??;
            let message = message.context("the stream ended")?.message;
            match message.context("an empty message")? {
                session_response::Message::DeviceHold(_) => {}
                message => return Ok(message),
            }
        }
    }

    /// Waits for a revocation.
    ///
    /// # Errors
    /// When another message comes.
    pub fn revocation(&mut self) -> Result<v1::Revoke> {
        match self.hear()? {
            session_response::Message::Revoke(revoke) => Ok(revoke),
            other => bail!("not a revocation: {other:?}"),
        }
    }

    /// Waits for the message that a region is returned. Returns the region's id.
    ///
    /// # Errors
    /// When another message comes.
    pub fn returned(&mut self) -> Result<Vec<u8>> {
        match self.hear()? {
            session_response::Message::Returned(returned) => Ok(returned.region_id.to_vec()),
            other => bail!("not a returned region: {other:?}"),
        }
    }

    /// Sends a message.
    ///
    /// # Errors
    /// When the stream is gone.
    pub fn say(&self, message: session_request::Message) -> Result<()> {
        Ok(self.send.send(v1::SessionRequest {
            message: Some(message),
        })?)
    }

    /// Acknowledges a revocation.
    ///
    /// # Errors
    /// When the stream is gone.
    pub fn acknowledge(&self, lease_id: u64, generation: u64) -> Result<()> {
        self.say(session_request::Message::Acknowledge(v1::Acknowledge {
            lease_id,
            generation,
        }))
    }
}
