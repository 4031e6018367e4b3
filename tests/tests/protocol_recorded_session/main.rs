//! Plays an old client's session, which was recorded when `swiftcache.v1` was released, to today's broker. Requests are
//! encoded and answers are decoded with the descriptors of that time, and the answers must be the recorded ones.
//!
//! The twin plays a recording in which one answer is changed, and the change must be noticed.
//! `SWIFTCACHE_WRITE_SESSION=1` writes the answers again, for a recording that was extended.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod old_broker;
mod script;
mod wire;

use std::{collections::HashMap, path::PathBuf};

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor};

use script::{Names, Step, What, message, parse};
use wire::{Broker, Client, PATIENCE};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(name)
}

fn recording() -> String {
    std::fs::read_to_string(fixture("v1-session.txt")).unwrap()
}

/// The protocol as the old client knew it.
struct Protocol(DescriptorPool);

impl Protocol {
    fn old() -> Self {
        let set = std::fs::read(fixture("swiftcache-v1.binpb")).unwrap();
        Self(DescriptorPool::decode(set.as_slice()).unwrap())
    }

    /// The messages of an RPC: request and answer.
    fn messages(&self, rpc: &str) -> [MessageDescriptor; 2] {
        let broker = self.0.get_service_by_name("swiftcache.v1.Broker").unwrap();
        let method = broker.methods().find(|method| method.name() == rpc);
        let method = method.unwrap_or_else(|| panic!("there is no RPC {rpc}"));
        [method.input(), method.output()]
    }
}

/// Plays the recording, and returns it with today's answers.
async fn play(recording: &str) -> String {
    let (protocol, broker) = (
        Protocol::old(),
        Broker::start(&fixture("two-devices.toml")).await,
    );
    let mut names = Names::default();
    let mut clients: HashMap<String, Client> = HashMap::new();
    let mut played = Vec::new();
    let mut lines = recording.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(step) = parse(line) else {
            played.push(line.to_owned());
            continue;
        };
        if !clients.contains_key(&step.client) {
            let client = Client::connect(&broker.socket()).await;
            clients.insert(step.client.clone(), client);
        }
        let client = clients.get_mut(&step.client).unwrap();
        let [input, output] = protocol.messages(&step.rpc);
        match step.what {
            What::Send => {
                let sent = names.sent_as(&message(input, &step.text));
                client.send(sent.encode_to_vec()).await;
                played.push(line.to_owned());
            }
            What::Receive => {
                let received = decode(output, &client.receive(line).await);
                played.push(written(&step, What::Receive, &names.recorded_as(&received)));
            }
            What::Call | What::CallUntil => {
                let sent = names.sent_as(&message(input, &step.text)).encode_to_vec();
                let expected = lines.next().unwrap_or_default();
                let asking = async {
                    loop {
                        let answer = client.call(&step.rpc, sent.clone()).await;
                        let answer = match answer {
                            Ok(bytes) => {
                                let answer = names.recorded_as(&decode(output.clone(), &bytes));
                                written(&step, What::Answer, &answer)
                            }
                            Err(status) => format!(
                                "{}{} {} {:?}",
                                step.client,
                                What::Status.sign(),
                                step.rpc,
                                status.code()
                            ),
                        };
                        if step.what == What::Call || answer == expected {
                            return answer;
                        }
                    }
                };
                let answer = tokio::time::timeout(PATIENCE, asking).await;
                played.push(line.to_owned());
                played.push(answer.unwrap_or_else(|_| format!("{line} never got its answer")));
            }
            What::Answer | What::Status => panic!("{line}: an answer to nothing"),
        }
    }
    played.join("\n") + "\n"
}

fn decode(descriptor: MessageDescriptor, bytes: &[u8]) -> DynamicMessage {
    DynamicMessage::decode(descriptor, bytes).unwrap()
}

fn written(step: &Step, what: What, message: &DynamicMessage) -> String {
    // The text has only fields that the old client knows, because the message has its descriptor.
    let known = message.to_text_format();
    format!("{}{} {} {known}", step.client, what.sign(), step.rpc)
        .trim_end()
        .to_owned()
}

#[tokio::test]
async fn an_old_client_is_served_as_before() {
    let recorded = recording();
    let played = play(&recorded).await;
    if std::env::var_os("SWIFTCACHE_WRITE_SESSION").is_some() {
        std::fs::write(fixture("v1-session.txt"), &played).unwrap();
        return;
    }
    for (line, (now, then)) in played.lines().zip(recorded.lines()).enumerate() {
        assert_eq!(now, then, "line {} of v1-session.txt", line + 1);
    }
    assert_eq!(played.lines().count(), recorded.lines().count());
}

#[tokio::test]
async fn another_answer_is_noticed() {
    let recorded = recording();
    let changed = recorded.replacen("hit_blocks:4", "hit_blocks:3", 1);
    assert_ne!(changed, recorded);
    assert_eq!(play(&changed).await, recorded);
}

/// A message of a newer client: field 90 of the stream's message, which today's broker does not know.
const NEWER: &[u8] = b"\xd2\x05\x03new";

#[tokio::test]
async fn what_a_newer_client_says_on_its_stream_is_ignored() {
    let old = Protocol::old();
    let [request, _] = old.messages("Session");
    let [register, registered] = old.messages("Register");
    let broker = Broker::start(&fixture("two-devices.toml")).await;
    let mut client = Client::connect(&broker.socket()).await;
    let hello = message(register, "name: 'newer'").encode_to_vec();
    let answer = client.call("Register", hello).await.unwrap();
    let session = decode(registered, &answer);
    let session = session.get_field_by_name("session_id").unwrap();
    let attach = format!("attach {{ session_id: {} }}", session.as_u64().unwrap());
    let attach = message(request.clone(), &attach).encode_to_vec();
    client.send(attach.clone()).await;
    client.receive("Attached").await;
    client.send(NEWER.to_vec()).await;
    client.send(Vec::new()).await;
    // The broker goes on reading the stream. It ends it because of this message, which it understands and refuses.
    let nonsense = message(request, "scrubbed { region_id: 'short' }");
    client.send(nonsense.encode_to_vec()).await;
    let complaint = client.complaint().await;
    assert!(
        complaint.message().contains("scrubbed.region_id"),
        "{complaint}"
    );

    // The first message of a stream must still be Attach.
    let mut client = Client::connect(&broker.socket()).await;
    let status = client.refused(vec![NEWER.to_vec(), attach]).await;
    assert!(status.message().contains("attach: "), "{status}");
}

#[test]
fn the_recording_uses_every_rpc_of_a_session() {
    let recorded = recording();
    let used: Vec<String> = recorded
        .lines()
        .filter_map(parse)
        .map(|step| step.rpc)
        .collect();
    let broker = Protocol::old()
        .0
        .get_service_by_name("swiftcache.v1.Broker")
        .unwrap();
    for method in broker.methods() {
        assert!(
            used.iter().any(|rpc| rpc == method.name()),
            "{}",
            method.name()
        );
    }
}
