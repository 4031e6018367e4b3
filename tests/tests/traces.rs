//! A real broker sends its spans to a collector in the test.

use std::{
    net::{SocketAddr, TcpListener},
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::{Span, span::SpanKind, status::StatusCode},
};
use prost::Message;
use rustix::process::Signal;
use swiftcache_tests::{PATIENCE, node::Node, wire::Wire};
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

/// A collector that keeps everything that it gets.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut kept = self.0.lock().map_err(|_| Status::internal("poisoned"))?;
        kept.push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Serves on a port that the system chooses, as long as the runtime lives.
    fn start() -> Result<(Self, Runtime, SocketAddr)> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let collector = Self::default();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let service = TraceServiceServer::new(collector.clone());
        let server = Server::builder().add_service(service);
        runtime.spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        Ok((collector, runtime, address))
    }

    fn requests(&self) -> Vec<ExportTraceServiceRequest> {
        self.0.lock().map(|kept| kept.clone()).unwrap_or_default()
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.requests().into_iter();
        let resources = requests.flat_map(|request| request.resource_spans);
        let scopes = resources.flat_map(|resource| resource.scope_spans);
        scopes.flat_map(|scope| scope.spans).collect()
    }
}

fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let found = attributes.iter().find(|attribute| attribute.key == key);
    found?.value.as_ref()?.value.as_ref()
}

/// Sends SIGTERM to the broker, and checks its exit status.
fn stop(mut node: Node) -> Result<()> {
    node.broker()?.signal(Signal::TERM)?;
    node.broker_mut()?.finish()
}

#[test]
fn every_rpc_is_a_span_and_the_last_ones_are_sent_on_the_way_down() -> Result<()> {
    let (collector, _runtime, address) = Collector::start()?;
    let endpoint = format!("http://{address}");
    let patience = PATIENCE.as_millis().to_string();
    let node = Node::start(&["--otlp-endpoint", &endpoint, "--shutdown-ms", &patience])?;
    let wire = Wire::new(&node.socket())?;
    let donor = wire.member("donor", "")?;
    donor.offer([7; 16], "SIM-1", 1, 1 << 20)?;
    let member = wire.member("member", "")?;
    let leased = member.lease("model", "SIM-0", 1, 64 << 10)?;
    let grant = leased.grants.first().context("nothing was leased")?;
    let token = grant
        .handle
        .as_ref()
        .context("no handle")?
        .grant_token
        .clone();
    ensure!(member.lease("", "SIM-0", 1, 1).is_err());
    stop(node)?;

    let spans = collector.spans();
    let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
    for rpc in ["Register", "Offer", "Lease"] {
        let name = format!("swiftcache.v1.Broker/{rpc}");
        ensure!(
            names.contains(&name.as_str()),
            "{name} is not among {names:?}"
        );
    }
    let leases: Vec<&Span> = spans
        .iter()
        .filter(|span| span.name == "swiftcache.v1.Broker/Lease")
        .collect();
    let codes: Vec<_> = leases
        .iter()
        .map(|span| attribute(&span.attributes, "rpc.grpc.status_code").cloned())
        .collect();
    let expected = [0, 3].map(|code| Some(Value::IntValue(code)));
    ensure!(codes == expected, "OK and INVALID_ARGUMENT, not {codes:?}");
    for span in &spans {
        ensure!(span.kind() == SpanKind::Server, "{span:?}");
        ensure!(span.end_time_unix_nano >= span.start_time_unix_nano);
        let system = attribute(&span.attributes, "rpc.system");
        ensure!(
            system == Some(&Value::StringValue("grpc".to_owned())),
            "{span:?}"
        );
        // A caller's mistake is not an error of the broker.
        let status = span.status.clone().unwrap_or_default();
        ensure!(status.code() != StatusCode::Error, "{span:?}");
    }
    let requests = collector.requests();
    let resource = requests.iter().flat_map(|request| &request.resource_spans);
    for resource in resource.filter_map(|spans| spans.resource.as_ref()) {
        let name = attribute(&resource.attributes, "service.name");
        ensure!(name == Some(&Value::StringValue("swiftcache-broker".to_owned())));
    }

    // The spans have no contents of requests: neither the session's id nor the grant's token, in any form.
    let sent: Vec<u8> = requests.iter().flat_map(Message::encode_to_vec).collect();
    let text = format!("{requests:?}");
    for secret in [member.session.to_le_bytes().as_slice(), token.as_ref()] {
        ensure!(!sent.windows(secret.len()).any(|window| window == secret));
    }
    ensure!(!text.contains(&member.session.to_string()));
    ensure!(!text.contains("model"), "{text}");
    Ok(())
}

#[test]
fn a_collector_that_is_not_there_costs_nothing_but_its_spans() -> Result<()> {
    // This port is in use, so that no other program gets it, and nobody answers on it.
    let silent = TcpListener::bind("127.0.0.1:0")?;
    let endpoint = format!("http://{}", silent.local_addr()?);
    let node = Node::start(&["--otlp-endpoint", &endpoint, "--shutdown-ms", "100"])?;
    let wire = Wire::new(&node.socket())?;
    wire.member("member", "")?;
    stop(node)
}
