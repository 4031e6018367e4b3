//! The sessions' streams as the owner sees them: a bounded queue for each session. The owner never waits for a queue.

use std::collections::HashMap;

use swiftcache_proto::{domain::SessionId, v1};
use tokio::sync::mpsc;

use crate::{core::Outgoing, error::Refused};

/// The most messages in a queue: the revocations of 1 TiB in slabs of 64 MiB. A reader that is slower loses its stream.
/// It can attach again and then gets everything that is outstanding.
const QUEUE: usize = 16_384;

/// One attached stream.
struct Outlet {
    serial: u64,
    sender: mpsc::Sender<v1::SessionResponse>,
}

/// The most streams of one session that were opened and are not over. A stream ends when another replaces it; one that nobody
/// reads cannot, and keeps what it had to say.
const OPEN: usize = 16;

/// Every attached stream.
#[derive(Default)]
pub(crate) struct Streams {
    outlets: HashMap<SessionId, Outlet>,
    /// How many streams of each session are not over.
    open: HashMap<SessionId, usize>,
    serial: u64,
}

impl Streams {
    /// Opens a stream of the session, and ends the stream that it had. The serial number distinguishes it from later
    /// ones.
    pub(crate) fn open(
        &mut self,
        session: SessionId,
    ) -> (u64, mpsc::Receiver<v1::SessionResponse>) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        self.serial += 1;
        let serial = self.serial;
        self.outlets.insert(session, Outlet { serial, sender });
        *self.open.entry(session).or_default() += 1;
        (serial, receiver)
    }

    /// Whether another stream of the session may be opened.
    ///
    /// # Errors
    /// When too many are not over.
    pub(crate) fn may_open(&self, session: SessionId) -> Result<(), Refused> {
        match self.open.get(&session) {
            Some(open) if *open >= OPEN => Err(Refused::Streams(OPEN)),
            _ => Ok(()),
        }
    }

    /// A stream of the session is over: nothing is left of it.
    pub(crate) fn over(&mut self, session: SessionId) {
        if let Some(open) = self.open.get_mut(&session) {
            *open -= 1;
            if *open == 0 {
                self.open.remove(&session);
            }
        }
    }

    /// Sends a message, if the session is attached. Returns false if the queue was full; then the stream is closed.
    pub(crate) fn send(&mut self, session: SessionId, message: v1::SessionResponse) -> bool {
        let Some(outlet) = self.outlets.get(&session) else {
            return true;
        };
        match outlet.sender.try_send(message) {
            Ok(()) => true,
            // The reader is gone, and its guard is about to detach the session.
            Err(mpsc::error::TrySendError::Closed(_)) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.outlets.remove(&session);
                false
            }
        }
    }

    /// Closes the session's present stream. Returns false if it had none.
    pub(crate) fn close(&mut self, session: SessionId) -> bool {
        self.outlets.remove(&session).is_some()
    }

    /// Closes the stream with this serial number. Returns false if it is already closed or replaced by another.
    pub(crate) fn close_serial(&mut self, session: SessionId, serial: u64) -> bool {
        let current = self.outlets.get(&session).map(|outlet| outlet.serial);
        current == Some(serial) && self.close(session)
    }

    /// Closes all streams.
    pub(crate) fn close_all(&mut self) {
        self.outlets.clear();
    }

    /// How many streams are attached.
    pub(crate) fn count(&self) -> usize {
        self.outlets.len()
    }
}

/// The message on the wire.
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
        Outgoing::CannotMap { region, sessions } => Message::CannotMap(v1::CannotMap {
            region_id: region.0.to_vec().into(),
            sessions,
        }),
        Outgoing::Hold {
            device,
            free_bytes,
            left_ms,
        } => Message::DeviceHold(v1::DeviceHold {
            device_uuid: device.to_string(),
            free_bytes,
            left_ms,
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

    /// The twin: streams that are over make room.
    #[test]
    fn streams_that_nobody_reads_are_bounded() {
        let mut streams = Streams::default();
        let mut unread = Vec::new();
        while streams.may_open(SESSION).is_ok() {
            unread.push(streams.open(SESSION));
        }
        assert_eq!(unread.len(), OPEN);
        assert!(streams.may_open(SessionId(2)).is_ok());
        streams.over(SESSION);
        assert!(streams.may_open(SESSION).is_ok());
        for _ in 1..OPEN {
            streams.over(SESSION);
        }
        assert!(streams.open.is_empty());
    }
}
