//! Checks that this process can map the memory of the GPUs that it may borrow from.
//!
//! A descriptor opens if the process has the device node of its GPU. A legacy handle also needs the GPU among those that
//! CUDA enumerates.

use std::{collections::BTreeSet, path::Path};

use swiftcache_proto::{
    domain::DeviceUuid,
    v1::{HandleKind, RegionStatus},
};

use super::{
    super::admin,
    broker::Answers,
    report::{Finding, Report},
};

/// `enumerated` are the devices that CUDA shows this process.
pub(super) fn examine(
    answers: Option<&Answers>,
    enumerated: Option<&[DeviceUuid]>,
    report: &mut Report,
) {
    let (Some(answers), Some(enumerated)) = (answers, enumerated) else {
        return;
    };
    let node = &answers.node;
    if admin::simulated(node).is_some() {
        return;
    }
    let lent = node
        .devices
        .iter()
        .filter_map(|status| status.device.as_ref());
    let lent = lent.map(|device| device.uuid.as_str());
    // Host memory needs no device node.
    let lent: BTreeSet<&str> = lent.filter(|uuid| !admin::is_host_memory(uuid)).collect();
    let enumerated: BTreeSet<&str> = enumerated.iter().map(DeviceUuid::as_str).collect();
    let nodes = Nodes::find(Path::new("/"));
    let variable = std::env::var("NVIDIA_VISIBLE_DEVICES").ok();
    report.add(visible(&lent, &enumerated, &nodes, variable));
    report.add(legacy(&answers.regions, &enumerated));
}

/// The GPUs whose device nodes are here.
#[derive(Debug, Default)]
struct Nodes {
    /// How many `/dev/nvidiaN` there are.
    count: usize,
    /// The UUIDs of those that the driver names. It names none where its part of `/proc` is hidden.
    named: BTreeSet<String>,
}

impl Nodes {
    /// Looks under `root`, which is `/` but in tests.
    fn find(root: &Path) -> Self {
        let device = |minor: &str| root.join("dev").join(format!("nvidia{minor}"));
        let names = std::fs::read_dir(root.join("dev")).into_iter().flatten();
        let count = names.flatten().filter(|entry| {
            let name = entry.file_name();
            let minor = name.to_str().and_then(|name| name.strip_prefix("nvidia"));
            minor.is_some_and(|minor| minor.parse::<u32>().is_ok())
        });
        let gpus = std::fs::read_dir(root.join("proc/driver/nvidia/gpus"));
        let named = gpus.into_iter().flatten().flatten().filter_map(|gpu| {
            let text = std::fs::read_to_string(gpu.path().join("information")).ok()?;
            let field = |name: &str| {
                let mut lines = text.lines().filter_map(|line| line.split_once(':'));
                let (_, value) = lines.find(|(field, _)| field.trim() == name)?;
                Some(value.trim().to_owned())
            };
            let (uuid, minor) = (field("GPU UUID")?, field("Device Minor")?);
            device(&minor).exists().then_some(uuid)
        });
        Self {
            count: count.count(),
            named: named.collect(),
        }
    }

    /// Those of `lent` whose nodes are missing, as far as that can be told: what CUDA enumerates has its node.
    fn missing<'a>(&self, lent: &BTreeSet<&'a str>, enumerated: &BTreeSet<&str>) -> Vec<&'a str> {
        if self.count >= lent.len() && self.named.is_empty() {
            return Vec::new();
        }
        let here = |uuid: &str| enumerated.contains(uuid) || self.named.contains(uuid);
        lent.iter().copied().filter(|uuid| !here(uuid)).collect()
    }
}

fn visible(
    lent: &BTreeSet<&str>,
    enumerated: &BTreeSet<&str>,
    nodes: &Nodes,
    variable: Option<String>,
) -> Finding {
    const CHECK: &str = "visible-gpus";
    let all = lent.len();
    let computes = lent.intersection(enumerated).count();
    let missing = nodes.missing(lent, enumerated);
    let here = all - missing.len();
    if missing.is_empty() {
        return Finding::ok(
            CHECK,
            format!("device nodes of all {all} of the broker's GPUs; CUDA enumerates {computes}"),
        );
    }
    let found = format!(
        "device nodes of {here} of the broker's {all} GPUs, but not of {}; CUDA enumerates {computes}",
        missing.join(", ")
    );
    let advice = match variable {
        Some(variable) if !["", "all"].contains(&variable.as_str()) => {
            format!("NVIDIA_VISIBLE_DEVICES={variable} hides their nodes: set it to all")
        }
        _ => "a container with one GPU's node cannot map memory of the others: drop the nvidia.com/gpu claim, set \
              NVIDIA_VISIBLE_DEVICES=all, and name the engine's own GPU in CUDA_VISIBLE_DEVICES (docs/operations.md, \
              Engines that join)"
            .to_owned(),
    };
    // An engine needs its own GPU and at least one more, whose memory it can borrow.
    if here < 2 {
        Finding::fail(CHECK, found, advice)
    } else {
        Finding::warn(CHECK, found, advice)
    }
}

/// Checks that the legacy handles that are on offer now can be opened here.
fn legacy(regions: &[RegionStatus], enumerated: &BTreeSet<&str>) -> Finding {
    const CHECK: &str = "legacy-handles";
    let offered: Vec<&RegionStatus> = (regions.iter())
        .filter(|region| region.handle_kind() == HandleKind::CudaIpc)
        .collect();
    if offered.is_empty() {
        return Finding::ok(CHECK, "none is on offer: all memory is lent by descriptor");
    }
    let hidden: BTreeSet<String> = (offered.iter())
        .filter(|region| !enumerated.contains(region.device_uuid.as_str()))
        .map(|region| format!("{} on {}", region.donor_name, region.device_uuid))
        .collect();
    if hidden.is_empty() {
        let count = offered.len();
        return Finding::ok(
            CHECK,
            format!("{count} regions, all of GPUs that CUDA enumerates here"),
        );
    }
    let hidden: Vec<String> = hidden.into_iter().collect();
    Finding::warn(
        CHECK,
        format!(
            "lent by legacy handle, and of no use here: {}",
            hidden.join(", ")
        ),
        "a legacy handle opens only where CUDA enumerates its GPU: start swiftcache donate with --handle posix-fd. An engine that \
         lends its own pool has only legacy handles: for those, list its GPU in CUDA_VISIBLE_DEVICES, after the own one",
    )
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::report::Verdict, *};

    fn nodes(count: usize, named: &[&str]) -> Nodes {
        Nodes {
            count,
            named: named.iter().map(|uuid| (*uuid).to_owned()).collect(),
        }
    }

    #[test]
    fn nodes_count_and_not_what_cuda_enumerates() {
        let all = BTreeSet::from(["GPU-a", "GPU-b", "GPU-c"]);
        let own = BTreeSet::from(["GPU-a"]);
        for every in [nodes(3, &["GPU-a", "GPU-b", "GPU-c"]), nodes(3, &[])] {
            let found = visible(&all, &own, &every, None);
            assert_eq!(found.verdict, Verdict::Ok, "{}", found.found);
            assert!(found.found.ends_with("CUDA enumerates 1"));
        }
        let claimed = visible(&all, &own, &nodes(1, &["GPU-a"]), Some("all".to_owned()));
        assert_eq!(claimed.verdict, Verdict::Fail);
        assert!(claimed.found.contains("1 of the broker's 3") && claimed.found.contains("GPU-c"));
        assert!(claimed.advice.unwrap().contains("nvidia.com/gpu"));
        let hidden = visible(&all, &own, &nodes(1, &[]), Some("GPU-a".to_owned()));
        assert_eq!(hidden.verdict, Verdict::Fail);
        assert!(
            hidden
                .advice
                .unwrap()
                .contains("NVIDIA_VISIBLE_DEVICES=GPU-a")
        );
        let two = visible(&all, &own, &nodes(2, &["GPU-a", "GPU-b"]), None);
        assert_eq!(two.verdict, Verdict::Warn);
        assert!(two.found.contains("but not of GPU-c"), "{}", two.found);
    }

    #[test]
    fn a_node_is_there_when_both_the_driver_and_dev_show_it() {
        let root = tempfile::tempdir().unwrap();
        let gpu = |minor: u32| {
            let folder = root
                .path()
                .join(format!("proc/driver/nvidia/gpus/0000:0{minor}:00.0"));
            fs::create_dir_all(&folder).unwrap();
            let text = format!(
                "Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n"
            );
            fs::write(folder.join("information"), text).unwrap();
        };
        gpu(0);
        gpu(1);
        fs::create_dir(root.path().join("dev")).unwrap();
        for name in ["nvidia0", "nvidiactl", "nvidia-uvm"] {
            fs::write(root.path().join("dev").join(name), "").unwrap();
        }
        let found = Nodes::find(root.path());
        assert_eq!(found.count, 1);
        assert_eq!(found.named, BTreeSet::from(["GPU-0".to_owned()]));
        let nothing = Nodes::find(Path::new("/nowhere"));
        assert_eq!((nothing.count, nothing.named.len()), (0, 0));
    }

    #[test]
    fn legacy_handles_are_named_where_they_cannot_be_opened() {
        let region = |device: &str, kind: HandleKind| RegionStatus {
            device_uuid: device.to_owned(),
            donor_name: "vllm".to_owned(),
            handle_kind: kind.into(),
            ..RegionStatus::default()
        };
        let own = BTreeSet::from(["GPU-a"]);
        let descriptor = region("GPU-b", HandleKind::PosixFd);
        let none = legacy(std::slice::from_ref(&descriptor), &own);
        assert_eq!(none.verdict, Verdict::Ok);
        let here = legacy(&[region("GPU-a", HandleKind::CudaIpc)], &own);
        assert_eq!(here.verdict, Verdict::Ok);
        let hidden = legacy(&[descriptor, region("GPU-b", HandleKind::CudaIpc)], &own);
        assert_eq!(hidden.verdict, Verdict::Warn);
        assert!(hidden.found.contains("vllm on GPU-b"), "{}", hidden.found);
        assert!(hidden.advice.unwrap().contains("--handle posix-fd"));
    }
}
