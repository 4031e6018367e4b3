//! The elastic agent: looks at a device, asks the policy, and does what it says.

use std::{
    fmt, mem,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::{Condvar, Mutex};
use swiftcache_proto::domain::DeviceUuid;
use tracing::{debug, info, warn};

use super::{Decision, Donor, DonorConfig, DonorStatus, Observation, Policy, PolicyConfig};
use crate::{
    Error, Result,
    device::DeviceLayer,
    session::{Observer, Session},
};

/// The pause after the first offer that the broker refuses. Each refusal doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest pause between two such offers.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// The agent's settings.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// How to decide.
    pub policy: PolicyConfig,
    /// How often to look: a neighbour's growth is answered within this time.
    pub period: Duration,
}

/// Follows a device's idle HBM up and down until it is stopped.
///
/// One thread looks, and asks for bytes back without waiting for the answer; another takes and offers, which may
/// wait long for a slow broker or driver. So a neighbour's demand is never behind an offer.
pub struct Agent {
    shared: Arc<Shared>,
    wake: mpsc::Sender<Wake>,
    threads: Vec<JoinHandle<()>>,
}

/// Why the thread that looks does so before its period is over.
enum Wake {
    /// The device's hold changed.
    Hold,
    /// It is over.
    Stop,
}

struct Shared {
    donor: Donor,
    wake: mpsc::Sender<Wake>,
    layer: Arc<dyn DeviceLayer>,
    last: Mutex<Option<Decision>>,
    goal: Mutex<Goal>,
    changed: Condvar,
    /// What the last offer met, while less is on offer than there should be.
    problem: Mutex<Option<String>>,
}

/// What the thread that offers is to reach.
#[derive(Default)]
struct Goal {
    /// What should be on offer, bytes.
    target: u64,
    /// Which look said so: after a failure, the next one tries again.
    look: u64,
    over: bool,
}

impl Agent {
    /// Starts following `donor.device`. Its slabs are the policy's.
    ///
    /// # Errors
    /// For settings that cannot work, or a device that cannot be looked at.
    pub fn start(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        donor: DonorConfig,
        config: AgentConfig,
    ) -> Result<Self> {
        if donor.slab_bytes != config.policy.slab_bytes {
            let problem = format!(
                "is {} for the donor and {} for the policy",
                donor.slab_bytes, config.policy.slab_bytes
            );
            return Err(Error::config("slab_bytes", problem));
        }
        layer.hbm(&donor.device)?;
        let policy = Policy::new(config.policy)?;
        let (wake, woken) = mpsc::channel();
        let shared = Arc::new(Shared {
            donor: Donor::of(session, Arc::clone(&layer), donor, true)?,
            wake: wake.clone(),
            layer,
            last: Mutex::new(None),
            goal: Mutex::default(),
            changed: Condvar::new(),
            problem: Mutex::default(),
        });
        let observer: Arc<dyn Observer> = Arc::clone(&shared) as _;
        shared.donor.core.session.observe(&observer);
        let mut agent = Self {
            shared: Arc::clone(&shared),
            wake,
            threads: Vec::new(),
        };
        let its_shared = Arc::clone(&shared);
        agent.spawn("swiftcache-agent", move || {
            its_shared.follow(policy, config.period, &woken);
        })?;
        agent.spawn("swiftcache-offer", move || shared.raise())?;
        Ok(agent)
    }

    fn spawn(&mut self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let builder = thread::Builder::new().name(name.to_owned());
        let thread = builder.spawn(work).map_err(Error::Thread)?;
        self.threads.push(thread);
        Ok(())
    }

    /// What it holds now.
    pub fn status(&self) -> DonorStatus {
        self.shared.donor.status()
    }

    /// What it decided last, and why; for people.
    pub fn explain(&self) -> String {
        match &*self.shared.last.lock() {
            Some(decision) => decision.to_string(),
            None => "has not looked at the device yet".to_owned(),
        }
    }

    /// Why less is on offer than it decided to offer, for people: what the last offer met.
    pub fn problem(&self) -> Option<String> {
        self.shared.problem.lock().clone()
    }

    /// How long borrowers may take to move away from what is asked back.
    pub fn drain_window(&self) -> Duration {
        self.shared.donor.drain_window()
    }

    /// Stops following, asks for everything back, and waits for it for at most `limit`. True when all of it came.
    pub fn stop(mut self, limit: Duration) -> bool {
        self.halt();
        let deadline = Instant::now() + limit;
        self.shared.donor.core.withdraw_all();
        self.shared.donor.core.wait_returned(deadline)
    }

    fn halt(&mut self) {
        if !self.shared.donor.core.session.is_here() {
            // A child of the agent's process has no such threads.
            return mem::forget(mem::take(&mut self.threads));
        }
        // A thread that is gone needs no telling.
        let _ = self.wake.send(Wake::Stop);
        self.shared.goal.lock().over = true;
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.halt();
    }
}

/// Called on the session's thread.
impl Observer for Shared {
    fn hold_changed(&self, device: &DeviceUuid) {
        if *device == self.donor.config().device {
            // A thread that is gone looks no more.
            let _ = self.wake.send(Wake::Hold);
        }
    }
}

impl Shared {
    fn follow(&self, mut policy: Policy, period: Duration, woken: &mpsc::Receiver<Wake>) {
        let start = Instant::now();
        loop {
            match self.look(start.elapsed()) {
                Ok(observation) => {
                    let decision = policy.step(observation);
                    *self.last.lock() = Some(decision);
                    self.act(&decision);
                }
                Err(error) => warn!(%error, "the device cannot be looked at"),
            }
            match woken.recv_timeout(period) {
                Ok(Wake::Hold) | Err(mpsc::RecvTimeoutError::Timeout) => {}
                Ok(Wake::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&self, now: Duration) -> Result<Observation> {
        for answer in self.donor.core.hear() {
            match answer {
                Ok(bytes) => info!(bytes, "on their way back"),
                Err(error) => warn!(%error, "nothing can come back now; asked again"),
            }
        }
        let device = &self.donor.config().device;
        let hbm = self.layer.hbm(device)?;
        let status = self.donor.status();
        Ok(Observation {
            now,
            free: hbm.free,
            total: hbm.total,
            donated: status.offered_bytes + status.withdrawing_bytes,
            // Asked for once is enough.
            offered: status.offered_bytes.saturating_sub(status.asked_bytes),
            held: (self.donor.core.session.hold(device)).map(|hold| hold.free_bytes),
        })
    }

    fn act(&self, decision: &Decision) {
        {
            let mut goal = self.goal.lock();
            goal.target = decision.target;
            goal.look += 1;
        }
        self.changed.notify_all();
        let offered = decision.observation.offered;
        if decision.target < offered {
            info!(bytes = offered - decision.target, "{decision}");
            self.donor.core.ask_back(offered - decision.target);
        }
    }

    /// Offers slab by slab up to the goal, which may change at any time. What the broker refuses is offered again after a
    /// pause that grows, so that a slab is not taken and freed with every look.
    fn raise(&self) {
        let mut look = 0;
        let (mut due, mut pause) = (Instant::now(), FIRST_PAUSE);
        loop {
            {
                let mut goal = self.goal.lock();
                self.changed
                    .wait_while(&mut goal, |goal| !goal.over && goal.look == look);
                look = goal.look;
            }
            loop {
                let goal = self.goal.lock();
                if goal.over {
                    return;
                }
                if self.donor.status().offered_bytes >= goal.target {
                    drop(goal);
                    *self.problem.lock() = None;
                    break;
                }
                if Instant::now() < due {
                    break;
                }
                let target = goal.target;
                drop(goal);
                match self.donor.offer_one() {
                    Ok(true) => {
                        pause = FIRST_PAUSE;
                        debug!(target, "a slab more on offer");
                    }
                    Ok(false) => {
                        debug!(target, "a slab more, once the broker answers");
                        break;
                    }
                    Err(error) => {
                        if matches!(error, Error::Refused { .. }) {
                            due = Instant::now() + pause;
                            pause = (pause * 2).min(LONGEST_PAUSE);
                        }
                        self.note_problem(&error);
                        break;
                    }
                }
            }
        }
    }
}

impl Shared {
    /// Nothing more can be offered for now. Said once for each cause, since every look tries again.
    fn note_problem(&self, error: &Error) {
        let text = error.to_string();
        let mut problem = self.problem.lock();
        if problem.as_ref() != Some(&text) {
            let device = &self.donor.config().device;
            warn!(%device, "no more slabs on offer for now: {text}");
            *problem = Some(text);
        }
    }
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Agent({:?})", self.shared.donor)
    }
}
