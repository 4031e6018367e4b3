//! What survives the broker: who holds what, as long as the ledger does.

use std::{
    io::BufRead,
    process::{Child, Command, Stdio},
};

use crate::node::*;
use swiftcache_proto::v1::{self, session_response};
use tonic::Code;

fn resume(session: u64, held: &[u64]) -> v1::RegisterRequest {
    v1::RegisterRequest {
        resume_session_id: session,
        held_lease_ids: held.to_vec(),
        ..hello("member")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_regions_and_leases_survive_a_restart() {
    let node = Node::start().await;
    let donor = node.donor(2).await.session;
    let mut borrower = node.member("borrower").await;
    let lease = borrower.lease(SLAB).await.grants[0].lease_id;
    let borrower = borrower.session;
    let boot = node.broker.owner().boot_id();

    let node = Node::start_in(node.stop().await, |_| {}).await;
    assert_ne!(node.broker.owner().boot_id(), boot);
    let mut client = node.client().await;
    let registered = client.register(resume(donor, &[])).await.unwrap();
    assert_eq!(registered.into_inner().region_ids[0][..], [1; 16]);
    let registered = client.register(resume(borrower, &[lease, 4_711])).await;
    let registered = registered.unwrap().into_inner();
    assert_eq!(registered.session_id, borrower);
    assert_eq!(registered.refused_lease_ids, [4_711]);

    // The donor's handle is not on disk: it offers again, and lends again.
    let mut donor = Member {
        client: client.clone(),
        session: donor,
    };
    let offer = donor.offer([1; 16], 2);
    let status = donor.client.offer(offer.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    let memory = descriptor();
    let fd_socket = node.fd_socket();
    upload(
        &fd_socket,
        donor.session,
        [1; 16],
        &[std::os::fd::AsFd::as_fd(&memory)],
    );
    donor.client.offer(offer).await.unwrap();
    let mut borrower = Member {
        client: client.clone(),
        session: borrower,
    };
    let again = borrower.lease(SLAB).await;
    assert_eq!(again.grants.len(), 1);
    assert_ne!(again.grants[0].lease_id, lease, "no lease id is used twice");
    assert_eq!(
        borrower.lease(SLAB).await.shortfall(),
        v1::Shortfall::NoFreeSlab
    );
    drop((client, donor, borrower));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_ledger_a_broker_knows_nobody() {
    let node = Node::start().await;
    let donor = node.donor(1).await.session;
    let directory = node.stop().await;
    std::fs::remove_file(directory.path().join("ledger")).unwrap();
    let node = Node::start_in(directory, |_| {}).await;
    let mut client = node.client().await;
    let status = client.register(resume(donor, &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    drop(client);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_that_contradicts_itself_is_moved_aside() {
    let node = Node::start().await;
    let donor = node.donor(1).await.session;
    let directory = node.stop().await;
    let path = directory.path().join("ledger");
    let text = std::fs::read_to_string(&path).unwrap();
    let region = text
        .lines()
        .find(|line| line.contains("\"region\""))
        .unwrap();
    std::fs::write(&path, format!("{text}{region}\n")).unwrap();
    let node = Node::start_in(directory, |_| {}).await;
    let names = std::fs::read_dir(node.directory.path()).unwrap();
    let aside = names.filter(|name| {
        let name = name.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("corrupt")
    });
    assert_eq!(aside.count(), 1);
    let mut client = node.client().await;
    let status = client.register(resume(donor, &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    drop(client);
    node.stop().await;
}

/// A process with a session; it says its session id on standard output and lives until its input ends.
fn child(socket: &std::path::Path, lease: bool) -> (Child, u64) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "restart::registers_and_waits",
            "--ignored",
            "--nocapture",
        ])
        .env("SOCKET", socket)
        .env("LEASE", if lease { "1" } else { "" })
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let session = lines
        .map(Result::unwrap)
        .find_map(|line| line.strip_prefix("session=")?.parse().ok())
        .unwrap();
    (child, session)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the child process of other tests"]
async fn registers_and_waits() {
    let channel = connect(std::path::Path::new(&std::env::var("SOCKET").unwrap())).await;
    let mut client = v1::broker_client::BrokerClient::new(channel);
    let registered = client.register(hello("child")).await.unwrap().into_inner();
    let mut member = Member {
        client,
        session: registered.session_id,
    };
    if !std::env::var("LEASE").unwrap().is_empty() {
        assert_eq!(member.lease(SLAB).await.grants.len(), 1);
    }
    println!("\nsession={}", member.session);
    std::io::stdin().lines().for_each(drop);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_its_processs_own_and_ends_with_it() {
    let node = Node::start().await;
    let mut donor = node.donor(1).await;
    let mut stream = donor.attach().await;
    let (mut child, session) = child(&node.config.socket, true);
    let mut client = node.client().await;
    for status in [
        client.register(resume(session, &[])).await.unwrap_err(),
        client
            .leave(v1::LeaveRequest {
                session_id: session,
            })
            .await
            .unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    }
    let memory = descriptor();
    let status = upload(
        &node.fd_socket(),
        session,
        [1; 16],
        &[std::os::fd::AsFd::as_fd(&memory)],
    );
    assert_eq!(status, swiftcache_proto::fd_socket::Status::NotYours);

    // Its lease holds the region back for exactly as long as it lives.
    let withdraw = donor.withdraw([1; 16]);
    donor.client.withdraw(withdraw).await.unwrap();
    let mut admin = node.admin().await;
    let request = v1::ListRegionsRequest::default();
    let regions = admin.list_regions(request).await.unwrap().into_inner();
    assert!(regions.regions[0].withdrawing);
    child.kill().unwrap();
    let returned = stream.next().await;
    assert!(matches!(returned, session_response::Message::Returned(_)));
    child.wait().unwrap();
    drop((client, admin, donor, stream));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_dies_while_the_broker_is_down_is_gone_when_it_is_up() {
    let node = Node::start().await;
    let mut donor = node.donor(1).await;
    let (mut first, _) = child(&node.config.socket, true);
    let withdraw = donor.withdraw([1; 16]);
    donor.client.withdraw(withdraw).await.unwrap();
    let donor_session = donor.session;
    drop(donor);
    let directory = node.stop().await;
    first.kill().unwrap();
    first.wait().unwrap();

    let node = Node::start_in(directory, |_| {}).await;
    let mut client = node.client().await;
    client.register(resume(donor_session, &[])).await.unwrap();
    let mut donor = Member {
        client,
        session: donor_session,
    };
    let mut stream = donor.attach().await;
    let returned = stream.next().await;
    assert!(matches!(returned, session_response::Message::Returned(_)));
    drop((donor, stream));
    node.stop().await;
}
