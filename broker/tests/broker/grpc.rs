//! The services over real sockets.

use crate::node::*;
use swiftcache_proto::{
    fd_socket::Status as FdStatus,
    v1::{self, broker_client::BrokerClient, session_response},
};
use tonic::Code;

/// A file of the test authority, which `tls/make.sh` makes.
fn tls_file(name: &str) -> std::path::PathBuf {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/broker/tls");
    std::path::Path::new(directory).join(name)
}

/// A broker that serves TCP with mutual TLS, and shows the certificate `server`.
async fn with_tls(server: &str) -> Node {
    let directory = tempfile::tempdir().unwrap();
    Node::start_in(directory, |config| {
        config.listen_tcp = Some(([127, 0, 0, 1], 0).into());
        config.tls_cert = Some(tls_file(server));
        config.tls_key = Some(tls_file("server-key.pem"));
        config.tls_client_ca = Some(tls_file("ca.pem"));
    })
    .await
}

/// Drains a device of a node whose certificate is `server`, as a client with the certificate `client`, if it has one.
async fn drain_over_tls(server: &str, client: Option<&str>) -> Result<(), tonic::Status> {
    use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
    let read = |name: &str| std::fs::read(tls_file(name)).unwrap();
    let node = with_tls(server).await;
    let port = node.broker.tcp_address().unwrap().port();
    let ca = Certificate::from_pem(read("ca.pem"));
    let mut tls = ClientTlsConfig::new().ca_certificate(ca);
    if let Some(client) = client {
        tls = tls.identity(Identity::from_pem(read(client), read("client-key.pem")));
    }
    let endpoint = Endpoint::try_from(format!("https://localhost:{port}")).unwrap();
    let channel = endpoint.tls_config(tls).unwrap().connect_lazy();
    let mut admin = v1::admin_client::AdminClient::new(channel);
    // Whoever has a certificate is an operator.
    let drained = admin.drain(drain_a_device()).await;
    node.stop().await;
    drained.map(drop)
}

/// All that an error says, with its causes.
fn whole(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_with_tls_lets_in_only_clients_with_a_certificate() {
    drain_over_tls("server.pem", Some("client.pem"))
        .await
        .unwrap();
    drain_over_tls("server.pem", None).await.unwrap_err();
}

/// The twin of both is the test before: the same keys, and certificates that are still good.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn expired_certificates_let_nobody_in_and_are_named() {
    for (server, client) in [
        ("server.pem", "expired-client.pem"),
        ("expired-server.pem", "client.pem"),
    ] {
        // In TLS 1.3 a server refuses a client's certificate after the client's part of the handshake. So the client may see the
        // connection end before it reads why.
        let mut said = String::new();
        for _ in 0..100 {
            let refused = drain_over_tls(server, Some(client)).await.unwrap_err();
            said = whole(&refused).to_lowercase();
            if said.contains("expired") {
                break;
            }
        }
        assert!(said.contains("expired"), "{server} and {client}: {said}");
    }
}

fn drain_a_device() -> v1::DrainRequest {
    v1::DrainRequest {
        target: Some(v1::drain_request::Target::DeviceUuid("SIM-1".to_owned())),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_of_health_is_told_of_the_drain_and_does_not_hold_it_up() {
    let node = Node::start().await;
    let channel = connect(&node.config.socket).await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut watch = health.watch(request).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    node.stop().await;
    assert_eq!(watch.message().await.unwrap().unwrap().status, 2);
    assert!(watch.message().await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slab_is_offered_leased_found_revoked_and_returned() {
    let node = Node::start().await;
    let mut donor = node.donor(2).await;
    let mut donor_stream = donor.attach().await;
    let mut borrower = node.member("borrower").await;
    let mut stream = borrower.attach().await;

    let leased = borrower.lease(2 * SLAB).await;
    assert_eq!(leased.shortfall(), v1::Shortfall::None);
    assert_eq!(leased.grants.len(), 2);
    let grant = &leased.grants[0];
    assert_eq!(u64::from(grant.slots), SLAB / BLOCK);
    let handle = grant.handle.as_ref().unwrap();
    let (status, memory) = fetch(&node.fd_socket(), &handle.grant_token);
    assert_eq!(status, FdStatus::Ok);
    let mut bytes = [0; 17];
    rustix::io::pread(memory.unwrap(), &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"the donor's bytes");
    let (again, none) = fetch(&node.fd_socket(), &handle.grant_token);
    assert_eq!(again, FdStatus::NoSuchToken);
    assert!(none.is_none());

    let publish = v1::PublishRequest {
        session_id: borrower.session,
        lease_id: grant.lease_id,
        generation: grant.generation,
        hashes: hashes(3).into(),
        slots: vec![4, 5, 6],
    };
    borrower.client.publish(publish).await.unwrap();
    let lookup = v1::LookupRequest {
        session_id: borrower.session,
        namespace: "model".to_owned(),
        hashes: hashes(5).into(),
        ..v1::LookupRequest::default()
    };
    let found = borrower.client.lookup(lookup.clone()).await.unwrap();
    let found = found.into_inner();
    assert_eq!(found.hit_blocks, 3);
    assert_eq!(found.extents.len(), 1);
    assert_eq!(
        (found.extents[0].first_slot, found.extents[0].count),
        (4, 3)
    );

    let withdraw = donor.withdraw([1; 16]);
    let withdrawing = donor.client.withdraw(withdraw).await.unwrap().into_inner();
    assert_eq!(withdrawing.bytes, 2 * SLAB);
    let found = borrower.client.lookup(lookup).await.unwrap().into_inner();
    assert_eq!(found.hit_blocks, 0, "revoked blocks are not found");
    for _ in 0..2 {
        let revoke = stream.let_go().await;
        assert_eq!(revoke.reason(), v1::RevokeReason::Withdrawn);
    }
    let returned = donor_stream.next().await;
    let session_response::Message::Returned(returned) = returned else {
        panic!("{returned:?}");
    };
    assert_eq!(returned.region_id[..], [1; 16]);
    assert_eq!(node.broker.owner().descriptors().count(), 0);

    let mut admin = node.admin().await;
    let request = v1::ListEventsRequest::default();
    let events = admin
        .list_events(request)
        .await
        .unwrap()
        .into_inner()
        .events;
    let kinds: Vec<&str> = events.iter().map(|event| event.kind.as_str()).collect();
    for kind in ["register", "offer", "lease", "withdraw", "revoke", "return"] {
        assert!(kinds.contains(&kind), "{kinds:?} lack {kind}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_outstanding_is_sent_again_to_a_new_stream() {
    let node = Node::start().await;
    let mut donor = node.donor(1).await;
    let mut borrower = node.member("borrower").await;
    let first = borrower.attach().await;
    borrower.lease(SLAB).await;
    drop(first);
    let withdraw = donor.withdraw([1; 16]);
    donor.client.withdraw(withdraw).await.unwrap();
    let mut second = borrower.attach().await;
    second.let_go().await;
    let mut donor_stream = donor.attach().await;
    assert!(matches!(
        donor_stream.next().await,
        session_response::Message::Returned(_)
    ));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tcp_serves_admin_and_health_and_sends_sessions_to_the_unix_socket() {
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start_in(directory, |config| {
        config.listen_tcp = Some(([127, 0, 0, 1], 0).into());
    })
    .await;
    let address = format!("http://{}", node.broker.tcp_address().unwrap());
    let channel = tonic::transport::Endpoint::try_from(address).unwrap();
    let channel = channel.connect().await.unwrap();

    let mut broker = BrokerClient::new(channel.clone());
    let status = broker.register(hello("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("Unix socket"));
    let requests = tokio_stream::iter([v1::SessionRequest::default()]);
    let status = broker.session(requests).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);

    let mut admin = v1::admin_client::AdminClient::new(channel.clone());
    admin.get_node(v1::GetNodeRequest {}).await.unwrap();
    // Nobody can tell who asks.
    let status = admin.drain(drain_a_device()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("TCP"), "{status:?}");
    let hold = v1::HoldRequest {
        device_uuid: "SIM-1".to_owned(),
        hold_id: 7,
        for_ms: 1_000,
        ..Default::default()
    };
    let status = admin.hold(hold).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let status = admin.watch(v1::WatchRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    for service in ["", "swiftcache.v1.Broker", "swiftcache.v1.Admin"] {
        let request = tonic_health::pb::HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status, 1, "{service:?} is serving");
    }
    drop((broker, admin, health));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let node = Node::start().await;
    let channel = connect(&node.config.socket).await;
    let mut client = ServerReflectionClient::new(channel);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = client
        .server_reflection_info(tokio_stream::iter([request]))
        .await
        .unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    for name in [
        "swiftcache.v1.Broker",
        "swiftcache.v1.Admin",
        "grpc.health.v1.Health",
    ] {
        assert!(names.contains(&name), "{names:?} lack {name}");
    }
    drop(client);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_ends_streams_and_removes_the_sockets() {
    let node = Node::start().await;
    let mut member = node.member("member").await;
    let mut stream = member.attach().await;
    let (socket, fd_socket) = (node.config.socket.clone(), node.fd_socket());
    assert!(socket.exists() && fd_socket.exists());
    let directory = node.stop().await;
    assert!(stream.receive.message().await.unwrap().is_none());
    assert!(!socket.exists() && !fd_socket.exists());
    assert!(directory.path().join("ledger").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_text_for_prometheus() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start_in(directory, |config| {
        config.metrics_listen = Some(([127, 0, 0, 1], 0).into());
    })
    .await;
    node.donor(3).await;
    let mut borrower = node.member("borrower").await;
    borrower.lease(SLAB).await;
    let scrape = async |path: &str| {
        let address = node.broker.metrics_address().unwrap();
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    };
    let text = scrape("/metrics").await;
    for line in [
        format!(
            "swiftcache_offered_bytes{{device=\"SIM-0\",state=\"free\"}} {}\n",
            2 * SLAB
        ),
        format!("swiftcache_offered_bytes{{device=\"SIM-0\",state=\"leased\"}} {SLAB}\n"),
        "swiftcache_leases_granted_total 1\n".to_owned(),
        "swiftcache_sessions 2\n".to_owned(),
        "swiftcache_rpc_duration_seconds_count{rpc=\"Lease\"} 1\n".to_owned(),
        "# TYPE swiftcache_revoke_duration_seconds histogram\n".to_owned(),
    ] {
        assert!(text.contains(&line), "{text}\nlacks {line}");
    }
    assert!(scrape("/elsewhere").await.starts_with("HTTP/1.1 404"));
    drop(borrower);
    node.stop().await;
}

/// Whoever holds all connections over TCP, or all of those for metrics, keeps no probe and no scraper out: the oldest are closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_and_scrapers_are_let_in_whoever_holds_the_other_connections() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    // More than there are places.
    const HELD: usize = 80;
    // What a client of HTTP/2 says first, and an empty SETTINGS frame.
    const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start_in(directory, |config| {
        config.listen_tcp = Some(([127, 0, 0, 1], 0).into());
        config.metrics_listen = Some(([127, 0, 0, 1], 0).into());
    })
    .await;
    let (tcp, metrics) = (
        node.broker.tcp_address().unwrap(),
        node.broker.metrics_address().unwrap(),
    );
    let hold = async |address: std::net::SocketAddr, hello: &[u8]| {
        let mut held = Vec::new();
        for _ in 0..HELD {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(hello).await.unwrap();
            held.push(stream);
        }
        held
    };
    let mut held = [hold(tcp, HELLO).await, hold(metrics, b"GET /").await];

    let channel = tonic::transport::Endpoint::try_from(format!("http://{tcp}")).unwrap();
    let channel = channel.connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest::default();
    let answer = health.check(request).await.unwrap().into_inner();
    assert_eq!(answer.status, 1);
    let mut scrape = tokio::net::TcpStream::connect(metrics).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    scrape.write_all(request).await.unwrap();
    let mut text = String::new();
    scrape.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    // The twin: there was no place left. The oldest gave theirs up.
    for held in &mut held {
        let mut rest = Vec::new();
        // An error is an end too.
        drop(held[0].read_to_end(&mut rest).await);
    }
    drop((held, health));
    node.stop().await;
}

/// Who begins a TLS handshake and says no more is cut off. The twin is above: who ends it is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tls_handshake_has_a_deadline() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let node = with_tls("server.pem").await;
    let address = node.broker.tcp_address().unwrap();
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    // The first byte of a handshake record.
    stream.write_all(&[22]).await.unwrap();
    let mut rest = Vec::new();
    // It ends, with or without an error, and not because the broker does.
    drop(stream.read_to_end(&mut rest).await);
    node.stop().await;
}
