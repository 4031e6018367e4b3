//! What a disk says: what lies on it; and what it is told: what to write, and what to bring back.

use std::{collections::BTreeMap, sync::Arc};

use swiftcache_proto::domain::{BlockHash, Medium};

use super::{
    arena::LeaseKey,
    books::Books,
    effect::{DiskBlocks, Note, Refusal, Reply},
    event::{DiskSays, DiskTakes},
};

pub(super) fn disk_says(books: &mut Books, says: DiskSays) -> Result<Reply, Refusal> {
    let session = books.sessions.of(says.caller)?;
    let (id, tenant) = (says.caller.session, Arc::clone(session.tenant()));
    let mut others = books
        .disks
        .of(&tenant)
        .filter(|(other, disk)| *other != id && disk.name() == says.name);
    if let Some((other, _)) = others.next() {
        return Err(Refusal::DiskTaken {
            disk: says.name,
            session: other.label(),
        });
    }
    drop(others);
    let known = books
        .disks
        .get(id)
        .is_some_and(|disk| disk.name() == says.name);
    if says.anew || !known {
        books.disks.open(id, Arc::clone(&tenant), says.name);
        offer_all(books, &tenant);
    }
    let limit = books.config.max_blocks;
    if books.disks.blocks() + says.stored.len() as u64 > limit {
        return Err(Refusal::Limit {
            what: "blocks on disks",
            limit,
        });
    }
    if let Some(state) = says.state {
        books.disks.set_state(id, state);
    }
    if let Some(namespace) = says.namespace {
        let (bytes, stored) = (says.block_bytes, says.stored);
        books
            .disks
            .keep(id, &namespace, bytes, stored, &says.dropped);
    }
    Ok(Reply::Done)
}

/// What lies in host memory already when a disk comes.
fn offer_all(books: &mut Books, tenant: &str) {
    let its = books.index.after(None);
    let its = its.filter(|(_, namespace)| **namespace.tenant() == *tenant);
    let leases = its.flat_map(|(_, namespace)| namespace.leases().iter().copied());
    for lease in leases.collect::<Vec<_>>() {
        let its = books.index.blocks_in(lease);
        let hashes: Vec<BlockHash> = its.map(|(_, hash)| *hash).collect();
        offer(books, lease, &hashes);
    }
}

/// Blocks were published. Disks write what lies in host memory.
pub(super) fn offer(books: &mut Books, lease: LeaseKey, hashes: &[BlockHash]) {
    if hashes.is_empty() || books.disks.iter().next().is_none() {
        return;
    }
    if books.index.medium(lease) != Medium::Host {
        return;
    }
    let terms = books.leases.get(lease).terms();
    let namespace = books.index.namespace(terms.namespace);
    let (tenant, name) = (Arc::clone(namespace.tenant()), Arc::clone(namespace.name()));
    if books.disks.offer(&tenant, &name, terms.lessee, hashes) > 0 {
        books.note(Note::DiskWork);
    }
}

pub(super) fn disk_takes(books: &mut Books, takes: &DiskTakes) -> Result<Reply, Refusal> {
    let session = books.sessions.of(takes.caller)?;
    let (id, tenant) = (takes.caller.session, Arc::clone(session.tenant()));
    let mut to_store = Vec::new();
    if takes.to_store > 0 {
        let mut later = Vec::new();
        let mut layers: BTreeMap<Arc<str>, Option<Arc<[u64]>>> = BTreeMap::new();
        for (namespace, hash) in books.disks.take_to_store(id, takes.to_store) {
            if !lies_in_host_memory(books, &tenant, &namespace, &hash) {
                continue;
            }
            let its = layers.entry(Arc::clone(&namespace));
            let its = its.or_insert_with(|| books.layers_of(&tenant, &namespace));
            let known = books
                .disks
                .get(id)
                .is_some_and(|disk| disk.block_bytes(&namespace).is_some());
            match its.is_some() || known {
                true => add(&mut to_store, namespace, hash),
                // A borrower publishes as soon as it can, and may say later what its blocks look like.
                false => later.push((namespace, hash)),
            }
        }
        books.disks.put_back(id, later);
        for group in &mut to_store {
            let its = layers.get(&group.namespace).cloned().flatten();
            group.layer_bytes = its.map_or_else(Vec::new, |layers| layers.to_vec());
        }
    }
    let mut wanted = Vec::new();
    if takes.wanted > 0 {
        for (namespace, hash) in books.disks.take_wanted(id, takes.wanted) {
            add(&mut wanted, namespace, hash);
        }
    }
    Ok(Reply::DiskWork { to_store, wanted })
}

fn add(groups: &mut Vec<DiskBlocks>, namespace: Arc<str>, hash: BlockHash) {
    match groups.last_mut() {
        Some(group) if group.namespace == namespace => group.hashes.push(hash),
        _ => groups.push(DiskBlocks {
            namespace,
            layer_bytes: Vec::new(),
            hashes: vec![hash],
        }),
    }
}

fn lies_in_host_memory(books: &Books, tenant: &str, namespace: &str, hash: &BlockHash) -> bool {
    let Some(key) = books.index.find_namespace(tenant, namespace) else {
        return false;
    };
    let mut places = books.index.find(key, hash);
    places.any(|at| books.index.medium(at.lease) == Medium::Host)
}
