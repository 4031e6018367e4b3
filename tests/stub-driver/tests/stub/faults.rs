//! What the file of faults does to a process that runs.

use crate::machine::*;

#[test]
fn only_the_calls_that_a_line_names_fail() {
    let mut machine = machine();
    machine.faults(&["cuMemGetInfo_v2=719@3"]);
    assert_eq!(infos(), [0, 0, 719, 0]);
    // The same text goes on counting; another remark begins anew, at the first call behind the change.
    machine.faults(&["cuMemGetInfo_v2=719@3", "peers=none"]);
    assert_eq!(infos(), [0, 0, 0, 0]);
    machine.faults(&["cuMemGetInfo_v2=719@1-2 # again"]);
    assert_eq!(infos(), [719, 719, 0]);
    machine.faults(&["cuMemGetInfo_v2=2@2-"]);
    assert_eq!(infos(), [0, 2, 2]);
    // Each line counts for itself, and the first that applies decides.
    machine.faults(&["cuMemGetInfo_v2=1@2", "cuMemGetInfo_v2=2@2-3"]);
    assert_eq!(infos(), [0, 1, 2, 0]);
    // Nothing was broken by all this.
    machine.faults(&[]);
    assert_eq!(info(), 0);
}

#[test]
fn a_line_of_another_process_is_not_ours() {
    let mut machine = machine();
    let own = std::process::id();
    let theirs = format!("{}/cuMemGetInfo_v2=2", own + 1);
    let ours = format!("{own}/cuMemGetInfo_v2=3");
    machine.faults(&[&theirs]);
    assert_eq!(info(), 0);
    machine.faults(&[&theirs, &ours]);
    assert_eq!(info(), 3);
}

#[test]
fn what_is_held_stays_queued_until_it_is_let_go_of() {
    let mut machine = machine();
    let (from, to, stream, other) = (allocate(), allocate(), stream(), stream());
    let event = event();
    let hold = format!("{}/hold=copies", std::process::id());
    // SAFETY: the signatures are the driver's; the event is ours, and so are both allocations, of `SIZE` bytes.
    unsafe {
        assert_eq!(cuMemsetD8Async(to, 1, SIZE, stream), 0);
        assert_eq!(cuStreamSynchronize(stream), 0);
        machine.faults(&[&hold]);
        assert_eq!(cuMemsetD8Async(from, 7, SIZE, stream), 0);
        assert_eq!(cuMemcpyAsync(to, from, SIZE, stream), 0);
        assert_eq!(cuEventRecord(event, stream), 0);
        // Other streams go on, and so do fills; the copy does not.
        assert_eq!(cuMemsetD8Async(from, 8, 1, other), 0);
        assert_eq!(cuStreamSynchronize(other), 0);
        assert_eq!(
            (cuStreamQuery(other), cuStreamQuery(stream)),
            (0, NOT_READY)
        );
        assert_eq!((cuEventQuery(event), first(to)), (NOT_READY, 1));
        machine.faults(&[]);
        assert_eq!(cuStreamSynchronize(stream), 0);
        assert_eq!((cuEventQuery(event), cuStreamQuery(stream)), (0, 0));
    }
    assert!(matches!(first(to), 7 | 8));
}

#[test]
fn a_stream_that_was_waited_for_is_idle() {
    let _machine = machine();
    let (memory, stream) = (allocate(), stream());
    for round in 0..200 {
        // SAFETY: the signatures are the driver's; the memory is ours, of `SIZE` bytes.
        unsafe {
            assert_eq!(cuMemsetD8Async(memory, round, 64, stream), 0);
            assert_eq!(cuStreamSynchronize(stream), 0);
            assert_eq!(cuStreamQuery(stream), 0);
        }
    }
}

#[test]
fn calls_are_written_down_with_who_made_them_and_how_they_ended() {
    let mut machine = machine();
    machine.faults(&["trace=cuMemGetInfo_v2,cuStreamSynchronize"]);
    let stream = stream();
    let thread = std::thread::Builder::new().name("a longer name than 15".to_owned());
    let outcome = thread.spawn(info).unwrap().join().unwrap();
    assert_eq!(outcome, 201, "no context is current there");
    // SAFETY: the signature is the driver's.
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, 0);
    let own = std::process::id();
    let lines = machine.trace();
    let [.., failed, began, ended] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert!(failed.starts_with(&format!("cuMemGetInfo_v2 {own} ")));
    assert!(failed.ends_with(" 201 a longer name t"), "{failed}");
    assert!(began.starts_with(&format!("cuStreamSynchronize {own} ")));
    assert!(began.contains(" began ") && ended.contains(" 0 "));
    machine.faults(&[]);
    assert_eq!(info(), 0);
    assert_eq!(machine.trace(), lines);
}
