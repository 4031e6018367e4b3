//! The contract once more, as simply as it can be said: lists that are searched from end to end, and nothing kept
//! that can be counted. Where the core may choose (which slabs, whom to ask for one), the oracle takes the choice
//! from the core's effects and verifies that it was allowed.

use swiftcache_proto::domain::{
    AllocationId, BlockHash, DeviceUuid, LeaseClass, LeaseId, PinId, RegionId, RevokeReason,
    SessionId,
};

use crate::core::{
    Caller, CoreConfig, Effect, Event, Keep, Outgoing, Process, Refusal, Reply, State, WithdrawWhat,
};

#[derive(Clone, Debug)]
pub(super) struct OSession {
    pub(super) id: SessionId,
    pub(super) process: Process,
    pub(super) tenant: String,
    pub(super) attached: bool,
    pub(super) over: bool,
    pub(super) returned: Vec<RegionId>,
}

#[derive(Clone, Debug)]
pub(super) struct OSlab {
    pub(super) generation: u64,
    pub(super) dirt: Option<String>,
    pub(super) scrubbing: bool,
}

#[derive(Clone, Debug)]
pub(super) struct ORegion {
    pub(super) id: RegionId,
    pub(super) donor: SessionId,
    pub(super) device: DeviceUuid,
    pub(super) allocation: AllocationId,
    pub(super) offset: u64,
    /// Its allocation may be shared.
    pub(super) shared: bool,
    pub(super) elastic: bool,
    pub(super) handle: bool,
    pub(super) withdrawing: bool,
    pub(super) drained: bool,
    pub(super) slabs: Vec<OSlab>,
}

#[derive(Clone, Debug)]
pub(super) struct OLease {
    pub(super) id: LeaseId,
    pub(super) region: RegionId,
    pub(super) slab: u32,
    pub(super) generation: u64,
    pub(super) lessee: SessionId,
    pub(super) tenant: String,
    pub(super) namespace: String,
    /// The device that the lessee computes on.
    pub(super) device: DeviceUuid,
    pub(super) class: LeaseClass,
    pub(super) slots: u32,
    /// Everyone who may touch the slab.
    pub(super) holders: Vec<SessionId>,
    /// Why, and when the window closes.
    pub(super) revoked: Option<(RevokeReason, u64)>,
    /// Since when, if it is.
    pub(super) revoked_at: u64,
    pub(super) zombie: bool,
    pub(super) blocks: Vec<(BlockHash, u32)>,
    pub(super) restored: bool,
    /// Its lessee is gone, and it is kept for an heir until then.
    pub(super) estate: Option<u64>,
}

/// What a borrower said of itself.
#[derive(Clone, Debug)]
pub(super) struct OBorrower {
    pub(super) session: SessionId,
    pub(super) said: Keep,
    pub(super) kept: Vec<BlockHash>,
}

#[derive(Clone, Debug)]
pub(super) struct OPin {
    pub(super) id: PinId,
    pub(super) session: SessionId,
    pub(super) lease: LeaseId,
    pub(super) slot: u32,
    pub(super) deadline: u64,
}

/// Which kind of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum No {
    Unknown,
    NotYours,
    Invalid,
    Overlap,
    Stale,
    Late,
    Followed,
}

fn kind(refusal: &Refusal) -> Option<No> {
    match refusal {
        Refusal::Unknown { .. } => Some(No::Unknown),
        Refusal::NotYours { .. } => Some(No::NotYours),
        Refusal::Invalid { .. } => Some(No::Invalid),
        Refusal::Overlap { .. } => Some(No::Overlap),
        Refusal::Stale(_) => Some(No::Stale),
        Refusal::LateConnection(_) => Some(No::Late),
        Refusal::Followed { .. } => Some(No::Followed),
        Refusal::Limit { .. } | Refusal::DiskTaken { .. } => None,
    }
}

/// A reply, none, or a refusal.
pub(super) type Answer = Result<Option<Reply>, No>;

#[derive(Clone, Debug)]
pub(super) struct Oracle {
    pub(super) config: CoreConfig,
    pub(super) sessions: Vec<OSession>,
    pub(super) regions: Vec<ORegion>,
    pub(super) leases: Vec<OLease>,
    pub(super) pins: Vec<OPin>,
    pub(super) borrowers: Vec<OBorrower>,
    /// Who said that it cannot map which region.
    pub(super) unmappable: Vec<(SessionId, RegionId)>,
    /// Who has lately been granted less than asked, and until when that counts.
    pub(super) short: Vec<(SessionId, u64)>,
    pub(super) drained_devices: Vec<DeviceUuid>,
    pub(super) drained_donors: Vec<String>,
    pub(super) last_lease: u64,
    pub(super) now: u64,
    unsettled: bool,
    pub(super) grace_until: u64,
    /// What must have been said on streams in this event.
    pub(super) said: Vec<(SessionId, Outgoing)>,
}

impl Oracle {
    pub(super) fn new(config: CoreConfig) -> Self {
        Self {
            config,
            sessions: Vec::new(),
            regions: Vec::new(),
            leases: Vec::new(),
            pins: Vec::new(),
            borrowers: Vec::new(),
            unmappable: Vec::new(),
            short: Vec::new(),
            drained_devices: Vec::new(),
            drained_donors: Vec::new(),
            last_lease: 0,
            now: 0,
            unsettled: false,
            grace_until: 0,
            said: Vec::new(),
        }
    }

    /// The broker restarted on its ledger.
    pub(super) fn restart(&mut self) {
        for session in &mut self.sessions {
            session.attached = false;
            session.returned.clear();
        }
        for region in &mut self.regions {
            region.handle = false;
        }
        for lease in &mut self.leases {
            // The ledger has what is kept for heirs.
            if lease.estate.is_none() {
                lease.blocks.clear();
            }
            lease.zombie = false;
            lease.restored = true;
        }
        self.pins.clear();
        self.borrowers.clear();
        self.unmappable.clear();
        self.short.clear();
        self.unsettled = true;
        self.now = 0;
    }

    /// Believes a restored state: what a crash in the middle of an event left of it is for the world to judge.
    pub(super) fn adopt(state: &State) -> Self {
        let mut oracle = Self::new(state.books.config.clone());
        oracle.unsettled = true;
        oracle.last_lease = state.books.leases.next_id().0 - 1;
        oracle.drained_donors = state
            .books
            .regions
            .drained_donors()
            .iter()
            .cloned()
            .collect();
        let drained = state.devices().into_iter().filter(|device| device.drained);
        oracle.drained_devices = drained.map(|device| device.device.uuid).collect();
        let books = &state.books;
        for (id, session) in books.sessions.iter() {
            oracle.sessions.push(OSession {
                id,
                process: session.process(),
                tenant: session.tenant().to_string(),
                attached: false,
                over: session.is_over(),
                returned: session.returned().iter().copied().collect(),
            });
        }
        for (_, region) in books.regions.iter() {
            let slabs = region.slabs().iter().map(|slab| OSlab {
                generation: slab.generation(),
                dirt: slab.dirt().as_ref().map(|tenant| tenant.to_string()),
                scrubbing: slab.place() == crate::core::account::Place::Scrubbing,
            });
            oracle.regions.push(ORegion {
                id: region.id(),
                donor: region.donor(),
                device: books.devices.uuid(region.device()).clone(),
                allocation: region.outline().allocation,
                offset: region.outline().offset,
                shared: region.promises().shared,
                elastic: region.promises().elastic,
                handle: false,
                withdrawing: region.is_withdrawing(),
                drained: region.is_drained(),
                slabs: slabs.collect(),
            });
        }
        for (key, lease) in books.leases.iter() {
            let terms = lease.terms();
            let namespace = books.index.namespace(terms.namespace);
            oracle.leases.push(OLease {
                id: terms.id,
                region: books.regions.get(terms.region).id(),
                slab: terms.slab,
                generation: terms.generation.0,
                lessee: terms.lessee,
                tenant: namespace.tenant().to_string(),
                namespace: namespace.name().to_string(),
                device: books.devices.uuid(terms.device).clone(),
                class: terms.class,
                slots: books.index.slots(key),
                holders: lease.parties().collect(),
                revoked: lease.revocation().map(|revocation| (revocation.reason, 0)),
                revoked_at: 0,
                zombie: false,
                blocks: (books.index.blocks_in(key))
                    .map(|(slot, hash)| (*hash, slot))
                    .collect(),
                restored: true,
                estate: lease.estate(),
            });
        }
        oracle
    }

    /// Does what the event asks, and verifies that the core did just that.
    pub(super) fn follow(
        &mut self,
        event: &Event,
        now: u64,
        effects: &[Effect],
    ) -> Result<(), String> {
        self.now = self.now.max(now);
        self.said.clear();
        if std::mem::take(&mut self.unsettled) {
            self.settle();
        }
        let now = self.now;
        self.pins.retain(|pin| pin.deadline > now);
        self.short.retain(|(_, until)| *until > now);
        let expected = self.answer(event, effects)?;
        let reply = effects.iter().find_map(|effect| match effect {
            Effect::Reply(reply) => Some(reply.clone()),
            _ => None,
        });
        let answered = !matches!(
            event,
            Event::Acknowledge { .. } | Event::Scrubbed { .. } | Event::Unpin { .. }
        );
        match (&expected, &reply) {
            (Err(no), Some(Reply::Refused(refusal))) if kind(refusal) == Some(*no) => {}
            (Err(_), None) if !answered => {}
            (Ok(expected), reply) if format!("{expected:?}") == format!("{reply:?}") => {}
            _ => return Err(format!("{event:?}: expected {expected:?}, got {reply:?}")),
        }
        let mut said: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send(to, message) => Some(format!("{to:?} {message:?}")),
                _ => None,
            })
            .collect();
        let mut expected: Vec<_> = self
            .said
            .iter()
            .map(|(to, message)| format!("{to:?} {message:?}"))
            .collect();
        said.sort();
        expected.sort();
        match said == expected {
            true => Ok(()),
            false => Err(format!("{event:?}: said {said:?}, expected {expected:?}")),
        }
    }

    fn settle(&mut self) {
        self.grace_until = self.now + u64::from(self.config.pin_ms);
        let deadline = self.now + u64::from(self.config.default_drain_ms);
        for lease in &mut self.leases {
            if let Some((_, until)) = &mut lease.revoked {
                *until = deadline;
                lease.revoked_at = self.now;
            }
            if let Some(until) = &mut lease.estate {
                *until = self.now + u64::from(self.config.estate_ttl_ms);
            }
        }
        for region in self.regions.clone() {
            self.return_if_over(region.id);
        }
    }

    fn answer(&mut self, event: &Event, effects: &[Effect]) -> Result<Answer, String> {
        Ok(match event {
            Event::Register(register) => self.register(register),
            Event::Attach(caller) => self.attach(*caller),
            Event::Detach(id) => {
                self.sessions
                    .iter_mut()
                    .filter(|session| session.id == *id)
                    .for_each(|session| session.attached = false);
                Ok(None)
            }
            Event::Leave(caller) => self.session(*caller).map(|_| {
                self.let_go_of_all(caller.session, RevokeReason::Released);
                self.close(caller.session, RevokeReason::Withdrawn);
                Some(Reply::Done)
            }),
            Event::ProcessGone(process) => {
                self.process_gone(*process);
                Ok(None)
            }
            Event::Offer(offer) => self.offer(offer),
            Event::Withdraw(withdraw) => match &withdraw.what {
                WithdrawWhat::Regions(ids) => {
                    self.withdraw(withdraw.caller, ids, withdraw.drain_ms)
                }
                WithdrawWhat::Bytes { device, bytes } => {
                    return self.withdraw_bytes(withdraw, device, *bytes, effects);
                }
            },
            Event::Lease(demand) => return self.lease(demand, effects),
            Event::Release {
                caller,
                leases,
                unmappable,
                bequeath,
            } => self.release(*caller, leases, *unmappable, *bequeath),
            Event::Inherit(demand) => return self.inherit(demand, effects),
            Event::Forget(_) => return Err("histories forget nothing".to_owned()),
            Event::Share {
                caller,
                lease,
                device,
            } => self.share(*caller, *lease, device),
            Event::Publish(publish) => self.publish(publish),
            Event::Unpublish {
                caller,
                lease,
                generation,
                slots,
            } => self.unpublish(*caller, *lease, *generation, slots),
            Event::Lookup(lookup) => return self.lookup(lookup, effects),
            Event::Keep(keep) => self.keep(keep),
            Event::Acknowledge {
                caller,
                lease,
                generation,
            } => self.session(*caller).map(|_| {
                let known = self.leases.iter().find(|known| known.id == *lease);
                let fits = known.is_some_and(|known| {
                    known.generation == generation.0 && known.revoked.is_some()
                });
                if fits {
                    self.let_go(*lease, caller.session);
                }
                None
            }),
            Event::Scrubbed {
                caller,
                region,
                slab,
                generation,
            } => self.scrubbed(*caller, *region, *slab, *generation),
            Event::Unpin { caller, pins } => self.session(*caller).map(|_| {
                let session = caller.session;
                self.pins
                    .retain(|pin| pin.session != session || !pins.contains(&pin.id));
                None
            }),
            Event::Drain { target, drain_ms } => self.drain(target, *drain_ms),
            Event::Undrain(target) => self.undrain(target),
            Event::Evict(target) => self.evict(target),
            Event::SetQuota(_) => return Err("histories set no quotas".to_owned()),
            Event::Hold(_) => return Err("histories hold no devices".to_owned()),
            Event::DiskSays(_) | Event::DiskTakes(_) => {
                return Err("histories have no disks".to_owned());
            }
            Event::Tick => {
                for lease in &mut self.leases {
                    let over = lease.revoked.is_some_and(|(_, until)| until <= self.now);
                    lease.zombie |= over;
                }
                self.expire_estates();
                Ok(None)
            }
        })
    }

    /// The caller's session, if it is known, not over and its process speaks.
    pub(super) fn session(&self, caller: Caller) -> Result<OSession, No> {
        let known = |session: &&OSession| session.id == caller.session && !session.over;
        let session = self.sessions.iter().find(known).ok_or(No::Unknown)?;
        match session.process == caller.process {
            true => Ok(session.clone()),
            false => Err(No::NotYours),
        }
    }

    pub(super) fn say(&mut self, to: SessionId, message: Outgoing) {
        let up = |session: &OSession| session.id == to && session.attached;
        if self.sessions.iter().any(up) {
            self.said.push((to, message));
        }
    }
}
