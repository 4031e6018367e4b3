//! What operators do: drain, undrain, evict, and set quotas.

use swiftcache_proto::domain::{LeaseId, RevokeReason};

use super::{
    arena::{LeaseKey, RegionKey},
    bequest::end_estate,
    books::{Books, keys_of},
    effect::{Note, Refusal, Reply},
    event::{DrainTarget, EvictTarget, QuotaTarget, SetQuota},
    index::Namespace,
    quotas::{is_of, is_uid, user_of},
    record::Record,
    revocation::revoke,
};

pub(super) fn drain(
    books: &mut Books,
    target: DrainTarget,
    drain_ms: u32,
) -> Result<Reply, Refusal> {
    let regions = targeted(books, &target)?;
    if set_drained(books, &target, true) {
        books.record(Record::Drained {
            target: target.clone(),
        });
    }
    books.note(Note::Drained {
        target: named(&target),
    });
    let leased = regions
        .into_iter()
        .flat_map(|key| books.regions.get(key).leased());
    let leases: Vec<LeaseKey> = leased.collect();
    let (mut revoked, mut bytes) = (0, 0);
    for key in leases {
        let lease_bytes = books.leases.get(key).terms().bytes;
        if revoke(books, key, RevokeReason::Drained, drain_ms, None) {
            revoked += 1;
            bytes += lease_bytes;
        }
    }
    Ok(Reply::Drained {
        leases: revoked,
        bytes,
    })
}

pub(super) fn undrain(books: &mut Books, target: &DrainTarget) -> Result<Reply, Refusal> {
    targeted(books, target)?;
    if set_drained(books, target, false) {
        books.record(Record::Undrained {
            target: target.clone(),
        });
    }
    books.note(Note::Undrained {
        target: named(target),
    });
    Ok(Reply::Done)
}

/// The regions a drain concerns.
fn targeted(books: &Books, target: &DrainTarget) -> Result<Vec<RegionKey>, Refusal> {
    let unknown = |what| Refusal::Unknown {
        what,
        which: named(target),
    };
    match target {
        DrainTarget::Device(uuid) => {
            let device = books.lends(uuid)?;
            let regions = books.regions.iter();
            let here = regions.filter(|(_, region)| region.device() == device);
            Ok(here.map(|(key, _)| key).collect())
        }
        DrainTarget::Donor(label) => {
            let donors: Vec<_> = books.sessions.labelled(label).collect();
            match donors[..] {
                [] => Err(unknown("donor")),
                [(_, donor)] => Ok(keys_of(books, donor.regions())),
                _ => Err(Refusal::Invalid {
                    field: "donor_label",
                    problem: format!(
                        "is {label:?}, which {} sessions have; name the regions instead",
                        donors.len()
                    ),
                }),
            }
        }
        DrainTarget::Region(id) => {
            let key = books.regions.key(*id).ok_or_else(|| unknown("region"))?;
            Ok(vec![key])
        }
    }
}

/// Marks the target, if there is one; says whether that changed anything.
pub(super) fn set_drained(books: &mut Books, target: &DrainTarget, drained: bool) -> bool {
    match target {
        DrainTarget::Device(uuid) => {
            let number = books.devices.number(uuid);
            number.is_ok_and(|number| books.regions.drain_device(number, drained))
        }
        DrainTarget::Donor(label) => {
            let known = books.sessions.labelled(label).next().is_some();
            known && books.regions.drain_donor(label, drained)
        }
        DrainTarget::Region(id) => {
            let key = books.regions.key(*id);
            key.is_some_and(|key| books.regions.drain_region(key, drained))
        }
    }
}

pub(super) fn evict(books: &mut Books, target: &EvictTarget) -> Result<Reply, Refusal> {
    let (blocks, leases) = match target {
        EvictTarget::Namespace(name) => (evict_namespaces(books, name)?, 0),
        EvictTarget::Lease(id) => evict_lease(books, *id)?,
    };
    books.note(Note::Evicted { blocks });
    Ok(Reply::Evicted { blocks, leases })
}

fn evict_namespaces(books: &mut Books, name: &str) -> Result<u64, Refusal> {
    let named = books.index.iter();
    let named = named.filter(|(_, namespace)| **namespace.name() == *name);
    let leases: Vec<LeaseKey> = named
        .flat_map(|(_, namespace)| namespace.leases().iter().copied())
        .collect();
    // A namespace that is known has leases.
    if leases.is_empty() {
        return Err(Refusal::Unknown {
            what: "namespace",
            which: name.to_owned(),
        });
    }
    let mut blocks = 0;
    for key in leases {
        blocks += match books.leases.get(key).estate() {
            None => books.forget_blocks(key),
            // Without its blocks it is worth nothing.
            Some(_) => end_estate(books, key),
        };
    }
    Ok(blocks)
}

fn evict_lease(books: &mut Books, id: LeaseId) -> Result<(u64, u32), Refusal> {
    let (key, _) = books.leases.known(id)?;
    let blocks = books.index.published(key).into();
    let drain_ms = books.config.default_drain_ms;
    let revoked = revoke(books, key, RevokeReason::Drained, drain_ms, None);
    Ok((blocks, revoked.into()))
}

pub(super) fn set_quota(books: &mut Books, set: SetQuota) -> Result<Reply, Refusal> {
    let SetQuota { target, bytes } = set;
    if let (QuotaTarget::Tenant(tenant), Some(_)) = (&target, bytes) {
        known_tenant(books, tenant)?;
    }
    books.quotas.may_set(&target, bytes)?;
    if books.quotas.set(target.clone(), bytes) {
        books.record(Record::Quota {
            target: target.clone(),
            bytes,
        });
    }
    let bounded = |namespace: &&Namespace| match &target {
        QuotaTarget::Namespace(name) => **namespace.name() == **name,
        QuotaTarget::Tenant(tenant) => is_of(namespace.tenant(), tenant),
    };
    let namespaces = books.index.iter().map(|(_, namespace)| namespace);
    let leased = namespaces.filter(bounded).map(Namespace::leased_bytes);
    let leased_bytes = leased.sum();
    books.note(Note::QuotaSet { target, bytes });
    Ok(Reply::QuotaSet { leased_bytes })
}

/// Checks that a tenant is a user, or a label under which a user has a session now. Otherwise a slip of the pen would be
/// a quota that bounds nobody.
fn known_tenant(books: &Books, tenant: &str) -> Result<(), Refusal> {
    let user = user_of(tenant);
    if !is_uid(user) {
        return Err(Refusal::Invalid {
            field: "tenant",
            problem: format!("is {tenant:?}; takes a uid, or a uid, a slash and a label"),
        });
    }
    let mut sessions = books.sessions.live_after(None);
    if user == tenant || sessions.any(|(_, session)| **session.tenant() == *tenant) {
        return Ok(());
    }
    Err(Refusal::Unknown {
        what: "tenant",
        which: tenant.to_owned(),
    })
}

fn named(target: &DrainTarget) -> String {
    match target {
        DrainTarget::Device(uuid) => uuid.to_string(),
        DrainTarget::Donor(label) => label.clone(),
        DrainTarget::Region(id) => id.to_string(),
    }
}
