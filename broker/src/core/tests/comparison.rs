//! The oracle and the core, side by side.

use super::{
    fixture::SLAB,
    oracle::{ORegion, Oracle},
};
use crate::core::{Account, LeasePhase, State};

impl Oracle {
    /// Where the bytes of these regions are.
    pub(super) fn account(&self, of: impl Fn(&ORegion) -> bool) -> Account {
        let mut account = Account::default();
        for region in self.regions.iter().filter(|region| of(region)) {
            for (number, slab) in (0..).zip(&region.slabs) {
                account.offered += SLAB;
                let lease = self
                    .leases
                    .iter()
                    .find(|lease| lease.region == region.id && lease.slab == number);
                let column = match lease {
                    None if slab.scrubbing => &mut account.scrubbing,
                    None => &mut account.free,
                    Some(lease) if lease.zombie => &mut account.zombie,
                    Some(lease) if lease.revoked.is_some() => &mut account.draining,
                    Some(lease) if lease.estate.is_some() => &mut account.estate,
                    Some(lease) if lease.class.is_cache() => &mut account.leased,
                    Some(_) => &mut account.working_set,
                };
                *column += SLAB;
            }
        }
        account
    }

    /// Compares everything that can be seen of the core.
    pub(super) fn agrees_with(&self, state: &State) -> Result<(), String> {
        let same = |what: &str, mine: String, theirs: String| match mine == theirs {
            true => Ok(()),
            false => Err(format!("{what}: the oracle has {mine}, the core {theirs}")),
        };
        let mut mine: Vec<_> = self
            .sessions
            .iter()
            .filter(|session| !session.over)
            .collect();
        mine.sort_by_key(|session| session.id);
        let mine: Vec<_> = mine
            .iter()
            .map(|session| {
                (
                    session.id,
                    session.process,
                    session.attached,
                    &*session.tenant,
                )
            })
            .collect();
        let theirs: Vec<_> = state
            .sessions()
            .map(|session| {
                (
                    session.id,
                    session.process,
                    session.attached,
                    session.tenant,
                )
            })
            .collect();
        same("sessions", format!("{mine:?}"), format!("{theirs:?}"))?;
        let mut mine: Vec<_> = self
            .regions
            .iter()
            .map(|region| {
                let account = self.account(|other| other.id == region.id);
                let flags = (region.withdrawing, region.drained, region.handle);
                (region.id, region.donor, flags, account)
            })
            .collect();
        mine.sort_by_key(|region| region.0);
        let theirs: Vec<_> = state
            .regions()
            .map(|region| {
                let handle = region.handle_kind.is_some();
                let flags = (region.withdrawing, region.drained, handle);
                (region.id, region.donor, flags, region.account)
            })
            .collect();
        same("regions", format!("{mine:?}"), format!("{theirs:?}"))?;
        for device in state.devices() {
            let account = self.account(|region| region.device == device.device.uuid);
            same(
                "device",
                format!("{account:?}"),
                format!("{:?}", device.account),
            )?;
        }
        let total = self.account(|_| true);
        same(
            "total",
            format!("{total:?}"),
            format!("{:?}", state.total()),
        )?;
        self.agrees_on_leases(state)
    }

    pub(super) fn agrees_on_leases(&self, state: &State) -> Result<(), String> {
        let mut mine: Vec<_> = self.leases.clone();
        mine.sort_by_key(|lease| lease.id);
        let theirs: Vec<_> = state.leases().collect();
        if mine.len() != theirs.len() {
            return Err(format!("{} leases, not {}", theirs.len(), mine.len()));
        }
        for (mine, theirs) in mine.iter().zip(&theirs) {
            let phase = match mine.revoked {
                _ if mine.zombie => LeasePhase::Zombie,
                Some(_) => LeasePhase::Draining,
                None => LeasePhase::Active,
            };
            let mut holders = mine.holders.clone();
            holders.sort();
            let known = state.books.leases.find(theirs.id);
            let parties = known.into_iter().flat_map(|(_, lease)| lease.parties());
            let mut parties: Vec<_> = parties.collect();
            parties.sort();
            let same = (
                mine.class,
                mine.id,
                mine.generation,
                phase,
                mine.region,
                mine.slab,
            ) == (
                theirs.class,
                theirs.id,
                theirs.generation.0,
                theirs.phase,
                theirs.region,
                theirs.slab,
            ) && holders == parties
                && mine.estate.is_some() == theirs.estate_left_ms.is_some()
                && mine.blocks.len() == theirs.published_blocks as usize
                && mine.revoked.map(|(reason, _)| reason) == theirs.revoke_reason;
            if !same {
                return Err(format!("the oracle has {mine:?}, the core {theirs:?}"));
            }
        }
        let blocks: usize = mine.iter().map(|lease| lease.blocks.len()).sum();
        match blocks as u64 == state.indexed_blocks() {
            true => Ok(()),
            false => Err(format!("{} blocks, not {blocks}", state.indexed_blocks())),
        }
    }
}
