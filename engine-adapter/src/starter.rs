//! A thread that starts what the engine's own thread need not wait for: queueing the copies of a long prefix takes a millisecond,
//! in which the engine prepares its forward.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{self, Receiver, Sender},
    thread,
};

use swiftcache_client::Error;

use crate::failure::Result;

type Job = Box<dyn FnOnce() + Send>;

/// The thread. It does one thing after the other, in the order in which they were asked for, and ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Starter(Sender<Job>);

impl Starter {
    pub(crate) fn start() -> Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("swiftcache-start".to_owned())
            .spawn(move || inbox.iter().for_each(|job| job()))
            .map_err(Error::Thread)?;
        Ok(Self(jobs))
    }

    /// Has it done there. What comes of it is received once, and nothing if it panicked or the process has forked.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Receiver<T> {
        let (told, outcome) = mpsc::sync_channel(1);
        let job = move || {
            // The panic has been printed. What it leaves behind is behind locks that are not poisoned.
            if let Ok(done) = catch_unwind(AssertUnwindSafe(work)) {
                // Nobody may want it any more.
                let _ = told.send(done);
            }
        };
        // Without the thread the job is dropped, and with it the sender.
        let _ = self.0.send(Box::new(job));
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_in_order_and_what_panics_gives_nothing() {
        let starter = Starter::start().unwrap();
        let (gate, closed) = mpsc::channel::<()>();
        let first = starter.run(move || closed.recv().is_ok());
        let broken = starter.run(|| -> bool { panic!("on purpose") });
        let last = starter.run(|| 3);
        assert!(first.try_recv().is_err() && last.try_recv().is_err());
        gate.send(()).unwrap();
        assert!(first.recv().unwrap());
        assert!(broken.recv().is_err());
        assert_eq!(last.recv(), Ok(3));
        // What was asked for is done though nobody asks for more.
        let late = starter.run(|| 4);
        drop(starter);
        assert_eq!(late.recv(), Ok(4));
    }
}
