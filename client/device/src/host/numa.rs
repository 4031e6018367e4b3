//! Memory of one NUMA node: taken there, and all of it at once, so that what is offered is there.

use std::io;

use swiftcache_proto::{domain::DeviceUuid, numa};

use super::{DeviceError, Result, mapping::Mapping};

/// A node keeps this part of its memory: a machine without any left kills somebody.
const KEPT: u64 = 50;

/// Fails unless a node has so much memory to spare.
pub(super) fn check_room(device: &DeviceUuid, bytes: u64) -> Result<()> {
    let refuse = |problem: String| DeviceError::OutOfMemory {
        uuid: device.clone(),
        bytes,
        problem,
    };
    let nodes = numa::devices();
    let Some(node) = nodes.iter().find(|node| node.uuid == *device) else {
        let names: Vec<&str> = nodes.iter().map(|node| node.uuid.as_str()).collect();
        return Err(refuse(format!(
            "this machine has no such NUMA node, but {}",
            names.join(", ")
        )));
    };
    let used = numa::used_bytes(node.ordinal).map_err(refuse)?;
    let total = node.hbm_bytes;
    let spare = total.saturating_sub(used).saturating_sub(total / KEPT);
    match bytes <= spare {
        true => Ok(()),
        false => Err(refuse(format!(
            "{spare} of {total} bytes are to spare; a fiftieth of it stays free"
        ))),
    }
}

/// Binds pages that nobody has touched to a node, and has the kernel provide them all.
pub(super) fn settle(device: &DeviceUuid, node: u32, mapping: &Mapping) -> Result<()> {
    let failed = |operation, problem: String| DeviceError::Failed {
        operation,
        device: device.clone(),
        problem,
    };
    if numa::is_described(node)
        && let Err(error) = bind(mapping, node)
    {
        let problem = format!(
            "{error}; memory cannot be bound to NUMA node {node}. In a container, mbind needs CAP_SYS_NICE, or a seccomp \
             profile that allows it"
        );
        // On a machine with one node all memory is there anyway.
        if numa::devices().len() > 1 {
            return Err(failed("mbind", problem));
        }
        tracing::debug!(%problem, "the only node's memory stays unbound");
    }
    let (address, bytes) = (mapping.address() as usize, mapping.bytes() as usize);
    // SAFETY: the mapping is ours and new; advice about page sizes changes no byte.
    let huge =
        unsafe { rustix::mm::madvise(address as *mut _, bytes, rustix::mm::Advice::LinuxHugepage) };
    if let Err(error) = huge {
        tracing::trace!(%error, "ordinary pages");
    }
    // SAFETY: the mapping is ours and new, and full of zeroes that nobody relies on yet.
    let populated = unsafe {
        rustix::mm::madvise(
            address as *mut _,
            bytes,
            rustix::mm::Advice::LinuxPopulateWrite,
        )
    };
    match populated {
        Ok(()) => Ok(()),
        // A kernel before 5.14 does not know the advice: a write has the same effect.
        Err(rustix::io::Errno::INVAL) => {
            // SAFETY: the whole range is ours, mapped and writable.
            unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes) };
            Ok(())
        }
        Err(error) => Err(DeviceError::OutOfMemory {
            uuid: device.clone(),
            bytes: mapping.bytes(),
            problem: error.to_string(),
        }),
    }
}

fn bind(mapping: &Mapping, node: u32) -> io::Result<()> {
    const BITS: u32 = libc::c_ulong::BITS;
    let mut mask: Vec<libc::c_ulong> = vec![0; (node / BITS) as usize + 1];
    mask[(node / BITS) as usize] = 1 << (node % BITS);
    // The kernel takes one bit less than it is told.
    let most = mask.len() as libc::c_ulong * libc::c_ulong::from(BITS) + 1;
    let (address, bytes) = (mapping.address(), mapping.bytes());
    // SAFETY: the range is ours, whole pages and mapped; the mask is as long as said, and only read during the call.
    let code = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address,
            bytes,
            libc::c_ulong::from(libc::MPOL_BIND.unsigned_abs()),
            mask.as_ptr(),
            most,
            0_u32,
        )
    };
    match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_is_not_there_is_refused_with_those_that_are() {
        let refused = check_room(&DeviceUuid::of_host(4_000), 1).unwrap_err();
        let text = refused.to_string();
        assert!(
            text.contains("HOST-4000") && text.contains("HOST-0"),
            "{text}"
        );
        // The twin.
        check_room(&DeviceUuid::of_host(0), 1).unwrap();
    }

    #[test]
    fn a_node_gives_no_more_than_it_has_to_spare() {
        let device = DeviceUuid::of_host(0);
        let total = numa::devices()[0].hbm_bytes;
        let refused = check_room(&device, total).unwrap_err();
        assert!(
            matches!(refused, DeviceError::OutOfMemory { .. }),
            "{refused}"
        );
    }
}
