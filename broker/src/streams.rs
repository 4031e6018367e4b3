//! The sessions' streams as the owner sees them: one bounded queue a session, never waited for.

use std::collections::HashMap;

use swiftcache_proto::{domain::SessionId, v1};
use tokio::sync::mpsc;

use crate::core::Outgoing;

/// Messages a stream may lag behind: the revocations of a 1 TiB donation in 64 MiB slabs. A reader slower than
/// that loses its stream, attaches again, and gets what is outstanding.
const QUEUE: usize = 16_384;

/// One attached stream.
struct Outlet {
    serial: u64,
    sender: mpsc::Sender<v1::SessionResponse>,
}

/// Every attached stream.
#[derive(Default)]
pub(crate) struct Streams {
    outlets: HashMap<SessionId, Outlet>,
    serial: u64,
}

impl Streams {
    /// Opens the session's stream, ending the one it had. The serial tells it from later ones.
    pub(crate) fn open(
        &mut self,
        session: SessionId,
    ) -> (u64, mpsc::Receiver<v1::SessionResponse>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.serial += 1;
        let serial = self.serial;
        self.outlets.insert(session, Outlet { serial, sender });
        (serial, receiver)
    }

    /// Sends, if the session is attached. False: its stream is full, and was closed.
    pub(crate) fn send(&mut self, session: SessionId, message: v1::SessionResponse) -> bool {
        let Some(outlet) = self.outlets.get(&session) else {
            return true;
        };
        match outlet.sender.try_send(message) {
            Ok(()) => true,
            // Its end is already being noticed.
            Err(mpsc::error::TrySendError::Closed(_)) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.outlets.remove(&session);
                false
            }
        }
    }

    /// Closes the session's stream, whichever it is. False: it had none.
    pub(crate) fn close(&mut self, session: SessionId) -> bool {
        self.outlets.remove(&session).is_some()
    }

    /// Closes this very stream. False: it is closed already, or another took its place.
    pub(crate) fn close_serial(&mut self, session: SessionId, serial: u64) -> bool {
        let current = self.outlets.get(&session).map(|outlet| outlet.serial);
        current == Some(serial) && self.close(session)
    }

    /// Closes all.
    pub(crate) fn close_all(&mut self) {
        self.outlets.clear();
    }

    /// How many are attached.
    pub(crate) fn count(&self) -> usize {
        self.outlets.len()
    }
}

/// As it travels.
pub(crate) fn wire(outgoing: Outgoing) -> v1::SessionResponse {
    use v1::session_response::Message;
    let message = match outgoing {
        Outgoing::Revoke {
            lease,
            generation,
            reason,
            drain_ms,
        } => Message::Revoke(v1::Revoke {
            lease_id: lease.0,
            generation: generation.0,
            reason: v1::RevokeReason::from(reason).into(),
            drain_ms,
        }),
        Outgoing::Returned(region) => Message::Returned(v1::Returned {
            region_id: region.0.to_vec().into(),
        }),
        Outgoing::Scrub {
            region,
            slab,
            generation,
        } => Message::Scrub(v1::Scrub {
            region_id: region.0.to_vec().into(),
            slab,
            generation: generation.0,
        }),
    };
    v1::SessionResponse {
        message: Some(message),
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::RegionId;

    use super::*;

    const SESSION: SessionId = SessionId(1);

    fn message() -> v1::SessionResponse {
        wire(Outgoing::Returned(RegionId([1; 16])))
    }

    #[test]
    fn a_slow_reader_loses_its_stream_and_not_a_message_of_those_queued() {
        let mut streams = Streams::default();
        let (_, mut receiver) = streams.open(SESSION);
        for _ in 0..QUEUE {
            assert!(streams.send(SESSION, message()));
        }
        assert!(!streams.send(SESSION, message()));
        assert_eq!(streams.count(), 0);
        let mut queued = 0;
        while receiver.try_recv().is_ok() {
            queued += 1;
        }
        assert_eq!(queued, QUEUE);
    }

    #[test]
    fn an_old_streams_end_leaves_the_new_one_alone() {
        let mut streams = Streams::default();
        let (old, _old_receiver) = streams.open(SESSION);
        let (new, mut receiver) = streams.open(SESSION);
        assert!(!streams.close_serial(SESSION, old));
        assert!(streams.send(SESSION, message()));
        assert!(receiver.try_recv().is_ok());
        assert!(streams.close_serial(SESSION, new));
        assert!(!streams.close_serial(SESSION, new));
    }
}
