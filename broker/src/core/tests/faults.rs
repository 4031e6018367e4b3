//! Brokers that are broken on purpose.

use super::{fixture::hash, history::History, world::SlotUse};
use crate::core::leases::{Lease, Phase};
use crate::core::{
    Caller, Connection, Effect, Event, Keep, Lookup, Now, Offer, Outgoing, Process, Publish,
};
use swiftcache_proto::domain::SessionId;

/// The process of a session that nobody knows.
const GONE: Process = Process {
    pid: 0,
    birth: 0,
    uid: 0,
};

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
    /// Tenants share allocations whose donors did not agree.
    SharesAllocations,
    /// A clock that jumps ahead for a moment ends pins.
    TrustsClock,
}

impl History {
    /// What a broken broker takes an event for.
    pub(super) fn mishear(&self, event: &Event) -> Event {
        match (self.fault, event) {
            (Some(Fault::SharesAllocations), Event::Offer(offer)) => Event::Offer(Offer {
                shared: true,
                ..offer.clone()
            }),
            _ => event.clone(),
        }
    }

    /// What a broken broker would do besides.
    pub(super) fn misbehave(&mut self, event: &Event, mut effects: Vec<Effect>) -> Vec<Effect> {
        let mut more: Vec<Event> = Vec::new();
        match (self.fault, event) {
            (Some(Fault::ForgetsReaders), Event::Acknowledge { .. } | Event::Release { .. }) => {
                let leases = self.state.books.leases.iter();
                let orphans = leases.filter(|(_, lease)| !lease.lessee_holds());
                more.extend(orphans.flat_map(|(_, lease)| self.all_let_go(lease)));
            }
            (Some(Fault::TrustsTimeouts), Event::Tick) => {
                let leases = self.state.books.leases.iter();
                let zombies = leases.filter(|(_, lease)| matches!(lease.phase(), Phase::Zombie(_)));
                more.extend(zombies.flat_map(|(_, lease)| self.all_let_go(lease)));
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
                let known = self.state.books.leases.find(*lease);
                let stale = known.filter(|(_, known)| known.terms().generation > *generation);
                let session = caller.session;
                more.extend(stale.map(|(_, known)| self.letting_go(session, known)));
            }
            (Some(Fault::TrustsForeignAcks), Event::Acknowledge { lease, .. }) => {
                let known = self.state.books.leases.find(*lease);
                more.extend(
                    known
                        .into_iter()
                        .flat_map(|(_, known)| self.all_let_go(known)),
                );
            }
            (Some(Fault::TrustsClock), Event::Tick) => {
                let jumped = self.state.apply(Event::Tick, Now(self.now + 3_600_000));
                effects.extend(jumped);
                self.state.books.now = self.now;
            }
            (Some(Fault::ForgetsPins), Event::Lookup(lookup)) => {
                self.state.books.pins.end_all_of(lookup.caller.session);
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
                self.state.books.unmappable.forget_session(caller.session);
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
        let known = self.state.books.sessions.get(session);
        let process = known.map_or(GONE, |known| known.process());
        Caller {
            session,
            process,
            connection: Connection::default(),
        }
    }

    fn letting_go(&self, session: SessionId, lease: &Lease) -> Event {
        Event::Acknowledge {
            caller: self.caller(session),
            lease: lease.terms().id,
            generation: lease.terms().generation,
        }
    }

    /// Everyone who may touch a lease's slab lets go of it.
    fn all_let_go(&self, lease: &Lease) -> Vec<Event> {
        let parties = lease.parties();
        parties.map(|party| self.letting_go(party, lease)).collect()
    }
}
