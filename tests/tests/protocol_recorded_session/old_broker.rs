//! Today's client with the broker of the first release: a server that knows the recording only. It answers
//! UNIMPLEMENTED to calls that were added later, as gRPC servers do for methods that they lack.

use std::{
    convert::Infallible,
    future::Future,
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use prost::Message;
use swiftcache_client::session::{Asker, Demand, Observer, Revocation, Session, SessionConfig};
use swiftcache_proto::{
    domain::{BlockHash, FoundRun, LeaseId, PinId, Shortfall},
    traffic::Traffic,
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{
    Code, Request, Response, Status, Streaming,
    body::Body,
    codegen::http,
    server::{Grpc, NamedService, StreamingService, UnaryService},
    transport::Server,
};

use super::{
    Protocol, recording,
    script::{What, message, parse},
    wire::{PATIENCE, Raw},
};

/// A message from the broker on the session stream.
type Said = Result<Vec<u8>, Status>;

/// The broker of the recording.
#[derive(Clone)]
struct OldBroker(Arc<Old>);

struct Old {
    protocol: Protocol,
    recording: String,
    /// Every RPC that was called.
    called: Mutex<Vec<String>>,
    calls: watch::Sender<usize>,
    /// The messages that the client sent on its stream, without attach.
    said: mpsc::Sender<Vec<u8>>,
    /// The messages that the client is to receive.
    say: Mutex<Option<mpsc::Receiver<Said>>>,
}

impl Old {
    /// The first recorded answer to this RPC.
    fn answer(&self, rpc: &str) -> Result<Vec<u8>, Status> {
        self.called.lock().unwrap().push(rpc.to_owned());
        self.calls.send_modify(|calls| *calls += 1);
        let mut steps = self.recording.lines().filter_map(parse);
        // Takes the answers to the borrower only. Other clients of the recording made other requests.
        let found = steps.find(|step| {
            step.what == What::Answer && step.rpc == rpc && step.client.starts_with("borrower")
        });
        let found = found.ok_or_else(|| Status::unimplemented(""))?;
        let [_, output] = self.protocol.messages(rpc);
        Ok(message(output, &found.text).encode_to_vec())
    }
}

impl NamedService for OldBroker {
    const NAME: &'static str = "swiftcache.v1.Broker";
}

impl tower::Service<http::Request<Body>> for OldBroker {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let broker = self.clone();
        Box::pin(async move {
            let rpc = request.uri().path().rsplit('/').next().unwrap_or_default();
            let mut grpc = Grpc::new(Raw);
            Ok(match rpc {
                "Session" => grpc.streaming(broker, request).await,
                rpc => {
                    let answer = Recorded(broker.0.answer(rpc));
                    grpc.unary(answer, request).await
                }
            })
        })
    }
}

struct Recorded(Result<Vec<u8>, Status>);

impl UnaryService<Vec<u8>> for Recorded {
    type Response = Vec<u8>;
    type Future = std::future::Ready<Result<Response<Vec<u8>>, Status>>;

    fn call(&mut self, _: Request<Vec<u8>>) -> Self::Future {
        std::future::ready(self.0.clone().map(Response::new))
    }
}

impl StreamingService<Vec<u8>> for OldBroker {
    type Response = Vec<u8>;
    type ResponseStream = Pin<Box<dyn Stream<Item = Result<Vec<u8>, Status>> + Send>>;
    type Future =
        Pin<Box<dyn Future<Output = Result<Response<Self::ResponseStream>, Status>> + Send>>;

    fn call(&mut self, request: Request<Streaming<Vec<u8>>>) -> Self::Future {
        let broker = Arc::clone(&self.0);
        Box::pin(async move {
            let mut said = request.into_inner();
            said.message().await?;
            let [_, response] = broker.protocol.messages("Session");
            let attached = message(response, "attached { boot_id: 1 }").encode_to_vec();
            let say = broker.say.lock().unwrap().take();
            let say = say.ok_or_else(|| Status::unavailable("the session attached twice"))?;
            tokio::spawn(async move {
                while let Ok(Some(message)) = said.message().await {
                    if broker.said.send(message).await.is_err() {
                        break;
                    }
                }
            });
            let answers = tokio_stream::once(Ok(attached)).chain(ReceiverStream::new(say));
            Ok(Response::new(Box::pin(answers) as Self::ResponseStream))
        })
    }
}

/// Serves the recording on a socket.
struct Served {
    old: Arc<Old>,
    say: mpsc::Sender<Said>,
    heard: mpsc::Receiver<Vec<u8>>,
}

fn serve(socket: &Path) -> Served {
    let (said, heard) = mpsc::channel(16);
    let (say, to_say) = mpsc::channel(16);
    let old = Arc::new(Old {
        protocol: Protocol::old(),
        recording: recording(),
        called: Mutex::default(),
        calls: watch::Sender::new(0),
        said,
        say: Mutex::new(Some(to_say)),
    });
    let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
    let router = Server::builder().add_service(OldBroker(Arc::clone(&old)));
    tokio::spawn(router.serve_with_incoming(incoming));
    Served { old, say, heard }
}

/// Remembers revocations, and lets the session acknowledge them.
#[derive(Default)]
struct Listening(Mutex<Vec<Revocation>>);

impl Observer for Listening {
    fn revoked(&self, revocation: &Revocation) -> bool {
        self.0.lock().unwrap().push(*revocation);
        false
    }
}

fn hash(digit: u8) -> BlockHash {
    BlockHash([digit; 16])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn todays_client_works_with_an_old_broker() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("broker.sock");
    let mut broker = serve(&socket);
    let config = SessionConfig {
        socket,
        name: "today".to_owned(),
        tenant: String::new(),
    };
    let session = tokio::task::spawn_blocking(|| Session::connect(config));
    let session = session.await.unwrap().unwrap();
    let listening = Arc::new(Listening::default());
    let observer: Arc<dyn Observer> = Arc::clone(&listening) as _;
    session.observe(&observer);
    let (devices, links) = session.node().unwrap();
    assert_eq!((devices.len(), links.len()), (2, 2));
    // The old broker does not tell its default drain window, which is always this one.
    assert_eq!(session.drain_window(Duration::ZERO).as_secs(), 5);

    let demand = Demand {
        namespace: "model".to_owned(),
        device: devices[0].uuid.clone(),
        bytes: 1,
        block_bytes: 1 << 20,
        class: Default::default(),
        host_bytes: 0,
    };
    let leased = session.lease(demand).await.unwrap();
    assert_eq!(leased.shortfall, Shortfall::None);
    let grant = &leased.grants[0];
    assert_eq!((grant.slots, grant.slab_bytes), (64, 64 << 20));
    let hashes = [b'1', b'2', b'3', b'4'].map(hash);
    let publish = session.publish(grant.lease, grant.generation, &hashes, vec![3, 4, 5, 9]);
    assert_eq!(publish.await.unwrap(), Vec::<u32>::new());

    // The old broker does not know reports. The client sees this from one answer, sends no more of them, and goes on.
    session.moved(Traffic {
        lookup_blocks: 4,
        ..Traffic::default()
    });
    let mut calls = broker.old.calls.subscribe();
    let reported = calls.wait_for(|_| {
        let called = broker.old.called.lock().unwrap();
        called.iter().any(|rpc| rpc == "Report")
    });
    let reported = tokio::time::timeout(PATIENCE, reported).await;
    drop(reported.unwrap().unwrap());
    let found = session
        .lookup(&Asker::new("model"), &hashes, PATIENCE)
        .await
        .unwrap();
    let found_blocks: u32 = found.runs.iter().map(FoundRun::blocks).sum();
    assert_eq!((found_blocks, found.pin), (4, Some(PinId(1))));

    // The client obeys a revocation in its recorded form.
    let [request, response] = broker.old.protocol.messages("Session");
    let revoke =
        "revoke { lease_id: 1 generation: 1 reason: REVOKE_REASON_WITHDRAWN drain_ms: 30000 }";
    let revoke = message(response, revoke).encode_to_vec();
    broker.say.send(Ok(revoke)).await.unwrap();
    let said = tokio::time::timeout(PATIENCE, broker.heard.recv()).await;
    let acknowledged = message(request, "acknowledge { lease_id: 1 generation: 1 }");
    assert_eq!(said.unwrap().unwrap(), acknowledged.encode_to_vec());
    assert_eq!(listening.0.lock().unwrap()[0].lease, LeaseId(1));

    session.release(vec![LeaseId(1)]).await.unwrap();
    session.moved(Traffic {
        lookup_blocks: 5,
        ..Traffic::default()
    });
    drop(session);
    let left = calls.wait_for(|_| {
        let called = broker.old.called.lock().unwrap();
        called.last().is_some_and(|rpc| rpc == "Leave")
    });
    let left = tokio::time::timeout(PATIENCE, left).await;
    drop(left.unwrap().unwrap());
    let called = broker.old.called.lock().unwrap();
    let reports = called.iter().filter(|rpc| *rpc == "Report").count();
    assert_eq!(reports, 1, "{called:?}");
}

#[tokio::test]
async fn what_was_not_recorded_is_not_implemented() {
    let directory = tempfile::tempdir().unwrap();
    let broker = serve(&directory.path().join("broker.sock"));
    assert_eq!(
        broker.old.answer("Report").unwrap_err().code(),
        Code::Unimplemented
    );
    assert!(broker.old.answer("Lookup").is_ok());
}
