//! Quotas: how much a namespace or a tenant may hold, as configured or as an operator set it.

use std::collections::BTreeMap;

use super::{effect::Refusal, event::QuotaTarget};

/// Quotas set at a time.
const MAX_QUOTAS: usize = 4_096;

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

    /// The most all namespaces of a tenant may hold together, bytes.
    pub(super) fn of_tenant(&self, tenant: &str) -> Option<u64> {
        let set = self.set.get(&QuotaTarget::Tenant(tenant.to_owned()));
        set.copied()
    }

    /// What operators set, bytes.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&QuotaTarget, u64)> {
        self.set.iter().map(|(target, bytes)| (target, *bytes))
    }
}
