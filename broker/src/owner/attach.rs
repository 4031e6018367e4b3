//! Attaches a session's stream, and detaches it when its holder drops it.

use std::sync::Arc;

use swiftcache_proto::{domain::SessionId, v1};
use tokio::sync::mpsc;

use super::{Owner, answer};
use crate::{
    core::{Caller, Event},
    error::Refused,
};

/// A session's attached stream.
pub(crate) struct Attachment {
    /// The outstanding messages, in order.
    pub(crate) outstanding: Vec<v1::SessionResponse>,
    /// The messages after those.
    pub(crate) receiver: mpsc::Receiver<v1::SessionResponse>,
    /// Ends the attachment when it is dropped.
    pub(crate) guard: Attached,
}

/// Detaches the session's stream when dropped, unless another stream has replaced it.
pub(crate) struct Attached {
    owner: Arc<Owner>,
    session: SessionId,
    serial: u64,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut inner = self.owner.inner.lock();
        if inner.streams.close_serial(self.session, self.serial) {
            inner.apply(&self.owner, Event::Detach(self.session));
        }
    }
}

impl Owner {
    /// Attaches a stream to the session, and ends the stream that it had.
    pub(crate) fn attach(self: &Arc<Self>, caller: Caller) -> Result<Attachment, Refused> {
        let mut inner = self.inner.lock();
        if inner.closing {
            return Err(Refused::ShuttingDown);
        }
        let mut outstanding = Vec::new();
        let now = self.now();
        let effects = inner.state.apply(Event::Attach(caller), now);
        let (reply, _) = inner.carry_out(self, effects, &mut |session, message| {
            if session == caller.session {
                outstanding.push(message);
                return None;
            }
            Some(message)
        });
        answer(reply)?;
        let (serial, receiver) = inner.streams.open(caller.session);
        drop(inner);
        let guard = Attached {
            owner: Arc::clone(self),
            session: caller.session,
            serial,
        };
        Ok(Attachment {
            outstanding,
            receiver,
            guard,
        })
    }
}
