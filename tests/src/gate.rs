//! A gate before the broker: passes every call on, but refuses or holds those it is told to. The node's broker sees
//! this process at the other end, so sessions of the test's own process work through it.

use std::{
    collections::HashMap,
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use rand::{Rng, rngs::StdRng};
use swiftcache_client::session::Session;
use swiftcache_proto::v1::{
    self,
    broker_client::BrokerClient,
    broker_server::{Broker, BrokerServer},
};
use tokio::{net::UnixListener, runtime::Runtime, sync::watch};
use tokio_stream::{Stream, StreamExt, wrappers::UnixListenerStream};
use tonic::{
    Code, Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};

use crate::node::{self, Node};

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It came to the gate.
    Arrived,
    /// The broker's answer went back.
    Answered,
    /// The gate refused it.
    Refused,
    /// The caller went away before it was answered.
    GivenUp,
}

#[derive(Debug, Default)]
struct Rules {
    refused: HashMap<&'static str, usize>,
    garbled: Option<StdRng>,
    log: Vec<(&'static str, Stage)>,
}

impl Rules {
    /// The answer with a few bytes changed, where that still is one.
    fn garble<T: prost::Message + Default>(&mut self, answer: T) -> T {
        let Some(rng) = &mut self.garbled else {
            return answer;
        };
        let mut bytes = answer.encode_to_vec();
        for _ in 0..rng.random_range(1..4) {
            let length = bytes.len();
            if let Some(byte) = (length > 0).then(|| &mut bytes[rng.random_range(0..length)]) {
                *byte = rng.random();
            }
        }
        T::decode(bytes.as_slice()).unwrap_or(answer)
    }
}

#[derive(Debug)]
struct Shared {
    broker: BrokerClient<Channel>,
    rules: Mutex<Rules>,
    /// The call that is held at present.
    held: watch::Sender<Option<&'static str>>,
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The gate, open when it is made.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    socket: PathBuf,
    // Ends the service with the gate.
    _runtime: Runtime,
}

impl Gate {
    /// A gate before a node's broker.
    ///
    /// # Errors
    /// When the operating system refuses a thread or the socket.
    pub fn before(node: &Node) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let inside = runtime.enter();
        let socket = node.directory().join("gate.sock");
        let channel =
            Endpoint::try_from(format!("unix://{}", node.socket().display()))?.connect_lazy();
        let shared = Arc::new(Shared {
            broker: BrokerClient::new(channel),
            rules: Mutex::default(),
            held: watch::Sender::new(None),
        });
        let listener = UnixListenerStream::new(UnixListener::bind(&socket)?);
        let service = BrokerServer::new(Service(Arc::clone(&shared)));
        runtime.spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(listener),
        );
        drop(inside);
        Ok(Self {
            shared,
            socket,
            _runtime: runtime,
        })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects a session of this process through the gate.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn session(&self, name: &str) -> Result<Session> {
        node::connect(self.socket.clone(), name)
    }

    /// Refuses the next so many calls of a name, which the broker never hears of.
    pub fn refuse(&self, call: &'static str, times: usize) {
        self.shared.rules().refused.insert(call, times);
    }

    /// Changes bytes of every answer from now on, or of none.
    pub fn garble(&self, rng: Option<StdRng>) {
        self.shared.rules().garbled = rng;
    }

    /// Holds calls of this name until [`Self::open`].
    pub fn hold(&self, call: &'static str) {
        self.shared.held.send_replace(Some(call));
    }

    /// Holds nothing any more.
    pub fn open(&self) {
        self.shared.held.send_replace(None);
    }

    /// What has become of calls so far, in order.
    pub fn log(&self) -> Vec<(&'static str, Stage)> {
        self.shared.rules().log.clone()
    }

    /// How often that has come to pass.
    pub fn count(&self, call: &'static str, stage: Stage) -> usize {
        let log = &self.shared.rules().log;
        log.iter().filter(|entry| **entry == (call, stage)).count()
    }
}

struct Service(Arc<Shared>);

/// Notes what became of a call, also when it is dropped.
struct Passing<'a> {
    shared: &'a Shared,
    call: &'static str,
    stage: Stage,
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.shared.rules().log.push((self.call, self.stage));
    }
}

impl Service {
    async fn pass<T, Answer>(
        &self,
        call: &'static str,
        ask: impl FnOnce(BrokerClient<Channel>) -> Answer,
    ) -> Result<Response<T>, Status>
    where
        Answer: Future<Output = Result<Response<T>, Status>>,
    {
        let refused = {
            let mut rules = self.0.rules();
            rules.log.push((call, Stage::Arrived));
            let left = rules.refused.get_mut(call).filter(|left| **left > 0);
            left.is_some_and(|left| {
                *left -= 1;
                true
            })
        };
        let mut passing = Passing {
            shared: &self.0,
            call,
            stage: Stage::GivenUp,
        };
        if refused {
            passing.stage = Stage::Refused;
            return Err(Status::new(Code::Aborted, "refused at the gate"));
        }
        let mut held = self.0.held.subscribe();
        // A gate that is gone holds nothing.
        let _ = held.wait_for(|held| *held != Some(call)).await;
        let answer = ask(self.0.broker.clone()).await;
        passing.stage = Stage::Answered;
        // Only its own words: the answer's trailers are the connection's.
        answer.map_err(|status| Status::new(status.code(), status.message()))
    }
}

macro_rules! passes {
    ($($name:ident: $call:literal, $request:ident => $response:ident;)*) => {
        #[tonic::async_trait]
        impl Broker for Service {
            $(async fn $name(&self, request: Request<v1::$request>) -> Result<Response<v1::$response>, Status> {
                let request = request.into_inner();
                let answer = self.pass($call, |mut broker| async move { broker.$name(request).await }).await?;
                Ok(answer.map(|answer| self.0.rules().garble(answer)))
            })*

            type SessionStream = Pin<Box<dyn Stream<Item = Result<v1::SessionResponse, Status>> + Send>>;

            async fn session(
                &self,
                request: Request<Streaming<v1::SessionRequest>>,
            ) -> Result<Response<Self::SessionStream>, Status> {
                // A stream that broke ends: the broker sees no more of it.
                let said = request.into_inner().map_while(Result::ok);
                let answer = self.pass("Session", |mut broker| async move { broker.session(said).await }).await?;
                Ok(Response::new(Box::pin(answer.into_inner())))
            }
        }
    };
}

passes! {
    register: "Register", RegisterRequest => RegisterResponse;
    leave: "Leave", LeaveRequest => LeaveResponse;
    offer: "Offer", OfferRequest => OfferResponse;
    withdraw: "Withdraw", WithdrawRequest => WithdrawResponse;
    lease: "Lease", LeaseRequest => LeaseResponse;
    release: "Release", ReleaseRequest => ReleaseResponse;
    share: "Share", ShareRequest => ShareResponse;
    publish: "Publish", PublishRequest => PublishResponse;
    unpublish: "Unpublish", UnpublishRequest => UnpublishResponse;
    lookup: "Lookup", LookupRequest => LookupResponse;
    report: "Report", ReportRequest => ReportResponse;
}
