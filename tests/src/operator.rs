//! The node as its operator sees it, and whether its accounts hold.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use swiftcache_proto::v1::{self, LeaseState};

use crate::{engine::eventually, node::Node, wire::Wire};

/// Asks the Admin service.
#[derive(Clone, Debug)]
pub struct Operator {
    wire: Wire,
}

impl Operator {
    /// The node's operator.
    ///
    /// # Errors
    /// When the operating system refuses a thread.
    pub fn of(node: &Node) -> Result<Self> {
        Ok(Self {
            wire: Wire::new(&node.socket())?,
        })
    }

    /// The connection.
    pub fn wire(&self) -> &Wire {
        &self.wire
    }

    /// The node in one answer.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn node(&self) -> Result<v1::GetNodeResponse> {
        let mut admin = self.wire.admin();
        Ok(self
            .wire
            .wait(admin.get_node(v1::GetNodeRequest {}))?
            .into_inner())
    }

    /// Every session.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn sessions(&self) -> Result<Vec<v1::SessionStatus>> {
        let mut admin = self.wire.admin();
        let answer = self
            .wire
            .wait(admin.list_sessions(v1::ListSessionsRequest {}))?;
        Ok(answer.into_inner().sessions)
    }

    /// Every region.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn regions(&self) -> Result<Vec<v1::RegionStatus>> {
        let mut admin = self.wire.admin();
        let request = v1::ListRegionsRequest::default();
        Ok(self
            .wire
            .wait(admin.list_regions(request))?
            .into_inner()
            .regions)
    }

    /// Every lease.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn leases(&self) -> Result<Vec<v1::LeaseStatus>> {
        let mut admin = self.wire.admin();
        let request = v1::ListLeasesRequest::default();
        Ok(self
            .wire
            .wait(admin.list_leases(request))?
            .into_inner()
            .leases)
    }

    /// Every namespace.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn namespaces(&self) -> Result<Vec<v1::NamespaceStatus>> {
        let mut admin = self.wire.admin();
        let answer = self
            .wire
            .wait(admin.list_namespaces(v1::ListNamespacesRequest {}))?;
        Ok(answer.into_inner().namespaces)
    }

    /// The last events.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn events(&self) -> Result<Vec<v1::EventRecord>> {
        let mut admin = self.wire.admin();
        let request = v1::ListEventsRequest {
            limit: 1_000,
            ..Default::default()
        };
        Ok(self
            .wire
            .wait(admin.list_events(request))?
            .into_inner()
            .events)
    }

    /// The node's account, after checking that its devices' accounts balance and make it up, and that no slab is
    /// lent twice.
    ///
    /// # Errors
    /// When they do not.
    pub fn account(&self) -> Result<v1::Account> {
        let node = self.node()?;
        let devices = node.devices.iter().filter_map(|status| status.account);
        let total = node.total.unwrap_or_default();
        balanced(&total, devices)?;
        for region in self.regions()? {
            balanced(&region.account.unwrap_or_default(), region.account)?;
        }
        lent_once(&self.leases()?)?;
        Ok(total)
    }

    /// As [`Self::account`], when nothing changes any more: then regions and leases make up the node too.
    ///
    /// # Errors
    /// When they do not.
    pub fn settled(&self) -> Result<v1::Account> {
        let total = self.account()?;
        balanced(
            &total,
            self.regions()?
                .into_iter()
                .filter_map(|region| region.account),
        )?;
        let mut by_state = BTreeMap::new();
        for lease in self.leases()? {
            *by_state.entry(lease.state()).or_insert(0) += lease.bytes;
        }
        let bytes = |state| by_state.get(&state).copied().unwrap_or(0);
        ensure!(
            bytes(LeaseState::Active) == total.leased_bytes,
            "{total:?} {by_state:?}"
        );
        Ok(total)
    }

    /// Waits until the node's account is as it should be; it balances all the while.
    ///
    /// # Errors
    /// When it is not after a minute.
    pub fn eventually(&self, what: &str, holds: impl Fn(&v1::Account) -> bool) -> Result<()> {
        let mut last = v1::Account::default();
        eventually(what, || {
            last = self.account()?;
            Ok(holds(&last))
        })
        .map_err(|error| error.context(format!("{last:?}")))
    }
}

/// Whether `parts` make up `whole`, and each has all its bytes in one place.
///
/// # Errors
/// When not.
pub fn balanced(whole: &v1::Account, parts: impl IntoIterator<Item = v1::Account>) -> Result<()> {
    let mut sum = v1::Account::default();
    for part in parts {
        let places = part.free_bytes
            + part.leased_bytes
            + part.draining_bytes
            + part.zombie_bytes
            + part.scrubbing_bytes;
        ensure!(
            part.offered_bytes == places,
            "bytes are lost or made up: {part:?}"
        );
        sum.offered_bytes += part.offered_bytes;
        sum.free_bytes += part.free_bytes;
        sum.leased_bytes += part.leased_bytes;
        sum.draining_bytes += part.draining_bytes;
        sum.zombie_bytes += part.zombie_bytes;
        sum.scrubbing_bytes += part.scrubbing_bytes;
    }
    ensure!(
        sum == *whole,
        "the parts are {sum:?}, the whole is {whole:?}"
    );
    Ok(())
}

/// Whether no two leases are of one slab.
///
/// # Errors
/// When they are.
pub fn lent_once(leases: &[v1::LeaseStatus]) -> Result<()> {
    let mut slabs = BTreeMap::new();
    for lease in leases {
        let before = slabs.insert((&lease.region_id, lease.slab), lease);
        ensure!(
            before.is_none(),
            "one slab is lent twice: {before:?} and {lease:?}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_byte_is_noticed() {
        let mut account = v1::Account {
            offered_bytes: 3,
            free_bytes: 1,
            zombie_bytes: 2,
            ..Default::default()
        };
        balanced(&account, [account]).unwrap();
        assert!(balanced(&account, [account, account]).is_err());
        account.free_bytes = 0;
        assert!(balanced(&account, [account]).is_err());
    }

    #[test]
    fn a_slab_lent_twice_is_noticed() {
        let mut leases = [0, 1].map(|slab| v1::LeaseStatus {
            slab,
            ..Default::default()
        });
        lent_once(&leases).unwrap();
        leases[1].slab = 0;
        assert!(lent_once(&leases).is_err());
    }
}
