//! One thread per stream, which runs copies in the order they were queued.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::DeviceUuid;

use super::{
    Lost,
    arena::{Arena, Place},
    pacing::LinkModel,
};
use crate::{
    CopyStream, DeviceError, Memory, Piece, Result, Ticket,
    stream::{Completion, check_pieces},
};

/// A stream of the host backend. When the last handle to it goes, its thread finishes what is queued and ends. Nothing is
/// queued by a call that fails. Copies fail only when the device is lost, which is for good.
#[derive(Debug)]
pub(super) struct HostStream {
    device: DeviceUuid,
    paced: bool,
    queue: Arc<Queue>,
    progress: Arc<Progress>,
}

/// What is queued. The worker swaps these buffers for its own emptied ones, so both keep their capacity and a
/// copy allocates nothing once the stream has seen its largest backlog.
#[derive(Debug, Default)]
struct Backlog {
    work: VecDeque<Queued>,
    /// The pieces of every queued copy, one after another.
    pieces: VecDeque<Piece>,
    closed: bool,
    /// How much was ever queued: the number of the latest.
    latest: u64,
}

#[derive(Debug, Default)]
struct Queue {
    backlog: Mutex<Backlog>,
    changed: Condvar,
}

#[derive(Debug)]
struct Queued {
    work: Work,
    /// When it was queued; only paced streams ask the clock.
    at: Option<Instant>,
}

#[derive(Debug)]
enum Work {
    Copy {
        from: Memory,
        to: Memory,
        pieces: usize,
    },
    Zero {
        memory: Memory,
        offset: u64,
        bytes: u64,
    },
    Wait(Ticket),
}

/// How far the worker is.
#[derive(Debug, Default)]
struct Progress {
    done: AtomicU64,
    /// The first failure and the number of the work that failed: it and everything later failed.
    failure: Mutex<Option<(u64, DeviceError)>>,
    advanced: Condvar,
}

impl Progress {
    fn outcome(&self, number: u64) -> Result<()> {
        Self::outcome_of(&self.failure.lock(), number)
    }

    fn outcome_of(failure: &Option<(u64, DeviceError)>, number: u64) -> Result<()> {
        match failure {
            Some((failed, error)) if *failed <= number => Err(error.clone()),
            _ => Ok(()),
        }
    }

    fn advance(&self, number: u64, result: Result<()>) {
        let mut failure = self.failure.lock();
        if let (Err(error), None) = (result, &*failure) {
            *failure = Some((number, error));
        }
        self.done.store(number, Ordering::Release);
        self.advanced.notify_all();
    }
}

/// A point in a host stream.
#[derive(Debug)]
struct Point {
    progress: Arc<Progress>,
    number: u64,
}

impl Completion for Point {
    fn outcome(&self) -> Option<Result<()>> {
        let over = self.progress.done.load(Ordering::Acquire) >= self.number;
        over.then(|| self.progress.outcome(self.number))
    }

    fn wait(&self) -> Result<()> {
        let mut failure = self.progress.failure.lock();
        while self.progress.done.load(Ordering::Acquire) < self.number {
            self.progress.advanced.wait(&mut failure);
        }
        Progress::outcome_of(&failure, self.number)
    }
}

impl HostStream {
    /// Starts a stream's thread.
    pub(super) fn start(
        device: DeviceUuid,
        pace: Option<Arc<LinkModel>>,
        lost: Arc<Lost>,
    ) -> Result<Self> {
        let queue = Arc::<Queue>::default();
        let progress = Arc::<Progress>::default();
        let paced = pace.is_some();
        let worker = Worker {
            queue: Arc::clone(&queue),
            progress: Arc::clone(&progress),
            pace,
            lost,
            number: 0,
            ready: None,
            failed: None,
        };
        std::thread::Builder::new()
            .name("copy-stream".to_owned())
            .spawn(move || worker.run())
            .map_err(|error| DeviceError::Failed {
                operation: "starting a stream's thread",
                device: device.clone(),
                problem: error.to_string(),
            })?;
        Ok(Self {
            device,
            paced,
            queue,
            progress,
        })
    }

    fn push(&self, work: Work, pieces: &[Piece]) {
        let at = self.paced.then(Instant::now);
        let mut backlog = self.queue.backlog.lock();
        backlog.pieces.extend(pieces);
        backlog.work.push_back(Queued { work, at });
        backlog.latest += 1;
        drop(backlog);
        self.queue.changed.notify_one();
    }
}

impl CopyStream for HostStream {
    fn copy(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()> {
        Arena::of(from)?;
        Arena::of(to)?;
        check_pieces(from, to, pieces)?;
        if pieces.is_empty() {
            return Ok(());
        }
        let work = Work::Copy {
            from: from.clone(),
            to: to.clone(),
            pieces: pieces.len(),
        };
        self.push(work, pieces);
        Ok(())
    }

    fn zero(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<()> {
        Arena::of(memory)?;
        memory.at(offset, bytes)?;
        let work = Work::Zero {
            memory: memory.clone(),
            offset,
            bytes,
        };
        self.push(work, &[]);
        Ok(())
    }

    fn record(&self) -> Result<Ticket> {
        Ok(self.end())
    }

    fn end(&self) -> Ticket {
        let number = self.queue.backlog.lock().latest;
        Ticket(Arc::new(Point {
            progress: Arc::clone(&self.progress),
            number,
        }))
    }

    fn wait_for(&self, ticket: &Ticket) -> Result<()> {
        match ticket.outcome() {
            Some(outcome) => outcome,
            None => {
                self.push(Work::Wait(ticket.clone()), &[]);
                Ok(())
            }
        }
    }

    fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<()> {
        Arena::of(memory)?;
        let address = memory.at(offset, bytes.len() as u64)?;
        self.end().wait()?;
        // SAFETY: `at` checked the range, `memory` keeps it mapped during the call, and `bytes` is an ordinary
        // slice, so the two do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len());
        }
        Ok(())
    }

    fn read(&self, memory: &Memory, offset: u64, bytes: &mut [u8]) -> Result<()> {
        Arena::of(memory)?;
        let address = memory.at(offset, bytes.len() as u64)?;
        self.end().wait()?;
        // SAFETY: as in `write`. Another process may write these bytes meanwhile; they are plain bytes, and
        // whoever reads them waits for the writer's ticket or throws the result away.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), bytes.len());
        }
        Ok(())
    }

    fn device(&self) -> &DeviceUuid {
        &self.device
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        self.queue.backlog.lock().closed = true;
        self.queue.changed.notify_one();
    }
}

/// What runs on a stream's thread.
struct Worker {
    queue: Arc<Queue>,
    progress: Arc<Progress>,
    pace: Option<Arc<LinkModel>>,
    lost: Arc<Lost>,
    /// The work being done.
    number: u64,
    /// When a link could have started on the next copy: the modelled end of the one before.
    ready: Option<Instant>,
    failed: Option<DeviceError>,
}

impl Worker {
    fn run(mut self) {
        let mut batch = Backlog::default();
        loop {
            {
                let mut backlog = self.queue.backlog.lock();
                while backlog.work.is_empty() {
                    if backlog.closed {
                        return;
                    }
                    self.queue.changed.wait(&mut backlog);
                }
                std::mem::swap(&mut backlog.work, &mut batch.work);
                std::mem::swap(&mut backlog.pieces, &mut batch.pieces);
            }
            while let Some(queued) = batch.work.pop_front() {
                self.number += 1;
                let result = self.run_one(&queued, &mut batch.pieces);
                if let Err(error) = &result {
                    self.failed.get_or_insert_with(|| error.clone());
                }
                // The memory goes before the ticket is done: whoever waited may count on it.
                drop(queued);
                self.progress.advance(self.number, result);
            }
        }
    }

    fn run_one(&mut self, queued: &Queued, pieces: &mut VecDeque<Piece>) -> Result<()> {
        let here = match &queued.work {
            Work::Copy { pieces, .. } => *pieces,
            Work::Zero { .. } | Work::Wait(_) => 0,
        };
        let here = pieces.drain(..here);
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        self.lost.check()?;
        match &queued.work {
            Work::Copy { from, to, .. } => {
                let mut total = 0;
                for piece in here {
                    total += piece.bytes;
                    copy(from, to, piece)?;
                }
                let (from, to) = (Arena::of(from)?.place(), Arena::of(to)?.place());
                self.pace(from, to, total, queued.at);
            }
            Work::Zero {
                memory,
                offset,
                bytes,
            } => {
                let address = memory.at(*offset, *bytes)?;
                // SAFETY: `at` checked the range, and the queued work keeps it mapped.
                unsafe { std::ptr::write_bytes(address as *mut u8, 0, *bytes as usize) };
            }
            Work::Wait(ticket) => {
                let already = ticket.is_over();
                ticket.wait()?;
                if !already && self.pace.is_some() {
                    self.ready = Some(Instant::now());
                }
            }
        }
        Ok(())
    }

    /// Sleeps until the link would be done. A copy starts, for the link, when it was queued or when the one before
    /// it ended, so that waking late from one sleep does not delay the next copy.
    fn pace(&mut self, from: &Place, to: &Place, bytes: u64, at: Option<Instant>) {
        let (Some(links), Some(at)) = (&self.pace, at) else {
            return;
        };
        let ready = self.ready.map_or(at, |ready| ready.max(at));
        let end = links.reserve(from, to, bytes, ready);
        self.ready = Some(end);
        std::thread::sleep(end.saturating_duration_since(Instant::now()));
    }
}

fn copy(from: &Memory, to: &Memory, piece: Piece) -> Result<()> {
    let source = from.at(piece.from, piece.bytes)?;
    let target = to.at(piece.to, piece.bytes)?;
    // SAFETY: both ranges were just checked, and the queued work keeps both memories mapped. `copy` rather than
    // `copy_nonoverlapping`, since two mappings or one memory may overlap.
    unsafe { std::ptr::copy(source as *const u8, target as *mut u8, piece.bytes as usize) };
    Ok(())
}
