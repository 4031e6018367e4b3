//! The steps of an address space against a backend that fails wherever it is told to.

use super::*;

const UNIT: u64 = 16;

/// A backend that keeps books: for each unit, which memory is there and whether it can be touched.
#[derive(Debug)]
struct Books {
    device: DeviceUuid,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    units: Vec<Option<(u64, bool)>>,
    /// How many calls there were, and which of them fail: bit 0 is the first.
    calls: u32,
    faults: u32,
}

impl Books {
    fn call(&self, name: &'static str, work: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.state.lock();
        let fails = state.calls < 32 && state.faults & (1 << state.calls) != 0;
        state.calls += 1;
        if fails {
            return Err(DeviceError::Failed {
                operation: name,
                device: self.device.clone(),
                problem: "injected".to_owned(),
            });
        }
        work(&mut state);
        Ok(())
    }

    fn fail(&self, faults: u32) {
        let mut state = self.state.lock();
        (state.calls, state.faults) = (0, faults);
    }
}

fn units(offset: u64, bytes: u64) -> std::ops::Range<usize> {
    (offset / UNIT) as usize..((offset + bytes) / UNIT) as usize
}

impl RawSpace for Arc<Books> {
    fn device(&self) -> &DeviceUuid {
        &self.device
    }

    fn address(&self) -> u64 {
        0
    }

    fn bytes(&self) -> u64 {
        self.state.lock().units.len() as u64 * UNIT
    }

    fn granularity(&self) -> u64 {
        UNIT
    }

    fn accept(&self, memory: &Memory) -> Result<()> {
        memory
            .owner::<u64>()
            .map(|_| ())
            .ok_or_else(|| DeviceError::UnknownDevice {
                uuid: memory.device().clone(),
            })
    }

    unsafe fn map(&self, offset: u64, memory: &Memory) -> Result<()> {
        self.call("map", |state| {
            for unit in units(offset, memory.bytes()) {
                assert_eq!(state.units[unit], None, "mapped over something");
                state.units[unit] = Some((memory.base(), false));
            }
        })
    }

    unsafe fn open(&self, offset: u64, bytes: u64) -> Result<()> {
        self.call("open", |state| {
            for unit in units(offset, bytes) {
                let (memory, _) = state.units[unit].expect("nothing is mapped");
                state.units[unit] = Some((memory, true));
            }
        })
    }

    unsafe fn unmap(&self, offset: u64, bytes: u64) -> Result<()> {
        self.call("unmap", |state| {
            for unit in units(offset, bytes) {
                assert!(state.units[unit].is_some(), "nothing is mapped");
                state.units[unit] = None;
            }
        })
    }

    fn memory(&self, offset: u64, bytes: u64, _: &[Memory]) -> Memory {
        Memory::new(offset, bytes, self.device.clone(), Box::new(0_u64))
    }
}

/// The books have no bytes that anybody could touch.
fn still(space: &AddressSpace) -> Standstill<'_> {
    // SAFETY: as the books are all there is.
    unsafe { space.stand_still() }
}

struct Bench {
    books: Arc<Books>,
    space: Arc<AddressSpace>,
}

fn device() -> DeviceUuid {
    "SIM-0".parse().expect("a name")
}

/// A memory of so many units that the books know by this number.
fn memory(number: u64, units: u64) -> Memory {
    Memory::new(number, units * UNIT, device(), Box::new(number))
}

impl Bench {
    /// A space of eight units: the first three pieces have one, two and one.
    fn new() -> Self {
        let books = Arc::new(Books {
            device: device(),
            state: Mutex::new(State {
                units: vec![None; 8],
                ..State::default()
            }),
        });
        let space = AddressSpace::new(Box::new(Arc::clone(&books)));
        for (offset, number, units) in [(0, 1, 1), (1, 2, 2), (3, 3, 1)] {
            space.map(offset * UNIT, &memory(number, units)).unwrap();
        }
        Self { books, space }
    }

    fn changes() -> [Change; 3] {
        [(0, 11, 1), (1, 12, 2), (3, 13, 1)].map(|(offset, number, units)| Change {
            offset: offset * UNIT,
            memory: memory(number, units),
        })
    }

    /// Checks that the space says what the books say, and gives memory of nothing else. Returns the number of the memory
    /// at each place of the three, and whether it is open.
    fn agree(&self) -> [Option<(u64, bool)>; 3] {
        let mut told = vec![None; 8];
        for piece in self.space.pieces() {
            for unit in units(piece.offset, piece.memory.bytes()) {
                told[unit] = Some((piece.memory.base(), piece.open));
            }
        }
        let state = self.books.state.lock().units.clone();
        assert_eq!(told, state);
        for (unit, held) in state.iter().enumerate() {
            let given = self.space.memory(unit as u64 * UNIT, UNIT).is_ok();
            assert_eq!(given, held.is_some_and(|(_, open)| open), "unit {unit}");
        }
        [state[0], state[1], state[3]]
    }
}

/// Every set of failures among the first calls: each alone, and each after every other.
#[test]
fn whatever_fails_what_is_left_is_what_is_told() {
    const CALLS: u32 = 18;
    let (mut undone, mut reported) = (0, std::collections::BTreeSet::new());
    for faults in 0..1_u32 << CALLS {
        // Faults that no call meets are those of another run.
        let bench = Bench::new();
        bench.books.fail(faults);
        let changes = Bench::changes();
        let outcome = still(&bench.space).replace(&changes);
        let calls = bench.books.state.lock().calls;
        if calls < CALLS && faults >> calls != 0 {
            continue;
        }
        let held = bench.agree();
        match outcome {
            Ok(old) => {
                assert_eq!(faults, 0);
                assert_eq!(held, [11, 12, 13].map(|new| Some((new, true))));
                let old: Vec<u64> = old.iter().map(Memory::base).collect();
                assert_eq!(old, [1, 2, 3]);
            }
            Err(NotReplaced { error, left }) => {
                assert!(error.to_string().contains("injected"));
                for (at, left) in left.iter().enumerate() {
                    let (old, new) = (at as u64 + 1, at as u64 + 11);
                    let right = match left {
                        Left::Old => held[at] == Some((old, true)),
                        Left::New => held[at] == Some((new, true)),
                        Left::Nothing => held[at].is_none(),
                        Left::Closed => held[at].is_some_and(|(_, open)| !open),
                    };
                    assert!(right, "{faults:b}: {at} is {left:?}, but {:?}", held[at]);
                    reported.insert(format!("{left:?}"));
                }
                let all_old = left.iter().all(|left| *left == Left::Old);
                undone += u32::from(all_old);
                if faults.count_ones() == 1 {
                    assert!(all_old, "one failure is undone: {faults:b}, {left:?}");
                }
            }
        }
        // Whatever is left can be put right.
        bench.books.fail(0);
        for (change, held) in changes.iter().zip(held) {
            if held.is_some_and(|(number, open)| open && number == change.memory.base()) {
                continue;
            }
            if held.is_some() {
                still(&bench.space).unmap(change.offset).unwrap();
            }
            bench.space.map(change.offset, &change.memory).unwrap();
        }
        let healed = bench.agree();
        assert_eq!(healed, [11, 12, 13].map(|new| Some((new, true))));
    }
    assert!(undone >= 9, "{undone}");
    assert_eq!(reported.len(), 4, "every outcome was seen: {reported:?}");
}

#[test]
fn odd_changes_change_nothing() {
    let bench = Bench::new();
    let one = |offset: u64, memory: &Memory| Change {
        offset,
        memory: memory.clone(),
    };
    let fresh = memory(11, 1);
    let mapped = bench.space.pieces()[2].memory.clone();
    let odd = [
        (vec![one(4 * UNIT, &fresh)], "no piece starts at 64"),
        (vec![one(2 * UNIT, &fresh)], "no piece starts at 32"),
        (
            vec![one(UNIT, &fresh)],
            "has 32 bytes, and the new memory 16",
        ),
        (vec![one(1, &fresh)], "multiples of 16"),
        (vec![one(0, &mapped)], "is mapped at 48 already"),
        (
            vec![one(0, &fresh), one(0, &memory(12, 1))],
            "is named twice",
        ),
        (
            vec![one(0, &fresh), one(3 * UNIT, &fresh)],
            "is named twice",
        ),
        (vec![one(8 * UNIT, &fresh)], "outside"),
    ];
    for (changes, problem) in odd {
        let refused = still(&bench.space).replace(&changes).unwrap_err();
        assert!(refused.is_undone());
        assert!(refused.to_string().contains(problem), "{refused}");
    }
    let foreign = Memory::new(7, UNIT, device(), Box::new("no number"));
    for (offset, memory) in [
        (UNIT, &fresh),
        (2 * UNIT, &fresh),
        (3 * UNIT, &memory(4, 2)),
        (7 * UNIT, &memory(4, 2)),
        (u64::MAX / UNIT * UNIT, &fresh),
        (4 * UNIT, &foreign),
    ] {
        assert!(bench.space.map(offset, memory).is_err(), "{offset}");
    }
    assert_eq!(bench.agree(), [1, 2, 3].map(|old| Some((old, true))));
}

#[test]
fn memory_of_a_space_has_no_hole() {
    let bench = Bench::new();
    assert_eq!(bench.space.memory(0, 4 * UNIT).unwrap().bytes(), 4 * UNIT);
    assert!(bench.space.memory(UNIT + 1, 2).is_ok());
    still(&bench.space).unmap(UNIT).unwrap();
    for (offset, bytes) in [(0, 2 * UNIT), (UNIT, 1), (2 * UNIT, 2 * UNIT), (0, 0)] {
        assert!(bench.space.memory(offset, bytes).is_err(), "{offset}");
    }
    assert!(bench.space.memory(3 * UNIT, UNIT + 1).is_err());
    assert!(bench.space.memory(8 * UNIT, 1).is_err());
}

#[test]
fn a_space_unmaps_everything_when_its_last_memory_goes() {
    let Bench { books, space } = Bench::new();
    let memory = space.memory(0, UNIT).unwrap();
    drop(space);
    assert!(books.state.lock().units[0].is_some());
    drop(memory);
    assert!(books.state.lock().units.iter().all(Option::is_none));
}
