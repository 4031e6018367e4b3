//! What every RPC answers to bad input: the documented code, and the field that is to blame.

use crate::node::*;
use swiftcache_proto::{
    convert::{MAX_BLOCKS, MAX_MESSAGE_BYTES},
    v1::{self, session_request},
};
use tonic::{Code, Status};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_and_names_its_field() {
    let node = Node::start().await;
    let mut member = node.donor(1).await;
    let session_id = member.session;
    let client = &mut member.client;
    let long = "n".repeat(300);
    let too_many = MAX_BLOCKS + 1;
    let expect = |status: Status, code, named: &str| {
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(named), "{status:?} lacks {named}");
    };
    let invalid = Code::InvalidArgument;

    for (request, code, named) in [
        (hello(""), invalid, "name: "),
        (hello(&long), invalid, "name: "),
        (hello("a\nb"), invalid, "name: "),
        (hello("a\u{1b}[2J"), invalid, "name: "),
        (hello("a\u{202e}b"), invalid, "name: "),
        (hello("a\u{2066}b"), invalid, "name: "),
        (
            v1::RegisterRequest {
                tenant: long.clone(),
                ..hello("x")
            },
            invalid,
            "tenant: ",
        ),
        (
            v1::RegisterRequest {
                held_lease_ids: vec![1; too_many],
                ..hello("x")
            },
            invalid,
            "held_lease_ids: ",
        ),
        (
            v1::RegisterRequest {
                shared_lease_ids: vec![1; too_many],
                ..hello("x")
            },
            invalid,
            "shared_lease_ids: ",
        ),
        (
            v1::RegisterRequest {
                resume_session_id: 7,
                ..hello("x")
            },
            Code::NotFound,
            "session",
        ),
    ] {
        expect(client.register(request).await.unwrap_err(), code, named);
    }

    let offer = Member {
        client: client.clone(),
        session: session_id,
    }
    .offer([2; 16], 1);
    let handle = |kind: v1::HandleKind, opaque: usize| {
        Some(v1::Handle {
            kind: kind.into(),
            opaque: vec![0; opaque].into(),
            ..Default::default()
        })
    };
    type Break = fn(&mut v1::OfferRequest);
    let breaks: [(Break, Code, &str); 12] = [
        (|offer| offer.session_id = 7, Code::NotFound, "session"),
        (
            |offer| offer.region_id = vec![1].into(),
            invalid,
            "region_id: ",
        ),
        (
            |offer| offer.allocation_id = vec![].into(),
            invalid,
            "allocation_id: ",
        ),
        (
            |offer| offer.device_uuid = String::new(),
            invalid,
            "device_uuid: ",
        ),
        (
            |offer| offer.device_uuid = "SIM-99".into(),
            Code::NotFound,
            "SIM-99",
        ),
        (|offer| offer.bytes = SLAB + 1, invalid, "bytes: "),
        (|offer| offer.bytes = 0, invalid, "bytes: "),
        (|offer| offer.slab_bytes = 1, invalid, "slab_bytes: "),
        (|offer| offer.offset = u64::MAX, invalid, "offset: "),
        (|offer| offer.handle = None, invalid, "handle: "),
        (
            |offer| offer.allocation_id = vec![9; 16].into(),
            Code::FailedPrecondition,
            "descriptor",
        ),
        (|_| (), Code::AlreadyExists, "overlaps"),
    ];
    for (change, code, named) in breaks {
        let mut broken = offer.clone();
        change(&mut broken);
        expect(client.offer(broken).await.unwrap_err(), code, named);
    }
    for (handle, named) in [
        (handle(v1::HandleKind::CudaIpc, 63), "handle.opaque: "),
        (handle(v1::HandleKind::PosixFd, 1), "handle.opaque: "),
        (handle(v1::HandleKind::Unspecified, 0), "handle.kind: "),
    ] {
        let broken = v1::OfferRequest {
            handle,
            ..offer.clone()
        };
        expect(client.offer(broken).await.unwrap_err(), invalid, named);
    }

    let withdraw = v1::WithdrawRequest {
        session_id,
        region_ids: vec![vec![1; 16].into()],
        ..Default::default()
    };
    for (region_ids, drain_ms, device, code, named) in [
        (vec![vec![1; 3].into()], 0, "", invalid, "region_ids: "),
        (vec![vec![7; 16].into()], 0, "", Code::NotFound, "region"),
        (vec![], 0, "", invalid, "device_uuid: "),
        (vec![], 0, "SIM-0", invalid, "bytes: "),
        (vec![vec![1; 16].into()], 600_001, "", invalid, "drain_ms: "),
    ] {
        let broken = v1::WithdrawRequest {
            region_ids,
            drain_ms,
            device_uuid: device.to_owned(),
            ..withdraw.clone()
        };
        expect(client.withdraw(broken).await.unwrap_err(), code, named);
    }

    let demand = v1::LeaseRequest {
        session_id,
        namespace: "model".to_owned(),
        device_uuid: "SIM-1".to_owned(),
        bytes: SLAB,
        block_bytes: BLOCK,
        ..Default::default()
    };
    type BreakLease = fn(&mut v1::LeaseRequest);
    let breaks: [(BreakLease, Code, &str); 6] = [
        (|demand| demand.namespace.clear(), invalid, "namespace: "),
        (
            |demand| demand.namespace = "n".repeat(257),
            invalid,
            "namespace: ",
        ),
        (
            |demand| demand.device_uuid = "a b".into(),
            invalid,
            "device_uuid: ",
        ),
        (
            |demand| demand.device_uuid = "SIM-99".into(),
            Code::NotFound,
            "SIM-99",
        ),
        (|demand| demand.bytes = 0, invalid, "bytes: "),
        (|demand| demand.block_bytes = 0, invalid, "block_bytes: "),
    ];
    for (change, code, named) in breaks {
        let mut broken = demand.clone();
        change(&mut broken);
        expect(client.lease(broken).await.unwrap_err(), code, named);
    }

    let release = v1::ReleaseRequest {
        session_id,
        lease_ids: vec![1; too_many],
        ..v1::ReleaseRequest::default()
    };
    expect(
        client.release(release).await.unwrap_err(),
        invalid,
        "lease_ids: ",
    );
    let share = v1::ShareRequest {
        session_id,
        lease_id: 99,
        device_uuid: "SIM-1".to_owned(),
    };
    expect(
        client.share(share.clone()).await.unwrap_err(),
        Code::NotFound,
        "lease",
    );
    let nowhere = v1::ShareRequest {
        device_uuid: String::new(),
        ..share
    };
    expect(
        client.share(nowhere).await.unwrap_err(),
        invalid,
        "device_uuid: ",
    );

    let publish = v1::PublishRequest {
        session_id,
        lease_id: 99,
        generation: 1,
        hashes: hashes(2).into(),
        slots: vec![0, 1],
    };
    for (hashes, slots, code, named) in [
        (vec![0; 17], vec![0], invalid, "hashes: "),
        (vec![0; 16 * too_many], vec![], invalid, "hashes: "),
        (hashes(2), vec![0], invalid, "slots: "),
        (hashes(2), vec![0; too_many], invalid, "slots: "),
        (hashes(2), vec![0, 1], Code::NotFound, "lease"),
    ] {
        let broken = v1::PublishRequest {
            hashes: hashes.into(),
            slots,
            ..publish.clone()
        };
        expect(client.publish(broken).await.unwrap_err(), code, named);
    }
    let unpublish = v1::UnpublishRequest {
        session_id,
        lease_id: 99,
        generation: 1,
        slots: vec![0; too_many],
    };
    expect(
        client.unpublish(unpublish).await.unwrap_err(),
        invalid,
        "slots: ",
    );

    let lookup = v1::LookupRequest {
        session_id,
        namespace: "model".to_owned(),
        hashes: vec![0; 15].into(),
        ..v1::LookupRequest::default()
    };
    expect(
        client.lookup(lookup.clone()).await.unwrap_err(),
        invalid,
        "hashes: ",
    );
    let nameless = v1::LookupRequest {
        namespace: String::new(),
        hashes: vec![].into(),
        ..lookup.clone()
    };
    expect(
        client.lookup(nameless).await.unwrap_err(),
        invalid,
        "namespace: ",
    );
    type BreakLookup = fn(&mut v1::LookupRequest);
    let breaks: [(BreakLookup, _, _); 3] = [
        (
            |lookup| lookup.device_uuid = "a b".to_owned(),
            invalid,
            "device_uuid: ",
        ),
        (
            |lookup| lookup.device_uuid = "SIM-77".to_owned(),
            Code::NotFound,
            "device",
        ),
        (
            |lookup| lookup.borrower_id = vec![1; 15].into(),
            invalid,
            "borrower_id: ",
        ),
    ];
    for (change, code, named) in breaks {
        let mut broken = v1::LookupRequest {
            hashes: hashes(2).into(),
            ..lookup.clone()
        };
        change(&mut broken);
        expect(client.lookup(broken).await.unwrap_err(), code, named);
    }
    let huge = v1::LookupRequest {
        hashes: vec![0; MAX_MESSAGE_BYTES + 1].into(),
        ..lookup
    };
    assert_eq!(
        client.lookup(huge).await.unwrap_err().code(),
        Code::OutOfRange
    );
    let leave = v1::LeaveRequest { session_id: 7 };
    expect(
        client.leave(leave).await.unwrap_err(),
        Code::NotFound,
        "session",
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_says_nonsense_ends_with_the_field_named() {
    let node = Node::start().await;
    let mut member = node.member("member").await;
    let nonsense = [
        (
            session_request::Message::Attach(v1::Attach::default()),
            "attach: ",
        ),
        (
            session_request::Message::Scrubbed(v1::Scrubbed::default()),
            "scrubbed.region_id: ",
        ),
        (
            session_request::Message::Unpin(v1::Unpin {
                pin_ids: vec![1; MAX_BLOCKS + 1],
            }),
            "unpin.pin_ids: ",
        ),
    ];
    for (message, named) in nonsense {
        let mut stream = member.attach().await;
        stream.say(message);
        let status = stream.receive.message().await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(named), "{status:?} lacks {named}");
    }
    let unattached = session_request::Message::Unpin(v1::Unpin::default());
    for first in [
        Some(unattached),
        Some(session_request::Message::Attach(v1::Attach {
            session_id: 7,
        })),
        None,
    ] {
        let known = matches!(first, Some(session_request::Message::Attach(_)));
        let requests = tokio_stream::iter([v1::SessionRequest { message: first }]);
        let status = member.client.session(requests).await.unwrap_err();
        let expected = if known {
            Code::NotFound
        } else {
            Code::InvalidArgument
        };
        assert_eq!(status.code(), expected);
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn admin_refuses_bad_input_and_shows_no_secret() {
    let node = Node::start().await;
    let donor = node.donor(1).await;
    let mut admin = node.admin().await;
    let drain = |target, drain_ms| v1::DrainRequest {
        target: Some(target),
        drain_ms,
    };
    use v1::drain_request::Target;
    for (request, code, named) in [
        (
            v1::DrainRequest::default(),
            Code::InvalidArgument,
            "target: ",
        ),
        (
            drain(Target::DeviceUuid(String::new()), 0),
            Code::InvalidArgument,
            "device_uuid: ",
        ),
        (
            drain(Target::DeviceUuid("SIM-9".into()), 0),
            Code::NotFound,
            "SIM-9",
        ),
        (
            drain(Target::DonorLabel("xyz".into()), 0),
            Code::InvalidArgument,
            "donor_label: ",
        ),
        (
            drain(Target::RegionId("12".into()), 0),
            Code::InvalidArgument,
            "region_id: ",
        ),
        (
            drain(Target::RegionId("07".repeat(16)), 0),
            Code::NotFound,
            "region",
        ),
        (
            drain(Target::DeviceUuid("SIM-0".into()), 700_000),
            Code::InvalidArgument,
            "drain_ms: ",
        ),
    ] {
        let status = admin.drain(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(named), "{status:?} lacks {named}");
    }
    let status = admin
        .undrain(v1::UndrainRequest::default())
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let status = admin.evict(v1::EvictRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let unnamed = v1::EvictRequest {
        target: Some(v1::evict_request::Target::Namespace(String::new())),
    };
    let status = admin.evict(unnamed).await.unwrap_err();
    assert!(status.message().contains("namespace: "));
    let request = v1::ListLeasesRequest {
        device_uuid: "a b".to_owned(),
        ..Default::default()
    };
    let status = admin.list_leases(request).await.unwrap_err();
    assert!(status.message().contains("device_uuid: "));

    let node_status = admin.get_node(v1::GetNodeRequest {}).await.unwrap();
    let node_status = node_status.into_inner();
    assert_eq!(node_status.devices.len(), 4);
    assert_eq!(node_status.total.unwrap().free_bytes, SLAB);
    assert!(node_status.probe.starts_with("simulated"));
    assert_eq!(node_status.devices[0].hbm_used_bytes, SLAB);
    let sessions = admin
        .list_sessions(v1::ListSessionsRequest::default())
        .await
        .unwrap();
    let sessions = sessions.into_inner().sessions;
    assert_eq!(sessions[0].pid, std::process::id());
    assert_eq!(sessions[0].label, format!("{:04x}", donor.session >> 48));
    let regions = v1::ListRegionsRequest {
        device_uuid: "SIM-1".to_owned(),
        ..Default::default()
    };
    let regions = admin.list_regions(regions).await.unwrap().into_inner();
    assert!(regions.regions.is_empty(), "they are on SIM-0");
    let device = Target::DeviceUuid("SIM-0".into());
    admin.drain(drain(device, 0)).await.unwrap();
    let node_status = admin.get_node(v1::GetNodeRequest {}).await.unwrap();
    assert!(node_status.into_inner().devices[0].drained);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_borrower_says_it_keeps_is_checked() {
    let node = Node::start().await;
    let mut member = node.donor(1).await;
    let keep = v1::KeepRequest {
        session_id: member.session,
        borrower_id: vec![1; 16].into(),
        namespace: "model".to_owned(),
        // A device that the node lacks is no error: the engine has its host memory all the same.
        device_uuid: "SIM-77".to_owned(),
        block_bytes: 1 << 20,
        kept_hashes: hashes(2).into(),
        ..v1::KeepRequest::default()
    };
    member.client.keep(keep.clone()).await.unwrap();
    let invalid = Code::InvalidArgument;
    type Break = fn(&mut v1::KeepRequest);
    let breaks: [(Break, _, _); 9] = [
        (|keep| keep.session_id = 7, Code::NotFound, "session"),
        (
            |keep| keep.borrower_id = vec![1; 17].into(),
            invalid,
            "borrower_id: ",
        ),
        (|keep| keep.namespace.clear(), invalid, "namespace: "),
        (|keep| keep.device_uuid.clear(), invalid, "device_uuid: "),
        (|keep| keep.block_bytes = 0, invalid, "block_bytes: "),
        (
            |keep| keep.kept_hashes = vec![0; 17].into(),
            invalid,
            "kept_hashes: ",
        ),
        (
            |keep| keep.kept_hashes = vec![0; 16 * (MAX_BLOCKS + 1)].into(),
            invalid,
            "kept_hashes: ",
        ),
        (
            |keep| keep.dropped_hashes = vec![0; 15].into(),
            invalid,
            "dropped_hashes: ",
        ),
        (
            |keep| keep.dropped_hashes = vec![0; 16 * (MAX_BLOCKS + 1)].into(),
            invalid,
            "dropped_hashes: ",
        ),
    ];
    for (change, code, named) in breaks {
        let mut broken = keep.clone();
        change(&mut broken);
        let status = member.client.keep(broken).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(named), "{status:?} lacks {named}");
    }
}
