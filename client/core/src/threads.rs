//! Background threads, and how long their owner waits for them to end.

use std::{
    mem,
    sync::mpsc::{self, RecvTimeoutError},
    thread::{self, JoinHandle},
    time::Instant,
};

use parking_lot::Mutex;

use crate::{Error, Result, device::Origin};

/// Threads that end by themselves once they have been told to.
#[derive(Debug)]
pub(crate) struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Each thread has one: the last one to go disconnects `ended`.
    life: Option<mpsc::Sender<()>>,
    ended: Mutex<mpsc::Receiver<()>>,
    /// Where they run. A child of that process has none of them to wait for.
    origin: Origin,
}

impl Threads {
    pub(crate) fn new() -> Self {
        let (life, ended) = mpsc::channel();
        Self {
            handles: Vec::new(),
            life: Some(life),
            ended: Mutex::new(ended),
            origin: Origin::here(),
        }
    }

    /// Starts one.
    ///
    /// # Errors
    /// When the system gives no more threads.
    pub(crate) fn start(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let life = self.life.clone();
        let handle = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                work();
                drop(life);
            })
            .map_err(Error::Thread)?;
        self.handles.push(handle);
        Ok(())
    }

    /// Waits until all have ended. A thread that panicked has said so.
    pub(crate) fn join(&mut self) {
        if !self.origin.is_here() {
            return mem::forget(mem::take(&mut self.handles));
        }
        for thread in self.handles.drain(..) {
            let _ = thread.join();
        }
    }

    /// Waits until all have ended, or until `deadline`: then they go on by themselves, and this is false.
    pub(crate) fn join_by(&mut self, deadline: Instant) -> bool {
        if !self.origin.is_here() {
            self.join();
            return true;
        }
        self.life = None;
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = self.ended.get_mut().recv_timeout(left) != Err(RecvTimeoutError::Timeout);
        if ended {
            self.join();
        }
        ended
    }
}
