//! Sends garbage to every socket, and bodies that are almost requests. The broker answers or closes the connection,
//! keeps its accounts balanced, does not grow, and goes on serving.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    os::unix::net::UnixStream,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use prost::Message;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, Value};
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use swiftcache_proto::v1;
use swiftcache_tests::{
    census::resident_bytes,
    dynamic::{call, methods},
    engine::eventually,
    node::{Node, Setup},
    operator::Operator,
    seed::Course,
    wire::{Member, Wire, fetch},
};
use tonic::{Code, Status, body::Body, codegen::http};
use tower::ServiceExt;

const SLAB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;
/// How many bytes the broker may grow under garbage, for buffers of connections and caches of the allocator.
const GROWTH: u64 = 64 << 20;
/// The beginning of every HTTP/2 connection.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Uses the broker once: registers, offers, leases, publishes and looks up, and gives everything back.
fn serves(operator: &Operator, round: u8) -> Result<()> {
    let wire = operator.wire();
    // The garbage may have drained devices.
    for device in ["SIM-0", "SIM-1", "SIM-2"] {
        let undrain = v1::UndrainRequest {
            target: Some(v1::undrain_request::Target::DeviceUuid(device.to_owned())),
        };
        wire.wait(wire.admin().undrain(undrain))?;
    }
    let donor = wire.member("donor", "")?;
    let mut stream = donor.attach()?;
    let region = [round; 16];
    donor.offer(region, "SIM-2", 2, SLAB)?;
    // A separate tenant, so that no other demand competes.
    let lessee = wire.member("lessee", &format!("round-{round}"))?;
    let lease = |lessee: &Member| lessee.lease("serves", "SIM-0", SLAB, BLOCK);
    let leased = lease(&lessee)?;
    let grant = leased
        .grants
        .first()
        .with_context(|| format!("no slab: {leased:?}"))?;
    lessee.open(grant)?;
    let hashes = [[1; 16], [2; 16]];
    lessee.publish(grant.lease_id, grant.generation, &hashes)?;
    ensure!(lessee.hits("serves", &hashes)? == 2);
    operator.account()?;
    lessee.leave()?;
    donor.withdraw(&[region], 1_000)?;
    ensure!(stream.returned()? == region);
    donor.leave()?;
    operator.account()?;
    Ok(())
}

/// A message with random fields. Their values are small numbers, the node's own names, extremes, and nonsense.
fn random_message(descriptor: &MessageDescriptor, ids: &[u64], rng: &mut StdRng) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        if rng.random_bool(0.2) {
            continue;
        }
        let mut value = || random_value(field.kind(), ids, rng);
        let value = if field.is_list() {
            let first = value();
            Value::List(vec![first; rng.random_range(0..4)])
        } else {
            value()
        };
        message.set_field(&field, value);
    }
    message
}

fn random_value(kind: Kind, ids: &[u64], rng: &mut StdRng) -> Value {
    let number = match rng.random_range(0..4) {
        0 => rng.random_range(0..4),
        1 => *ids.choose(rng).unwrap_or(&0),
        2 => u64::MAX >> rng.random_range(0..64),
        _ => 1 << rng.random_range(0..40),
    };
    let texts = [
        "", "SIM-0", "SIM-1", "SIM-9", "model", "garbage", "\u{7f}\n", "ffff",
    ];
    let text = match rng.random_range(0..9) {
        8 => "x".repeat(rng.random_range(0..400)),
        n => texts[n].to_owned(),
    };
    match kind {
        Kind::Message(message) => Value::Message(random_message(&message, ids, rng)),
        Kind::Enum(_) => Value::EnumNumber(rng.random_range(-1..6)),
        Kind::String => Value::String(text),
        Kind::Bytes => {
            let length = *[0, 15, 16, 16, 16, 32, 64].choose(rng).unwrap_or(&0);
            Value::Bytes(vec![rng.random_range(0..3); length].into())
        }
        Kind::Bool => Value::Bool(rng.random()),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(number as u32),
        _ => Value::U64(number),
    }
}

/// Damages a body: flips bits, inserts bytes, repeats a part, or cuts it.
fn mutate(body: &mut Vec<u8>, rng: &mut StdRng) {
    for _ in 0..rng.random_range(0..4) {
        let at = rng.random_range(0..=body.len());
        match rng.random_range(0..4) {
            0 if at < body.len() => body[at] ^= 1 << rng.random_range(0..8),
            1 => body.truncate(at),
            2 => body.insert(at, rng.random()),
            _ => body.extend_from_slice(&body.clone()[at.min(body.len())..]),
        }
    }
}

/// Whether an answer to garbage is one that the protocol has.
fn understood(answer: &Result<Vec<u8>, Status>) -> bool {
    let code = answer.as_ref().err().map(Status::code);
    matches!(
        code,
        None | Some(
            Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::PermissionDenied
                | Code::FailedPrecondition
                | Code::ResourceExhausted
                | Code::OutOfRange
        )
    )
}

#[test]
fn bodies_of_garbage_are_answered_and_change_nothing() -> Result<()> {
    let mut course = Course::new("garbage bodies", 6);
    let node = Node::start(&["--drain-ms", "50", "--max-sessions", "200"])?;
    let operator = Operator::of(&node)?;
    serves(&operator, 0)?;
    let pid = node.broker()?.pid();
    let before = resident_bytes(pid)?;
    let mut answers = [0_u64; 2];
    for round in 1.. {
        if !course.goes_on() {
            break;
        }
        // The garbage names real sessions, regions and leases.
        let wire = Wire::new(&node.socket())?;
        let donor = wire.member("garbage", "")?;
        donor.offer([2; 16], "SIM-1", 4, SLAB)?;
        let lessee = wire.member("garbage", "")?;
        let leased = lessee.lease("model", "SIM-0", SLAB, BLOCK)?;
        let mut ids = vec![donor.session, lessee.session];
        ids.extend(leased.grants.iter().map(|grant| grant.lease_id));
        for method in methods()? {
            for _ in 0..40 {
                let bodies = (0..3).map(|n| {
                    let rng = &mut course.rng;
                    if n == 0 && method.is_client_streaming() {
                        let attach = v1::session_request::Message::Attach(v1::Attach {
                            session_id: lessee.session,
                        });
                        let message = Some(attach);
                        return v1::SessionRequest { message }.encode_to_vec();
                    }
                    if rng.random_bool(0.1) {
                        let length = rng.random_range(0..200);
                        return (0..length).map(|_| rng.random()).collect();
                    }
                    let mut body = random_message(&method.input(), &ids, rng).encode_to_vec();
                    if rng.random_bool(0.5) {
                        mutate(&mut body, rng);
                    }
                    body
                });
                let answer = call(&wire, &method, bodies.collect());
                ensure!(understood(&answer), "{}: {answer:?}", method.full_name());
                answers[usize::from(answer.is_ok())] += 1;
            }
        }
        operator.account()?;
        serves(&operator, 100 + round)?;
        // The sessions belong to this process, so none of them ends by itself.
        leave_all(&wire, &node)?;
    }
    ensure!(
        answers[0] > 100 && answers[1] > 100,
        "refused, accepted: {answers:?}"
    );
    let grown = resident_bytes(pid)?.saturating_sub(before);
    ensure!(grown < GROWTH, "grew by {grown} bytes");
    Ok(())
}

/// Ends every session that is in the ledger. All of them belong to this process.
fn leave_all(wire: &Wire, node: &Node) -> Result<()> {
    let ledger = fs::read_to_string(node.directory().join("ledger"))?;
    for line in ledger
        .lines()
        .filter(|line| line.contains("\"record\":\"session\""))
    {
        let (record, _checksum) = line.split_once('\t').context("no checksum")?;
        let record: serde_json::Value = serde_json::from_str(record)?;
        let session = record["session"]
            .as_u64()
            .context("a session without an id")?;
        let member = Member {
            wire: wire.clone(),
            session,
        };
        // This fails for most sessions, because they are over already.
        let _ = member.leave();
    }
    Ok(())
}

#[test]
fn frames_that_lie_about_their_length_are_refused() -> Result<()> {
    let node = Node::start(&[])?;
    let operator = Operator::of(&node)?;
    let wire = operator.wire();
    for frame in [
        // The first claims 4096 bytes and has three. The second claims two and has ten.
        "\0\0\0\u{10}\0abc",
        "\0\0\0\0\u{2}abcdefghij",
        // Claims two gigabytes.
        "\0\u{7f}\u{7f}\u{7f}\u{7f}",
        // The first claims to be compressed. The second has an invalid compression flag.
        "\u{1}\0\0\0\u{1}a",
        "\u{7}\0\0\0\u{1}a",
        "\0\0",
        "",
    ] {
        let request = http::Request::post("http://localhost/swiftcache.v1.Broker/Register")
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(Body::new(frame.to_owned()))?;
        let answer = wire.wait(wire.channel().oneshot(request));
        let headers = answer
            .with_context(|| format!("{frame:?}"))?
            .into_parts()
            .0
            .headers;
        // The status is already in the headers, because no message follows.
        let status = headers
            .get("grpc-status")
            .with_context(|| format!("{frame:?}"))?;
        ensure!(status != "0", "{frame:?} was accepted");
    }
    for (path, kind) in [
        ("/swiftcache.v1.Broker/NoSuchMethod", "application/grpc"),
        ("/no.such.Service/Method", "application/grpc"),
        ("/swiftcache.v1.Broker/Register", "text/html"),
        ("/", "application/grpc"),
    ] {
        let request = http::Request::post(format!("http://localhost{path}"))
            .header("content-type", kind)
            .body(Body::new(String::new()))?;
        let answer = wire.wait(wire.channel().oneshot(request))?;
        let refused = answer
            .headers()
            .get("grpc-status")
            .is_some_and(|status| status != "0");
        ensure!(
            refused || !answer.status().is_success(),
            "{path}: {answer:?}"
        );
    }
    serves(&operator, 1)
}

/// A node that serves TCP too, and its TCP address.
fn node_with_tcp() -> Result<(Node, SocketAddr)> {
    let directory = tempfile::tempdir()?;
    let log = directory.path().join("log");
    let options = ["--listen-tcp", "127.0.0.1:0", "--log-format", "json"];
    let node = Node::start_with(Setup {
        options: options.map(str::to_owned).into(),
        log: "info".to_owned(),
        log_file: Some(log.clone()),
        shell: None,
        ..Setup::default()
    })?;
    let mut address = None;
    eventually("the broker to say its address", || {
        for line in fs::read_to_string(&log)?.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap_or_default();
            if let Some(tcp) = line["fields"]["tcp"].as_str() {
                address = Some(tcp.parse()?);
            }
        }
        Ok(address.is_some())
    })?;
    Ok((node, address.context("no address")?))
}

/// Writes `bytes`, and reads until the broker closes the connection, answers, or the read times out.
fn say(mut stream: impl Read + Write, bytes: &[u8]) {
    // This may fail, because the broker may close the connection at any time.
    let _ = stream.write_all(bytes);
    let _ = stream.read(&mut [0; 64]);
}

#[test]
fn raw_garbage_on_each_socket_is_shrugged_off() -> Result<()> {
    let mut course = Course::new("raw garbage", 60);
    let (node, tcp) = node_with_tcp()?;
    let operator = Operator::of(&node)?;
    let fd_socket = operator.wire().fd_socket().to_owned();
    serves(&operator, 0)?;
    let pid = node.broker()?.pid();
    let before = resident_bytes(pid)?;
    let patience = Some(Duration::from_millis(20));
    while course.goes_on() {
        let mut bytes = match course.rng.random_range(0..3) {
            0 => PREFACE.to_vec(),
            // A frame header that promises 16 MiB.
            1 => [PREFACE, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1]].concat(),
            _ => Vec::new(),
        };
        let length = course.rng.random_range(0..4_000);
        bytes.extend((0..length).map(|_| course.rng.random::<u8>()));
        for socket in [node.socket(), fd_socket.clone()] {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(patience)?;
            if course.rng.random_bool(0.3) {
                stream.shutdown(Shutdown::Write)?;
            }
            say(stream, &bytes);
        }
        let stream = TcpStream::connect(tcp)?;
        stream.set_read_timeout(patience)?;
        say(stream, &bytes);
    }
    serves(&operator, 1)?;
    let grown = resident_bytes(pid)?.saturating_sub(before);
    ensure!(grown < GROWTH, "grew by {grown} bytes");
    Ok(())
}

#[test]
fn connections_that_never_finish_a_word_keep_nobody_out() -> Result<()> {
    let (node, tcp) = node_with_tcp()?;
    let operator = Operator::of(&node)?;
    let fd_socket = operator.wire().fd_socket().to_owned();
    serves(&operator, 0)?;
    let mut slow = Vec::new();
    let mut slow_tcp = Vec::new();
    // More connections than the fd socket and TCP accept at once, and many for gRPC.
    for n in 0..200 {
        for (socket, word) in [
            (node.socket(), &PREFACE[..n % 24]),
            (fd_socket.clone(), &[1][..]),
        ] {
            let mut stream = UnixStream::connect(socket)?;
            let _ = stream.write_all(word);
            slow.push(stream);
        }
        slow_tcp.push(TcpStream::connect(tcp)?);
    }
    // They do not fill the Unix socket of sessions.
    operator.account()?;
    operator.wire().member("prompt", "")?.leave()?;
    // The fd socket closes them after a time, although no client closes its end.
    eventually("the fd socket to answer", || {
        Ok(fetch(&fd_socket, &[0; 16]).is_ok())
    })?;
    // One place is free now, the others soon. A round that is refused in the middle leaves its region on offer, and the
    // region's id is used then. So each round has its own id.
    let mut rounds = 1..=u8::MAX;
    eventually("everything to be served", || {
        let round = rounds.next().context("refused every time")?;
        Ok(serves(&operator, round).is_ok())
    })?;
    drop((slow, slow_tcp));
    eventually("TCP to be served", || {
        let mut stream = TcpStream::connect(tcp)?;
        stream.set_read_timeout(Some(Duration::from_millis(200)))?;
        let _ = stream.write_all(PREFACE);
        Ok(stream.read(&mut [0; 9]).is_ok_and(|bytes| bytes > 0))
    })
}
