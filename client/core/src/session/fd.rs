//! The fd socket: descriptors go up with offers and come down with grants.

use std::{
    io::{IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use swiftcache_proto::fd_socket::{REPLY_BYTES, Request, Status};

use crate::{Error, Result};

/// The longest the broker may take for one descriptor. It does no work for it but to pass it on.
const LIMIT: Duration = Duration::from_secs(5);

/// Hands the broker a descriptor.
pub(super) fn upload(socket: &Path, request: Request, descriptor: BorrowedFd<'_>) -> Result<()> {
    exchange(socket, request, Some(descriptor))
        .map(drop)
        .map_err(|problem| failed("upload", socket, problem))
}

/// Fetches the descriptor that a token was granted for.
pub(super) fn fetch(socket: &Path, token: [u8; 16]) -> Result<OwnedFd> {
    exchange(socket, Request::Fetch { token }, None)
        .and_then(|descriptor| descriptor.ok_or_else(|| "the reply has no descriptor".to_owned()))
        .map_err(|problem| failed("fetch", socket, problem))
}

fn failed(action: &'static str, socket: &Path, problem: String) -> Error {
    Error::Descriptor {
        action,
        socket: socket.to_owned(),
        problem,
    }
}

fn exchange(
    socket: &Path,
    request: Request,
    descriptor: Option<BorrowedFd<'_>>,
) -> std::result::Result<Option<OwnedFd>, String> {
    let text = |error: std::io::Error| error.to_string();
    let mut stream = UnixStream::connect(socket).map_err(text)?;
    stream.set_read_timeout(Some(LIMIT)).map_err(text)?;
    stream.set_write_timeout(Some(LIMIT)).map_err(text)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let list;
    if let Some(descriptor) = descriptor {
        list = [descriptor];
        if !rights.push(SendAncillaryMessage::ScmRights(&list)) {
            return Err("no room for the descriptor".to_owned());
        }
    }
    let frame = request.encode();
    let sent = rustix::net::sendmsg(
        &stream,
        &[IoSlice::new(&frame)],
        &mut rights,
        SendFlags::NOSIGNAL,
    )
    .map_err(|errno| errno.to_string())?;
    if sent != frame.len() {
        return Err(format!("sent {sent} of {} bytes", frame.len()));
    }
    receive(&mut stream)
}

fn receive(stream: &mut UnixStream) -> std::result::Result<Option<OwnedFd>, String> {
    let mut reply = [u8::MAX; REPLY_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut reply)],
        &mut rights,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|errno| errno.to_string())?;
    if received.bytes < REPLY_BYTES {
        stream
            .read_exact(&mut reply[received.bytes..])
            .map_err(|error| format!("no reply: {error}"))?;
    }
    let descriptor = rights.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    match Status::decode(reply) {
        Some(Status::Ok) => Ok(descriptor),
        Some(Status::Malformed) => Err("the broker calls the request malformed".to_owned()),
        Some(Status::NotYours) => Err("the session is not this process's".to_owned()),
        Some(Status::NoSuchToken) => Err("the grant token is unknown, used or too old".to_owned()),
        Some(Status::Full) => Err("the broker keeps as many descriptors as it may".to_owned()),
        None => Err(format!("reply {} means nothing", reply[0])),
    }
}
