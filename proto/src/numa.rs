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
    let device = |(node, text): (u32, String)| Device {
        uuid: DeviceUuid::of_host(node),
        name: format!("host memory of NUMA node {node}"),
        hbm_bytes: value(&text, "MemTotal").unwrap_or(0),
        ordinal: node,
    };
    described(nodes, memory).into_iter().map(device).collect()
}

/// What Linux says of the memory of each NUMA node that has any, by number.
///
/// Of an only node it is what Linux says of all memory. They should be the same, but a kernel that initializes memory when
/// it is first used counts it in its node from then on, and in the machine's total from the start.
fn described(nodes: &Path, memory: &Path) -> Vec<(u32, String)> {
    let entries = fs::read_dir(nodes).into_iter().flatten().flatten();
    let mut found: Vec<(u32, String)> = entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let node: u32 = name.to_str()?.strip_prefix("node")?.parse().ok()?;
            let text = fs::read_to_string(entry.path().join("meminfo")).ok()?;
            Some((node, text))
        })
        // A node of processors or devices only.
        .filter(|(_, text)| value(text, "MemTotal").unwrap_or(0) > 0)
        .collect();
    found.sort_by_key(|(node, _)| *node);
    if found.len() < 2 {
        let only = found.first().map_or(0, |(node, _)| *node);
        found = vec![(only, fs::read_to_string(memory).unwrap_or_default())];
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
    used_in(Path::new(NODES), Path::new(MEMORY), node)
}

fn used_in(nodes: &Path, memory: &Path, node: u32) -> Result<u64, String> {
    let all = described(nodes, memory);
    let (_, text) = all
        .iter()
        .find(|(number, _)| *number == node)
        .ok_or_else(|| format!("NUMA node {node} has no memory"))?;
    let read = |name| {
        value(text, name)
            .ok_or_else(|| format!("the memory of NUMA node {node}: Linux does not say {name}"))
    };
    let caches = ["Active(file)", "Inactive(file)", "SReclaimable"];
    let caches: u64 = caches.iter().filter_map(|name| value(text, name)).sum();
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
    use std::path::PathBuf;

    use super::*;

    /// A machine whose memory is 9 KiB, of which 3 are free, and whose nodes have so many KiB, of which one is free.
    fn machine(name: &str, nodes: &[(u32, u64)]) -> PathBuf {
        let root = format!("swiftcache-numa-{name}-{}", std::process::id());
        let root = std::env::temp_dir().join(root);
        fs::create_dir_all(root.join("node/power")).unwrap();
        fs::write(root.join("all"), "MemTotal:  9 kB\nMemFree:  3 kB\n").unwrap();
        for (node, total) in nodes {
            let at = root.join(format!("node/node{node}"));
            fs::create_dir_all(&at).unwrap();
            let text = format!("Node {node} MemTotal: {total} kB\nNode {node} MemFree: 1 kB\n");
            fs::write(at.join("meminfo"), text).unwrap();
        }
        root
    }

    /// Of each node: its name, its memory and what of it is in use, KiB.
    fn seen(root: &Path) -> Vec<(String, u64, u64)> {
        let (nodes, all) = (root.join("node"), root.join("all"));
        devices_in(&nodes, &all)
            .into_iter()
            .map(|device| {
                let used = used_in(&nodes, &all, device.ordinal).unwrap();
                let name = device.uuid.as_str().to_owned();
                (name, device.hbm_bytes >> 10, used >> 10)
            })
            .collect()
    }

    #[test]
    fn nodes_with_memory_are_devices() {
        let root = machine("several", &[(10, 6), (0, 5), (1, 0)]);
        let found = [("HOST-0".to_owned(), 5, 4), ("HOST-10".to_owned(), 6, 5)];
        assert_eq!(seen(&root), found);
        let problem = used_in(&root.join("node"), &root.join("all"), 1).unwrap_err();
        assert_eq!(problem, "NUMA node 1 has no memory");
        fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn an_only_node_has_all_memory_whatever_is_counted_in_it_yet() {
        for (nodes, name) in [
            (&[][..], "HOST-0"),
            (&[(0, 5)][..], "HOST-0"),
            (&[(0, 0), (1, 5)][..], "HOST-1"),
        ] {
            let root = machine("only", nodes);
            assert_eq!(seen(&root), [(name.to_owned(), 9, 6)]);
            fs::remove_dir_all(&root).unwrap();
        }
    }

    #[test]
    fn this_machine_uses_some_of_its_memory_and_not_more_than_it_has() {
        for device in devices() {
            let used = used_bytes(device.ordinal).unwrap();
            assert!(0 < used && used < device.hbm_bytes, "{device:?}: {used}");
        }
    }
}
