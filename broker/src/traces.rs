//! Spans for an OpenTelemetry collector. Each RPC has a span with the RPC's name, its duration and its status. A span
//! has no contents of messages, because they have handles, tokens and session ids in them.

use std::{
    fmt::Display,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::{Resource, trace::SdkTracerProvider};
use tokio_util::either::Either;
use tonic::{Code, Status};
use tower::Service;
use tracing::{Instrument, Metadata, Span, Subscriber, field::Empty, info_span};
use tracing_subscriber::{
    Layer,
    filter::{FilterFn, LevelFilter, filter_fn},
    registry::LookupSpan,
};

use crate::error::BrokerError;

/// The target of the spans that go to the collector. Nothing else has it.
const TARGET: &str = "swiftcache_broker::rpc";

/// The exporter of spans to the collector.
pub struct Traces {
    provider: SdkTracerProvider,
}

/// Checks an endpoint.
///
/// # Errors
/// When it is not valid. The error says what is accepted.
pub fn check(endpoint: &str) -> Result<(), String> {
    let takes = "takes http://HOST:PORT (a collector on the node, without TLS)";
    let uri: http::Uri = endpoint
        .parse()
        .map_err(|error| format!("is {endpoint:?}, {error}; {takes}"))?;
    if uri.scheme_str() != Some("http") || uri.port().is_none() {
        return Err(format!("is {endpoint:?}; {takes}"));
    }
    Ok(())
}

impl Traces {
    /// An exporter that connects to the collector when it has spans to send, and again whenever the connection is lost.
    /// If the collector is not there, only spans are lost. Must be called inside the runtime that will send the spans.
    ///
    /// # Errors
    /// When the exporter cannot be built.
    pub fn open(endpoint: &str) -> Result<Self, BrokerError> {
        let exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint)
            .build()
            .map_err(|error| BrokerError::Config(format!("otlp_endpoint: {error}")))?;
        let resource = Resource::builder()
            .with_service_name("swiftcache-broker")
            .build();
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporter)
            .with_resource(resource)
            .build();
        Ok(Self { provider })
    }

    /// A layer that gives the spans of RPCs to the exporter.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let tracer = self.provider.tracer("swiftcache");
        tracing_opentelemetry::layer()
            .with_tracer(tracer)
            // The source file, the thread and the idle time do not help the readers of a trace.
            .with_location(false)
            .with_threads(false)
            .with_tracked_inactivity(false)
            .with_target(false)
            .with_filter(filter_fn(is_rpc).with_max_level_hint(LevelFilter::INFO))
    }

    /// Sends the remaining spans, within `patience`. The runtime must go on meanwhile, because it sends them.
    pub async fn close(self, patience: Duration) {
        let provider = self.provider;
        let closing = move || provider.shutdown_with_timeout(patience);
        match tokio::task::spawn_blocking(closing).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "the last spans were not sent"),
            Err(error) => tracing::warn!(%error, "the last spans were not sent"),
        }
    }
}

fn is_rpc(metadata: &Metadata<'_>) -> bool {
    metadata.target() == TARGET
}

/// A filter for everything except the spans that go to the collector.
pub(crate) fn no_spans() -> FilterFn {
    // With this hint, only the log's own filter decides which levels are enabled, so most are never evaluated.
    let lines: fn(&Metadata<'_>) -> bool = |metadata| !is_rpc(metadata);
    FilterFn::new(lines).with_max_level_hint(LevelFilter::TRACE)
}

/// A layer that makes a span for every RPC, if it is on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SpanLayer {
    pub(crate) on: bool,
}

impl<S> tower::Layer<S> for SpanLayer {
    type Service = Spans<S>;

    fn layer(&self, inner: S) -> Spans<S> {
        Spans { inner, on: self.on }
    }
}

/// A service that makes a span for every RPC.
#[derive(Clone, Debug)]
pub(crate) struct Spans<S> {
    inner: S,
    on: bool,
}

impl<S, Request, Answer> Service<http::Request<Request>> for Spans<S>
where
    S: Service<http::Request<Request>, Response = http::Response<Answer>>,
    S::Future: Send + 'static,
    S::Error: Display,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<
        S::Future,
        Pin<Box<dyn Future<Output = Result<http::Response<Answer>, S::Error>> + Send>>,
    >;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Request>) -> Self::Future {
        if !self.on {
            return Either::Left(self.inner.call(request));
        }
        let span = span(request.uri().path());
        let answering = span.in_scope(|| self.inner.call(request));
        let its_span = span.clone();
        Either::Right(Box::pin(
            async move {
                let answer = answering.await;
                match &answer {
                    Ok(answer) => ended(&its_span, answer.headers()),
                    Err(error) => tracing::debug!(%error, "an RPC ended without an answer"),
                }
                answer
            }
            .instrument(span),
        ))
    }
}

/// The span of an RPC: for the path "/swiftcache.v1.Broker/Offer" it is "swiftcache.v1.Broker/Offer".
fn span(path: &str) -> Span {
    let name = path.trim_start_matches('/');
    let (service, method) = name.split_once('/').unwrap_or(("", name));
    info_span!(
        target: TARGET,
        "rpc",
        otel.name = name,
        otel.kind = "server",
        otel.status_code = Empty,
        rpc.system = "grpc",
        rpc.service = service,
        rpc.method = method,
        rpc.grpc.status_code = Empty,
    )
}

/// Records the status of an RPC. If the headers have none, it is OK: only a refusal has its status in the headers.
fn ended(span: &Span, headers: &http::HeaderMap) {
    let code = Status::from_header_map(headers).map_or(Code::Ok, |status| status.code());
    span.record("rpc.grpc.status_code", i64::from(i32::from(code)));
    // These codes are the server's fault by OpenTelemetry's rules. The others are mistakes of the caller.
    let ours = [
        Code::Unknown,
        Code::DeadlineExceeded,
        Code::Unimplemented,
        Code::Internal,
        Code::Unavailable,
        Code::DataLoss,
    ];
    if ours.contains(&code) {
        span.record("otel.status_code", "ERROR");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_collector_on_plain_http_is_taken() {
        for good in ["http://127.0.0.1:4317", "http://collector.monitoring:4317"] {
            assert_eq!(check(good), Ok(()));
        }
        for bad in [
            "",
            "127.0.0.1:4317",
            "https://c:4317",
            "http://c",
            "http://",
            "grpc://c:1",
        ] {
            let problem = check(bad).unwrap_err();
            assert!(problem.contains("takes http://"), "{bad}: {problem}");
        }
    }
}
