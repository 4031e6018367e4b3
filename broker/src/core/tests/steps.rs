//! What one step of a history does.

use swiftcache_proto::domain::{DeviceUuid, Generation, LeaseId, SessionId};

use super::{
    fixture::*,
    history::{Act, History, Outcome, Step, pick},
    world::{Client, Mapping},
};
use crate::core::{
    Caller, Connection, Event, Outgoing, Process, Publish, Register, Reply, WithdrawWhat,
};

pub(super) const TENANTS: [&str; 3] = ["1000", "1001/blue", "1000/green"];
/// Processes at a time.
const CLIENTS: usize = 7;

/// A device, now and then one that the node lacks.
pub(super) fn any_device(number: u8) -> DeviceUuid {
    device(if number.is_multiple_of(16) {
        9
    } else {
        u32::from(number) % 4
    })
}

impl History {
    pub(super) fn step(&mut self, step: Step) -> Outcome {
        let [a, b, c, d] = step.pick;
        match step.act {
            Act::Join => {
                let process = self.process();
                self.join(process, b)
            }
            Act::JoinAgain => match self.any_client(a) {
                Some(client) => self.join(client.caller.process, b),
                None => Ok(()),
            },
            Act::Tick => {
                self.now += u64::from(a) * if b.is_multiple_of(4) { 4 } else { 1 };
                self.apply(Event::Tick).map(drop)
            }
            // A broker's own clock starts with it.
            Act::TimeSeemsToGoBack if self.state.unsettled => Ok(()),
            Act::TimeSeemsToGoBack => {
                let now = self.now;
                self.now = now.saturating_sub(u64::from(a) * 10);
                let outcome = self.apply(Event::Tick);
                self.now = now;
                outcome.map(drop)
            }
            Act::PostArrives => {
                if self.post.is_empty() {
                    return Ok(());
                }
                let event = self.post.remove(a as usize % self.post.len());
                self.apply(event).map(drop)
            }
            Act::Drain => self.drain(a, b),
            Act::Undrain => self.undrain(a, b),
            Act::Evict => self.evict(a, b),
            Act::Compact => {
                self.ledger = self.state.records();
                Ok(())
            }
            Act::Restart => {
                let before = self.state.records();
                self.restart()?;
                let Some(oracle) = &mut self.oracle else {
                    return Ok(());
                };
                oracle.restart();
                oracle.agrees_with(&self.state)?;
                let after = self.state.records();
                match before == after {
                    true => Ok(()),
                    false => Err(format!("restored {after:?} of {before:?}")),
                }
            }
            Act::Recover => {
                if self.is_queued() {
                    return self.come_back();
                }
                for number in 0..self.world.clients.len() {
                    self.recover(number)?;
                }
                Ok(())
            }
            Act::Carry => self.carry(a, b),
            Act::LoseConnection => match self.any_client(a) {
                Some(client) => self.lose_connection(client.caller.session),
                None => Ok(()),
            },
            Act::Partition => {
                self.partition(a, b);
                Ok(())
            }
            Act::Jump => {
                self.now += u64::from(a) * 1_000;
                self.apply(Event::Tick).map(drop)
            }
            Act::CrashInEvent => {
                self.crash_after = Some(a as usize);
                Ok(())
            }
            act => match self.any_client_for(act, a) {
                Some(client) => self.client_acts(act, client, [b, c, d]),
                None => Ok(()),
            },
        }
    }

    /// A session that has something to do this with, if there is one.
    fn any_client_for(&self, act: Act, number: u8) -> Option<Client> {
        let able = |client: &&Client| match act {
            Act::Write | Act::PublishAgain | Act::Unpublish => {
                client.mapped.values().any(|mapping| mapping.lessee)
            }
            Act::Release => !client.mapped.is_empty(),
            Act::Unpin => !client.pins.is_empty(),
            Act::Acknowledge | Act::AcknowledgeLate | Act::StaleAcknowledge => {
                !client.told.is_empty()
            }
            Act::Scrubbed => !client.scrubs.is_empty(),
            Act::OfferAgain | Act::Withdraw => !client.offers.is_empty(),
            _ => true,
        };
        // One that has lost its connection can only come back, or die.
        let speaks = |client: &&Client| {
            let silent = self.is_queued() && client.behind;
            match act {
                Act::Resume => !self.is_queued() || client.behind,
                Act::Die => true,
                _ => !silent,
            }
        };
        let clients = self.world.clients.iter().filter(able).filter(speaks);
        let clients: Vec<_> = clients.collect();
        pick(&clients, number).map(|client| (*client).clone())
    }

    fn client_acts(&mut self, act: Act, client: Client, [b, c, d]: [u8; 3]) -> Outcome {
        let (caller, id) = (client.caller, client.caller.session);
        match act {
            Act::Leave => {
                self.world.leave(|client| client.caller.session == id);
                self.lines.remove(&id);
                self.apply(Event::Leave(caller)).map(drop)
            }
            Act::Die => {
                self.world
                    .leave(|client| client.caller.process == caller.process);
                self.apply(Event::ProcessGone(caller.process)).map(drop)
            }
            Act::Attach => self.tell(Event::Attach(caller)),
            Act::Detach if self.is_queued() => self.lose_connection(id),
            Act::Detach => self.apply(Event::Detach(id)).map(drop),
            Act::Resume => self.resume(&client, c),
            Act::Offer => self.offer(&client, b, c, d),
            Act::OfferAgain => self.offer_again(&client, b),
            Act::Withdraw => self.withdraw_one(&client, b, c),
            Act::WithdrawBytes => {
                let what = WithdrawWhat::Bytes {
                    device: any_device(b),
                    bytes: u64::from(c) % 5 * SLAB,
                };
                self.send_withdraw(caller, what, d)
            }
            Act::Lease => self.lease(&client, [b, c, d]),
            Act::LeaseUnheard => {
                let demand = Self::demand_of(&client, [b, c, d]);
                self.tell(Event::Lease(demand))
            }
            Act::Inherit => self.inherit(&client, [b, c, d]),
            Act::Release => self.release(&client, [b, c, d]),
            Act::Share => self.share(&client, b, c),
            Act::Write => self.write(&client, [b, c, d]),
            Act::PublishAgain => self.publish_again(&client, b),
            Act::Unpublish => self.unpublish(&client, b, c),
            Act::Lookup => self.lookup(&client, [b, c, d]),
            Act::Keep => self.keep(&client, [b, c, d]),
            Act::Unpin => {
                let Some(pin) = pick(&client.pins, b).copied() else {
                    return Ok(());
                };
                self.world.done_reading(id, pin);
                self.tell(Event::Unpin {
                    caller,
                    pins: vec![pin],
                })
            }
            Act::Acknowledge | Act::AcknowledgeLate => {
                let Some((lease, generation)) = pick(&client.told, b).copied() else {
                    return Ok(());
                };
                self.world.let_go(id, lease);
                let event = Event::Acknowledge {
                    caller,
                    lease,
                    generation,
                };
                if matches!(act, Act::AcknowledgeLate) {
                    self.post.push(event);
                    return Ok(());
                }
                self.post.push(event.clone());
                self.tell(event)
            }
            Act::StaleAcknowledge => match pick(&client.told, b).copied() {
                Some((lease, generation)) => self
                    .apply(Event::Acknowledge {
                        caller,
                        lease,
                        generation: Generation(generation.0 - 1),
                    })
                    .map(drop),
                None => Ok(()),
            },
            Act::ForeignMessage => self.foreign(&client, [b, c, d]),
            Act::Scrubbed => {
                let scrubs: Vec<_> = client.scrubs.iter().copied().collect();
                let Some(scrub) = pick(&scrubs, b).copied() else {
                    return Ok(());
                };
                self.world.zero(id, scrub);
                let event = Event::Scrubbed {
                    caller,
                    region: scrub.0,
                    slab: scrub.1,
                    generation: scrub.2,
                };
                self.post.push(event.clone());
                self.tell(event)
            }
            other => unreachable!("{other:?} is no client's act"),
        }
    }

    fn process(&mut self) -> Process {
        self.drawn += 1;
        Process {
            pid: self.drawn as u32,
            birth: 1,
            uid: 1_000,
        }
    }

    fn join(&mut self, process: Process, b: u8) -> Outcome {
        if self.world.clients.len() >= CLIENTS {
            return Ok(());
        }
        self.drawn += 1;
        let tenant = match b % 8 {
            0 => TENANTS[1],
            4 => TENANTS[2],
            _ => TENANTS[0],
        };
        let register = Register {
            process,
            fresh_id: SessionId(self.drawn << 48),
            name: format!("client {}", self.drawn),
            tenant: tenant.to_owned(),
            resume: None,
            held: Vec::new(),
            shared: Vec::new(),
            connection: Connection::default(),
        };
        if let Some(Reply::Registered { session, .. }) = self.apply(Event::Register(register))? {
            let caller = Caller {
                session,
                process,
                connection: Connection::default(),
            };
            self.world.enter(caller, tenant);
            self.apply(Event::Attach(caller))?;
        }
        Ok(())
    }

    /// What a process does after a broker restart.
    fn recover(&mut self, number: usize) -> Outcome {
        let Some(client) = self.world.clients.get(number).cloned() else {
            return Ok(());
        };
        self.resume(&client, 1)?;
        self.apply(Event::Attach(client.caller))?;
        for number in 0..client.offers.len() as u8 {
            if let Some(client) = self.world.client(client.caller.session).cloned() {
                self.offer_again(&client, number)?;
            }
        }
        self.publish_again(&client, 0)
    }

    pub(super) fn resume(&mut self, client: &Client, c: u8) -> Outcome {
        let (held, shared): (Vec<_>, Vec<_>) = client
            .mapped
            .iter()
            .partition(|(_, mapping)| mapping.lessee);
        let ids = |list: Vec<(&LeaseId, &Mapping)>| -> Vec<LeaseId> {
            list.into_iter().map(|(lease, _)| *lease).collect()
        };
        let mut held = ids(held);
        if c.is_multiple_of(5) {
            held.push(LeaseId(u64::from(c)));
        }
        let register = Register {
            process: client.caller.process,
            fresh_id: SessionId(7),
            name: "again".to_owned(),
            tenant: client.tenant.clone(),
            resume: Some(client.caller.session),
            held,
            shared: ids(shared),
            connection: Connection::default(),
        };
        let client = client.clone();
        self.call(Event::Register(register), move |history, reply| {
            history.resumed(&client, reply)
        })
    }

    fn resumed(&mut self, client: &Client, reply: Option<Reply>) -> Outcome {
        let id = client.caller.session;
        match reply {
            Some(Reply::Registered {
                refused, regions, ..
            }) => {
                for lease in refused {
                    self.world.unmap(id, lease);
                }
                // What the broker no longer knows has come back.
                for region in client.offers.keys().filter(|id| !regions.contains(id)) {
                    self.world.hear(id, &Outgoing::Returned(*region));
                }
                if let Some(client) = self.world.client(id) {
                    client.behind = false;
                }
                match self.is_queued() {
                    true => self.tell(Event::Attach(client.caller)),
                    false => Ok(()),
                }
            }
            // A session that the broker lost: the process lets go of everything.
            Some(Reply::Refused(_)) => {
                self.world.leave(|client| client.caller.session == id);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A process speaks for another's session, lease or region.
    fn foreign(&mut self, client: &Client, [b, c, d]: [u8; 3]) -> Outcome {
        let Some(other) = self.any_client(b) else {
            return Ok(());
        };
        let (lease, generation) = match other.mapped.iter().nth(usize::from(c % 3)) {
            Some((lease, mapping)) if !client.mapped.contains_key(lease) => {
                (*lease, mapping.generation)
            }
            _ => return Ok(()),
        };
        let stolen = Caller {
            session: other.caller.session,
            process: client.caller.process,
            connection: Connection::default(),
        };
        if stolen == other.caller {
            return Ok(());
        }
        let caller = if d & 1 == 1 { stolen } else { client.caller };
        let event = match d % 6 {
            0 | 1 => Event::Acknowledge {
                caller,
                lease,
                generation,
            },
            2 | 3 => Event::Release {
                caller,
                leases: vec![lease],
                unmappable: true,
                bequeath: false,
            },
            4 => Event::Unpublish {
                caller,
                lease,
                generation,
                slots: vec![0],
            },
            // Never as a session that may publish there: nothing was written.
            _ => Event::Publish(Publish {
                caller: stolen,
                lease,
                generation,
                blocks: vec![(hash(0), 0)],
            }),
        };
        self.apply(event).map(drop)
    }
}
