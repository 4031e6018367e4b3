//! Answers that nobody reads. The answer to a list may have a megabyte. It stays in the broker's memory until the client
//! reads it, so each user may have few such answers at a time, and who leaves one unread for long loses its connection.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{Extensions, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::task::AbortHandle;
use tokio_util::{either::Either, sync::CancellationToken};
use tonic::{Status, body::Body, transport::server::TlsConnectInfo};
use tower::{Layer, Service};

use crate::{
    listen::{Admission, Limits, Permit, TcpPeer},
    peer::Peer,
};

/// The service whose answers are large.
const LISTS: &str = "/swiftcache.v1.Admin/";
/// How long an answer may stay unread.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most such answers at a time. A page of a list is about a megabyte.
const ANSWERS: Limits = Limits {
    all: 64,
    of_user: 8,
    reserved: 16,
};
/// Whom clients of plain TCP count as: nobody can tell who they are.
const NOBODY: u32 = u32::MAX;

/// Bounds the answers of the `Admin` service that are not read yet. Clones count together.
#[derive(Clone)]
pub(crate) struct Unread {
    admission: Admission,
    patience: Duration,
}

impl Unread {
    pub(crate) fn new() -> Self {
        Self {
            admission: Admission::new(ANSWERS),
            patience: PATIENCE,
        }
    }
}

impl<S> Layer<S> for Unread {
    type Service = Bounded<S>;

    fn layer(&self, inner: S) -> Bounded<S> {
        Bounded {
            inner,
            unread: self.clone(),
        }
    }
}

/// A service whose answers are bounded.
#[derive(Clone)]
pub(crate) struct Bounded<S> {
    inner: S,
    unread: Unread,
}

/// An answer on its way.
type Answering<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

impl<S, B> Service<Request<B>> for Bounded<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Either<S::Future, Answering<S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if !request.uri().path().starts_with(LISTS) {
            return Either::Left(self.inner.call(request));
        }
        let (uid, cut) = who(request.extensions());
        let Some(permit) = self.unread.admission.admit(uid) else {
            let problem = "too many answers to calls of Admin are unread, yours or those of all users; read them, or \
                           try again shortly";
            let refused = Status::resource_exhausted(problem).into_http();
            return Either::Right(Box::pin(std::future::ready(Ok(refused))));
        };
        let (answering, patience) = (self.inner.call(request), self.unread.patience);
        Either::Right(Box::pin(async move {
            let answer = answering.await?;
            Ok(answer.map(|body| Body::new(Held::new(body, permit, cut, patience))))
        }))
    }
}

/// The user whose request has these extensions, and what ends its connection.
fn who(extensions: &Extensions) -> (u32, CancellationToken) {
    if let Some(peer) = extensions.get::<Peer>() {
        return (peer.process.uid, peer.cut.clone());
    }
    let tls = extensions.get::<TlsConnectInfo<TcpPeer>>();
    let tcp = tls.map(TlsConnectInfo::get_ref);
    let tcp = tcp.or_else(|| extensions.get::<TcpPeer>());
    (NOBODY, tcp.map(|tcp| tcp.cut.clone()).unwrap_or_default())
}

/// An answer that counts until it is read to its end.
struct Held {
    body: Body,
    _permit: Permit,
    deadline: AbortHandle,
}

impl Held {
    fn new(body: Body, permit: Permit, cut: CancellationToken, patience: Duration) -> Self {
        let deadline = tokio::spawn(async move {
            tokio::time::sleep(patience).await;
            cut.cancel();
        });
        Self {
            body,
            _permit: permit,
            deadline: deadline.abort_handle(),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.deadline.abort();
    }
}

impl HttpBody for Held {
    type Data = <Body as HttpBody>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The answers to calls of this process, which counts as another user than the broker's.
    struct Caller {
        service: Bounded<tower::util::BoxCloneService<Request<()>, Response<Body>, Status>>,
        peer: Peer,
        _socket: UnixStream,
    }

    impl Caller {
        fn new(limits: Limits, patience: Duration) -> Self {
            let answer =
                tower::service_fn(async |_| Ok(Response::new(Body::new("an answer".to_owned()))));
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut peer = Peer::of(&ours).unwrap();
            peer.process.uid = 4_711;
            let unread = Unread {
                admission: Admission::new(limits),
                patience,
            };
            Self {
                service: unread.layer(tower::util::BoxCloneService::new(answer)),
                peer,
                _socket: theirs,
            }
        }

        async fn call(&mut self, path: &str) -> Response<Body> {
            let mut request = Request::new(());
            *request.uri_mut() = path.parse().unwrap();
            request.extensions_mut().insert(self.peer.clone());
            self.service.call(request).await.unwrap()
        }
    }

    fn is_refused(answer: &Response<Body>) -> bool {
        let status = Status::from_header_map(answer.headers());
        status.is_some_and(|status| status.code() == tonic::Code::ResourceExhausted)
    }

    const LIST: &str = "/swiftcache.v1.Admin/ListEvents";
    const LONG: Duration = Duration::from_secs(600);

    #[tokio::test]
    async fn a_user_has_few_unread_answers_and_reading_makes_room() {
        let mut caller = Caller::new(ANSWERS, LONG);
        let mut unread = Vec::new();
        for _ in 0..ANSWERS.of_user {
            unread.push(caller.call(LIST).await);
        }
        assert!(!unread.iter().any(is_refused));
        assert!(is_refused(&caller.call(LIST).await));
        // Lookups and other small answers do not count.
        assert!(!is_refused(
            &caller.call("/swiftcache.v1.Broker/Lookup").await
        ));
        drop(unread.pop());
        assert!(!is_refused(&caller.call(LIST).await));
        // The twin: without the bound, as many as are asked for.
        let mut caller = Caller::new(
            Limits {
                all: usize::MAX,
                of_user: usize::MAX,
                reserved: 0,
            },
            LONG,
        );
        let mut unread = Vec::new();
        for _ in 0..1_000 {
            unread.push(caller.call(LIST).await);
        }
        assert!(!unread.iter().any(is_refused));
    }

    #[tokio::test]
    async fn an_answer_that_stays_unread_costs_its_connection() {
        let mut caller = Caller::new(ANSWERS, Duration::from_millis(1));
        let unread = caller.call(LIST).await;
        caller.peer.cut.cancelled().await;
        drop(unread);
    }

    /// The twin: an answer that was read costs nothing.
    #[tokio::test]
    async fn an_answer_that_was_read_costs_nothing() {
        let mut caller = Caller::new(ANSWERS, Duration::from_millis(1));
        drop(caller.call(LIST).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!caller.peer.cut.is_cancelled());
    }
}
