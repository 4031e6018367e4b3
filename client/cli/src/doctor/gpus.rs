//! Checks the driver, NVML, and the links and modes of the GPUs.

use nvml_wrapper::{Nvml, enum_wrappers::device::ComputeMode, error::NvmlError};
use swiftcache_proto::{
    domain::{Device, DeviceUuid, HandleKind, LinkKind},
    v1::GetNodeResponse,
};

use super::{
    super::admin,
    report::{Finding, Report},
};
use swiftcache_client::device::{DeviceLayer, cuda::CudaLayer};

/// Checks the GPUs. Returns the devices that CUDA shows this process, if there is CUDA. `node` is the broker's answer.
pub(super) fn examine(
    node: Option<&GetNodeResponse>,
    report: &mut Report,
) -> Option<Vec<DeviceUuid>> {
    let simulated = node.is_some_and(|node| admin::simulated(node).is_some());
    nvml(simulated, report);
    let layer = match CudaLayer::open() {
        Ok(layer) => layer,
        Err(error) => {
            report.add(absent("cuda-driver", &error.to_string(), simulated));
            return None;
        }
    };
    let (version, absent) = layer.driver();
    report.add(driver(version, absent, layer.devices().len()));
    report.add(handles(layer.handle_kinds()));
    links(
        layer.devices(),
        |from, to| layer.link_kind(from, to),
        report,
    );
    let devices = layer.devices().iter();
    Some(devices.map(|device| device.uuid.clone()).collect())
}

/// A missing library is a failure, unless the broker simulates the node's GPUs.
fn absent(check: &'static str, problem: &str, simulated: bool) -> Finding {
    if simulated {
        let advice = "this is not needed, because the broker simulates a node";
        return Finding::warn(check, problem, advice);
    }
    Finding::fail(
        check,
        problem,
        "install the NVIDIA driver; in a container, runtime class nvidia and NVIDIA_VISIBLE_DEVICES=all",
    )
}

/// `version` is in the driver's form: 12080 is CUDA 12.8. `absent` are the entry points that the driver lacks.
fn driver(version: i32, absent: &[&'static str], devices: usize) -> Finding {
    const CHECK: &str = "cuda-driver";
    let found = format!(
        "CUDA {}.{}, {devices} GPUs enumerated",
        version / 1_000,
        version % 1_000 / 10
    );
    if absent.is_empty() {
        return Finding::ok(CHECK, found);
    }
    Finding::warn(
        CHECK,
        format!("{found}, without {}", absent.join(", ")),
        "this works, but more slowly; a driver for CUDA 12.8 or later has them",
    )
}

fn handles(kinds: &[HandleKind]) -> Finding {
    const CHECK: &str = "ipc-handles";
    let names: Vec<String> = kinds.iter().map(|kind| format!("{kind:?}")).collect();
    if names.is_empty() {
        return Finding::fail(
            CHECK,
            "this process can share memory by no kind of handle",
            "GPUs in MIG or confidential mode, and some virtual GPUs, have no such handles: use whole GPUs in their usual \
             mode",
        );
    }
    Finding::ok(CHECK, names.join(", "))
}

/// Checks the link of every pair of devices, in both directions.
fn links(
    devices: &[Device],
    kind: impl Fn(&DeviceUuid, &DeviceUuid) -> LinkKind,
    report: &mut Report,
) {
    const CHECK: &str = "links";
    let mut unreachable = Vec::new();
    let mut counted = std::collections::BTreeMap::new();
    for (number, from) in devices.iter().enumerate() {
        for to in &devices[number + 1..] {
            let both = [kind(&from.uuid, &to.uuid), kind(&to.uuid, &from.uuid)];
            let pair = format!("{}-{}", from.ordinal, to.ordinal);
            if both.contains(&LinkKind::Host) {
                unreachable.push(pair);
            } else {
                let pairs: &mut Vec<String> = counted.entry(both[0].to_string()).or_default();
                pairs.push(pair);
            }
        }
    }
    if devices.len() < 2 {
        return;
    }
    let reached: Vec<String> = counted
        .iter()
        .map(|(kind, pairs)| format!("{kind} {}", pairs.join(" ")))
        .collect();
    if unreachable.is_empty() {
        report.add(Finding::ok(CHECK, reached.join("; ")));
        return;
    }
    let advice = "nothing is lent between these GPUs; IOMMU or ACS settings, or a virtual machine, may be the reason: \
                  nvidia-smi topo -p2p r";
    let none = format!("no peer access between {}", unreachable.join(" "));
    report.add(if reached.is_empty() {
        Finding::fail(CHECK, none, advice)
    } else {
        Finding::warn(CHECK, format!("{}; {none}", reached.join("; ")), advice)
    });
}

fn nvml(simulated: bool, report: &mut Report) {
    const CHECK: &str = "nvml";
    let path = swiftcache_proto::nvml::library();
    let looked = Nvml::builder().lib_path(&path).init().and_then(|library| {
        let gpus = (0..library.device_count()?).map(|number| modes(&library, number));
        Ok((library.sys_driver_version(), gpus.collect::<Vec<_>>()))
    });
    let (version, gpus) = match looked {
        Ok(looked) => looked,
        Err(error) => {
            let problem = match error {
                NvmlError::LibloadingError(error) => error.to_string(),
                error => error.to_string(),
            };
            report.add(absent(CHECK, &problem, simulated));
            return;
        }
    };
    let version = version.unwrap_or_else(|error| format!("of unknown version ({error})"));
    report.add(answers(&version, &gpus, simulated));
    report.add(shareable(&gpus));
}

/// Checks that NVML answers for every GPU.
fn answers(version: &str, gpus: &[Result<Modes, NvmlError>], simulated: bool) -> Finding {
    const CHECK: &str = "nvml";
    let found = format!("driver {version}, {} GPUs", gpus.len());
    let silent = (0..).zip(gpus).filter_map(|(number, gpu): (u32, _)| {
        let error = gpu.as_ref().err()?;
        Some(format!("GPU {number}: {error}"))
    });
    let silent: Vec<String> = silent.collect();
    if !silent.is_empty() {
        return Finding::warn(
            CHECK,
            format!("{found}; {}", silent.join("; ")),
            "the other GPUs are lent as usual; nvidia-smi and the kernel's log (Xid) say more",
        );
    }
    if simulated && !gpus.is_empty() {
        return Finding::warn(
            CHECK,
            found,
            "the broker SIMULATES its devices, although there are GPUs here: start it with --probe nvml",
        );
    }
    Finding::ok(CHECK, found)
}

/// The modes in which a GPU's memory cannot be shared, or not with every process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Modes {
    mig: bool,
    confidential: bool,
    exclusive: bool,
}

/// The modes of a GPU. A mode that NVML does not tell counts as off. A GPU whose UUID NVML cannot tell is an error.
fn modes(library: &Nvml, number: u32) -> Result<Modes, NvmlError> {
    let gpu = library.device_by_index(number)?;
    gpu.uuid()?;
    let mode = gpu.compute_mode();
    Ok(Modes {
        mig: gpu.mig_mode().is_ok_and(|mode| mode.current != 0),
        confidential: gpu.is_cc_enabled().unwrap_or(false),
        exclusive: mode.is_ok_and(|mode| mode != ComputeMode::Default),
    })
}

fn shareable(gpus: &[Result<Modes, NvmlError>]) -> Finding {
    const CHECK: &str = "gpu-modes";
    let named = |is: fn(&Modes) -> bool| {
        let gpus = (0..)
            .zip(gpus)
            .filter(|(_, gpu)| gpu.as_ref().is_ok_and(is));
        let numbers: Vec<String> = gpus
            .map(|(number, _): (u32, _)| number.to_string())
            .collect();
        (!numbers.is_empty()).then(|| numbers.join(", "))
    };
    if let Some(gpus) = named(|modes| modes.confidential) {
        return Finding::fail(
            CHECK,
            format!("confidential computing is on: GPU {gpus}"),
            "the memory of these GPUs cannot be shared between processes: turn it off, or run this node without SwiftCache",
        );
    }
    if let Some(gpus) = named(|modes| modes.mig) {
        return Finding::fail(
            CHECK,
            format!("MIG is on: GPU {gpus}"),
            "MIG instances cannot share memory between processes: nvidia-smi -i N -mig 0",
        );
    }
    if let Some(gpus) = named(|modes| modes.exclusive) {
        return Finding::warn(
            CHECK,
            format!("compute mode is exclusive or prohibited: GPU {gpus}"),
            "a donor beside an engine cannot create a context there: nvidia-smi -i N -c DEFAULT",
        );
    }
    Finding::ok(
        CHECK,
        "whole GPUs, not confidential, open to several processes",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::report::Verdict, *};

    fn judged(kind: impl Fn(u32, u32) -> LinkKind) -> Vec<(Verdict, String)> {
        let device = |ordinal: u32| Device {
            uuid: format!("SIM-{ordinal}").parse().unwrap(),
            name: String::new(),
            hbm_bytes: 1,
            ordinal,
        };
        let number = |uuid: &DeviceUuid| uuid.as_str()[4..].parse().unwrap();
        let mut report = Report::default();
        let devices = [device(0), device(1), device(2)];
        links(
            &devices,
            |from, to| kind(number(from), number(to)),
            &mut report,
        );
        let json = serde_json::to_value(&report).unwrap();
        let text = json["findings"][0]["found"].as_str().unwrap().to_owned();
        let verdict = match json["findings"][0]["verdict"].as_str() {
            Some("ok") => Verdict::Ok,
            Some("warn") => Verdict::Warn,
            _ => Verdict::Fail,
        };
        vec![(verdict, text)]
    }

    #[test]
    fn every_pair_of_gpus_is_named() {
        let mixed = judged(|from, to| match from + to {
            1 => LinkKind::Nvlink,
            2 => LinkKind::Pcie,
            _ => LinkKind::Host,
        });
        let (verdict, text) = &mixed[0];
        assert_eq!(*verdict, Verdict::Warn);
        assert!(text.ends_with("no peer access between 1-2"), "{text}");
        assert!(text.contains("0-1") && text.contains("0-2"), "{text}");
        assert_eq!(judged(|_, _| LinkKind::Nvlink)[0].0, Verdict::Ok);
        assert_eq!(judged(|_, _| LinkKind::Host)[0].0, Verdict::Fail);
        // One direction is not enough.
        let one_way = judged(|from, to| {
            if from < to {
                LinkKind::Pcie
            } else {
                LinkKind::Host
            }
        });
        assert_eq!(one_way[0].0, Verdict::Fail);
    }

    #[test]
    fn modes_that_forbid_sharing_are_named() {
        let usual = Modes::default();
        let mig = Modes { mig: true, ..usual };
        let confidential = Modes {
            confidential: true,
            ..usual
        };
        let exclusive = Modes {
            exclusive: true,
            ..usual
        };
        assert_eq!(shareable(&[Ok(usual), Ok(usual)]).verdict, Verdict::Ok);
        assert_eq!(
            shareable(&[Ok(usual), Ok(exclusive)]).verdict,
            Verdict::Warn
        );
        for forbidding in [mig, confidential] {
            let lost = Err(NvmlError::GpuLost);
            let finding = shareable(&[lost, Ok(exclusive), Ok(forbidding)]);
            assert_eq!(finding.verdict, Verdict::Fail);
            assert!(finding.found.ends_with("GPU 2"), "{}", finding.found);
        }
    }

    #[test]
    fn a_gpu_that_does_not_answer_is_named_and_one_that_is_not_used_is_noticed() {
        let usual = || Ok(Modes::default());
        assert_eq!(
            answers("1", &[usual(), usual()], false).verdict,
            Verdict::Ok
        );
        let lost = answers("1", &[usual(), Err(NvmlError::GpuLost)], false);
        assert_eq!(lost.verdict, Verdict::Warn);
        assert!(lost.found.contains("2 GPUs; GPU 1: "), "{}", lost.found);
        let idle = answers("1", &[usual()], true);
        assert!(idle.advice.unwrap().contains("SIMULATES"));
    }

    #[test]
    fn a_missing_driver_matters_where_gpus_are_real() {
        assert_eq!(absent("nvml", "gone", true).verdict, Verdict::Warn);
        assert_eq!(absent("nvml", "gone", false).verdict, Verdict::Fail);
        assert_eq!(handles(&[]).verdict, Verdict::Fail);
        assert_eq!(handles(&[HandleKind::PosixFd]).verdict, Verdict::Ok);
        let old = driver(12_040, &["cuMemcpyBatchAsync"], 8);
        assert_eq!(old.verdict, Verdict::Warn);
        assert!(old.found.starts_with("CUDA 12.4, 8 GPUs"), "{}", old.found);
    }
}
