//! The single owner of [`State`]. It has two locks, and neither of them is held across an await.
//!
//! * The *state's lock* is held while the core computes, or while one page of a list is read.
//! * The *desk's lock* is held by whoever carries out the effects of an event: appends records to the ledger and sends
//!   messages. It is taken before the state's lock, so that effects are carried out in the order in which their events
//!   were applied.
//!
//! One thread serves at a time. Work at the desk may have to wait for a disk: then another thread goes on serving. One
//! event at a time is at the desk. Some events have no effect but an answer: lookups, and what borrowers say of their
//! blocks. They take the state's lock only. So a lookup never waits for a disk, and lists and scrapes let it through
//! between two of their pages. Why it is built this way: `docs/decisions/0022-two-locks.md`.

mod attach;
mod desk;
mod reports;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use desk::Desk;
use parking_lot::Mutex;
use swiftcache_proto::{domain::SessionId, v1};
use tokio::{
    sync::{mpsc, watch},
    task::block_in_place,
};
use tokio_util::sync::CancellationToken;

use crate::{
    core::{Caller, Connection, Effect, Event, Note, Now, Offer, Process, Register, Reply, State},
    death::DeathWatch,
    descriptors::Descriptors,
    error::Refused,
    events::{EventLog, Wanted, describe, detail, unix_ms},
    ledger::Ledger,
    logging::Sparse,
    metrics::Metrics,
    peer::Peer,
};

pub(crate) use attach::Attached;
pub(crate) use reports::{Reported, Reports};

/// Any member can cause these warnings, so they are rate-limited.
static ZOMBIES: Sparse = Sparse::new();
static GONE: Sparse = Sparse::new();

/// The most entries of a list that are read while the state is locked once.
pub(crate) const PAGE: usize = 256;

/// The owner of the broker's state.
pub struct Owner {
    /// Whose turn at the desk it is. Callers wait here without a thread, so at most one thread waits for a disk.
    turn: tokio::sync::Mutex<()>,
    desk: Mutex<Desk>,
    /// Nothing at the desk waits for a device.
    ledger_is_memory: bool,
    state: Mutex<State>,
    reports: Mutex<Reports>,
    events: Mutex<EventLog>,
    /// The number of the index's last change.
    changed: watch::Sender<u64>,
    /// The broker is shutting down.
    closing: CancellationToken,
    /// Attached streams and watched processes, after the last event at the desk.
    attached: AtomicUsize,
    watched: AtomicUsize,
    descriptors: Descriptors,
    metrics: Arc<Metrics>,
    started: Instant,
    started_unix_ms: u64,
    boot_id: u64,
    /// A disk may have something to do.
    disk_work: tokio::sync::Notify,
}

/// The parts of an owner.
pub struct Parts {
    /// The core, restored from the ledger.
    pub state: State,
    /// The ledger.
    pub ledger: Ledger,
    /// The channel that receives processes that have died.
    pub deaths: mpsc::UnboundedSender<Process>,
    /// The most descriptors that are kept for donors.
    pub max_descriptors: usize,
    /// The metrics.
    pub metrics: Arc<Metrics>,
}

impl Owner {
    /// An owner of the state. Draws the broker's boot id.
    pub fn new(parts: Parts) -> Self {
        let deaths = DeathWatch::new(parts.deaths);
        let ledger_is_memory = parts.ledger.is_memory();
        let desk = Desk::new(&parts.state, parts.ledger, deaths);
        Self {
            turn: tokio::sync::Mutex::default(),
            desk: Mutex::new(desk),
            ledger_is_memory,
            state: Mutex::new(parts.state),
            reports: Mutex::default(),
            events: Mutex::default(),
            changed: watch::Sender::new(0),
            closing: CancellationToken::new(),
            attached: AtomicUsize::new(0),
            watched: AtomicUsize::new(0),
            descriptors: Descriptors::new(parts.max_descriptors),
            metrics: parts.metrics,
            started: Instant::now(),
            started_unix_ms: unix_ms(),
            boot_id: rand::random(),
            disk_work: tokio::sync::Notify::new(),
        }
    }

    /// The boot id, which was drawn at random when the broker started.
    pub fn boot_id(&self) -> u64 {
        self.boot_id
    }

    /// The time since the broker started.
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The time at which the core's clock was 0, in milliseconds since 1970.
    pub fn started_unix_ms(&self) -> u64 {
        self.started_unix_ms
    }

    /// The present time on the core's clock.
    pub fn now(&self) -> Now {
        Now(u64::try_from(self.uptime().as_millis()).unwrap_or(u64::MAX))
    }

    /// Told each time that a disk may have something to do.
    pub(crate) fn disk_work(&self) -> &tokio::sync::Notify {
        &self.disk_work
    }

    /// The descriptors of donors.
    pub fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Watches every process that the restored state names, and finishes what the broker before this one had begun.
    /// Called once, before the sockets open. When a process has died already, its death arrives on the channel like any
    /// other.
    pub async fn watch_restored(self: &Arc<Self>) -> Result<(), Refused> {
        self.at_desk(|owner, desk| {
            let processes: Vec<Process> = owner.state.lock().processes().collect();
            for process in processes {
                desk.deaths.watch_known(process);
            }
            desk.apply(owner, Event::Tick);
        })
        .await
    }

    /// Applies an event and returns the answer to its caller. When this returns, the ledger has everything that the
    /// answer depends on. The event is applied to its end, also when the caller stops waiting.
    ///
    /// # Errors
    /// When the core refuses, or when a grant could not be recorded and was taken back.
    pub async fn apply(self: &Arc<Self>, event: Event) -> Result<Reply, Refused> {
        if only_answered(&event) {
            return answer(self.answer_only(event));
        }
        self.at_desk(|owner, desk| desk.handle(owner, event))
            .await?
    }

    /// Like [`Self::apply`], for what an operator does. Log and events say that it was `by`.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn apply_by(self: &Arc<Self>, event: Event, by: String) -> Result<Reply, Refused> {
        self.at_desk(move |owner, desk| {
            desk.by = Some(by);
            desk.handle(owner, event)
        })
        .await?
    }

    /// Applies several events, one after the other, up to the first that is refused.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn apply_all(self: &Arc<Self>, events: Vec<Event>) -> Result<(), Refused> {
        if events.iter().all(only_answered) {
            let mut events = events.into_iter();
            return events.try_for_each(|event| answer(self.answer_only(event)).map(drop));
        }
        self.at_desk(|owner, desk| {
            let mut events = events.into_iter();
            events.try_for_each(|event| desk.handle(owner, event).map(drop))
        })
        .await?
    }

    /// Puts a region on offer. If `by_descriptor`, the descriptor that the donor has uploaded is kept from now on. If the
    /// offer is refused, the descriptor is closed.
    ///
    /// # Errors
    /// When the core refuses.
    pub async fn offer(self: &Arc<Self>, offer: Offer, by_descriptor: bool) -> Result<(), Refused> {
        self.at_desk(move |owner, desk| {
            let (caller, allocation) = (offer.caller, offer.allocation);
            let outcome = desk.handle(owner, Event::Offer(offer));
            match &outcome {
                // Before the next event, which may give the allocation back.
                Ok(_) if by_descriptor => owner.descriptors.offered(caller.session, allocation),
                Err(_) if owner.is_session_of(caller.session, caller.process) => {
                    owner.descriptors.refused(caller.session, allocation);
                }
                _ => {}
            }
            outcome.map(drop)
        })
        .await?
    }

    /// Does work at the desk, in the order of the calls. If it may wait for a disk, another thread serves meanwhile. It is
    /// done to its end, also when the caller stops waiting for it.
    ///
    /// # Errors
    /// When the work panicked.
    async fn at_desk<T>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>, &mut Desk) -> T,
    ) -> Result<T, Refused> {
        let _turn = self.turn.lock().await;
        let at_desk = || {
            let mut desk = self.desk.lock();
            let done = catch_unwind(AssertUnwindSafe(|| work(self, &mut desk)));
            desk.by = None;
            self.attached.store(desk.streams.count(), Ordering::Relaxed);
            self.watched.store(desk.deaths.count(), Ordering::Relaxed);
            done.map_err(|_| Refused::Bug)
        };
        // To wake another thread takes longer than most work at the desk.
        match self.ledger_is_memory {
            true => at_desk(),
            false => block_in_place(at_desk),
        }
    }

    /// Has the core decide what an event leads to.
    fn decide(&self, event: Event) -> Vec<Effect> {
        let now = self.now();
        let (effects, sequence) = {
            let mut state = self.state.lock();
            (state.apply(event, now), state.sequence())
        };
        self.changed.send_if_modified(|told| {
            let more = *told < sequence;
            *told = sequence.max(*told);
            more
        });
        effects
    }

    /// Tells whenever the index has changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Cancelled when the broker shuts down.
    pub(crate) fn closing(&self) -> &CancellationToken {
        &self.closing
    }

    /// Applies an event that has no effect but an answer.
    fn answer_only(&self, event: Event) -> Option<Reply> {
        let mut reply = None;
        for effect in self.decide(event) {
            match effect {
                Effect::Reply(given) => reply = Some(given),
                Effect::Note(note) => self.tell(&note, None),
                other => debug_assert!(false, "{other:?} is not carried out"),
            }
        }
        reply
    }

    /// Tells people and metrics. `by` is the operator who did it, if one did.
    fn tell(&self, note: &Note, by: Option<&str>) {
        self.metrics.note(note);
        match note {
            Note::Left { session } | Note::Gone { session, .. } => {
                self.reports.lock().forget(*session);
            }
            Note::DiskWork => self.disk_work.notify_waiters(),
            Note::Refused { refusal } => tracing::debug!(%refusal, "refused"),
            _ => {}
        }
        if let Some((kind, mut text)) = describe(note) {
            if let (Some(by), true) = (by, is_deed(note)) {
                text += &format!(", by {by}");
            }
            match note {
                Note::Zombie { .. } => match ZOMBIES.turn() {
                    Some(withheld) => tracing::warn!(kind, withheld, "{text}"),
                    None => tracing::debug!(kind, "{text}"),
                },
                Note::Gone { .. } => match GONE.turn() {
                    Some(withheld) => tracing::warn!(kind, withheld, "{text}"),
                    None => tracing::debug!(kind, "{text}"),
                },
                // One for each lease or region, of which an agent's slab is one: thousands a second on a busy node.
                // `ListEvents` and `swiftcache top` show them.
                Note::Offered { .. }
                | Note::Withdrawing { .. }
                | Note::Returned { .. }
                | Note::Leased { .. }
                | Note::LeftEstate { .. }
                | Note::Inherited { .. }
                | Note::LeaseShort { .. }
                | Note::Revoked { .. }
                | Note::LeaseEnded { .. } => tracing::debug!(kind, "{text}"),
                _ => tracing::info!(kind, "{text}"),
            }
            self.events.lock().push(kind, text, detail(note));
        }
    }

    /// Opens or resumes a session for the peer's process.
    ///
    /// # Errors
    /// When the core refuses, or when the process's death cannot be watched.
    pub async fn register(
        self: &Arc<Self>,
        peer: Peer,
        register: Register,
    ) -> Result<Reply, Refused> {
        self.at_desk(move |owner, desk| {
            if desk.closing {
                return Err(Refused::ShuttingDown);
            }
            if (desk.deaths.image(peer.process)).is_some_and(|had| had.is_gone_before(&peer)) {
                desk.has_become_another(owner, peer.process);
            }
            // A process that cannot be watched gets no session, so the watch comes first.
            desk.deaths.watch_peer(&peer).map_err(|error| {
                Refused::Unwatchable(format!(
                    "process {}: its death cannot be watched: {error}",
                    peer.process.pid
                ))
            })?;
            let done = desk.apply(owner, Event::Register(register));
            if !owner.state.lock().knows(peer.process) {
                desk.deaths.unwatch(peer.process);
            }
            answer(done.reply)
        })
        .await?
    }

    /// Tells the core that time has passed.
    pub async fn tick(self: &Arc<Self>) {
        self.descriptors.expire(Instant::now());
        let ticked = self.at_desk(|owner, desk| {
            desk.apply(owner, Event::Tick);
            desk.ledger.check();
            if desk.ledger.wants_rewrite() {
                desk.rewrite(owner);
            }
        });
        if let Err(error) = ticked.await {
            tracing::error!(%error, "a tick failed");
        }
    }

    /// Tells the core that a process has died.
    pub async fn process_gone(self: &Arc<Self>, process: Process) {
        let told = self.at_desk(move |owner, desk| {
            desk.apply(owner, Event::ProcessGone(process));
            desk.deaths.unwatch(process);
        });
        if let Err(error) = told.await {
            tracing::error!(%error, pid = process.pid, "the end of a process could not be dealt with");
        }
    }

    /// Ends the sessions of processes that have become other programs. Their streams have ended with that.
    pub async fn look_for_other_programs(self: &Arc<Self>) {
        let detached = self.at_desk(|owner, desk| {
            let detached = owner.read(State::detached_processes).into_iter();
            let known = detached.filter_map(|it| Some((it, desk.deaths.image(it)?)));
            known.collect::<Vec<_>>()
        });
        for (process, image) in detached.await.unwrap_or_default() {
            if !image.is_gone_from(process) {
                continue;
            }
            let told = self.at_desk(move |owner, desk| {
                // Unless it has opened a session of its own meanwhile.
                if desk.deaths.image(process) == Some(image) {
                    desk.has_become_another(owner, process);
                }
            });
            if let Err(error) = told.await {
                tracing::error!(%error, pid = process.pid, "the end of a program could not be dealt with");
            }
        }
    }

    /// Whether the session belongs to this process.
    pub fn is_session_of(&self, session: SessionId, process: Process) -> bool {
        let caller = Caller {
            session,
            process,
            connection: Connection(u64::MAX),
        };
        self.read(|state| state.check_caller(caller).is_ok())
    }

    /// Calls `look` with the state. Everybody waits meanwhile, so a list of any length is read with `list`.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock())
    }

    /// Reads entries of a list, and lets others have their turn after every [`PAGE`] of them: what changes meanwhile may
    /// show as before or as after. `page` reads the entries after the one with a key.
    ///
    /// Returns at most `most` entries that are `wanted`, from the one after `after` on. If there may be more behind them,
    /// also returns the key after which to go on.
    pub(crate) async fn list<K, T>(
        &self,
        mut after: Option<K>,
        most: usize,
        page: impl Fn(&State, Option<&K>) -> Vec<T>,
        key: impl Fn(&T) -> K,
        wanted: impl Fn(&T) -> bool,
    ) -> (Vec<T>, Option<K>) {
        let mut found = Vec::new();
        loop {
            let entries = self.read(|state| page(state, after.as_ref()));
            let last = entries.len() < PAGE;
            for entry in entries {
                if found.len() >= most {
                    return (found, after);
                }
                after = Some(key(&entry));
                if wanted(&entry) {
                    found.push(entry);
                }
            }
            if last {
                return (found, None);
            }
            tokio::task::yield_now().await;
        }
    }

    /// The newest of the wanted events. The oldest of them comes first.
    pub fn events(&self, wanted: &Wanted) -> Vec<v1::EventRecord> {
        self.events.lock().list(wanted)
    }

    /// The number of attached streams, and the number of watched processes.
    pub fn connections(&self) -> (usize, usize) {
        let count = |of: &AtomicUsize| of.load(Ordering::Relaxed);
        (count(&self.attached), count(&self.watched))
    }

    /// Ends all streams, and lets no new one begin, because the broker is shutting down.
    pub async fn close(self: &Arc<Self>) {
        self.closing.cancel();
        let closed = self.at_desk(|_, desk| {
            desk.closing = true;
            desk.streams.close_all();
        });
        if let Err(error) = closed.await {
            tracing::error!(%error, "the streams could not be closed");
        }
    }
}

/// Whether an event has no effect but an answer.
fn only_answered(event: &Event) -> bool {
    matches!(
        event,
        Event::Lookup(_)
            | Event::Keep(_)
            | Event::DiskSays(_)
            | Event::DiskTakes(_)
            | Event::Publish(_)
            | Event::Unpublish { .. }
            | Event::Unpin { .. }
    )
}

/// Whether the note is of what an operator did, and not of what follows from it.
fn is_deed(note: &Note) -> bool {
    matches!(
        note,
        Note::Drained { .. }
            | Note::Undrained { .. }
            | Note::Evicted { .. }
            | Note::QuotaSet { .. }
            | Note::Held { .. }
            | Note::HoldEnded { .. }
    )
}

fn answer(reply: Option<Reply>) -> Result<Reply, Refused> {
    match reply {
        Some(Reply::Refused(refusal)) => Err(refusal.into()),
        Some(reply) => Ok(reply),
        None => Ok(Reply::Done),
    }
}

#[cfg(test)]
mod tests;
