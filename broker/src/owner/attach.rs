//! Attaches a session's stream, and detaches it when its holder drops it.

use std::sync::Arc;

use swiftcache_proto::{domain::SessionId, v1};
use tokio::{runtime::Handle, sync::mpsc};

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
        let (owner, session, serial) = (Arc::clone(&self.owner), self.session, self.serial);
        let detach = async move {
            let detached = owner.at_desk(move |owner, desk| {
                desk.streams.over(session);
                if desk.streams.close_serial(session, serial) {
                    desk.apply(owner, Event::Detach(session));
                }
            });
            if let Err(error) = detached.await {
                tracing::error!(%error, "a stream that ended could not be detached");
            }
        };
        // Without a runtime the broker has ended, and no stream is attached to anything.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(detach);
        }
    }
}

impl Owner {
    /// Attaches a stream to the session, and ends the stream that it had.
    pub(crate) async fn attach(self: &Arc<Self>, caller: Caller) -> Result<Attachment, Refused> {
        self.at_desk(move |owner, desk| {
            if desk.closing {
                return Err(Refused::ShuttingDown);
            }
            desk.streams.may_open(caller.session)?;
            let mut outstanding = Vec::new();
            let done =
                desk.apply_diverting(owner, Event::Attach(caller), &mut |session, message| {
                    if session == caller.session {
                        outstanding.push(message);
                        return None;
                    }
                    Some(message)
                });
            answer(done.reply)?;
            let (serial, receiver) = desk.streams.open(caller.session);
            let guard = Attached {
                owner: Arc::clone(owner),
                session: caller.session,
                serial,
            };
            Ok(Attachment {
                outstanding,
                receiver,
                guard,
            })
        })
        .await?
    }
}
