//! The fd socket under good and bad frames.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream},
};

use crate::node::*;
use swiftcache_proto::fd_socket::{REQUEST_BYTES, Request, Status};

/// What the broker answers to raw bytes and descriptors, after which the sender says no more.
fn raw(node: &Node, bytes: &[u8], descriptors: usize) -> Option<Status> {
    let memory = descriptor();
    let descriptors: Vec<_> = (0..descriptors).map(|_| memory.as_fd()).collect();
    let mut stream = UnixStream::connect(node.fd_socket()).unwrap();
    if !bytes.is_empty() {
        send(&stream, bytes, &descriptors);
    }
    stream.shutdown(Shutdown::Write).unwrap();
    receive(&mut stream).0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_is_malformed_and_keeps_nothing() {
    let node = Node::start().await;
    let member = node.member("member").await;
    let upload = Request::Upload {
        session: swiftcache_proto::domain::SessionId(member.session),
        allocation: swiftcache_proto::domain::AllocationId([1; 16]),
    }
    .encode();
    let fetch = Request::Fetch { token: [1; 16] }.encode();
    let owner = node.broker.owner();

    for kind in 0..=u8::MAX {
        let mut frame = [kind; REQUEST_BYTES];
        frame[1] = 1;
        let status = raw(&node, &frame, 0).unwrap();
        assert_eq!(status, Status::Malformed, "kind {kind}");
    }
    for (bytes, descriptors) in [
        (&upload[..0], 0),
        (&upload[..1], 0),
        (&upload[..24], 1),
        (&upload[..], 0),
        (&upload[..], 2),
        (&upload[..], 4),
        (&fetch[..], 1),
    ] {
        let status = raw(&node, bytes, descriptors).unwrap();
        assert_eq!(
            status,
            Status::Malformed,
            "{} bytes, {descriptors} fds",
            bytes.len()
        );
    }
    assert_eq!(owner.descriptors().count(), 0);
    assert_eq!(raw(&node, &fetch, 0), Some(Status::NoSuchToken));
    assert_eq!(raw(&node, &upload, 1), Some(Status::Ok));
    assert_eq!(owner.descriptors().count(), 1);
    drop(member);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_may_come_in_pieces() {
    let node = Node::start().await;
    let member = node.member("member").await;
    let frame = Request::Upload {
        session: swiftcache_proto::domain::SessionId(member.session),
        allocation: swiftcache_proto::domain::AllocationId([1; 16]),
    }
    .encode();
    let memory = descriptor();
    let mut stream = UnixStream::connect(node.fd_socket()).unwrap();
    send(&stream, &frame[..1], &[memory.as_fd()]);
    for byte in &frame[1..] {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut reply = [9];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(Status::decode(reply), Some(Status::Ok));
    drop(member);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_session_uploaded_and_never_offered_goes_with_it() {
    let node = Node::start().await;
    let mut member = node.member("member").await;
    let memory = descriptor();
    let status = upload(
        &node.fd_socket(),
        member.session,
        [7; 16],
        &[memory.as_fd()],
    );
    assert_eq!(status, Status::Ok);
    assert_eq!(node.broker.owner().descriptors().count(), 1);
    let session_id = member.session;
    let leave = swiftcache_proto::v1::LeaveRequest { session_id };
    member.client.leave(leave).await.unwrap();
    assert_eq!(node.broker.owner().descriptors().count(), 0);
    let status = upload(&node.fd_socket(), session_id, [7; 16], &[memory.as_fd()]);
    assert_eq!(status, Status::NotYours, "the session is over");
    drop(member);
    node.stop().await;
}
