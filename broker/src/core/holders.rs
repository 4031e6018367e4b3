//! Who holds how much, as a tree: users, the tenants of each, the namespaces of each of those.
//!
//! A user is what the kernel says it is. Labels and namespaces are a session's own choice, so they subdivide what their
//! user has, and add nothing to it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use super::{quotas::user_of, shares::scaled};

/// Somebody who holds something.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// By uid.
    User(Arc<str>),
    /// A user's own tenant, or one of its labels.
    Tenant(Arc<str>),
    /// By tenant and name.
    Namespace(Arc<str>, Arc<str>),
}

impl Holder {
    /// Whether it is the user of this tenant.
    pub(super) fn is_user_of(&self, tenant: &str) -> bool {
        matches!(self, Self::User(user) if **user == *user_of(tenant))
    }
}

/// A namespace, from its user down to itself.
pub(super) type Path = [Holder; LEVELS];

/// Users, tenants, namespaces.
pub(super) const LEVELS: usize = 3;

/// The path of a tenant's namespace.
pub(super) fn path(tenant: &Arc<str>, name: &Arc<str>) -> Path {
    let user = match user_of(tenant) {
        user if user.len() == tenant.len() => tenant.clone(),
        user => user.into(),
    };
    [
        Holder::User(user),
        Holder::Tenant(tenant.clone()),
        Holder::Namespace(tenant.clone(), name.clone()),
    ]
}

/// The tenant of a path.
pub(super) fn tenant_of([_, tenant, _]: &Path) -> &str {
    match tenant {
        Holder::User(name) | Holder::Tenant(name) | Holder::Namespace(name, _) => name,
    }
}

/// Weights, as configured; 1 where there is none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Weights {
    /// By user, and by tenant with a label.
    pub(super) tenants: BTreeMap<String, u32>,
    /// By name.
    pub(super) namespaces: BTreeMap<String, u32>,
}

impl Weights {
    /// How much more than others of its kind a holder gets when there is not enough for all.
    pub(super) fn of(&self, holder: &Holder) -> u64 {
        let weight = match holder {
            Holder::User(user) => self.tenants.get(&**user),
            // What is configured for a user is not for the one of its tenants that has no label.
            Holder::Tenant(tenant) if user_of(tenant) == &**tenant => None,
            Holder::Tenant(tenant) => self.tenants.get(&**tenant),
            Holder::Namespace(_, name) => self.namespaces.get(&**name),
        };
        weight.map_or(1, |weight| u64::from(*weight).max(1))
    }
}

/// Holders by what each holds for its weight, the most first.
type Ranking = BTreeSet<(Reverse<u64>, Holder)>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    bytes: u64,
    weight: u64,
    /// The holders among whom it is divided.
    within: Ranking,
}

impl Held {
    fn wealth(&self) -> Reverse<u64> {
        Reverse(scaled(self.bytes, 1 << 20, self.weight))
    }
}

/// Everybody who holds something.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Holders {
    known: BTreeMap<Holder, Held>,
    users: Ranking,
}

impl Holders {
    /// What somebody holds, bytes.
    pub(super) fn bytes(&self, holder: &Holder) -> u64 {
        self.known.get(holder).map_or(0, |held| held.bytes)
    }

    /// Everybody, with the bytes of each.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&Holder, u64)> {
        self.known.iter().map(|(holder, held)| (holder, held.bytes))
    }

    /// Within a holder, or of all users: who holds the most for its weight, or the next one after another; with its bytes.
    pub(super) fn next_wealthiest(
        &self,
        within: Option<&Holder>,
        after: Option<&Holder>,
    ) -> Option<(Holder, u64)> {
        let ranking = match within {
            Some(within) => &self.known.get(within)?.within,
            None => &self.users,
        };
        let from = match after {
            Some(after) => Bound::Excluded((self.known.get(after)?.wealth(), after.clone())),
            None => Bound::Unbounded,
        };
        let (_, holder) = ranking.range((from, Bound::Unbounded)).next()?;
        Some((holder.clone(), self.bytes(holder)))
    }

    /// A namespace holds so many bytes more, at least one.
    pub(super) fn add(&mut self, path: &Path, bytes: u64, weights: &Weights) {
        let mut within = None;
        for holder in path {
            let held = self.known.entry(holder.clone()).or_insert_with(|| Held {
                bytes: 0,
                weight: weights.of(holder),
                within: Ranking::new(),
            });
            let before = held.wealth();
            held.bytes += bytes;
            let after = held.wealth();
            self.rank(within, holder, before, Some(after));
            within = Some(holder);
        }
    }

    /// A namespace holds so many bytes less.
    pub(super) fn subtract(&mut self, path: &Path, bytes: u64) {
        let mut within = None;
        for holder in path {
            let Some(held) = self.known.get_mut(holder) else {
                return;
            };
            let before = held.wealth();
            held.bytes -= bytes;
            let after = (held.bytes > 0).then(|| held.wealth());
            self.rank(within, holder, before, after);
            within = Some(holder);
        }
        // From the namespace up, since a holder says who is within.
        for holder in path.iter().rev() {
            if self.bytes(holder) == 0 {
                self.known.remove(holder);
            }
        }
    }

    /// Gives a holder its place among its kind, or takes it away.
    fn rank(
        &mut self,
        within: Option<&Holder>,
        holder: &Holder,
        before: Reverse<u64>,
        after: Option<Reverse<u64>>,
    ) {
        let ranking = match within {
            None => Some(&mut self.users),
            Some(within) => self.known.get_mut(within).map(|held| &mut held.within),
        };
        if let Some(ranking) = ranking {
            ranking.remove(&(before, holder.clone()));
            ranking.extend(after.map(|after| (after, holder.clone())));
        }
    }
}
