//! The policy against devices whose neighbours use what they are told to.

use std::{collections::VecDeque, time::Duration};

use proptest::prelude::*;

use super::policy::*;

const SLAB: u64 = 10;
const TOTAL: u64 = 1_000;
const PERIOD: Duration = Duration::from_millis(250);
const MINUTES: Duration = Duration::from_secs(300);

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
        settled: Some(Settled {
            after: MINUTES,
            reserve_part: 8,
            headroom_part: 8,
        }),
    }
}

/// A device whose neighbours use what they are told to, and a donor that does at once what the policy says.
struct Device {
    policy: Policy,
    now: Duration,
    offered: u64,
    held: Option<u64>,
}

impl Device {
    fn new(config: PolicyConfig) -> Self {
        Self {
            policy: Policy::new(config).unwrap(),
            now: Duration::ZERO,
            offered: 0,
            held: None,
        }
    }

    fn look(&self, neighbours: u64) -> Observation {
        self.look_with(neighbours, self.offered)
    }

    /// With `donated` on offer or on its way back.
    fn look_with(&self, neighbours: u64, donated: u64) -> Observation {
        Observation {
            now: self.now,
            free: TOTAL.saturating_sub(neighbours).saturating_sub(donated),
            total: TOTAL,
            donated,
            offered: self.offered,
            held: self.held,
        }
    }

    fn step(&mut self, neighbours: u64) -> Decision {
        self.step_with(neighbours, self.offered)
    }

    fn step_with(&mut self, neighbours: u64, donated: u64) -> Decision {
        let decision = self.policy.step(self.look_with(neighbours, donated));
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
    let cases: [Case<'_>; 7] = [
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
        // 1000 - 600 - 50
        (
            "growth gets the reserve back at once",
            &[(500, 100), (600, 1)],
            Reason::Falling,
            350,
        ),
        (
            "and again, as often as it takes all there is",
            &[(500, 100), (600, 1), (650, 1)],
            Reason::Falling,
            300,
        ),
        // 1000 - 600 - 50 - 50
        (
            "and the headroom when it is over",
            &[(500, 100), (600, 20)],
            Reason::Steady,
            300,
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

/// Looks on while neighbours use the same, for as long as they must be quiet to be settled.
fn quiet(device: &mut Device, neighbours: u64, times: u32) {
    let until = device.now + MINUTES * times + PERIOD * 100;
    while device.now < until {
        device.step(neighbours);
    }
}

/// As vLLM does: it takes 92 % when it starts, and holds it.
#[test]
fn what_is_idle_beside_a_settled_engine_is_lent() {
    let mut device = Device::new(config());
    // Less than reserve and headroom is free, and for all it knows the neighbour grows into it.
    device.settle(920);
    assert_eq!(device.offered, 0);
    quiet(&mut device, 920, 1);
    // 1000 - 920, less two slabs of reserve, two of headroom, and the hysteresis.
    assert_eq!(device.offered, 20);
    // The twin: where settled neighbours count like others, nothing is ever lent.
    let mut careful = Device::new(PolicyConfig {
        settled: None,
        ..config()
    });
    quiet(&mut careful, 920, 1);
    assert_eq!(careful.offered, 0);
}

#[test]
fn a_neighbour_that_grows_after_all_gets_the_whole_reserve_at_once_and_then_the_headroom() {
    let mut device = Device::new(config());
    quiet(&mut device, 800, 1);
    // An eighth of 200 in reserve, an eighth for growth, and the hysteresis.
    assert_eq!(device.offered, 130);
    let decision = device.step(830);
    assert_eq!((decision.reason, decision.reserve), (Reason::Falling, 50));
    assert_eq!(device.offered, 120, "1000 - 830 - 50");
    for _ in 0..20 {
        device.step(830);
    }
    // And the headroom, but less than the 70 that were free before: an engine may have started.
    assert_eq!(device.offered, 110);
    // It has to be quiet for twice as long as before.
    quiet(&mut device, 830, 1);
    assert_eq!(device.step(830).reserve, 50);
    quiet(&mut device, 830, 1);
    assert_eq!(device.step(830).reserve, 21);
}

/// The twin: neighbours that have shrunk are waited for as long as at first.
#[test]
fn an_engine_that_ends_does_not_make_others_wait_longer() {
    let mut device = Device::new(config());
    quiet(&mut device, 830, 1);
    assert_eq!(device.step(830).reserve, 21);
    assert_eq!(device.step(800).reserve, 50);
    quiet(&mut device, 800, 1);
    assert_eq!(device.step(800).reserve, 25);
}

#[test]
fn a_hold_keeps_what_held_when_it_began() {
    let mut device = Device::new(config());
    quiet(&mut device, 800, 1);
    device.held = Some(60);
    device.step(800);
    let held = device.offered;
    device.held = Some(0);
    // The engine takes its room, beyond noise, and no reserve is made for it.
    for engine in [0, 25, 40] {
        assert_eq!(device.step(800 + engine).target, held);
    }
    device.held = None;
    // Now it has grown, and gets what any growth gets.
    device.settle(840);
    assert_eq!(
        device.offered, 100,
        "the reserve, and less than was free before"
    );
}

#[test]
fn what_somebody_asked_to_be_kept_is_kept_beside_anybody() {
    let kept = PolicyConfig {
        settled: Some(Settled {
            after: MINUTES,
            reserve_part: 0,
            headroom_part: 8,
        }),
        ..config()
    };
    let mut device = Device::new(kept);
    quiet(&mut device, 880, 1);
    // 1000 - 880, less 50, 20 and 20.
    assert_eq!(device.offered, 30);
}

#[test]
fn a_forecast_says_what_time_will_bring() {
    let device = Device::new(config());
    let forecast = |neighbours| Forecast::new(config(), device.look(neighbours)).unwrap();
    let settled = forecast(920);
    assert_eq!((settled.now.ceiling, settled.settled), (0, 40));
    assert_eq!(settled.after, Some(MINUTES));
    let text = settled.to_string();
    assert!(
        text.contains("for 5 min") && !text.contains("lends nothing"),
        "{text}"
    );
    let idle = forecast(100);
    assert_eq!((idle.settled, idle.after), (idle.now.ceiling, None));
    let full = forecast(970);
    assert!(
        full.is_nothing() && full.to_string().contains("\"lend\""),
        "{full}"
    );
}

#[test]
fn a_spurt_is_forgotten_in_time() {
    let mut device = Device::new(config());
    device.settle(300);
    // 1000 - 400 - 50 - 50
    for _ in 0..20 {
        device.step(400);
    }
    assert_eq!(device.offered, 500);
    // There is room for 530, but not with headroom for a spurt of 100.
    for _ in 0..20 {
        device.step(350);
    }
    assert_eq!(device.offered, 500);
    // Twenty half-lives later: 1000 - 350 - 50 - 50 - hysteresis 20
    for _ in 0..20 * 240 {
        device.step(350);
    }
    assert_eq!(device.offered, 530);
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
        held: None,
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

    /// As it was before anybody was settled: growth beyond noise has the whole reserve free within one look, or all there is.
    #[test]
    fn growth_after_any_quiet_has_the_reserve_within_one_look(
        before in 0_u64..=960,
        quiet_for in 0_u32..3,
        growth in 21_u64..=400,
    ) {
        let mut device = Device::new(config());
        quiet(&mut device, before, quiet_for);
        let used = (before + growth).min(TOTAL - device.offered);
        prop_assume!(used > before + config().hysteresis_bytes);
        device.step(used);
        let free = TOTAL - used - device.offered;
        prop_assert!(free >= 50 || device.offered == 0, "{} free, {} offered", free, device.offered);
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

/// The rule that was: it gave back what left as much headroom as the growth that was seen. Only to show what it did.
fn with_room_for_another(seen: &Observation, growth: u64) -> u64 {
    let headroom = config().least_headroom_bytes.max(growth);
    let room = (seen.free + seen.donated).saturating_sub(config().reserve_bytes + headroom);
    seen.offered.min(room / SLAB * SLAB)
}

/// An engine that starts: its weights in steps, a pause for compilation, and activations that come and go, no larger than
/// the headroom.
#[derive(Clone, Debug)]
struct Start {
    weights: Vec<u64>,
    pause: u32,
    peaks: Vec<u64>,
}

impl Start {
    /// What it uses, look by look; at least one byte once it has begun.
    fn uses(&self) -> Vec<u64> {
        let loading = self.weights.iter().scan(1, |sum, step| {
            *sum += step;
            Some(*sum)
        });
        let mut uses: Vec<u64> = loading.collect();
        let loaded = uses.last().copied().unwrap_or(1);
        uses.extend(std::iter::repeat_n(loaded, self.pause as usize));
        uses.extend(self.peaks.iter().flat_map(|peak| [loaded + peak, loaded]));
        uses
    }
}

fn starts() -> impl Strategy<Value = Start> {
    (
        prop::collection::vec(0_u64..60, 1..12),
        0_u32..400,
        prop::collection::vec(0_u64..=50, 1..5),
    )
        .prop_map(|(weights, pause, peaks)| Start {
            weights,
            pause,
            peaks,
        })
}

/// What breaks vLLM's start: at a look free HBM is no less than when the engine began. Its memory stays what it is told
/// to be as far as there is room.
fn broken_start(
    before: u64,
    start: &Start,
    mut device: Device,
    step: impl Fn(&mut Device, u64),
) -> Option<(u64, u64)> {
    device.settle(before);
    let free = |device: &Device, used: u64| TOTAL.saturating_sub(device.offered + used);
    let first = free(&device, before);
    for engine in start.uses() {
        let used = (before + engine).min(TOTAL - device.offered);
        step(&mut device, used);
        let now = free(&device, used);
        if used > before && now >= first {
            return Some((first, now));
        }
    }
    None
}

fn step(device: &mut Device, used: u64) {
    device.step(used);
}

#[test]
fn the_rule_that_was_breaks_a_start() {
    let start = Start {
        weights: vec![110],
        pause: 4,
        peaks: vec![50],
    };
    let broken =
        |step: &dyn Fn(&mut Device, u64)| broken_start(300, &start, Device::new(config()), step);
    assert_eq!(broken(&step), None);
    let (first, now) = broken(&|device, used| {
        let seen = device.look(used);
        device.offered = with_room_for_another(&seen, 111);
    })
    .expect("free HBM rises");
    assert!(now >= first, "{now} after {first}");
}

/// A short use within the hysteresis, once the neighbour is quiet: what is given back for it adds to what it leaves. Also after
/// an engine's weights that were no more than noise themselves.
#[test]
fn a_short_use_within_the_noise_does_not_break_a_start() {
    for weights in [vec![44, 25, 36, 1, 3], vec![9]] {
        let start = Start {
            weights,
            pause: 7,
            peaks: vec![20],
        };
        let broken = broken_start(30, &start, Device::new(config()), step);
        assert_eq!(broken, None, "{start:?}");
    }
}

proptest! {
    #[test]
    fn free_hbm_never_rises_above_its_level_before_an_engine_began(
        before in 0_u64..=700,
        start in starts(),
    ) {
        let broken =
            broken_start(before, &start, Device::new(config()), step);
        prop_assert_eq!(broken, None);
    }

    /// However neighbours grow, and however long giving back takes.
    #[test]
    fn nor_above_its_level_before_any_recent_growth_beyond_the_reserve(
        before in 0_u64..=700,
        growth in prop::collection::vec(prop_oneof![3 => Just(0_u64), 2 => 21_u64..60], 1..60),
        late in 0_usize..6,
    ) {
        let mut device = Device::new(config());
        device.settle(before);
        let mut used = before;
        // What is on its way back, the oldest first.
        let mut coming = VecDeque::from(vec![0; late]);
        // When neighbours grew, and what would have been free before that if all had come.
        let mut levels: Vec<(Duration, u64)> = Vec::new();
        for grown in growth {
            let donated = device.offered + coming.iter().sum::<u64>();
            let grown = grown.min(TOTAL - used - donated);
            if grown > config().hysteresis_bytes {
                levels.push((device.now, TOTAL - used - device.offered));
                used += grown;
            }
            let (now, offered) = (device.now, device.offered);
            device.step_with(used, donated);
            coming.push_back(offered.saturating_sub(device.offered));
            coming.pop_front();
            let free = TOTAL - used - device.offered;
            for (when, level) in &levels {
                let recent = now - *when + PERIOD <= config().settle;
                // The reserve is restored whatever else, in whole slabs.
                prop_assert!(
                    !recent || free < *level || free < config().reserve_bytes + SLAB,
                    "{} after {}", free, level
                );
            }
        }
    }

    #[test]
    fn a_hold_gets_what_it_asks_for_and_then_nothing_moves(
        before in 0_u64..=600,
        asked in 0_u64..=400,
        uses in prop::collection::vec(0_u64..=400, 1..60),
    ) {
        let mut device = Device::new(config());
        device.settle(before);
        let offered = device.offered;
        device.held = Some(asked);
        device.step(before);
        let free = TOTAL - before - device.offered;
        prop_assert!(free >= asked);
        prop_assert!(device.offered == offered || free < asked.max(50) + SLAB, "no more than that");
        // The room is the engine's now, which uses no more than it asked for.
        device.held = Some(0);
        let held = device.offered;
        for engine in uses {
            let engine = engine.min(asked.saturating_sub(50));
            let decision = device.step(before + engine);
            prop_assert_eq!(decision.target, held);
        }
        // Afterwards it follows the device again.
        device.held = None;
        device.settle(before);
        prop_assert!(device.offered >= held);
    }
}
