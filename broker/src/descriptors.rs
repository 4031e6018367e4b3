//! Descriptors of donated allocations. Donors upload them, the broker keeps them while the allocation is on offer, and
//! lessees fetch them with a grant token.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{AllocationId, SessionId};

use crate::{core::Process, error::Refused};

/// A grant token. With it a lessee fetches a descriptor on the fd socket.
pub type Token = [u8; 16];

/// How long a grant token is valid. A lessee maps right after the grant. If an engine pauses for longer than a minute
/// before that, it will not map any more.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// How long an uploaded descriptor waits for its offer, which is the donor's next message.
const UPLOAD_LIFE: Duration = Duration::from_secs(60);
/// The most tokens that are kept: more than the slabs that one lease request can get. The oldest is dropped first.
const MAX_TOKENS: usize = 1 << 17;
/// The most descriptors that one session may have uploaded but not offered yet, so that a broken donor cannot use up
/// the descriptors of others.
const MAX_WAITING_PER_SESSION: usize = 256;

/// An upload was refused, because no more descriptors may be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

struct Upload {
    descriptor: Arc<OwnedFd>,
    expires: Instant,
}

struct Kept {
    donor: SessionId,
    descriptor: Arc<OwnedFd>,
}

struct Grant {
    process: Process,
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
    /// Tokens in the order in which they were made, with those that are used.
    order: VecDeque<(Instant, Token)>,
}

impl Descriptors {
    /// Keeps at most `limit` descriptors.
    pub fn new(limit: usize) -> Self {
        Self {
            inner: Mutex::default(),
            limit,
        }
    }

    /// Takes the descriptor of an allocation that a donor will offer next. Another upload for the allocation replaces
    /// it.
    ///
    /// # Errors
    /// [`Full`] when no more descriptors may be kept.
    pub fn upload(
        &self,
        session: SessionId,
        allocation: AllocationId,
        descriptor: OwnedFd,
        now: Instant,
    ) -> Result<(), Full> {
        let mut inner = self.inner.lock();
        let key = (session, allocation);
        let of_session = inner.waiting.keys().filter(|(of, _)| *of == session);
        let full = inner.waiting.len() + inner.kept.len() >= self.limit
            || of_session.count() >= MAX_WAITING_PER_SESSION;
        if full && !inner.waiting.contains_key(&key) {
            return Err(Full);
        }
        let upload = Upload {
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

    /// Drops the descriptor of an allocation of which nothing is on offer any more.
    pub fn discard(&self, allocation: AllocationId) {
        self.inner.lock().kept.remove(&allocation);
    }

    /// Drops what a session that is over has uploaded but not offered.
    pub fn forget(&self, session: SessionId) {
        self.inner
            .lock()
            .waiting
            .retain(|(of, _), _| *of != session);
    }

    /// Makes a token with which only `process` can fetch the allocation's descriptor, once.
    pub fn grant(&self, process: Process, allocation: AllocationId, now: Instant) -> Token {
        let mut inner = self.inner.lock();
        while inner.tokens.len() >= MAX_TOKENS
            && let Some((_, oldest)) = inner.order.pop_front()
        {
            inner.tokens.remove(&oldest);
        }
        let token: Token = rand::random();
        let expires = now + TOKEN_LIFE;
        let grant = Grant {
            process,
            allocation,
            expires,
        };
        inner.tokens.insert(token, grant);
        inner.order.push_back((expires, token));
        token
    }

    /// Uses a token up, and returns its descriptor. `None`: the token is unknown, used or too old, or belongs to
    /// another process, or nothing of the allocation is on offer any more.
    pub fn fetch(&self, process: Process, token: Token, now: Instant) -> Option<Arc<OwnedFd>> {
        let mut inner = self.inner.lock();
        // An attempt by another process must not use the token up.
        let grant = inner.tokens.get(&token)?;
        if grant.process != process {
            return None;
        }
        let grant = inner.tokens.remove(&token)?;
        if grant.expires <= now {
            return None;
        }
        let kept = inner.kept.get(&grant.allocation)?;
        Some(Arc::clone(&kept.descriptor))
    }

    /// Drops tokens and uploads that are too old.
    pub fn expire(&self, now: Instant) {
        let mut inner = self.inner.lock();
        while let Some((expires, token)) = inner.order.front().copied()
            && expires <= now
        {
            inner.order.pop_front();
            inner.tokens.remove(&token);
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

    const DONOR: SessionId = SessionId(1);
    const ALLOCATION: AllocationId = AllocationId([1; 16]);
    const LESSEE: Process = Process {
        pid: 10,
        birth: 1,
        uid: 0,
    };

    fn descriptor() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn on_offer(now: Instant) -> Descriptors {
        let descriptors = Descriptors::new(2);
        descriptors
            .upload(DONOR, ALLOCATION, descriptor(), now)
            .unwrap();
        descriptors.check_offer(DONOR, ALLOCATION).unwrap();
        descriptors.offered(DONOR, ALLOCATION);
        descriptors
    }

    #[test]
    fn a_token_is_good_once_and_only_for_its_process() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        let token = descriptors.grant(LESSEE, ALLOCATION, now);
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
        let token = descriptors.grant(LESSEE, ALLOCATION, now);
        assert!(descriptors.fetch(LESSEE, token, now + TOKEN_LIFE).is_none());
        let token = descriptors.grant(LESSEE, ALLOCATION, now);
        descriptors.discard(ALLOCATION);
        assert!(descriptors.fetch(LESSEE, token, now).is_none());
        assert_eq!(descriptors.count(), 0);
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
        let upload = |allocation| descriptors.upload(DONOR, allocation, descriptor(), now);
        upload(second).unwrap();
        assert_eq!(upload(third), Err(Full));
        upload(second).unwrap();
        descriptors.expire(now + UPLOAD_LIFE);
        upload(third).unwrap();
        descriptors.forget(DONOR);
        assert_eq!(descriptors.count(), 1, "what is on offer stays");
    }

    #[test]
    fn expired_tokens_leave_nothing_behind() {
        let now = Instant::now();
        let descriptors = on_offer(now);
        for _ in 0..10 {
            descriptors.grant(LESSEE, ALLOCATION, now);
        }
        descriptors.expire(now + TOKEN_LIFE);
        let inner = descriptors.inner.lock();
        assert!(inner.tokens.is_empty() && inner.order.is_empty());
    }
}
