//! The session stream. It carries revocations, returns and scrubs to the client, and acknowledgements to the broker.

use std::{
    future::ready,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
    vec,
};

use swiftcache_proto::{
    convert::{self, InvalidField},
    domain::{Generation, LeaseId, PinId},
    v1::{self, session_request::Message},
};
use tokio::{sync::mpsc, task::AbortHandle};
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::caller;
use crate::{
    core::{Caller, Event},
    error::Refused,
    malformed,
    owner::{Attached, Owner},
    peer::Peer,
};

/// The longest wait for a stream's first message, which must name its session.
const ATTACH_DEADLINE: Duration = Duration::from_secs(5);
/// The most messages that are applied together, so that others get their turn.
const TOGETHER: usize = 256;

/// The messages to the session. Drop detaches the session.
pub struct OutgoingStream {
    first: vec::IntoIter<v1::SessionResponse>,
    receiver: mpsc::Receiver<v1::SessionResponse>,
    /// The error that ended the session's requests, if the session made one.
    ended: mpsc::Receiver<Status>,
    reader: AbortHandle,
    _attached: Attached,
}

impl Drop for OutgoingStream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Stream for OutgoingStream {
    type Item = Result<v1::SessionResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(message) = self.first.next() {
            return Poll::Ready(Some(Ok(message)));
        }
        match self.receiver.poll_recv(context) {
            Poll::Ready(message) => Poll::Ready(message.map(Ok)),
            // When the reader has ended, with or without an error, the stream ends too.
            Poll::Pending => {
                let complaint = self.ended.poll_recv(context);
                complaint.map(|complaint| complaint.map(Err))
            }
        }
    }
}

/// Waits for the attach message, and attaches the stream.
pub(super) async fn open(
    owner: Arc<Owner>,
    peer: Peer,
    mut requests: Streaming<v1::SessionRequest>,
) -> Result<OutgoingStream, Status> {
    let first = tokio::time::timeout(ATTACH_DEADLINE, requests.message())
        .await
        .map_err(|_| Refused::NotAttached(ATTACH_DEADLINE.as_millis()))??;
    let session = match first.and_then(|request| request.message) {
        Some(Message::Attach(attach)) => attach.session_id,
        _ => return Err(invalid("attach", "must be the first message").into()),
    };
    let caller = caller(&peer, session);
    let attachment = owner.attach(caller).await?;
    let attached = v1::SessionResponse {
        message: Some(v1::session_response::Message::Attached(v1::Attached {
            boot_id: owner.boot_id(),
        })),
    };
    let mut first = attachment.outstanding;
    first.insert(0, attached);
    let (complain, ended) = mpsc::channel(1);
    let reader = tokio::spawn(async move {
        if let Err(status) = read(&owner, caller, requests).await {
            // This fails only when the stream is already gone.
            drop(complain.try_send(status));
        }
    });
    Ok(OutgoingStream {
        first: first.into_iter(),
        receiver: attachment.receiver,
        ended,
        reader: reader.abort_handle(),
        _attached: attachment.guard,
    })
}

/// Applies the session's messages until the session ends its stream. Messages that have arrived together are applied
/// together, because a turn at the owner's desk costs more than they do.
async fn read(
    owner: &Arc<Owner>,
    caller: Caller,
    mut requests: Streaming<v1::SessionRequest>,
) -> Result<(), Status> {
    loop {
        let mut events = Vec::new();
        let ended = loop {
            let next = match events.len() {
                0 => requests.message().await,
                TOGETHER.. => break None,
                _ => tokio::select! {
                    biased;
                    next = requests.message() => next,
                    () = ready(()) => break None,
                },
            };
            match next.and_then(|request| request.map(|it| read_one(caller, it)).transpose()) {
                Ok(Some(event)) => events.extend(event),
                Ok(None) => break Some(Ok(())),
                Err(status) => break Some(Err(malformed::status(status))),
            }
        };
        if !events.is_empty() {
            owner.apply_all(events).await?;
        }
        if let Some(end) = ended {
            return end;
        }
    }
}

/// The event that a message stands for, if this broker knows the message.
fn read_one(caller: Caller, request: v1::SessionRequest) -> Result<Option<Event>, Status> {
    let Some(message) = request.message else {
        // A newer client may send a message that this broker does not know, which it reads as an empty message.
        tracing::debug!(
            session = caller.session.label(),
            "ignored a message of a newer client"
        );
        return Ok(None);
    };
    Ok(Some(event(caller, message)?))
}

fn event(caller: Caller, message: Message) -> Result<Event, Refused> {
    match message {
        Message::Acknowledge(message) => Ok(Event::Acknowledge {
            caller,
            lease: LeaseId(message.lease_id),
            generation: Generation(message.generation),
        }),
        Message::Scrubbed(message) => Ok(Event::Scrubbed {
            caller,
            region: convert::region_id("scrubbed.region_id", &message.region_id)?,
            slab: message.slab,
            generation: Generation(message.generation),
        }),
        Message::Unpin(message) => {
            let pins = convert::bounded("unpin.pin_ids", &message.pin_ids)?;
            Ok(Event::Unpin {
                caller,
                pins: pins.iter().map(|pin| PinId(*pin)).collect(),
            })
        }
        Message::Attach(_) => Err(invalid("attach", "comes once, first")),
    }
}

fn invalid(field: &'static str, problem: &str) -> Refused {
    InvalidField::new(field, problem).into()
}
