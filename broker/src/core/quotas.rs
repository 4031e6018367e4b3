//! Quotas: how much a namespace or a tenant may hold, as configured or as an operator set it.

use super::{
    Effect, Note, QuotaTarget, Record, Refusal, Reply, SetQuota, index::Namespace, state::State,
};

/// Quotas set at a time.
const MAX_QUOTAS: usize = 4_096;

impl State {
    pub(super) fn set_quota(&mut self, set: SetQuota) -> Result<Reply, Refusal> {
        let SetQuota { target, bytes } = set;
        let new = bytes.is_some() && !self.quotas.contains_key(&target);
        if new && self.quotas.len() >= MAX_QUOTAS {
            return Err(Refusal::Limit {
                what: "quotas",
                limit: MAX_QUOTAS as u64,
            });
        }
        if self.replace_quota(target.clone(), bytes) {
            self.out.push(Effect::Record(Record::Quota {
                target: target.clone(),
                bytes,
            }));
        }
        let bounded = |namespace: &&Namespace| match &target {
            QuotaTarget::Namespace(name) => *namespace.name == **name,
            QuotaTarget::Tenant(tenant) => *namespace.tenant == **tenant,
        };
        let namespaces = self.index.iter().map(|(_, namespace)| namespace);
        let leased = namespaces.filter(bounded).map(|n| n.leased_bytes);
        let leased_bytes = leased.sum();
        self.note(Note::QuotaSet { target, bytes });
        Ok(Reply::QuotaSet { leased_bytes })
    }

    /// Says whether that changed anything.
    pub(super) fn replace_quota(&mut self, target: QuotaTarget, bytes: Option<u64>) -> bool {
        match bytes {
            Some(bytes) => self.quotas.insert(target, bytes) != Some(bytes),
            None => self.quotas.remove(&target).is_some(),
        }
    }

    /// The most a tenant's namespace of this name may hold, bytes.
    pub(super) fn namespace_quota(&self, name: &str) -> Option<u64> {
        let set = self.quotas.get(&QuotaTarget::Namespace(name.to_owned()));
        set.copied().or(self.config.namespace_quota_bytes)
    }

    /// Whether the namespace or its tenant holds too much by `beyond`, which is told what is held and the quota.
    pub(super) fn over_set_quota(
        &self,
        tenant: &str,
        name: &str,
        beyond: impl Fn(u64, Option<u64>) -> bool,
    ) -> bool {
        let namespace = self.index.find_namespace(tenant, name);
        let held = namespace.map_or(0, |key| self.index.namespace(key).leased_bytes);
        if beyond(held, self.namespace_quota(name)) {
            return true;
        }
        let tenant_quota = self.quotas.get(&QuotaTarget::Tenant(tenant.to_owned()));
        // Only who has a tenant quota pays for the sum.
        tenant_quota.is_some_and(|most| beyond(self.index.held_by(tenant), Some(*most)))
    }

    /// What operators set, bytes.
    pub fn quotas(&self) -> impl Iterator<Item = (&QuotaTarget, u64)> {
        self.quotas.iter().map(|(target, bytes)| (target, *bytes))
    }
}
