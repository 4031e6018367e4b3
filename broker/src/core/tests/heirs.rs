//! The oracle on what borrowers that are gone leave, and who gets it; and what an heir does in a history.

use swiftcache_proto::domain::{Generation, LeaseClass, LeaseId, RevokeReason, SessionId};

use super::{
    allowed::{known_device, link},
    deeds::BLOCKS,
    fixture::{SLAB, hash},
    history::{History, Outcome},
    oracle::{Answer, OLease, ORegion, OSession, Oracle},
    world::{Client, SlotUse},
};
use crate::core::{Effect, Event, InheritDemand, LeaseDemand, Reply};

impl Oracle {
    /// Keeps what a lessee has published that touches the lease no more; false when that is nothing.
    pub(super) fn leave_to_heir(&mut self, id: LeaseId) -> bool {
        let ttl = u64::from(self.config.estate_ttl_ms);
        let now = self.now;
        let Some(lease) = self.leases.iter_mut().find(|lease| lease.id == id) else {
            return false;
        };
        let lessee = lease.lessee;
        let keeps = lease.revoked.is_none()
            && lease.holders.contains(&lessee)
            && lease.class == LeaseClass::Cache
            && !lease.blocks.is_empty()
            && ttl > 0;
        if keeps {
            lease.holders.retain(|holder| *holder != lessee);
            lease.lessee = SessionId(0);
            lease.estate = Some(now + ttl);
        }
        keeps
    }

    pub(super) fn end_estate(&mut self, id: LeaseId) {
        self.revoke(
            id,
            RevokeReason::LesseeGone,
            self.config.default_drain_ms,
            None,
        );
    }

    pub(super) fn expire_estates(&mut self) {
        let over = |lease: &&OLease| lease.estate.is_some_and(|until| until <= self.now);
        let over: Vec<_> = (self.leases.iter())
            .filter(over)
            .map(|its| its.id)
            .collect();
        for id in over {
            self.end_estate(id);
        }
    }

    fn region_of(&self, lease: &OLease) -> Option<&ORegion> {
        self.regions.iter().find(|region| region.id == lease.region)
    }

    /// Which lease an heir gets first is the core's choice; that it gets what fits is not.
    pub(super) fn inherit(
        &mut self,
        demand: &InheritDemand,
        effects: &[Effect],
    ) -> Result<Answer, String> {
        let heir = match self.session(demand.caller) {
            Ok(session) => session,
            Err(no) => return Ok(Err(no)),
        };
        if let Err(no) = self.not_silent(heir.id).and(known_device(&demand.device)) {
            return Ok(Err(no));
        }
        let reply = effects.iter().find_map(|effect| match effect {
            Effect::Reply(Reply::Inherited { leases, more }) => Some((leases.clone(), *more)),
            _ => None,
        });
        let (leases, more) = reply.ok_or("an heir was not answered")?;
        let mut bytes = 0;
        for inherited in &leases {
            let grant = &inherited.grant;
            let able = |oracle: &Self, its: &&OLease| {
                its.id == grant.lease && oracle.is_inheritable(its, demand, &heir) == Some(true)
            };
            let its = self.leases.iter().find(|its| able(self, its)).cloned();
            let its = its.ok_or_else(|| format!("{heir:?} inherits {grant:?}"))?;
            let mut blocks = its.blocks.clone();
            blocks.sort_by_key(|(_, slot)| *slot);
            let mut told = inherited.blocks.clone();
            told.sort_by_key(|(_, slot)| *slot);
            if blocks != told || grant.generation != Generation(its.generation) {
                return Err(format!("{inherited:?} of {its:?}"));
            }
            let pins = self.pins.iter().filter(|pin| pin.lease == its.id);
            let grace = if its.restored { self.grace_until } else { 0 };
            let until = pins.map(|pin| pin.deadline).max().unwrap_or(0).max(grace);
            if u64::from(inherited.retry_ms) != until.saturating_sub(self.now) {
                return Err(format!("{inherited:?} is pinned until {until}"));
            }
            bytes += SLAB;
            self.pins
                .retain(|pin| pin.lease != its.id || pin.session != heir.id);
            if let Some(known) = self.leases.iter_mut().find(|known| known.id == its.id) {
                known.lessee = heir.id;
                known.holders.push(heir.id);
                known.device = demand.device.clone();
                known.estate = None;
            }
        }
        let left = self.leases.iter();
        let left: Vec<_> = left
            .filter_map(|its| self.is_inheritable(its, demand, &heir))
            .collect();
        let room = bytes + SLAB <= demand.bytes;
        if bytes > demand.bytes || room && left.contains(&true) || more != left.contains(&false) {
            return Err(format!(
                "{bytes} bytes for {demand:?}, {more}, and {left:?}"
            ));
        }
        Ok(Ok(Some(Reply::Inherited { leases, more })))
    }

    /// Whether it can be had now, or only later; `None` when not at all.
    fn is_inheritable(
        &self,
        lease: &OLease,
        demand: &InheritDemand,
        heir: &OSession,
    ) -> Option<bool> {
        let region = self.region_of(lease)?;
        let able = lease.estate.is_some()
            && lease.tenant == heir.tenant
            && lease.namespace == demand.namespace
            && u64::from(lease.slots) == SLAB / demand.block_bytes
            && !lease.holders.contains(&heir.id)
            && region.donor != heir.id
            && !self.unmappable.contains(&(heir.id, region.id))
            && link(&demand.device, &region.device).is_some();
        able.then_some(region.handle)
    }

    /// An estate is given up for a demand: only when no slab is free for that.
    pub(super) fn given_up(
        &mut self,
        id: LeaseId,
        demand: &LeaseDemand,
        tenant: &str,
    ) -> Result<(), String> {
        let estate = |lease: &OLease| lease.id == id && lease.estate.is_some();
        let free = self.usable(demand, tenant);
        if !self.leases.iter().any(estate) || !free.is_empty() {
            return Err(format!("{id} is given up, and {free:?} are free"));
        }
        self.end_estate(id);
        Ok(())
    }

    /// Whether an estate would surely have brought a demand something.
    pub(super) fn could_go(&self, lease: &OLease, demand: &LeaseDemand, asker: &OSession) -> bool {
        let Some(region) = self.region_of(lease) else {
            return false;
        };
        let attached = |session: &OSession| session.id == region.donor && session.attached;
        let own = lease.tenant == asker.tenant;
        let brings = match own {
            true => !lease.holders.is_empty(),
            false => self.sessions.iter().any(attached),
        };
        brings
            && region.shared
            && self.lendable(region)
            && region.donor != asker.id
            && !self.unmappable.contains(&(asker.id, region.id))
            && link(&demand.device, &region.device).is_some()
            && SLAB >= demand.block_bytes
    }
}

impl History {
    /// A session takes over what others have left.
    pub(super) fn inherit(&mut self, client: &Client, picks: [u8; 3]) -> Outcome {
        let demand = Self::demand_of(client, picks);
        let demand = InheritDemand {
            caller: client.caller,
            namespace: demand.namespace,
            device: demand.device,
            bytes: demand.bytes.max(SLAB),
            host_bytes: demand.host_bytes,
            block_bytes: demand.block_bytes.min(SLAB),
        };
        let (session, namespace) = (client.caller.session, demand.namespace.clone());
        self.call(Event::Inherit(demand), move |history, reply| {
            let Some(Reply::Inherited { leases, .. }) = reply else {
                return Ok(());
            };
            let now = history.now;
            for its in leases {
                let lease = its.grant.lease;
                history.world.map(session, &its.grant, &namespace, true);
                let Some(mapping) = history.mapping(session, lease) else {
                    continue;
                };
                let until = now + u64::from(its.retry_ms);
                for slot in 0..mapping.slots {
                    mapping.uses.insert(slot, SlotUse::NotBefore(until));
                }
                for (its, slot) in its.blocks {
                    let number = (0..BLOCKS).find(|number| hash(*number) == its);
                    let number = number.ok_or("a block is inherited that nobody wrote")?;
                    mapping.uses.insert(slot, SlotUse::Published(number));
                }
            }
            Ok(())
        })
    }
}
