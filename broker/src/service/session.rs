//! The session stream. It carries revocations, returns and scrubs to the client, and acknowledgements to the broker.

use std::{
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
    owner::{Attached, Owner},
    peer::Peer,
};

/// The longest wait for a stream's first message, which must name its session.
const ATTACH_DEADLINE: Duration = Duration::from_secs(5);

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
    let attachment = owner.attach(caller)?;
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

/// Applies the session's messages until the session ends its stream.
async fn read(
    owner: &Owner,
    caller: Caller,
    mut requests: Streaming<v1::SessionRequest>,
) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        // A newer client may send a message that this broker does not know, which it reads as an empty message.
        let Some(message) = request.message else {
            tracing::debug!(
                session = caller.session.label(),
                "ignored a message of a newer client"
            );
            continue;
        };
        owner.apply(event(caller, message)?)?;
    }
    Ok(())
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
