//! Claims: who holds how much, who waits for how much, and which leases are the cheapest to lose.
//!
//! Kept as sums and ordered sets, so that a demand looks at no lease that it does not take. They count *active* leases:
//! those whose lessees hold them and need not let go.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use swiftcache_proto::domain::{LeaseId, Medium, SessionId};

use super::{
    arena::{Beside, LeaseKey, NamespaceKey, OfLease},
    check::hold,
    holders::{Holder, Holders, Path, Weights},
};

/// What a session lacked when it last asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) missing: u64,
    /// The device it computes on.
    pub(super) device: usize,
    pub(super) block_bytes: u64,
    /// Whose share it counts towards.
    pub(super) path: Path,
}

/// A claim, and until when it is remembered, milliseconds.
#[derive(Clone, Debug)]
struct Wait {
    claim: Claim,
    until: u64,
}

/// How cheap a lease is to lose, the cheapest first: with the fewest blocks, then found longest ago.
pub(super) type Worth = (u32, u64, LeaseId, LeaseKey);

/// An active lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stake {
    pub(super) id: LeaseId,
    pub(super) namespace: NamespaceKey,
    pub(super) session: SessionId,
    /// The device that holds its slab.
    pub(super) device: usize,
    pub(super) bytes: u64,
    /// Its slab could be lent to somebody else.
    pub(super) takeable: bool,
    /// Its published blocks.
    pub(super) blocks: u32,
    /// When a lookup last found a block in it, milliseconds; or earlier.
    pub(super) last_hit: u64,
}

impl Stake {
    fn worth(&self, key: LeaseKey) -> Worth {
        (self.blocks, self.last_hit, self.id, key)
    }
}

/// Leases of slabs of one size on one device, the cheapest to lose first.
type Pile = BTreeSet<Worth>;

/// What a session holds in a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Holding {
    bytes: u64,
    leases: u64,
    /// Those that could be lent to somebody else, by device and size.
    piles: BTreeMap<(usize, u64), Pile>,
}

/// What a namespace holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holdings {
    path: Path,
    by_session: BTreeMap<SessionId, Holding>,
    /// Its sessions by what each holds in all namespaces, the largest holder first.
    largest: BTreeSet<(Reverse<u64>, SessionId)>,
}

/// What a session holds in all namespaces.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Total {
    bytes: u64,
    namespaces: BTreeSet<NamespaceKey>,
}

/// The claims to each kind of memory. Each is shared out by itself: who holds much host memory has no less of a claim to HBM.
#[derive(Clone, Debug, Default)]
pub(super) struct AllClaims {
    hbm: Claims,
    host: Claims,
}

impl AllClaims {
    pub(super) fn new(weights: Weights) -> Self {
        Self {
            hbm: Claims::new(weights.clone()),
            host: Claims::new(weights),
        }
    }

    pub(super) fn of(&self, medium: Medium) -> &Claims {
        match medium {
            Medium::Hbm => &self.hbm,
            Medium::Host => &self.host,
        }
    }

    pub(super) fn of_mut(&mut self, medium: Medium) -> &mut Claims {
        match medium {
            Medium::Hbm => &mut self.hbm,
            Medium::Host => &mut self.host,
        }
    }

    fn each(&mut self) -> [&mut Claims; 2] {
        [&mut self.hbm, &mut self.host]
    }

    pub(super) fn stop_waiting(&mut self, session: SessionId) {
        for claims in self.each() {
            claims.stop_waiting(session);
        }
    }

    pub(super) fn expire_waits(&mut self, now: u64) {
        for claims in self.each() {
            claims.expire_waits(now);
        }
    }

    /// A lease is not active any more.
    pub(super) fn remove(&mut self, lease: LeaseKey) {
        for claims in self.each() {
            claims.remove(lease);
        }
    }

    /// A lease has so many published blocks now.
    pub(super) fn set_blocks(&mut self, lease: LeaseKey, blocks: u32) {
        for claims in self.each() {
            claims.set_blocks(lease, blocks);
        }
    }

    /// The slab of a lease could be lent to somebody else from now on.
    pub(super) fn make_takeable(&mut self, lease: LeaseKey) {
        for claims in self.each() {
            claims.make_takeable(lease);
        }
    }

    /// Verifies all sums and sets against the active leases, each with the kind of memory that its slab is of.
    pub(super) fn check(
        &self,
        active: BTreeMap<LeaseKey, (Stake, Path)>,
        medium: impl Fn(&Stake) -> Medium,
        lives: impl Fn(SessionId) -> bool,
    ) -> Result<(), String> {
        let (hbm, host) =
            (active.into_iter()).partition(|(_, (stake, _))| medium(stake) == Medium::Hbm);
        self.hbm.check(hbm, &lives)?;
        self.host.check(host, &lives)
    }
}

/// All claims to one kind of memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    weights: Weights,
    waits: BTreeMap<SessionId, Wait>,
    stakes: Beside<OfLease, Stake>,
    namespaces: BTreeMap<NamespaceKey, Holdings>,
    holders: Holders,
    sessions: BTreeMap<SessionId, Total>,
}

impl Claims {
    fn new(weights: Weights) -> Self {
        Self {
            weights,
            ..Self::default()
        }
    }

    /// How much more than others of its kind a holder gets when there is not enough for all.
    pub(super) fn weight(&self, holder: &Holder) -> u64 {
        self.weights.of(holder)
    }

    // Who waits.

    pub(super) fn wait(&mut self, session: SessionId, claim: Claim, until: u64) {
        self.waits.insert(session, Wait { claim, until });
    }

    fn stop_waiting(&mut self, session: SessionId) {
        self.waits.remove(&session);
    }

    fn expire_waits(&mut self, now: u64) {
        self.waits.retain(|_, wait| wait.until > now);
    }

    /// What those who wait lacked when they last asked.
    pub(super) fn waits(&self) -> impl Iterator<Item = (SessionId, &Claim)> {
        self.waits.iter().map(|(id, wait)| (*id, &wait.claim))
    }

    // Who holds what.

    /// What a session holds in all namespaces, bytes.
    pub(super) fn held(&self, session: SessionId) -> u64 {
        self.sessions.get(&session).map_or(0, |total| total.bytes)
    }

    /// Who holds how much.
    pub(super) fn holders(&self) -> &Holders {
        &self.holders
    }

    /// The largest holder among the sessions that hold leases of a namespace, or the next one after another, and what it
    /// holds in all, bytes.
    pub(super) fn next_largest(
        &self,
        namespace: NamespaceKey,
        after: Option<SessionId>,
    ) -> Option<(SessionId, u64)> {
        let its = self.namespaces.get(&namespace)?;
        let from = match after {
            Some(after) => Bound::Excluded((Reverse(self.held(after)), after)),
            None => Bound::Unbounded,
        };
        let (Reverse(bytes), session) = its.largest.range((from, Bound::Unbounded)).next()?;
        Some((*session, *bytes))
    }

    /// The sessions that hold leases of a namespace, the largest holder first; each with what it holds in all.
    pub(super) fn largest(
        &self,
        namespace: NamespaceKey,
    ) -> impl Iterator<Item = (SessionId, u64)> {
        let its = self.namespaces.get(&namespace);
        let holders = its.into_iter().flat_map(|its| &its.largest);
        holders.map(|(Reverse(bytes), session)| (*session, *bytes))
    }

    /// An active lease more, of the namespace at the end of this path.
    pub(super) fn add(&mut self, lease: LeaseKey, stake: Stake, path: &Path) {
        self.change_total(stake.session, |total| {
            total.bytes += stake.bytes;
            total.namespaces.insert(stake.namespace);
        });
        self.holders.add(path, stake.bytes, &self.weights);
        let its = self.namespaces.entry(stake.namespace);
        let its = its.or_insert_with(|| Holdings {
            path: path.clone(),
            by_session: BTreeMap::new(),
            largest: BTreeSet::new(),
        });
        let total = &self.sessions[&stake.session];
        its.largest.insert((Reverse(total.bytes), stake.session));
        let holding = its.by_session.entry(stake.session).or_default();
        holding.bytes += stake.bytes;
        holding.leases += 1;
        self.stakes.insert(lease, stake);
        self.pile(lease, true);
    }

    /// A lease is not active any more.
    fn remove(&mut self, lease: LeaseKey) {
        if self.stakes.get(lease).is_none() {
            return;
        }
        self.pile(lease, false);
        let Some(stake) = self.stakes.remove(lease) else {
            return;
        };
        let (session, namespace) = (stake.session, stake.namespace);
        let mut last = false;
        if let Some(its) = self.namespaces.get_mut(&namespace) {
            self.holders.subtract(&its.path, stake.bytes);
            if let Some(holding) = its.by_session.get_mut(&session) {
                holding.bytes -= stake.bytes;
                holding.leases -= 1;
                last = holding.leases == 0;
            }
            if last {
                its.by_session.remove(&session);
                let total = self.sessions.get(&session).map_or(0, |total| total.bytes);
                its.largest.remove(&(Reverse(total), session));
            }
            if its.by_session.is_empty() {
                self.namespaces.remove(&namespace);
            }
        }
        self.change_total(session, |total| {
            total.bytes -= stake.bytes;
            if last {
                total.namespaces.remove(&namespace);
            }
        });
    }

    /// Changes what a session holds in all, and its place among the holders of each of its namespaces.
    fn change_total(&mut self, session: SessionId, change: impl FnOnce(&mut Total)) {
        let total = self.sessions.entry(session).or_default();
        let before = Reverse(total.bytes);
        let namespaces = total.namespaces.clone();
        change(total);
        let after = Reverse(total.bytes);
        let over = total.namespaces.is_empty();
        for namespace in namespaces {
            if let Some(its) = self.namespaces.get_mut(&namespace)
                && its.largest.remove(&(before, session))
            {
                its.largest.insert((after, session));
            }
        }
        if over {
            self.sessions.remove(&session);
        }
    }

    /// A lease has so many published blocks now.
    fn set_blocks(&mut self, lease: LeaseKey, blocks: u32) {
        self.change(lease, |stake| stake.blocks = blocks);
    }

    /// The slab of a lease could be lent to somebody else from now on.
    fn make_takeable(&mut self, lease: LeaseKey) {
        self.change(lease, |stake| stake.takeable = true);
    }

    /// Changes a stake and its place among those that are cheap to lose.
    fn change(&mut self, lease: LeaseKey, change: impl FnOnce(&mut Stake)) {
        if self.stakes.get(lease).is_some() {
            self.pile(lease, false);
            change(&mut self.stakes[lease]);
            self.pile(lease, true);
        }
    }

    /// Puts a lease that can be taken on its pile, or takes it off.
    fn pile(&mut self, lease: LeaseKey, on: bool) {
        let stake = self.stakes[lease];
        let its = self.namespaces.get_mut(&stake.namespace);
        let holding = its.and_then(|its| its.by_session.get_mut(&stake.session));
        let Some(holding) = holding.filter(|_| stake.takeable) else {
            return;
        };
        let at = (stake.device, stake.bytes);
        let worth = stake.worth(lease);
        if on {
            holding.piles.entry(at).or_default().insert(worth);
        } else if let Some(pile) = holding.piles.get_mut(&at) {
            pile.remove(&worth);
            if pile.is_empty() {
                holding.piles.remove(&at);
            }
        }
    }

    /// The lease of a session in a namespace that is cheapest to lose, of those on piles and with slabs that are
    /// `wanted`. `last_hit` says when a lookup last found a block in one: lookups do not tell, so what is told late is
    /// caught up with here, once for each lease that lookups hit since.
    pub(super) fn cheapest(
        &mut self,
        session: SessionId,
        namespace: NamespaceKey,
        piles: impl Fn(usize, u64) -> bool,
        wanted: impl Fn(LeaseKey) -> bool,
        last_hit: impl Fn(LeaseKey) -> u64,
    ) -> Option<LeaseKey> {
        loop {
            let holding = (self.namespaces.get(&namespace)?.by_session).get(&session)?;
            let able = (holding.piles.iter()).filter(|((device, bytes), _)| piles(*device, *bytes));
            let first = |pile: &Pile| pile.iter().find(|worth| wanted(worth.3)).copied();
            let (_, before, _, lease) = able.filter_map(|(_, pile)| first(pile)).min()?;
            let now = last_hit(lease);
            if now == before {
                return Some(lease);
            }
            self.change(lease, |stake| stake.last_hit = now);
        }
    }

    /// Verifies all sums and sets against the active leases, and that whoever waits `lives`.
    fn check(
        &self,
        active: BTreeMap<LeaseKey, (Stake, Path)>,
        lives: impl Fn(SessionId) -> bool,
    ) -> Result<(), String> {
        let mut counted = Self::new(self.weights.clone());
        for (key, (mut stake, path)) in active {
            let Some(known) = self.stakes.get(key) else {
                return Err(format!("nobody has a stake in {}", stake.id));
            };
            hold!(
                known.last_hit <= stake.last_hit,
                "{} was found before it was",
                stake.id
            );
            stake.last_hit = known.last_hit;
            hold!(*known == stake, "the stake in {} is another", stake.id);
            counted.add(key, stake, &path);
        }
        let stakes = self.stakes.iter().count();
        hold!(
            stakes == counted.stakes.iter().count(),
            "somebody has a stake in a lease that is not active"
        );
        hold!(
            self.namespaces == counted.namespaces,
            "what namespaces hold is miscounted"
        );
        hold!(
            self.holders == counted.holders,
            "holders are miscounted or in the wrong order"
        );
        hold!(
            self.sessions == counted.sessions,
            "what sessions hold is miscounted"
        );
        let waiting = self.waits.keys().all(|id| lives(*id));
        hold!(waiting, "somebody who is gone waits");
        Ok(())
    }
}
