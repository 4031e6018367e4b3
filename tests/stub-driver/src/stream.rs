//! Streams, each a thread, and events.

use std::{
    collections::VecDeque,
    ffi::c_int,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    Code, ILLEGAL_ADDRESS, INVALID_HANDLE, INVALID_VALUE, NOT_READY, call,
    capture::{CAPTURE_ISOLATION, CAPTURE_UNSUPPORTED, CAPTURED_EVENT, Captured},
    context::current,
    faults,
    kernel::{Piece, Pieces},
    trace, world,
};

/// What a stream does.
#[derive(Clone)]
pub(crate) enum Work {
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Set {
        address: u64,
        value: u8,
        bytes: usize,
    },
    /// Copies pieces, but of each no more than `most` bytes: so many its tiles cover.
    Gather {
        pieces: Pieces,
        most: u64,
    },
    Record(Arc<Flag>),
    Wait(Arc<Flag>),
    End,
}

impl Work {
    /// Whether it reads or writes memory of another device than this one.
    fn touches_peer(&self, world: &crate::World, device: c_int) -> bool {
        let foreign = |address: u64| world.home(address).is_some_and(|home| home != device);
        let any = |pieces: &[Piece]| {
            let mut pieces = pieces.iter();
            pieces.any(|piece| foreign(piece.from) || foreign(piece.to))
        };
        match self {
            Self::Copy { to, from, .. } => foreign(*to) || foreign(*from),
            Self::Set { address, .. } => foreign(*address),
            Self::Gather { pieces, .. } => match pieces {
                Pieces::Copied(pieces) => any(pieces),
                &Pieces::At(address, count) => {
                    let size = count * size_of::<Piece>();
                    world.find(address, size).is_some()
                        // SAFETY: the launch's descriptors lie in an allocation of this process, written before it.
                        && any(unsafe { std::slice::from_raw_parts(address as *const Piece, count) })
                }
            },
            Self::Record(_) | Self::Wait(_) | Self::End => false,
        }
    }

    /// Whether a hold on `kind` keeps a stream from going on to this.
    fn is_held_by(&self, kind: &str) -> bool {
        match kind {
            "kernels" => matches!(self, Self::Gather { .. }),
            "copies" => matches!(self, Self::Gather { .. } | Self::Copy { .. }),
            "all" => !matches!(self, Self::End),
            _ => panic!("stub driver: hold takes kernels, copies or all, and not {kind:?}"),
        }
    }
}

/// How often a stream that is held looks whether it still is.
const HELD_NAP: Duration = Duration::from_millis(1);

/// A queue of work, run by a thread of its own.
pub(crate) struct Stream {
    device: c_int,
    /// Whether the device's default stream waits for its work.
    pub(crate) blocks_default: bool,
    queue: Mutex<Queue>,
    queued: Condvar,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    /// Whether something that was taken out is not over yet.
    busy: bool,
}

/// Raised once.
#[derive(Default)]
pub(crate) struct Flag {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Flag {
    fn raise(&self) {
        *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    fn is_raised(&self) -> bool {
        *self.raised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        while !*raised {
            raised = self
                .changed
                .wait(raised)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Event(Mutex<Mark>);

/// Where an event was recorded last.
#[derive(Clone, Default)]
enum Mark {
    #[default]
    Nowhere,
    At(Arc<Flag>),
    /// In a stream that was being captured.
    In(Captured),
}

impl Stream {
    fn start(device: c_int, blocks_default: bool) -> Arc<Self> {
        let stream = Arc::new(Self {
            device,
            blocks_default,
            queue: Mutex::default(),
            queued: Condvar::new(),
        });
        let running = Arc::clone(&stream);
        std::thread::spawn(move || running.run());
        stream
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, work: Work) {
        self.queue().work.push_back(work);
        self.queued.notify_one();
    }

    fn is_idle(&self) -> bool {
        let queue = self.queue();
        queue.work.is_empty() && !queue.busy
    }

    fn next(&self) -> Work {
        let mut queue = self.queue();
        loop {
            if let Some(work) = queue.work.pop_front() {
                queue.busy = true;
                return work;
            }
            queue = self
                .queued
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run(&self) {
        loop {
            let work = self.next();
            while faults::setting("hold").is_some_and(|kind| work.is_held_by(&kind)) {
                std::thread::sleep(HELD_NAP);
            }
            match work {
                Work::End => return,
                Work::Record(flag) => {
                    // Whoever sees the flag finds the stream idle if nothing is behind.
                    self.queue().busy = false;
                    flag.raise();
                    continue;
                }
                Work::Wait(flag) => flag.wait(),
                work => self.execute(&work),
            }
            self.queue().busy = false;
        }
    }

    /// Does what the hardware does; what it may not do breaks everything, for good.
    fn execute(&self, work: &Work) {
        let mut world = world();
        if world.broken.is_some() {
            return;
        }
        if let Some(code) = faults::injected("execute") {
            world.broken = Some(code);
            return;
        }
        // The lock is held while bytes move, so that nothing is unmapped under a copy.
        let copied = match work {
            &Work::Copy { to, from, bytes } => self.copy(&world, to, from, bytes, false),
            &Work::Set {
                address,
                value,
                bytes,
            } => {
                let may = world.may_touch(self.device, address, bytes, false);
                if may {
                    // SAFETY: the range is one that the device may touch.
                    unsafe { std::ptr::write_bytes(address as *mut u8, value, bytes) };
                }
                may
            }
            Work::Gather { pieces, most } => {
                let pieces = match pieces {
                    Pieces::Copied(pieces) => Some(pieces.clone()),
                    &Pieces::At(address, count) => world
                        .may_touch(self.device, address, count * size_of::<Piece>(), true)
                        // SAFETY: the descriptors lie in memory that the device may touch.
                        .then(|| unsafe {
                            std::slice::from_raw_parts(address as *const Piece, count).to_vec()
                        }),
                };
                pieces.is_some_and(|pieces| {
                    pieces.iter().all(|piece| {
                        let bytes = piece.bytes.min(*most) as usize;
                        self.copy(&world, piece.to, piece.from, bytes, true)
                    })
                })
            }
            Work::Record(_) | Work::Wait(_) | Work::End => true,
        };
        if !copied {
            world.broken = Some(ILLEGAL_ADDRESS);
        }
    }

    fn copy(&self, world: &crate::World, to: u64, from: u64, bytes: usize, kernel: bool) -> bool {
        let may = world.may_touch(self.device, from, bytes, kernel)
            && world.may_touch(self.device, to, bytes, kernel);
        if may {
            // SAFETY: both ranges are ones that the device may touch.
            unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        }
        may
    }
}

/// Numbers of the default streams: null is the current context's.
const DEFAULT: usize = 0x7fff_0000;

pub(crate) fn find(stream: usize) -> Result<Arc<Stream>, Code> {
    let device = current()?;
    let mut world = world();
    if stream == 0 {
        let default = DEFAULT + device as usize;
        let started = world
            .streams
            .entry(default)
            .or_insert_with(|| Stream::start(device, false));
        return Ok(Arc::clone(started));
    }
    let found = world
        .streams
        .get(&stream)
        .filter(|found| found.device == device);
    found.map(Arc::clone).ok_or(INVALID_HANDLE)
}

/// Queues work, or adds it to the graph that the stream is captured into.
pub(crate) fn queue(stream: usize, work: Work) -> Result<(), Code> {
    let found = find(stream)?;
    let mut world = world();
    if stream == 0 {
        world.permit_default()?;
    }
    if work.touches_peer(&world, found.device)
        && let Some(code) = faults::injected("peer_copies")
    {
        return Err(code);
    }
    if let Some(work) = world.captures.take(stream, work)? {
        found.push(work);
    }
    Ok(())
}

/// Fails for a captured stream, and ends its capture: it is asked how far it is, and never gets there.
fn permit_looking(stream: usize) -> Result<(), Code> {
    let mut world = world();
    if stream == 0 {
        world.permit_default()?;
    }
    world.captures.forbid(stream, CAPTURE_UNSUPPORTED)
}

/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut usize,
    flags: u32,
    _priority: c_int,
) -> Code {
    call("cuStreamCreateWithPriority", || {
        let device = current()?;
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let mut world = world();
        let number = world.number() as usize + 0x1000;
        world
            .streams
            .insert(number, Stream::start(device, flags & NON_BLOCKING == 0));
        // SAFETY: the caller gives room for one stream.
        unsafe { stream.write(number) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(stream: usize) -> Code {
    call("cuStreamDestroy_v2", || {
        let removed = world().streams.remove(&stream).ok_or(INVALID_HANDLE)?;
        removed.push(Work::End);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(stream: usize) -> Code {
    call("cuStreamSynchronize", || {
        permit_looking(stream)?;
        let flag = Arc::<Flag>::default();
        queue(stream, Work::Record(Arc::clone(&flag)))?;
        trace::began("cuStreamSynchronize");
        flag.wait();
        world().broken.map_or(Ok(()), Err)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamQuery(stream: usize) -> Code {
    call("cuStreamQuery", || {
        permit_looking(stream)?;
        let idle = find(stream)?.is_idle();
        // What it noticed last may have broken the context.
        world().broken.map_or(Ok(()), Err)?;
        idle.then_some(()).ok_or(NOT_READY)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> Code {
    call("cuStreamWaitEvent", || {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        match mark_of(event)? {
            Mark::Nowhere => Ok(()),
            Mark::At(flag) => {
                world().captures.forbid(stream, CAPTURE_ISOLATION)?;
                queue(stream, Work::Wait(flag))
            }
            Mark::In(captured) => {
                find(stream)?;
                world().captures.join(stream, captured)
            }
        }
    })
}

/// `CU_EVENT_BLOCKING_SYNC`.
const BLOCKING_SYNC: u32 = 1;

fn event_of(event: usize) -> Result<&'static Event, Code> {
    if event == 0 {
        return Err(INVALID_HANDLE);
    }
    // SAFETY: events are made by `cuEventCreate` and used by their maker only while they live.
    Ok(unsafe { &*(event as *const Event) })
}

fn mark_of(event: usize) -> Result<Mark, Code> {
    let mark = event_of(event)?.0.lock();
    Ok(mark.unwrap_or_else(PoisonError::into_inner).clone())
}

/// What an event waits for, if anything. One that belongs to a graph never comes.
fn flag_of(event: usize) -> Result<Option<Arc<Flag>>, Code> {
    match mark_of(event)? {
        Mark::Nowhere => Ok(None),
        Mark::At(flag) => Ok(Some(flag)),
        Mark::In(_) => Err(CAPTURED_EVENT),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(event: *mut usize, flags: u32) -> Code {
    call("cuEventCreate", || {
        current()?;
        // A real driver takes it, and holds launches up once 57 such events are to come.
        if flags & BLOCKING_SYNC != 0 {
            return Err(INVALID_VALUE);
        }
        let made = Box::into_raw(Box::new(Event(Mutex::default())));
        // SAFETY: the caller gives room for one event.
        unsafe { event.write(made as usize) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(event: usize) -> Code {
    call("cuEventDestroy_v2", || {
        event_of(event)?;
        // SAFETY: made by `cuEventCreate`, and the caller gives it up.
        drop(unsafe { Box::from_raw(event as *mut Event) });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(event: usize, stream: usize) -> Code {
    call("cuEventRecord", || {
        let event = event_of(event)?;
        find(stream)?;
        let captured = world().captures.mark(stream)?;
        let mark = match captured {
            Some(captured) => Mark::In(captured),
            None => {
                let flag = Arc::<Flag>::default();
                queue(stream, Work::Record(Arc::clone(&flag)))?;
                Mark::At(flag)
            }
        };
        *event.0.lock().unwrap_or_else(PoisonError::into_inner) = mark;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(event: usize) -> Code {
    call("cuEventQuery", || {
        let flag = flag_of(event)?;
        flag.is_none_or(|flag| flag.is_raised())
            .then_some(())
            .ok_or(NOT_READY)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventSynchronize(event: usize) -> Code {
    call("cuEventSynchronize", || {
        if let Some(flag) = flag_of(event)? {
            trace::began("cuEventSynchronize");
            flag.wait();
        }
        world().broken.map_or(Ok(()), Err)
    })
}
