//! The gRPC services.

mod admin;
mod broker;
mod node;
mod pace;
mod session;
mod view;
mod watch;

pub use admin::AdminService;
pub use broker::BrokerService;
pub use node::NodeFacts;
pub use session::OutgoingStream;

use swiftcache_proto::domain::SessionId;
use tonic::Request;

use crate::{core::Caller, error::Refused, peer::Peer};

/// The process at the other end of the request's connection.
fn peer<T>(request: &Request<T>) -> Result<Peer, Refused> {
    let peer = request.extensions().get::<Peer>();
    peer.cloned().ok_or(Refused::NotOverTcp)
}

/// A caller: the session that the message names, and the process that sent the message.
fn caller(peer: &Peer, session: u64) -> Caller {
    Caller {
        session: SessionId(session),
        process: peer.process,
        connection: peer.connection,
    }
}
