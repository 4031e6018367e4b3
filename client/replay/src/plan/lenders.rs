//! What donors would lend over time: nothing is lent here, their policies are only asked.

use std::{fmt, time::Duration};

use swiftcache_client::donor::{Observation, Policy, PolicyConfig};

use crate::{
    ReplayError, donor_load::TokensInFlight, neighbours::MOST_SHARE, report::bytes, roofline::Gpu,
};

/// How often a donor looks at its device, trace seconds: as `swiftcache donate` does.
const PERIOD_S: f64 = 0.25;
/// How long donors have been running when the trace begins, seconds: longer than a policy needs to settle.
const WARM_UP_S: f64 = 60.0;

/// Where a donor's memory comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lending {
    /// An agent beside an engine that takes memory as it needs it: what stays idle, as `swiftcache donate --elastic` lends it.
    Elastic,
    /// So many bytes all the time: a part of an engine's own pool (`"lend"`), or `swiftcache donate --bytes`.
    Fixed(u64),
    /// A GPU that nobody uses, but for a reserve.
    Idle,
}

impl fmt::Display for Lending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Elastic => f.write_str("elastic, beside engines with a load of their own"),
            Self::Fixed(size) => write!(f, "{} each all the time", bytes(*size)),
            Self::Idle => f.write_str("GPUs that nobody uses"),
        }
    }
}

impl Lending {
    /// Refuses to lend more than a GPU has.
    pub(crate) fn check(self, gpu: &Gpu) -> Result<(), ReplayError> {
        match self {
            Self::Fixed(size) if size > gpu.hbm_bytes => Err(ReplayError::Flag {
                flag: "--donor",
                problem: format!(
                    "is {}; a GPU of this node, {}, has {} of HBM, and lends that at most",
                    bytes(size),
                    gpu.name,
                    bytes(gpu.hbm_bytes)
                ),
            }),
            _ => Ok(()),
        }
    }
}

/// One kind of donors.
#[derive(Clone, Debug)]
pub struct Lenders {
    /// Where their memory comes from.
    pub lending: Lending,
    /// HBM of each donor's GPU, bytes.
    pub hbm_bytes: u64,
    /// What is lent and taken back at a time, bytes.
    pub slab_bytes: u64,
    /// What an elastic donor keeps free for growth, bytes.
    pub headroom_bytes: u64,
    /// Tokens that an elastic donor's own model holds.
    pub load: TokensInFlight,
    /// What its model uses beside KV, bytes.
    pub base_bytes: u64,
    /// KV bytes of one of its tokens.
    pub token_bytes: u64,
}

/// A donor while time goes by.
#[derive(Clone, Debug)]
struct Lender {
    phase: f64,
    policy: Option<Policy>,
    slabs: usize,
}

/// So many slabs of one donor more or fewer than before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) donor: usize,
    pub(super) slabs: isize,
}

/// All donors while time goes by.
#[derive(Clone, Debug)]
pub(super) struct Supply<'a> {
    kind: &'a Lenders,
    lenders: Vec<Lender>,
    next_s: Option<f64>,
    clock: Duration,
}

impl Lenders {
    fn policy(&self) -> PolicyConfig {
        PolicyConfig {
            least_headroom_bytes: self.headroom_bytes,
            // Its engine takes memory as it needs it, so it is never settled.
            settled: None,
            ..PolicyConfig::new(self.hbm_bytes, self.slab_bytes)
        }
    }

    /// What a donor that lends the same amount all the time lends, slabs.
    fn fixed_slabs(&self) -> usize {
        let bytes = match self.lending {
            Lending::Elastic => 0,
            Lending::Fixed(bytes) => bytes,
            Lending::Idle => self.hbm_bytes - self.policy().reserve_bytes,
        };
        (bytes / self.slab_bytes) as usize
    }

    pub(super) fn supply(&self, donors: usize) -> Result<Supply<'_>, ReplayError> {
        let lender = |index: usize| -> Result<Lender, ReplayError> {
            let policy = match self.lending {
                Lending::Elastic => Some(Policy::new(self.policy())?),
                _ => None,
            };
            Ok(Lender {
                phase: index as f64 / donors as f64,
                policy,
                slabs: 0,
            })
        };
        Ok(Supply {
            kind: self,
            lenders: (0..donors).map(lender).collect::<Result<_, _>>()?,
            next_s: None,
            clock: Duration::ZERO,
        })
    }

    fn used(&self, now_s: f64, phase: f64) -> u64 {
        let full = self.base_bytes + self.load.at(now_s, phase) * self.token_bytes;
        full.min((self.hbm_bytes as f64 * MOST_SHARE) as u64)
    }
}

impl Supply<'_> {
    /// Lets time go by until `now_s`, and says what donors do at each look.
    pub(super) fn advance(&mut self, now_s: f64, mut changed: impl FnMut(f64, Change)) {
        let next_s = match self.next_s {
            Some(next_s) => next_s,
            None => {
                let looks = (WARM_UP_S / PERIOD_S) as u32;
                for _ in 0..looks {
                    self.look(now_s, &mut changed);
                }
                now_s
            }
        };
        // Where nothing changes there is nothing to look for.
        if self.kind.lending != Lending::Elastic {
            self.next_s = Some(now_s);
            return;
        }
        let mut at_s = next_s;
        while at_s <= now_s {
            self.look(at_s, &mut changed);
            at_s += PERIOD_S;
        }
        self.next_s = Some(at_s);
    }

    fn look(&mut self, now_s: f64, changed: &mut impl FnMut(f64, Change)) {
        let kind = self.kind;
        self.clock += Duration::from_secs_f64(PERIOD_S);
        for (donor, lender) in self.lenders.iter_mut().enumerate() {
            let target = match &mut lender.policy {
                None => kind.fixed_slabs(),
                Some(policy) => {
                    let offered = lender.slabs as u64 * kind.slab_bytes;
                    let taken = kind.used(now_s, lender.phase).saturating_add(offered);
                    let decision = policy.step(Observation {
                        now: self.clock,
                        free: kind.hbm_bytes.saturating_sub(taken),
                        total: kind.hbm_bytes,
                        donated: offered,
                        offered,
                        held: None,
                    });
                    (decision.target / kind.slab_bytes) as usize
                }
            };
            let slabs = target as isize - lender.slabs as isize;
            lender.slabs = target;
            if slabs != 0 {
                changed(now_s, Change { donor, slabs });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        donor_load::NeighbourRequest,
        models::ModelShape,
        roofline::{Engine, Gpu, Roofline},
    };

    fn lenders(lending: Lending) -> Lenders {
        let roofline = Roofline {
            model: *ModelShape::by_name("qwen3-8b").unwrap(),
            gpu: *Gpu::by_name("h100-sxm").unwrap(),
            engine: Engine::VLLM,
        };
        let request = |arrival_s, input_tokens| NeighbourRequest {
            arrival_s,
            input_tokens,
            output_tokens: 2_000,
        };
        let load = [request(50.0, 200_000), request(400.0, 1)];
        Lenders {
            lending,
            hbm_bytes: 80 << 30,
            slab_bytes: 1 << 30,
            headroom_bytes: 4 << 30,
            load: TokensInFlight::new(&load, &roofline, 8),
            base_bytes: 20 << 30,
            token_bytes: 147_456,
        }
    }

    /// Slabs on loan at each whole second.
    fn lent(lenders: &Lenders, donors: usize, seconds: u32) -> Vec<usize> {
        let mut supply = lenders.supply(donors).unwrap();
        let mut slabs = 0_isize;
        let at = (0..seconds).map(|second| {
            supply.advance(f64::from(second), |_, change| slabs += change.slabs);
            usize::try_from(slabs).unwrap()
        });
        at.collect()
    }

    #[test]
    fn an_elastic_donor_gives_back_when_its_owner_grows_and_lends_again() {
        let lent = lent(&lenders(Lending::Elastic), 1, 400);
        // 80 GiB less 20 in use, 4 in reserve, 4 for growth, and 2 of hysteresis.
        assert_eq!(lent[0], 50);
        let least = lent.iter().min().unwrap();
        assert!(*least <= 30, "its owner holds 27 GiB more: {least}");
        assert!(lent[399] > *least, "{}", lent[399]);
    }

    #[test]
    fn a_fixed_donor_lends_the_same_all_the_time_whole_slabs() {
        let fixed = lent(&lenders(Lending::Fixed(41 << 29)), 3, 100);
        assert!(fixed.iter().all(|slabs| *slabs == 60), "{fixed:?}");
        let idle = lent(&lenders(Lending::Idle), 2, 10);
        assert!(idle.iter().all(|slabs| *slabs == 152), "{idle:?}");
    }
}
