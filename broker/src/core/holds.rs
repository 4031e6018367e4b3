//! Holds: a device's elastic donors make room for an engine that starts there, and then stay as they are.
//!
//! The donors do the work; the broker passes the word on, and remembers it for those that come later. A hold is not in
//! the ledger: it is short, and donors that were told keep to it while the broker restarts.

use swiftcache_proto::domain::SessionId;

use super::{
    HoldDemand, HoldId, Note, Outgoing, Refusal, Reply, devices::DeviceState, state::State,
};

/// A device's hold.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hold {
    id: HoldId,
    pub(super) free_bytes: u64,
    /// When it ends, milliseconds.
    until: u64,
}

impl Hold {
    /// Milliseconds; 0 when it is over.
    pub(super) fn left_ms(&self, now: u64) -> u32 {
        u32::try_from(self.until.saturating_sub(now)).unwrap_or(u32::MAX)
    }
}

impl State {
    pub(super) fn hold(&mut self, demand: HoldDemand) -> Result<Reply, Refusal> {
        let number = self.devices.number(&demand.device)?;
        let now = self.now;
        let present = (self.devices.list[number].hold).filter(|hold| hold.left_ms(now) > 0);
        if let (Some(present), Some(id)) = (present, demand.hold)
            && id != present.id
        {
            return Err(Refusal::Stale(format!(
                "device {} is held for another engine's start for {:.1} s more",
                demand.device,
                f64::from(present.left_ms(now)) / 1000.0,
            )));
        }
        if demand.for_ms == 0 {
            if present.is_some() {
                self.end_hold(number);
            }
            return Ok(Reply::Done);
        }
        let Some(id) = demand.hold else {
            return Err(Refusal::Invalid {
                field: "hold_id",
                problem: "is 0; only the end of a hold needs none".to_owned(),
            });
        };
        self.devices.list[number].hold = Some(Hold {
            id,
            free_bytes: demand.free_bytes,
            until: now.saturating_add(demand.for_ms.into()),
        });
        self.tell_all(number);
        self.note(Note::Held {
            device: demand.device,
            free_bytes: demand.free_bytes,
            for_ms: demand.for_ms,
        });
        Ok(Reply::Done)
    }

    /// Sessions that follow a device need not have anything on offer there yet: all are told.
    fn tell_all(&mut self, number: usize) {
        let Some(message) = message(&self.devices.list[number], self.now) else {
            return;
        };
        let sessions: Vec<SessionId> = self.sessions.keys().copied().collect();
        for session in sessions {
            self.send(session, message.clone());
        }
    }

    /// Donors know when a hold ends by itself; they are told when it ends before.
    fn end_hold(&mut self, number: usize) {
        if let Some(hold) = &mut self.devices.list[number].hold {
            hold.until = self.now;
        }
        self.tell_all(number);
        self.forget_hold(number);
    }

    pub(super) fn expire_holds(&mut self) {
        for number in 0..self.devices.list.len() {
            let hold = self.devices.list[number].hold;
            if hold.is_some_and(|hold| hold.left_ms(self.now) == 0) {
                self.forget_hold(number);
            }
        }
    }

    fn forget_hold(&mut self, number: usize) {
        self.devices.list[number].hold = None;
        self.note(Note::HoldEnded {
            device: self.devices.uuid(number).clone(),
        });
    }

    /// What a session that attaches now is to know.
    pub(super) fn lasting_holds(&self) -> impl Iterator<Item = Outgoing> {
        let lasting = |message: &Outgoing| !matches!(message, Outgoing::Hold { left_ms: 0, .. });
        (self.devices.list.iter())
            .filter_map(|device| message(device, self.now))
            .filter(lasting)
    }
}

fn message(device: &DeviceState, now: u64) -> Option<Outgoing> {
    let hold = device.hold?;
    Some(Outgoing::Hold {
        device: device.device.uuid.clone(),
        free_bytes: hold.free_bytes,
        left_ms: hold.left_ms(now),
    })
}
