//! Queues of copies, and tickets to wait on.

use std::fmt::Debug;

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
pub trait CopyStream: Send + Sync + Debug {
    /// The device whose engines do the copies.
    fn device(&self) -> &DeviceUuid;

    /// Queues `pieces` from one memory to another, as few operations as the device allows (one gather/scatter
    /// launch for many small ones). The stream keeps both memories mapped until the copies are over. All pieces
    /// are checked against both memories before the first is queued. Pieces must not overlap in `to`.
    fn copy(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()>;

    /// As [`copy`](Self::copy), for several pairs of memories at once: a layer's blocks lie in many slabs, and the device
    /// is to be told once. Pieces behind the last part's are nobody's, and left alone. Should a part be refused, those
    /// before it may be queued.
    fn copy_parts(&self, parts: &[Part], pieces: &[Piece]) -> Result<()> {
        Part::split(parts, pieces).try_for_each(|(part, its)| self.copy(&part.from, &part.to, its))
    }

    /// Queues zeroing of `bytes` at `offset`.
    fn zero(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<()>;

    /// A ticket for everything queued so far.
    fn record(&self) -> Result<Ticket>;

    /// Later copies of this stream start only after `ticket`, which may be another stream's.
    fn wait_for(&self, ticket: &Ticket) -> Result<()>;

    /// Copies `bytes` into `memory` at `offset`, and blocks until it is done. Slow: for tests, verification and
    /// small things.
    fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies out of `memory` at `offset`, and blocks until it is done. Slow, likewise.
    fn read(&self, memory: &Memory, offset: u64, bytes: &mut [u8]) -> Result<()>;
}

/// Marks a point in a stream. Clones mark the same point.
#[derive(Clone, Debug)]
pub struct Ticket(pub(crate) std::sync::Arc<dyn Completion>);

impl Ticket {
    /// Whether everything before the point is over. An error means that the copies failed, and with them
    /// everything later on the stream.
    pub fn is_done(&self) -> Result<bool> {
        self.0.is_done()
    }

    /// Blocks the calling thread until everything before the point is over. Not for async code: poll
    /// [`is_done`](Self::is_done) or wait on a blocking thread.
    pub fn wait(&self) -> Result<()> {
        self.0.wait()
    }
}

/// What a backend's tickets do.
pub(crate) trait Completion: Send + Sync + Debug + std::any::Any {
    /// See [`Ticket::is_done`].
    fn is_done(&self) -> Result<bool>;
    /// See [`Ticket::wait`].
    fn wait(&self) -> Result<()>;
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
