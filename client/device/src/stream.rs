//! Queues of copies, and tickets to wait on.

use std::{
    fmt::Debug,
    thread,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::DeviceUuid;

use super::{Memory, Result};

/// One contiguous copy between two memories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts in the source, bytes.
    pub from: u64,
    /// Where it goes in the destination, bytes.
    pub to: u64,
    /// Its size, bytes.
    pub bytes: u64,
}

/// Whose the next pieces of a list are.
#[derive(Clone, Debug)]
pub struct Part {
    /// What they are copied from.
    pub from: Memory,
    /// What they are copied to.
    pub to: Memory,
    /// How many they are.
    pub pieces: usize,
}

impl Part {
    /// Each part and its pieces, of a list in the order of its parts.
    pub fn split<'a>(
        parts: &'a [Self],
        pieces: &'a [Piece],
    ) -> impl Iterator<Item = (&'a Self, &'a [Piece])> {
        parts.iter().scan(pieces, |rest, part| {
            let (its, behind) = rest.split_at(part.pieces.min(rest.len()));
            *rest = behind;
            Some((part, its))
        })
    }

    /// The pieces that are some part's: the safe bound of what a backend may queue.
    pub(crate) fn covered<'a>(parts: &[Self], pieces: &'a [Piece]) -> &'a [Piece] {
        let theirs = (parts.iter()).fold(0_usize, |sum, part| sum.saturating_add(part.pieces));
        &pieces[..theirs.min(pieces.len())]
    }
}

/// A queue of copies on one device. Copies run in the order they were queued; streams are independent.
/// Nothing here blocks except where it says so.
///
/// # When a call fails
/// A call that fails may have queued all of what it was asked to queue, some of it, or nothing. The stream itself is as
/// good as before: a failure is the operation's that met it, and a later call works if the device does. Whoever has
/// queued anything takes a ticket of [`end`](Self::end), also behind an error, and uses neither memory for anything
/// else before that ticket is over. The stream keeps both mapped as long.
pub trait CopyStream: Send + Sync + Debug {
    /// The device whose engines do the copies.
    fn device(&self) -> &DeviceUuid;

    /// Queues `pieces` from one memory to another, as few operations as the device allows (one gather/scatter
    /// launch for many small ones). The stream keeps both memories mapped until the copies are known to be over. All
    /// pieces are checked against both memories before the first is queued. Pieces must not overlap in `to`.
    fn copy(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()>;

    /// As [`copy`](Self::copy), for several pairs of memories at once: a layer's blocks lie in many slabs, and the device
    /// is to be told once. Pieces behind the last part's are nobody's, and left alone. Should a part be refused, those
    /// before it may be queued.
    fn copy_parts(&self, parts: &[Part], pieces: &[Piece]) -> Result<()> {
        Part::split(parts, pieces).try_for_each(|(part, its)| self.copy(&part.from, &part.to, its))
    }

    /// Queues zeroing of `bytes` at `offset`.
    fn zero(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<()>;

    /// Marks the end of everything queued so far: a ticket that other streams can wait for on the device.
    ///
    /// # Errors
    /// When the device does not take the mark now. Nothing else has changed.
    fn record(&self) -> Result<Ticket>;

    /// A ticket for everything queued so far, for whoever must know when it is over whatever happened. It is always there:
    /// what the device does not mark now is marked, or asked about, when somebody asks the ticket.
    fn end(&self) -> Ticket;

    /// Later copies of this stream start only after `ticket`, which may be another stream's.
    ///
    /// # Errors
    /// When the device does not take it, or when it is known that what the ticket marks has failed.
    fn wait_for(&self, ticket: &Ticket) -> Result<()>;

    /// Copies `bytes` into `memory` at `offset`, and blocks until it is known to be over. Slow: for tests, verification
    /// and small things.
    fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies out of `memory` at `offset`, and blocks until it is known to be over. Slow, likewise.
    fn read(&self, memory: &Memory, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

/// Marks a point in a stream. Clones mark the same point.
#[derive(Clone, Debug)]
pub struct Ticket(pub(crate) std::sync::Arc<dyn Completion>);

impl Ticket {
    /// How it ended, once everything before the point is *known* to be over: nothing before the point touches any memory
    /// any more. None until then, and also when the device does not say: not knowing is not over, so ask again later.
    /// Never blocks.
    ///
    /// An error means that the device has failed and with it the copies. That a call which queued copies returned
    /// an error is for its caller to remember.
    pub fn outcome(&self) -> Option<Result<()>> {
        self.0.outcome()
    }

    /// Whether both are clones of one: they end at the same moment.
    pub fn is_same(&self, other: &Self) -> bool {
        std::sync::Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether it is over, well or not. See [`outcome`](Self::outcome).
    pub fn is_over(&self) -> bool {
        self.outcome().is_some()
    }

    /// Blocks the calling thread until it is known to be over: for ever if the device never says so. Not for async code:
    /// poll [`outcome`](Self::outcome) or wait on a blocking thread.
    pub fn wait(&self) -> Result<()> {
        self.0.wait()
    }

    /// Like [`wait`](Self::wait), but gives up at `deadline`.
    pub fn wait_until(&self, deadline: Instant) -> Option<Result<()>> {
        let began = Instant::now();
        loop {
            if let Some(outcome) = self.outcome() {
                return Some(outcome);
            }
            let now = Instant::now();
            if now >= deadline {
                return None;
            }
            thread::sleep(nap(now - began).min(deadline - now));
        }
    }
}

/// What a backend's tickets do.
pub(crate) trait Completion: Send + Sync + Debug + std::any::Any {
    /// See [`Ticket::outcome`].
    fn outcome(&self) -> Option<Result<()>>;
    /// See [`Ticket::wait`].
    fn wait(&self) -> Result<()>;
}

/// How long to sleep before asking again, after having waited for `waited`: an eighth of it, since nobody minds to wait
/// so much longer; at most 200 us as long as copies usually take, and 10 ms for what takes seconds.
#[must_use]
pub fn nap(waited: Duration) -> Duration {
    let usual = (waited / 8).min(Duration::from_micros(200));
    usual.max(waited / 256).min(Duration::from_millis(10))
}

/// Checks all pieces against both memories, before the first is queued.
pub(crate) fn check_pieces(from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()> {
    let fits = |offset: u64, bytes: u64, size: u64| offset <= size && bytes <= size - offset;
    let (source, target) = (from.bytes(), to.bytes());
    // A layer has thousands of pieces, and is late if this is slow.
    let stray = pieces.iter().find(|piece| {
        !fits(piece.from, piece.bytes, source) || !fits(piece.to, piece.bytes, target)
    });
    match stray {
        None => Ok(()),
        Some(piece) => {
            from.at(piece.from, piece.bytes)?;
            to.at(piece.to, piece.bytes).map(|_| ())
        }
    }
}
