//! Scrubs: a slab is zeroed by its donor before another tenant gets it.

use swiftcache_proto::domain::{Generation, RegionId};

use super::{
    Caller, Effect, Outgoing, Record, Refusal, account::Place, arena::Key, regions::Region,
    state::State,
};

impl State {
    /// Has the donor zero a free slab.
    pub(super) fn scrub(&mut self, key: Key<Region>, slab: u32) {
        self.edit_region(key, |region| region.put(slab, Place::Scrubbing));
        let region = &self.regions[key];
        let (id, donor) = (region.id, region.donor);
        let generation = Generation(region.slabs[slab as usize].generation);
        self.out
            .push(Effect::Record(Record::Scrubbing { region: id, slab }));
        let scrub = Outgoing::Scrub {
            region: id,
            slab,
            generation,
        };
        self.send(donor, scrub);
    }

    pub(super) fn scrubbed(
        &mut self,
        caller: Caller,
        region: RegionId,
        slab: u32,
        generation: Generation,
    ) -> Result<(), Refusal> {
        self.session_of(caller)?;
        let Some(key) = self.region_ids.get(&region).copied() else {
            return Ok(());
        };
        if self.regions[key].donor != caller.session {
            return Err(Refusal::NotYours {
                what: "region",
                which: region.to_string(),
            });
        }
        let being_scrubbed = self.regions[key]
            .slabs
            .get(slab as usize)
            .is_some_and(|slab| slab.place == Place::Scrubbing && slab.generation == generation.0);
        if being_scrubbed {
            self.out
                .push(Effect::Record(Record::Scrubbed { region, slab }));
            self.clean(key, slab);
        }
        Ok(())
    }

    /// A slab holds nobody's bytes any more and is free.
    pub(super) fn clean(&mut self, key: Key<Region>, slab: u32) {
        self.edit_region(key, |region| {
            let generation = region.slabs[slab as usize].generation;
            region.set_history(slab, generation, None);
            region.put(slab, Place::Free);
        });
    }
}
