//! What a withdrawal by bytes would do, said without doing it.

use swiftcache_proto::domain::DeviceUuid;

use super::{
    LeaseView, Refusal, RegionView, arena::Key, regions::Region, state::State, withdrawal::need_of,
};

/// Memory that a device needs back.
#[derive(Clone, Debug)]
pub struct Need {
    /// The device.
    pub device: DeviceUuid,
    /// How much.
    pub bytes: u64,
    /// Only regions of the donors with this session label.
    pub donor: Option<String>,
}

/// What would be given back, the first to go first, and what would be revoked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WithdrawPreview<'a> {
    /// The regions.
    pub regions: Vec<RegionView<'a>>,
    /// The leases that are not being revoked yet.
    pub leases: Vec<LeaseView<'a>>,
}

impl State {
    /// The regions that `Withdraw` by bytes would choose now, and the leases it would revoke.
    ///
    /// # Errors
    /// When the device or the donor is unknown, or `bytes` is 0.
    pub fn preview_withdraw(&self, need: &Need) -> Result<WithdrawPreview<'_>, Refusal> {
        let device = self.devices.number(&need.device)?;
        let bytes = need_of(need.bytes)?;
        let candidates: Vec<Key<Region>> = match &need.donor {
            None => self.region_ids.values().copied().collect(),
            Some(label) => {
                let mut donors = self.donors_labelled(label).peekable();
                donors.peek().ok_or_else(|| Refusal::Unknown {
                    what: "donor",
                    which: label.clone(),
                })?;
                donors.flat_map(|donor| self.regions_of(donor)).collect()
            }
        };
        let chosen = self.cheapest_regions(candidates, device, bytes);
        let leases = chosen.iter().flat_map(|key| self.regions[*key].leased());
        let active = leases
            .map(|key| &self.leases[key])
            .filter(|lease| lease.revocation().is_none());
        Ok(WithdrawPreview {
            leases: active.map(|lease| self.lease_view(lease)).collect(),
            regions: chosen
                .iter()
                .map(|key| self.region_view(&self.regions[*key]))
                .collect(),
        })
    }
}
