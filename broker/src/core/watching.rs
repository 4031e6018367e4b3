//! Watching: the index as it is, then what changes of it.
//!
//! A watcher reads a page of the index at a time, and before each page whatever has changed since the last one. So what it has
//! read is true in the order in which it was read, however long it takes: a block that is there all the time lies in a slot that
//! some page shows, or was put there anew, which is a change.

use swiftcache_proto::domain::LeaseId;

use super::{
    books::Books,
    journal::{Change, Scope},
    quotas::user_of,
};

/// The most changes that are looked at in one turn, whether the watcher may see them or not.
const MOST_SEEN: usize = 4_096;
/// The most leases that are looked at in one turn.
const MOST_LEASES: usize = 256;

/// Which blocks somebody sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Only this user's, under all labels.
    pub user: Option<String>,
    /// Only this tenant's.
    pub tenant: Option<String>,
    /// Only those of namespaces of these names; any, if there are none.
    pub namespaces: Vec<String>,
}

impl Sight {
    fn has(&self, scope: &Scope) -> bool {
        let is = |wanted: &Option<String>, it: &str| wanted.as_deref().is_none_or(|of| of == it);
        is(&self.user, user_of(&scope.tenant))
            && is(&self.tenant, &scope.tenant)
            && (self.namespaces.is_empty()
                || self.namespaces.iter().any(|of| **of == *scope.namespace))
    }
}

/// How far somebody has read.
#[derive(Clone, Debug)]
pub struct Watcher {
    sight: Sight,
    /// The last change that it knows. `None`: it knows nothing yet.
    after: Option<u64>,
    /// Where it goes on reading the index: at this slot of this lease, or of the next one. `None`: it has read it all.
    index: Option<(LeaseId, u32)>,
}

/// What a watcher has read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// What it knew before counts no more: the whole index follows.
    pub anew: bool,
    /// What it knew, and what has changed since, in this order. Blocks of the index are added.
    pub changes: Vec<Change>,
    /// The number of the last change that it knows. `None`: it does not know the whole index yet.
    pub sequence: Option<u64>,
    /// It knows all there is to know now.
    pub current: bool,
}

impl Watcher {
    /// One that knows what a change with this number left, or nothing.
    pub fn new(sight: Sight, after: Option<u64>) -> Self {
        Self {
            sight,
            after,
            index: None,
        }
    }
}

/// Reads on, at most `most` entries.
pub(super) fn watch(books: &Books, watcher: &mut Watcher, most: usize) -> Watched {
    let journal = &books.journal;
    let mut changes = Vec::new();
    let known = watcher
        .after
        .and_then(|after| Some((after, journal.after(after)?)));
    let anew = known.is_none();
    let mut after = journal.sequence();
    match known {
        Some((known, new)) => {
            after = known;
            for change in new.take(MOST_SEEN) {
                if changes.len() >= most {
                    break;
                }
                after += 1;
                if watcher.sight.has(&change.scope) {
                    changes.push(change.clone());
                }
            }
        }
        None => watcher.index = Some((LeaseId(0), 0)),
    }
    watcher.after = Some(after);
    let told = after == journal.sequence();
    if told && let Some(at) = watcher.index {
        watcher.index = page(books, &watcher.sight, at, most, &mut changes);
    }
    let whole = watcher.index.is_none();
    Watched {
        anew,
        changes,
        sequence: whole.then_some(after),
        current: whole && told,
    }
}

/// Reads the index from a slot of a lease on, and says where to go on.
fn page(
    books: &Books,
    sight: &Sight,
    (first, slot): (LeaseId, u32),
    most: usize,
    found: &mut Vec<Change>,
) -> Option<(LeaseId, u32)> {
    let before = first.0.checked_sub(1).map(LeaseId);
    for (seen, (key, lease)) in books.leases.after(before).enumerate() {
        let id = lease.terms().id;
        if seen >= MOST_LEASES {
            return Some((id, 0));
        }
        let scope = books.index.namespace(lease.terms().namespace).scope();
        if !sight.has(scope) {
            continue;
        }
        let medium = books.index.medium(key);
        let from = if id == first { slot } else { 0 };
        for (slot, hash) in books.index.blocks_from(key, from) {
            if found.len() >= most {
                return Some((id, slot));
            }
            found.push(Change {
                scope: scope.clone(),
                medium,
                hash: *hash,
                added: true,
            });
        }
    }
    None
}
