//! `swiftcache.v1` never changes its meaning: every field that an old peer sends or reads keeps its name, number and
//! type.
//!
//! The baseline is the protocol of the last release, as a descriptor set in `tests/fixtures`. It is written again for
//! each release, and may only get additions:
//! `SWIFTCACHE_WRITE_BASELINE=1 cargo test -p swiftcache-tests --test protocol_compatibility`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::PathBuf;

use prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey,
    MessageDescriptor, ReflectMessage, ServiceDescriptor, Value,
};
use prost_types::{FileDescriptorSet, field_descriptor_proto::Type};

/// How many levels of nested messages are filled. No message of the protocol has more levels.
const DEPTH: usize = 8;

fn baseline_path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/swiftcache-v1.binpb")
}

/// Today's protocol, without comments and line numbers.
fn current_set() -> FileDescriptorSet {
    let mut set = FileDescriptorSet::decode(swiftcache_proto::v1::FILE_DESCRIPTOR_SET).unwrap();
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set
}

fn baseline_set() -> FileDescriptorSet {
    FileDescriptorSet::decode(std::fs::read(baseline_path()).unwrap().as_slice()).unwrap()
}

fn pool(set: FileDescriptorSet) -> DescriptorPool {
    DescriptorPool::from_file_descriptor_set(set).unwrap()
}

/// Everything in `new` that an `old` peer would misread, one line for each.
fn breaks(old: &DescriptorPool, new: &DescriptorPool) -> Vec<String> {
    let mut found = Vec::new();
    for message in old.all_messages() {
        match new.get_message_by_name(message.full_name()) {
            None => found.push(format!("{}: is gone", message.full_name())),
            Some(now) => message_breaks(&message, &now, &mut found),
        }
    }
    for enumeration in old.all_enums() {
        match new.get_enum_by_name(enumeration.full_name()) {
            None => found.push(format!("{}: is gone", enumeration.full_name())),
            Some(now) => enum_breaks(&enumeration, &now, &mut found),
        }
    }
    for service in old.services() {
        match new.get_service_by_name(service.full_name()) {
            None => found.push(format!("{}: is gone", service.full_name())),
            Some(now) => service_breaks(&service, &now, &mut found),
        }
    }
    found
}

fn message_breaks(old: &MessageDescriptor, new: &MessageDescriptor, found: &mut Vec<String>) {
    for field in old.fields() {
        let name = field.full_name();
        match new.get_field(field.number()) {
            None => {
                let number = field.number();
                if !new.reserved_ranges().any(|range| range.contains(&number)) {
                    found.push(format!("{name}: number {number} is gone and not reserved"));
                }
                if !new
                    .reserved_names()
                    .any(|reserved| reserved == field.name())
                {
                    found.push(format!("{name}: the name is gone and not reserved"));
                }
            }
            Some(now) => {
                let (was, is) = (shape(&field), shape(&now));
                if was != is {
                    found.push(format!("{name}: was {was}, is {is}"));
                }
            }
        }
    }
}

/// Everything in a field that an old peer relies on.
fn shape(field: &FieldDescriptor) -> String {
    let kind = match field.kind() {
        Kind::Message(message) => message.full_name().to_owned(),
        Kind::Enum(enumeration) => enumeration.full_name().to_owned(),
        scalar => format!("{scalar:?}"),
    };
    let cardinality = match field.cardinality() {
        Cardinality::Repeated => "repeated",
        _ if field.supports_presence() => "optional",
        _ => "singular",
    };
    let oneof = match field.containing_oneof() {
        Some(oneof) => format!(" in oneof {}", oneof.name()),
        None => String::new(),
    };
    format!("{cardinality} {kind} {}{oneof}", field.name())
}

fn enum_breaks(old: &EnumDescriptor, new: &EnumDescriptor, found: &mut Vec<String>) {
    for value in old.values() {
        let name = value.full_name();
        match new.get_value(value.number()) {
            None => found.push(format!("{name}: {} is gone", value.number())),
            Some(now) if now.name() != value.name() => {
                found.push(format!("{name}: {} is now {}", value.number(), now.name()));
            }
            Some(_) => {}
        }
    }
}

fn service_breaks(old: &ServiceDescriptor, new: &ServiceDescriptor, found: &mut Vec<String>) {
    let shape = |method: prost_reflect::MethodDescriptor| {
        let stream = |streaming| if streaming { "stream " } else { "" };
        format!(
            "({}{}) returns ({}{})",
            stream(method.is_client_streaming()),
            method.input().full_name(),
            stream(method.is_server_streaming()),
            method.output().full_name()
        )
    };
    for method in old.methods() {
        let name = method.full_name().to_owned();
        match new.methods().find(|now| now.name() == method.name()) {
            None => found.push(format!("{name}: is gone")),
            Some(now) => {
                let (was, is) = (shape(method), shape(now));
                if was != is {
                    found.push(format!("{name}: was {was}, is {is}"));
                }
            }
        }
    }
}

/// A message in which no field has its default value. Of a oneof, member number `choice` is set.
fn filled(message: &MessageDescriptor, depth: usize, choice: usize) -> DynamicMessage {
    let mut filled = DynamicMessage::new(message.clone());
    for field in message.fields() {
        if let Some(oneof) = field.containing_oneof() {
            let members: Vec<u32> = oneof.fields().map(|member| member.number()).collect();
            if members[choice % members.len()] != field.number() {
                continue;
            }
        }
        if depth == 0 && matches!(field.kind(), Kind::Message(_)) {
            continue;
        }
        let value = filled_value(&field, depth, choice);
        let value = match (field.is_map(), field.is_list()) {
            (true, _) => Value::Map([(MapKey::String("k".to_owned()), value)].into()),
            (_, true) => Value::List(vec![value.clone(), value]),
            _ => value,
        };
        filled.set_field(&field, value);
    }
    filled
}

fn filled_value(field: &FieldDescriptor, depth: usize, choice: usize) -> Value {
    let number = field.number();
    match field.kind() {
        Kind::Double => Value::F64(f64::from(number) + 0.5),
        Kind::Float => Value::F32(1.5),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => Value::I32(-7),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => Value::I64(-7_000_000_000),
        Kind::Uint32 | Kind::Fixed32 => Value::U32(1_000 + number),
        Kind::Uint64 | Kind::Fixed64 => Value::U64((1 << 40) + u64::from(number)),
        Kind::Bool => Value::Bool(true),
        Kind::String => Value::String(format!("text {number}")),
        Kind::Bytes => Value::Bytes(vec![number as u8; 16].into()),
        Kind::Enum(enumeration) => {
            let last = enumeration.values().map(|value| value.number()).max();
            Value::EnumNumber(last.unwrap())
        }
        Kind::Message(message) => Value::Message(filled(&message, depth - 1, choice)),
    }
}

/// Sends every message of `from` to a peer that speaks `to`, and checks that the peer reads the same value in every
/// field that both know. Returns how many fields were compared.
fn readable(from: &DescriptorPool, to: &DescriptorPool) -> usize {
    let mut compared = 0;
    for message in from.all_messages() {
        let Some(target) = to.get_message_by_name(message.full_name()) else {
            continue;
        };
        let widest = message.oneofs().map(|oneof| oneof.fields().len()).max();
        for choice in 0..widest.unwrap_or(1) {
            let sent = filled(&message, DEPTH, choice);
            let received = DynamicMessage::decode(target.clone(), sent.encode_to_vec().as_slice())
                .unwrap_or_else(|error| panic!("{}: {error}", message.full_name()));
            compared += same(&sent, &received);
        }
    }
    compared
}

fn same(sent: &DynamicMessage, received: &DynamicMessage) -> usize {
    let mut compared = 0;
    for (field, value) in sent.fields() {
        let Some(target) = received.descriptor().get_field(field.number()) else {
            continue;
        };
        compared += same_value(&field, value, received.get_field(&target).as_ref());
    }
    compared
}

fn same_value(field: &FieldDescriptor, sent: &Value, received: &Value) -> usize {
    match (sent, received) {
        (Value::Message(sent), Value::Message(received)) => same(sent, received),
        (Value::List(sent), Value::List(received)) if sent.len() == received.len() => sent
            .iter()
            .zip(received)
            .map(|(sent, received)| same_value(field, sent, received))
            .sum(),
        _ => {
            assert_eq!(sent, received, "{}", field.full_name());
            1
        }
    }
}

#[test]
fn nothing_an_old_peer_relies_on_has_changed() {
    if std::env::var_os("SWIFTCACHE_WRITE_BASELINE").is_some() {
        std::fs::write(baseline_path(), current_set().encode_to_vec()).unwrap();
    }
    let found = breaks(&pool(baseline_set()), &pool(current_set()));
    assert!(
        found.is_empty(),
        "swiftcache.v1 may only grow; a change of meaning is swiftcache.v2:\n{}",
        found.join("\n")
    );
}

#[test]
fn old_and_new_peers_read_each_others_messages() {
    let (old, new) = (pool(baseline_set()), pool(current_set()));
    let forward = readable(&old, &new);
    let backward = readable(&new, &old);
    assert!(forward > 200, "an old client's {forward} fields");
    assert!(backward >= forward, "{backward} of {forward} fields");
}

/// Makes a change to the protocol, and returns the breaks that are found.
fn changed(change: impl FnOnce(&mut FileDescriptorSet)) -> Vec<String> {
    let mut set = current_set();
    change(&mut set);
    breaks(&pool(current_set()), &pool(set))
}

fn message<'a>(set: &'a mut FileDescriptorSet, name: &str) -> &'a mut prost_types::DescriptorProto {
    let messages = set.file.iter_mut().flat_map(|file| &mut file.message_type);
    messages
        .into_iter()
        .find(|found| found.name() == name)
        .unwrap()
}

#[test]
fn a_removed_field_is_noticed_unless_it_is_reserved() {
    let remove = |set: &mut FileDescriptorSet| {
        message(set, "LookupResponse")
            .field
            .retain(|field| field.name() != "pin_ms");
    };
    let found = changed(remove);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("pin_ms: number 4 is gone"), "{found:?}");
    let found = changed(|set| {
        remove(set);
        let message = message(set, "LookupResponse");
        message.reserved_name.push("pin_ms".to_owned());
        message
            .reserved_range
            .push(prost_types::descriptor_proto::ReservedRange {
                start: Some(4),
                end: Some(5),
            });
    });
    assert_eq!(found, Vec::<String>::new());
}

#[test]
fn a_changed_type_name_or_number_is_noticed() {
    let found = changed(|set| {
        let field = &mut message(set, "Extent").field[2];
        field.set_type(Type::Sint32);
    });
    assert!(
        found[0].contains("first_slot: was singular uint32"),
        "{found:?}"
    );
    let found = changed(|set| message(set, "Extent").field[2].name = Some("start".to_owned()));
    assert!(found[0].contains("is singular uint32 start"), "{found:?}");
    let found = changed(|set| message(set, "Extent").field[2].number = Some(9));
    assert!(found[0].contains("number 3 is gone"), "{found:?}");
}

#[test]
fn a_changed_method_enum_or_message_is_noticed() {
    let found = changed(|set| {
        let mut services = set.file.iter_mut().flat_map(|file| &mut file.service);
        let broker = services.find(|service| service.name() == "Broker").unwrap();
        broker.method.retain(|method| method.name() != "Share");
        let session = broker
            .method
            .iter_mut()
            .find(|method| method.name() == "Session");
        session.unwrap().server_streaming = Some(false);
    });
    assert_eq!(found.len(), 2, "{found:?}");
    let found = changed(|set| {
        let mut enums = set.file.iter_mut().flat_map(|file| &mut file.enum_type);
        let kinds = enums.find(|found| found.name() == "LinkKind").unwrap();
        kinds.value[2].name = Some("LINK_KIND_NVSWITCH".to_owned());
    });
    assert_eq!(found.len(), 1, "{found:?}");
    let found = changed(|set| message(set, "EvictResponse").field.clear());
    assert_eq!(found.len(), 4, "{found:?}");
    let found = breaks(&pool(current_set()), &DescriptorPool::new());
    assert!(
        found.contains(&"swiftcache.v1.Unpin: is gone".to_owned()),
        "{found:?}"
    );
}

#[test]
fn an_added_field_is_no_break() {
    let found = changed(|set| {
        let mut field = message(set, "Extent").field[2].clone();
        field.name = Some("added".to_owned());
        field.json_name = None;
        field.number = Some(90);
        message(set, "Extent").field.push(field);
    });
    assert_eq!(found, Vec::<String>::new());
}
