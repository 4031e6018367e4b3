//! The elastic agent: looks at a device, asks the policy, and does what it says.

use std::{
    fmt,
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;
use tracing::{debug, info, warn};

use super::{Decision, Donor, DonorConfig, DonorStatus, Observation, Policy, PolicyConfig, Reason};
use crate::{Error, Result, device::DeviceLayer, session::Session};

/// The agent's settings.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// How to decide.
    pub policy: PolicyConfig,
    /// How often to look: a neighbour's growth is answered within this time.
    pub period: Duration,
}

/// Follows a device's idle HBM up and down until it is stopped.
pub struct Agent {
    shared: Arc<Shared>,
    stop: mpsc::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    donor: Donor,
    layer: Arc<dyn DeviceLayer>,
    last: Mutex<Option<Decision>>,
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
        let shared = Arc::new(Shared {
            donor: Donor::open(session, Arc::clone(&layer), donor)?,
            layer,
            last: Mutex::new(None),
        });
        let (stop, stopped) = mpsc::channel();
        let its_shared = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("swiftcache-agent".to_owned())
            .spawn(move || its_shared.follow(policy, config.period, &stopped))
            .map_err(Error::Thread)?;
        Ok(Self {
            shared,
            stop,
            thread: Some(thread),
        })
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

    /// Stops following, asks for everything back, and waits for it for at most `limit`. True when all of it came.
    pub fn stop(mut self, limit: Duration) -> bool {
        self.halt();
        let deadline = Instant::now() + limit;
        self.shared.donor.core.withdraw_all();
        self.shared.donor.core.wait_returned(deadline)
    }

    fn halt(&mut self) {
        // A thread that is gone needs no telling.
        let _ = self.stop.send(());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.halt();
    }
}

impl Shared {
    fn follow(&self, mut policy: Policy, period: Duration, stopped: &mpsc::Receiver<()>) {
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
            match stopped.recv_timeout(period) {
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn look(&self, now: Duration) -> Result<Observation> {
        let hbm = self.layer.hbm(&self.donor.config().device)?;
        let status = self.donor.status();
        Ok(Observation {
            now,
            free: hbm.free,
            total: hbm.total,
            donated: status.offered_bytes + status.withdrawing_bytes,
            offered: status.offered_bytes,
        })
    }

    fn act(&self, decision: &Decision) {
        let offered = decision.observation.offered;
        let outcome = if decision.target > offered {
            self.donor.grow(decision.target - offered)
        } else if decision.target < offered {
            self.donor.shrink(offered - decision.target)
        } else {
            return;
        };
        match (outcome, decision.reason) {
            (Ok(bytes), Reason::Falling) => info!(bytes, "{decision}"),
            (Ok(bytes), _) => debug!(bytes, "{decision}"),
            (Err(error), _) => warn!(%error, "{decision}"),
        }
    }
}

/// What an agent would come to offer on `device` as it is now, and why; offers nothing.
///
/// # Errors
/// For settings that cannot work, or a device that cannot be looked at.
pub fn explain(
    layer: &dyn DeviceLayer,
    device: &DeviceUuid,
    policy: PolicyConfig,
) -> Result<String> {
    let hbm = layer.hbm(device)?;
    let decision = Policy::new(policy)?.step(Observation {
        now: Duration::ZERO,
        free: hbm.free,
        total: hbm.total,
        donated: 0,
        offered: 0,
    });
    Ok(format!("{device}: {decision}"))
}

impl fmt::Debug for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Agent({:?})", self.shared.donor)
    }
}
