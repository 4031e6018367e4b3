//! Captures of streams into graphs, and whose calls they forbid.
//!
//! What a stream is asked to do while it is captured becomes part of a graph, and runs when that is launched. A capture
//! fails at its end, whatever ended it in between, so an engine loses the graph: `invalid`.

use std::{cell::Cell, collections::HashMap, ffi::c_int};

use crate::{
    Code, INVALID_HANDLE, INVALID_VALUE, World, call, call_anyway, faults,
    stream::{Work, find},
    world,
};

/// A call that might wait or allocate, while its thread must not.
pub(crate) const CAPTURE_UNSUPPORTED: Code = 900;
const CAPTURE_INVALIDATED: Code = 901;
const CAPTURE_UNMATCHED: Code = 903;
const CAPTURE_UNJOINED: Code = 904;
/// A captured stream was to wait for something that is no part of the capture.
pub(crate) const CAPTURE_ISOLATION: Code = 905;
/// The default stream waits for streams that were not created apart from it, so for a captured one too.
const CAPTURE_IMPLICIT: Code = 906;
/// An event that was last recorded in a captured stream never fires.
pub(crate) const CAPTURED_EVENT: Code = 907;
const CAPTURE_WRONG_THREAD: Code = 908;

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

/// What might wait, allocate, or change what is mapped. A real driver does not say which calls it takes for such; this
/// one counts every one that could be.
const POTENTIALLY_UNSAFE: [&str; 23] = [
    "cuCtxEnablePeerAccess",
    "cuEventQuery",
    "cuEventSynchronize",
    "cuIpcCloseMemHandle",
    "cuIpcGetMemHandle",
    "cuIpcOpenMemHandle_v2",
    "cuMemAddressFree",
    "cuMemAddressReserve",
    "cuMemAlloc_v2",
    "cuMemCreate",
    "cuMemExportToShareableHandle",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemImportFromShareableHandle",
    "cuMemMap",
    "cuMemRelease",
    "cuMemUnmap",
    "cuModuleLoadData",
    "cuStreamQuery",
    "cuStreamSynchronize",
];

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

/// All captures that have not been ended, and the graphs of those that have.
#[derive(Default)]
pub(crate) struct Captures {
    active: HashMap<u64, Capture>,
    /// The capture that each captured stream belongs to.
    streams: HashMap<usize, u64>,
    /// Graphs, and the executable ones made of them.
    graphs: HashMap<u64, Vec<Work>>,
}

struct Capture {
    origin: usize,
    mode: u32,
    thread: std::thread::ThreadId,
    invalid: bool,
    work: Vec<Work>,
    /// Streams that wait for the capture's events, and that it has not waited for.
    unjoined: Vec<usize>,
}

/// Where an event was recorded, if in a captured stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Captured {
    capture: u64,
    stream: usize,
}

impl Captures {
    /// What the calling thread is to answer to a call of `symbol`. A forbidden one ends the captures that forbid it.
    pub(crate) fn permit(&mut self, symbol: &str) -> Result<(), Code> {
        if self.active.is_empty() || !POTENTIALLY_UNSAFE.contains(&symbol) {
            return Ok(());
        }
        let ignored = faults::setting("capture_mode").is_some_and(|value| value == "ignored");
        let mode = if ignored { GLOBAL } else { MODE.get() };
        let thread = std::thread::current().id();
        let mut result = Ok(());
        for capture in self.active.values_mut() {
            let forbids = match mode {
                RELAXED => false,
                _ if capture.thread == thread => capture.mode != RELAXED,
                GLOBAL => capture.mode == GLOBAL,
                _ => false,
            };
            if forbids {
                capture.invalid = true;
                result = Err(CAPTURE_UNSUPPORTED);
            }
        }
        result
    }

    fn capture_of(&mut self, stream: usize) -> Option<(u64, &mut Capture)> {
        let number = *self.streams.get(&stream)?;
        Some((number, self.active.get_mut(&number)?))
    }

    /// Ends the capture that a stream belongs to, if it belongs to one, because of `code`.
    pub(crate) fn forbid(&mut self, stream: usize, code: Code) -> Result<(), Code> {
        match self.capture_of(stream) {
            Some((_, capture)) => {
                capture.invalid = true;
                Err(code)
            }
            None => Ok(()),
        }
    }

    /// Takes `work` into the graph if the stream is captured; otherwise gives it back, to be run.
    pub(crate) fn take(&mut self, stream: usize, work: Work) -> Result<Option<Work>, Code> {
        let Some((_, capture)) = self.capture_of(stream) else {
            return Ok(Some(work));
        };
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        capture.work.push(work);
        if stream != capture.origin && !capture.unjoined.contains(&stream) {
            capture.unjoined.push(stream);
        }
        Ok(None)
    }

    /// What an event that is recorded in this stream now belongs to.
    pub(crate) fn mark(&mut self, stream: usize) -> Result<Option<Captured>, Code> {
        let Some((number, capture)) = self.capture_of(stream) else {
            return Ok(None);
        };
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        Ok(Some(Captured {
            capture: number,
            stream,
        }))
    }

    /// A stream is to wait for an event that was recorded in a capture: it becomes part of it.
    pub(crate) fn join(&mut self, stream: usize, event: Captured) -> Result<(), Code> {
        let other = self
            .streams
            .get(&stream)
            .is_some_and(|own| *own != event.capture);
        let capture = self.active.get_mut(&event.capture);
        let capture = capture.filter(|_| !other).ok_or(CAPTURE_ISOLATION)?;
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        capture.unjoined.retain(|waiting| *waiting != event.stream);
        if stream != capture.origin {
            capture.unjoined.push(stream);
            self.streams.insert(stream, event.capture);
        }
        Ok(())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> Code {
    call_anyway("cuThreadExchangeStreamCaptureMode", || {
        // SAFETY: the caller gives one mode, and takes another in its place.
        let wanted = unsafe { mode.read() };
        if wanted > RELAXED {
            return Err(INVALID_VALUE);
        }
        let before = MODE.replace(wanted);
        // SAFETY: as above.
        unsafe { mode.write(before) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamBeginCapture_v2(stream: usize, mode: u32) -> Code {
    call("cuStreamBeginCapture_v2", || {
        find(stream)?;
        let mut world = world();
        let number = world.number();
        let captures = &mut world.captures;
        if stream == 0 {
            return Err(CAPTURE_UNSUPPORTED);
        }
        if ![GLOBAL, THREAD_LOCAL, RELAXED].contains(&mode)
            || captures.streams.contains_key(&stream)
        {
            return Err(INVALID_VALUE);
        }
        captures.streams.insert(stream, number);
        let capture = Capture {
            origin: stream,
            mode,
            thread: std::thread::current().id(),
            invalid: false,
            work: Vec::new(),
            unjoined: Vec::new(),
        };
        captures.active.insert(number, capture);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(stream: usize, status: *mut c_int) -> Code {
    const ACTIVE: c_int = 1;
    const INVALIDATED: c_int = 2;
    call("cuStreamIsCapturing", || {
        find(stream)?;
        let mut world = world();
        if stream == 0 && world.captured_before_default().next().is_some() {
            return Err(CAPTURE_IMPLICIT);
        }
        let capture = world.captures.capture_of(stream);
        let found = capture.map_or(0, |(_, capture)| match capture.invalid {
            true => INVALIDATED,
            false => ACTIVE,
        });
        // SAFETY: the caller gives room for one status.
        unsafe { status.write(found) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> Code {
    call("cuStreamEndCapture", || {
        let mut world = world();
        let captures = &mut world.captures;
        let (number, capture) = captures.capture_of(stream).ok_or(INVALID_VALUE)?;
        if capture.origin != stream {
            return Err(CAPTURE_UNMATCHED);
        }
        if capture.mode != RELAXED && capture.thread != std::thread::current().id() {
            return Err(CAPTURE_WRONG_THREAD);
        }
        captures.streams.retain(|_, own| *own != number);
        let capture = captures.active.remove(&number).ok_or(INVALID_VALUE)?;
        // SAFETY: the caller gives room for one graph.
        unsafe { graph.write(0) };
        if capture.invalid {
            return Err(CAPTURE_INVALIDATED);
        }
        if !capture.unjoined.is_empty() {
            return Err(CAPTURE_UNJOINED);
        }
        captures.graphs.insert(number, capture.work);
        // SAFETY: as above.
        unsafe { graph.write(number as usize) };
        Ok(())
    })
}

impl World {
    /// Captured streams that the default one waits for, as it does unless they were created apart from it.
    fn captured_before_default(&self) -> impl Iterator<Item = usize> {
        let captured = self.captures.streams.keys().copied();
        captured.filter(|stream| {
            let found = self.streams.get(stream);
            found.is_some_and(|stream| stream.blocks_default)
        })
    }

    /// The default stream is to be used: not while one that it waits for is captured, whose capture that ends.
    pub(crate) fn permit_default(&mut self) -> Result<(), Code> {
        let blocking: Vec<usize> = self.captured_before_default().collect();
        let mut blocking = blocking.into_iter();
        blocking.try_for_each(|stream| self.captures.forbid(stream, CAPTURE_IMPLICIT))
    }

    fn graph(&self, graph: usize) -> Result<&Vec<Work>, Code> {
        let graph = self.captures.graphs.get(&(graph as u64));
        graph.ok_or(INVALID_HANDLE)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut usize,
    graph: usize,
    _flags: u64,
) -> Code {
    call("cuGraphInstantiateWithFlags", || {
        let mut world = world();
        let work = world.graph(graph)?.clone();
        let number = world.number();
        world.captures.graphs.insert(number, work);
        // SAFETY: the caller gives room for one executable graph.
        unsafe { executable.write(number as usize) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: usize, stream: usize) -> Code {
    call("cuGraphLaunch", || {
        let stream = find(stream)?;
        let work = world().graph(executable)?.clone();
        work.into_iter().for_each(|work| stream.push(work));
        Ok(())
    })
}

fn destroy(graph: usize) -> Result<(), Code> {
    let destroyed = world().captures.graphs.remove(&(graph as u64));
    destroyed.map(|_| ()).ok_or(INVALID_HANDLE)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: usize) -> Code {
    call("cuGraphDestroy", || destroy(graph))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: usize) -> Code {
    call("cuGraphExecDestroy", || destroy(executable))
}
