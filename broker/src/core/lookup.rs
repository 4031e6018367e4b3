//! Lookups: which of the blocks that the index knows an asker can load, and where.
//!
//! What a lookup promises is what a load uses: a block is found in a lease that the asker holds, or that `Share` would
//! open for it, or in its own host memory.

use std::cmp::Reverse;

use swiftcache_proto::domain::{
    BlockHash, BorrowerId, DeviceUuid, Extent, FoundRun, Generation, Hold, LinkKind, Medium,
    SessionId,
};

use super::{
    Caller, Lookup, Note, Refusal, Reply,
    arena::Key,
    borrowers::{Borrower, Kept},
    index::{Location, Namespace},
    leases::Lease,
    pins::Span,
    regions::Region,
    state::State,
};

/// Where an asker reads from.
#[derive(Clone, Copy, Debug)]
enum Reach {
    /// It did not say what it computes on.
    Anywhere,
    From(usize),
    /// It computes on a device that is not among the node's.
    Nowhere,
}

/// On whose behalf a lookup looks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker<'a> {
    session: SessionId,
    reach: Reach,
    /// It reads leases of other sessions.
    shares: bool,
    /// The only size of blocks that it reads, bytes.
    block_bytes: Option<u64>,
    kept: Option<&'a Kept>,
    /// Devices whose memory it cannot copy from now.
    down: &'a [usize],
}

/// How good a lease is to read a block from: the least is the best.
type Rank = (Hold, LinkKind, Reverse<u64>);

/// Why a session cannot read another's lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Its region has no handle since the broker restarted.
    NoHandle,
    /// It has as many readers as it may have.
    Readers,
    /// The session reads as many leases as it may read.
    Reads,
}

#[derive(Clone, Copy, Debug)]
enum Run {
    Leased(Span, Hold),
    Kept(u32),
}

impl Asker<'_> {
    fn borrower(borrower: &Borrower) -> Asker<'_> {
        Asker {
            session: borrower.session,
            reach: borrower.device.map_or(Reach::Nowhere, Reach::From),
            shares: borrower.shares,
            block_bytes: Some(borrower.block_bytes),
            kept: (!borrower.host_down).then_some(&borrower.kept),
            down: &borrower.down,
        }
    }
}

impl State {
    pub(super) fn lookup(&mut self, lookup: Lookup) -> Result<Reply, Refusal> {
        let Lookup {
            caller,
            namespace,
            hashes,
            ..
        } = &lookup;
        let session = self.session_of(*caller)?;
        let key = self.index.find_namespace(&session.tenant, namespace);
        let asker = self.asker(*caller, namespace, lookup.borrower, lookup.device.as_ref())?;
        let runs = asker.map_or_else(Vec::new, |asker| self.longest_run(&asker, key, hashes));
        let foreign = |run: &Run| match run {
            Run::Leased(span, _) => {
                (self.leases[span.lease].lessee != caller.session).then_some(*span)
            }
            Run::Kept(_) => None,
        };
        let spans: Vec<_> = runs.iter().filter_map(foreign).collect();
        let pin = match runs.is_empty() || lookup.unpinned {
            true => None,
            false => Some(self.pin(caller.session, spans)?),
        };
        let runs: Vec<_> = runs.into_iter().map(|run| self.found(run)).collect();
        let hits = runs.iter().map(FoundRun::blocks).sum();
        let blocks = hashes.len() as u32;
        self.counters.lookups += 1;
        self.counters.lookup_blocks += u64::from(blocks);
        self.counters.hit_blocks += u64::from(hits);
        if let Some(key) = key {
            let namespace = self.index.namespace_mut(key);
            namespace.lookups += 1;
            namespace.lookup_blocks += u64::from(blocks);
            namespace.hit_blocks += u64::from(hits);
        }
        self.note(Note::Looked { blocks, hits });
        Ok(Reply::Found { runs, pin })
    }

    /// Whom a lookup is for; `None` when that is nobody that the broker knows.
    fn asker(
        &self,
        caller: Caller,
        namespace: &str,
        borrower: Option<BorrowerId>,
        device: Option<&DeviceUuid>,
    ) -> Result<Option<Asker<'_>>, Refusal> {
        let device = device.map(|uuid| self.devices.number(uuid)).transpose()?;
        let tenant = |session| self.sessions.get(session).map(|session| &session.tenant);
        let known = borrower
            .and_then(|id| self.borrowers.get(id))
            .filter(|known| {
                *known.namespace == *namespace && tenant(&known.session) == tenant(&caller.session)
            });
        let reach = match (known, borrower, device) {
            (Some(known), ..) => return Ok(Some(Asker::borrower(known))),
            (None, _, Some(device)) => Reach::From(device),
            (None, None, None) => Reach::Anywhere,
            (None, Some(_), None) => return Ok(None),
        };
        Ok(Some(Asker {
            session: caller.session,
            reach,
            shares: true,
            block_bytes: None,
            kept: None,
            down: &[],
        }))
    }

    /// On whose behalf a lease's lessee publishes: a block that this asker can read elsewhere need not be published.
    pub(super) fn publisher(&self, key: Key<Lease>) -> Asker<'static> {
        let lease = &self.leases[key];
        let name = &self.index.namespace(lease.namespace).name;
        let mut borrowers = self.borrowers.of(lease.lessee);
        let borrower = borrowers.find(|(_, borrower)| borrower.namespace == *name);
        Asker {
            session: lease.lessee,
            reach: Reach::From(lease.device),
            shares: borrower.is_none_or(|(_, borrower)| borrower.shares),
            block_bytes: Some(lease.block_bytes),
            kept: None,
            down: &[],
        }
    }

    /// How good a lease is for an asker; `None` when it cannot read it.
    pub(super) fn rank_for(&self, asker: &Asker<'_>, key: Key<Lease>) -> Option<Rank> {
        let lease = &self.leases[key];
        let region = &self.regions[lease.region];
        let path = match asker.reach {
            Reach::Anywhere => None,
            Reach::From(device) => Some(self.devices.path(device, region.device)?),
            Reach::Nowhere => return None,
        };
        if asker.down.contains(&region.device) {
            return None;
        }
        if asker
            .block_bytes
            .is_some_and(|size| size != lease.block_bytes)
        {
            return None;
        }
        let hold = match lease.lessee == asker.session {
            true => Hold::Own,
            false => Hold::Shared,
        };
        if hold == Hold::Shared && !self.opens(asker, lease, region) {
            return None;
        }
        let speed = path.map_or(0, |path| path.bytes_per_second);
        let kind = path.map_or(LinkKind::Host, |path| path.kind);
        Some((hold, kind, Reverse(speed)))
    }

    /// Whether the asker reads another's lease, or could open it now.
    fn opens(&self, asker: &Asker<'_>, lease: &Lease, region: &Region) -> bool {
        let session = asker.session;
        if !asker.shares || lease.readers.contains(&session) {
            return asker.shares;
        }
        let maps = !region.unmappable_by.contains(&session);
        match asker.reach {
            Reach::Anywhere => maps,
            // CUDA opens a handle in other processes only.
            _ => maps && region.donor != session && self.may_read(session, lease).is_ok(),
        }
    }

    /// Whether another session may read a lease that is not being revoked.
    pub(super) fn may_read(&self, session: SessionId, lease: &Lease) -> Result<(), Unreadable> {
        if self.regions[lease.region].handle.is_none() {
            return Err(Unreadable::NoHandle);
        }
        if lease.readers.contains(&session) {
            return Ok(());
        }
        if lease.readers.len() >= self.config.max_readers {
            return Err(Unreadable::Readers);
        }
        let reads = self.sessions.get(&session).map_or(0, |s| s.reads.len());
        match reads >= self.config.max_leases_per_session {
            true => Err(Unreadable::Reads),
            false => Ok(()),
        }
    }

    /// The longest run of leading hashes that the asker can load, as runs of consecutive slots.
    fn longest_run(
        &self,
        asker: &Asker<'_>,
        namespace: Option<Key<Namespace>>,
        hashes: &[BlockHash],
    ) -> Vec<Run> {
        let copies = namespace.map_or(0, |key| self.index.namespace(key).copies);
        let mut runs: Vec<Run> = Vec::new();
        for hash in hashes {
            let keeps = asker.kept.is_some_and(|kept| kept.contains(hash));
            // Consecutive blocks mostly lie in consecutive slots, where looking is cheaper than in the table.
            if let Some(Run::Leased(span, hold)) = runs.last_mut()
                && (*hold == Hold::Own || copies == 0 && !keeps)
                && self.leases[span.lease].blocks.get(span.first + span.count) == Some(hash)
            {
                span.count += 1;
                continue;
            }
            let place = namespace.and_then(|namespace| self.best_place(asker, namespace, hash));
            match (place, runs.last_mut()) {
                (Some((at, Hold::Own)), _) => extend(&mut runs, at, Hold::Own),
                (_, Some(Run::Kept(count))) if keeps => *count += 1,
                _ if keeps => runs.push(Run::Kept(1)),
                (Some((at, hold)), _) => extend(&mut runs, at, hold),
                (None, _) => break,
            }
        }
        runs
    }

    fn best_place(
        &self,
        asker: &Asker<'_>,
        namespace: Key<Namespace>,
        hash: &BlockHash,
    ) -> Option<(Location, Hold)> {
        let places = self.index.find(&self.leases, namespace, hash);
        let ranked = places.filter_map(|at| Some((self.rank_for(asker, at.lease)?, at)));
        let best = ranked.min_by_key(|(rank, at)| (*rank, self.leases[at.lease].id));
        best.map(|(rank, at)| (at, rank.0))
    }

    /// Tells of a run, whose blocks were found now.
    fn found(&mut self, run: Run) -> FoundRun {
        let (span, hold) = match run {
            Run::Leased(span, hold) => (span, hold),
            Run::Kept(count) => return FoundRun::Kept { count },
        };
        let lease = &mut self.leases[span.lease];
        lease.last_hit = self.now;
        self.regions[lease.region].last_hit = self.now;
        FoundRun::Leased {
            extent: Extent {
                lease: lease.id,
                generation: Generation(lease.generation),
                first_slot: span.first,
                count: span.count,
            },
            medium: Medium::Hbm,
            hold,
        }
    }
}

/// Adds a block to the run that it continues, or begins one.
fn extend(runs: &mut Vec<Run>, at: Location, hold: Hold) {
    match runs.last_mut() {
        Some(Run::Leased(span, _))
            if span.lease == at.lease && span.first + span.count == at.slot =>
        {
            span.count += 1;
        }
        _ => {
            let span = Span {
                lease: at.lease,
                first: at.slot,
                count: 1,
            };
            runs.push(Run::Leased(span, hold));
        }
    }
}
