//! Sessions: whose process each is, and what it holds, reads and donates.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
    sync::Arc,
};

use swiftcache_proto::domain::{LeaseId, RegionId, SessionId};

use super::{
    check::hold,
    effect::Refusal,
    event::{Caller, Connection},
    process::Process,
    region::Outline,
};

/// The returned regions a session is told of again when it attaches; a donor that missed older ones learns of them
/// from the regions listed when it resumes.
const RETURNED_REMEMBERED: usize = 4_096;

/// A session, or one that is over and has regions to get back.
#[derive(Clone, Debug)]
pub(super) struct Session {
    process: Process,
    /// The connection that it was last registered on, or 0 after a restart.
    connection: Connection,
    name: Arc<str>,
    tenant: Arc<str>,
    /// Its stream is up.
    attached: bool,
    /// It left or its process is gone; remembered only until its last region is returned.
    over: bool,
    /// When it was opened, milliseconds.
    since: u64,
    /// The regions it donates.
    regions: BTreeSet<RegionId>,
    /// The leases it holds as lessee, revoked ones it has not let go of included.
    leases: BTreeSet<LeaseId>,
    /// The leases it reads.
    reads: BTreeSet<LeaseId>,
    /// Those of them that are revoked.
    owed: BTreeSet<LeaseId>,
    /// Bytes of `regions`.
    donated_bytes: u64,
    /// The same by device.
    donated_on: BTreeMap<usize, u64>,
    /// Bytes of `leases`.
    held_bytes: u64,
    /// The last regions it got back, told again when it attaches.
    returned: VecDeque<RegionId>,
}

impl Session {
    pub(super) fn process(&self) -> Process {
        self.process
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn tenant(&self) -> &Arc<str> {
        &self.tenant
    }

    pub(super) fn is_attached(&self) -> bool {
        self.attached
    }

    pub(super) fn is_over(&self) -> bool {
        self.over
    }

    pub(super) fn since(&self) -> u64 {
        self.since
    }

    pub(super) fn regions(&self) -> &BTreeSet<RegionId> {
        &self.regions
    }

    pub(super) fn leases(&self) -> &BTreeSet<LeaseId> {
        &self.leases
    }

    pub(super) fn reads(&self) -> &BTreeSet<LeaseId> {
        &self.reads
    }

    /// The revoked leases that it reads and has not let go of.
    pub(super) fn owed(&self) -> &BTreeSet<LeaseId> {
        &self.owed
    }

    pub(super) fn donated_bytes(&self) -> u64 {
        self.donated_bytes
    }

    pub(super) fn held_bytes(&self) -> u64 {
        self.held_bytes
    }

    pub(super) fn returned(&self) -> &VecDeque<RegionId> {
        &self.returned
    }
}

/// All sessions, and the processes behind those that are not over.
#[derive(Clone, Debug, Default)]
pub(super) struct Sessions {
    known: BTreeMap<SessionId, Session>,
    /// The processes with a session that is not over.
    processes: BTreeMap<Process, BTreeSet<SessionId>>,
}

impl Sessions {
    /// How many are known, those included that are over and have regions to get back.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn get(&self, id: SessionId) -> Option<&Session> {
        self.known.get(&id)
    }

    /// Those that are known, by id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.known.iter().map(|(id, session)| (*id, session))
    }

    /// Those that are not over, by id, after one of them.
    pub(super) fn live_after(
        &self,
        after: Option<SessionId>,
    ) -> impl Iterator<Item = (SessionId, &Session)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let sessions = self.known.range((from, Bound::Unbounded));
        sessions
            .filter(|(_, session)| !session.over)
            .map(|(id, session)| (*id, session))
    }

    /// How many are not over.
    pub(super) fn live(&self) -> usize {
        self.processes.values().map(BTreeSet::len).sum()
    }

    /// The caller's session, if it is its process that speaks.
    pub(super) fn of(&self, caller: Caller) -> Result<&Session, Refusal> {
        let which = || caller.session.label();
        match self.known.get(&caller.session).filter(|known| !known.over) {
            None => Err(Refusal::Unknown {
                what: "session",
                which: which(),
            }),
            Some(session) if session.process != caller.process => Err(Refusal::NotYours {
                what: "session",
                which: which(),
            }),
            // A request may arrive long after its connection was lost, and after its process has said anew what it holds.
            Some(session) if caller.connection < session.connection => {
                Err(Refusal::LateConnection(which()))
            }
            Some(session) => Ok(session),
        }
    }

    /// The session was registered on a connection: what comes by an older one is too late from now on.
    pub(super) fn registered(&mut self, id: SessionId, connection: Connection) {
        if let Some(session) = self.known.get_mut(&id) {
            session.connection = connection;
        }
    }

    /// Whether a process has a session that is not over.
    pub(super) fn knows(&self, process: Process) -> bool {
        self.processes.contains_key(&process)
    }

    /// The processes of which no session has its stream up.
    pub(super) fn detached_processes(&self) -> impl Iterator<Item = Process> {
        let attached = |id: &SessionId| self.get(*id).is_some_and(Session::is_attached);
        let processes = self.processes.iter();
        let detached = processes.filter(move |(_, sessions)| !sessions.iter().any(attached));
        detached.map(|(process, _)| *process)
    }

    /// The sessions of a user that are not over.
    pub(super) fn of_user(&self, uid: u32) -> impl Iterator<Item = SessionId> {
        let processes = self.processes.iter();
        let its = processes.filter(move |(process, _)| process.uid == uid);
        its.flat_map(|(_, sessions)| sessions.iter().copied())
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = Process> {
        self.processes.keys().copied()
    }

    /// The sessions of a process that are not over.
    pub(super) fn of_process(&self, process: Process) -> BTreeSet<SessionId> {
        self.processes.get(&process).cloned().unwrap_or_default()
    }

    /// The sessions with this label that are not over.
    pub(super) fn labelled(&self, label: &str) -> impl Iterator<Item = (SessionId, &Session)> {
        self.live_after(None)
            .filter(move |(id, _)| id.label() == label)
    }

    pub(super) fn open(
        &mut self,
        id: SessionId,
        process: Process,
        name: Arc<str>,
        tenant: Arc<str>,
        since: u64,
    ) {
        let session = Session {
            process,
            connection: Connection::default(),
            name,
            tenant,
            attached: false,
            over: false,
            since,
            regions: BTreeSet::new(),
            leases: BTreeSet::new(),
            reads: BTreeSet::new(),
            owed: BTreeSet::new(),
            donated_bytes: 0,
            donated_on: BTreeMap::new(),
            held_bytes: 0,
            returned: VecDeque::new(),
        };
        self.known.insert(id, session);
        self.processes.entry(process).or_default().insert(id);
    }

    pub(super) fn set_attached(&mut self, id: SessionId, attached: bool) {
        if let Some(session) = self.known.get_mut(&id) {
            session.attached = attached;
        }
    }

    /// Marks a session over; it stays known until [`Self::bury`] finds nothing of it left.
    pub(super) fn end(&mut self, id: SessionId) {
        let Some(session) = self.known.get_mut(&id) else {
            return;
        };
        session.over = true;
        if let Some(sessions) = self.processes.get_mut(&session.process) {
            sessions.remove(&id);
            if sessions.is_empty() {
                self.processes.remove(&session.process);
            }
        }
    }

    /// Forgets a session that is over and whose regions are all returned.
    pub(super) fn bury(&mut self, id: SessionId) {
        let done = |session: &Session| session.over && session.regions.is_empty();
        if self.known.get(&id).is_some_and(done) {
            self.known.remove(&id);
        }
    }

    /// The session holds a lease from now on. False when it is over: then nobody does.
    pub(super) fn hold(&mut self, id: SessionId, lease: LeaseId, bytes: u64) -> bool {
        match self.known.get_mut(&id) {
            Some(session) if !session.over => {
                session.leases.insert(lease);
                session.held_bytes += bytes;
                true
            }
            _ => false,
        }
    }

    pub(super) fn let_go(&mut self, id: SessionId, lease: LeaseId, bytes: u64) {
        if let Some(session) = self.known.get_mut(&id)
            && session.leases.remove(&lease)
        {
            session.held_bytes -= bytes;
        }
    }

    /// The session reads a lease from now on.
    pub(super) fn read(&mut self, id: SessionId, lease: LeaseId) {
        if let Some(session) = self.known.get_mut(&id) {
            session.reads.insert(lease);
        }
    }

    pub(super) fn stop_reading(&mut self, id: SessionId, lease: LeaseId) {
        if let Some(session) = self.known.get_mut(&id) {
            session.reads.remove(&lease);
            session.owed.remove(&lease);
        }
    }

    /// A lease that the session reads is revoked.
    pub(super) fn owe(&mut self, id: SessionId, lease: LeaseId) {
        if let Some(session) = self.known.get_mut(&id)
            && session.reads.contains(&lease)
        {
            session.owed.insert(lease);
        }
    }

    /// What all sessions of a user donate on a device, those included that are over and have regions to get back; bytes.
    pub(super) fn donated_by(&self, uid: u32, device: usize) -> u64 {
        let its = self.known.values().filter(|its| its.process.uid == uid);
        its.filter_map(|its| its.donated_on.get(&device)).sum()
    }

    /// The session donates a region from now on.
    pub(super) fn donate(&mut self, region: &Outline) {
        if let Some(session) = self.known.get_mut(&region.donor) {
            session.regions.insert(region.id);
            session.donated_bytes += region.bytes;
            *session.donated_on.entry(region.device).or_default() += region.bytes;
        }
    }

    /// The session has a region back.
    pub(super) fn take_back(&mut self, region: &Outline) {
        if let Some(session) = self.known.get_mut(&region.donor)
            && session.regions.remove(&region.id)
        {
            session.donated_bytes -= region.bytes;
            let left = session.donated_on.remove(&region.device);
            let left = left.map(|bytes| bytes - region.bytes);
            let left = left.filter(|bytes| *bytes > 0);
            session
                .donated_on
                .extend(left.map(|bytes| (region.device, bytes)));
            if session.returned.len() >= RETURNED_REMEMBERED {
                session.returned.pop_front();
            }
            session.returned.push_back(region.id);
        }
    }

    /// Forgets what was returned: a donor learns what came back before a restart from the regions listed when it
    /// resumes.
    pub(super) fn forget_returned(&mut self) {
        for session in self.known.values_mut() {
            session.returned.clear();
        }
    }

    /// All were opened now, as far as this clock can tell.
    pub(super) fn restart_clocks(&mut self, now: u64) {
        for session in self.known.values_mut() {
            session.since = now;
        }
    }

    /// Verifies that exactly the processes of sessions that are not over are watched, and that whoever is over has let go
    /// of everything but regions.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut processes: BTreeMap<Process, BTreeSet<SessionId>> = BTreeMap::new();
        for (id, session) in &self.known {
            if !session.over {
                processes.entry(session.process).or_default().insert(*id);
                continue;
            }
            hold!(
                !session.regions.is_empty(),
                "{id:?} is over and has no region"
            );
            let holds = !session.leases.is_empty() || !session.reads.is_empty();
            hold!(!holds, "{id:?} is over and holds leases");
        }
        hold!(
            processes == self.processes,
            "processes are not watched as they should be"
        );
        Ok(())
    }
}
