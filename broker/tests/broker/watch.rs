//! The index as a stream: what a watcher is told over the wire, where it goes on, and what becomes of one that does not read.

use std::collections::BTreeSet;

use swiftcache_proto::v1;
use tonic::{Code, Streaming};

use crate::node::*;

/// A watcher's stream, and what it knows.
struct Watch {
    stream: Streaming<v1::WatchResponse>,
    known: BTreeSet<Vec<u8>>,
    last: v1::WatchResponse,
    /// How often it began anew.
    begun: usize,
}

impl Watch {
    async fn of(node: &Node, request: v1::WatchRequest) -> Self {
        let stream = node.admin().await.watch(request).await.unwrap();
        Self {
            stream: stream.into_inner(),
            known: BTreeSet::new(),
            last: v1::WatchResponse::default(),
            begun: 0,
        }
    }

    /// Reads until it knows all there is, and that is so many blocks.
    async fn until(&mut self, blocks: usize) {
        while !(self.last.current && self.known.len() == blocks) {
            self.last = self.stream.message().await.unwrap().unwrap();
            if self.last.anew {
                self.known.clear();
                self.begun += 1;
            }
            for change in &self.last.changes {
                for hash in change.hashes.chunks(16) {
                    match change.removed {
                        true => self.known.remove(hash),
                        false => self.known.insert(hash.to_vec()),
                    };
                }
            }
        }
    }

    /// Hangs up, and goes on from there.
    async fn again(self, node: &Node) -> Self {
        let request = v1::WatchRequest {
            boot_id: self.last.boot_id,
            after_sequence: self.last.sequence,
            ..Default::default()
        };
        drop(self.stream);
        Self {
            known: self.known,
            ..Self::of(node, request).await
        }
    }
}

fn publish(member: &Member, grant: &v1::Grant, slots: std::ops::Range<u32>) -> v1::PublishRequest {
    let hashes = slots.clone().flat_map(|slot| [slot as u8; 16]);
    v1::PublishRequest {
        session_id: member.session,
        lease_id: grant.lease_id,
        generation: grant.generation,
        hashes: hashes.collect::<Vec<u8>>().into(),
        slots: slots.collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_is_told_of_every_block_and_goes_on_where_it_was() {
    let node = Node::start().await;
    let mut donor = node.donor(2).await;
    let mut borrower = node.member("borrower").await;
    let leased = borrower.lease(SLAB).await;
    let grant = leased.grants[0].clone();
    let mut watch = Watch::of(&node, v1::WatchRequest::default()).await;
    watch.until(0).await;
    assert_eq!(watch.begun, 1);
    let request = publish(&borrower, &grant, 0..6);
    borrower.client.publish(request).await.unwrap();
    watch.until(6).await;
    assert_eq!(watch.begun, 1);
    let told = watch.last.changes[0].clone();
    assert_eq!(
        (told.medium(), told.namespace.as_str()),
        (v1::Medium::Hbm, "model")
    );

    // What happens while nobody listens is told afterwards, and no more than that.
    let mut watch = watch.again(&node).await;
    let unpublish = v1::UnpublishRequest {
        session_id: borrower.session,
        lease_id: grant.lease_id,
        generation: grant.generation,
        slots: vec![1, 2],
    };
    borrower.client.unpublish(unpublish).await.unwrap();
    watch.until(4).await;
    assert_eq!(watch.begun, 0);

    // Only the tenant of a session, and another namespace.
    let of_session = |session_id, namespace: &str| v1::WatchRequest {
        session_id,
        namespaces: vec![namespace.to_owned()],
        ..Default::default()
    };
    let request = of_session(borrower.session, "model");
    Watch::of(&node, request).await.until(4).await;
    let request = of_session(borrower.session, "other");
    Watch::of(&node, request).await.until(0).await;

    // A revocation takes all.
    let mut stream = borrower.attach().await;
    let withdraw = donor.withdraw([1; 16]);
    donor.client.withdraw(withdraw).await.unwrap();
    stream.let_go().await;
    watch.until(0).await;
    assert_eq!(watch.begun, 0);

    // Another broker has other numbers.
    let directory = node.stop().await;
    let node = Node::start_in(directory, |_| {}).await;
    let mut watch = watch.again(&node).await;
    watch.until(0).await;
    assert_eq!(watch.begun, 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_with_the_broker_and_bad_requests_are_named() {
    let node = Node::start().await;
    let mut watch = Watch::of(&node, v1::WatchRequest::default()).await;
    watch.until(0).await;
    let request = v1::WatchRequest {
        namespaces: vec!["n".repeat(257)],
        ..Default::default()
    };
    let status = node.admin().await.watch(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("namespaces"), "{status}");
    let request = v1::WatchRequest {
        session_id: 7,
        ..Default::default()
    };
    let status = node.admin().await.watch(request).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    node.stop().await;
    let ended = watch.stream.message().await;
    assert!(!matches!(ended, Ok(Some(_))), "{ended:?}");
}

/// One that does not read costs nobody else anything, and is told all when it reads again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_does_not_read_holds_nobody_up() {
    let node = Node::start().await;
    let _donor = node.donor(2).await;
    let mut borrower = node.member("borrower").await;
    let leased = borrower.lease(SLAB).await;
    let grant = leased.grants[0].clone();
    let mut slow = Watch::of(&node, v1::WatchRequest::default()).await;
    let mut quick = Watch::of(&node, v1::WatchRequest::default()).await;
    for _ in 0..200 {
        let request = publish(&borrower, &grant, 0..8);
        borrower.client.publish(request).await.unwrap();
        quick.until(8).await;
        let unpublish = v1::UnpublishRequest {
            session_id: borrower.session,
            lease_id: grant.lease_id,
            generation: grant.generation,
            slots: (0..8).collect(),
        };
        borrower.client.unpublish(unpublish).await.unwrap();
        quick.until(0).await;
    }
    let request = publish(&borrower, &grant, 2..5);
    borrower.client.publish(request).await.unwrap();
    slow.until(3).await;
    quick.until(3).await;
    assert_eq!(slow.known, quick.known);
    node.stop().await;
}
