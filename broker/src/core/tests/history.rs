//! Random histories: what the processes of a node do, in what order, and what goes wrong in between.

use std::fmt;
use swiftcache_proto::domain::LeaseId;

use proptest::{prelude::*, sample};

use super::{
    faults::Fault,
    fixture::*,
    lines::Lines,
    oracle::Oracle,
    watching::{Follower, index},
    world::{Client, Mapping, World},
};
use crate::core::{CoreConfig, Effect, Event, Now, Record, Recorded, Reply, Sight, State, Watcher};

/// One step of a history; the numbers choose among what there is.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub(super) act: Act,
    pub(super) pick: [u8; 4],
}

impl fmt::Debug for Step {
    /// On one line: a history is read as a whole.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.act, self.pick)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Join,
    JoinAgain,
    Leave,
    Die,
    Attach,
    Detach,
    Resume,
    Offer,
    OfferAgain,

    Withdraw,
    WithdrawBytes,
    Lease,
    LeaseUnheard,
    Inherit,
    Release,
    Share,
    Write,
    PublishAgain,
    Unpublish,
    Lookup,
    Keep,
    Unpin,
    Acknowledge,
    AcknowledgeLate,
    PostArrives,
    StaleAcknowledge,
    ForeignMessage,
    Scrubbed,
    Tick,
    TimeSeemsToGoBack,
    Drain,
    Undrain,
    Evict,
    Compact,
    Restart,
    Recover,
    CrashInEvent,
    Carry,
    LoseConnection,
    Partition,
    Jump,
}

/// How often each happens, relative to the others.
const ACTS: &[(u32, Act)] = &[
    (3, Act::Join),
    (1, Act::JoinAgain),
    (1, Act::Leave),
    (2, Act::Die),
    (4, Act::Attach),
    (1, Act::Detach),
    (2, Act::Resume),
    (6, Act::Offer),
    (2, Act::OfferAgain),
    (2, Act::Withdraw),
    (1, Act::WithdrawBytes),
    (10, Act::Lease),
    (1, Act::LeaseUnheard),
    (4, Act::Inherit),
    (4, Act::Release),
    (8, Act::Share),
    (18, Act::Write),
    (4, Act::PublishAgain),
    (5, Act::Unpublish),
    (12, Act::Lookup),
    (4, Act::Keep),
    (2, Act::Unpin),
    (5, Act::Acknowledge),
    (1, Act::AcknowledgeLate),
    (1, Act::PostArrives),
    (1, Act::StaleAcknowledge),
    (2, Act::ForeignMessage),
    (6, Act::Scrubbed),
    (5, Act::Tick),
    (1, Act::TimeSeemsToGoBack),
    (1, Act::Drain),
    (3, Act::Undrain),
    (1, Act::Evict),
    (1, Act::Compact),
    (1, Act::Restart),
    (2, Act::Recover),
    (1, Act::CrashInEvent),
];

/// What happens besides where everything travels: most of all, that it arrives.
const TRAVELS: &[(u32, Act)] = &[
    (160, Act::Carry),
    (4, Act::LoseConnection),
    (12, Act::Resume),
    (3, Act::Partition),
    (2, Act::Jump),
];

pub(super) fn steps() -> impl Strategy<Value = Vec<Step>> {
    steps_of(ACTS.to_vec(), 160)
}

/// For histories in which every message takes its time, or is lost.
pub(super) fn travelling_steps() -> impl Strategy<Value = Vec<Step>> {
    steps_of([ACTS, TRAVELS].concat(), 400)
}

fn steps_of(acts: Vec<(u32, Act)>, most: usize) -> impl Strategy<Value = Vec<Step>> {
    let acts: Vec<Act> = acts
        .iter()
        .flat_map(|(times, act)| std::iter::repeat_n(*act, *times as usize))
        .collect();
    let step = (sample::select(acts), any::<[u8; 4]>()).prop_map(|(act, pick)| Step { act, pick });
    prop::collection::vec(step, 1..most)
}

/// A node and its broker.
pub(super) struct History {
    pub(super) state: State,
    pub(super) config: CoreConfig,
    pub(super) ledger: Vec<Record>,
    /// The copy of the ledger in memory, unless a fault makes the broker differ on purpose.
    recorded: Option<Recorded>,
    pub(super) now: u64,
    pub(super) world: World,
    /// `None` when a fault makes the broker differ on purpose.
    pub(super) oracle: Option<Oracle>,
    pub(super) fault: Option<Fault>,
    /// Acknowledgements on their way.
    pub(super) post: Vec<Event>,
    pub(super) drawn: u64,
    /// The next event's records reach the disk only up to here, and its effects nobody.
    pub(super) crash_after: Option<usize>,
    /// Somebody who watches the index.
    pub(super) follower: Follower,
    /// What is on its way, where messages take their time.
    pub(super) lines: Lines,
    pub(super) queued: bool,
}

pub(super) type Outcome<T = ()> = Result<T, String>;

pub(super) fn pick<T>(list: &[T], number: u8) -> Option<&T> {
    list.get(number as usize % list.len().max(1))
}

impl History {
    pub(super) fn new(fault: Option<Fault>) -> Self {
        let config = CoreConfig {
            pin_ms: 400,
            default_drain_ms: 300,
            wait_ms: 500,
            estate_ttl_ms: 900,
            tenant_weights: [("1001".to_owned(), 2)].into(),
            namespace_weights: [("other".to_owned(), 3)].into(),
            // Some watchers fall behind.
            max_journal: 12,
            ..CoreConfig::default()
        };
        let state = State::new(config.clone(), node());
        Self {
            recorded: fault.is_none().then(|| Recorded::of(&state).unwrap()),
            state,
            oracle: fault.is_none().then(|| Oracle::new(config.clone())),
            config,
            ledger: Vec::new(),
            now: 1_000,
            world: World::default(),
            fault,
            post: Vec::new(),
            drawn: 0,
            crash_after: None,
            follower: Follower::new(Sight::default()),
            lines: Lines::new(),
            queued: false,
        }
    }

    /// One in which every message takes its time, or is lost.
    pub(super) fn travelling(fault: Option<Fault>) -> Self {
        Self {
            queued: true,
            ..Self::new(fault)
        }
    }

    /// Runs a history to its end, or to the first thing that must not happen. It begins with two tenants and
    /// something on offer, so that a short one gets somewhere.
    pub(super) fn run(mut self, steps: &[Step]) -> Outcome {
        let first = |act, pick| Step { act, pick };
        for step in [
            first(Act::Join, [0, 1, 0, 0]),
            first(Act::Join, [0, 1, 0, 0]),
            first(Act::Join, [0, 1, 0, 0]),
            first(Act::Join, [0, 4, 0, 0]),
            first(Act::Offer, [0, 1, 2, 2]),
            first(Act::Offer, [1, 2, 3, 3]),
        ] {
            self.step(step)?;
        }
        self.carry_all()?;
        for (number, step) in steps.iter().enumerate() {
            self.step(*step)
                .map_err(|wrong| format!("step {number} ({step:?}): {wrong}"))?;
        }
        Ok(())
    }

    /// Gives the broker an event, verifies everything, and lets the world hear of it.
    pub(super) fn apply(&mut self, event: Event) -> Outcome<Option<Reply>> {
        if let Event::Offer(offer) = &event {
            self.world.offered(offer);
        }
        let effects = self.state.apply(self.mishear(&event), Now(self.now));
        if let Some(crash_after) = self.crash_after.take() {
            return self.crash(&effects, crash_after);
        }
        let effects = self.misbehave(&event, effects);
        self.state.check()?;
        if let Some(oracle) = &mut self.oracle {
            oracle.follow(&event, self.now, &effects)?;
            oracle.agrees_with(&self.state)?;
        }
        self.watch()?;
        self.world.witness(&effects)?;
        let mut reply = None;
        for effect in effects {
            match effect {
                Effect::Record(record) if reply.is_some() => {
                    return Err(format!("{record:?} is written after the reply"));
                }
                Effect::Record(record) => {
                    if let Some(recorded) = &mut self.recorded {
                        recorded.add(record.clone())?;
                    }
                    self.ledger.push(record);
                }
                Effect::Send(session, message) => self.say(session, message),
                Effect::Reply(said) => reply = Some(said),
                _ => {}
            }
        }
        if let Some(recorded) = &self.recorded {
            let (has, is) = (recorded.records(), self.state.records());
            if has != is {
                return Err(format!("recorded is {has:?}, not {is:?}"));
            }
        }
        // A new handle may be one that can be mapped.
        if let (Event::Offer(offer), Some(Reply::Done)) = (&event, &reply) {
            for client in &mut self.world.clients {
                client.unmappable.remove(&offer.region);
            }
        }
        Ok(reply)
    }

    /// Whoever watches reads on, a little now and then. What it knows is what there is, whenever it is told so.
    fn watch(&mut self) -> Outcome {
        self.follower.turns += 1;
        let most = self.follower.turns % 4;
        if most == 0 {
            return Ok(());
        }
        let watched = self.follower.read(&self.state, most);
        let index = index(&self.state);
        match watched.current && self.follower.known != index {
            true => Err(format!(
                "a watcher knows {:?}, not {index:?}",
                self.follower.known
            )),
            false => Ok(()),
        }
    }

    /// The broker dies in the middle of writing an event's records.
    fn crash(&mut self, effects: &[Effect], after: usize) -> Outcome<Option<Reply>> {
        let records: Vec<_> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Record(record) => Some(record.clone()),
                _ => None,
            })
            .collect();
        // A slab that was granted to somebody who never heard of it is still that somebody's.
        let written = after % (records.len() + 1);
        let written: Vec<_> = records.into_iter().take(written).collect();
        let on_disk: Vec<_> = written.iter().cloned().map(Effect::Record).collect();
        self.world.witness(&on_disk)?;
        self.ledger.extend(written);
        self.restart()?;
        self.oracle = self.oracle.take().map(|_| Oracle::adopt(&self.state));
        Ok(None)
    }

    pub(super) fn restart(&mut self) -> Outcome {
        let lost = |record: &Record| match self.fault {
            Some(Fault::LosesShares) => matches!(record, Record::Share { .. }),
            Some(Fault::LosesScrubs) => {
                matches!(record, Record::Scrubbing { .. } | Record::Scrubbed { .. })
            }
            Some(Fault::LosesLeases) => matches!(
                record,
                Record::Lease { .. }
                    | Record::Share { .. }
                    | Record::Revoked { .. }
                    | Record::LetGo { .. }
            ),
            _ => false,
        };
        let ledger: Vec<_> = self
            .ledger
            .iter()
            .filter(|record| !lost(record))
            .cloned()
            .collect();
        let restored = State::restore(self.config.clone(), node(), ledger);
        self.state = restored.map_err(|error| error.to_string())?;
        // Its numbers are another broker's.
        self.follower.watcher = Watcher::new(Sight::default(), None);
        if let Some(recorded) = &mut self.recorded {
            *recorded = Recorded::of(&self.state)?;
        }
        for client in &mut self.world.clients {
            client.behind = true;
            client.keeps.clear();
            client.unmappable.clear();
            client.opening.clear();
        }
        self.lines.clear();
        self.state.check()?;
        if self.fault == Some(Fault::ForgetsEarlierPins) {
            self.state.books.config.pin_ms = 0;
            self.apply(Event::Tick)?;
            self.state.books.config.pin_ms = self.config.pin_ms;
        }
        Ok(())
    }

    pub(super) fn any_client(&self, number: u8) -> Option<Client> {
        pick(&self.world.clients, number).cloned()
    }

    pub(super) fn any_mapping(
        &self,
        client: &Client,
        number: u8,
        lessee: bool,
    ) -> Option<(LeaseId, Mapping)> {
        let mapped: Vec<_> = client
            .mapped
            .iter()
            .filter(|(_, mapping)| mapping.lessee == lessee)
            .collect();
        let (lease, mapping) = pick(&mapped, number)?;
        Some((**lease, (*mapping).clone()))
    }
}
