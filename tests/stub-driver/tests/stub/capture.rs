//! Captures: what they take in, and what spoils them.

use std::thread;

use crate::machine::*;

const GLOBAL: u32 = 0;
const THREAD_LOCAL: u32 = 1;
const RELAXED: u32 = 2;

const UNSUPPORTED: u32 = 900;
const INVALIDATED: u32 = 901;
const UNJOINED: u32 = 904;
const ISOLATION: u32 = 905;
const IMPLICIT: u32 = 906;
const CAPTURED_EVENT: u32 = 907;

fn begin(stream: usize, mode: u32) {
    // SAFETY: the signature is the driver's.
    assert_eq!(unsafe { cuStreamBeginCapture_v2(stream, mode) }, 0);
}

fn end(stream: usize) -> Result<usize, u32> {
    let mut graph = 0;
    // SAFETY: one graph is written, to one of ours.
    match unsafe { cuStreamEndCapture(stream, &raw mut graph) } {
        0 => Ok(graph),
        code => Err(code),
    }
}

fn status(stream: usize) -> Result<i32, u32> {
    let mut status = -1;
    // SAFETY: one status is written, to one of ours.
    match unsafe { cuStreamIsCapturing(stream, &raw mut status) } {
        0 => Ok(status),
        code => Err(code),
    }
}

fn exchange(mode: u32) -> u32 {
    let mut mode = mode;
    // SAFETY: one mode is read from and written to one of ours.
    let code = unsafe { cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    assert_eq!(code, 0);
    mode
}

/// What a query of a fresh event returns on a thread of this mode.
fn query_elsewhere(mode: u32) -> u32 {
    let event = event();
    let query = move || {
        assert_eq!(exchange(mode), GLOBAL, "what threads begin with");
        // SAFETY: the event is ours.
        let code = unsafe { cuEventQuery(event) };
        assert_eq!(exchange(GLOBAL), mode);
        code
    };
    thread::spawn(query).join().expect("no panic")
}

#[test]
fn captured_work_runs_when_it_is_launched_and_as_often() {
    let _machine = machine();
    let (memory, stream) = (allocate(), stream());
    // SAFETY: the signatures are the driver's; the memory is ours, of `SIZE` bytes.
    unsafe {
        assert_eq!(cuMemsetD8Async(memory, 1, 64, stream), 0);
        assert_eq!(cuStreamSynchronize(stream), 0);
        begin(stream, GLOBAL);
        assert_eq!(status(stream), Ok(1));
        assert_eq!(cuMemsetD8Async(memory, 2, 64, stream), 0);
        let graph = end(stream).unwrap();
        assert_eq!((status(stream), cuStreamSynchronize(stream)), (Ok(0), 0));
        assert_eq!(first(memory), 1);
        let mut executable = 0;
        assert_eq!(
            cuGraphInstantiateWithFlags(&raw mut executable, graph, 0),
            0
        );
        for _ in 0..2 {
            assert_eq!(cuMemsetD8Async(memory, 3, 64, stream), 0);
            assert_eq!(cuGraphLaunch(executable, stream), 0);
            assert_eq!(cuStreamSynchronize(stream), 0);
            assert_eq!(first(memory), 2);
        }
    }
}

#[test]
fn only_threads_that_are_relaxed_may_call_what_might_wait() {
    let mut machine = machine();
    let stream = stream();
    for (captured, other, spoiled) in [
        (GLOBAL, GLOBAL, true),
        (GLOBAL, RELAXED, false),
        (GLOBAL, THREAD_LOCAL, false),
        (THREAD_LOCAL, GLOBAL, false),
        (RELAXED, GLOBAL, false),
    ] {
        begin(stream, captured);
        let asked = query_elsewhere(other);
        let ended = end(stream);
        assert_eq!(asked, if spoiled { UNSUPPORTED } else { 0 });
        assert_eq!(ended.is_err(), spoiled, "{captured} {other}");
        assert_eq!(ended.err().unwrap_or(INVALIDATED), INVALIDATED);
    }
    // A thread's own capture forbids it the same, unless it is relaxed.
    begin(stream, THREAD_LOCAL);
    exchange(RELAXED);
    let event = event();
    // SAFETY: the event is ours.
    assert_eq!(unsafe { cuEventQuery(event) }, 0);
    exchange(GLOBAL);
    // SAFETY: as above.
    assert_eq!(unsafe { cuEventQuery(event) }, UNSUPPORTED);
    assert_eq!(status(stream), Ok(2));
    assert_eq!(end(stream), Err(INVALIDATED));
    // Where modes are ignored, being relaxed does not help.
    machine.faults(&["capture_mode=ignored"]);
    begin(stream, GLOBAL);
    assert_eq!(query_elsewhere(RELAXED), UNSUPPORTED);
    assert_eq!(end(stream), Err(INVALIDATED));
}

#[test]
fn a_mark_in_a_capture_never_comes_and_draws_in_who_waits_for_it() {
    let _machine = machine();
    let (captured, other, mark, own) = (stream(), stream(), event(), event());
    let memory = allocate();
    // SAFETY: the signatures are the driver's; events and memory are ours.
    unsafe {
        assert_eq!(cuEventRecord(own, other), 0);
        begin(captured, RELAXED);
        assert_eq!(cuEventRecord(mark, captured), 0);
        exchange(RELAXED);
        assert_eq!(cuEventQuery(mark), CAPTURED_EVENT);
        exchange(GLOBAL);
        assert_eq!(cuStreamWaitEvent(other, mark, 0), 0);
        assert_eq!(status(other), Ok(1), "it was drawn in");
        assert_eq!(cuMemsetD8Async(memory, 9, 64, other), 0);
        assert_eq!(end(captured), Err(UNJOINED));
        assert_eq!(cuStreamSynchronize(other), 0);
        assert_ne!(first(memory), 9, "what it was asked for is lost");
        // Waiting for what is no part of the capture spoils it, and so does asking how far the stream is.
        begin(captured, RELAXED);
        assert_eq!(cuStreamWaitEvent(captured, own, 0), ISOLATION);
        assert_eq!(end(captured), Err(INVALIDATED));
        begin(captured, RELAXED);
        assert_eq!(cuStreamQuery(captured), UNSUPPORTED);
        assert_eq!(end(captured), Err(INVALIDATED));
    }
}

#[test]
fn the_default_stream_does_not_get_on_with_captures_of_streams_that_it_waits_for() {
    let _machine = machine();
    let (memory, apart) = (allocate(), stream());
    let mut blocking = 0;
    // SAFETY: the signatures are the driver's; the memory is ours, and one stream is written, to one of ours.
    unsafe {
        begin(apart, GLOBAL);
        assert_eq!(cuMemsetD8Async(memory, 1, 64, 0), 0);
        assert!(end(apart).is_ok());
        assert_eq!(cuStreamCreateWithPriority(&raw mut blocking, 0, 0), 0);
        begin(blocking, GLOBAL);
        assert_eq!(status(0), Err(IMPLICIT), "asking spoils nothing");
        assert_eq!(status(blocking), Ok(1));
        assert_eq!(cuMemsetD8Async(memory, 1, 64, 0), IMPLICIT);
        assert_eq!(end(blocking), Err(INVALIDATED));
    }
}
