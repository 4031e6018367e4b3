//! The loop that keeps a session connected.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use swiftcache_proto::{
    convert,
    domain::{DeviceUuid, Generation, LeaseId, RevokeReason},
    v1::{self, session_response::Message},
};
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, info, warn};

use super::{
    Connected, Held, Hold, LinkState, Revocation, Scrub, Shared,
    backoff::Backoff,
    connection::{Connection, OpenError, Opened, Past},
    orphans::Withdrawer,
    report::Reporter,
    rpc::is_refusal,
};

/// The longest one attempt to connect may take: a stopped broker accepts and never answers.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(3);
/// The longest a leaving session waits for the broker.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// A connection that lasted this long was a good one: the next pause is short again.
const GOOD_CONNECTION: Duration = Duration::from_secs(1);

/// Connects, serves, and connects again, until `life` is over; then leaves.
pub(super) async fn run(shared: &Arc<Shared>, life: CancellationToken) {
    let mut past: Option<Past> = None;
    let mut replaced = false;
    let mut backoff = Backoff::default();
    while !life.is_cancelled() {
        let attempt = tokio::select! {
            () = life.cancelled() => break,
            attempt = timeout(ATTEMPT_LIMIT, open(shared, &mut past)) => attempt,
        };
        match attempt {
            Ok(Ok(opened)) => {
                let since = Instant::now();
                let boot_id = opened.connection.boot_id;
                let before = past.and_then(|past| past.boot_id);
                let restarted = before.is_some_and(|before| before != boot_id);
                past = Some(Past {
                    session: opened.connection.session,
                    boot_id: Some(boot_id),
                });
                let connected = Connected {
                    epoch: opened.connection.epoch,
                    restarted,
                    replaced: std::mem::take(&mut replaced),
                    refused: opened.refused.clone(),
                    regions: opened.regions.clone(),
                };
                serve(shared, opened, &connected, &life).await;
                if since.elapsed() >= GOOD_CONNECTION {
                    backoff.reset();
                }
            }
            Ok(Err(OpenError::SessionOver)) => {
                warn!(
                    "the broker does not know this session; opening a new one, which holds nothing"
                );
                replaced |= past.is_some_and(|past| past.boot_id.is_some());
                past = None;
                continue;
            }
            Ok(Err(OpenError::Refused(problem))) => set_down(shared, problem, true),
            Ok(Err(OpenError::Failed(problem))) => set_down(shared, problem, false),
            Err(_) => set_down(shared, "it does not answer".to_owned(), false),
        }
        let pause = backoff.next(&mut rand::rng());
        tokio::select! {
            () = life.cancelled() => break,
            () = sleep(pause) => {}
        }
    }
    leave(shared, past).await;
}

async fn open(shared: &Shared, past: &mut Option<Past>) -> Result<Opened, OpenError> {
    let held = match past {
        Some(_) => shared.observers.held(),
        None => Held::default(),
    };
    let epoch = shared.epoch.load(Ordering::SeqCst);
    Connection::open(&shared.config, epoch, past, held).await
}

/// Serves one connection until it is lost or the session is over.
async fn serve(
    shared: &Arc<Shared>,
    opened: Opened,
    connected: &Connected,
    life: &CancellationToken,
) {
    let Opened {
        connection,
        mut incoming,
        ..
    } = opened;
    info!(
        session = connection.session.label(),
        restarted = connected.restarted,
        replaced = connected.replaced,
        "connected to the broker"
    );
    let connection = Arc::new(connection);
    if connected.replaced {
        shared.let_go(shared.orphans.forgotten());
    }
    let claimed = shared.observers.regions();
    let nobodys = (connected.regions.iter().copied()).filter(|region| !claimed.contains(region));
    shared.orphans.found(nobodys);
    (shared.drain_ms).store(connection.drain_ms, Ordering::Relaxed);
    *shared.link.lock() = LinkState::Up(Arc::clone(&connection));
    for observer in shared.observers.alive() {
        observer.connected(connected);
    }
    {
        // Under the lock that waiters look under, or one could miss it.
        let _link = shared.link.lock();
        connection.announced.store(true, Ordering::Release);
    }
    shared.changed.notify_all();
    let reporter = Reporter::new(&connection);
    let given_up = connection.given_up.clone();
    let _over = connection.over.clone().drop_guard();
    let withdrawer = Withdrawer::new(&connection);
    let _withdrawals = AbortOnDropHandle::new(tokio::spawn(withdrawer.run(Arc::clone(shared))));
    drop(connection);
    let its_shared = Arc::clone(shared);
    let _reports = AbortOnDropHandle::new(tokio::spawn(async move {
        reporter.run(&its_shared.tally).await;
    }));
    let problem = loop {
        tokio::select! {
            () = life.cancelled() => return,
            () = given_up.cancelled() => break "what became of a call is not known".to_owned(),
            message = incoming.message() => match message {
                Ok(Some(v1::SessionResponse { message: Some(message) })) => dispatch(shared, message),
                Ok(Some(_)) => debug!("ignored a message of a newer broker"),
                Ok(None) => break "the broker closed the session stream".to_owned(),
                Err(status) => break status.message().to_owned(),
            }
        }
    };
    info!(problem, "lost the broker; reconnecting");
    // Moves on before anyone is asked what is held: a grant of this connection that has not been adopted by then
    // never will be.
    shared.epoch.fetch_add(1, Ordering::SeqCst);
    set_down(shared, problem, false);
    for observer in shared.observers.alive() {
        observer.disconnected();
    }
}

fn dispatch(shared: &Shared, message: Message) {
    match message {
        Message::Attached(_) => debug!("ignored a second Attached"),
        Message::Revoke(revoke) => {
            let revocation = Revocation {
                lease: LeaseId(revoke.lease_id),
                generation: Generation(revoke.generation),
                // A reason of a newer broker is obeyed like any other.
                reason: (revoke.reason().try_into()).unwrap_or(RevokeReason::Withdrawn),
                drain_ms: revoke.drain_ms,
            };
            let mut claimed = false;
            for observer in shared.observers.alive() {
                claimed |= observer.revoked(&revocation);
            }
            if !claimed {
                shared.acknowledge(revocation.lease, revocation.generation);
            }
        }
        Message::Returned(returned) => match convert::region_id("region_id", &returned.region_id) {
            Ok(region) => {
                for observer in shared.observers.alive() {
                    observer.returned(region);
                }
                if let Some(memory) = shared.orphans.returned(region) {
                    shared.let_go(memory);
                }
            }
            Err(invalid) => warn!(%invalid, "ignored a Returned"),
        },
        Message::Scrub(scrub) => match convert::region_id("region_id", &scrub.region_id) {
            Ok(region) => {
                let scrub = Scrub {
                    region,
                    slab: scrub.slab,
                    generation: Generation(scrub.generation),
                };
                for observer in shared.observers.alive() {
                    observer.scrub(&scrub);
                }
            }
            Err(invalid) => warn!(%invalid, "ignored a Scrub"),
        },
        Message::CannotMap(told) => match convert::region_id("region_id", &told.region_id) {
            Ok(region) => {
                for observer in shared.observers.alive() {
                    observer.cannot_map(region, told.sessions);
                }
            }
            Err(invalid) => warn!(%invalid, "ignored a CannotMap"),
        },
        Message::DeviceHold(hold) => match convert::device_uuid("device_uuid", &hold.device_uuid) {
            Ok(device) => take_hold(shared, &device, &hold),
            Err(invalid) => warn!(%invalid, "ignored a DeviceHold"),
        },
    }
}

fn take_hold(shared: &Shared, device: &DeviceUuid, told: &v1::DeviceHold) {
    let hold = Hold {
        free_bytes: told.free_bytes,
        until: Instant::now() + Duration::from_millis(told.left_ms.into()),
    };
    shared.holds.lock().insert(device.clone(), hold);
    for observer in shared.observers.alive() {
        observer.hold_changed(device);
    }
}

fn set_down(shared: &Shared, problem: String, refused: bool) {
    *shared.link.lock() = LinkState::Down { problem, refused };
    shared.changed.notify_all();
}

/// Tells the broker that the session is over. What became of it is not known until the broker has said so, and until then
/// it keeps the session with all it holds, for as long as this process lives: so it is told again, on a new connection if
/// need be, for just as long.
async fn leave(shared: &Shared, mut past: Option<Past>) {
    let link = std::mem::replace(&mut *shared.link.lock(), LinkState::Closed);
    shared.changed.notify_all();
    let mut up = match link {
        LinkState::Up(connection) => Some(connection),
        LinkState::Down { .. } | LinkState::Closed => None,
    };
    let mut backoff = Backoff::default();
    while past.is_some() {
        let connection = match up.take() {
            Some(connection) => Ok(connection),
            None => match timeout(ATTEMPT_LIMIT, open(shared, &mut past)).await {
                Ok(Ok(opened)) => Ok(Arc::new(opened.connection)),
                Ok(Err(OpenError::SessionOver | OpenError::Refused(_))) => return,
                Ok(Err(OpenError::Failed(problem))) => Err(problem),
                Err(_) => Err("it does not answer".to_owned()),
            },
        };
        match connection {
            Ok(connection) if left(shared, &connection).await => return,
            Ok(_) => {}
            Err(problem) => debug!(
                problem,
                "the broker cannot be told that the session is over"
            ),
        }
        sleep(backoff.next(&mut rand::rng())).await;
    }
}

/// Leaves by a connection. False when nobody knows what became of it.
async fn left(shared: &Shared, connection: &Connection) -> bool {
    let request = v1::LeaveRequest {
        session_id: connection.session.0,
    };
    let leaving = async {
        // What was moved last is lost with the session otherwise.
        Reporter::new(connection).tell(&shared.tally).await;
        connection.client.clone().leave(request).await
    };
    match timeout(LEAVE_LIMIT, leaving).await {
        Ok(Ok(_)) => info!("left the broker"),
        Ok(Err(status)) if is_refusal(&status) => debug!(%status, "the broker refused the leave"),
        Ok(Err(status)) => {
            debug!(%status, "the broker did not take the leave");
            return false;
        }
        Err(_) => {
            debug!("the broker did not answer the leave");
            return false;
        }
    }
    true
}
