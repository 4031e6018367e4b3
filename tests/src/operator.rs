//! The node as its operator sees it, with checks of its accounts.

use std::{collections::BTreeMap, error::Error as _};

use anyhow::{Result, ensure};
use swiftcache_proto::v1::{self, LeaseState, admin_client::AdminClient};
use tonic::{Code, Response, Status, transport::Channel};

use crate::{engine::eventually, node::Node, wire::Wire};

/// A client of the Admin service.
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

    /// The answer of GetNode.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn node(&self) -> Result<v1::GetNodeResponse> {
        self.ask(async |mut admin| admin.get_node(v1::GetNodeRequest {}).await)
    }

    /// The disk, where there is one.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn disk(&self) -> Result<Option<v1::DiskStatus>> {
        Ok(self.node()?.disks.into_iter().next())
    }

    /// Waits until so many blocks lie on the disk.
    ///
    /// # Errors
    /// When they do not come, or the broker does not answer.
    pub fn on_disk(&self, blocks: u64) -> Result<()> {
        eventually("blocks on the disk", || {
            Ok(self.disk()?.is_some_and(|disk| disk.blocks >= blocks))
        })
    }

    /// Every session.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn sessions(&self) -> Result<Vec<v1::SessionStatus>> {
        let mut request = v1::ListSessionsRequest::default();
        let mut all = Vec::new();
        loop {
            let page = self.ask(async |mut admin| admin.list_sessions(request.clone()).await)?;
            all.extend(page.sessions);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Every region.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn regions(&self) -> Result<Vec<v1::RegionStatus>> {
        let mut request = v1::ListRegionsRequest::default();
        let mut all = Vec::new();
        loop {
            let page = self.ask(async |mut admin| admin.list_regions(request.clone()).await)?;
            all.extend(page.regions);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Every lease.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn leases(&self) -> Result<Vec<v1::LeaseStatus>> {
        let mut request = v1::ListLeasesRequest::default();
        let mut all = Vec::new();
        loop {
            let page = self.ask(async |mut admin| admin.list_leases(request.clone()).await)?;
            all.extend(page.leases);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// Every namespace.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn namespaces(&self) -> Result<Vec<v1::NamespaceStatus>> {
        let mut request = v1::ListNamespacesRequest::default();
        let mut all = Vec::new();
        loop {
            let page = self.ask(async |mut admin| admin.list_namespaces(request.clone()).await)?;
            all.extend(page.namespaces);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            request.page_token = page.next_page_token;
        }
    }

    /// The last events.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn events(&self) -> Result<Vec<v1::EventRecord>> {
        let request = v1::ListEventsRequest {
            limit: 1_000,
            ..Default::default()
        };
        let answer = self.ask(async |mut admin| admin.list_events(request.clone()).await)?;
        Ok(answer.events)
    }

    /// Calls the Admin service. Calls it once more if the connection was to a broker that is gone.
    fn ask<T>(
        &self,
        call: impl AsyncFn(AdminClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T> {
        let answer = match self.wire.wait(call(self.wire.admin())) {
            Err(status) if status.code() == Code::Unavailable || status.source().is_some() => {
                self.wire.wait(call(self.wire.admin()))
            }
            answer => answer,
        };
        Ok(answer?.into_inner())
    }

    /// The node's account. Checks that the devices' accounts balance and add up to it, and that no slab is lent twice.
    ///
    /// # Errors
    /// When a check fails.
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

    /// Like [`Self::account`], after waiting until nothing changes. Then regions and leases must add up to it too.
    ///
    /// # Errors
    /// When a check fails.
    pub fn settled(&self) -> Result<v1::Account> {
        let mut seen = Default::default();
        eventually("nothing to change while it is looked at", || {
            seen = (self.account()?, self.regions()?, self.leases()?);
            Ok(seen.0 == self.account()?)
        })?;
        let (total, regions, leases) = seen;
        balanced(
            &total,
            regions.into_iter().filter_map(|region| region.account),
        )?;
        let mut by_state = BTreeMap::new();
        for lease in leases {
            *by_state.entry(lease.state()).or_insert(0) += lease.bytes;
        }
        let bytes = |state| by_state.get(&state).copied().unwrap_or(0);
        ensure!(
            bytes(LeaseState::Active) == total.leased_bytes,
            "{total:?} {by_state:?}"
        );
        Ok(total)
    }

    /// Waits until `holds` is true for the node's account. Checks all the time that the account balances.
    ///
    /// # Errors
    /// When it never becomes true, or a check fails.
    pub fn eventually(&self, what: &str, holds: impl Fn(&v1::Account) -> bool) -> Result<()> {
        let mut last = v1::Account::default();
        eventually(what, || {
            last = self.account()?;
            Ok(holds(&last))
        })
        .map_err(|error| error.context(format!("{last:?}")))
    }
}

/// Checks that `parts` add up to `whole`, and that the states of each part add up to its offered bytes.
///
/// # Errors
/// When they do not.
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
        // Some of the leased bytes.
        sum.working_set_bytes += part.working_set_bytes;
        sum.estate_bytes += part.estate_bytes;
    }
    ensure!(
        sum == *whole,
        "the parts are {sum:?}, the whole is {whole:?}"
    );
    Ok(())
}

/// Checks that no two leases have the same slab.
///
/// # Errors
/// When two leases do.
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
