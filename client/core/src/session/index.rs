//! Which of an engine's blocks every rank can find in donors' memory: the broker's index, followed.
//!
//! A cache-aware router is told of a block when it can be found, and again when it can be found no more. Only the broker knows
//! both, whoever evicts, moves or revokes. So its `Watch` is followed, and what it says of the blocks that an engine has named
//! is kept until it is taken.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use swiftcache_proto::{
    domain::{BlockHash, Medium},
    v1::{self, admin_client::AdminClient},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, warn};

use super::{LinkState, Session, Shared};

/// Bytes of a block's hash on the wire.
const HASH_BYTES: usize = 16;
/// The pause before the next attempt to watch.
const PAUSE: Duration = Duration::from_millis(100);
/// The same where the broker does not know how.
const LONG_PAUSE: Duration = Duration::from_secs(60);

/// A block that every rank can find in a kind of memory now, or no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Findable {
    /// The block.
    pub hash: BlockHash,
    /// The kind of memory. Where ranks have it in different kinds, the slowest of them.
    pub medium: Medium,
    /// It can be found there. Otherwise its last copy is gone.
    pub found: bool,
}

/// The broker's index of some namespaces, one of each rank, followed in the background until it is dropped.
pub struct IndexWatch {
    mirror: Arc<Mutex<Mirror>>,
    _task: AbortOnDropHandle<()>,
}

impl std::fmt::Debug for IndexWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mirror = self.mirror.lock();
        let mut out = f.debug_struct("IndexWatch");
        out.field("namespaces", &mirror.namespaces)
            .field("named", &mirror.named.len());
        out.finish_non_exhaustive()
    }
}

impl Session {
    /// Follows what the broker's index has of these namespaces of the session's tenant.
    pub fn watch_index(&self, namespaces: Vec<String>) -> IndexWatch {
        let mirror = Arc::new(Mutex::new(Mirror::new(namespaces)));
        let follow = follow(Arc::downgrade(&self.shared), Arc::clone(&mirror));
        IndexWatch {
            mirror,
            _task: AbortOnDropHandle::new(self.shared.runtime.spawn(follow)),
        }
    }
}

impl IndexWatch {
    /// From now on [`take`](Self::take) tells of these blocks: at once, where they can be found already.
    pub fn name(&self, hashes: &[BlockHash]) {
        let mut mirror = self.mirror.lock();
        for hash in hashes {
            mirror.named.entry(*hash).or_default();
            mirror.touch(*hash);
        }
    }

    /// It tells of these no more. Returns those that it has told to be found: nobody is told that they are gone.
    pub fn forget(&self, hashes: &[BlockHash]) -> Vec<Findable> {
        let mut mirror = self.mirror.lock();
        let mut told = Vec::new();
        for hash in hashes {
            let named = mirror.named.remove(hash).unwrap_or_default();
            told.extend(changes(*hash, named.told, 0));
        }
        told
    }

    /// What has become of the named blocks since the last call, in the order in which it did. Waits for nothing.
    pub fn take(&self) -> Vec<Findable> {
        self.mirror.lock().take()
    }
}

/// Kinds of memory as bits.
const HBM: u8 = 1;
const HOST: u8 = 2;

fn bit(medium: v1::Medium) -> u8 {
    match medium {
        v1::Medium::Host => HOST,
        v1::Medium::Hbm | v1::Medium::Unspecified => HBM,
    }
}

/// What is to be told of a block that was told to be in one set of kinds, and is in another.
fn changes(hash: BlockHash, told: u8, now: u8) -> impl Iterator<Item = Findable> {
    let media = [(HBM, Medium::Hbm), (HOST, Medium::Host)];
    let changed = move |(bit, _): &(u8, Medium)| (told ^ now) & bit != 0;
    media
        .into_iter()
        .filter(changed)
        .map(move |(bit, medium)| Findable {
            hash,
            medium,
            found: now & bit != 0,
        })
}

/// What was told of a named block, and whether it is to be looked at.
#[derive(Clone, Copy, Debug, Default)]
struct Named {
    told: u8,
    touched: bool,
}

/// The kinds of memory that a rank's blocks are in.
type Blocks = HashMap<BlockHash, u8>;

/// The index of some namespaces, and what an engine wants to know of it.
#[derive(Debug)]
struct Mirror {
    namespaces: Vec<String>,
    /// Of each namespace.
    blocks: Vec<Blocks>,
    /// What takes their place once it is whole, after a beginning anew: until then nobody is told that anything is gone.
    anew: Option<Vec<Blocks>>,
    /// It was whole once.
    known: bool,
    /// Where to go on: a broker and a number of its.
    place: Option<(u64, u64)>,
    named: HashMap<BlockHash, Named>,
    /// The named blocks that may have changed, in the order in which they did.
    touched: Vec<BlockHash>,
}

impl Mirror {
    fn new(namespaces: Vec<String>) -> Self {
        Self {
            blocks: vec![Blocks::new(); namespaces.len()],
            namespaces,
            anew: None,
            known: false,
            place: None,
            named: HashMap::new(),
            touched: Vec::new(),
        }
    }

    fn touch(&mut self, hash: BlockHash) {
        if let Some(named) = self.named.get_mut(&hash)
            && !std::mem::replace(&mut named.touched, true)
        {
            self.touched.push(hash);
        }
    }

    /// Takes a message in.
    fn hear(&mut self, message: &v1::WatchResponse) {
        if message.anew {
            self.anew = Some(vec![Blocks::new(); self.namespaces.len()]);
        }
        for change in &message.changes {
            let of = |name: &String| *name == change.namespace;
            let Some(rank) = self.namespaces.iter().position(of) else {
                continue;
            };
            let bit = bit(change.medium());
            for hash in change.hashes.chunks_exact(HASH_BYTES) {
                let mut bytes = [0; HASH_BYTES];
                bytes.copy_from_slice(hash);
                let hash = BlockHash(bytes);
                let blocks = self.anew.as_mut().unwrap_or(&mut self.blocks);
                if !change.removed {
                    *blocks[rank].entry(hash).or_default() |= bit;
                } else if let Some(media) = blocks[rank].get_mut(&hash) {
                    *media &= !bit;
                    if *media == 0 {
                        blocks[rank].remove(&hash);
                    }
                }
                if self.anew.is_none() {
                    self.touch(hash);
                }
            }
        }
        self.place = message.sequence.map(|number| (message.boot_id, number));
        if message.current
            && let Some(whole) = self.anew.take()
        {
            self.blocks = whole;
            self.known = true;
            let named: Vec<_> = self.named.keys().copied().collect();
            for hash in named {
                self.touch(hash);
            }
        }
    }

    /// The kinds of memory in which every rank can find a block.
    fn media(&self, hash: &BlockHash) -> u8 {
        let of = |blocks: &Blocks| blocks.get(hash).copied().unwrap_or(0);
        let (mut all, mut any, mut everywhere) = (HBM | HOST, 0, true);
        for blocks in &self.blocks {
            let media = of(blocks);
            all &= media;
            any |= media;
            everywhere &= media != 0;
        }
        match everywhere {
            true => all & HBM | any & HOST,
            false => 0,
        }
    }

    fn take(&mut self) -> Vec<Findable> {
        if !self.known {
            return Vec::new();
        }
        let mut told = Vec::new();
        for hash in std::mem::take(&mut self.touched) {
            let now = self.media(&hash);
            // It may have been forgotten.
            if let Some(named) = self.named.get_mut(&hash) {
                named.touched = false;
                let before = std::mem::replace(&mut named.told, now);
                told.extend(changes(hash, before, now));
            }
        }
        told
    }
}

/// Watches, and watches again after every loss, until the session is over.
async fn follow(session: Weak<Shared>, mirror: Arc<Mutex<Mirror>>) {
    loop {
        let Some(shared) = session.upgrade() else {
            return;
        };
        let up = match &*shared.link.lock() {
            LinkState::Up(connection) => Some(Arc::clone(connection)),
            LinkState::Down { .. } => None,
            LinkState::Closed => return,
        };
        drop(shared);
        let mut pause = PAUSE;
        if let Some(connection) = up {
            let request = {
                let mirror = mirror.lock();
                let (boot_id, after) = mirror.place.unzip();
                v1::WatchRequest {
                    boot_id: boot_id.unwrap_or(0),
                    after_sequence: after,
                    namespaces: mirror.namespaces.clone(),
                    session_id: connection.session.0,
                    ..Default::default()
                }
            };
            let mut admin = AdminClient::new(connection.channel.clone());
            // A connection ends with its session's stream, and not when nobody uses it any more.
            let over = connection.over.clone();
            drop(connection);
            match admin.watch(request).await {
                Ok(stream) => {
                    let mut stream = stream.into_inner();
                    let heard = async {
                        while let Ok(Some(message)) = stream.message().await {
                            mirror.lock().hear(&message);
                        }
                    };
                    let _ = over.run_until_cancelled(heard).await;
                }
                Err(status) if status.code() == tonic::Code::Unimplemented => {
                    warn!(
                        "this broker is too old to tell of its index: nobody is told which blocks are kept"
                    );
                    pause = LONG_PAUSE;
                }
                Err(status) => debug!(%status, "the index cannot be watched now"),
            }
        }
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u8) -> BlockHash {
        BlockHash([number; HASH_BYTES])
    }

    fn change(
        namespace: &str,
        medium: v1::Medium,
        removed: bool,
        numbers: &[u8],
    ) -> v1::IndexChange {
        let hashes = numbers.iter().flat_map(|number| hash(*number).0);
        v1::IndexChange {
            tenant: "1000".to_owned(),
            namespace: namespace.to_owned(),
            medium: medium.into(),
            removed,
            hashes: hashes.collect::<Vec<u8>>().into(),
        }
    }

    fn message(anew: bool, sequence: u64, changes: Vec<v1::IndexChange>) -> v1::WatchResponse {
        v1::WatchResponse {
            boot_id: 9,
            anew,
            changes,
            sequence: Some(sequence),
            current: true,
        }
    }

    /// What is to be told of these blocks, each as number, kind and whether it is found.
    fn told(mirror: &mut Mirror) -> Vec<(u8, Medium, bool)> {
        let taken = mirror.take().into_iter();
        taken
            .map(|it| (it.hash.0[0], it.medium, it.found))
            .collect()
    }

    fn name(mirror: &mut Mirror, numbers: &[u8]) {
        for number in numbers {
            mirror.named.entry(hash(*number)).or_default();
            mirror.touch(hash(*number));
        }
    }

    use v1::Medium::{Hbm, Host};

    #[test]
    fn a_named_block_is_told_of_when_it_comes_moves_and_goes() {
        let mut mirror = Mirror::new(vec!["model".to_owned()]);
        name(&mut mirror, &[1, 2]);
        assert_eq!(told(&mut mirror), [], "nothing is known yet");
        let first = change("model", Hbm, false, &[2, 3]);
        mirror.hear(&message(true, 1, vec![first]));
        assert_eq!(told(&mut mirror), [(2, Medium::Hbm, true)]);
        // One that is there already when it is named.
        name(&mut mirror, &[3]);
        assert_eq!(told(&mut mirror), [(3, Medium::Hbm, true)]);
        let there = change("model", Host, false, &[2]);
        mirror.hear(&message(false, 2, vec![there]));
        let gone = change("model", Hbm, true, &[2]);
        mirror.hear(&message(false, 3, vec![gone]));
        assert_eq!(
            told(&mut mirror),
            [(2, Medium::Hbm, false), (2, Medium::Host, true)]
        );
        // What comes and goes between two looks is no news, nor is another namespace.
        let other = change("other", Hbm, false, &[1]);
        let come = change("model", Hbm, false, &[1]);
        let gone = change("model", Hbm, true, &[1]);
        mirror.hear(&message(false, 5, vec![other, come, gone]));
        assert_eq!(told(&mut mirror), []);
        assert_eq!(mirror.place, Some((9, 5)));
    }

    #[test]
    fn a_block_counts_when_every_rank_has_it() {
        let mut mirror = Mirror::new(vec!["rank0".to_owned(), "rank1".to_owned()]);
        name(&mut mirror, &[1, 2]);
        let one = change("rank0", Hbm, false, &[1, 2]);
        mirror.hear(&message(true, 1, vec![one]));
        assert_eq!(told(&mut mirror), []);
        let other = change("rank1", Hbm, false, &[1]);
        let slow = change("rank1", Host, false, &[2]);
        mirror.hear(&message(false, 2, vec![other, slow]));
        assert_eq!(
            told(&mut mirror),
            [(1, Medium::Hbm, true), (2, Medium::Host, true)]
        );
        let gone = change("rank0", Hbm, true, &[1, 2]);
        mirror.hear(&message(false, 3, vec![gone]));
        assert_eq!(
            told(&mut mirror),
            [(1, Medium::Hbm, false), (2, Medium::Host, false)]
        );
    }

    /// A broker that has restarted says what there is. Only what is not among it is gone, and nothing is before it has said
    /// all.
    #[test]
    fn after_a_beginning_anew_only_the_difference_is_told() {
        let mut mirror = Mirror::new(vec!["model".to_owned()]);
        name(&mut mirror, &[1, 2, 3]);
        mirror.hear(&message(
            true,
            1,
            vec![change("model", Hbm, false, &[1, 2])],
        ));
        assert_eq!(told(&mut mirror).len(), 2);
        let mut part = message(true, 0, vec![change("model", Hbm, false, &[2])]);
        (part.sequence, part.current) = (None, false);
        mirror.hear(&part);
        assert_eq!(told(&mut mirror), []);
        assert_eq!(mirror.place, None, "there is nothing to go on from");
        mirror.hear(&message(false, 8, vec![change("model", Hbm, false, &[3])]));
        let mut all = told(&mut mirror);
        all.sort_by_key(|(number, ..)| *number);
        assert_eq!(all, [(1, Medium::Hbm, false), (3, Medium::Hbm, true)]);
    }
}
