//! Requests to the fd socket without the client library, and the memory that is passed over it.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
};

use anyhow::{Context, Result, ensure};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
};
use swiftcache_proto::fd_socket::{self, REPLY_BYTES};

/// Sealed shared memory like that which the host backend exports.
///
/// # Errors
/// When the operating system gives none.
pub fn memory(bytes: u64) -> Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("swiftcache-hbm", flags)?;
    rustix::fs::ftruncate(&memfd, bytes)?;
    rustix::fs::fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(File::from(memfd))
}

/// Presents a grant token on the fd socket.
///
/// # Errors
/// When the broker does not answer.
pub fn fetch(socket: &Path, token: &[u8]) -> Result<(fd_socket::Status, Option<OwnedFd>)> {
    let token = token.try_into().context("a token that is not 16 bytes")?;
    exchange(socket, &fd_socket::Request::Fetch { token }, &[])
}

/// One request and its answer on the fd socket.
///
/// # Errors
/// When the broker does not answer.
pub fn exchange(
    socket: &Path,
    request: &fd_socket::Request,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(fd_socket::Status, Option<OwnedFd>)> {
    let stream = UnixStream::connect(socket)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        ensure!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let frame = request.encode();
    sendmsg(
        &stream,
        &[IoSlice::new(&frame)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    let mut reply = [0; REPLY_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let slices = &mut [IoSliceMut::new(&mut reply)];
    let received = recvmsg(&stream, slices, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    ensure!(
        received.bytes == REPLY_BYTES,
        "the fd socket gave no answer"
    );
    let descriptor = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let status = fd_socket::Status::decode(reply).context("an answer that means nothing")?;
    Ok((status, descriptor))
}
