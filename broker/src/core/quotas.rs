//! Quotas: how much a namespace or a tenant may hold, as configured or as an operator set it.

use std::collections::BTreeMap;

use super::{effect::Refusal, event::QuotaTarget};

/// Quotas set at a time.
const MAX_QUOTAS: usize = 4_096;

/// The user of a tenant: `1000` of `1000/batch` and of `1000`.
pub(super) fn user_of(tenant: &str) -> &str {
    tenant.split_once('/').map_or(tenant, |(user, _)| user)
}

/// Whether a text is a uid as tenants are named: `1000`, and not `01000` or `+1000`, which would name nobody.
pub fn is_uid(text: &str) -> bool {
    (text.parse::<u32>()).is_ok_and(|uid| uid.to_string() == text)
}

/// Whether a tenant is another one, or has it as its user.
pub(super) fn is_of(tenant: &str, other: &str) -> bool {
    tenant == other || user_of(tenant) == other
}

/// All quotas.
#[derive(Clone, Debug)]
pub(super) struct Quotas {
    /// What operators set, in place of what is configured, bytes.
    set: BTreeMap<QuotaTarget, u64>,
    /// The most a tenant's namespace may hold that has no quota of its own, bytes; `None` is no quota.
    of_namespaces: Option<u64>,
}

impl Quotas {
    pub(super) fn new(of_namespaces: Option<u64>) -> Self {
        Self {
            set: BTreeMap::new(),
            of_namespaces,
        }
    }

    /// Whether a quota may be set, or set anew.
    pub(super) fn may_set(&self, target: &QuotaTarget, bytes: Option<u64>) -> Result<(), Refusal> {
        let new = bytes.is_some() && !self.set.contains_key(target);
        if new && self.set.len() >= MAX_QUOTAS {
            return Err(Refusal::Limit {
                what: "quotas",
                limit: MAX_QUOTAS as u64,
            });
        }
        Ok(())
    }

    /// Says whether that changed anything.
    pub(super) fn set(&mut self, target: QuotaTarget, bytes: Option<u64>) -> bool {
        match bytes {
            Some(bytes) => self.set.insert(target, bytes) != Some(bytes),
            None => self.set.remove(&target).is_some(),
        }
    }

    /// The most a tenant's namespace of this name may hold, bytes.
    pub(super) fn of_namespace(&self, name: &str) -> Option<u64> {
        let set = self.set.get(&QuotaTarget::Namespace(name.to_owned()));
        set.copied().or(self.of_namespaces)
    }

    /// What bounds a tenant: the most that its user may hold under all labels together, and the most that it may hold
    /// itself, bytes. Each with the tenant whose holdings count.
    pub(super) fn of_tenant<'a>(&self, tenant: &'a str) -> impl Iterator<Item = (&'a str, u64)> {
        let user = user_of(tenant);
        let own = (user != tenant).then_some(tenant);
        let bounds = [Some(user), own].into_iter().flatten();
        bounds.filter_map(|of| {
            let set = self.set.get(&QuotaTarget::Tenant(of.to_owned()));
            Some((of, *set?))
        })
    }

    /// What operators set, bytes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&QuotaTarget, u64)> {
        self.set.iter().map(|(target, bytes)| (target, *bytes))
    }
}
