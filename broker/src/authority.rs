//! Who may change what belongs to others: `docs/threat-model.md` has the whole list.

use tonic::{Request, transport::server::TlsConnectInfo};

use crate::{core::Process, error::Refused, listen::TcpPeer, peer::Peer};

/// Those who may drain, undrain, evict and set quotas: root, the broker's own user, the members of a group, and whoever
/// has a client certificate over TCP. Everybody else who may connect may look.
#[derive(Clone, Copy, Debug)]
pub struct Operators {
    broker_uid: u32,
    /// The group of `admin_group`, if it is set.
    group: Option<u32>,
}

impl Operators {
    /// The operators of this process's broker.
    pub fn new(group: Option<u32>) -> Self {
        Self {
            broker_uid: rustix::process::geteuid().as_raw(),
            group,
        }
    }

    /// Checks that an operator asks. `doing` names what is asked, as in "may not drain".
    ///
    /// # Errors
    /// When somebody else asks, or when nobody can tell who asks.
    pub fn check<T>(&self, request: &Request<T>, doing: &'static str) -> Result<(), Refused> {
        if let Some(peer) = request.extensions().get::<Peer>() {
            return match self.are(peer) {
                true => Ok(()),
                false => Err(Refused::NotAnOperator {
                    uid: peer.process.uid,
                    doing,
                    broker_uid: self.broker_uid,
                }),
            };
        }
        Self::check_known(request, doing)
    }

    /// Checks that the broker can tell who asks: a process at the Unix socket, or a client with a certificate.
    ///
    /// # Errors
    /// When the request came over TCP without a certificate.
    pub fn check_known<T>(request: &Request<T>, doing: &'static str) -> Result<(), Refused> {
        let tls = request.extensions().get::<TlsConnectInfo<TcpPeer>>();
        let certified = || {
            let chain = tls.and_then(TlsConnectInfo::peer_certs);
            chain.is_some_and(|chain| !chain.is_empty())
        };
        match request.extensions().get::<Peer>().is_some() || certified() {
            true => Ok(()),
            false => Err(Refused::Anonymous { doing }),
        }
    }

    /// Who asks, for logs and events.
    pub fn name<T>(request: &Request<T>) -> String {
        if let Some(peer) = request.extensions().get::<Peer>() {
            let Process { uid, pid, .. } = peer.process;
            return format!("uid {uid}, pid {pid}");
        }
        match request.remote_addr() {
            Some(address) => format!("the client with a certificate at {address}"),
            None => "a client with a certificate".to_owned(),
        }
    }

    fn are(&self, peer: &Peer) -> bool {
        let uid = peer.process.uid;
        uid == 0
            || uid == self.broker_uid
            || self.group.is_some_and(|group| peer.is_in_group(group))
    }
}
