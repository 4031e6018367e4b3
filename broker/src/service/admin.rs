//! The `Admin` service: the state as operators may see it, and their actions. No reply holds a handle, a grant
//! token or a whole session id.

use std::{fmt, sync::Arc};

use swiftcache_proto::{
    convert::{self, InvalidField, MAX_NAMESPACE_BYTES},
    domain::{DeviceUuid, LeaseId, RegionId, SessionId},
    numa,
    v1::{
        self, admin_server::Admin, drain_request, evict_request, set_quota_request, undrain_request,
    },
};
use tonic::{Request, Response, Status};

use super::{
    pace::{Pace, Turn},
    view::{self, MAX_WHOLE_TENANT_BYTES, NodeView},
    watch::{self, Watching},
};
use crate::{
    authority::Operators,
    core::{
        BlocksGone, DrainTarget, Event, EvictTarget, Forget, HoldDemand, HoldId, LeaseView,
        NamespaceView, Need, QuotaTarget, RegionView, Reply, SessionView, SetQuota, State,
    },
    error::Refused,
    events::Wanted,
    owner::{Owner, PAGE},
    peer::Peer,
    probe::Probe,
};

/// Hexadecimal digits of a session's label.
const LABEL_BYTES: usize = 4;
/// The most entries in one page of a list. Everybody waits while the broker writes a page, which is a millisecond for these
/// 250 KB.
const MOST_LISTED: usize = 2_048;
/// The longest hold, milliseconds.
const MAX_HOLD_MS: u32 = 3_600_000;

/// The service.
pub struct AdminService {
    owner: Arc<Owner>,
    probe: Arc<dyn Probe>,
    operators: Operators,
    drain_ms: u32,
    /// Of questions by others than operators.
    pace: Arc<Pace>,
}

impl AdminService {
    /// Serves the owner's state; `drain_ms` is the drain window when nobody names one.
    pub fn new(
        owner: Arc<Owner>,
        probe: Arc<dyn Probe>,
        operators: Operators,
        drain_ms: u32,
    ) -> Self {
        Self {
            owner,
            probe,
            operators,
            drain_ms,
            pace: Arc::default(),
        }
    }

    /// The turn of a question; operators need none.
    async fn turn<T>(&self, request: &Request<T>) -> Option<Turn<'_>> {
        match self.operators.check(request, "ask without a turn") {
            Ok(()) => None,
            Err(_) => Some(self.pace.turn().await),
        }
    }

    async fn do_get_node(&self, turn: Option<Turn<'_>>) -> v1::GetNodeResponse {
        let node = self.owner.read(NodeView::read);
        let mut node = node.answer(&self.owner.reports());
        // A driver that hangs holds up nobody else's questions.
        drop(turn);
        node.version = env!("CARGO_PKG_VERSION").to_owned();
        node.boot_id = self.owner.boot_id();
        node.uptime_ms = self.owner.now().0;
        node.probe = self.probe.source();
        // The driver may take milliseconds: not on the thread that serves everyone.
        let probe = Arc::clone(&self.probe);
        let donated: Vec<(DeviceUuid, u64)> = (node.devices.iter())
            .filter_map(|status| {
                let uuid = status.device.as_ref()?.uuid.parse().ok()?;
                Some((uuid, status.account.unwrap_or_default().offered_bytes))
            })
            .collect();
        let used =
            tokio::task::spawn_blocking(move || -> Vec<(DeviceUuid, Result<u64, String>)> {
                let used = donated.into_iter().map(|(device, donated)| {
                    let used = match device.host_node() {
                        Some(node) => numa::used_bytes(node),
                        None => probe.used_bytes(&device, donated),
                    };
                    (device, used)
                });
                used.collect()
            });
        let used = used.await.unwrap_or_default();
        for (status, (device, used)) in node.devices.iter_mut().zip(used) {
            let mut problems = self.probe.doubts(&device).to_vec();
            match used {
                Ok(bytes) => status.hbm_used_bytes = bytes,
                Err(problem) => {
                    status.hbm_used_unknown = true;
                    problems.push(problem);
                }
            }
            status.problem = problems.join("; ");
        }
        node.left_out = self.probe.left_out().iter().map(view::left_out).collect();
        node
    }

    async fn do_drain(
        &self,
        request: v1::DrainRequest,
        by: String,
    ) -> Result<v1::DrainResponse, Refused> {
        let target = match request.target {
            Some(drain_request::Target::DeviceUuid(uuid)) => device(&uuid)?,
            Some(drain_request::Target::DonorLabel(label)) => donor(&label)?,
            Some(drain_request::Target::RegionId(id)) => DrainTarget::Region(region(&id)?),
            None => return Err(missing_target()),
        };
        let drain_ms = convert::drain_ms("drain_ms", request.drain_ms, self.drain_ms)?;
        let event = Event::Drain { target, drain_ms };
        match self.owner.apply_by(event, by).await? {
            Reply::Drained { leases, bytes } => Ok(v1::DrainResponse {
                revoked_leases: leases,
                revoked_bytes: bytes,
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_undrain(&self, request: v1::UndrainRequest, by: String) -> Result<(), Refused> {
        let target = match request.target {
            Some(undrain_request::Target::DeviceUuid(uuid)) => device(&uuid)?,
            Some(undrain_request::Target::DonorLabel(label)) => donor(&label)?,
            None => return Err(missing_target()),
        };
        let event = Event::Undrain(target);
        self.owner.apply_by(event, by).await.map(drop)
    }

    async fn do_evict(
        &self,
        request: v1::EvictRequest,
        by: String,
    ) -> Result<v1::EvictResponse, Refused> {
        let target = match request.target {
            Some(evict_request::Target::Namespace(name)) => {
                EvictTarget::Namespace(convert::text("namespace", &name, MAX_NAMESPACE_BYTES)?)
            }
            Some(evict_request::Target::LeaseId(id)) => EvictTarget::Lease(LeaseId(id)),
            None => return Err(missing_target()),
        };
        match self.owner.apply_by(Event::Evict(target), by).await? {
            Reply::Evicted { blocks, leases } => Ok(v1::EvictResponse {
                evicted_blocks: blocks,
                revoked_leases: leases,
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_preview_withdraw(
        &self,
        request: &v1::PreviewWithdrawRequest,
    ) -> Result<v1::PreviewWithdrawResponse, Refused> {
        let need = Need {
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            bytes: request.bytes,
            donor: match request.donor_label.as_str() {
                "" => None,
                label => Some(donor_label(label)?),
            },
        };
        let started = self.owner.started_unix_ms();
        let preview = self.owner.read(|state| state.preview_withdraw(&need))?;
        let going = preview.leases.iter().map(|lease| lease.id).collect();
        let mut gone = BlocksGone::default();
        // One lease at a time: others have their turn in between.
        for lease in &preview.leases {
            let its = self.owner.read(|state| state.blocks_gone(lease.id, &going));
            gone.lost += its.lost;
            gone.on_disk += its.on_disk;
            tokio::task::yield_now().await;
        }
        Ok(view::preview(preview, gone, started))
    }

    async fn do_set_quota(
        &self,
        request: v1::SetQuotaRequest,
        by: String,
    ) -> Result<v1::SetQuotaResponse, Refused> {
        let target = match request.target {
            Some(set_quota_request::Target::Namespace(name)) => {
                QuotaTarget::Namespace(convert::text("namespace", &name, MAX_NAMESPACE_BYTES)?)
            }
            Some(set_quota_request::Target::Tenant(tenant)) => {
                QuotaTarget::Tenant(convert::text("tenant", &tenant, MAX_WHOLE_TENANT_BYTES)?)
            }
            None => return Err(missing_target()),
        };
        let bytes = request.bytes;
        let set = SetQuota { target, bytes };
        match self.owner.apply_by(Event::SetQuota(set), by).await? {
            Reply::QuotaSet { leased_bytes } => Ok(v1::SetQuotaResponse { leased_bytes }),
            _ => Err(Refused::OutOfTurn),
        }
    }

    async fn do_hold(&self, request: &v1::HoldRequest, by: String) -> Result<(), Refused> {
        if request.for_ms > MAX_HOLD_MS {
            let problem = format!("is {}; takes at most {MAX_HOLD_MS}", request.for_ms);
            return Err(InvalidField::new("for_ms", problem).into());
        }
        let demand = HoldDemand {
            device: convert::device_uuid("device_uuid", &request.device_uuid)?,
            free_bytes: request.free_bytes,
            for_ms: request.for_ms,
            hold: (request.hold_id != 0).then_some(HoldId(request.hold_id)),
        };
        self.owner.apply_by(Event::Hold(demand), by).await.map(drop)
    }
}

impl AdminService {
    async fn do_forget(&self, request: v1::ForgetRequest) -> Result<v1::ForgetResponse, Refused> {
        let named = |text: String| (!text.is_empty()).then_some(text);
        let namespace = &request.namespace;
        let namespace = convert::optional_text("namespace", namespace, MAX_NAMESPACE_BYTES)?;
        let tenant = &request.tenant;
        let tenant = convert::optional_text("tenant", tenant, MAX_WHOLE_TENANT_BYTES)?;
        let forget = Event::Forget(Forget {
            tenant: named(tenant),
            namespace: named(namespace),
        });
        match self.owner.apply(forget).await? {
            Reply::Forgotten {
                leases,
                bytes,
                blocks,
            } => Ok(v1::ForgetResponse {
                leases,
                bytes,
                blocks,
            }),
            _ => Err(Refused::OutOfTurn),
        }
    }
}

fn missing_target() -> Refused {
    InvalidField::new("target", "is missing").into()
}

fn device(uuid: &str) -> Result<DrainTarget, InvalidField> {
    convert::device_uuid("device_uuid", uuid).map(DrainTarget::Device)
}

fn donor(label: &str) -> Result<DrainTarget, InvalidField> {
    donor_label(label).map(DrainTarget::Donor)
}

fn donor_label(label: &str) -> Result<String, InvalidField> {
    let hexadecimal = label.bytes().all(|byte| byte.is_ascii_hexdigit());
    if label.len() != LABEL_BYTES || !hexadecimal {
        let problem = format!("is {label:?}; takes {LABEL_BYTES} hexadecimal digits");
        return Err(InvalidField::new("donor_label", problem));
    }
    Ok(label.to_ascii_lowercase())
}

fn region(id: &str) -> Result<RegionId, InvalidField> {
    id.parse()
        .map_err(|problem: String| InvalidField::new("region_id", problem))
}

/// How many entries a page has.
fn page_size(asked: u32) -> usize {
    match asked as usize {
        0 => MOST_LISTED,
        asked => asked.min(MOST_LISTED),
    }
}

/// The entry after which a page begins; `None`: it begins with the first.
fn page_token<K>(token: &str, read: impl Fn(&str) -> Option<K>) -> Result<Option<K>, Refused> {
    if token.is_empty() {
        return Ok(None);
    }
    let problem = format!("is {token:?}; takes the next_page_token of an answer");
    match read(token) {
        Some(key) => Ok(Some(key)),
        None => Err(InvalidField::new("page_token", problem).into()),
    }
}

/// The sessions up to the end of a page: all with smaller labels than this, and so many that have it. Sessions are listed by
/// id, of which people see only what comes first.
#[derive(Clone, Copy)]
struct SessionsTold {
    first: SessionId,
    count: usize,
}

impl SessionsTold {
    /// What a token says.
    fn read(token: &str) -> Option<Self> {
        let (label, count) = token.split_once('.')?;
        Some(Self {
            first: SessionId::first_labelled(label)?,
            count: count.parse().ok()?,
        })
    }

    /// Makes a page of what is listed from [`Self::after`] on: drops what is told, and what is too much. Returns what is told with
    /// this page, if there is more.
    fn cut<T>(
        told: Option<Self>,
        listed: &mut Vec<T>,
        most: usize,
        more: bool,
        id: impl Fn(&T) -> SessionId,
    ) -> Option<Self> {
        if let Some(told) = told {
            // Some of them may have left meanwhile.
            let known = listed
                .iter()
                .take_while(|it| id(it).label() == told.label());
            drop(listed.drain(..known.count().min(told.count)));
        }
        let more = more || listed.len() > most;
        listed.truncate(most);
        let label = listed
            .last()
            .filter(|_| more)
            .map(|last| id(last).label())?;
        let before = told.filter(|told| told.label() == label);
        let here = listed.iter().filter(|it| id(it).label() == label).count();
        Some(Self {
            first: SessionId::first_labelled(&label)?,
            count: here + before.map_or(0, |told| told.count),
        })
    }

    fn label(self) -> String {
        self.first.label()
    }

    /// The id before the first one that has the label.
    fn after(self) -> Option<SessionId> {
        self.first.0.checked_sub(1).map(SessionId)
    }
}

impl fmt::Display for SessionsTold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.label(), self.count)
    }
}

/// The device a list is narrowed to; empty is every device.
fn narrowed(uuid: &str) -> Result<(), Refused> {
    if !uuid.is_empty() {
        convert::device_uuid("device_uuid", uuid)?;
    }
    Ok(())
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_node(
        &self,
        request: Request<v1::GetNodeRequest>,
    ) -> Result<Response<v1::GetNodeResponse>, Status> {
        let turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("GetNode");
        Ok(Response::new(self.do_get_node(turn).await))
    }

    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("ListSessions");
        let request = request.into_inner();
        let told = page_token(&request.page_token, SessionsTold::read)?;
        let page = |state: &State, after: Option<&SessionId>| {
            state.sessions_after(after.copied()).take(PAGE).collect()
        };
        let most = page_size(request.page_size);
        let (after, again) = told.map_or((None, 0), |told| (told.after(), told.count));
        let key = |view: &SessionView| view.id;
        let listed = (self.owner).list(after, most.saturating_add(again), page, key, |_| true);
        let (mut views, next) = listed.await;
        let next = SessionsTold::cut(told, &mut views, most, next.is_some(), key);
        let (reports, started) = (self.owner.reports(), self.owner.started_unix_ms());
        let sessions = views.iter().map(|it| view::session(it, &reports, started));
        Ok(Response::new(v1::ListSessionsResponse {
            sessions: sessions.collect(),
            next_page_token: next.map_or_else(String::new, |told| told.to_string()),
        }))
    }

    async fn list_regions(
        &self,
        request: Request<v1::ListRegionsRequest>,
    ) -> Result<Response<v1::ListRegionsResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("ListRegions");
        let request = request.into_inner();
        let device = request.device_uuid;
        narrowed(&device)?;
        let after = page_token(&request.page_token, |token| token.parse().ok())?;
        let page = |state: &State, after: Option<&RegionId>| {
            state.regions_after(after.copied()).take(PAGE).collect()
        };
        let wanted = |view: &RegionView| device.is_empty() || view.device.as_str() == device;
        let most = page_size(request.page_size);
        let listed = self.owner.list(after, most, page, |view| view.id, wanted);
        let (views, next) = listed.await;
        Ok(Response::new(v1::ListRegionsResponse {
            regions: views.into_iter().map(view::region).collect(),
            next_page_token: next.map_or_else(String::new, |id| id.to_string()),
        }))
    }

    async fn list_leases(
        &self,
        request: Request<v1::ListLeasesRequest>,
    ) -> Result<Response<v1::ListLeasesResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("ListLeases");
        let request = request.into_inner();
        let device = request.device_uuid;
        narrowed(&device)?;
        let after = page_token(&request.page_token, |token| token.parse().ok().map(LeaseId))?;
        let page = |state: &State, after: Option<&LeaseId>| {
            state.leases_after(after.copied()).take(PAGE).collect()
        };
        let wanted = |view: &LeaseView| device.is_empty() || view.device.as_str() == device;
        let most = page_size(request.page_size);
        let listed = self.owner.list(after, most, page, |view| view.id, wanted);
        let (views, next) = listed.await;
        let started = self.owner.started_unix_ms();
        let leases = views.into_iter().map(|it| view::lease(it, started));
        Ok(Response::new(v1::ListLeasesResponse {
            leases: leases.collect(),
            next_page_token: next.map_or_else(String::new, |id| id.0.to_string()),
        }))
    }

    async fn list_namespaces(
        &self,
        request: Request<v1::ListNamespacesRequest>,
    ) -> Result<Response<v1::ListNamespacesResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("ListNamespaces");
        let request = request.into_inner();
        // Neither a tenant nor a name has a line break.
        let after = page_token(&request.page_token, |token| {
            let (tenant, name) = token.split_once('\n')?;
            Some((tenant.to_owned(), name.to_owned()))
        })?;
        let first = after.is_none();
        let page = |state: &State, after: Option<&(String, String)>| {
            let after = after.map(|(tenant, name)| (tenant.as_str(), name.as_str()));
            state.namespaces_after(after).take(PAGE).collect()
        };
        let key = |view: &NamespaceView| (view.tenant.to_string(), view.name.to_string());
        let most = page_size(request.page_size);
        let (views, next) = self.owner.list(after, most, page, key, |_| true).await;
        let quotas: Vec<_> = self.owner.read(|state| {
            let quotas = state.quotas().filter(|_| first);
            quotas
                .map(|(target, bytes)| (target.clone(), bytes))
                .collect()
        });
        Ok(Response::new(v1::ListNamespacesResponse {
            namespaces: views.into_iter().map(view::namespace).collect(),
            quotas: quotas.into_iter().map(view::quota).collect(),
            next_page_token: next
                .map_or_else(String::new, |(tenant, name)| format!("{tenant}\n{name}")),
        }))
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("ListEvents");
        let wanted = Wanted::new(request.into_inner()).map_err(Refused::from)?;
        let events = self.owner.events(&wanted);
        Ok(Response::new(v1::ListEventsResponse { events }))
    }

    type WatchStream = Watching;

    async fn watch(
        &self,
        request: Request<v1::WatchRequest>,
    ) -> Result<Response<Watching>, Status> {
        let _timer = self.owner.metrics().time("Watch");
        let (user, pace) = match self.operators.check(&request, "watch all blocks") {
            Ok(()) => (None, None),
            Err(refused) => {
                let peer = request.extensions().get::<Peer>().ok_or(refused)?;
                (Some(peer.process.uid), Some(Arc::clone(&self.pace)))
            }
        };
        let owner = Arc::clone(&self.owner);
        let process = request.extensions().get::<Peer>().map(|peer| peer.process);
        let watcher = watch::watcher(&owner, request.get_ref(), process, user)?;
        Ok(Response::new(watch::start(owner, watcher, pace)))
    }

    async fn drain(
        &self,
        request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        let _timer = self.owner.metrics().time("Drain");
        self.operators.check(&request, "drain")?;
        let by = Operators::name(&request);
        Ok(Response::new(
            self.do_drain(request.into_inner(), by).await?,
        ))
    }

    async fn undrain(
        &self,
        request: Request<v1::UndrainRequest>,
    ) -> Result<Response<v1::UndrainResponse>, Status> {
        let _timer = self.owner.metrics().time("Undrain");
        self.operators.check(&request, "undrain")?;
        let by = Operators::name(&request);
        self.do_undrain(request.into_inner(), by).await?;
        Ok(Response::new(v1::UndrainResponse {}))
    }

    async fn evict(
        &self,
        request: Request<v1::EvictRequest>,
    ) -> Result<Response<v1::EvictResponse>, Status> {
        let _timer = self.owner.metrics().time("Evict");
        self.operators.check(&request, "evict")?;
        let by = Operators::name(&request);
        Ok(Response::new(
            self.do_evict(request.into_inner(), by).await?,
        ))
    }

    async fn forget(
        &self,
        request: Request<v1::ForgetRequest>,
    ) -> Result<Response<v1::ForgetResponse>, Status> {
        let _timer = self.owner.metrics().time("Forget");
        self.operators.check(&request, "forget estates")?;
        Ok(Response::new(self.do_forget(request.into_inner()).await?))
    }

    async fn preview_withdraw(
        &self,
        request: Request<v1::PreviewWithdrawRequest>,
    ) -> Result<Response<v1::PreviewWithdrawResponse>, Status> {
        let _turn = self.turn(&request).await;
        let _timer = self.owner.metrics().time("PreviewWithdraw");
        let request = request.into_inner();
        Ok(Response::new(self.do_preview_withdraw(&request).await?))
    }

    async fn set_quota(
        &self,
        request: Request<v1::SetQuotaRequest>,
    ) -> Result<Response<v1::SetQuotaResponse>, Status> {
        let _timer = self.owner.metrics().time("SetQuota");
        self.operators.check(&request, "set quotas")?;
        let by = Operators::name(&request);
        let done = self.do_set_quota(request.into_inner(), by).await?;
        Ok(Response::new(done))
    }

    async fn hold(
        &self,
        request: Request<v1::HoldRequest>,
    ) -> Result<Response<v1::HoldResponse>, Status> {
        let _timer = self.owner.metrics().time("Hold");
        // Whoever starts an engine may ask for room, and end what it asked for. Another's hold is an operator's to end.
        match request.get_ref().hold_id {
            0 => self
                .operators
                .check(&request, "end a hold of somebody else")?,
            _ => Operators::check_known(&request, "hold")?,
        }
        let by = Operators::name(&request);
        self.do_hold(&request.into_inner(), by).await?;
        Ok(Response::new(v1::HoldResponse {}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids of which many have a label in common, among them the first and the last label.
    fn ids() -> Vec<SessionId> {
        let labels = [0, 0, 0, 1, 7, 7, 7, 7, 0x8000, 0xffff, 0xffff];
        let ids = (0_u64..).zip(labels);
        ids.map(|(n, label)| SessionId((label << 48) + n)).collect()
    }

    /// Every page, as a client reads them.
    fn pages(all: &[SessionId], most: usize, cut: impl Fn(&str) -> String) -> Vec<SessionId> {
        let (mut told, mut found) = (None, Vec::new());
        for _ in 0..=2 * all.len() {
            let (after, again) = told.map_or((None, 0), |it: SessionsTold| (it.after(), it.count));
            let mut rest = all
                .iter()
                .filter(|id| after.is_none_or(|after| **id > after));
            let mut page: Vec<_> = rest.by_ref().take(most + again).copied().collect();
            let next = SessionsTold::cut(told, &mut page, most, rest.next().is_some(), |id| *id);
            assert!(page.len() <= most);
            found.extend(page);
            let Some(next) = next else { break };
            told = SessionsTold::read(&cut(&next.to_string()));
        }
        found
    }

    #[test]
    fn pages_of_sessions_tell_each_once_though_labels_are_alike() {
        for most in 1..=12 {
            assert_eq!(pages(&ids(), most, str::to_owned), ids(), "pages of {most}");
        }
        // The twin: a token without the count begins again with the sessions of its label.
        let forgetful = |token: &str| format!("{}.0", &token[..4]);
        assert_ne!(pages(&ids(), 2, forgetful), ids());
    }

    #[test]
    fn what_no_answer_had_is_no_token() {
        for token in [
            "", "0001", "0001.", ".1", "001.1", "zzzz.1", "+001.1", "00A1.1", "0001.-1",
        ] {
            assert!(SessionsTold::read(token).is_none(), "{token}");
        }
        assert!(SessionsTold::read("00a1.1").is_some());
    }
}
