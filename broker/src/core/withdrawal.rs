//! Withdrawal: a region's way back to its donor.

use std::collections::BTreeSet;

use swiftcache_proto::domain::{DeviceUuid, LeaseId, Medium, RegionId, RevokeReason, SessionId};

use super::{
    arena::{LeaseKey, RegionKey},
    books::{Books, keys_of},
    effect::{Note, Refusal, Reply},
    event::{Caller, Withdraw, WithdrawWhat},
    record::Record,
    returning::return_region,
    revocation::revoke,
    views::BlocksGone,
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

/// The bytes asked back, which must be some.
fn need_of(bytes: u64) -> Result<u64, Refusal> {
    match bytes {
        0 => Err(Refusal::Invalid {
            field: "bytes",
            problem: "is 0, and no region is named".to_owned(),
        }),
        bytes => Ok(bytes),
    }
}

pub(super) fn withdraw(books: &mut Books, withdraw: Withdraw) -> Result<Reply, Refusal> {
    let chosen = match withdraw.what {
        WithdrawWhat::Regions(ids) => named_regions(books, withdraw.caller, &ids)?,
        WithdrawWhat::Bytes { device, bytes } => {
            books.sessions.of(withdraw.caller)?;
            let device = books.devices.number(&device)?;
            let bytes = need_of(bytes)?;
            let own = regions_of(books, withdraw.caller.session);
            cheapest_regions(books, own, device, bytes)
        }
    };
    let outlines = chosen.iter().map(|key| books.regions.get(*key).outline());
    let (regions, bytes): (Vec<_>, Vec<_>) =
        outlines.map(|outline| (outline.id, outline.bytes)).unzip();
    for key in chosen {
        withdraw_region(books, key, RevokeReason::Withdrawn, withdraw.drain_ms);
    }
    Ok(Reply::Withdrawing {
        regions,
        bytes: bytes.into_iter().sum(),
    })
}

/// The caller's regions of these ids, without those it already has back.
fn named_regions(
    books: &Books,
    caller: Caller,
    ids: &[RegionId],
) -> Result<Vec<RegionKey>, Refusal> {
    let session = books.sessions.of(caller)?;
    let mut chosen = BTreeSet::new();
    for id in ids {
        let Some(key) = books.regions.key(*id) else {
            if session.returned().contains(id) {
                continue;
            }
            return Err(Refusal::Unknown {
                what: "region",
                which: id.to_string(),
            });
        };
        if books.regions.get(key).donor() != caller.session {
            return Err(Refusal::NotYours {
                what: "region",
                which: id.to_string(),
            });
        }
        chosen.insert((*id, key));
    }
    Ok(chosen.into_iter().map(|(_, key)| key).collect())
}

fn regions_of(books: &Books, donor: SessionId) -> Vec<RegionKey> {
    let session = books.sessions.get(donor);
    keys_of(books, session.into_iter().flat_map(|its| its.regions()))
}

/// At least `bytes` of those of `candidates` that lie on a device, or all there are: regions that nobody has a lease of first, and
/// of them those first of which nothing is kept for an heir; then those without a working set, then those with the fewest
/// published blocks, then those whose blocks were found longest ago.
fn cheapest_regions(
    books: &Books,
    candidates: Vec<RegionKey>,
    device: usize,
    bytes: u64,
) -> Vec<RegionKey> {
    let able = candidates.into_iter().filter(|key| {
        let region = books.regions.get(*key);
        region.device() == device && !region.is_withdrawing()
    });
    let mut regions: Vec<_> = able.collect();
    regions.sort_by_key(|key| {
        let region = books.regions.get(*key);
        let account = region.account();
        let lent = account.leased + account.working_set + account.draining + account.zombie > 0;
        let kept = region.leases() > 0;
        let worth = (region.published(), region.last_hit());
        (lent, account.working_set, kept, worth, region.id())
    });
    let mut chosen = Vec::new();
    let mut sum = 0;
    for key in regions {
        if sum >= bytes {
            break;
        }
        sum += books.regions.get(key).bytes();
        chosen.push(key);
    }
    chosen
}

/// The regions that `Withdraw` by bytes would choose now, the first to go first, and the leases it would revoke.
pub(super) fn preview(
    books: &Books,
    need: &Need,
) -> Result<(Vec<RegionKey>, Vec<LeaseKey>), Refusal> {
    let device = books.lends(&need.device)?;
    let bytes = need_of(need.bytes)?;
    let candidates = match &need.donor {
        None => books.regions.iter().map(|(key, _)| key).collect(),
        Some(label) => {
            let mut donors = books.sessions.labelled(label).peekable();
            donors.peek().ok_or_else(|| Refusal::Unknown {
                what: "donor",
                which: label.clone(),
            })?;
            keys_of(books, donors.flat_map(|(_, donor)| donor.regions()))
        }
    };
    let chosen = cheapest_regions(books, candidates, device, bytes);
    let leased = chosen
        .iter()
        .flat_map(|key| books.regions.get(*key).leased());
    let active = leased.filter(|key| books.leases.get(*key).is_active());
    let leases = active.collect();
    Ok((chosen, leases))
}

/// What of a lease's blocks nobody finds in memory without the leases of `going`, of which it is one. A block that lies in several of
/// them counts in the first of them.
pub(super) fn blocks_gone(books: &Books, id: LeaseId, going: &BTreeSet<LeaseId>) -> BlocksGone {
    let mut gone = BlocksGone::default();
    let Some((key, lease)) = books.leases.find(id) else {
        return gone;
    };
    let terms = lease.terms();
    let namespace = books.index.namespace(terms.namespace);
    let disks = || books.disks.of(namespace.tenant());
    for (_, hash) in books.index.blocks_in(key) {
        let copies = books.index.find(terms.namespace, hash);
        let mut copies = copies.map(|at| books.leases.get(at.lease).terms().id);
        if copies.any(|copy| copy < id || !going.contains(&copy)) {
            continue;
        }
        let kept = disks().any(|(_, disk)| {
            disk.has(namespace.name(), hash)
                && disk.block_bytes(namespace.name()) == Some(terms.block_bytes)
        });
        match kept {
            true => gone.on_disk += 1,
            false => gone.lost += 1,
        }
    }
    gone
}

/// Bytes of host memory on offer that a borrower could be lent if these regions were gone.
pub(super) fn host_left(books: &Books, going: &[RegionKey]) -> u64 {
    let left = books.regions.iter().filter(|(key, region)| {
        books.devices.medium(region.device()) == Medium::Host
            && !region.is_withdrawing()
            && !books.regions.is_drained(*key)
            && !going.contains(key)
    });
    left.map(|(_, region)| region.bytes()).sum()
}

/// Sends a region on its way back: revokes its leases, and returns it once nobody holds a slab of it.
pub(super) fn withdraw_region(
    books: &mut Books,
    key: RegionKey,
    reason: RevokeReason,
    drain_ms: u32,
) {
    let region = books.regions.get(key);
    if !region.is_withdrawing() {
        let (region, bytes) = (region.id(), region.bytes());
        books.record(Record::RegionWithdrawn { region });
        books.note(Note::Withdrawing { region, bytes });
        books.regions.withdraw(key);
    }
    let id = books.regions.get(key).id();
    for lease in books.regions.get(key).leased() {
        revoke(books, lease, reason, drain_ms, None);
    }
    // The last of them may have been kept for an heir: then it is there already.
    if let Some(key) = books.regions.key(id)
        && books.regions.get(key).leases() == 0
    {
        return_region(books, key);
    }
}
