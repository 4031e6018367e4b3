//! Tells the broker what was moved, for operators to see: in the background, and never more often than is of use.

use std::time::Duration;

use parking_lot::Mutex;
use swiftcache_proto::{
    domain::{HomeBytes, SessionId},
    traffic::Traffic,
    v1::{self, broker_client::BrokerClient},
};
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tonic::{Code, transport::Channel};
use tracing::debug;

use super::{Session, connection::Connection};

/// How often at most: the eye wants no more.
const EVERY: Duration = Duration::from_secs(2);
/// The longest one report may take.
const LIMIT: Duration = Duration::from_secs(2);

/// What was moved, and how much of it the broker knows.
#[derive(Default)]
pub(super) struct Tally {
    counted: Mutex<Counted>,
    more: Notify,
}

#[derive(Default)]
struct Counted {
    /// Since the session was opened.
    total: Traffic,
    /// What of it some broker has confirmed.
    told: Traffic,
    /// The listener of now, and what others were told before it.
    to: Option<(Listener, Traffic)>,
    /// Routes that are down now, and as many as the listener knows of.
    routes_down: u32,
    told_down: u32,
    /// Where stitched pools are now, and what the listener knows of it.
    homes: HomeBytes,
    told_homes: HomeBytes,
    /// The boot id of a broker that is too old to be told.
    deaf: Option<u64>,
}

/// What is news to a listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct News {
    /// The session's total, which is told when the listener has confirmed.
    total: Traffic,
    /// What of it the listener should hear.
    its: Traffic,
    routes_down: u32,
    homes: HomeBytes,
}

/// Who counts from 0: a session at one boot of the broker.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Listener {
    session: SessionId,
    boot_id: u64,
}

impl Session {
    /// Counts what was moved and found. Costs its caller a lock that is held for nanoseconds; the broker is told of it
    /// later, on the session's own thread.
    pub fn moved(&self, more: Traffic) {
        if more != Traffic::default() {
            self.shared.tally.counted.lock().total += more;
            self.shared.tally.more.notify_one();
        }
    }

    /// A user of the session has `now` routes down, after `before`.
    pub(crate) fn routes_down(&self, before: u32, now: u32) {
        if now != before {
            let mut counted = self.shared.tally.counted.lock();
            counted.routes_down = (counted.routes_down.saturating_sub(before)).saturating_add(now);
            drop(counted);
            self.shared.tally.more.notify_one();
        }
    }

    /// A stitched pool of the session is there `now`, and was there `before`.
    pub(crate) fn homes(&self, before: HomeBytes, now: HomeBytes) {
        if now != before {
            let mut counted = self.shared.tally.counted.lock();
            let others = counted.homes.zip(before, u64::saturating_sub);
            counted.homes = others.zip(now, u64::saturating_add);
            drop(counted);
            self.shared.tally.more.notify_one();
        }
    }
}

impl Tally {
    /// What `listener` should hear, if there is anything new.
    fn news(&self, listener: Listener) -> Option<News> {
        let mut counted = self.counted.lock();
        let before = match counted.to {
            Some((known, before)) if known == listener => before,
            _ => {
                counted.told_down = 0;
                counted.told_homes = HomeBytes::default();
                counted.told
            }
        };
        counted.to = Some((listener, before));
        let news = counted.total != counted.told
            || counted.routes_down != counted.told_down
            || counted.homes != counted.told_homes;
        (news && counted.deaf != Some(listener.boot_id)).then(|| News {
            total: counted.total,
            its: counted.total.since(&before),
            routes_down: counted.routes_down,
            homes: counted.homes,
        })
    }

    fn confirm(&self, news: &News) {
        let mut counted = self.counted.lock();
        counted.told = news.total;
        counted.told_down = news.routes_down;
        counted.told_homes = news.homes;
    }
}

/// Tells one broker, as long as the connection lasts.
pub(super) struct Reporter {
    client: BrokerClient<Channel>,
    listener: Listener,
}

impl Reporter {
    pub(super) fn new(connection: &Connection) -> Self {
        Self {
            client: connection.client.clone(),
            listener: Listener {
                session: connection.session,
                boot_id: connection.boot_id,
            },
        }
    }

    /// Tells, whenever there is something new.
    pub(super) async fn run(mut self, tally: &Tally) {
        loop {
            while tally.news(self.listener).is_none() {
                tally.more.notified().await;
            }
            self.tell(tally).await;
            sleep(EVERY).await;
        }
    }

    /// Tells what is new now, if anything is. Totals that did not arrive are in the next ones.
    pub(super) async fn tell(&mut self, tally: &Tally) {
        let Some(news) = tally.news(self.listener) else {
            return;
        };
        let request = v1::ReportRequest {
            session_id: self.listener.session.0,
            traffic: Some((&news.its).into()),
            routes_down: news.routes_down,
            homes: (news.homes != HomeBytes::default()).then(|| news.homes.into()),
        };
        match timeout(LIMIT, self.client.report(request)).await {
            Ok(Ok(_)) => tally.confirm(&news),
            Ok(Err(status)) if status.code() == Code::Unimplemented => {
                debug!("the broker is too old to be told of traffic");
                tally.counted.lock().deaf = Some(self.listener.boot_id);
            }
            Ok(Err(status)) => debug!(%status, "the broker did not take a report"),
            Err(_) => debug!("the broker did not answer a report"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: Listener = Listener {
        session: SessionId(1),
        boot_id: 1,
    };

    fn looked(blocks: u64) -> Traffic {
        Traffic {
            lookup_blocks: blocks,
            ..Traffic::default()
        }
    }

    fn counted(tally: &Tally, blocks: u64) {
        tally.counted.lock().total += looked(blocks);
    }

    fn told(tally: &Tally, listener: Listener) -> Option<Traffic> {
        let news = tally.news(listener)?;
        tally.confirm(&news);
        Some(news.its)
    }

    #[test]
    fn each_listener_hears_of_routes_that_are_down_and_when_they_are_up_again() {
        let tally = Tally::default();
        let down = |listener| {
            let news = tally.news(listener)?;
            tally.confirm(&news);
            Some(news.routes_down)
        };
        tally.counted.lock().routes_down = 2;
        assert_eq!([down(FIRST), down(FIRST)], [Some(2), None]);
        let restarted = Listener {
            boot_id: 2,
            ..FIRST
        };
        assert_eq!([down(restarted), down(restarted)], [Some(2), None]);
        tally.counted.lock().routes_down = 0;
        assert_eq!([down(restarted), down(restarted)], [Some(0), None]);
    }

    #[test]
    fn each_listener_hears_where_pools_are_and_that_one_is_gone() {
        let tally = Tally::default();
        let homes = |listener| {
            let news = tally.news(listener)?;
            tally.confirm(&news);
            Some(news.homes.leased)
        };
        tally.counted.lock().homes.leased = 2;
        assert_eq!([homes(FIRST), homes(FIRST)], [Some(2), None]);
        let restarted = Listener {
            boot_id: 2,
            ..FIRST
        };
        assert_eq!([homes(restarted), homes(restarted)], [Some(2), None]);
        tally.counted.lock().homes.leased = 0;
        assert_eq!([homes(restarted), homes(restarted)], [Some(0), None]);
    }

    #[test]
    fn each_listener_hears_everything_once() {
        let tally = Tally::default();
        assert_eq!(told(&tally, FIRST), None);
        counted(&tally, 5);
        assert_eq!(told(&tally, FIRST), Some(looked(5)));
        assert_eq!(told(&tally, FIRST), None);
        counted(&tally, 2);
        assert_eq!(told(&tally, FIRST), Some(looked(7)), "totals");
        counted(&tally, 1);
        // The answer was lost: a restarted broker, which counts from 0, hears what nobody confirmed.
        assert!(tally.news(FIRST).is_some());
        let restarted = Listener {
            boot_id: 2,
            ..FIRST
        };
        assert_eq!(told(&tally, restarted), Some(looked(1)));
        counted(&tally, 3);
        assert_eq!(told(&tally, restarted), Some(looked(4)));
        let replaced = Listener {
            session: SessionId(2),
            ..restarted
        };
        assert_eq!(told(&tally, replaced), None);
    }

    #[test]
    fn a_broker_that_is_too_old_is_asked_once() {
        let tally = Tally::default();
        counted(&tally, 5);
        tally.counted.lock().deaf = Some(FIRST.boot_id);
        assert_eq!(tally.news(FIRST), None);
        let upgraded = Listener {
            boot_id: 2,
            ..FIRST
        };
        assert_eq!(told(&tally, upgraded), Some(looked(5)));
    }
}
