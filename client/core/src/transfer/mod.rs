//! Transfers: bytes on their way between an engine's paged pool and areas of blocks in other memory, layer by layer.
//!
//! * A [`BlockArea`] is a piece of memory with slots for blocks. The way to it is a [`Route`]: one pair of streams for each device.
//! * A [`Plan`] says which blocks go between which slots and which blocks of the engine's pool. `pipeline::issue_layers` is the one
//!   place where a layer's bytes are put on their way.
//! * A [`Transfer`] is what was queued together. It tells when it is known to be over, and whether its bytes are worth anything.
//! * [`Routes`] remember which routes fail repeatedly (`breaker`).
//!
//! Nothing here knows what a block's hash, a lease or a broker is. Whoever plans a transfer sees to it that the memory may be
//! touched, and keeps it so until the transfer is over.

mod area;
mod breaker;
mod pace;
mod pipeline;
mod plan;
mod pool;
mod queueing;
mod route;
mod routes;

pub(crate) use area::{AreaId, BlockArea};
pub(crate) use breaker::RouteSet;
pub(crate) use pace::Pace;
pub(crate) use pipeline::{
    LayerTickets, LoadOrder, Move, MoveLead, MoveStep, Refused, issue_load, issue_move,
    issue_probe, issue_store,
};
pub(crate) use plan::{Plan, Plans};
pub(crate) use pool::check_pool;
pub use pool::{PagedKv, PagedLayer, PoolSpan};
pub(crate) use queueing::{Queueing, Transfer};
pub(crate) use route::{Direction, Route};
pub(crate) use routes::Routes;
