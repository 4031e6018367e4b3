//! A broker of its own for each test, on sockets in a temporary directory, and clients that speak to it.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream as StdUnixStream,
    },
    path::{Path, PathBuf},
};

use hyper_util::rt::TokioIo;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use swiftcache_broker::{
    config::Config,
    probe::{self, ProbeChoice},
    serve::Broker,
};
use swiftcache_proto::{
    domain::{AllocationId, BlockHash, SessionId},
    fd_socket::{REPLY_BYTES, Request, Status},
    v1::{
        self, admin_client::AdminClient, broker_client::BrokerClient, session_request,
        session_response,
    },
};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

pub(crate) const SLAB: u64 = 1 << 20;
pub(crate) const BLOCK: u64 = 64 << 10;

/// A running broker and its directory.
pub(crate) struct Node {
    pub(crate) directory: TempDir,
    pub(crate) config: Config,
    pub(crate) broker: Broker,
}

impl Node {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory, |_| {}).await
    }

    pub(crate) async fn start_in(directory: TempDir, adjust: impl FnOnce(&mut Config)) -> Self {
        let mut config = config(directory.path());
        adjust(&mut config);
        let probe = probe::open(config.probe, config.topology.as_deref()).unwrap();
        let broker = Broker::start(&config, probe).await.unwrap();
        Self {
            directory,
            config,
            broker,
        }
    }

    /// Stops the broker and gives its directory back.
    pub(crate) async fn stop(self) -> TempDir {
        assert!(self.broker.drain().await, "something had to be cut off");
        self.directory
    }

    pub(crate) fn fd_socket(&self) -> PathBuf {
        self.config.fd_socket()
    }

    pub(crate) async fn client(&self) -> BrokerClient<Channel> {
        BrokerClient::new(connect(&self.config.socket).await)
    }

    pub(crate) async fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(connect(&self.config.socket).await)
    }

    pub(crate) async fn member(&self, name: &str) -> Member {
        let mut client = self.client().await;
        let registered = client.register(hello(name)).await.unwrap().into_inner();
        Member {
            client,
            session: registered.session_id,
        }
    }

    /// A donor with a descriptor-backed region on SIM-0 of `slabs` slabs.
    pub(crate) async fn donor(&self, slabs: u64) -> Member {
        let mut donor = self.member("donor").await;
        let memory = descriptor();
        let status = upload(&self.fd_socket(), donor.session, [1; 16], &[memory.as_fd()]);
        assert_eq!(status, Status::Ok);
        let offer = donor.offer([1; 16], slabs);
        donor.client.offer(offer).await.unwrap();
        donor
    }
}

pub(crate) fn config(directory: &Path) -> Config {
    Config {
        socket: directory.join("broker.sock"),
        probe: ProbeChoice::Simulated,
        topology: Some("pcie-4".to_owned()),
        // Nothing is cut off for want of a processor.
        shutdown_ms: 180_000,
        ..Config::default()
    }
}

pub(crate) async fn connect(socket: &Path) -> Channel {
    let socket = socket.to_owned();
    let connect = move |_| {
        let socket = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(socket).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    };
    Endpoint::from_static("http://localhost")
        .connect_with_connector(tower::service_fn(connect))
        .await
        .unwrap()
}

pub(crate) fn hello(name: &str) -> v1::RegisterRequest {
    v1::RegisterRequest {
        name: name.to_owned(),
        ..Default::default()
    }
}

/// A session.
pub(crate) struct Member {
    pub(crate) client: BrokerClient<Channel>,
    pub(crate) session: u64,
}

impl Member {
    pub(crate) fn offer(&self, region: [u8; 16], slabs: u64) -> v1::OfferRequest {
        v1::OfferRequest {
            session_id: self.session,
            region_id: region.to_vec().into(),
            device_uuid: "SIM-0".to_owned(),
            allocation_id: vec![1; 16].into(),
            offset: 0,
            bytes: slabs * SLAB,
            slab_bytes: SLAB,
            handle: Some(v1::Handle {
                kind: v1::HandleKind::PosixFd.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(crate) fn demand(&self, bytes: u64) -> v1::LeaseRequest {
        v1::LeaseRequest {
            session_id: self.session,
            namespace: "model".to_owned(),
            device_uuid: "SIM-1".to_owned(),
            bytes,
            block_bytes: BLOCK,
            ..Default::default()
        }
    }

    pub(crate) async fn lease(&mut self, bytes: u64) -> v1::LeaseResponse {
        let demand = self.demand(bytes);
        self.client.lease(demand).await.unwrap().into_inner()
    }

    pub(crate) fn withdraw(&self, region: [u8; 16]) -> v1::WithdrawRequest {
        v1::WithdrawRequest {
            session_id: self.session,
            region_ids: vec![region.to_vec().into()],
            ..Default::default()
        }
    }

    /// Attaches the session's stream.
    pub(crate) async fn attach(&mut self) -> Attached {
        let (send, requests) = mpsc::unbounded_channel();
        let attach = session_request::Message::Attach(v1::Attach {
            session_id: self.session,
        });
        send.send(wrap(attach)).unwrap();
        let requests = UnboundedReceiverStream::new(requests);
        let receive = self.client.session(requests).await.unwrap().into_inner();
        let mut attached = Attached { send, receive };
        let first = attached.next().await;
        assert!(matches!(first, session_response::Message::Attached(_)));
        attached
    }
}

/// A session's stream.
pub(crate) struct Attached {
    pub(crate) send: mpsc::UnboundedSender<v1::SessionRequest>,
    pub(crate) receive: Streaming<v1::SessionResponse>,
}

impl Attached {
    pub(crate) async fn next(&mut self) -> session_response::Message {
        let message = self.receive.message().await.unwrap();
        message.unwrap().message.unwrap()
    }

    pub(crate) fn say(&self, message: session_request::Message) {
        self.send.send(wrap(message)).unwrap();
    }

    /// Waits for a revocation and acknowledges it.
    pub(crate) async fn let_go(&mut self) -> v1::Revoke {
        let session_response::Message::Revoke(revoke) = self.next().await else {
            panic!("not a revocation");
        };
        self.say(session_request::Message::Acknowledge(v1::Acknowledge {
            lease_id: revoke.lease_id,
            generation: revoke.generation,
        }));
        revoke
    }
}

fn wrap(message: session_request::Message) -> v1::SessionRequest {
    v1::SessionRequest {
        message: Some(message),
    }
}

/// Memory that says who it is.
pub(crate) fn descriptor() -> OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let memory = rustix::fs::memfd_create("region", flags).unwrap();
    rustix::io::write(&memory, b"the donor's bytes").unwrap();
    memory
}

pub(crate) fn upload(
    socket: &Path,
    session: u64,
    allocation: [u8; 16],
    descriptors: &[BorrowedFd<'_>],
) -> Status {
    let request = Request::Upload {
        session: SessionId(session),
        allocation: AllocationId(allocation),
    };
    let mut stream = StdUnixStream::connect(socket).unwrap();
    send(&stream, &request.encode(), descriptors);
    receive(&mut stream).0.unwrap()
}

pub(crate) fn fetch(socket: &Path, token: &[u8]) -> (Status, Option<OwnedFd>) {
    let request = Request::Fetch {
        token: token.try_into().unwrap(),
    };
    let mut stream = StdUnixStream::connect(socket).unwrap();
    send(&stream, &request.encode(), &[]);
    let (status, descriptor) = receive(&mut stream);
    (status.unwrap(), descriptor)
}

pub(crate) fn send(stream: &StdUnixStream, frame: &[u8], descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let flags = SendFlags::NOSIGNAL;
    sendmsg(stream, &[IoSlice::new(frame)], &mut control, flags).unwrap();
}

/// The reply, if one came before the end, and the descriptor beside it.
pub(crate) fn receive(stream: &mut StdUnixStream) -> (Option<Status>, Option<OwnedFd>) {
    let mut frame = [0; REPLY_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut frame)];
    let Ok(received) = recvmsg(&*stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC) else {
        return (None, None);
    };
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let status = (received.bytes > 0).then(|| Status::decode(frame).unwrap());
    (status, descriptor)
}

/// `count` packed hashes, each unlike the others.
pub(crate) fn hashes(count: u8) -> Vec<u8> {
    let hashes: Vec<_> = (0..count).map(|hash| BlockHash([hash; 16])).collect();
    swiftcache_proto::convert::pack_hashes(&hashes)
}
