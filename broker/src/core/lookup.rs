//! Lookups: which of the blocks that the index knows an asker can load, and where.
//!
//! What a lookup promises is what a load uses: a block is found in a lease that the asker holds, or that `Share` would
//! open for it, or in its own host memory.

use std::{cmp::Reverse, sync::Arc};

use swiftcache_proto::domain::{BlockHash, Extent, FoundRun, Hold, LinkKind, Medium, SessionId};

use super::{
    arena::{LeaseKey, NamespaceKey},
    books::Books,
    borrowers::{Borrower, Kept},
    effect::{Note, Refusal, Reply},
    event::Lookup,
    index::Location,
    leases::Lease,
    pins::Span,
    sharing::may_read,
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

/// On whose behalf somebody looks.
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
    /// What lies in host memory of donors counts.
    host_memory: bool,
}

/// How good a lease is to read a block from: the least is the best.
type Rank = (Hold, LinkKind, Reverse<u64>);

#[derive(Clone, Copy, Debug)]
enum Run {
    Leased(Span, Hold),
    Kept(u32),
}

impl<'a> Asker<'a> {
    fn borrower(borrower: &'a Borrower) -> Self {
        Self {
            session: borrower.session(),
            reach: borrower.device().map_or(Reach::Nowhere, Reach::From),
            shares: borrower.shares(),
            block_bytes: Some(borrower.block_bytes()),
            kept: borrower.kept(),
            down: borrower.down(),
            host_memory: borrower.maps_host_memory(),
        }
    }

    /// Whom a lookup is for; `None` when that is nobody that the broker knows.
    fn of(books: &'a Books, lookup: &Lookup) -> Result<Option<Self>, Refusal> {
        let device = lookup.device.as_ref();
        let device = device.map(|uuid| books.devices.number(uuid)).transpose()?;
        let tenant = |id| books.sessions.get(id).map(|session| session.tenant());
        let known = lookup
            .borrower
            .and_then(|id| books.borrowers.get(id))
            .filter(|known| {
                **known.namespace() == *lookup.namespace
                    && tenant(known.session()) == tenant(lookup.caller.session)
            });
        let reach = match (known, lookup.borrower, device) {
            (Some(known), ..) => return Ok(Some(Self::borrower(known))),
            (None, _, Some(device)) => Reach::From(device),
            (None, None, None) => Reach::Anywhere,
            (None, Some(_), None) => return Ok(None),
        };
        Ok(Some(Self {
            session: lookup.caller.session,
            reach,
            shares: true,
            block_bytes: None,
            kept: None,
            down: &[],
            host_memory: lookup.host_memory,
        }))
    }

    /// How good a lease is for the asker; `None` when it cannot read it.
    pub(super) fn rank(&self, books: &Books, key: LeaseKey) -> Option<Rank> {
        let lease = books.leases.get(key);
        let terms = lease.terms();
        let on = books.regions.get(terms.region).device();
        let path = match self.reach {
            Reach::Anywhere => None,
            Reach::From(device) => Some(books.devices.path(device, on)?),
            Reach::Nowhere => return None,
        };
        let far = books.devices.medium(on) == Medium::Host && !self.host_memory;
        if far || self.down.contains(&on) {
            return None;
        }
        if self
            .block_bytes
            .is_some_and(|size| size != terms.block_bytes)
        {
            return None;
        }
        let hold = match terms.lessee == self.session {
            true => Hold::Own,
            false => Hold::Shared,
        };
        if hold == Hold::Shared && !self.opens(books, lease) {
            return None;
        }
        let speed = path.map_or(0, |path| path.bytes_per_second);
        let kind = path.map_or(LinkKind::Host, |path| path.kind);
        Some((hold, kind, Reverse(speed)))
    }

    /// Whether the asker reads another's lease, or could open it now.
    fn opens(&self, books: &Books, lease: &Lease) -> bool {
        let (session, region) = (self.session, lease.terms().region);
        if !self.shares || lease.readers().contains(&session) {
            return self.shares;
        }
        let maps = !books.unmappable.contains(session, region);
        match self.reach {
            Reach::Anywhere => maps,
            // CUDA opens a handle in other processes only.
            _ => {
                let foreign = books.regions.get(region).donor() != session;
                maps && foreign && may_read(books, session, lease).is_ok()
            }
        }
    }
}

impl Asker<'static> {
    /// On whose behalf a lease's lessee publishes: a block that this asker can read elsewhere need not be published. A block
    /// in HBM is worth publishing beside a copy in host memory, which is slower to read.
    pub(super) fn publisher(books: &Books, lease: LeaseKey) -> Self {
        let terms = books.leases.get(lease).terms();
        let name = books.index.namespace(terms.namespace).name();
        let mut borrowers = books.borrowers.of(terms.lessee);
        let borrower = borrowers.find(|(_, borrower)| borrower.namespace() == name);
        Self {
            session: terms.lessee,
            reach: Reach::From(terms.device),
            shares: borrower.is_none_or(|(_, borrower)| borrower.shares()),
            block_bytes: Some(terms.block_bytes),
            kept: None,
            down: &[],
            host_memory: books.index.medium(lease) == Medium::Host,
        }
    }
}

pub(super) fn lookup(books: &mut Books, lookup: &Lookup) -> Result<Reply, Refusal> {
    let caller = lookup.caller;
    let session = books.sessions.of(caller)?;
    let key = (books.index).find_namespace(session.tenant(), &lookup.namespace);
    let runs = match Asker::of(books, lookup)? {
        Some(asker) => longest_run(books, &asker, key, &lookup.hashes),
        None => Vec::new(),
    };
    let pin = match runs.is_empty() || lookup.unpinned {
        true => None,
        false => {
            let spans = foreign_spans(books, caller.session, &runs);
            let (config, now) = (&books.config, books.now);
            Some(books.pins.add(caller.session, spans, config, now)?)
        }
    };
    // What a disk's agent reads is no use of blocks.
    if books.disks.get(caller.session).is_some() {
        let runs = runs.into_iter().map(|run| told(books, run)).collect();
        return Ok(Reply::Found {
            runs,
            pin,
            coming: 0,
            coming_ms: 0,
        });
    }
    let runs: Vec<_> = runs.into_iter().map(|run| found(books, run)).collect();
    let hits: u32 = runs.iter().map(FoundRun::blocks).sum();
    let (coming, coming_ms) = want_from_disk(books, lookup, key, hits as usize)?;
    let blocks = lookup.hashes.len() as u32;
    books.counters.lookups += 1;
    books.counters.lookup_blocks += u64::from(blocks);
    books.counters.hit_blocks += u64::from(hits);
    if let Some(key) = key {
        books.index.looked(key, blocks.into(), hits.into());
    }
    books.note(Note::Looked { blocks, hits });
    Ok(Reply::Found {
        runs,
        pin,
        coming,
        coming_ms,
    })
}

/// Has disks bring back what follows the first `found` blocks, as far as it lies there or in between. Says how many blocks that makes,
/// and how long it may take, milliseconds.
fn want_from_disk(
    books: &mut Books,
    lookup: &Lookup,
    key: Option<NamespaceKey>,
    found: usize,
) -> Result<(u32, u32), Refusal> {
    let tenant = Arc::clone(books.sessions.of(lookup.caller)?.tenant());
    if books.disks.of(&tenant).next().is_none() || found == lookup.hashes.len() {
        return Ok((0, 0));
    }
    let asker = Asker::of(books, lookup)?;
    let reads = |asker: &Asker<'_>| {
        asker.host_memory && asker.shares && !matches!(asker.reach, Reach::Nowhere)
    };
    let Some(asker) = asker.filter(reads) else {
        return Ok((0, 0));
    };
    let namespace: Arc<str> = lookup.namespace.as_str().into();
    let mut wanted: Vec<(SessionId, BlockHash)> = Vec::new();
    let mut coming = 0;
    for hash in &lookup.hashes[found..] {
        let in_memory = key.is_some_and(|key| best_place(books, &asker, key, hash).is_some())
            || asker.kept.is_some_and(|kept| kept.contains(hash));
        if !in_memory {
            let fits = |size: Option<u64>| {
                size.is_some() && asker.block_bytes.is_none_or(|of| Some(of) == size)
            };
            let disk = books.disks.of(&tenant).find(|(_, disk)| {
                disk.has(&namespace, hash)
                    && fits(disk.block_bytes(&namespace))
                    && (wanted.len() as u64) < disk.most(&namespace)
            });
            match disk {
                Some((disk, _)) => wanted.push((disk, *hash)),
                None => break,
            }
        }
        coming += 1;
    }
    let mut any = false;
    let mut wait_ms = 0;
    for (disk, hash) in wanted {
        any |= books.disks.want(disk, &namespace, hash);
        let its = books.disks.get(disk);
        wait_ms = wait_ms.max(its.map_or(0, |its| its.wait_ms(&namespace)));
    }
    if any {
        books.note(Note::DiskWork);
    }
    Ok((coming, wait_ms))
}

/// The longest run of leading hashes that the asker can load, as runs of consecutive slots.
fn longest_run(
    books: &Books,
    asker: &Asker<'_>,
    namespace: Option<NamespaceKey>,
    hashes: &[BlockHash],
) -> Vec<Run> {
    let index = &books.index;
    let copies = namespace.is_some_and(|key| index.namespace(key).has_copies());
    let mut runs: Vec<Run> = Vec::new();
    for hash in hashes {
        let keeps = asker.kept.is_some_and(|kept| kept.contains(hash));
        // Consecutive blocks mostly lie in consecutive slots, where looking is cheaper than in the table.
        if let Some(Run::Leased(span, hold)) = runs.last_mut()
            && (*hold == Hold::Own || !copies && !keeps)
        {
            let next = Location {
                lease: span.lease,
                slot: span.first + span.count,
            };
            if index.block(next) == Some(hash) {
                span.count += 1;
                continue;
            }
        }
        let place = namespace.and_then(|namespace| best_place(books, asker, namespace, hash));
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
    books: &Books,
    asker: &Asker<'_>,
    namespace: NamespaceKey,
    hash: &BlockHash,
) -> Option<(Location, Hold)> {
    let places = books.index.find(namespace, hash);
    let ranked = places.filter_map(|at| Some((asker.rank(books, at.lease)?, at)));
    let best = ranked.min_by_key(|(rank, at)| (*rank, books.leases.get(at.lease).terms().id));
    best.map(|(rank, at)| (at, rank.0))
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

/// What was found in leases of other sessions.
fn foreign_spans(books: &Books, session: SessionId, runs: &[Run]) -> Vec<Span> {
    let foreign = runs.iter().filter_map(|run| match run {
        Run::Leased(span, _) => {
            let lessee = books.leases.get(span.lease).terms().lessee;
            (lessee != session).then_some(*span)
        }
        Run::Kept(_) => None,
    });
    foreign.collect()
}

/// Tells of a run, whose blocks were found now.
fn found(books: &mut Books, run: Run) -> FoundRun {
    if let Run::Leased(span, _) = run {
        books.leases.hit(span.lease, books.now);
        let region = books.leases.get(span.lease).terms().region;
        books.regions.hit(region, books.now);
    }
    told(books, run)
}

fn told(books: &Books, run: Run) -> FoundRun {
    let (span, hold) = match run {
        Run::Leased(span, hold) => (span, hold),
        Run::Kept(count) => return FoundRun::Kept { count },
    };
    let terms = books.leases.get(span.lease).terms();
    FoundRun::Leased {
        extent: Extent {
            lease: terms.id,
            generation: terms.generation,
            first_slot: span.first,
            count: span.count,
        },
        medium: books.index.medium(span.lease),
        hold,
    }
}
