//! The policy against devices whose neighbours use what they are told to.

use std::time::Duration;

use proptest::prelude::*;

use super::policy::*;

const SLAB: u64 = 10;
const TOTAL: u64 = 1_000;
const PERIOD: Duration = Duration::from_millis(250);

fn config() -> PolicyConfig {
    PolicyConfig {
        slab_bytes: SLAB,
        reserve_bytes: 50,
        least_headroom_bytes: 50,
        max_bytes: TOTAL,
        hysteresis_bytes: 20,
        settle: Duration::from_secs(2),
        horizon: Duration::from_secs(1),
        half_life: Duration::from_secs(60),
        rise_slabs: 4,
    }
}

/// A device whose neighbours use what they are told to, and a donor that does at once what the policy says.
struct Device {
    policy: Policy,
    now: Duration,
    offered: u64,
}

impl Device {
    fn new(config: PolicyConfig) -> Self {
        Self {
            policy: Policy::new(config).unwrap(),
            now: Duration::ZERO,
            offered: 0,
        }
    }

    fn step(&mut self, neighbours: u64) -> Decision {
        let decision = self.policy.step(Observation {
            now: self.now,
            free: TOTAL
                .saturating_sub(neighbours)
                .saturating_sub(self.offered),
            total: TOTAL,
            donated: self.offered,
            offered: self.offered,
        });
        self.offered = decision.target;
        self.now += PERIOD;
        decision
    }

    fn settle(&mut self, neighbours: u64) {
        for _ in 0..200 {
            self.step(neighbours);
        }
    }
}

#[test]
fn decisions() {
    // (neighbours' use over time, last reason, last target)
    type Case<'a> = (&'a str, &'a [(u64, u32)], Reason, u64);
    let cases: [Case<'_>; 6] = [
        (
            "nothing is offered at first sight",
            &[(500, 1)],
            Reason::Waiting,
            0,
        ),
        (
            "a rise takes a few slabs at a time",
            &[(500, 9)],
            Reason::Rising,
            40,
        ),
        // 1000 - 500 - 50 - 50 - hysteresis 20
        (
            "until the hysteresis is all that is left",
            &[(500, 100)],
            Reason::Waiting,
            380,
        ),
        (
            "growth within the headroom moves nothing",
            &[(500, 100), (520, 1)],
            Reason::Steady,
            380,
        ),
        // 1000 - 600 - 50 - spurt 100
        (
            "a spurt falls at once, with room for another",
            &[(500, 100), (600, 1)],
            Reason::Falling,
            250,
        ),
        (
            "a neighbour that takes all there is gets the rest in one more period",
            &[(500, 100), (600, 1), (750, 1)],
            Reason::Falling,
            0,
        ),
    ];
    for (name, history, reason, target) in cases {
        let mut device = Device::new(config());
        let mut last = None;
        for (neighbours, times) in history {
            for _ in 0..*times {
                last = Some(device.step(*neighbours));
            }
        }
        let last = last.unwrap();
        assert_eq!(
            (last.reason, last.target),
            (reason, target),
            "{name}: {last}"
        );
    }
}

#[test]
fn a_spurt_is_forgotten_in_time() {
    let mut device = Device::new(config());
    device.settle(300);
    // 1000 - 400 - 50 - spurt 100
    device.step(400);
    assert_eq!(device.offered, 450);
    // Twenty half-lives later: 1000 - 400 - 50 - 50 - hysteresis 20
    for _ in 0..20 * 240 {
        device.step(400);
    }
    assert_eq!(device.offered, 480);
}

#[test]
fn regions_on_their_way_back_are_not_withdrawn_twice() {
    let mut policy = Policy::new(config()).unwrap();
    let look = |offered| Observation {
        now: Duration::from_secs(1),
        free: 100,
        total: TOTAL,
        donated: 400,
        offered,
    };
    let first = policy.step(look(400));
    assert!(first.target <= 400);
    assert_eq!(policy.step(look(first.target)).target, first.target);
}

#[test]
fn settings_that_cannot_work_are_named() {
    let slabless = PolicyConfig {
        slab_bytes: 0,
        ..config()
    };
    let error = Policy::new(slabless).unwrap_err().to_string();
    assert!(error.contains("slab_bytes"), "{error}");
}

proptest! {
    #[test]
    fn never_offers_into_the_reserve_and_falls_within_one_period(
        phases in prop::collection::vec((0_u64..=TOTAL, 1_u32..60), 1..20),
    ) {
        let mut device = Device::new(config());
        for (wanted, periods) in phases {
            for _ in 0..periods {
                // Nobody can use what is not there.
                let used = wanted.min(TOTAL - device.offered);
                let decision = device.step(used);
                prop_assert!(decision.target <= (TOTAL - used).saturating_sub(50));
                prop_assert_eq!(decision.target % SLAB, 0);
                // Whatever stands in the reserve is given up in the same step, or nothing is left to give.
                if decision.observation.free < 50 {
                    prop_assert!(
                        decision.target < decision.observation.offered
                            || decision.observation.offered == 0
                    );
                }
            }
        }
    }

    #[test]
    fn noise_within_the_hysteresis_moves_nothing(
        base in 0_u64..=600,
        noise in prop::collection::vec(0_u64..=10, 100..300),
    ) {
        let mut device = Device::new(config());
        device.settle(base + 10);
        // Let it see the noise's whole range, then hold it to it.
        device.settle(base);
        device.settle(base + 10);
        let before = device.offered;
        for extra in noise {
            let decision = device.step(base + extra);
            prop_assert!(decision.reason != Reason::Falling, "{}", decision);
            prop_assert!(device.offered >= before);
        }
    }

    #[test]
    fn larger_noise_does_move_it(base in 0_u64..=300) {
        let mut device = Device::new(config());
        device.settle(base);
        let before = device.offered;
        device.step(base + 200);
        prop_assert!(device.offered < before);
    }
}
