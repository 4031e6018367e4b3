//! A gate before the broker: passes every call and message on, but holds, refuses or loses those it is told to. The
//! node's broker sees this process at the other end, so sessions of the test's own process work through it.

use std::{
    collections::HashMap,
    future::{self, Future},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::Result;
use rand::{Rng, rngs::StdRng};
use rustix::net::Shutdown;
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

/// What became of a call, or of a message on a session's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It came to the gate.
    Arrived,
    /// The broker has done it, and its answer went no further than here.
    Done,
    /// The broker's answer went back. A message went on.
    Answered,
    /// The gate refused it, or cut the connection before anyone heard of it.
    Refused,
    /// The caller went away before it was answered.
    GivenUp,
}

/// What goes wrong with a call (by its name, such as `Offer`), or with a message on a session's stream (`Acknowledge`,
/// `Scrubbed`, `Unpin`, `Revoke`, `Returned`, `Scrub`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The broker never hears of the call, and the caller is told this code.
    Refuse(Code),
    /// The broker does it, and the caller is told this code instead of the answer.
    Deny(Code),
    /// The broker does it, and the answer never comes. The connection lasts.
    Swallow,
    /// The connection is lost on the way there: nobody hears of the call or the message.
    CutBefore,
    /// The connection is lost on the way back: the broker has done it. A message has come through.
    CutAfter,
}

#[derive(Debug, Default)]
struct Rules {
    faults: HashMap<&'static str, (Fault, usize)>,
    garbled: Option<StdRng>,
    log: Vec<(&'static str, Stage)>,
}

impl Rules {
    /// The fault that is due for this call or message now.
    fn fault(&mut self, what: &str) -> Option<Fault> {
        let (fault, left) = self.faults.get_mut(what)?;
        *left = left.checked_sub(1)?;
        Some(*fault)
    }

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
    /// The connections that came since the last cut.
    sockets: Mutex<Vec<OwnedFd>>,
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sockets(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cut(&self) {
        for socket in self.sockets().drain(..) {
            // One that its client has closed needs no cutting.
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
    }

    /// Whether a message of a session's stream goes on, after the fault that is due for it.
    fn passes(&self, message: &'static str) -> bool {
        let fault = self.rules().fault(message);
        let (passes, cuts) = match fault {
            None => (true, false),
            Some(Fault::CutAfter) => (true, true),
            Some(Fault::CutBefore) => (false, true),
            Some(Fault::Refuse(_) | Fault::Deny(_) | Fault::Swallow) => (false, false),
        };
        let stage = match passes {
            true => Stage::Answered,
            false => Stage::Refused,
        };
        self.rules().log.push((message, stage));
        if cuts {
            self.cut();
        }
        passes
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
            sockets: Mutex::default(),
        });
        let its = Arc::clone(&shared);
        let listener = UnixListenerStream::new(UnixListener::bind(&socket)?).map(move |stream| {
            let stream = stream?;
            its.sockets().push(stream.as_fd().try_clone_to_owned()?);
            Ok::<_, std::io::Error>(stream)
        });
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

    /// Has the next so many calls or messages of a name fail in this way.
    pub fn fail(&self, what: &'static str, fault: Fault, times: usize) {
        self.shared.rules().faults.insert(what, (fault, times));
    }

    /// Has nothing fail any more.
    pub fn mend(&self) {
        self.shared.rules().faults.clear();
    }

    /// Cuts every connection that clients have now.
    pub fn cut(&self) {
        self.shared.cut();
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
        let fault = {
            let mut rules = self.0.rules();
            rules.log.push((call, Stage::Arrived));
            rules.fault(call)
        };
        let mut passing = Passing {
            shared: &self.0,
            call,
            stage: Stage::GivenUp,
        };
        let at_the_gate = |code| Err(Status::new(code, "said at the gate"));
        match fault {
            Some(Fault::Refuse(code)) => {
                passing.stage = Stage::Refused;
                return at_the_gate(code);
            }
            Some(Fault::CutBefore) => {
                passing.stage = Stage::Refused;
                self.0.cut();
                return future::pending().await;
            }
            _ => {}
        }
        let mut held = self.0.held.subscribe();
        // A gate that is gone holds nothing.
        let _ = held.wait_for(|held| *held != Some(call)).await;
        let answer = ask(self.0.broker.clone()).await;
        if let Some(fault) = fault {
            self.0.rules().log.push((call, Stage::Done));
            match fault {
                Fault::Deny(code) => {
                    passing.stage = Stage::Refused;
                    return at_the_gate(code);
                }
                Fault::CutAfter => self.0.cut(),
                _ => {}
            }
            return future::pending().await;
        }
        passing.stage = Stage::Answered;
        // Only its own words: the answer's trailers are the connection's.
        answer.map_err(|status| Status::new(status.code(), status.message()))
    }
}

/// The name of what a client says on its stream.
fn said_name(said: &v1::SessionRequest) -> &'static str {
    use v1::session_request::Message;
    match said.message {
        Some(Message::Attach(_)) => "Attach",
        Some(Message::Acknowledge(_)) => "Acknowledge",
        Some(Message::Scrubbed(_)) => "Scrubbed",
        Some(Message::Unpin(_)) => "Unpin",
        None => "nothing",
    }
}

/// The name of what the broker says on a session's stream.
fn told_name(told: &v1::SessionResponse) -> &'static str {
    use v1::session_response::Message;
    match told.message {
        Some(Message::Attached(_)) => "Attached",
        Some(Message::Revoke(_)) => "Revoke",
        Some(Message::Returned(_)) => "Returned",
        Some(Message::Scrub(_)) => "Scrub",
        Some(Message::DeviceHold(_)) => "DeviceHold",
        None => "nothing",
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
                let gate = Arc::clone(&self.0);
                let said = said.filter(move |said| gate.passes(said_name(said)));
                let answer = self.pass("Session", |mut broker| async move { broker.session(said).await }).await?;
                let gate = Arc::clone(&self.0);
                let told = answer.into_inner();
                let told = told.filter(move |told| told.as_ref().map_or(true, |told| gate.passes(told_name(told))));
                Ok(Response::new(Box::pin(told)))
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
    keep: "Keep", KeepRequest => KeepResponse;
    report: "Report", ReportRequest => ReportResponse;
}
