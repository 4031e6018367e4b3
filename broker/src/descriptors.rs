//! Descriptors of donated allocations. Donors upload them, the broker keeps them while the allocation is on offer, and
//! lessees fetch them with a grant token.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{AllocationId, LeaseId, SessionId};

use crate::{
    core::{Caller, Process},
    error::Refused,
};

/// A grant token. With it a lessee fetches a descriptor on the fd socket.
pub type Token = [u8; 16];

/// How long a grant token is valid. A lessee maps right after the grant. If an engine pauses for longer than a minute
/// before that, it will not map any more.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// How long an uploaded descriptor waits for its offer, which is the donor's next message.
const UPLOAD_LIFE: Duration = Duration::from_secs(60);
/// The most tokens of one user that are kept: more than the slabs that one lease request can get. The oldest of the user
/// is dropped first, so that nobody's grants cost another user its tokens.
const MAX_TOKENS: usize = 1 << 15;
/// The most descriptors that one session may have uploaded but not offered yet, so that a broken donor cannot use up
/// the descriptors of others.
const MAX_WAITING_PER_SESSION: usize = 256;
/// The same for all sessions of one user, so that many sessions do not help.
const MAX_WAITING_PER_USER: usize = 1_024;

/// An upload was refused, because no more descriptors may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

struct Upload {
    uid: u32,
    descriptor: Arc<OwnedFd>,
    expires: Instant,
}

struct Kept {
    donor: SessionId,
    descriptor: Arc<OwnedFd>,
}

struct Grant {
    caller: Caller,
    lease: LeaseId,
    allocation: AllocationId,
    expires: Instant,
}

/// All descriptors. Lock order: a thread that holds the owner's lock may take this lock, and never the other way round.
pub struct Descriptors {
    inner: Mutex<Inner>,
    limit: usize,
}

#[derive(Default)]
struct Inner {
    waiting: HashMap<(SessionId, AllocationId), Upload>,
    kept: HashMap<AllocationId, Kept>,
    tokens: HashMap<Token, Grant>,
    /// The tokens of each user in the order in which they were made, with those that are used.
    order: HashMap<u32, VecDeque<(Instant, Token)>>,
    /// The tokens of each lease.
    of_lease: HashMap<LeaseId, HashSet<Token>>,
}

impl Inner {
    fn remove(&mut self, token: Token) -> Option<Grant> {
        let grant = self.tokens.remove(&token)?;
        if let Some(its) = self.of_lease.get_mut(&grant.lease) {
            its.remove(&token);
            if its.is_empty() {
                self.of_lease.remove(&grant.lease);
            }
        }
        Some(grant)
    }
}

impl Descriptors {
    /// Keeps at most `limit` descriptors.
    pub fn new(limit: usize) -> Self {
        Self {
            inner: Mutex::default(),
            limit,
        }
    }

    /// Takes the descriptor of an allocation that a donor will offer next, or offers again. It replaces what the donor has
    /// uploaded for the allocation before.
    ///
    /// # Errors
    /// [`Full`] when no more descriptors may be kept.
    pub fn upload(
        &self,
        session: SessionId,
        uid: u32,
        allocation: AllocationId,
        descriptor: OwnedFd,
        now: Instant,
    ) -> Result<(), Full> {
        let mut inner = self.inner.lock();
        let key = (session, allocation);
        let waits = inner.waiting.contains_key(&key);
        // One that takes the place of one that is kept needs no room: an offer that is made again must not fail because
        // the broker is full.
        let replaces = |(session, allocation): &(SessionId, AllocationId)| {
            let kept = inner.kept.get(allocation);
            kept.is_some_and(|kept| kept.donor == *session)
        };
        let more = inner.waiting.keys().filter(|key| !replaces(key)).count();
        let full = inner.kept.len() + more >= self.limit && !replaces(&key);
        let of_session = inner.waiting.keys().filter(|(of, _)| *of == session);
        let of_user = (inner.waiting.values()).filter(|upload| upload.uid == uid);
        let busy = of_session.count() >= MAX_WAITING_PER_SESSION
            || of_user.count() >= MAX_WAITING_PER_USER;
        if (full || busy) && !waits {
            return Err(Full);
        }
        let upload = Upload {
            uid,
            descriptor: Arc::new(descriptor),
            expires: now + UPLOAD_LIFE,
        };
        inner.waiting.insert(key, upload);
        Ok(())
    }

    /// Checks that `session` may offer `allocation` with a descriptor.
    ///
    /// # Errors
    /// When the session has uploaded none.
    pub fn check_offer(&self, session: SessionId, allocation: AllocationId) -> Result<(), Refused> {
        let inner = self.inner.lock();
        let kept = inner.kept.get(&allocation);
        let known = kept.is_some_and(|kept| kept.donor == session)
            || inner.waiting.contains_key(&(session, allocation));
        known.then_some(()).ok_or(Refused::NoDescriptor(allocation))
    }

    /// The offer was accepted. Keeps the uploaded descriptor until [`Self::discard`].
    pub fn offered(&self, session: SessionId, allocation: AllocationId) {
        let mut inner = self.inner.lock();
        if let Some(upload) = inner.waiting.remove(&(session, allocation)) {
            let kept = Kept {
                donor: session,
                descriptor: upload.descriptor,
            };
            inner.kept.insert(allocation, kept);
        }
    }

    /// The offer was refused: what was uploaded for it would only keep the donor's memory from being free.
    pub fn refused(&self, session: SessionId, allocation: AllocationId) {
        self.inner.lock().waiting.remove(&(session, allocation));
    }

    /// Drops the descriptor of an allocation of which nothing is on offer any more.
    pub fn discard(&self, allocation: AllocationId) {
        let mut inner = self.inner.lock();
        if let Some(kept) = inner.kept.remove(&allocation) {
            // Uploaded to be offered again, which it was not.
            inner.waiting.remove(&(kept.donor, allocation));
        }
    }

    /// Drops the tokens of a session that is over, and what it has uploaded but not offered.
    pub fn forget(&self, session: SessionId) {
        let mut inner = self.inner.lock();
        inner.waiting.retain(|(of, _), _| *of != session);
        let its = inner
            .tokens
            .iter()
            .filter(|(_, grant)| grant.caller.session == session);
        for token in its.map(|(token, _)| *token).collect::<Vec<_>>() {
            inner.remove(token);
        }
    }

    /// Makes a token with which only the caller's process can fetch the allocation's descriptor, once, while its session may
    /// use the lease.
    pub fn grant(
        &self,
        caller: Caller,
        lease: LeaseId,
        allocation: AllocationId,
        now: Instant,
    ) -> Token {
        let mut inner = self.inner.lock();
        let its = inner.order.entry(caller.process.uid).or_default();
        let oldest = (its.len() >= MAX_TOKENS).then(|| its.pop_front()).flatten();
        if let Some((_, oldest)) = oldest {
            inner.remove(oldest);
        }
        let token: Token = rand::random();
        let expires = now + TOKEN_LIFE;
        let grant = Grant {
            caller,
            lease,
            allocation,
            expires,
        };
        inner.tokens.insert(token, grant);
        inner.of_lease.entry(lease).or_default().insert(token);
        let its = inner.order.entry(caller.process.uid).or_default();
        its.push_back((expires, token));
        token
    }

    /// Uses a token up, and returns its descriptor. `None`: the token is unknown, used or too old, or belongs to
    /// another process, or nothing of the allocation is on offer any more.
    pub fn fetch(&self, process: Process, token: Token, now: Instant) -> Option<Arc<OwnedFd>> {
        let mut inner = self.inner.lock();
        // An attempt by another process must not use the token up.
        let grant = inner.tokens.get(&token)?;
        if grant.caller.process != process {
            return None;
        }
        let grant = inner.remove(token)?;
        if grant.expires <= now {
            return None;
        }
        let kept = inner.kept.get(&grant.allocation)?;
        Some(Arc::clone(&kept.descriptor))
    }

    /// Drops the tokens of a lease that nobody holds any more.
    pub fn lease_over(&self, lease: LeaseId) {
        let mut inner = self.inner.lock();
        for token in inner.of_lease.remove(&lease).unwrap_or_default() {
            inner.tokens.remove(&token);
        }
    }

    /// Drops the session's tokens of leases that it has let go of.
    pub fn let_go(&self, session: SessionId, leases: &[LeaseId]) {
        let mut inner = self.inner.lock();
        for lease in leases {
            let its = inner.of_lease.get(lease).cloned().unwrap_or_default();
            for token in its {
                if inner
                    .tokens
                    .get(&token)
                    .is_some_and(|grant| grant.caller.session == session)
                {
                    inner.remove(token);
                }
            }
        }
    }

    /// Drops tokens and uploads that are too old.
    pub fn expire(&self, now: Instant) {
        let mut inner = self.inner.lock();
        let mut over = Vec::new();
        inner.order.retain(|_, its| {
            while let Some((expires, token)) = its.front().copied()
                && expires <= now
            {
                over.push(token);
                its.pop_front();
            }
            !its.is_empty()
        });
        for token in over {
            inner.remove(token);
        }
        inner.waiting.retain(|_, upload| upload.expires > now);
    }

    /// How many descriptors are kept or wait for their offer.
    pub fn count(&self) -> usize {
        let inner = self.inner.lock();
        inner.kept.len() + inner.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::core::Connection;

    const DONOR: SessionId = SessionId(1);
    const ALLOCATION: AllocationId = AllocationId([1; 16]);
    const LEASE: LeaseId = LeaseId(7);
    const LESSEE: Process = Process {
        pid: 10,
        birth: 1,
        uid: 0,
    };

    fn lessee() -> Caller {
        Caller {
            session: SessionId(2),
            process: LESSEE,
            connection: Connection::default(),
        }
    }

    fn descriptor() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn on_offer(now: Instant) -> Descriptors {
        let descriptors = Descriptors::new(2);
        descriptors
            .upload(DONOR, 1_000, ALLOCATION, descriptor(), now)
            .unwrap();
        descriptors.check_offer(DONOR, ALLOCATION).unwrap();
        descriptors.offered(DONOR, ALLOCATION);
        descriptors
    }

    #[test]
    fn a_token_is_good_once_and_only_for_its_process() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let token = descriptors.grant(lessee(), LEASE, ALLOCATION, now);
        let reborn = Process { birth: 2, ..LESSEE };
        assert!(descriptors.fetch(reborn, token, now).is_none());
        assert!(descriptors.fetch(LESSEE, [0; 16], now).is_none());
        assert!(descriptors.fetch(LESSEE, token, now).is_some());
        assert!(descriptors.fetch(LESSEE, token, now).is_none());
    }

    #[test]
    fn a_token_ends_with_its_time_or_with_the_offer() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let token = descriptors.grant(lessee(), LEASE, ALLOCATION, now);
        assert!(descriptors.fetch(LESSEE, token, now + TOKEN_LIFE).is_none());
        let token = descriptors.grant(lessee(), LEASE, ALLOCATION, now);
        descriptors.discard(ALLOCATION);
        assert!(descriptors.fetch(LESSEE, token, now).is_none());
        assert_eq!(descriptors.count(), 0);
    }

    /// A token ends with its lease, and for a session that lets go of the lease or leaves. The twins: tokens of another
    /// lease, and of another session, stay.
    #[test]
    fn a_token_ends_with_its_lease() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let other = LeaseId(8);
        let reader = Caller {
            session: SessionId(3),
            ..lessee()
        };
        let grant = |caller, lease| descriptors.grant(caller, lease, ALLOCATION, now);
        let works = |token| descriptors.fetch(LESSEE, token, now).is_some();
        let tokens = [
            grant(lessee(), LEASE),
            grant(lessee(), other),
            grant(reader, LEASE),
        ];
        descriptors.let_go(lessee().session, &[LEASE]);
        assert_eq!(tokens.map(works), [false, true, true]);
        let late = [grant(reader, LEASE), grant(reader, other)];
        descriptors.lease_over(LEASE);
        assert_eq!(late.map(works), [false, true]);
        let left = [grant(lessee(), other), grant(reader, other)];
        descriptors.forget(reader.session);
        assert_eq!(left.map(works), [true, false]);
        let inner = descriptors.inner.lock();
        assert!(inner.tokens.is_empty() && inner.of_lease.is_empty());
    }

    #[test]
    fn an_offer_needs_the_sessions_own_upload() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let missing = AllocationId([2; 16]);
        assert_eq!(
            descriptors.check_offer(DONOR, missing),
            Err(Refused::NoDescriptor(missing))
        );
        assert_eq!(
            descriptors.check_offer(SessionId(2), ALLOCATION),
            Err(Refused::NoDescriptor(ALLOCATION))
        );
    }

    #[test]
    fn no_more_are_kept_than_may_be_and_unoffered_ones_expire() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let second = AllocationId([2; 16]);
        let third = AllocationId([3; 16]);
        let upload = |allocation| descriptors.upload(DONOR, 1_000, allocation, descriptor(), now);
        upload(second).unwrap();
        assert_eq!(upload(third), Err(Full));
        upload(second).unwrap();
        descriptors.expire(now + UPLOAD_LIFE);
        upload(third).unwrap();
        descriptors.forget(DONOR);
        assert_eq!(descriptors.count(), 1, "what is on offer stays");
    }

    /// Another user's grants cost nobody a token. The twin: the user's own do.
    #[test]
    fn a_flood_of_grants_costs_nobody_else_a_token() {
        let now = Instant::now();
        for (uid, kept) in [(LESSEE.uid + 1, true), (LESSEE.uid, false)] {
            let descriptors = on_offer(now);
            let token = descriptors.grant(lessee(), LEASE, ALLOCATION, now);
            let flood = Caller {
                session: SessionId(3),
                process: Process {
                    pid: 11,
                    birth: 1,
                    uid,
                },
                connection: Connection::default(),
            };
            for _ in 0..MAX_TOKENS {
                descriptors.grant(flood, LEASE, ALLOCATION, now);
            }
            assert_eq!(descriptors.fetch(LESSEE, token, now).is_some(), kept);
        }
    }

    #[test]
    fn uploads_of_many_sessions_of_one_user_are_bounded_together() {
        let now = Instant::now();
        let descriptors = Descriptors::new(1 << 14);
        let upload = |session: u64, uid| {
            let id = AllocationId((u128::from(session) << 64 | u128::from(uid)).to_le_bytes());
            descriptors.upload(SessionId(session), uid, id, descriptor(), now)
        };
        let room = MAX_WAITING_PER_USER as u64;
        for session in 0..room {
            upload(session, 1_000).unwrap();
        }
        assert_eq!(upload(room, 1_000), Err(Full));
        upload(room, 2_000).unwrap();
    }

    #[test]
    fn what_is_refused_or_returned_is_held_no_longer() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let refused = AllocationId([2; 16]);
        for allocation in [ALLOCATION, refused] {
            descriptors
                .upload(DONOR, LESSEE.uid, allocation, descriptor(), now)
                .unwrap();
        }
        descriptors.refused(DONOR, refused);
        assert!(descriptors.check_offer(DONOR, refused).is_err());
        assert_eq!(descriptors.count(), 2, "what is on offer stays");
        descriptors.discard(ALLOCATION);
        assert_eq!(descriptors.count(), 0);
    }

    #[test]
    fn expired_tokens_leave_nothing_behind() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        for _ in 0..10 {
            descriptors.grant(lessee(), LEASE, ALLOCATION, now);
        }
        descriptors.expire(now + TOKEN_LIFE);
        let inner = descriptors.inner.lock();
        assert!(inner.tokens.is_empty() && inner.order.is_empty() && inner.of_lease.is_empty());
    }
}
