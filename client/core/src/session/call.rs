//! One RPC on its way: await it, or wait for it on a thread that owns no runtime.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use tokio::task::JoinHandle;

use crate::{Error, Result};

/// An RPC that is already on its way. It has a deadline of its own, so that neither way of waiting hangs.
#[must_use = "a call's outcome is known only to who waits for it"]
#[derive(Debug)]
pub struct Call<T> {
    name: &'static str,
    state: State<T>,
    /// The session's own thread, which must not wait for itself.
    session_thread: Option<thread::ThreadId>,
}

#[derive(Debug)]
enum State<T> {
    Failed(Option<Error>),
    Running(JoinHandle<Result<T>>),
}

impl<T> Call<T> {
    pub(super) fn failed(name: &'static str, error: Error) -> Self {
        Self {
            name,
            state: State::Failed(Some(error)),
            session_thread: None,
        }
    }

    pub(super) fn running(
        name: &'static str,
        task: JoinHandle<Result<T>>,
        session_thread: Option<thread::ThreadId>,
    ) -> Self {
        Self {
            name,
            state: State::Running(task),
            session_thread,
        }
    }

    /// Blocks the calling thread for the outcome. Works on any thread but the session's own, in a runtime or not.
    ///
    /// # Errors
    /// What the call met; [`Error::OnSessionThread`] from an observer.
    pub fn wait(self) -> Result<T> {
        if self.session_thread == Some(thread::current().id()) {
            return Err(Error::OnSessionThread { call: self.name });
        }
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut call = pin!(self);
        loop {
            match call.as_mut().poll(&mut context) {
                Poll::Ready(outcome) => return outcome,
                Poll::Pending => thread::park(),
            }
        }
    }
}

impl<T> Call<T> {
    /// The outcome if it is there, without waiting. Once only.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        let mut context = Context::from_waker(Waker::noop());
        match Pin::new(self).poll(&mut context) {
            Poll::Ready(outcome) => Some(outcome),
            Poll::Pending => None,
        }
    }
}

impl<T> Future for Call<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let call = self.name;
        match &mut self.state {
            State::Failed(error) => Poll::Ready(Err(error.take().unwrap_or(Error::Closed))),
            State::Running(task) => Pin::new(task).poll(context).map(|joined| {
                // It was on its way when the session's thread ended.
                joined.unwrap_or_else(|_| {
                    Err(Error::Lost {
                        call,
                        problem: "the session was closed".to_owned(),
                    })
                })
            }),
        }
    }
}

// Nothing in a call is ever pinned by address.
impl<T> Unpin for Call<T> {}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}
