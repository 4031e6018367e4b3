//! What donors and borrowers do in a history.

use super::{
    fixture::*,
    history::{History, Outcome, pick},
    steps::{TENANTS, any_device},
    world::{Client, Mapping, SlotUse},
};
use crate::core::{Caller, Event, LeaseDemand, Offer, Publish, Reply, Withdraw, WithdrawWhat};
use swiftcache_proto::domain::{Handle, LeaseClass, LeaseId, RegionId, SessionId};

/// Blocks that exist, per namespace.
pub(super) const BLOCKS: u64 = 6;

/// The bytes of a block: no two tenants or namespaces have the same.
pub(super) fn content(tenant: &str, namespace: &str, block: u64) -> u64 {
    let tenant = TENANTS.iter().position(|known| *known == tenant);
    block | (tenant.map_or(3, |number| number as u64)) << 8 | u64::from(namespace == "model") << 10
}

impl History {
    pub(super) fn offer(&mut self, client: &Client, b: u8, c: u8, d: u8) -> Outcome {
        let number = self.drawn;
        self.drawn += 1;
        // Mostly an allocation of its own; now and then beside, or on top of, another region.
        let beside = client
            .offers
            .values()
            .next()
            .filter(|_| d.is_multiple_of(5));
        let offer = Offer {
            caller: client.caller,
            region: region(number),
            device: beside.map_or(any_device(b), |offer| offer.device.clone()),
            allocation: beside.map_or(allocation(number), |offer| offer.allocation),
            offset: beside.map_or(0, |offer| offer.offset + u64::from(b % 4) * SLAB),
            bytes: u64::from(c % 4).min(u64::from(d)) * SLAB,
            slab_bytes: SLAB,
            handle: Handle::PosixFd,
            // What holds for an allocation is said of all of its regions.
            shared: beside.map_or(c.is_multiple_of(3), |offer| offer.shared),
            elastic: b.is_multiple_of(7),
        };
        self.call(Event::Offer(offer.clone()), move |history, reply| {
            let client = history.world.client(offer.caller.session);
            if let (Some(Reply::Done), Some(client)) = (reply, client) {
                client.offers.insert(offer.region, offer);
            }
            Ok(())
        })
    }

    pub(super) fn offer_again(&mut self, client: &Client, b: u8) -> Outcome {
        if client.behind {
            return self.resume(client, b);
        }
        let offers: Vec<_> = client.offers.values().collect();
        let Some(offer) = pick(&offers, b) else {
            return Ok(());
        };
        let mut offer = (*offer).clone();
        if b.is_multiple_of(16) {
            offer.bytes += SLAB;
        }
        self.tell(Event::Offer(offer))
    }

    pub(super) fn withdraw_one(&mut self, client: &Client, b: u8, c: u8) -> Outcome {
        let mut regions: Vec<RegionId> = client.offers.keys().copied().collect();
        regions.push(region(c.into()));
        let Some(region) = pick(&regions, b).copied() else {
            return Ok(());
        };
        self.send_withdraw(client.caller, WithdrawWhat::Regions(vec![region]), c)
    }

    pub(super) fn send_withdraw(&mut self, caller: Caller, what: WithdrawWhat, ms: u8) -> Outcome {
        let withdraw = Withdraw {
            caller,
            what,
            drain_ms: u32::from(ms),
        };
        self.tell(Event::Withdraw(withdraw))
    }

    pub(super) fn demand_of(client: &Client, [b, c, d]: [u8; 3]) -> LeaseDemand {
        LeaseDemand {
            caller: client.caller,
            namespace: ["model", "other"][usize::from(d.is_multiple_of(8))].to_owned(),
            device: device(u32::from(b) % 4),
            bytes: u64::from(c % 9).div_ceil(2) * SLAB,
            block_bytes: [BLOCK, BLOCK, SLAB / 2, SLAB * 2][usize::from(d % 16) / 5],
            class: [LeaseClass::Cache, LeaseClass::WorkingSet][usize::from(d % 3 == 0)],
            host_bytes: 0,
        }
    }

    pub(super) fn lease(&mut self, client: &Client, picks: [u8; 3]) -> Outcome {
        let demand = Self::demand_of(client, picks);
        let namespace = demand.namespace.clone();
        let session = client.caller.session;
        self.call(Event::Lease(demand), move |history, reply| {
            if let Some(Reply::Leased { grants, .. }) = reply {
                for grant in grants {
                    history.world.map(session, &grant, &namespace, true);
                }
            }
            Ok(())
        })
    }

    pub(super) fn share(&mut self, client: &Client, b: u8, c: u8) -> Outcome {
        let others = self.world.clients.iter();
        let leases: Vec<_> = others
            .filter(|other| other.tenant == client.tenant || c.is_multiple_of(8))
            .filter(|other| other.caller != client.caller || c.is_multiple_of(16))
            .flat_map(|client| client.mapped.iter().filter(|(_, mapping)| mapping.lessee))
            .map(|(lease, mapping)| (*lease, mapping.namespace.clone()))
            .collect();
        let Some((lease, namespace)) = pick(&leases, b).cloned() else {
            return Ok(());
        };
        let event = Event::Share {
            caller: client.caller,
            lease,
            device: device(u32::from(c) % 4),
        };
        let session = client.caller.session;
        if self.is_queued() {
            let asked = client.mapped.contains_key(&lease) || client.opening.contains(&lease);
            if asked {
                return Ok(());
            }
            if let Some(client) = self.world.client(session) {
                client.opening.insert(lease);
            }
        }
        self.call(event, move |history, reply| {
            if let Some(client) = history.world.client(session) {
                client.opening.remove(&lease);
            }
            if let Some(Reply::Shared(grant)) = reply {
                history.world.map(session, &grant, &namespace, false);
            }
            Ok(())
        })
    }

    /// The lessee writes blocks into slots it may write, and publishes them.
    pub(super) fn write(&mut self, client: &Client, [b, c, d]: [u8; 3]) -> Outcome {
        let Some((lease, mapping)) = self.any_mapping(client, b, true) else {
            return Ok(());
        };
        let id = client.caller.session;
        let mut blocks = Vec::new();
        for number in 0..u32::from(1 + d % 3) {
            let slot = (u32::from(c) + number) % mapping.slots.max(1);
            let writable = match mapping.uses.get(&slot) {
                None => true,
                Some(SlotUse::NotBefore(until)) => *until <= self.now,
                Some(SlotUse::Published(_)) => false,
            };
            if !writable || blocks.iter().any(|(_, taken)| *taken == slot) {
                continue;
            }
            let block = (u64::from(d % 4) + u64::from(number)) % BLOCKS;
            let content = content(&client.tenant, &mapping.namespace, block);
            self.world.write(id, lease, slot, content, self.now)?;
            blocks.push((block, slot));
        }
        let event = Event::Publish(Publish {
            caller: client.caller,
            lease,
            generation: mapping.generation,
            blocks: blocks.iter().map(|(n, slot)| (hash(*n), *slot)).collect(),
        });
        // Until a reply comes, and if none does, the broker may have told others.
        self.drawn += 1;
        let number = self.drawn;
        if let Some(mapping) = self.mapping(id, lease) {
            for (block, slot) in &blocks {
                mapping.uses.insert(*slot, SlotUse::Published(*block));
                mapping.spoken.insert(*slot, number);
            }
        }
        self.call(event, move |history, reply| {
            let free_again = match &reply {
                Some(Reply::Published { duplicates }) => duplicates.clone(),
                Some(_) => (0..blocks.len() as u32).collect(),
                None => Vec::new(),
            };
            if let Some(mapping) = history.mapping(id, lease) {
                for (index, (block, slot)) in (0..).zip(blocks) {
                    let here = mapping.uses.get(&slot) == Some(&SlotUse::Published(block))
                        && mapping.spoken.get(&slot) == Some(&number);
                    if here && free_again.contains(&index) {
                        mapping.uses.remove(&slot);
                    }
                }
            }
            Ok(())
        })
    }

    pub(super) fn mapping(&mut self, session: SessionId, lease: LeaseId) -> Option<&mut Mapping> {
        self.world.client(session)?.mapped.get_mut(&lease)
    }

    /// As after a restart: the lessee says again what lies where.
    pub(super) fn publish_again(&mut self, client: &Client, b: u8) -> Outcome {
        let Some((lease, mapping)) = self.any_mapping(client, b, true) else {
            return Ok(());
        };
        let published = mapping.uses.iter().filter_map(|(slot, used)| match used {
            SlotUse::Published(block) => Some((hash(*block), *slot)),
            SlotUse::NotBefore(_) => None,
        });
        self.drawn += 1;
        let number = self.drawn;
        if let Some(mapping) = self.mapping(client.caller.session, lease) {
            mapping
                .spoken
                .extend(mapping.uses.keys().map(|slot| (*slot, number)));
        }
        let event = Event::Publish(Publish {
            caller: client.caller,
            lease,
            generation: mapping.generation,
            blocks: published.collect(),
        });
        self.tell(event)
    }

    pub(super) fn unpublish(&mut self, client: &Client, b: u8, c: u8) -> Outcome {
        let Some((lease, mapping)) = self.any_mapping(client, b, true) else {
            return Ok(());
        };
        let slots: Vec<u32> = match mapping.uses.keys().nth(usize::from(c % 4)) {
            Some(slot) => vec![*slot, *slot],
            None => vec![u32::from(c % 5)],
        };
        let event = Event::Unpublish {
            caller: client.caller,
            lease,
            generation: mapping.generation,
            slots: slots.clone(),
        };
        let session = client.caller.session;
        // Nobody's until the broker has answered this very call; if it never does, it is asked again.
        self.drawn += 1;
        let unanswered = SlotUse::NotBefore(u64::MAX - self.drawn);
        if self.is_queued()
            && let Some(mapping) = self.mapping(session, lease)
        {
            for slot in &slots {
                mapping.uses.insert(*slot, unanswered);
            }
        }
        self.call(event, move |history, reply| {
            let (now, queued) = (history.now, history.is_queued());
            if let Some(Reply::Unpublished { pinned, retry_ms }) = reply
                && let Some(mapping) = history.mapping(session, lease)
            {
                for slot in slots {
                    if queued && mapping.uses.get(&slot) != Some(&unanswered) {
                        continue;
                    }
                    if pinned.contains(&slot) {
                        let until = now + u64::from(retry_ms);
                        mapping.uses.insert(slot, SlotUse::NotBefore(until));
                    } else {
                        mapping.uses.remove(&slot);
                    }
                }
            }
            Ok(())
        })
    }
}
