//! Answers that nobody reads. An answer stays in the broker's memory until the kernel takes it, which is when its client
//! reads. So what is unsent is counted, for each connection, process and user: who has too much of it gets no further answer,
//! and who leaves one unread for long loses its connection. Lists, which may have a megabyte each, are counted besides.

use std::{
    collections::BTreeMap,
    ops::Bound,
    pin::{Pin, pin},
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Extensions, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tonic::{Status, body::Body, transport::server::TlsConnectInfo};
use tower::{Layer, Service};

use crate::{
    calls::{Call, Calls},
    core::{Connection, Process},
    listen::{Admission, Limits, Permit, TcpPeer},
    peer::Peer,
};

/// The service whose answers are large.
const LISTS: &str = "/swiftcache.v1.Admin/";
/// The call whose answer is a session's messages.
const SESSION: &str = "/swiftcache.v1.Broker/Session";
/// The call whose answer has no end.
const WATCH: &str = "/swiftcache.v1.Admin/Watch";
/// How long a call waits until what was answered before is read.
const WAIT: Duration = Duration::from_secs(2);
/// How long an answer may stay unread.
const PATIENCE: Duration = Duration::from_secs(30);
/// How many times as long a session's messages may. They come in parts of 32 KiB, each of them the revocations of more than
/// a thousand slabs. A client that deals with one after the other reads slowly, and is not to lose its connection for it.
const SESSION_PATIENCE: u32 = 10;
/// The most answers to calls of Admin at a time. A page of a list is about a megabyte.
const ANSWERS: Limits = Limits {
    all: 64,
    of_user: 8,
    reserved: 16,
};
/// The most answers to `Watch` at a time. Each costs the broker a little whenever a block is published.
const WATCHERS: Limits = Limits {
    all: 64,
    of_user: 16,
    reserved: 16,
};
/// An engine has some hundred KB unsent at times.
const BUDGET: Budget = Budget {
    connection: 8 << 20,
    process: 16 << 20,
    user: 32 << 20,
    all: 128 << 20,
    reserved: 32 << 20,
};
/// Who clients of plain TCP count as: nobody can tell who they are.
const NOBODY: Process = Process {
    pid: 0,
    birth: 0,
    uid: u32::MAX,
};

/// Unsent bytes from which on there are no further answers until some are read. The answers under way may exceed it, each by its own size.
#[derive(Clone, Copy)]
struct Budget {
    connection: usize,
    process: usize,
    /// Root is bounded by process only.
    user: usize,
    all: usize,
    /// Of `all`, what is for root and the broker's own user only.
    reserved: usize,
}

/// Bounds the answers that are not read yet. Clones count together.
#[derive(Clone)]
pub(crate) struct Unread {
    lists: Admission,
    watchers: Admission,
    budget: Budget,
    wait: Duration,
    books: Arc<Books>,
}

impl Unread {
    /// Must run inside a tokio runtime.
    pub(crate) fn new() -> Self {
        Self::bounded(ANSWERS, BUDGET, WAIT, PATIENCE)
    }

    fn bounded(lists: Limits, budget: Budget, wait: Duration, patience: Duration) -> Self {
        let books = Arc::default();
        tokio::spawn(cut_late(Arc::downgrade(&books), patience));
        Self {
            lists: Admission::new(lists),
            watchers: Admission::new(WATCHERS),
            budget,
            wait,
            books,
        }
    }

    /// Waits for room, not for ever. Says whether there is.
    async fn room(&self, reader: &Reader) -> bool {
        let trusted = self.lists.trusts(reader.process.uid);
        let full = |page: &Page| page.full(reader, trusted, &self.budget);
        if full(&self.books.page.lock()).is_none() {
            return true;
        }
        let room = async {
            loop {
                let freed = {
                    let mut page = self.books.page.lock();
                    let Some(share) = full(&page) else {
                        return;
                    };
                    let freed = page.waited_for.entry(share).or_default();
                    Arc::clone(freed).notified_owned()
                };
                freed.await;
            }
        };
        tokio::time::timeout(self.wait, room).await.is_ok()
    }

    /// The same for a list's place, or a watcher's. Who was refused at once would ask again at once, and each refusal costs
    /// others a turn.
    async fn place(&self, lists: &Admission, process: Process) -> Option<ListPermit> {
        let admitted = async {
            loop {
                let mut freed = pin!(self.books.list_freed.notified());
                freed.as_mut().enable();
                if let Some(permit) = lists.admit(process) {
                    return ListPermit {
                        permit: Some(permit),
                        books: Arc::clone(&self.books),
                    };
                }
                freed.await;
            }
        };
        tokio::time::timeout(self.wait, admitted).await.ok()
    }
}

/// A list may be answered, or a watcher watch. Drop makes room for another one.
struct ListPermit {
    permit: Option<Permit>,
    books: Arc<Books>,
}

impl Drop for ListPermit {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.books.list_freed.notify_waiters();
    }
}

/// Ends connections that leave an answer unread for longer than `patience`.
async fn cut_late(books: Weak<Books>, patience: Duration) {
    let mut ticks = tokio::time::interval((patience / 16).max(Duration::from_millis(1)));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(books) = books.upgrade() else { return };
        let books = books.page.lock();
        // The oldest comes first.
        let late = books.answers.values();
        let late = late.take_while(|answer| answer.since.elapsed() >= patience);
        for answer in late.filter(|answer| answer.since.elapsed() >= patience * answer.patience) {
            answer.reader.cut.cancel();
        }
    }
}

/// Who reads an answer.
struct Reader {
    process: Process,
    connection: Connection,
    /// Ends the connection.
    cut: CancellationToken,
    /// The connection's calls.
    calls: Calls,
}

impl Reader {
    /// The one whose request has these extensions.
    fn of(extensions: &Extensions) -> Self {
        if let Some(peer) = extensions.get::<Peer>() {
            return Self {
                process: peer.process,
                connection: peer.connection,
                cut: peer.cut.clone(),
                calls: peer.calls.clone(),
            };
        }
        let tls = extensions.get::<TlsConnectInfo<TcpPeer>>();
        let tcp = tls.map(TlsConnectInfo::get_ref);
        let tcp = tcp.or_else(|| extensions.get::<TcpPeer>());
        let tcp = tcp.cloned().unwrap_or_default();
        Self {
            process: NOBODY,
            connection: tcp.connection,
            cut: tcp.cut,
            calls: tcp.calls,
        }
    }

    fn shares(&self) -> [Share; 4] {
        [
            Share::Everybody,
            Share::User(self.process.uid),
            Share::Process(self.process),
            Share::Connection(self.connection),
        ]
    }
}

/// Whose unsent bytes are counted together.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Share {
    Everybody,
    User(u32),
    Process(Process),
    Connection(Connection),
}

/// An answer, or a part of one, that the kernel has not taken yet.
struct Answer {
    reader: Arc<Reader>,
    bytes: usize,
    since: Instant,
    /// How many times as long as others it may stay unread.
    patience: u32,
}

/// Everything that is unsent.
#[derive(Default)]
struct Books {
    page: Mutex<Page>,
    /// Tells that a list was read, or that a watcher has left.
    list_freed: Notify,
}

#[derive(Default)]
struct Page {
    /// The oldest first.
    answers: BTreeMap<u64, Answer>,
    last: u64,
    unsent: BTreeMap<Share, usize>,
    /// Shares that calls wait for, each until it is below a bound. Who reads what others do not wait for wakes none of them:
    /// thousands may wait, and an answer is sent for every lookup.
    waited_for: BTreeMap<(Share, usize), Arc<Notify>>,
}

impl Page {
    fn unsent(&self, share: Share) -> usize {
        self.unsent.get(&share).copied().unwrap_or(0)
    }

    /// A share in which there is no room for another answer, and its bound; `None`: there is room.
    fn full(&self, reader: &Reader, trusted: bool, budget: &Budget) -> Option<(Share, usize)> {
        let all = budget.all - if trusted { 0 } else { budget.reserved };
        let bounds = [all, budget.user, budget.process, budget.connection];
        let shares = reader.shares().into_iter().zip(bounds);
        let mut bounded = shares.filter(|(share, _)| *share != Share::User(0));
        bounded.find(|(share, bound)| self.unsent(*share) >= *bound)
    }

    fn add(&mut self, reader: Arc<Reader>, bytes: usize, patience: u32) -> u64 {
        for share in reader.shares() {
            *self.unsent.entry(share).or_default() += bytes;
        }
        self.last += 1;
        let since = Instant::now();
        let answer = Answer {
            reader,
            bytes,
            since,
            patience,
        };
        self.answers.insert(self.last, answer);
        self.last
    }

    fn remove(&mut self, number: u64) {
        let Some(answer) = self.answers.remove(&number) else {
            return;
        };
        for share in answer.reader.shares() {
            if let Some(unsent) = self.unsent.get_mut(&share) {
                *unsent -= answer.bytes;
                if *unsent == 0 {
                    self.unsent.remove(&share);
                }
            }
            self.wake(share);
        }
    }

    /// Wakes the calls that wait for this share, if there is room in it.
    fn wake(&mut self, share: Share) {
        let unsent = self.unsent(share);
        let above = (
            Bound::Excluded((share, unsent)),
            Bound::Included((share, usize::MAX)),
        );
        while let Some((&key, _)) = self.waited_for.range(above).next() {
            if let Some(freed) = self.waited_for.remove(&key) {
                freed.notify_waiters();
            }
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
    type Future = Answering<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let reader = Arc::new(Reader::of(request.extensions()));
        let lists = match request.uri().path() {
            WATCH => Some(self.unread.watchers.clone()),
            path if path.starts_with(LISTS) => Some(self.unread.lists.clone()),
            _ => None,
        };
        let patience = match request.uri().path() {
            SESSION => SESSION_PATIENCE,
            _ => 1,
        };
        let call = reader.calls.begin();
        let (answering, unread) = (self.inner.call(request), self.unread.clone());
        Box::pin(async move {
            // Here, and not before: meanwhile the answers before it have been counted.
            if !unread.room(&reader).await {
                return Ok(refused("too many bytes of answers are unread"));
            }
            let permit = match lists {
                None => None,
                Some(lists) => match unread.place(&lists, reader.process).await {
                    Some(place) => Some(Arc::new(place)),
                    None => return Ok(refused("too many answers to calls of Admin are unread")),
                },
            };
            let answer = answering.await?;
            Ok(answer.map(|body| {
                Body::new(Counted {
                    body,
                    reader,
                    books: unread.books,
                    permit,
                    patience,
                    _call: call,
                })
            }))
        })
    }
}

fn refused(what: &str) -> Response<Body> {
    let problem = format!("{what}, yours or those of all users; read them, or try again shortly");
    Status::resource_exhausted(problem).into_http()
}

/// A body whose data counts from when it is there until the kernel has taken it.
struct Counted {
    body: Body,
    reader: Arc<Reader>,
    books: Arc<Books>,
    permit: Option<Arc<ListPermit>>,
    patience: u32,
    /// The call is under way until its answer is read.
    _call: Call,
}

/// Data that counts until it is dropped. What sends it keeps it until then, whatever became of the body.
struct Unsent {
    data: Bytes,
    books: Arc<Books>,
    number: u64,
    _permit: Option<Arc<ListPermit>>,
}

impl AsRef<[u8]> for Unsent {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.books.page.lock().remove(self.number);
    }
}

impl HttpBody for Counted {
    type Data = <Body as HttpBody>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        frame.map_ok(|frame| {
            frame.map_data(|data| {
                let mut page = self.books.page.lock();
                let number = page.add(Arc::clone(&self.reader), data.len(), self.patience);
                Bytes::from_owner(Unsent {
                    data,
                    books: Arc::clone(&self.books),
                    number,
                    _permit: self.permit.clone(),
                })
            })
        })
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

    const LIST: &str = "/swiftcache.v1.Admin/ListEvents";
    const SMALL: &str = "/swiftcache.v1.Broker/Lookup";
    const LONG: Duration = Duration::from_secs(600);
    const KIB: usize = 1 << 10;
    /// Budgets for answers of a KiB.
    const FEW: Budget = Budget {
        connection: 4 * KIB,
        process: 8 * KIB,
        user: 12 * KIB,
        all: 20 * KIB,
        reserved: 4 * KIB,
    };
    const ANY: Limits = Limits {
        all: usize::MAX,
        of_user: usize::MAX,
        reserved: 0,
    };
    const ANY_BYTES: Budget = Budget {
        connection: usize::MAX,
        process: usize::MAX,
        user: usize::MAX,
        all: usize::MAX,
        reserved: 0,
    };

    /// A broker that answers every call with a KiB.
    struct Broker {
        service: Bounded<tower::util::BoxCloneService<Request<()>, Response<Body>, Status>>,
        books: Arc<Books>,
        peer: Peer,
        _socket: UnixStream,
    }

    impl Broker {
        fn new(lists: Limits, budget: Budget, patience: Duration) -> Self {
            Self::of(lists, budget, Duration::from_millis(1), patience)
        }

        fn of(lists: Limits, budget: Budget, wait: Duration, patience: Duration) -> Self {
            let answer = tower::service_fn(async |_| Ok(Response::new(Body::new("a".repeat(KIB)))));
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut peer = Peer::of(&ours).unwrap();
            peer.process.uid = 4_711;
            let unread = Unread::bounded(lists, budget, wait, patience);
            Self {
                books: Arc::clone(&unread.books),
                service: unread.layer(tower::util::BoxCloneService::new(answer)),
                peer,
                _socket: theirs,
            }
        }

        /// The data of an answer, which is unsent until it is dropped; `None` when it was refused.
        async fn call_as(&mut self, peer: &Peer, path: &str) -> Option<Bytes> {
            let mut request = Request::new(());
            *request.uri_mut() = path.parse().unwrap();
            request.extensions_mut().insert(peer.clone());
            let mut answer = self.service.call(request).await.unwrap();
            if let Some(status) = Status::from_header_map(answer.headers()) {
                assert_eq!(status.code(), tonic::Code::ResourceExhausted);
                return None;
            }
            let body = answer.body_mut();
            let frame = std::future::poll_fn(|context| Pin::new(&mut *body).poll_frame(context));
            let frame = frame.await;
            Some(frame.unwrap().unwrap().into_data().unwrap())
        }

        async fn call(&mut self, path: &str) -> Option<Bytes> {
            let peer = self.peer.clone();
            self.call_as(&peer, path).await
        }

        /// As many answers as a reader gets that reads none of them, up to a hundred.
        async fn unread(&mut self, peer: &Peer, path: &str) -> Vec<Bytes> {
            let mut unread = Vec::new();
            while unread.len() < 100
                && let Some(answer) = self.call_as(peer, path).await
            {
                unread.push(answer);
            }
            unread
        }
    }

    #[tokio::test]
    async fn a_user_has_few_unread_lists_and_reading_makes_room() {
        let mut broker = Broker::new(ANSWERS, ANY_BYTES, LONG);
        let peer = broker.peer.clone();
        let mut unread = broker.unread(&peer, LIST).await;
        assert_eq!(unread.len(), ANSWERS.of_user);
        // Lookups and other small answers do not count as lists.
        assert!(broker.call(SMALL).await.is_some());
        drop(unread.pop());
        assert!(broker.call(LIST).await.is_some());
        // The twin: without the bound, as many as are asked for.
        let mut broker = Broker::new(ANY, ANY_BYTES, LONG);
        assert_eq!(broker.unread(&peer, LIST).await.len(), 100);
    }

    #[tokio::test]
    async fn a_user_has_few_watchers_and_they_take_no_place_of_lists() {
        let mut broker = Broker::new(ANSWERS, ANY_BYTES, LONG);
        let peer = broker.peer.clone();
        let mut watching = broker.unread(&peer, WATCH).await;
        assert_eq!(watching.len(), WATCHERS.of_user);
        assert_eq!(broker.unread(&peer, LIST).await.len(), ANSWERS.of_user);
        // The twin: one that hangs up makes room.
        drop(watching.pop());
        assert!(broker.call(WATCH).await.is_some());
    }

    /// A list that finds no place waits for one: it is answered when one is read, and not refused at once.
    #[tokio::test]
    async fn a_list_waits_for_its_place() {
        let mut broker = Broker::of(ANSWERS, ANY_BYTES, LONG, LONG);
        let mut unread = Vec::new();
        for _ in 0..ANSWERS.of_user {
            unread.push(broker.call(LIST).await);
        }
        let waiting = tokio::spawn(async move { broker.call(LIST).await.is_some() });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(
            !waiting.is_finished(),
            "there is no place, and time to wait"
        );
        drop(unread.pop());
        assert!(waiting.await.unwrap());
    }

    /// However small the answers, their bytes are bounded: of a connection, of a process with many, of a user with many
    /// processes, and of all users. Whoever reads gets more, and root is answered in any case.
    #[tokio::test]
    async fn unsent_bytes_are_bounded_for_connection_process_user_and_all() {
        let mut broker = Broker::new(ANY, FEW, LONG);
        let first = broker.peer.clone();
        let peer = |uid: u32, pid: u32, connection: u64| {
            let mut peer = first.clone();
            peer.process = Process { pid, birth: 1, uid };
            peer.connection = Connection(connection);
            peer
        };
        let mut unread = Vec::new();
        for (uid, pid, connection, answers) in [
            (1_000, 1, 1, 4),
            (1_000, 1, 2, 4),
            // The process has all that it may.
            (1_000, 1, 3, 0),
            (1_000, 2, 4, 4),
            // The user has.
            (1_000, 3, 5, 0),
            (2_000, 4, 6, 4),
            // All but root have.
            (3_000, 5, 7, 0),
            (0, 6, 8, 4),
        ] {
            let its = broker.unread(&peer(uid, pid, connection), SMALL).await;
            assert_eq!(its.len(), answers, "uid {uid}, connection {connection}");
            unread.push(its);
        }
        // What is read makes room for who read it.
        drop((unread.remove(0), unread.pop()));
        assert_eq!(broker.unread(&peer(1_000, 1, 1), SMALL).await.len(), 4);
        drop(unread);
        assert!(
            broker.books.page.lock().unsent.is_empty(),
            "something is left"
        );
        // The twin: without budgets, as many as are asked for.
        let mut broker = Broker::new(ANY, ANY_BYTES, LONG);
        assert_eq!(broker.unread(&first, SMALL).await.len(), 100);
    }

    #[tokio::test]
    async fn an_answer_that_stays_unread_costs_its_connection() {
        for path in [LIST, SMALL] {
            let mut broker = Broker::new(ANSWERS, BUDGET, Duration::from_millis(1));
            let unread = broker.call(path).await;
            broker.peer.cut.cancelled().await;
            drop(unread);
        }
    }

    /// A session's message may stay unread for longer than the answers before and after it, not for ever.
    #[tokio::test]
    async fn a_sessions_message_may_wait_for_longer() {
        let patience = Duration::from_millis(40);
        let mut broker = Broker::new(ANSWERS, BUDGET, patience);
        let mut other = broker.peer.clone();
        (other.connection, other.cut) = (Connection(u64::MAX), CancellationToken::new());
        let began = Instant::now();
        let message = broker.call(SESSION).await;
        let answer = broker.call_as(&other, SMALL).await;
        // The twin: any other answer costs its connection, although it came later.
        other.cut.cancelled().await;
        let answered = began.elapsed();
        broker.peer.cut.cancelled().await;
        assert!(answered >= patience && began.elapsed() >= patience * SESSION_PATIENCE);
        drop((message, answer));
    }

    /// A call that waits for room is woken by who makes room for it, and by nobody else's reading.
    #[tokio::test]
    async fn who_waits_is_woken_by_what_it_waits_for() {
        let mut broker = Broker::new(ANY, FEW, LONG);
        let first = broker.peer.clone();
        let mut other = first.clone();
        other.connection = Connection(u64::MAX);
        let mut unread = broker.unread(&first, SMALL).await;
        assert!(
            broker.books.page.lock().waited_for.len() == 1,
            "the call that was refused has waited for its connection"
        );
        let others = broker.call_as(&other, SMALL).await;
        drop(others);
        assert_eq!(broker.books.page.lock().waited_for.len(), 1);
        let mut waiting = broker.service.clone();
        let mut request = Request::new(());
        *request.uri_mut() = SMALL.parse().unwrap();
        request.extensions_mut().insert(first.clone());
        let unread_of_all = Arc::clone(&broker.books);
        let answered = tokio::spawn(async move {
            loop {
                let answer = waiting.call(request.clone()).await.unwrap();
                if Status::from_header_map(answer.headers()).is_none() {
                    return;
                }
            }
        });
        drop(unread.pop());
        answered.await.unwrap();
        assert!(unread_of_all.page.lock().waited_for.is_empty());
    }

    /// The twin: an answer that was read costs nothing, however many came before.
    #[tokio::test]
    async fn an_answer_that_was_read_costs_nothing() {
        let mut broker = Broker::new(ANSWERS, BUDGET, Duration::from_millis(1));
        for _ in 0..100 {
            drop(broker.call(LIST).await);
        }
        let mut other = Broker::new(ANSWERS, BUDGET, Duration::from_millis(1));
        let unread = other.call(LIST).await;
        other.peer.cut.cancelled().await;
        drop(unread);
        assert!(!broker.peer.cut.is_cancelled());
        assert!(broker.books.page.lock().answers.is_empty());
    }
}
