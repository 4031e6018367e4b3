//! Brokers that are broken on purpose.

use super::{fixture::hash, history::History, world::SlotUse};
use crate::core::{Caller, Effect, Event, Keep, Lookup, Now, Outgoing, Publish};
use swiftcache_proto::domain::{Generation, LeaseId, SessionId};

/// How a broken broker misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// A slab is free once its lessee lets go, readers or not.
    ForgetsReaders,
    /// A slab is free once its drain window is over.
    TrustsTimeouts,
    /// A closed stream counts as a dead process.
    TrustsClosedStreams,
    /// A slab goes to another tenant before it is zeroed.
    SkipsScrubs,
    /// Lookups pin nothing.
    ForgetsPins,
    /// After a restart, pins of the broker before are not reckoned with.
    ForgetsEarlierPins,
    /// The ledger lacks who reads what.
    LosesShares,
    /// The ledger lacks the leases.
    LosesLeases,
    /// The ledger lacks the scrubs under way.
    LosesScrubs,
    /// Unpublished blocks stay in the index.
    IgnoresUnpublish,
    /// An acknowledgement of an earlier generation counts.
    TrustsStaleAcks,
    /// An acknowledgement counts for everyone, whoever says it.
    TrustsForeignAcks,
    /// Lookups find what lies on devices that the asker does not reach.
    FindsUnreachable,
    /// What a session cannot map is found for it as before.
    ForgetsUnmappable,
    /// A borrower that keeps a block no more is believed to keep it.
    TrustsOldKeeps,
    /// A clock that jumps ahead for a moment ends pins.
    TrustsClock,
}

impl History {
    /// What a broken broker would do besides.
    pub(super) fn misbehave(&mut self, event: &Event, mut effects: Vec<Effect>) -> Vec<Effect> {
        let mut more: Vec<Event> = Vec::new();
        match (self.fault, event) {
            (Some(Fault::ForgetsReaders), Event::Acknowledge { .. } | Event::Release { .. }) => {
                let orphans = self
                    .state
                    .leases
                    .iter()
                    .filter(|(_, lease)| !lease.lessee_holds);
                more.extend(orphans.flat_map(|(_, lease)| {
                    let readers = lease.readers.iter();
                    readers.map(|reader| self.letting_go(*reader, lease.id, lease.generation))
                }));
            }
            (Some(Fault::TrustsTimeouts), Event::Tick) => {
                let zombies = self.state.leases.iter();
                let zombies = zombies.filter(|(_, lease)| {
                    matches!(lease.phase, crate::core::leases::Phase::Zombie(_))
                });
                more.extend(zombies.flat_map(|(_, lease)| {
                    let parties = lease.parties();
                    parties.map(|party| self.letting_go(party, lease.id, lease.generation))
                }));
            }
            (Some(Fault::TrustsClosedStreams), Event::Detach(session)) => {
                let process = self.state.session(*session).map(|session| session.process);
                more.extend(process.map(Event::ProcessGone));
            }
            (Some(Fault::SkipsScrubs), _) => more.extend(effects.iter().filter_map(|effect| {
                let Effect::Send(donor, message) = effect else {
                    return None;
                };
                let Outgoing::Scrub {
                    region,
                    slab,
                    generation,
                } = *message
                else {
                    return None;
                };
                Some(Event::Scrubbed {
                    caller: self.caller(*donor),
                    region,
                    slab,
                    generation,
                })
            })),
            (
                Some(Fault::IgnoresUnpublish),
                Event::Unpublish {
                    caller,
                    lease,
                    generation,
                    slots,
                },
            ) => {
                let mapping = self.world.client(caller.session);
                let mapping = mapping.and_then(|client| client.mapped.get(lease));
                let blocks =
                    slots
                        .iter()
                        .filter_map(|slot| match mapping.as_ref()?.uses.get(slot)? {
                            SlotUse::Published(block) => Some((hash(*block), *slot)),
                            SlotUse::NotBefore(_) => None,
                        });
                more.push(Event::Publish(Publish {
                    caller: *caller,
                    lease: *lease,
                    generation: *generation,
                    blocks: blocks.collect(),
                }));
            }
            (
                Some(Fault::TrustsStaleAcks),
                Event::Acknowledge {
                    caller,
                    lease,
                    generation,
                },
            ) => {
                let known = self.state.lease_ids.get(lease);
                let known = known.map(|key| &self.state.leases[*key]);
                let stale = known.filter(|known| known.generation > generation.0);
                more.extend(stale.map(|known| {
                    let session = caller.session;
                    self.letting_go(session, known.id, known.generation)
                }));
            }
            (Some(Fault::TrustsForeignAcks), Event::Acknowledge { lease, .. }) => {
                let known = self.state.lease_ids.get(lease);
                let known = known.map(|key| &self.state.leases[*key]);
                more.extend(known.into_iter().flat_map(|known| {
                    let parties = known.parties();
                    parties.map(|party| self.letting_go(party, known.id, known.generation))
                }));
            }
            (Some(Fault::TrustsClock), Event::Tick) => {
                let jumped = self.state.apply(Event::Tick, Now(self.now + 3_600_000));
                effects.extend(jumped);
                self.state.now = self.now;
            }
            (Some(Fault::ForgetsPins), Event::Lookup(lookup)) => {
                self.state.drop_pins_of(lookup.caller.session);
            }
            (Some(Fault::FindsUnreachable), Event::Lookup(lookup)) => {
                let anywhere = Event::Lookup(Lookup {
                    device: None,
                    borrower: None,
                    ..lookup.clone()
                });
                effects = self.state.apply(anywhere, Now(self.now));
            }
            (Some(Fault::ForgetsUnmappable), Event::Release { caller, .. }) => {
                self.state.forget_unmappable(caller.session);
            }
            (Some(Fault::TrustsOldKeeps), Event::Keep(keep)) if !keep.closed => {
                let again = Event::Keep(Keep {
                    anew: false,
                    kept: keep.dropped.clone(),
                    ..keep.clone()
                });
                self.state.apply(again, Now(self.now));
            }
            _ => {}
        }
        for event in more {
            let more = self.state.apply(event, Now(self.now)).into_iter();
            effects.extend(more.filter(|effect| !matches!(effect, Effect::Reply(_))));
        }
        effects
    }

    pub(super) fn caller(&self, session: SessionId) -> Caller {
        let process = self.state.sessions[&session].process;
        Caller { session, process }
    }

    pub(super) fn letting_go(&self, session: SessionId, lease: LeaseId, generation: u64) -> Event {
        Event::Acknowledge {
            caller: self.caller(session),
            lease,
            generation: Generation(generation),
        }
    }
}
