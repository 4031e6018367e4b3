//! Messages to sessions about the node, and about the slabs that they are granted.

use std::time::Instant;

use swiftcache_proto::{domain::Handle, numa, v1};

use crate::{
    core::{Caller, Grant},
    owner::Owner,
    probe::Probe,
};

/// The facts about the node that every session gets.
pub struct NodeFacts {
    pub(super) devices: Vec<v1::Device>,
    pub(super) links: Vec<v1::Link>,
    pub(super) host_devices: Vec<v1::Device>,
    pub(super) fd_socket: String,
    pub(super) drain_ms: u32,
    pub(super) pin_ms: u32,
}

impl NodeFacts {
    /// The facts from the probe and the settings.
    pub fn new(probe: &dyn Probe, fd_socket: String, drain_ms: u32, pin_ms: u32) -> Self {
        let hosts = numa::devices();
        Self {
            host_devices: hosts.iter().map(v1::Device::from).collect(),
            devices: probe.devices().iter().map(v1::Device::from).collect(),
            links: probe.links().iter().map(v1::Link::from).collect(),
            fd_socket,
            drain_ms,
            pin_ms,
        }
    }
}

/// The message of a grant. If the handle is a descriptor, the message has a token that only the caller's process can use.
pub(super) fn grant(owner: &Owner, grant: Grant, caller: Caller) -> v1::Grant {
    let mut handle = v1::Handle {
        kind: v1::HandleKind::from(grant.handle.kind()).into(),
        ..Default::default()
    };
    match grant.handle {
        Handle::CudaIpc(opaque) | Handle::Fabric(opaque) => {
            handle.opaque = opaque.0.to_vec().into();
        }
        Handle::PosixFd => {
            let descriptors = owner.descriptors();
            let token = descriptors.grant(caller, grant.lease, grant.allocation, Instant::now());
            handle.grant_token = token.to_vec().into();
        }
    }
    v1::Grant {
        lease_id: grant.lease.0,
        generation: grant.generation.0,
        region_id: grant.region.0.to_vec().into(),
        slab: grant.slab,
        slab_bytes: grant.slab_bytes,
        allocation_id: grant.allocation.0.to_vec().into(),
        offset: grant.offset,
        device_uuid: grant.device.to_string(),
        handle: Some(handle),
        link: v1::LinkKind::from(grant.link).into(),
        slots: grant.slots,
        block_bytes: grant.block_bytes,
        map_bytes: grant.map_bytes,
    }
}
