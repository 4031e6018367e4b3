//! How much idle HBM to offer. Pure: what was observed and when goes in, a target comes out.
//!
//! Free HBM is not room: a neighbour that starts up grows in seconds. So the reserve and headroom for growth stay free.
//!
//! * The offer falls at once, and by as little as will do: an engine that starts measures its own needs by how free HBM
//!   falls, and gives up when free HBM is no less in the end than it was at first. While neighbours grow, only the
//!   reserve is restored. When they have been quiet, the headroom is restored too, but free HBM stays below its level
//!   before that growth, also when a short use within the noise ends.
//! * The offer rises slowly, to what the worst observation of the recent past would still have allowed, with headroom
//!   for as much growth as was seen, and only when that leaves the hysteresis besides. Noise that stays within the
//!   hysteresis therefore moves nothing.
//! * A neighbour that takes its memory when it starts and then holds it, as most engines do, does not grow. When neighbours have
//!   neither grown nor shrunk for some minutes they are settled: then reserve and headroom are no more than a part of what is
//!   idle beside them. The first growth makes them what they were, and what is missing is given back at once. It has to be
//!   quiet for twice as long after that.
//! * While the device is held for an engine's start, the offer falls by what the engine asks for, and never rises.

use std::{collections::VecDeque, fmt, time::Duration};

use crate::{Error, Result};

/// The policy's settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyConfig {
    /// The unit of donation, bytes.
    pub slab_bytes: u64,
    /// Never offered, bytes.
    pub reserve_bytes: u64,
    /// Kept free for growth even if none was ever seen, bytes: what giving back restores beside the reserve,
    /// once neighbours are quiet.
    pub least_headroom_bytes: u64,
    /// The most to offer, bytes.
    pub max_bytes: u64,
    /// Free beyond reserve and headroom before anything more is offered, bytes.
    pub hysteresis_bytes: u64,
    /// The recent past: a rise must have been possible for this long, and after a growth only the reserve is restored for
    /// this long.
    pub settle: Duration,
    /// How long giving back may take: growth is measured over this time, and nothing is offered that would not leave
    /// headroom for as much.
    pub horizon: Duration,
    /// The time in which half of a growth spurt is forgotten.
    pub half_life: Duration,
    /// The most slabs to add in one step.
    pub rise_slabs: u64,
    /// What is kept free beside neighbours that do not grow. `None`: the same as beside others.
    pub settled: Option<Settled>,
}

/// What is kept free beside neighbours that hold what they have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// Neighbours are settled when they have neither grown nor shrunk beyond noise for this long.
    pub after: Duration,
    /// The reserve is at most this part of what is idle beside them: 8 is an eighth. 0: the reserve stays as it is.
    pub reserve_part: u64,
    /// The same of the least headroom.
    pub headroom_part: u64,
}

/// The longest time that neighbours must be quiet, however often they have grown.
const LONGEST_QUIET: Duration = Duration::from_secs(3600);

impl PolicyConfig {
    /// Settings for a device of `total` bytes, lent in slabs of `slab_bytes`: a twentieth in reserve, a twentieth
    /// for growth; beside neighbours that were quiet for five minutes at most an eighth of what is idle, each.
    pub fn new(total: u64, slab_bytes: u64) -> Self {
        Self {
            slab_bytes,
            reserve_bytes: total / 20,
            least_headroom_bytes: total / 20,
            max_bytes: total,
            hysteresis_bytes: slab_bytes.saturating_mul(2),
            settle: Duration::from_secs(10),
            horizon: Duration::from_secs(2),
            half_life: Duration::from_secs(120),
            rise_slabs: 4,
            settled: Some(Settled {
                after: Duration::from_secs(300),
                reserve_part: 8,
                headroom_part: 8,
            }),
        }
    }

    /// The settings that hold beside settled neighbours who leave `available` bytes.
    pub fn beside_settled(&self, available: u64) -> Self {
        let Some(settled) = self.settled else {
            return *self;
        };
        // Less than two slabs would be gone before the next look.
        let least = self.slab_bytes.saturating_mul(2);
        let most = |usual: u64, part: u64| match part {
            0 => usual,
            part => usual.min((available / part).max(least)),
        };
        Self {
            reserve_bytes: most(self.reserve_bytes, settled.reserve_part),
            least_headroom_bytes: most(self.least_headroom_bytes, settled.headroom_part),
            ..*self
        }
    }

    fn check(&self) -> Result<()> {
        if self.slab_bytes == 0 {
            return Err(Error::config("slab_bytes", "takes more than 0"));
        }
        if self.rise_slabs == 0 {
            return Err(Error::config("rise_slabs", "takes more than 0"));
        }
        if self.half_life.is_zero() {
            return Err(Error::config("half_life", "takes more than 0"));
        }
        Ok(())
    }
}

/// One look at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// When, on a clock that never goes back; only differences matter.
    pub now: Duration,
    /// HBM that nobody uses, bytes.
    pub free: u64,
    /// All HBM, bytes.
    pub total: u64,
    /// What this donor has taken, on offer or on its way back, bytes.
    pub donated: u64,
    /// What of that is on offer, bytes.
    pub offered: u64,
    /// The device is held for an engine's start: so many bytes are to be free.
    pub held: Option<u64>,
}

impl Observation {
    /// What would be free if this donor had taken nothing.
    fn available(&self) -> u64 {
        self.free.saturating_add(self.donated).min(self.total)
    }
}

/// Why a target is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A neighbour needs the room.
    Falling,
    /// Room has been there for long enough.
    Rising,
    /// More is free, but not yet for long enough, or not by enough.
    Waiting,
    /// Nothing more to offer.
    Steady,
    /// The device is held for an engine's start.
    Held,
}

/// How much to offer, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What should be on offer, bytes: whole slabs.
    pub target: u64,
    /// Why.
    pub reason: Reason,
    /// What could be offered at this moment, bytes.
    pub ceiling: u64,
    /// Kept for growth, bytes.
    pub headroom: u64,
    /// What it was decided on.
    pub observation: Observation,
    /// Never offered, bytes.
    pub reserve: u64,
}

/// The policy's memory.
#[derive(Clone, Debug)]
pub struct Policy {
    config: PolicyConfig,
    /// The looks of the longer of `settle` and `horizon`.
    past: VecDeque<Look>,
    since: Option<Duration>,
    /// The largest growth of neighbours within one horizon, fading.
    spurt: f64,
    /// Neighbours grow.
    growing: bool,
    /// The least that was free before they began to, bytes, until something more is offered.
    level: Option<u64>,
    /// Since when neighbours hold what they have.
    quiet: Option<Quiet>,
    /// Neighbours are settled.
    settled: bool,
    /// How often neighbours grew after they had been settled.
    unsettled: u32,
}

/// Neighbours have neither grown nor shrunk.
#[derive(Clone, Copy, Debug)]
struct Quiet {
    since: Duration,
    /// What was available then, bytes.
    available: u64,
}

#[derive(Clone, Copy, Debug)]
struct Look {
    when: Duration,
    /// What would have been free if this donor had taken nothing, bytes.
    available: u64,
    /// What the decision left free, bytes, once all that was asked back is here.
    left: u64,
}

impl Policy {
    /// A policy that has seen nothing.
    ///
    /// # Errors
    /// For settings that cannot work.
    pub fn new(config: PolicyConfig) -> Result<Self> {
        config.check()?;
        Ok(Self {
            config,
            past: VecDeque::new(),
            since: None,
            spurt: 0.0,
            growing: false,
            level: None,
            quiet: None,
            settled: false,
            unsettled: 0,
        })
    }

    /// Its settings.
    pub fn config(&self) -> &PolicyConfig {
        &self.config
    }

    /// Decides on one observation. Observations come in order of time.
    pub fn step(&mut self, observation: Observation) -> Decision {
        let now = observation.now;
        let available = observation.available();
        // What holds for an engine's start is not changed by the start.
        if observation.held.is_none() {
            self.watch(now, available);
        }
        let config = match self.settled {
            true => self.config.beside_settled(available),
            false => self.config,
        };
        let headroom = self.headroom(now, available, &config);
        let fallen = self.fallen(now, available);
        self.since.get_or_insert(now);
        let ceiling = ceiling(&config, available, headroom);
        let settled =
            (self.since).is_some_and(|since| now.saturating_sub(since) >= self.config.settle);
        let worst = (self.past.iter().map(|look| look.available)).fold(available, u64::min);
        let worst = worst.saturating_sub(config.hysteresis_bytes);
        let kept = self::ceiling(&config, worst, headroom);
        let slab = self.config.slab_bytes;
        let step = slab.saturating_mul(self.config.rise_slabs);
        let most = observation.offered.min(self.config.max_bytes);
        let left = available.saturating_sub(observation.offered);
        let least = most.saturating_sub(self.give_back(&config, &observation, left, fallen));
        let (target, reason) = if least < observation.offered {
            (least, Reason::Falling)
        } else if observation.held.is_some() {
            (observation.offered, Reason::Held)
        } else if settled && kept >= observation.offered.saturating_add(slab) {
            (
                kept.min(observation.offered.saturating_add(step)),
                Reason::Rising,
            )
        } else if ceiling >= observation.offered.saturating_add(slab) {
            (observation.offered, Reason::Waiting)
        } else {
            (observation.offered, Reason::Steady)
        };
        let target = target / slab * slab;
        if reason == Reason::Rising {
            self.level = None;
        }
        self.remember(Look {
            when: now,
            available,
            left: available.saturating_sub(target),
        });
        Decision {
            target,
            reason,
            ceiling,
            headroom,
            observation,
            reserve: config.reserve_bytes,
        }
    }

    /// Sees whether neighbours are settled.
    fn watch(&mut self, now: Duration, available: u64) {
        let Some(Settled { after, .. }) = self.config.settled else {
            return;
        };
        let noise = self.config.hysteresis_bytes;
        match self.quiet {
            Some(quiet) if quiet.available.abs_diff(available) <= noise => {
                let needed = after.saturating_mul(1 << self.unsettled.min(16));
                let needed = needed.min(LONGEST_QUIET.max(after));
                self.settled |= now.saturating_sub(quiet.since) >= needed;
            }
            before => {
                let grew = before.is_some_and(|quiet| available < quiet.available);
                self.unsettled += u32::from(self.settled && grew);
                self.settled = false;
                self.quiet = Some(Quiet {
                    since: now,
                    available,
                });
            }
        }
    }

    /// What is to be given back, bytes: whole slabs. `left` is what will be free when all that was asked back is here,
    /// `fallen` what neighbours took within the recent past.
    fn give_back(
        &self,
        config: &PolicyConfig,
        observation: &Observation,
        left: u64,
        fallen: u64,
    ) -> u64 {
        let PolicyConfig {
            slab_bytes: slab,
            reserve_bytes,
            least_headroom_bytes,
            hysteresis_bytes,
            ..
        } = *config;
        let needed = observation
            .held
            .map_or(reserve_bytes, |asked| asked.max(reserve_bytes));
        let needed = needed
            .saturating_sub(left)
            .div_ceil(slab)
            .saturating_mul(slab);
        if self.growing || observation.held.is_some() {
            return needed;
        }
        let usual = reserve_bytes.saturating_add(least_headroom_bytes);
        // Growth within the noise sets no level: then it is what a rise leaves free.
        let level = (self.level).unwrap_or(usual.saturating_add(hysteresis_bytes));
        // As free as before the growth is not less free than before. What neighbours took only now may be free again at
        // the next look.
        let usual = usual.min(level.saturating_sub(1).saturating_sub(fallen));
        needed.max(usual.saturating_sub(left) / slab * slab)
    }

    /// By how much less is available than at the best look of the recent past, bytes. Beyond noise, neighbours grow.
    fn fallen(&mut self, now: Duration, available: u64) -> u64 {
        let oldest = now.saturating_sub(self.config.settle);
        let recent = self.past.iter().filter(|look| look.when >= oldest);
        let most = (recent.clone().map(|look| look.available)).fold(available, u64::max);
        let fallen = most - available;
        let grows = fallen > self.config.hysteresis_bytes;
        if grows && !self.growing {
            let before = recent.map(|look| look.left).min();
            self.level = self.level.into_iter().chain(before).min();
        }
        self.growing = grows;
        fallen
    }

    fn headroom(&mut self, now: Duration, available: u64, config: &PolicyConfig) -> u64 {
        let horizon = now.saturating_sub(self.config.horizon);
        let most = (self.past.iter())
            .filter(|look| look.when >= horizon)
            .map(|look| look.available)
            .fold(available, u64::max);
        if let Some(last) = self.past.back() {
            let elapsed = now.saturating_sub(last.when).as_secs_f64();
            self.spurt *= 0.5_f64.powf(elapsed / self.config.half_life.as_secs_f64());
        }
        self.spurt = self.spurt.max((most - available) as f64);
        config.least_headroom_bytes.max(self.spurt as u64)
    }

    fn remember(&mut self, look: Look) {
        let oldest = (look.when).saturating_sub(self.config.settle.max(self.config.horizon));
        while self.past.front().is_some_and(|past| past.when < oldest) {
            self.past.pop_front();
        }
        self.past.push_back(look);
    }
}

/// What could be on offer if it had been so for long enough, bytes: whole slabs.
fn ceiling(config: &PolicyConfig, available: u64, headroom: u64) -> u64 {
    let room = available
        .saturating_sub(config.reserve_bytes)
        .saturating_sub(headroom)
        .min(config.max_bytes);
    room / config.slab_bytes * config.slab_bytes
}

/// What an elastic donor would come to lend on a device that is seen like this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forecast {
    /// By what is known now.
    pub now: Decision,
    /// What could be on offer once neighbours are settled, bytes.
    pub settled: u64,
    /// How long they must be quiet for that. `None`: settled neighbours make no difference.
    pub after: Option<Duration>,
}

impl Forecast {
    /// Looks once, with a policy that has seen nothing.
    ///
    /// # Errors
    /// For settings that cannot work.
    pub fn new(config: PolicyConfig, observation: Observation) -> Result<Self> {
        let now = Policy::new(config)?.step(observation);
        let available = observation.available();
        let beside = config.beside_settled(available);
        let settled = ceiling(&beside, available, beside.least_headroom_bytes);
        let more = settled > now.ceiling;
        Ok(Self {
            now,
            settled: settled.max(now.ceiling),
            after: config.settled.filter(|_| more).map(|settled| settled.after),
        })
    }

    /// Not even a slab.
    pub fn is_nothing(&self) -> bool {
        self.settled == 0
    }
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.now)?;
        if let Some(after) = self.after {
            let minutes = after.as_secs_f64() / 60.0;
            write!(
                f,
                "; {:.2} GiB once its neighbours have held what they have for {minutes:.0} min",
                gib(self.settled)
            )?;
        }
        if self.is_nothing() {
            write!(
                f,
                "; it lends nothing: a vLLM engine lends a part of its own pool with \"lend\", or leaves more with a smaller \
                 --gpu-memory-utilization"
            )?;
        }
        Ok(())
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = &self.observation;
        write!(
            f,
            "{:.2} GiB of {:.2} GiB free, {:.2} GiB on offer; after {:.2} GiB reserve and {:.2} GiB for neighbours' growth \
             {:.2} GiB could be on offer",
            gib(seen.free),
            gib(seen.total),
            gib(seen.offered),
            gib(self.reserve),
            gib(self.headroom),
            gib(self.ceiling),
        )?;
        match self.reason {
            Reason::Falling => write!(
                f,
                ": giving back down to {:.2} GiB at once",
                gib(self.target)
            ),
            Reason::Rising => write!(f, ": offering {:.2} GiB", gib(self.target)),
            Reason::Waiting => write!(f, ": waiting until that has lasted"),
            Reason::Steady => write!(f, ": nothing to change"),
            Reason::Held => write!(f, ": offering nothing more while the device is held"),
        }
    }
}
