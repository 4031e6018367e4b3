//! The fd socket. gRPC cannot pass descriptors, so donors upload them here and lessees fetch them here. A connection
//! has one request. The frames are in [`swiftcache_proto::fd_socket`].

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use swiftcache_proto::fd_socket::{REQUEST_BYTES, Request, Status};
use tokio::{
    io::Interest,
    net::{UnixListener, UnixStream},
};
use tokio_util::sync::CancellationToken;

use crate::{
    listen::{Admission, Limits},
    logging::Sparse,
    owner::Owner,
    peer::Peer,
};

/// Anybody who may connect can cause these warnings, so they are rate-limited.
static TOO_MANY: Sparse = Sparse::new();
static NOT_ACCEPTED: Sparse = Sparse::new();

/// The longest time of one connection. A frame and its answer take microseconds; this is enough for a peer that is
/// swapped out.
const DEADLINE: Duration = Duration::from_secs(5);
/// The most connections at a time. Further connections are closed.
const MAX_CONNECTIONS: usize = 128;
/// The pause after a failed accept, so that a full descriptor table does not make the loop spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves connections until `stop`.
pub async fn serve(listener: UnixListener, owner: Arc<Owner>, stop: CancellationToken) {
    let admission = Admission::new(Limits {
        all: MAX_CONNECTIONS,
        of_user: MAX_CONNECTIONS / 4,
        reserved: MAX_CONNECTIONS / 16,
    });
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if let Some(withheld) = NOT_ACCEPTED.turn() {
                    tracing::warn!(%error, withheld, "a connection to the fd socket could not be accepted");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(peer) = Peer::of(&stream) else {
            // The process is gone already.
            continue;
        };
        let Some(permit) = admission.admit(peer.process) else {
            if let Some(withheld) = TOO_MANY.turn() {
                tracing::warn!(
                    limit = MAX_CONNECTIONS,
                    withheld,
                    "too many connections to the fd socket"
                );
            }
            continue;
        };
        let owner = Arc::clone(&owner);
        tokio::spawn(async move {
            match tokio::time::timeout(DEADLINE, converse(&stream, &peer, &owner)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a connection to the fd socket failed")
                }
                Err(_) => tracing::debug!("a connection to the fd socket took too long"),
            }
            drop(permit);
        });
    }
}

async fn converse(stream: &UnixStream, peer: &Peer, owner: &Owner) -> io::Result<()> {
    let (frame, descriptor) = match receive(stream).await? {
        Some(received) => received,
        None => return reply(stream, Status::Malformed, None).await,
    };
    let (status, descriptor) = answer(owner, peer, &frame, descriptor);
    reply(stream, status, descriptor).await
}

fn answer(
    owner: &Owner,
    peer: &Peer,
    frame: &[u8; REQUEST_BYTES],
    descriptor: Option<OwnedFd>,
) -> (Status, Option<Arc<OwnedFd>>) {
    match (Request::decode(frame), descriptor) {
        (
            Some(Request::Upload {
                session,
                allocation,
            }),
            Some(descriptor),
        ) => {
            if !owner.is_session_of(session, peer.process) {
                return (Status::NotYours, None);
            }
            let now = Instant::now();
            let kept =
                owner
                    .descriptors()
                    .upload(session, peer.process.uid, allocation, descriptor, now);
            (kept.map_or(Status::Full, |()| Status::Ok), None)
        }
        (Some(Request::Fetch { token }), None) => {
            let now = Instant::now();
            match owner.descriptors().fetch(peer.process, token, now) {
                Some(descriptor) => (Status::Ok, Some(descriptor)),
                None => (Status::NoSuchToken, None),
            }
        }
        _ => (Status::Malformed, None),
    }
}

/// Receives a whole frame and the descriptor that came with it. `None`: the frame ends early, or came with more than
/// one descriptor. The kernel closes the descriptors that have no room.
async fn receive(
    stream: &UnixStream,
) -> io::Result<Option<([u8; REQUEST_BYTES], Option<OwnedFd>)>> {
    let mut frame = [0; REQUEST_BYTES];
    let mut filled = 0;
    let mut descriptor = None;
    while filled < REQUEST_BYTES {
        let rest = &mut frame[filled..];
        let (bytes, well_formed) = stream
            .async_io(Interest::READABLE, || {
                receive_some(stream, rest, &mut descriptor)
            })
            .await?;
        if bytes == 0 || !well_formed {
            return Ok(None);
        }
        filled += bytes;
    }
    Ok(Some((frame, descriptor)))
}

/// Receives a part of a frame. Returns the number of bytes, and whether at most one descriptor has come so far.
fn receive_some(
    stream: &UnixStream,
    rest: &mut [u8],
    descriptor: &mut Option<OwnedFd>,
) -> io::Result<(usize, bool)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream,
        &mut [IoSliceMut::new(rest)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let mut well_formed = !received.flags.contains(ReturnFlags::CTRUNC);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            for another in descriptors {
                well_formed &= descriptor.replace(another).is_none();
            }
        }
    }
    Ok((received.bytes, well_formed))
}

async fn reply(
    stream: &UnixStream,
    status: Status,
    descriptor: Option<Arc<OwnedFd>>,
) -> io::Result<()> {
    let byte = [status as u8];
    let descriptors: Vec<_> = descriptor.iter().map(|fd| fd.as_fd()).collect();
    stream
        .async_io(Interest::WRITABLE, || {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&descriptors));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            sendmsg(stream, &[IoSlice::new(&byte)], &mut control, flags)?;
            Ok(())
        })
        .await
}
