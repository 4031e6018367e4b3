//! An operator's questions over gRPC, and the answers.

use swiftcache_proto::v1::{self, session_response, set_quota_request::Target};
use tonic::Code;

use crate::node::*;

fn preview(bytes: u64, donor_label: &str) -> v1::PreviewWithdrawRequest {
    v1::PreviewWithdrawRequest {
        device_uuid: "SIM-0".to_owned(),
        bytes,
        donor_label: donor_label.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_withdrawal_over_the_wire_is_what_was_previewed() {
    let node = Node::start().await;
    let mut donor = node.donor(2).await;
    let mut idle = donor.offer([2; 16], 1);
    idle.offset = 2 * SLAB;
    donor.client.offer(idle).await.unwrap();
    let mut borrower = node.member("borrower").await;
    let mut stream = borrower.attach().await;
    let leased = borrower.lease(SLAB).await;
    let grant = &leased.grants[0];
    let publish = v1::PublishRequest {
        session_id: borrower.session,
        lease_id: grant.lease_id,
        generation: grant.generation,
        hashes: hashes(3).into(),
        slots: vec![4, 5, 6],
    };
    borrower.client.publish(publish).await.unwrap();

    let mut admin = node.admin().await;
    let one = admin.preview_withdraw(preview(SLAB, "")).await.unwrap();
    let one = one.into_inner();
    assert!(
        one.leases.is_empty(),
        "a region that nobody uses goes first"
    );
    assert_eq!(one.idle_bytes, one.bytes);
    let all = admin.preview_withdraw(preview(3 * SLAB, "")).await.unwrap();
    let all = all.into_inner();
    assert_eq!(
        (all.bytes, all.revoked_bytes, all.lost_blocks),
        (3 * SLAB, SLAB, 3)
    );
    assert_eq!(
        all.bytes - all.idle_bytes,
        all.regions.last().unwrap().bytes
    );
    assert_eq!(all.leases[0].lease_id, grant.lease_id);

    let withdraw = v1::WithdrawRequest {
        session_id: donor.session,
        device_uuid: "SIM-0".to_owned(),
        bytes: 3 * SLAB,
        ..Default::default()
    };
    let done = donor.client.withdraw(withdraw).await.unwrap().into_inner();
    assert_eq!(done.bytes, all.bytes);
    assert_eq!(stream.let_go().await.lease_id, grant.lease_id);

    for (request, named) in [
        (preview(0, ""), "bytes"),
        (preview(1, "everyone"), "donor_label"),
        (v1::PreviewWithdrawRequest::default(), "device_uuid"),
    ] {
        let status = admin.preview_withdraw(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(named), "{status}");
    }
    let status = admin
        .preview_withdraw(preview(1, "ffff"))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quotas_are_set_shown_obeyed_and_outlive_the_broker() {
    let node = Node::start().await;
    let quota = |target: Option<Target>, bytes| v1::SetQuotaRequest { target, bytes };
    let model = || Some(Target::Namespace("model".to_owned()));
    let mut admin = node.admin().await;
    let status = admin.set_quota(quota(None, Some(1))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let empty = Some(Target::Tenant(String::new()));
    let status = admin.set_quota(quota(empty, Some(1))).await.unwrap_err();
    assert!(status.message().contains("tenant"), "{status}");
    admin.set_quota(quota(model(), Some(SLAB))).await.unwrap();
    drop(admin);

    let directory = node.stop().await;
    let node = Node::start_in(directory, |_| {}).await;
    let _donor = node.donor(4).await;
    let mut borrower = node.member("borrower").await;
    let leased = borrower.lease(3 * SLAB).await;
    assert_eq!(
        (leased.grants.len(), leased.shortfall()),
        (1, v1::Shortfall::Quota)
    );

    let mut admin = node.admin().await;
    let listed = admin
        .list_namespaces(v1::ListNamespacesRequest::default())
        .await
        .unwrap();
    let listed = listed.into_inner();
    assert_eq!(listed.quotas.len(), 1);
    assert_eq!(listed.quotas[0].bytes, SLAB);
    assert_eq!(listed.namespaces[0].quota_bytes, Some(SLAB));

    let request = v1::ListEventsRequest {
        kinds: vec!["short".to_owned()],
        ..Default::default()
    };
    let events = admin
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    assert_eq!(events.len(), 1);
    let short = events[0].lease_short.as_ref().unwrap();
    assert_eq!(short.shortfall(), v1::Shortfall::Quota);
    assert_eq!((short.asked_bytes, short.granted_bytes), (3 * SLAB, SLAB));
    assert_eq!(
        (short.session_name.as_str(), short.namespace.as_str()),
        ("borrower", "model")
    );
    let request = v1::ListEventsRequest {
        kinds: vec!["nonsense".to_owned()],
        ..Default::default()
    };
    let status = admin.list_events(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("kinds"), "{status}");

    let lifted = admin
        .set_quota(quota(model(), None))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(lifted.leased_bytes, SLAB);
    assert_eq!(borrower.lease(3 * SLAB).await.grants.len(), 3);
    drop(admin);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_zombie_names_the_process_that_holds_it() {
    let node = Node::start().await;
    let mut donor = node.donor(1).await;
    let mut donor_stream = donor.attach().await;
    let mut borrower = node.member("borrower").await;
    let mut stream = borrower.attach().await;
    borrower.lease(SLAB).await;
    let mut withdraw = donor.withdraw([1; 16]);
    withdraw.drain_ms = 1;
    donor.client.withdraw(withdraw).await.unwrap();
    let mut admin = node.admin().await;
    let held = loop {
        node.broker.owner().tick().await;
        let answer = admin.list_leases(v1::ListLeasesRequest::default()).await;
        let lease = answer.unwrap().into_inner().leases.remove(0);
        assert_eq!(lease.waiting_for_pids, [std::process::id()]);
        if lease.state() == v1::LeaseState::Zombie {
            break lease;
        }
    };
    assert_eq!(held.revoke_reason(), v1::RevokeReason::Withdrawn);
    let total = admin.get_node(v1::GetNodeRequest {}).await.unwrap();
    assert_eq!(total.into_inner().total.unwrap().zombie_bytes, SLAB);
    let request = v1::ListEventsRequest {
        kinds: vec!["zombie".to_owned()],
        ..Default::default()
    };
    let events = admin
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    assert!(
        events[0].text.contains(&std::process::id().to_string()),
        "{events:?}"
    );

    stream.let_go().await;
    let returned = donor_stream.next().await;
    assert!(
        matches!(returned, session_response::Message::Returned(_)),
        "{returned:?}"
    );
    let leases = admin.list_leases(v1::ListLeasesRequest::default()).await;
    assert!(leases.unwrap().into_inner().leases.is_empty());
    drop(admin);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_come_in_pages_that_together_are_the_whole() {
    let node = Node::start().await;
    let _donor = node.donor(7).await;
    let mut borrower = node.member("borrower").await;
    borrower.lease(7 * SLAB).await;
    let mut admin = node.admin().await;
    let whole = admin.list_leases(v1::ListLeasesRequest::default()).await;
    let whole = whole.unwrap().into_inner();
    assert_eq!(
        (whole.leases.len(), whole.next_page_token.as_str()),
        (7, "")
    );
    let mut request = v1::ListLeasesRequest {
        page_size: 3,
        ..Default::default()
    };
    let (mut pages, mut leases) = (Vec::new(), Vec::new());
    loop {
        let page = admin.list_leases(request.clone()).await.unwrap();
        let page = page.into_inner();
        pages.push(page.leases.len());
        leases.extend(page.leases);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    assert_eq!(pages, [3, 3, 1]);
    assert_eq!(leases, whole.leases);

    // Sessions are in the order of their ids, of which a token says no more than a list does. Of any two pages' sizes, all are
    // told once.
    let mut crowd = Vec::new();
    for number in 0..40 {
        crowd.push(node.member(&format!("member {number}")).await);
    }
    let whole = admin.list_sessions(v1::ListSessionsRequest::default());
    let whole = whole.await.unwrap().into_inner();
    assert_eq!(
        (whole.sessions.len(), whole.next_page_token.as_str()),
        (42, "")
    );
    for page_size in [1, 2, 5, 41, 42] {
        let mut request = v1::ListSessionsRequest {
            page_size,
            ..Default::default()
        };
        let mut sessions = Vec::new();
        loop {
            let page = admin.list_sessions(request.clone()).await.unwrap();
            let page = page.into_inner();
            assert!(page.sessions.len() as u32 <= page_size);
            sessions.extend(page.sessions);
            if page.next_page_token.is_empty() {
                break;
            }
            let last = sessions.last().map(|session| session.label.as_str());
            assert_eq!(page.next_page_token.split('.').next(), last);
            request.page_token = page.next_page_token;
        }
        assert_eq!(sessions, whole.sessions, "pages of {page_size}");
    }

    let token = || "no token of any answer".to_owned();
    for page_token in [
        token(),
        "12.1".to_owned(),
        "zzzz.1".to_owned(),
        "0012.-1".to_owned(),
    ] {
        let sessions = v1::ListSessionsRequest {
            page_token,
            ..Default::default()
        };
        let status = admin.list_sessions(sessions).await.unwrap_err();
        assert!(status.message().starts_with("page_token: "), "{status:?}");
    }
    let leases = v1::ListLeasesRequest {
        page_token: token(),
        ..Default::default()
    };
    let regions = v1::ListRegionsRequest {
        page_token: token(),
        ..Default::default()
    };
    let namespaces = v1::ListNamespacesRequest {
        page_token: token(),
        ..Default::default()
    };
    for status in [
        admin.list_leases(leases).await.unwrap_err(),
        admin.list_regions(regions).await.unwrap_err(),
        admin.list_namespaces(namespaces).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains("page_token"), "{status:?}");
    }
    drop(admin);
    node.stop().await;
}
