//! A real broker, and a gRPC client that sends raw bytes, so that it can send exactly what an old client sent.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use hyper_util::rt::TokioIo;
pub(crate) use swiftcache_tests::PATIENCE;
use tokio::{net::UnixStream, sync::mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

/// A broker with a simulated node. Drop kills it.
pub(crate) struct Broker {
    child: Child,
    directory: tempfile::TempDir,
}

impl Broker {
    pub(crate) async fn start(topology: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        // `make test` builds it beside the test's own program.
        let test = std::env::current_exe().unwrap();
        let program = test.ancestors().nth(2).unwrap().join("swiftcache-broker");
        let child = Command::new(&program)
            .args(["--probe", "simulated", "--topology"])
            .arg(topology)
            .args(["--drain-ms", "60000", "--pin-ms", "60000"])
            .arg("--socket")
            .arg(directory.path().join("broker.sock"))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}: cargo build first", program.display()));
        let broker = Self { child, directory };
        let listening = async {
            while UnixStream::connect(broker.socket()).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, listening).await.unwrap();
        broker
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The two directions of a session stream.
type SessionStream = (mpsc::Sender<Vec<u8>>, Streaming<Vec<u8>>);

/// A client: a connection, and its session stream when it is open.
pub(crate) struct Client {
    grpc: Grpc<Channel>,
    stream: Option<SessionStream>,
}

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        Self {
            grpc: Grpc::new(channel),
            stream: None,
        }
    }

    /// Calls an RPC of the service `Broker`.
    pub(crate) async fn call(&mut self, rpc: &str, request: Vec<u8>) -> Result<Vec<u8>, Status> {
        let path = path(rpc);
        self.grpc.ready().await.unwrap();
        let answer = self.grpc.unary(Request::new(request), path, Raw);
        let answer = tokio::time::timeout(PATIENCE, answer).await;
        answer
            .unwrap_or_else(|_| panic!("{rpc}: no answer"))
            .map(tonic::Response::into_inner)
    }

    /// Sends on the session stream. Opens the stream first if it is not open.
    pub(crate) async fn send(&mut self, message: Vec<u8>) {
        if let Some((sender, _)) = &self.stream {
            return sender.send(message).await.unwrap();
        }
        let (sender, receiver) = mpsc::channel(16);
        sender.send(message).await.unwrap();
        self.grpc.ready().await.unwrap();
        let outgoing = Request::new(ReceiverStream::new(receiver));
        let stream = self.grpc.streaming(outgoing, path("Session"), Raw);
        let stream = tokio::time::timeout(PATIENCE, stream).await.unwrap();
        self.stream = Some((sender, stream.unwrap().into_inner()));
    }

    /// Opens a session stream with these messages, and returns the broker's refusal.
    pub(crate) async fn refused(&mut self, messages: Vec<Vec<u8>>) -> Status {
        self.grpc.ready().await.unwrap();
        let outgoing = Request::new(tokio_stream::iter(messages));
        let stream = self.grpc.streaming(outgoing, path("Session"), Raw);
        let stream = tokio::time::timeout(PATIENCE, stream).await.unwrap();
        stream.expect_err("a refusal")
    }

    /// The error that the stream ends with.
    pub(crate) async fn complaint(&mut self) -> Status {
        let (_, stream) = self.stream.as_mut().expect("the stream is open");
        let message = tokio::time::timeout(PATIENCE, stream.message()).await;
        message.unwrap().expect_err("a complaint")
    }

    /// The stream's next message. `line` is the line of the recording, for errors.
    pub(crate) async fn receive(&mut self, line: &str) -> Vec<u8> {
        let (_, stream) = self.stream.as_mut().expect("the stream is open");
        let message = tokio::time::timeout(PATIENCE, stream.message()).await;
        let message = message.unwrap_or_else(|_| panic!("{line}: nothing came"));
        let message = message.unwrap_or_else(|status| panic!("{line}: {status}"));
        message.unwrap_or_else(|| panic!("{line}: the stream has ended"))
    }
}

fn path(rpc: &str) -> PathAndQuery {
    format!("/swiftcache.v1.Broker/{rpc}").parse().unwrap()
}

/// A codec that passes bytes on unchanged.
#[derive(Clone, Copy)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        tonic_buf::put(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        Ok(Some(tonic_buf::take(buffer)))
    }
}

/// The two methods of the buffer traits that the codec needs.
mod tonic_buf {
    use prost::bytes::{Buf, BufMut};

    pub(super) fn put(buffer: &mut impl BufMut, bytes: &[u8]) {
        buffer.put_slice(bytes);
    }

    pub(super) fn take(buffer: &mut impl Buf) -> Vec<u8> {
        let mut bytes = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut bytes);
        bytes
    }
}
