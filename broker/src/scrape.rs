//! Serves the metrics to Prometheus over HTTP/1. Gauges are read from the state at every scrape.

use std::{convert::Infallible, sync::Arc, time::Duration};

use ::metrics::Label;
use http::{Response, StatusCode, header::CONTENT_TYPE};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    core::{Account, DiskView},
    listen::Places,
    logging::{self, Sparse},
    owner::Owner,
    peer::next_connection,
};

/// Rate-limits a warning that anybody who may connect can cause.
static NOT_ACCEPTED: Sparse = Sparse::new();

/// The most connections at one time. The oldest is cut for one more.
const MAX_CONNECTIONS: usize = 16;
/// The longest time that a connection may last. Scrapers connect again.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long a connection may take to ask. Without it, connections that say nothing would keep scrapers out.
const SILENCE: Duration = Duration::from_secs(5);
/// The pause after a failed accept. Without it, a full descriptor table would make the loop spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves `/metrics` until `stop`.
pub async fn serve(listener: TcpListener, owner: Arc<Owner>, stop: CancellationToken) {
    let places = Places::new(MAX_CONNECTIONS);
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                if let Some(withheld) = NOT_ACCEPTED.turn() {
                    tracing::warn!(%error, withheld, "a scrape could not be accepted");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let cut = CancellationToken::new();
        let (place, _) = places.take(next_connection(), cut.clone());
        let (owner, stop) = (Arc::clone(&owner), stop.clone());
        tokio::spawn(async move {
            let service =
                TowerToHyperService::new(tower::service_fn(move |request: http::Request<_>| {
                    let owner = Arc::clone(&owner);
                    async move { Ok::<_, Infallible>(answer(request.uri().path(), owner).await) }
                }));
            let mut server = auto::Builder::new(hyper_util::rt::TokioExecutor::new()).http1_only();
            server
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(SILENCE);
            let serving = server.serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                () = stop.cancelled() => {}
                () = cut.cancelled() => {}
                served = tokio::time::timeout(DEADLINE, serving) => {
                    if let Ok(Err(error)) = served {
                        tracing::debug!(error, "a scrape broke off");
                    }
                }
            }
            drop(place);
        });
    }
}

async fn answer(path: &str, owner: Arc<Owner>) -> Response<String> {
    let (status, text) = match path {
        // The text may take a millisecond: not on the thread that serves everyone.
        "/metrics" | "/" => match tokio::task::spawn_blocking(move || render(&owner)).await {
            Ok(text) => (StatusCode::OK, text),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        },
        _ => (
            StatusCode::NOT_FOUND,
            "metrics are at /metrics\n".to_owned(),
        ),
    };
    let mut response = Response::new(text);
    *response.status_mut() = status;
    let text = http::HeaderValue::from_static("text/plain; version=0.0.4");
    response.headers_mut().insert(CONTENT_TYPE, text);
    response
}

/// The metrics as text.
pub(crate) fn render(owner: &Owner) -> String {
    let metrics = owner.metrics();
    let (devices, gauges, drained_donors, disks) = owner.read(|state| {
        let gauges = [
            ("swiftcache_leases", state.lease_count() as u64),
            ("swiftcache_regions", state.region_count() as u64),
            ("swiftcache_sessions", state.session_count() as u64),
            ("swiftcache_indexed_blocks", state.indexed_blocks()),
        ];
        (
            state.devices(),
            gauges,
            state.drained_donors(),
            state.disks(),
        )
    });
    for (name, value) in of_disks(&disks) {
        metrics.set(name, vec![], value);
    }
    let drains = [
        (
            "device",
            devices.iter().filter(|view| view.drained).count() as u64,
        ),
        ("donor", drained_donors as u64),
        (
            "region",
            (devices.iter().map(|view| u64::from(view.drained_regions))).sum(),
        ),
    ];
    for (what, count) in drains {
        metrics.set("swiftcache_drains", vec![Label::new("of", what)], count);
    }
    for view in devices {
        let device = || Label::new("device", view.device.uuid.to_string());
        // 0 means that the size is unknown.
        if view.device.hbm_bytes > 0 {
            let bytes = view.device.hbm_bytes;
            metrics.set("swiftcache_hbm_bytes", vec![device()], bytes);
        }
        let unmappable = u64::from(view.unmappable_regions);
        metrics.set("swiftcache_unmappable_regions", vec![device()], unmappable);
        for (place, bytes) in states(view.account, view.drained_bytes) {
            let labels = vec![device(), Label::new("state", place)];
            metrics.set("swiftcache_offered_bytes", labels, bytes);
        }
    }
    let routes_down = owner.reports().routes_down();
    metrics.set("swiftcache_engine_routes_down", vec![], routes_down.into());
    for (name, value) in gauges {
        metrics.set(name, vec![], value);
    }
    metrics.set("swiftcache_log_lines_dropped", vec![], logging::dropped());
    let (streams, _) = owner.connections();
    metrics.set("swiftcache_attached_sessions", vec![], streams as u64);
    metrics.render()
}

/// Sums over all disks, so that their number does not matter to whoever keeps the figures.
fn of_disks(disks: &[DiskView]) -> [(&'static str, u64); 9] {
    let sum = |of: &dyn Fn(&DiskView) -> u64| disks.iter().map(of).sum::<u64>();
    [
        ("swiftcache_disk_bytes", sum(&|it| it.state.bytes)),
        ("swiftcache_disk_used_bytes", sum(&|it| it.state.used_bytes)),
        ("swiftcache_disk_blocks", sum(&|it| it.blocks)),
        ("swiftcache_disk_to_store_blocks", sum(&|it| it.to_store)),
        ("swiftcache_disk_wanted_blocks", sum(&|it| it.wanted)),
        (
            "swiftcache_disk_written_blocks",
            sum(&|it| it.state.written_blocks),
        ),
        (
            "swiftcache_disk_read_blocks",
            sum(&|it| it.state.read_blocks),
        ),
        (
            "swiftcache_disk_corrupt_blocks",
            sum(&|it| it.state.corrupt_blocks),
        ),
        (
            "swiftcache_disk_failed_blocks",
            sum(&|it| it.state.failed_blocks),
        ),
    ]
}

/// The bytes of a device in each state. What nobody holds and an operator drained is not free: it is lent to nobody.
fn states(account: Account, drained: u64) -> [(&'static str, u64); 8] {
    [
        ("free", account.free - drained),
        ("drained", drained),
        ("leased", account.leased),
        ("working-set", account.working_set),
        ("estate", account.estate),
        ("draining", account.draining),
        ("zombie", account.zombie),
        ("scrubbing", account.scrubbing),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_drained_is_not_free_and_nothing_is_counted_twice() {
        let account = Account {
            offered: 10,
            free: 7,
            leased: 3,
            ..Account::default()
        };
        for (drained, free) in [(0, 7), (7, 0), (4, 3)] {
            let states = states(account, drained);
            assert_eq!(
                (states[0], states[1]),
                (("free", free), ("drained", drained))
            );
            let sum: u64 = states.iter().map(|(_, bytes)| bytes).sum();
            assert_eq!(sum, account.offered);
        }
    }
}
