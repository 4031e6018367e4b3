//! The home table against a machine that has bytes: every unit reads what was written last, whatever moves and fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::prelude::*;

use super::*;

const COSTS: Costs = Costs {
    remap: Duration::from_micros(200),
    over_link: Duration::from_micros(700),
    over_host: Duration::from_micros(8_000),
};

/// A place of the machine. Host memory has one for each unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Hbm(Home),
    Host(UnitId),
}

fn place(unit: UnitId, home: Home) -> Place {
    match home {
        Home::Floor => Place::Host(unit),
        home => Place::Hbm(home),
    }
}

/// What goes wrong on purpose, to see that it is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    CopiesNothing,
    AcknowledgesEarly,
}

#[derive(Clone, Debug)]
enum Op {
    Grant,
    AskBack(usize, u64),
    Write(u32),
    Clear(u32),
    /// A step boundary, and what becomes of the moves.
    Step(u64, Vec<Landed>),
}

/// Slabs, spares and host memory with bytes in them, and a naive view of who must read what.
struct Machine {
    homes: Homes,
    wrong: Wrong,
    bytes: BTreeMap<Place, u64>,
    /// Where each unit's address leads; nothing while it is adrift.
    mapped: Vec<Option<Place>>,
    /// What each unit must read; nothing if that does not matter.
    written: Vec<Option<u64>>,
    held: BTreeSet<SlabId>,
    asked: BTreeSet<SlabId>,
    latest: u64,
}

impl Machine {
    fn new(units: u32, spares: u32, wrong: Wrong) -> Self {
        let config = HomesConfig {
            units,
            spares,
            costs: COSTS,
        };
        Self {
            homes: Homes::new(config),
            wrong,
            bytes: BTreeMap::new(),
            mapped: (0..units)
                .map(|unit| Some(Place::Host(UnitId(unit))))
                .collect(),
            written: vec![None; units as usize],
            held: BTreeSet::new(),
            asked: BTreeSet::new(),
            latest: 0,
        }
    }

    fn act(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match op {
            Op::Grant => {
                self.latest += 1;
                let slab = SlabId(self.latest);
                self.homes.granted(slab).expect("a new one");
                prop_assert!(self.homes.granted(slab).is_err());
                self.held.insert(slab);
            }
            Op::AskBack(which, deadline) => {
                let which = self
                    .held
                    .iter()
                    .nth(which % self.held.len().max(1))
                    .copied();
                if let Some(slab) = which {
                    self.homes.asked_back(slab, *deadline);
                    self.asked.insert(slab);
                    if self.wrong == Wrong::AcknowledgesEarly {
                        self.bytes.insert(Place::Hbm(Home::Slab(slab)), u64::MAX);
                    }
                }
                self.homes.asked_back(SlabId(u64::MAX), 0);
            }
            Op::Write(unit) => {
                let at = *unit as usize % self.mapped.len();
                // An engine does not run while a unit is adrift.
                if let Some(mapped) = self.mapped[at] {
                    self.latest += 1;
                    self.bytes.insert(mapped, self.latest);
                    self.written[at] = Some(self.latest);
                    self.homes
                        .set_live(UnitId(at as u32), true)
                        .expect("it is there");
                }
            }
            Op::Clear(unit) => {
                let at = *unit as usize % self.mapped.len();
                if self.mapped[at].is_some() {
                    self.written[at] = None;
                    self.homes
                        .set_live(UnitId(at as u32), false)
                        .expect("it is there");
                }
            }
            Op::Step(budget, landed) => self.step(Duration::from_micros(*budget), landed)?,
        }
        self.check()
    }

    fn step(&mut self, budget: Duration, landed: &[Landed]) -> Result<(), TestCaseError> {
        let before = self.homes.counts();
        let due = self.homes.is_due();
        let plan = self.homes.plan(budget);
        prop_assert_eq!(due, !plan.is_empty());
        prop_assert!(self.homes.plan(budget).is_empty(), "one plan at a time");
        self.check_plan(&plan, before, budget)?;
        let landed: Vec<Landed> = (0..plan.len())
            .map(|at| landed.get(at).copied().unwrap_or(Landed::Moved))
            .collect();
        for (moved, landed) in plan.iter().zip(&landed) {
            self.carry_out(moved, *landed);
        }
        prop_assert!(self.homes.settle(&[Landed::Moved; 99]).is_err() || plan.len() == 99);
        self.homes.settle(&landed).expect("it fits");
        for slab in self.homes.take_vacated() {
            prop_assert!(self.held.remove(&slab));
            // Its next tenant writes there.
            self.bytes.insert(Place::Hbm(Home::Slab(slab)), u64::MAX);
            let user = self
                .mapped
                .iter()
                .position(|at| *at == Some(Place::Hbm(Home::Slab(slab))));
            prop_assert_eq!(user, None, "{:?} was acknowledged with a unit in it", slab);
        }
        Ok(())
    }

    fn carry_out(&mut self, moved: &Move, landed: Landed) {
        let (from, to) = (place(moved.unit, moved.from), place(moved.unit, moved.to));
        if moved.copies && self.wrong != Wrong::CopiesNothing {
            let bytes = self.bytes.get(&from).copied().unwrap_or(0);
            self.bytes.insert(to, bytes);
        }
        let (mapped, left) = match landed {
            Landed::Moved => (Some(to), Some(from)),
            Landed::Stayed | Landed::Later => (Some(from), Some(to)),
            Landed::Adrift => (None, None),
        };
        self.mapped[moved.unit.0 as usize] = mapped;
        if let Some(left) = left {
            self.bytes.insert(left, u64::MAX);
        }
    }

    fn check_plan(
        &self,
        plan: &[Move],
        before: Counts,
        budget: Duration,
    ) -> Result<(), TestCaseError> {
        if before.adrift > 0 {
            prop_assert_eq!(
                plan.len() as u32,
                before.adrift,
                "all that drift come first"
            );
            prop_assert!(plan.iter().all(|moved| moved.adrift && !moved.copies));
            return Ok(());
        }
        let cost = |moved: &Move| match (moved.from, moved.to) {
            (Home::Floor, _) | (_, Home::Floor) => COSTS.remap + COSTS.over_host,
            _ => COSTS.remap + COSTS.over_link,
        };
        let total: Duration = plan.iter().map(cost).sum();
        prop_assert!(
            plan.len() <= 1 || total <= budget,
            "{total:?} of {budget:?}"
        );
        let leaves = |moved: &Move| matches!(moved.from, Home::Slab(_));
        let leaving = plan.iter().filter(|moved| leaves(moved)).count() as u32;
        let others = plan.len() as u32 - leaving;
        prop_assert!(
            others == 0 || leaving == before.to_vacate,
            "something came back before everything had left"
        );
        if before.to_vacate > 0 {
            prop_assert!(leaving > 0, "nothing leaves");
        }
        for moved in plan {
            prop_assert_eq!(moved.copies, self.written[moved.unit.0 as usize].is_some());
            match moved.to {
                Home::Slab(slab) => prop_assert!(!self.asked.contains(&slab), "into what leaves"),
                Home::Spare(_) => {
                    prop_assert_eq!(plan.iter().filter(|other| other.to == moved.to).count(), 1)
                }
                Home::Floor => prop_assert!(leaves(moved), "pushed out by nobody"),
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), TestCaseError> {
        self.homes.check();
        for (at, mapped) in self.mapped.iter().enumerate() {
            let unit = UnitId(at as u32);
            let home = self.homes.home(unit).expect("it is there");
            let Some(mapped) = mapped else { continue };
            prop_assert_eq!(*mapped, place(unit, home), "{:?}", unit);
            if let Some(written) = self.written[at] {
                prop_assert_eq!(self.bytes.get(mapped), Some(&written), "{:?}", unit);
            }
        }
        Ok(())
    }

    /// When everything works again, what is asked back comes back, and nothing stays in host memory while there is room.
    fn settle_down(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..4 * (self.mapped.len() + self.held.len()) + 8 {
            self.act(&Op::Step(10_000, Vec::new()))?;
        }
        let counts = self.homes.counts();
        prop_assert_eq!((counts.to_vacate, counts.adrift), (0, 0));
        prop_assert!(self.held.is_disjoint(&self.asked), "not acknowledged");
        let room = counts.free_slabs > 0 || (counts.in_spares as usize) < self.homes.spares.len();
        prop_assert!(counts.on_floor == 0 || !room, "{:?}", counts);
        Ok(())
    }
}

fn landed() -> impl Strategy<Value = Landed> {
    prop_oneof![
        4 => Just(Landed::Moved),
        1 => Just(Landed::Stayed),
        1 => Just(Landed::Later),
        1 => Just(Landed::Adrift),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => Just(Op::Grant),
        2 => (any::<usize>(), 0..9_u64).prop_map(|(which, deadline)| Op::AskBack(which, deadline)),
        4 => any::<u32>().prop_map(Op::Write),
        1 => any::<u32>().prop_map(Op::Clear),
        5 => (0..20_000_u64, prop::collection::vec(landed(), 0..6))
            .prop_map(|(budget, landed)| Op::Step(budget, landed)),
    ]
}

proptest! {
    #[test]
    fn units_read_what_was_written_whatever_moves_and_fails(
        units in 1..7_u32,
        spares in 0..3_u32,
        ops in prop::collection::vec(op(), 0..60),
    ) {
        let mut machine = Machine::new(units, spares, Wrong::Nothing);
        for op in &ops {
            machine.act(op)?;
        }
        machine.settle_down()?;
    }
}

/// Two units in slabs, one of which is asked back.
fn moved_once(wrong: Wrong) -> Result<(), TestCaseError> {
    let mut machine = Machine::new(2, 0, wrong);
    let step = || Op::Step(100_000, Vec::new());
    let course = [Op::Grant, Op::Grant, Op::Write(0), Op::Write(1), step()];
    let then = [Op::Grant, Op::AskBack(0, 1), step(), step()];
    course
        .iter()
        .chain(&then)
        .try_for_each(|op| machine.act(op))
}

#[test]
fn the_machine_notices_what_goes_wrong() {
    moved_once(Wrong::Nothing).unwrap();
    for wrong in [Wrong::CopiesNothing, Wrong::AcknowledgesEarly] {
        assert!(moved_once(wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn the_earliest_deadline_leaves_first_and_one_move_is_always_made() {
    let mut homes = Homes::new(HomesConfig {
        units: 3,
        spares: 1,
        costs: COSTS,
    });
    for slab in 0..3 {
        homes.granted(SlabId(slab)).unwrap();
    }
    let all = |homes: &mut Homes, budget| {
        let plan = homes.plan(budget);
        homes.settle(&vec![Landed::Moved; plan.len()]).unwrap();
        plan
    };
    assert_eq!(all(&mut homes, Duration::from_secs(1)).len(), 3);
    for unit in 0..3 {
        homes.set_live(UnitId(unit), true).unwrap();
        assert_eq!(
            homes.home(UnitId(unit)),
            Some(Home::Slab(SlabId(unit.into())))
        );
    }
    homes.asked_back(SlabId(0), 20);
    homes.asked_back(SlabId(2), 10);
    assert_eq!(homes.counts().to_vacate, 2);
    assert_eq!(homes.take_vacated(), []);
    // The spare slab is better than host memory, and one move costs more than nothing.
    let plan = all(&mut homes, Duration::ZERO);
    assert_eq!((plan[0].unit, plan[0].to), (UnitId(2), Home::Spare(0)));
    assert_eq!((plan.len(), homes.take_vacated()), (1, vec![SlabId(2)]));
    let plan = all(&mut homes, Duration::ZERO);
    assert_eq!((plan[0].unit, plan[0].to), (UnitId(0), Home::Floor));
    assert_eq!(homes.take_vacated(), [SlabId(0)]);
    assert_eq!(
        all(&mut homes, Duration::from_secs(1)),
        [],
        "there is no room"
    );
    homes.granted(SlabId(7)).unwrap();
    let plan = all(&mut homes, Duration::from_millis(1));
    assert_eq!(
        (plan[0].unit, plan[0].to),
        (UnitId(0), Home::Slab(SlabId(7)))
    );
    let counts = homes.counts();
    assert_eq!(
        (counts.in_slabs, counts.in_spares, counts.on_floor),
        (2, 1, 0)
    );
}

#[test]
fn a_slab_that_takes_no_unit_is_given_back() {
    let mut homes = Homes::new(HomesConfig {
        units: 1,
        spares: 0,
        costs: COSTS,
    });
    homes.granted(SlabId(1)).unwrap();
    for _ in 0..3 {
        assert_eq!(homes.take_vacated(), []);
        assert_eq!(homes.plan(Duration::from_secs(1)).len(), 1);
        homes.settle(&[Landed::Stayed]).unwrap();
    }
    assert_eq!(homes.plan(Duration::from_secs(1)), []);
    assert_eq!(homes.take_vacated(), [SlabId(1)]);
    assert_eq!(homes.home(UnitId(0)), Some(Home::Floor));
}
