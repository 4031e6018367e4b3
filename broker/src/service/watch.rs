//! The index as a stream: `Admin.Watch`.
//!
//! A watcher reads on when what it read before has been taken: what it has yet to read stays in the index and in the journal,
//! whose length is bounded. So a slow reader costs the broker one message, and itself the whole index anew.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use swiftcache_proto::{
    convert::{self, InvalidField, MAX_NAMESPACE_BYTES},
    domain::SessionId,
    v1,
};
use tokio::{sync::mpsc, task::yield_now};
use tokio_stream::Stream;
use tonic::Status;

use super::{pace::Pace, view::MAX_WHOLE_TENANT_BYTES};
use crate::{
    core::{Caller, Change, Connection, Process, Sight, Watched, Watcher},
    error::Refused,
    owner::Owner,
};

/// The most blocks in one message, and the most that are read while the state is locked once.
const MOST: usize = 1_024;
/// The most namespaces that one request names: as many as an engine has ranks.
const MOST_NAMESPACES: usize = 256;
/// Changes that a watcher may not see. After so many it is told the last number all the same: else it could not go on from
/// there once the journal has forgotten them.
const UNSEEN: u64 = 16_384;

/// What a watcher is sent.
pub struct Watching(mpsc::Receiver<v1::WatchResponse>);

impl Stream for Watching {
    type Item = Result<v1::WatchResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context).map(|message| message.map(Ok))
    }
}

/// The watcher that a request of this process asks for. `user`: whose blocks it sees; `None`: everybody's.
pub(super) fn watcher(
    owner: &Owner,
    request: &v1::WatchRequest,
    process: Option<Process>,
    user: Option<u32>,
) -> Result<Watcher, Refused> {
    if request.namespaces.len() > MOST_NAMESPACES {
        let problem = format!(
            "has {} entries; takes at most {MOST_NAMESPACES}",
            request.namespaces.len()
        );
        return Err(InvalidField::new("namespaces", problem).into());
    }
    let namespaces = request.namespaces.iter();
    let namespaces = namespaces.map(|name| convert::text("namespaces", name, MAX_NAMESPACE_BYTES));
    let namespaces: Vec<_> = namespaces.collect::<Result<_, _>>()?;
    let tenant = convert::optional_text("tenant", &request.tenant, MAX_WHOLE_TENANT_BYTES)?;
    let user = user.map(|uid| uid.to_string());
    if let Some(user) = &user
        && !tenant.is_empty()
        && tenant.split('/').next() != Some(user)
    {
        return Err(Refused::NotYourTenant {
            user: user.clone(),
            tenant,
        });
    }
    let tenant = match request.session_id {
        0 => (!tenant.is_empty()).then_some(tenant),
        id => Some(tenant_of(owner, SessionId(id), process)?),
    };
    let sight = Sight {
        user,
        tenant,
        namespaces,
    };
    let after = request.after_sequence;
    let after = after.filter(|_| request.boot_id == owner.boot_id());
    Ok(Watcher::new(sight, after))
}

/// The tenant of a session of this process.
fn tenant_of(
    owner: &Owner,
    session: SessionId,
    process: Option<Process>,
) -> Result<String, Refused> {
    let process = process.ok_or(Refused::NotOverTcp)?;
    let caller = Caller {
        session,
        process,
        connection: Connection(u64::MAX),
    };
    owner.read(|state| {
        state.check_caller(caller)?;
        let view = state.session(session);
        Ok(view.map(|view| view.tenant.to_string()).unwrap_or_default())
    })
}

/// Begins to tell a watcher. `pace`: that of others than operators.
pub(super) fn start(owner: Arc<Owner>, watcher: Watcher, pace: Option<Arc<Pace>>) -> Watching {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let closing = owner.closing().clone();
        let told = closing.run_until_cancelled(tell(&owner, watcher, pace, &sender));
        tokio::select! {
            _ = told => {}
            () = sender.closed() => {}
        }
    });
    Watching(receiver)
}

async fn tell(
    owner: &Owner,
    mut watcher: Watcher,
    pace: Option<Arc<Pace>>,
    sender: &mpsc::Sender<v1::WatchResponse>,
) {
    let mut changed = owner.changes();
    let mut said = Said::default();
    loop {
        // Reads nothing before what it has read is taken.
        let Ok(place) = sender.reserve().await else {
            return;
        };
        changed.mark_unchanged();
        let watched = {
            let _turn = match &pace {
                Some(pace) => Some(pace.turn().await),
                None => None,
            };
            owner.read(|state| state.watch(&mut watcher, MOST))
        };
        let current = watched.current;
        match said.is_news(&watched) {
            true => place.send(message(owner.boot_id(), watched)),
            false => drop(place),
        }
        match current {
            // The sender of changes lives as long as the owner.
            true => drop(changed.changed().await),
            false => yield_now().await,
        }
    }
}

/// What a watcher was told last.
#[derive(Default)]
struct Said {
    sequence: u64,
    current: bool,
}

impl Said {
    /// Whether there is anything to say. If there is, it counts as said.
    fn is_news(&mut self, watched: &Watched) -> bool {
        let sequence = watched.sequence.unwrap_or(self.sequence);
        let news = watched.anew
            || !watched.changes.is_empty()
            || watched.current && !self.current
            || sequence.saturating_sub(self.sequence) >= UNSEEN;
        if news {
            (self.sequence, self.current) = (sequence, watched.current);
        }
        news
    }
}

fn message(boot_id: u64, watched: Watched) -> v1::WatchResponse {
    let same = |one: &Change, other: &Change| {
        (&one.scope, one.medium, one.added) == (&other.scope, other.medium, other.added)
    };
    let runs = watched.changes.chunk_by(same);
    let changes = runs.map(|run| {
        let Change {
            scope,
            medium,
            added,
            ..
        } = &run[0];
        let hashes = run.iter().flat_map(|change| change.hash.0);
        v1::IndexChange {
            tenant: scope.tenant.to_string(),
            namespace: scope.namespace.to_string(),
            medium: v1::Medium::from(*medium).into(),
            removed: !added,
            hashes: hashes.collect::<Vec<u8>>().into(),
        }
    });
    v1::WatchResponse {
        boot_id,
        anew: watched.anew,
        changes: changes.collect(),
        sequence: watched.sequence,
        current: watched.current,
    }
}
