//! Every field of every request, out of its bounds: the documented code, and the field that is to blame.

use std::{collections::BTreeSet, fs, process::Command};

use anyhow::{Context, Result, ensure};
use prost::Message;
use prost_reflect::MethodDescriptor;
use swiftcache_proto::convert::MAX_BLOCKS;
use swiftcache_tests::{
    crew::{BorrowerProcess, Job},
    dynamic::{call, methods, request},
    engine::eventually,
    node::Node,
    operator::Operator,
    programs::program,
    wire::{Member, Wire},
};
use tonic::{Code, Status};

const SLAB: u64 = 1 << 20;
const BLOCK: u64 = 64 << 10;
/// 16 bytes that are text too.
const REGION: &str = "region-number-01";
const NAMESPACE: &str = "model";

/// A donor with a region, a lessee with a lease of it, and a second session with neither.
struct Stage {
    node: Node,
    wire: Wire,
    donor: Member,
    lessee: Member,
    stranger: Member,
    lease: u64,
    generation: u64,
}

impl Stage {
    fn new() -> Result<Self> {
        let node = Node::start(&[])?;
        let wire = Wire::new(&node.socket())?;
        let donor = wire.member("donor", "")?;
        donor.offer(id(REGION)?, "SIM-1", 4, SLAB)?;
        let lessee = wire.member("lessee", "")?;
        let leased = lessee.lease(NAMESPACE, "SIM-0", SLAB, BLOCK)?;
        let grant = leased.grants.first().context("nothing was leased")?;
        Ok(Self {
            stranger: wire.member("stranger", "")?,
            lease: grant.lease_id,
            generation: grant.generation,
            node,
            wire,
            donor,
            lessee,
        })
    }

    /// A request that is good, but for what `bad` sets.
    fn valid(&self, method: &MethodDescriptor) -> String {
        let donor = self.donor.session;
        let lessee = self.lessee.session;
        let (lease, generation) = (self.lease, self.generation);
        match method.name() {
            "Register" => "name: 'x'".to_owned(),
            "Leave" => format!("session_id: {}", self.stranger.session),
            "Offer" => format!(
                "session_id: {donor} region_id: 'region-number-02' device_uuid: 'SIM-1' \
                 allocation_id: '{REGION}' offset: {} bytes: {SLAB} slab_bytes: {SLAB} \
                 handle {{ kind: HANDLE_KIND_POSIX_FD }}",
                4 * SLAB
            ),
            "Withdraw" => format!("session_id: {donor} region_ids: '{REGION}' drain_ms: 60000"),
            "Lease" => format!(
                "session_id: {lessee} namespace: '{NAMESPACE}' device_uuid: 'SIM-0' bytes: {SLAB} \
                 block_bytes: {BLOCK}"
            ),
            "Release" => format!("session_id: {lessee} lease_ids: {lease}"),
            "Share" => {
                let stranger = self.stranger.session;
                format!("session_id: {stranger} lease_id: {lease} device_uuid: 'SIM-0'")
            }
            "Publish" => format!(
                "session_id: {lessee} lease_id: {lease} generation: {generation} \
                 hashes: '0123456789abcdef' slots: 0"
            ),
            "Unpublish" => {
                format!("session_id: {lessee} lease_id: {lease} generation: {generation} slots: 0")
            }
            "Lookup" => {
                format!("session_id: {lessee} namespace: '{NAMESPACE}' hashes: '0123456789abcdef'")
            }
            "Keep" => format!(
                "session_id: {lessee} borrower_id: 'borrower-number1' namespace: '{NAMESPACE}' \
                 device_uuid: 'SIM-0' block_bytes: {BLOCK} kept_hashes: '0123456789abcdef'"
            ),
            "Disk" => format!(
                "session_id: {lessee} device_uuid: 'DISK-0' namespace: '{NAMESPACE}' block_bytes: {BLOCK} \
                 stored_hashes: '0123456789abcdef'"
            ),
            "Inherit" => format!(
                "session_id: {lessee} namespace: '{NAMESPACE}' device_uuid: 'SIM-0' bytes: {SLAB} \
                 block_bytes: {BLOCK}"
            ),
            "Report" => format!("session_id: {lessee} traffic {{ lookup_blocks: 1 }}"),
            "Drain" | "Undrain" => "device_uuid: 'SIM-2'".to_owned(),
            "PreviewWithdraw" => "device_uuid: 'SIM-1' bytes: 1".to_owned(),
            "Hold" => "device_uuid: 'SIM-2' for_ms: 1 hold_id: 1".to_owned(),
            "SetQuota" => "namespace: 'another' bytes: 1".to_owned(),
            "Evict" => format!("namespace: '{NAMESPACE}'"),
            _ => String::new(),
        }
    }

    /// The good request with the fields of `bad` in place of its own, or without `field` when `bad` is empty.
    fn ask(&self, method: &MethodDescriptor, field: &str, bad: &str) -> Result<(), Status> {
        let internal = |error: anyhow::Error| Status::internal(format!("{bad}: {error}"));
        let mut message = request(method, &self.valid(method)).map_err(internal)?;
        let changed = request(method, bad).map_err(internal)?;
        message.clear_field_by_name(field);
        // An empty list says so by its name only.
        if bad.contains("region_ids: []") {
            message.clear_field_by_name("region_ids");
        }
        for (field, value) in changed.fields() {
            message.set_field(&field, value.clone());
        }
        call(&self.wire, method, vec![message.encode_to_vec()]).map(drop)
    }
}

fn id(text: &str) -> Result<[u8; 16]> {
    text.as_bytes().try_into().context("not 16 bytes")
}

/// A bad value of a field.
struct Case {
    method: String,
    field: String,
    code: String,
    named: String,
    bad: String,
}

fn cases(another: u64) -> Result<Vec<Case>> {
    let table = include_str!("../fixtures/bad_input.txt").lines();
    let lines = table.filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let mut columns = line.splitn(4, '|').map(str::trim);
            let mut next = || columns.next().context(line);
            let (method, field) = next()?.split_once('.').context(line)?;
            Ok(Case {
                method: method.to_owned(),
                field: field.to_owned(),
                code: next()?.to_owned(),
                named: next()?.to_owned(),
                bad: expanded(next()?, another)?,
            })
        })
        .collect()
}

/// `<x*7>` stands for xxxxxxx, `<another>` for a session.
fn expanded(text: &str, another: u64) -> Result<String> {
    let Some((before, (inside, after))) = text
        .split_once('<')
        .and_then(|(before, rest)| Some((before, rest.split_once('>')?)))
    else {
        return Ok(text.to_owned());
    };
    let inside = match inside.split_once('*') {
        Some((piece, times)) => piece
            .repeat(times.parse()?)
            .trim_end_matches(',')
            .to_owned(),
        None => another.to_string(),
    };
    Ok(format!("{before}{inside}{after}"))
}

/// Fields that take every value: there is nothing to refuse.
const UNBOUNDED: [&str; 28] = [
    "Disk.anew",
    "Inherit.bytes",
    "Inherit.host_bytes",
    "Offer.shared_allocation",
    "Offer.elastic",
    "Release.unmappable",
    "Release.bequeath",
    "Lookup.unpinned",
    "Lookup.host_memory",
    "Lease.host_bytes",
    "Keep.shares",
    "Keep.anew",
    "Keep.closed",
    "Keep.host_memory_down",
    "Keep.host_memory",
    "Report.routes_down",
    "Report.homes",
    "ListSessions.page_size",
    "ListRegions.page_size",
    "ListLeases.page_size",
    "ListNamespaces.page_size",
    "ListEvents.after_sequence",
    "ListEvents.limit",
    "ListEvents.kinds",
    "Watch.boot_id",
    "Watch.after_sequence",
    "SetQuota.bytes",
    "Hold.free_bytes",
];

#[test]
fn every_field_of_every_request_is_bounded() -> Result<()> {
    let stage = Stage::new()?;
    let mut job = Job::new("another process", 1);
    job.slabs = 0;
    let other = BorrowerProcess::start(&stage.node, 0, &job)?;
    let mut foreign = None;
    eventually("the other process's session", || {
        foreign = session_in_ledger(&stage.node, other.pid())?;
        Ok(foreign.is_some())
    })?;
    let methods = methods()?;
    let mut covered: BTreeSet<String> = UNBOUNDED.map(str::to_owned).into();
    for case in cases(foreign.context("no session")?)? {
        let target = format!("{}.{}", case.method, case.field);
        let method = methods.iter().find(|method| method.name() == case.method);
        let refused = stage
            .ask(method.context(target.clone())?, &case.field, &case.bad)
            .err();
        let what = format!("{target}: {}", &case.bad[..case.bad.len().min(80)]);
        let status = refused.with_context(|| format!("{what} was accepted"))?;
        ensure!(
            format!("{:?}", status.code()) == case.code,
            "{what}: {status:?}"
        );
        ensure!(status.message().contains(&case.named), "{what}: {status:?}");
        covered.insert(target);
    }
    let fields = methods
        .iter()
        .filter(|method| !method.is_client_streaming())
        .flat_map(|method| {
            let fields = method.input().fields().collect::<Vec<_>>();
            fields
                .into_iter()
                .map(|field| format!("{}.{}", method.name(), field.name()))
        });
    let fields: BTreeSet<String> = fields.collect();
    ensure!(fields.len() > 40, "{fields:?}");
    let missing: Vec<_> = fields.difference(&covered).collect();
    ensure!(
        missing.is_empty(),
        "nobody says what these refuse: {missing:?}"
    );

    // The requests were good but for what was changed, and nothing of all that has happened.
    let account = Operator::of(&stage.node)?.settled()?;
    ensure!(
        (account.offered_bytes, account.leased_bytes) == (4 * SLAB, SLAB),
        "{account:?}"
    );
    let last = ["Withdraw", "Release", "Leave"];
    let (ending, others): (Vec<_>, Vec<_>) = methods
        .iter()
        .partition(|method| last.contains(&method.name()));
    for method in others.into_iter().chain(ending) {
        if !method.is_client_streaming() {
            let answer = stage.ask(method, "", "");
            ensure!(answer.is_ok(), "{}: {answer:?}", method.full_name());
        }
    }
    Ok(())
}

/// The session of another process, which only the ledger and that process know.
fn session_in_ledger(node: &Node, pid: u32) -> Result<Option<u64>> {
    let ledger = fs::read_to_string(node.directory().join("ledger"))?;
    for line in ledger
        .lines()
        .filter(|line| line.contains("\"record\":\"session\""))
    {
        let (record, _checksum) = line.split_once('\t').context("no checksum")?;
        let record: serde_json::Value = serde_json::from_str(record)?;
        if record["process"]["pid"] == pid {
            return Ok(record["session"].as_u64());
        }
    }
    Ok(None)
}

#[test]
fn what_is_another_sessions_is_refused() -> Result<()> {
    let stage = Stage::new()?;
    let session = format!("session_id: {}", stage.stranger.session);
    for name in ["Withdraw", "Release", "Publish", "Unpublish"] {
        let method = methods()?.into_iter().find(|method| method.name() == name);
        let method = method.context(name)?;
        let status = stage
            .ask(&method, "session_id", &session)
            .err()
            .context(name)?;
        ensure!(
            status.code() == Code::PermissionDenied,
            "{name}: {status:?}"
        );
    }
    // Another tenant can neither find nor open it.
    stage
        .lessee
        .publish(stage.lease, stage.generation, &[[5; 16]])?;
    let tenant = stage.wire.member("other tenant", "other")?;
    ensure!(tenant.hits(NAMESPACE, &[[5; 16]])? == 0);
    ensure!(stage.stranger.hits(NAMESPACE, &[[5; 16]])? == 1);
    let share = methods()?
        .into_iter()
        .find(|method| method.name() == "Share")
        .context("Share")?;
    let session = format!("session_id: {}", tenant.session);
    let status = stage
        .ask(&share, "session_id", &session)
        .err()
        .context("opened")?;
    ensure!(status.code() == Code::PermissionDenied, "{status:?}");
    Ok(())
}

#[test]
fn a_session_stream_that_says_nonsense_ends_with_the_field_named() -> Result<()> {
    let stage = Stage::new()?;
    let method = methods()?
        .into_iter()
        .find(|method| method.name() == "Session");
    let method = method.context("Session")?;
    let attach = format!("attach {{ session_id: {} }}", stage.lessee.session);
    let pins = format!("unpin {{ pin_ids: [{}1] }}", "1, ".repeat(MAX_BLOCKS));
    for (messages, code, named) in [
        (vec![""], Code::InvalidArgument, "attach: "),
        (vec!["unpin { }"], Code::InvalidArgument, "attach: "),
        (vec!["attach { session_id: 7 }"], Code::NotFound, "session"),
        (vec![&attach, &attach], Code::InvalidArgument, "attach: "),
        (
            vec![&attach, &pins],
            Code::InvalidArgument,
            "unpin.pin_ids: ",
        ),
        (
            vec![&attach, "scrubbed { region_id: 'short' }"],
            Code::InvalidArgument,
            "scrubbed.region_id: ",
        ),
    ] {
        let bodies = messages
            .iter()
            .map(|text| Ok(request(&method, text)?.encode_to_vec()));
        let status = call(&stage.wire, &method, bodies.collect::<Result<_>>()?).err();
        let status = status.context("no complaint")?;
        ensure!(
            status.code() == code && status.message().contains(named),
            "{status:?}"
        );
    }
    Ok(())
}

/// Sessions are bound to a process of this user; nobody else gets as far as a connection.
#[test]
fn another_user_cannot_connect() -> Result<()> {
    let node = Node::start(&[])?;
    if !rustix::process::getuid().is_root() {
        // Only root can be somebody else.
        return Ok(());
    }
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(node.directory(), open)?;
    let status = |uid: u32| -> Result<std::process::Output> {
        let mut command = Command::new(program("swiftcache")?);
        std::os::unix::process::CommandExt::uid(&mut command, uid);
        std::os::unix::process::CommandExt::gid(&mut command, uid);
        Ok(command
            .arg("status")
            .arg("--socket")
            .arg(node.socket())
            .output()?)
    };
    ensure!(status(0)?.status.success());
    match status(65_534) {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                output.status.code() == Some(3),
                "{:?} {text}",
                output.status
            );
            ensure!(text.contains("Permission denied"), "{text}");
        }
        // The program itself lies where nobody may look: so does not the socket.
        Err(_) => {
            let mode = std::os::unix::fs::PermissionsExt::mode(
                &fs::metadata(node.socket())?.permissions(),
            );
            ensure!(mode & 0o007 == 0, "{mode:o}");
        }
    }
    Ok(())
}
