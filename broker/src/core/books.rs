//! The broker's books: who offers, holds, reads, keeps and waits for what. Here is what changes several of them at once,
//! whether it happens now or is read from a ledger. What the broker does about it is decided elsewhere.

use std::{collections::BTreeMap, sync::Arc};

use swiftcache_proto::domain::{
    AllocationId, DeviceUuid, Handle, LeaseClass, LeaseId, RegionId, RevokeReason, SessionId,
};

use super::{
    account::Place,
    arena::{LeaseKey, RegionKey},
    borrowers::Borrowers,
    check::hold,
    claims::{AllClaims, Stake},
    config::{CoreConfig, Node},
    counters::Counters,
    devices::Devices,
    disks::Disks,
    effect::{Effect, Note, Outgoing, Refusal},
    holders::{self, Path, Weights},
    holds::Holds,
    index::Index,
    journal::Journal,
    leases::{Leases, Party, Phase, Revocation, Terms},
    pins::Pins,
    process::Process,
    quotas::Quotas,
    record::Record,
    region::{Outline, Promises, Tenure},
    regions::{Regions, Room},
    sessions::Sessions,
    unmappable::Unmappable,
};

/// All books, and what the event under way has led to so far.
#[derive(Clone, Debug)]
pub(super) struct Books {
    pub(super) config: CoreConfig,
    pub(super) devices: Devices,
    pub(super) sessions: Sessions,
    pub(super) regions: Regions,
    pub(super) leases: Leases,
    pub(super) index: Index,
    /// What has changed in the index.
    pub(super) journal: Journal,
    pub(super) pins: Pins,
    pub(super) unmappable: Unmappable,
    pub(super) borrowers: Borrowers,
    pub(super) disks: Disks,
    pub(super) claims: AllClaims,
    pub(super) quotas: Quotas,
    pub(super) holds: Holds,
    pub(super) counters: Counters,
    /// The latest time heard of, milliseconds.
    pub(super) now: u64,
    /// Until when pins of the broker before this one may be read under, milliseconds.
    pub(super) grace_until: u64,
    pub(super) out: Vec<Effect>,
}

/// What a grant fixes for the life of a lease.
pub(super) struct NewLease {
    pub(super) id: LeaseId,
    pub(super) lessee: SessionId,
    pub(super) tenant: Arc<str>,
    pub(super) namespace: Arc<str>,
    /// The device the lessee computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    pub(super) class: LeaseClass,
    pub(super) region: RegionKey,
    pub(super) slab: u32,
    pub(super) generation: u64,
}

impl Books {
    /// A node on which nothing is offered yet.
    pub(super) fn new(config: CoreConfig, node: Node) -> Self {
        Self::of(config, Devices::new(node))
    }

    /// New books for the same node.
    pub(super) fn blank(&self) -> Self {
        Self::of(self.config.clone(), self.devices.clone())
    }

    fn of(config: CoreConfig, devices: Devices) -> Self {
        Self {
            sessions: Sessions::default(),
            regions: Regions::new(devices.count()),
            leases: Leases::default(),
            index: Index::default(),
            journal: Journal::new(config.max_journal),
            pins: Pins::new(config.pin_base),
            unmappable: Unmappable::default(),
            borrowers: Borrowers::default(),
            disks: Disks::default(),
            claims: AllClaims::new(Weights {
                tenants: config.tenant_weights.clone(),
                namespaces: config.namespace_weights.clone(),
            }),
            quotas: Quotas::new(config.namespace_quota_bytes),
            holds: Holds::new(devices.count()),
            counters: Counters::default(),
            now: 0,
            grace_until: 0,
            out: Vec::new(),
            devices,
            config,
        }
    }

    pub(super) fn note(&mut self, note: Note) {
        self.out.push(Effect::Note(note));
    }

    pub(super) fn record(&mut self, record: Record) {
        self.out.push(Effect::Record(record));
    }

    /// Sends on a session's stream, if it is up; what is outstanding is sent again when it attaches.
    pub(super) fn send(&mut self, to: SessionId, outgoing: Outgoing) {
        if self.sessions.get(to).is_some_and(|to| to.is_attached()) {
            self.out.push(Effect::Send(to, outgoing));
        }
    }

    pub(super) fn enrol(&mut self, id: SessionId, process: Process, name: &str, tenant: &str) {
        let (name, tenant) = (name.into(), tenant.into());
        self.sessions.open(id, process, name, tenant, self.now);
    }

    /// Marks a session over that has let go of everything and withdrawn its regions.
    pub(super) fn end_session(&mut self, id: SessionId) {
        self.sessions.end(id);
        let label = id.label();
        if self.sessions.labelled(&label).next().is_none() {
            self.regions.drain_donor(&label, false);
        }
    }

    /// The number of a device that can lend memory. A disk is refused as one that lends none.
    pub(super) fn lends(&self, uuid: &DeviceUuid) -> Result<usize, Refusal> {
        self.devices.number(uuid).map_err(|unknown| {
            let mut disks = self.disks.iter();
            match disks.any(|(_, disk)| disk.name() == uuid.as_str()) {
                true => Refusal::Invalid {
                    field: "device_uuid",
                    problem: format!(
                        "is {uuid}, a disk, and no memory of a disk is lent: end its `swiftcache donate` to take it out of use; what is in \
                         its file comes back with the next one"
                    ),
                },
                false => unknown,
            }
        })
    }

    /// Bytes of one block of a tenant's namespace in each layer, as one of its borrowers said.
    pub(super) fn layers_of(&self, tenant: &str, namespace: &str) -> Option<Arc<[u64]>> {
        let of_tenant = |session| {
            let its = self.sessions.get(session);
            its.is_some_and(|its| **its.tenant() == *tenant)
        };
        let mut all = self.borrowers.iter().filter(|borrower| {
            **borrower.namespace() == *namespace && of_tenant(borrower.session())
        });
        all.find_map(|borrower| borrower.layer_bytes().cloned())
    }

    /// How much may be on offer.
    pub(super) fn room(&self) -> Room {
        Room {
            regions: self.config.max_regions,
            slabs: self.config.max_slabs,
        }
    }

    /// Takes an admissible region in, without its handle.
    pub(super) fn admit(&mut self, outline: Outline, promises: Promises) -> RegionKey {
        self.sessions.donate(&outline);
        self.regions.admit(outline, promises)
    }

    /// The donor has said how the region is mapped.
    pub(super) fn set_handle(&mut self, key: RegionKey, handle: Handle) {
        // It may be one that can be mapped.
        self.unmappable.forget_region(key);
        self.regions.set_handle(key, handle);
        for lease in self.regions.get(key).leased() {
            if self.leases.get(lease).terms().class.is_cache() {
                self.claims.make_takeable(lease);
            }
        }
    }

    /// Forgets a region that nobody has a lease of; names its allocation if that was its last.
    pub(super) fn remove_region(&mut self, key: RegionKey) -> Option<AllocationId> {
        self.unmappable.forget_region(key);
        let (region, allocation) = self.regions.remove(key);
        self.sessions.take_back(region.outline());
        allocation
    }

    /// Leases a free slab. A lessee that is over holds nothing: a compacted ledger names those where readers still hold
    /// on.
    pub(super) fn take_slab(&mut self, new: NewLease) -> LeaseKey {
        let namespace = self.index.open(&new.tenant, &new.namespace);
        let region = self.regions.get(new.region);
        let (bytes, device) = (region.slab_bytes(), region.device());
        let takeable = region.handle().is_some() && new.class.is_cache();
        let slots = u32::try_from(bytes / new.block_bytes)
            .unwrap_or(u32::MAX)
            .min(self.config.max_slots);
        let terms = Terms {
            id: new.id,
            generation: swiftcache_proto::domain::Generation(new.generation),
            region: new.region,
            slab: new.slab,
            bytes,
            lessee: new.lessee,
            namespace,
            device: new.device,
            block_bytes: new.block_bytes,
            class: new.class,
        };
        let key = self.leases.insert(terms, self.now);
        let medium = self.devices.medium(device);
        self.index.add_lease(key, namespace, bytes, slots, medium);
        let tenure = Tenure {
            lease: key,
            generation: new.generation,
            tenant: new.tenant.clone(),
            class: new.class,
        };
        self.regions.lease(new.region, new.slab, tenure);
        if self.sessions.hold(new.lessee, new.id, bytes) {
            let stake = Stake {
                id: new.id,
                namespace,
                session: new.lessee,
                device,
                bytes,
                takeable,
                blocks: 0,
                last_hit: self.now,
            };
            let path = holders::path(&new.tenant, &new.namespace);
            self.claims.of_mut(medium).add(key, stake, &path);
        } else {
            self.leases.drop_party(key, new.lessee);
        }
        key
    }

    pub(super) fn add_reader(&mut self, key: LeaseKey, reader: SessionId) {
        self.leases.add_reader(key, reader);
        let lease = self.leases.get(key);
        let id = lease.terms().id;
        let revoked = !lease.is_active();
        self.sessions.read(reader, id);
        if revoked {
            self.sessions.owe(reader, id);
        }
    }

    /// Refuses a session that reads revoked leases although its reads must be over: it gets nothing new before it has let go. It
    /// has until the drain window closes, and no longer than a lookup's pin lasts: that is its only leave to read.
    pub(super) fn check_silence(&self, id: SessionId) -> Result<(), Refusal> {
        let owed = self.sessions.get(id).into_iter().flat_map(|its| its.owed());
        for lease in owed {
            let known = self.leases.find(*lease);
            let Some(revocation) = known.and_then(|(_, lease)| lease.revocation()) else {
                continue;
            };
            let ms = self.now.saturating_sub(revocation.since);
            if ms >= self.config.pin_ms.into() || self.now >= revocation.deadline {
                return Err(Refusal::Stale(format!(
                    "lease {lease} was revoked {ms} ms ago, and this session still reads it: it gets nothing more before it \
                     has acknowledged that"
                )));
            }
        }
        Ok(())
    }

    /// The lease is being revoked from now on: its blocks cannot be found, and nothing of it is pinned.
    pub(super) fn begin_revocation(&mut self, key: LeaseKey, reason: RevokeReason, deadline: u64) {
        self.forget_blocks(key);
        self.pins.end_all_on(key);
        self.claims.remove(key);
        let revocation = Revocation {
            reason,
            since: self.now,
            deadline,
        };
        self.leases.revoke(key, revocation);
        let lease = self.leases.get(key);
        for reader in lease.readers() {
            self.sessions.owe(*reader, lease.terms().id);
        }
        let terms = lease.terms();
        self.regions.put(terms.region, terms.slab, Place::Draining);
    }

    /// Strikes a session from those who may touch the slab; says whether it was one of them.
    pub(super) fn drop_party(&mut self, key: LeaseKey, session: SessionId) -> bool {
        let party = self.leases.drop_party(key, session);
        let terms = self.leases.get(key).terms();
        match party {
            Some(Party::Lessee) => {
                self.sessions.let_go(session, terms.id, terms.bytes);
                self.claims.remove(key);
            }
            Some(Party::Reader) => self.sessions.stop_reading(session, terms.id),
            None => {}
        }
        party.is_some()
    }

    /// The lessee of an active lease is gone, or touches it no more: what it published there is kept for an heir until then,
    /// milliseconds. It counts as nobody's holding.
    pub(super) fn keep_for_heir(&mut self, key: LeaseKey, until: u64) {
        let lessee = self.leases.get(key).terms().lessee;
        self.drop_party(key, lessee);
        self.leases.keep_for_heir(key, until);
        let terms = self.leases.get(key).terms();
        self.regions.put(terms.region, terms.slab, Place::Estate);
    }

    /// A lease that was kept for an heir is a session's own from now on, which computes on this device.
    pub(super) fn inherit(&mut self, key: LeaseKey, heir: SessionId, device: usize) {
        self.pins.end_of_on(heir, key);
        self.leases.inherit(key, heir, device);
        let lease = self.leases.get(key);
        let terms = lease.terms();
        let (region, slab) = (terms.region, terms.slab);
        self.sessions.hold(heir, terms.id, terms.bytes);
        let namespace = self.index.namespace(terms.namespace);
        let path = holders::path(namespace.tenant(), namespace.name());
        let its = self.regions.get(region);
        let stake = Stake {
            id: terms.id,
            namespace: terms.namespace,
            session: heir,
            device: its.device(),
            bytes: terms.bytes,
            takeable: its.handle().is_some(),
            blocks: self.index.published(key),
            last_hit: lease.last_hit(),
        };
        self.regions.put(region, slab, Place::Leased);
        let medium = self.devices.medium(stake.device);
        self.claims.of_mut(medium).add(key, stake, &path);
    }

    /// Forgets a lease that nobody holds: its slab is free, and remembers whose bytes are in it.
    pub(super) fn free_slab(&mut self, key: LeaseKey) {
        self.forget_blocks(key);
        self.pins.end_all_on(key);
        self.claims.remove(key);
        let lease = self.leases.remove(key);
        let terms = lease.terms();
        let tenant = self.index.namespace(terms.namespace).tenant().clone();
        self.index.remove_lease(key, terms.bytes);
        self.regions.free(terms.region, terms.slab, tenant);
    }

    /// Drops all blocks of a lease from the index, and says how many there were; pins on its slots stay.
    pub(super) fn forget_blocks(&mut self, key: LeaseKey) -> u64 {
        let blocks = self.index.clear(&mut self.journal, key);
        let region = self.leases.get(key).terms().region;
        self.regions.published_less(region, blocks);
        self.claims.set_blocks(key, 0);
        blocks
    }

    /// Leases whose drain window has closed become zombies.
    pub(super) fn next_zombie(&mut self) -> Option<LeaseKey> {
        let key = self.leases.next_zombie(self.now)?;
        let terms = self.leases.get(key).terms();
        self.regions.put(terms.region, terms.slab, Place::Zombie);
        Some(key)
    }

    /// The processes that may touch the lease's slab, in order and once each.
    pub(super) fn pids_of(&self, key: LeaseKey) -> Vec<u32> {
        let parties = self.leases.get(key).parties();
        let sessions = parties.filter_map(|party| self.sessions.get(party));
        let mut pids: Vec<_> = sessions.map(|session| session.process().pid).collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    /// How much there is to check.
    pub(super) fn size(&self) -> usize {
        self.sessions.len()
            + self.regions.slabs()
            + self.leases.len()
            + self.pins.len()
            + self.index.blocks() as usize
            + self.borrowers.kept() as usize
            + self.disks.blocks() as usize
    }

    /// Verifies every book, and that they agree with each other. Costs as much as they are large.
    ///
    /// A region that is withdrawn and held by nobody is returned at once; a ledger that was cut off `may` leave one.
    pub(super) fn check(&self, may_be_left: bool) -> Result<(), String> {
        self.sessions.check()?;
        self.regions.check()?;
        self.leases.check()?;
        self.index.check()?;
        let lives = |id| {
            self.sessions
                .get(id)
                .is_some_and(|session| !session.is_over())
        };
        let may_pin = |session: SessionId, key: LeaseKey| {
            let lease = self.leases.try_get(key);
            lives(session)
                && lease.is_some_and(|lease| lease.is_active() && lease.terms().lessee != session)
        };
        self.pins.check(may_pin)?;
        self.unmappable
            .check(lives, |key| self.regions.knows(key))?;
        self.borrowers.check(lives)?;
        self.disks.check(lives)?;
        self.check_slabs(may_be_left)?;
        self.check_leases()?;
        self.check_sessions()?;
        let medium = |stake: &Stake| self.devices.medium(stake.device);
        self.claims.check(self.active(), medium, lives)
    }

    /// Every leased slab has a lease that says the same, and every lease a slab.
    fn check_slabs(&self, may_be_left: bool) -> Result<(), String> {
        let mut leases = 0;
        for (key, region) in self.regions.iter() {
            let id = region.id();
            hold!(
                !region.is_withdrawing() || region.leases() > 0 || may_be_left,
                "region {id} is withdrawn, held by nobody, and not returned"
            );
            let mut published = 0;
            for (number, slab) in (0..).zip(region.slabs()) {
                let Some(lease_key) = slab.lease() else {
                    continue;
                };
                leases += 1;
                let Some(lease) = self.leases.try_get(lease_key) else {
                    return Err(format!("slab {number} of {id} has a lease that is over"));
                };
                let terms = lease.terms();
                hold!(
                    terms.region == key && terms.slab == number,
                    "lease {} is of another slab",
                    terms.id
                );
                hold!(
                    terms.generation.0 == slab.generation(),
                    "lease {} has a stale generation",
                    terms.id
                );
                let place = match lease.phase() {
                    Phase::Active if lease.estate().is_some() => Place::Estate,
                    Phase::Active => Place::of(terms.class),
                    Phase::Draining(_) => Place::Draining,
                    Phase::Zombie(_) => Place::Zombie,
                };
                hold!(
                    slab.place() == place,
                    "lease {} is accounted {:?}",
                    terms.id,
                    slab.place()
                );
                published += u64::from(self.index.published(lease_key));
            }
            hold!(
                published == region.published(),
                "region {id} miscounts its blocks"
            );
        }
        hold!(leases == self.leases.len(), "a lease has no slab");
        Ok(())
    }

    /// Every lease's parties know it, and blocks are found in active ones only.
    fn check_leases(&self) -> Result<(), String> {
        let mut bytes: BTreeMap<_, u64> = BTreeMap::new();
        for (key, lease) in self.leases.iter() {
            let terms = lease.terms();
            let id = terms.id;
            *bytes.entry(terms.namespace).or_default() += terms.bytes;
            let its = self.index.namespace(terms.namespace).leases();
            hold!(its.contains(&key), "lease {id} is of no namespace");
            hold!(
                self.index.published(key) == 0 || lease.is_active(),
                "blocks of the revoked lease {id} can be found"
            );
            hold!(
                lease.estate().is_none() || self.index.published(key) > 0,
                "lease {id} is kept for an heir and has no block"
            );
            for reader in lease.readers() {
                let session = self.sessions.get(*reader);
                let owes = session.is_some_and(|session| session.owed().contains(&id));
                hold!(
                    owes != lease.is_active(),
                    "{reader:?} is mistaken about the revocation of lease {id}"
                );
                let knows = session.is_some_and(|session| session.reads().contains(&id));
                hold!(knows, "{reader:?} does not know that it reads lease {id}");
            }
            let lessee = self.sessions.get(terms.lessee);
            let knows = lessee.is_some_and(|session| session.leases().contains(&id));
            hold!(
                knows == lease.lessee_holds(),
                "lessee of {id} is mistaken about it"
            );
        }
        for (key, namespace) in self.index.iter() {
            let counted = bytes.get(&key).copied().unwrap_or(0);
            hold!(
                counted == namespace.leased_bytes(),
                "namespace {} is miscounted",
                namespace.name()
            );
        }
        Ok(())
    }

    /// Sessions hold, read and donate what the other books say they do.
    fn check_sessions(&self) -> Result<(), String> {
        for (id, session) in self.sessions.iter() {
            let mut held = 0;
            for lease in session.leases() {
                let known = self
                    .leases
                    .find(*lease)
                    .filter(|(_, known)| known.terms().lessee == id && known.lessee_holds());
                let Some((_, known)) = known else {
                    return Err(format!("{id:?} does not hold lease {lease}"));
                };
                held += known.terms().bytes;
            }
            for lease in session.reads() {
                let known = self.leases.find(*lease);
                let reads = known.is_some_and(|(_, known)| known.readers().contains(&id));
                hold!(reads, "{id:?} does not read lease {lease}");
            }
            let mut donated = 0;
            for region in session.regions() {
                let region = self.regions.key(*region).map(|key| self.regions.get(key));
                let Some(region) = region.filter(|region| region.donor() == id) else {
                    return Err(format!("{id:?} does not donate what it should"));
                };
                hold!(
                    region.is_withdrawing() || !session.is_over(),
                    "{id:?} is over and has not withdrawn a region"
                );
                donated += region.bytes();
            }
            hold!(
                (held, donated) == (session.held_bytes(), session.donated_bytes()),
                "{id:?} miscounts its bytes"
            );
        }
        for (_, region) in self.regions.iter() {
            let donor = self.sessions.get(region.donor());
            let knows = donor.is_some_and(|donor| donor.regions().contains(&region.id()));
            hold!(knows, "region {} has no donor", region.id());
        }
        Ok(())
    }

    /// The stakes that there should be.
    fn active(&self) -> BTreeMap<LeaseKey, (Stake, Path)> {
        let active =
            (self.leases.iter()).filter(|(_, lease)| lease.is_active() && lease.lessee_holds());
        let stakes = active.map(|(key, lease)| {
            let terms = lease.terms();
            let region = self.regions.get(terms.region);
            let stake = Stake {
                id: terms.id,
                namespace: terms.namespace,
                session: terms.lessee,
                device: region.device(),
                bytes: terms.bytes,
                takeable: region.handle().is_some() && terms.class.is_cache(),
                blocks: self.index.published(key),
                last_hit: lease.last_hit(),
            };
            let namespace = self.index.namespace(terms.namespace);
            let path = holders::path(namespace.tenant(), namespace.name());
            (key, (stake, path))
        });
        stakes.collect()
    }
}

/// The regions of these ids that are known.
pub(super) fn keys_of<'a>(
    books: &Books,
    ids: impl IntoIterator<Item = &'a RegionId>,
) -> Vec<RegionKey> {
    let ids = ids.into_iter();
    ids.filter_map(|id| books.regions.key(*id)).collect()
}
