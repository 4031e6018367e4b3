//! The mapping cache: one import for each allocation, whatever the number of slabs leased from it.

use std::{collections::HashMap, fmt, sync::Arc};

use parking_lot::Mutex;
use swiftcache_proto::domain::{AllocationId, DeviceUuid};

use crate::{
    Result,
    device::{DeviceLayer, Memory},
    session::{Grant, Session},
};

/// Foreign allocations mapped by this process.
#[derive(Default)]
pub(super) struct Mappings(Mutex<HashMap<AllocationId, Cached>>);

struct Cached {
    memory: Memory,
    users: usize,
}

/// One slab's share in a mapping. The mapping goes with the last one.
pub(super) struct Mapping {
    pub(super) memory: Memory,
    allocation: AllocationId,
    mappings: Arc<Mappings>,
}

impl Mappings {
    /// Maps the allocation behind a grant for `device`, or shares the mapping that is there. An import takes
    /// milliseconds and happens under the cache's own lock, so that two threads never do the same one.
    pub(super) fn open(
        self: &Arc<Self>,
        session: &Session,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        grant: &Grant,
    ) -> Result<Mapping> {
        let mut cache = self.0.lock();
        let memory = match cache.get_mut(&grant.allocation) {
            Some(cached) if cached.memory.bytes() >= grant.map_bytes => {
                cached.users += 1;
                cached.memory.clone()
            }
            // Mapped, but not to the end of this region: earlier slabs keep the shorter mapping, later ones share
            // the longer.
            known => {
                let export = session.open(grant)?;
                let memory = layer.import(device, &grant.device, export, grant.map_bytes)?;
                match known {
                    Some(cached) => {
                        cached.memory = memory.clone();
                        cached.users += 1;
                    }
                    None => {
                        let cached = Cached {
                            memory: memory.clone(),
                            users: 1,
                        };
                        cache.insert(grant.allocation, cached);
                    }
                }
                memory
            }
        };
        drop(cache);
        Ok(Mapping {
            memory,
            allocation: grant.allocation,
            mappings: Arc::clone(self),
        })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let mut cache = self.mappings.0.lock();
        if let Some(cached) = cache.get_mut(&self.allocation) {
            cached.users -= 1;
            if cached.users == 0 {
                cache.remove(&self.allocation);
            }
        }
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({:?})", self.memory)
    }
}
