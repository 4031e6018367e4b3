//! What borrowers and schedulers ask for in a history, and what they keep themselves.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{BorrowerId, FoundRun, Hold, LeaseId, SessionId};

use super::{
    allowed::link,
    deeds::{BLOCKS, content},
    fixture::*,
    history::{History, Outcome, pick},
    steps::any_device,
    world::{Client, Own},
};
use crate::core::{Event, Keep, Lookup, Reply};

/// The borrowers of a session, by number.
fn borrower(session: SessionId, number: u8) -> BorrowerId {
    BorrowerId(u128::from(session.0 << 8 | u64::from(number % 2)).to_be_bytes())
}

fn namespace(number: u8) -> &'static str {
    ["model", "other"][usize::from(number.is_multiple_of(8))]
}

impl History {
    /// A borrower of the client's says what it is and what it keeps.
    pub(super) fn keep(&mut self, client: &Client, [b, c, d]: [u8; 3]) -> Outcome {
        let session = client.caller.session;
        let id = borrower(session, b);
        let own = Own {
            namespace: namespace(d / 2).to_owned(),
            device: any_device(c),
            shares: !d.is_multiple_of(3),
            block_bytes: [BLOCK, SLAB / 2][usize::from(c.is_multiple_of(5))],
            kept: BTreeSet::new(),
            down: match d % 5 {
                0 => vec![any_device(b)],
                _ => Vec::new(),
            },
            host_down: c.is_multiple_of(7),
        };
        let before = client.keeps.get(&id).filter(|before| before.is_like(&own));
        let anew = before.is_none() || b.is_multiple_of(5);
        let mut kept = before.map_or_else(BTreeSet::new, |before| before.kept.clone());
        if anew {
            kept.clear();
        }
        let dropped: Vec<u64> = (0..BLOCKS).filter(|n| c >> n & 1 == 1).collect();
        let more: Vec<u64> = (0..BLOCKS).filter(|n| d >> n & 1 == 1).collect();
        kept.retain(|block| !dropped.contains(block));
        kept.extend(&more);
        let closed = b.is_multiple_of(11);
        let keep = Keep {
            caller: client.caller,
            borrower: id,
            namespace: own.namespace.clone(),
            device: own.device.clone(),
            block_bytes: own.block_bytes,
            shares: own.shares,
            anew,
            kept: hashes(more),
            dropped: hashes(dropped),
            closed,
            down: own.down.clone(),
            host_down: own.host_down,
            host_memory: false,
            layer_bytes: Vec::new(),
        };
        // One such call at a time: what is on its way says nothing that can be relied on.
        if let Some(client) = self.world.client(session) {
            client.keeps.remove(&id);
        }
        let own = Own { kept, ..own };
        self.call(Event::Keep(keep), move |history, reply| {
            if let (Some(Reply::Done), Some(client)) = (reply, history.world.client(session))
                && !closed
            {
                client.keeps.insert(id, own);
            }
            Ok(())
        })
    }

    /// A client looks for itself, for one of its borrowers, or, as a scheduler does, for another session's.
    pub(super) fn lookup(&mut self, client: &Client, [b, c, d]: [u8; 3]) -> Outcome {
        let first = u64::from(b % 4);
        let blocks: Vec<_> = (first..first + 1 + u64::from(c % 6)).collect();
        let others = self.any_client(b / 4);
        let whose = others
            .filter(|_| d & 1 == 1)
            .unwrap_or_else(|| client.clone());
        let named = (c / 6 % 3 > 0).then(|| borrower(whose.caller.session, c / 18));
        let device = (d / 2 % 3 > 0).then(|| any_device(b ^ c));
        let lookup = Lookup {
            caller: client.caller,
            namespace: namespace(d / 2).to_owned(),
            hashes: hashes(blocks.iter().copied()),
            device,
            borrower: named,
            unpinned: d.is_multiple_of(7),
            host_memory: false,
        };
        let deadline = self.now + u64::from(self.config.pin_ms);
        let (id, tenant) = (client.caller.session, client.tenant.clone());
        let asked = lookup.clone();
        self.call(Event::Lookup(lookup), move |history, reply| {
            let Some(Reply::Found { runs, pin, .. }) = reply else {
                return Ok(());
            };
            history.promised(&asked, &whose, &runs, &blocks)?;
            let Some(pin) = pin else { return Ok(()) };
            let slots = runs.iter().flat_map(|run| match run {
                FoundRun::Leased { extent, .. } => {
                    let slots = extent.first_slot..extent.first_slot + extent.count;
                    slots.map(|slot| Some((extent.lease, slot))).collect()
                }
                FoundRun::Kept { count } => vec![None; *count as usize],
            });
            for (at, block) in slots.zip(blocks) {
                let Some((lease, slot)) = at else { continue };
                if history.is_queued() && !history.can_read(id, lease, deadline) {
                    continue;
                }
                let content = content(&tenant, &asked.namespace, block);
                history
                    .world
                    .found(id, (lease, slot, pin), content, deadline)?;
            }
            if let Some(client) = history.world.client(id) {
                client.pins.push(pin);
            }
            Ok(())
        })
    }

    /// Whoever the answer was for must be able to load what it names, as far as the world knows: it may have changed while
    /// the answer travelled.
    fn promised(
        &self,
        asked: &Lookup,
        whose: &Client,
        runs: &[FoundRun],
        blocks: &[u64],
    ) -> Outcome {
        if self.is_queued() {
            return Ok(());
        }
        let known = asked.borrower.and_then(|id| whose.keeps.get(&id));
        let known = known.filter(|own| {
            own.namespace == asked.namespace && whose.tenant == self.tenant_of(asked)
        });
        let (session, device) = match known {
            Some(own) => (whose.caller.session, Some(&own.device)),
            None => (asked.caller.session, asked.device.as_ref()),
        };
        let mut number = 0;
        for run in runs {
            match run {
                FoundRun::Kept { count } => {
                    let mut said = blocks[number..number + *count as usize].iter();
                    let keeps =
                        |block| known.is_some_and(|own| !own.host_down && own.kept.contains(block));
                    if !said.all(keeps) {
                        return Err(format!("{asked:?} is promised {run:?} of nothing"));
                    }
                }
                FoundRun::Leased { extent, hold, .. } => {
                    let (region, _) = self.world.place(extent.lease)?;
                    let on = self.world.device_of(region);
                    let reaches = device
                        .zip(on)
                        .is_none_or(|(from, to)| link(from, &to).is_some());
                    let on = self.world.device_of(region);
                    let works = known.is_none_or(|own| on.is_none_or(|on| !own.down.contains(&on)));
                    let client = self
                        .world
                        .clients
                        .iter()
                        .find(|c| c.caller.session == session);
                    let maps = client.is_none_or(|client| {
                        client.mapped.contains_key(&extent.lease)
                            || !client.unmappable.contains(&region)
                    });
                    let shares = known.is_none_or(|own| own.shares || *hold == Hold::Own);
                    if !reaches || !works || !maps || !shares {
                        return Err(format!(
                            "{asked:?} is promised {run:?}, which it cannot read"
                        ));
                    }
                }
            }
            number += run.blocks() as usize;
        }
        Ok(())
    }

    fn tenant_of(&self, asked: &Lookup) -> String {
        let clients = self.world.clients.iter();
        let mut tenants = clients
            .filter(|client| client.caller.session == asked.caller.session)
            .map(|client| client.tenant.clone());
        tenants.next().unwrap_or_default()
    }

    /// An answer that is late may speak of what is somebody else's by now: it counts only for a slab that is mapped for
    /// reading, and only until the pin ends. What lies in its own, a borrower knows better.
    fn can_read(&mut self, session: SessionId, lease: LeaseId, deadline: u64) -> bool {
        let now = self.now;
        let mapping = self.mapping(session, lease);
        now < deadline && mapping.is_some_and(|mapping| !mapping.lessee)
    }

    /// A client gives a lease or a share back, perhaps because its region cannot be mapped.
    pub(super) fn release(&mut self, client: &Client, [b, c, d]: [u8; 3]) -> Outcome {
        let (caller, id) = (client.caller, client.caller.session);
        let mapped: Vec<_> = client.mapped.keys().copied().collect();
        let Some(lease) = pick(&mapped, b).copied() else {
            return Ok(());
        };
        let mut leases = vec![lease];
        // One whose grant is on its way must not be named.
        let foreign = d.is_multiple_of(8) && !self.is_queued();
        leases.extend(foreign.then_some(LeaseId(c.into())));
        for lease in &leases {
            self.world.unmap(id, *lease);
        }
        let unmappable = c.is_multiple_of(4);
        let (region, _) = self.world.place(lease)?;
        let release = Event::Release {
            caller,
            leases,
            unmappable,
            bequeath: d.is_multiple_of(3),
        };
        // A message naming a foreign lease is refused whole, so what it unmapped stays leased.
        self.call(release, move |history, reply| {
            if let (Some(Reply::Done), Some(client)) = (reply, history.world.client(id))
                && unmappable
            {
                client.unmappable.insert(region);
            }
            Ok(())
        })
    }
}
