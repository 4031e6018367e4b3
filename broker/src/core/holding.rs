//! Holding: an operator asks the elastic donors of a device to make room for an engine that starts there. The donors do
//! the work; the broker passes the word on, and remembers it for those that come later.

use swiftcache_proto::domain::SessionId;

use super::{
    books::Books,
    effect::{Note, Outgoing, Refusal, Reply},
    event::HoldDemand,
    holds::Hold,
};

pub(super) fn hold(books: &mut Books, demand: HoldDemand) -> Result<Reply, Refusal> {
    let device = books.devices.number(&demand.device)?;
    let now = books.now;
    let present = books.holds.lasting(device, now);
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
        if let Some(present) = present {
            end_hold(books, device, present);
        }
        return Ok(Reply::Done);
    }
    let Some(id) = demand.hold else {
        return Err(Refusal::Invalid {
            field: "hold_id",
            problem: "is 0; only the end of a hold needs none".to_owned(),
        });
    };
    let hold = Hold {
        id,
        free_bytes: demand.free_bytes,
        until: now.saturating_add(demand.for_ms.into()),
    };
    books.holds.set(device, hold);
    tell_all(books, device);
    books.note(Note::Held {
        device: demand.device,
        free_bytes: demand.free_bytes,
        for_ms: demand.for_ms,
    });
    Ok(Reply::Done)
}

/// Sessions that follow a device need not have anything on offer there yet: all are told.
fn tell_all(books: &mut Books, device: usize) {
    let Some(message) = message(books, device) else {
        return;
    };
    let sessions: Vec<SessionId> = books.sessions.iter().map(|(id, _)| id).collect();
    for session in sessions {
        books.send(session, message.clone());
    }
}

/// Donors know when a hold ends by itself; they are told when it ends before.
fn end_hold(books: &mut Books, device: usize, hold: Hold) {
    let over = Hold {
        until: books.now,
        ..hold
    };
    books.holds.set(device, over);
    tell_all(books, device);
    forget_hold(books, device);
}

pub(super) fn expire_holds(books: &mut Books) {
    for device in books.holds.over(books.now) {
        forget_hold(books, device);
    }
}

fn forget_hold(books: &mut Books, device: usize) {
    books.holds.forget(device);
    let device = books.devices.uuid(device).clone();
    books.note(Note::HoldEnded { device });
}

/// What a session that attaches now is to know.
pub(super) fn lasting_holds(books: &Books) -> Vec<Outgoing> {
    let lasting = |message: &Outgoing| !matches!(message, Outgoing::Hold { left_ms: 0, .. });
    let devices = 0..books.devices.count();
    let messages = devices.filter_map(|device| message(books, device));
    messages.filter(lasting).collect()
}

fn message(books: &Books, device: usize) -> Option<Outgoing> {
    let hold = books.holds.get(device)?;
    Some(Outgoing::Hold {
        device: books.devices.uuid(device).clone(),
        free_bytes: hold.free_bytes,
        left_ms: hold.left_ms(books.now),
    })
}
