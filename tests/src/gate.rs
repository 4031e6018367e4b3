//! A gate between clients and the broker. It passes every call and message on, except those that a test tells it to
//! hold, refuse or lose. The broker sees this process as the peer, so sessions of the test's own process work through
//! the gate.

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
    /// The broker has carried out the call, and the gate did not pass the answer on.
    Done,
    /// The gate passed the broker's answer back to the caller, or passed the message on.
    Answered,
    /// The gate refused it, or cut the connection before it reached the other side.
    Refused,
    /// The caller went away before the answer came.
    GivenUp,
}

/// How a call (by its name, such as `Offer`) or a message on a session's stream (`Acknowledge`, `Scrubbed`, `Unpin`,
/// `Revoke`, `Returned`, `Scrub`) fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The broker never receives the call, and the caller receives this code.
    Refuse(Code),
    /// The broker carries out the call, and the caller receives this code instead of the answer.
    Deny(Code),
    /// The broker carries out the call, and the answer never comes. The connection stays.
    Swallow,
    /// The connection is lost before the call or the message reaches the other side.
    CutBefore,
    /// The connection is lost after the broker has carried out the call, or after the message has arrived.
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

    /// Changes a few bytes of the answer. Returns it unchanged when the result cannot be decoded.
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
    /// The name of the calls that are held at present.
    held: watch::Sender<Option<&'static str>>,
    /// The connections that were accepted since the last cut.
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
            // This fails for a connection that its client has closed already.
            let _ = rustix::net::shutdown(&socket, Shutdown::Both);
        }
    }

    /// Applies the fault that is due for a message of a session's stream. Returns whether the message passes.
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

/// The gate. A new gate is open.
#[derive(Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    socket: PathBuf,
    // The service ends when this is dropped with the gate.
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

    /// The gate's socket.
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

    /// Makes the next `times` calls or messages with this name fail in this way.
    pub fn fail(&self, what: &'static str, fault: Fault, times: usize) {
        self.shared.rules().faults.insert(what, (fault, times));
    }

    /// Removes all faults.
    pub fn mend(&self) {
        self.shared.rules().faults.clear();
    }

    /// Cuts every connection that clients have now.
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// With a generator, changes bytes of every answer from now on. Without one, changes no more answers.
    pub fn garble(&self, rng: Option<StdRng>) {
        self.shared.rules().garbled = rng;
    }

    /// Holds calls with this name until [`Self::open`].
    pub fn hold(&self, call: &'static str) {
        self.shared.held.send_replace(Some(call));
    }

    /// Releases the held calls, and holds no more calls.
    pub fn open(&self) {
        self.shared.held.send_replace(None);
    }

    /// The stages of calls and messages so far, in order.
    pub fn log(&self) -> Vec<(&'static str, Stage)> {
        self.shared.rules().log.clone()
    }

    /// How many calls or messages with this name have reached this stage.
    pub fn count(&self, call: &'static str, stage: Stage) -> usize {
        let log = &self.shared.rules().log;
        log.iter().filter(|entry| **entry == (call, stage)).count()
    }
}

struct Service(Arc<Shared>);

/// Logs a call's last stage when it is dropped.
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
        let at_the_gate = |code| Err(Status::new(code, "the gate gave this answer"));
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
        // This fails when the gate is dropped. Then nothing is held.
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
        // Passes on the code and the text only. The trailers belong to the gate's connection with the broker.
        answer.map_err(|status| Status::new(status.code(), status.message()))
    }
}

/// The name of a message that a client sends on its stream.
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

/// The name of a message that the broker sends on a session's stream.
fn told_name(told: &v1::SessionResponse) -> &'static str {
    use v1::session_response::Message;
    match told.message {
        Some(Message::Attached(_)) => "Attached",
        Some(Message::Revoke(_)) => "Revoke",
        Some(Message::Returned(_)) => "Returned",
        Some(Message::Scrub(_)) => "Scrub",
        Some(Message::DeviceHold(_)) => "DeviceHold",
        Some(Message::CannotMap(_)) => "CannotMap",
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
                // When the client's stream breaks, the stream to the broker ends.
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
    disk: "Disk", DiskRequest => DiskResponse;
    inherit: "Inherit", InheritRequest => InheritResponse;
}
