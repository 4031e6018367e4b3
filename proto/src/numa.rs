//! The machine's host memory: one device for each NUMA node that has any, whatever computes on the machine.

use std::{fs, path::Path};

use crate::domain::{Device, DeviceUuid};

/// Where Linux describes the NUMA nodes.
const NODES: &str = "/sys/devices/system/node";
/// Where it describes all memory: the only node's, on a machine that describes none.
const MEMORY: &str = "/proc/meminfo";

/// The NUMA nodes that have memory, by number. A machine that describes none is one node.
pub fn devices() -> Vec<Device> {
    devices_in(Path::new(NODES), Path::new(MEMORY))
}

fn devices_in(nodes: &Path, memory: &Path) -> Vec<Device> {
    let device = |node: u32, text: &str| Device {
        uuid: DeviceUuid::of_host(node),
        name: format!("host memory of NUMA node {node}"),
        hbm_bytes: value(text, "MemTotal").unwrap_or(0),
        ordinal: node,
    };
    let entries = fs::read_dir(nodes).into_iter().flatten().flatten();
    let mut found: Vec<Device> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let node: u32 = name.to_str()?.strip_prefix("node")?.parse().ok()?;
            let text = fs::read_to_string(entry.path().join("meminfo")).ok()?;
            Some(device(node, &text))
        })
        // A node of processors or devices only.
        .filter(|device| device.hbm_bytes > 0)
        .collect();
    found.sort_by_key(|device| device.ordinal);
    if found.is_empty() {
        let text = fs::read_to_string(memory).unwrap_or_default();
        found.push(device(0, &text));
    }
    found
}

/// Whether the machine says which memory is near to which processors, so that memory can be bound to this node.
pub fn is_described(node: u32) -> bool {
    Path::new(NODES).join(format!("node{node}")).exists()
}

/// The bytes of a NUMA node's memory that are in use and cannot be had by dropping caches.
///
/// # Errors
/// When the use cannot be read. The error says why, for people.
pub fn used_bytes(node: u32) -> Result<u64, String> {
    let path = Path::new(NODES).join(format!("node{node}/meminfo"));
    let path = match is_described(node) {
        true => path,
        false => MEMORY.into(),
    };
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let read = |name| {
        let missing = || format!("{}: it does not say {name}", path.display());
        value(&text, name).ok_or_else(missing)
    };
    let caches = ["Active(file)", "Inactive(file)", "SReclaimable"];
    let caches: u64 = caches.iter().filter_map(|name| value(&text, name)).sum();
    let free = read("MemFree")?.saturating_add(caches);
    Ok(read("MemTotal")?.saturating_sub(free))
}

/// What a line such as `Node 0 MemTotal:  24684096 kB` says, bytes.
fn value(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        let mut words = value.split_whitespace();
        let kib: u64 = words.next()?.parse().ok()?;
        (key.split_whitespace().last() == Some(name)).then(|| kib.saturating_mul(1024))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_with_memory_are_devices_and_a_machine_that_names_none_is_one() {
        let directory =
            std::env::temp_dir().join(format!("swiftcache-numa-{}", std::process::id()));
        let (nodes, memory) = (directory.join("node"), directory.join("all"));
        fs::create_dir_all(&directory).unwrap();
        fs::write(&memory, "MemTotal:  7 kB\nMemFree:  3 kB\n").unwrap();
        let only = devices_in(&nodes, &memory);
        assert_eq!((only.len(), only[0].hbm_bytes), (1, 7 << 10));
        assert_eq!(only[0].uuid.as_str(), "HOST-0");
        for (node, total) in [(0, 5), (1, 0), (10, 6)] {
            let at = nodes.join(format!("node{node}"));
            fs::create_dir_all(&at).unwrap();
            let text = format!("Node {node} MemTotal:       {total} kB\n");
            fs::write(at.join("meminfo"), text).unwrap();
        }
        fs::create_dir(nodes.join("power")).unwrap();
        let found = devices_in(&nodes, &memory);
        let named: Vec<_> = found.iter().map(|device| device.uuid.as_str()).collect();
        assert_eq!(named, ["HOST-0", "HOST-10"]);
        assert_eq!(found[1].hbm_bytes, 6 << 10);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn this_machine_uses_some_of_its_memory_and_not_more_than_it_has() {
        for device in devices() {
            let used = used_bytes(device.ordinal).unwrap();
            assert!(0 < used && used < device.hbm_bytes, "{device:?}: {used}");
        }
    }
}
