//! What really happens on the node: processes that map slabs, write blocks, read under pins and zero memory. The
//! world knows nothing of the broker's rules; it knows what must never happen, whoever is to blame.

use std::collections::{BTreeMap, BTreeSet};

use swiftcache_proto::domain::{
    AllocationId, BorrowerId, DeviceUuid, Generation, LeaseId, PinId, RegionId, SessionId,
};

use super::fixture::SLAB;
use crate::core::{Caller, Effect, Grant, Offer, Outgoing, Record};

/// A slab of somebody's memory.
pub(super) type At = (RegionId, u32);

/// What a process knows about a slot of a slab it leases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SlotUse {
    /// Holds this block, and the broker may have told others.
    Published(u64),
    /// Unpublished, but not to be written before this time, milliseconds.
    NotBefore(u64),
}

/// A slab a process has mapped.
#[derive(Clone, Debug)]
pub(super) struct Mapping {
    pub(super) at: At,
    pub(super) generation: Generation,
    pub(super) lessee: bool,
    pub(super) namespace: String,
    pub(super) slots: u32,
    pub(super) uses: BTreeMap<u32, SlotUse>,
    /// The last publishing that spoke of each slot: an answer to an earlier one says nothing of it any more.
    pub(super) spoken: BTreeMap<u32, u64>,
}

/// A borrower as its process knows it.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) namespace: String,
    pub(super) device: DeviceUuid,
    pub(super) shares: bool,
    pub(super) block_bytes: u64,
    /// The blocks in its own host memory.
    pub(super) kept: BTreeSet<u64>,
    /// Devices whose memory it cannot copy from now.
    pub(super) down: Vec<DeviceUuid>,
    /// The same of its own host memory.
    pub(super) host_down: bool,
}

impl Own {
    pub(super) fn is_like(&self, other: &Self) -> bool {
        (&self.namespace, &self.device, self.block_bytes)
            == (&other.namespace, &other.device, other.block_bytes)
    }
}

/// A living process's end of a session.
#[derive(Clone, Debug)]
pub(super) struct Client {
    pub(super) caller: Caller,
    pub(super) tenant: String,
    pub(super) mapped: BTreeMap<LeaseId, Mapping>,
    /// Revocations heard and not acknowledged.
    pub(super) told: Vec<(LeaseId, Generation)>,
    pub(super) offers: BTreeMap<RegionId, Offer>,
    /// Scrubs heard and not carried out.
    pub(super) scrubs: BTreeSet<(RegionId, u32, Generation)>,
    /// Scrubs carried out: answered again, never carried out again.
    pub(super) scrubbed: BTreeSet<(RegionId, u32, Generation)>,
    pub(super) pins: Vec<PinId>,
    /// The broker restarted, and this process has not resumed its session yet.
    pub(super) behind: bool,
    /// Acknowledged before their grants came: never to be mapped.
    pub(super) let_go: BTreeSet<LeaseId>,
    /// What its borrowers are and keep, where the broker has heard of it and nothing else is on its way.
    pub(super) keeps: BTreeMap<BorrowerId, Own>,
    /// Regions that it told the broker it cannot map.
    pub(super) unmappable: BTreeSet<RegionId>,
    /// Asked to be opened for reading, and not answered: neither asked again nor released meanwhile.
    pub(super) opening: BTreeSet<LeaseId>,
}

/// A block somebody found and may read until the deadline.
#[derive(Clone, Debug)]
struct Read {
    session: SessionId,
    lease: LeaseId,
    at: At,
    slot: u32,
    deadline: u64,
    pin: PinId,
}

/// The node.
#[derive(Clone, Debug, Default)]
pub(super) struct World {
    /// The sessions of living processes.
    pub(super) clients: Vec<Client>,
    /// The block that lies in a slot of a slab.
    memory: BTreeMap<(At, u32), u64>,
    /// Whose bytes a slab holds.
    written_by: BTreeMap<At, String>,
    /// Where every lease ever granted lies.
    places: BTreeMap<LeaseId, At>,
    /// The allocations of regions that are not returned, and whether their donors let tenants share them.
    allocations: BTreeMap<RegionId, (AllocationId, bool)>,
    reads: Vec<Read>,
}

impl World {
    pub(super) fn client(&mut self, session: SessionId) -> Option<&mut Client> {
        let of = |client: &&mut Client| client.caller.session == session;
        self.clients.iter_mut().find(of)
    }

    /// Where a lease that was granted lies.
    pub(super) fn place(&self, lease: LeaseId) -> Result<At, String> {
        let place = self.places.get(&lease).copied();
        place.ok_or_else(|| format!("no lease {lease}"))
    }

    /// The device of a region on offer by somebody alive.
    pub(super) fn device_of(&self, region: RegionId) -> Option<DeviceUuid> {
        let offers = self.clients.iter().flat_map(|client| &client.offers);
        let mut offers = offers.filter(|(id, _)| **id == region);
        offers.next().map(|(_, offer)| offer.device.clone())
    }

    /// A donor offers a region, by its own word.
    pub(super) fn offered(&mut self, offer: &Offer) {
        let allocation = (offer.allocation, offer.shared);
        self.allocations.entry(offer.region).or_insert(allocation);
    }

    /// Whether whoever maps a slab of one region reaches the other one's bytes, and their donor did not agree to that.
    fn exposes(&self, one: RegionId, other: RegionId) -> bool {
        let one = self.allocations.get(&one);
        one.is_some_and(|(_, shared)| !shared) && one == self.allocations.get(&other)
    }

    pub(super) fn enter(&mut self, caller: Caller, tenant: &str) {
        self.clients.push(Client {
            caller,
            tenant: tenant.to_owned(),
            mapped: BTreeMap::new(),
            told: Vec::new(),
            offers: BTreeMap::new(),
            scrubs: BTreeSet::new(),
            scrubbed: BTreeSet::new(),
            pins: Vec::new(),
            behind: false,
            let_go: BTreeSet::new(),
            keeps: BTreeMap::new(),
            unmappable: BTreeSet::new(),
            opening: BTreeSet::new(),
        });
    }

    /// Every session that satisfies this is gone, and its mappings with it.
    pub(super) fn leave(&mut self, gone: impl Fn(&Client) -> bool) {
        let sessions: Vec<_> = self
            .clients
            .extract_if(.., |client| gone(client))
            .map(|client| client.caller.session)
            .collect();
        self.reads.retain(|read| !sessions.contains(&read.session));
    }

    fn mapped_by(&self, touches: impl Fn(&At) -> bool) -> Option<SessionId> {
        let maps = |client: &&Client| client.mapped.values().any(|mapping| touches(&mapping.at));
        self.clients
            .iter()
            .find(maps)
            .map(|client| client.caller.session)
    }

    /// What the broker decided, before anybody hears of it: nobody may be able to touch what changes hands.
    pub(super) fn witness(&mut self, effects: &[Effect]) -> Result<(), String> {
        for effect in effects {
            match effect {
                Effect::Record(Record::Lease {
                    lease,
                    region,
                    slab,
                    tenant,
                    ..
                }) => self.slab_leased(*lease, (*region, *slab), tenant)?,
                Effect::Record(Record::Scrubbing { region, slab }) => {
                    let at = (*region, *slab);
                    if let Some(session) = self.mapped_by(|mapped| *mapped == at) {
                        return Err(format!("{at:?} is zeroed under {session:?}"));
                    }
                }
                Effect::Record(Record::RegionReturned { region })
                | Effect::Send(_, Outgoing::Returned(region)) => {
                    if let Some(session) = self.mapped_by(|(mapped, _)| mapped == region) {
                        return Err(format!("{region} is returned while {session:?} maps it"));
                    }
                    self.allocations.remove(region);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn slab_leased(&mut self, lease: LeaseId, at: At, tenant: &str) -> Result<(), String> {
        if let Some(session) = self.mapped_by(|mapped| *mapped == at) {
            return Err(format!("{at:?} is leased while {session:?} maps it"));
        }
        if let Some(other) = self.written_by.get(&at).filter(|other| *other != tenant) {
            return Err(format!(
                "{at:?} holds bytes of {other}, and is leased to {tenant}"
            ));
        }
        for client in self.clients.iter().filter(|other| other.tenant != tenant) {
            let mut mapped = client.mapped.values();
            if let Some(mapping) = mapped.find(|mapping| self.exposes(at.0, mapping.at.0)) {
                let (session, there) = (client.caller.session, mapping.at);
                return Err(format!(
                    "{at:?} is leased while {session:?} of another tenant maps {there:?} of the allocation"
                ));
            }
        }
        let mut written = self.written_by.iter();
        if let Some((there, other)) =
            written.find(|(there, of)| *of != tenant && self.exposes(at.0, there.0))
        {
            return Err(format!(
                "{at:?} is leased to {tenant}, and bytes of {other} lie in {there:?} of the allocation"
            ));
        }
        let zeroes = |client: &&Client| {
            let mut to_do = client.scrubs.difference(&client.scrubbed);
            to_do.any(|(region, slab, _)| (*region, *slab) == at)
        };
        if let Some(donor) = self.clients.iter().find(zeroes) {
            let session = donor.caller.session;
            return Err(format!("{at:?} is leased before {session:?} has zeroed it"));
        }
        if self.places.insert(lease, at).is_some() {
            return Err(format!("lease {lease} is granted twice"));
        }
        Ok(())
    }

    /// A message reaches its process, if that lives.
    pub(super) fn hear(&mut self, session: SessionId, message: &Outgoing) {
        let Some(client) = self.client(session) else {
            return;
        };
        match message {
            Outgoing::Revoke {
                lease, generation, ..
            } => client.told.push((*lease, *generation)),
            Outgoing::Returned(region) => {
                client.offers.remove(region);
                client.scrubs.retain(|(of, ..)| of != region);
                let freed = *region;
                self.written_by.retain(|(region, _), _| *region != freed);
                self.memory.retain(|((region, _), _), _| *region != freed);
            }
            Outgoing::Scrub {
                region,
                slab,
                generation,
            } => {
                client.scrubs.insert((*region, *slab, *generation));
            }
            Outgoing::CannotMap { .. } | Outgoing::Hold { .. } => {}
        }
    }

    pub(super) fn map(&mut self, session: SessionId, grant: &Grant, namespace: &str, lessee: bool) {
        let Some(client) = self.client(session) else {
            return;
        };
        assert_eq!(grant.slab_bytes, SLAB);
        if client.let_go.contains(&grant.lease) {
            return;
        }
        let mapping = Mapping {
            at: (grant.region, grant.slab),
            generation: grant.generation,
            lessee,
            namespace: namespace.to_owned(),
            slots: grant.slots,
            uses: BTreeMap::new(),
            spoken: BTreeMap::new(),
        };
        client.mapped.entry(grant.lease).or_insert(mapping);
    }

    pub(super) fn unmap(&mut self, session: SessionId, lease: LeaseId) {
        if let Some(client) = self.client(session) {
            client.mapped.remove(&lease);
            client.told.retain(|(told, _)| *told != lease);
        }
        self.reads
            .retain(|read| read.session != session || read.lease != lease);
    }

    /// A revocation is obeyed, whether its lease was ever mapped or not.
    pub(super) fn let_go(&mut self, session: SessionId, lease: LeaseId) {
        self.unmap(session, lease);
        if let Some(client) = self.client(session) {
            client.let_go.insert(lease);
        }
    }

    /// A lessee writes a block: nobody may be reading what lay there.
    pub(super) fn write(
        &mut self,
        session: SessionId,
        lease: LeaseId,
        slot: u32,
        block: u64,
        now: u64,
    ) -> Result<(), String> {
        let at = self.places[&lease];
        let reads = |read: &&Read| {
            let here = read.lease == lease && read.at == at && read.slot == slot;
            here && read.session != session && read.deadline > now
        };
        if let Some(read) = self.reads.iter().find(reads) {
            let reader = read.session;
            return Err(format!(
                "slot {slot} of {at:?} is written while {reader:?} reads it"
            ));
        }
        let tenant = self.client(session).map(|client| client.tenant.clone());
        self.written_by.insert(at, tenant.unwrap_or_default());
        self.memory.insert((at, slot), block);
        Ok(())
    }

    /// A lookup said where a block lies: it must lie there.
    pub(super) fn found(
        &mut self,
        session: SessionId,
        (lease, slot, pin): (LeaseId, u32, PinId),
        block: u64,
        deadline: u64,
    ) -> Result<(), String> {
        let at = *self.places.get(&lease).ok_or(format!("no lease {lease}"))?;
        let lies = self.memory.get(&(at, slot)).copied();
        if lies != Some(block) {
            return Err(format!(
                "slot {slot} of {at:?} holds {lies:?}, not block {block}"
            ));
        }
        self.reads.push(Read {
            session,
            lease,
            at,
            slot,
            deadline,
            pin,
        });
        Ok(())
    }

    pub(super) fn done_reading(&mut self, session: SessionId, pin: PinId) {
        self.reads
            .retain(|read| read.session != session || read.pin != pin);
    }

    /// A donor carries out a scrub it heard of.
    pub(super) fn zero(&mut self, session: SessionId, scrub: (RegionId, u32, Generation)) {
        let Some(client) = self.client(session) else {
            return;
        };
        client.scrubs.remove(&scrub);
        if client.scrubbed.insert(scrub) {
            let at = (scrub.0, scrub.1);
            self.written_by.remove(&at);
            self.memory.retain(|(of, _), _| *of != at);
        }
    }
}
