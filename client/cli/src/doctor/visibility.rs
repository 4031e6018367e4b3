//! Checks that this process sees the GPUs whose memory it may borrow.

use std::collections::BTreeSet;

use swiftcache_proto::{domain::DeviceUuid, v1::GetNodeResponse};

use super::{
    super::admin,
    report::{Finding, Report},
};

const CHECK: &str = "visible-gpus";

/// `seen` are the devices that CUDA shows this process. `node` is the broker's answer.
pub(super) fn examine(
    node: Option<&GetNodeResponse>,
    seen: Option<&[DeviceUuid]>,
    report: &mut Report,
) {
    let (Some(node), Some(seen)) = (node, seen) else {
        return;
    };
    if admin::simulated(node).is_some() {
        return;
    }
    let lent = node
        .devices
        .iter()
        .filter_map(|status| status.device.as_ref());
    let lent: BTreeSet<&str> = lent.map(|device| device.uuid.as_str()).collect();
    let seen = seen.iter().map(DeviceUuid::as_str).collect();
    let variable = |name: &str| std::env::var(name).ok();
    report.add(judge(
        &lent,
        &seen,
        variable("CUDA_VISIBLE_DEVICES"),
        variable("NVIDIA_VISIBLE_DEVICES"),
    ));
}

fn judge(
    lent: &BTreeSet<&str>,
    seen: &BTreeSet<&str>,
    cuda: Option<String>,
    nvidia: Option<String>,
) -> Finding {
    let hidden: Vec<&str> = lent.difference(seen).copied().collect();
    if hidden.is_empty() {
        return Finding::ok(
            CHECK,
            format!("all {} of the broker's GPUs are visible", lent.len()),
        );
    }
    let advice = match (cuda, nvidia) {
        (Some(cuda), _) if !cuda.is_empty() => format!(
            "CUDA_VISIBLE_DEVICES={cuda} hides them: list all GPUs there, with the engine's own GPU first"
        ),
        (_, Some(nvidia)) if !["", "all"].contains(&nvidia.as_str()) => {
            format!("NVIDIA_VISIBLE_DEVICES={nvidia} hides them: set it to all")
        }
        _ => "a container with one GPU cannot map memory of the others: drop the nvidia.com/gpu claim, and set \
              NVIDIA_VISIBLE_DEVICES=all (docs/operations.md, Engines that join)"
            .to_owned(),
    };
    let shared = lent.len() - hidden.len();
    let found = format!(
        "{shared} of the broker's {} GPUs are visible, but not {}",
        lent.len(),
        hidden.join(", ")
    );
    // An engine needs to see its own GPU and at least one more, whose memory it can borrow.
    if shared < 2 {
        Finding::fail(CHECK, found, advice)
    } else {
        Finding::warn(CHECK, found, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::report::Verdict, *};

    #[test]
    fn one_gpu_a_container_is_the_pitfall_it_is() {
        let all = BTreeSet::from(["GPU-a", "GPU-b", "GPU-c"]);
        let none = || None;
        assert_eq!(judge(&all, &all, none(), none()).verdict, Verdict::Ok);
        let one = BTreeSet::from(["GPU-a"]);
        let claimed = judge(&all, &one, none(), Some("all".to_owned()));
        assert_eq!(claimed.verdict, Verdict::Fail);
        assert!(claimed.found.contains("1 of the broker's 3") && claimed.found.contains("GPU-c"));
        assert!(claimed.advice.unwrap().contains("nvidia.com/gpu"));
        let hidden = judge(&all, &one, none(), Some("GPU-a".to_owned()));
        assert!(
            hidden
                .advice
                .unwrap()
                .contains("NVIDIA_VISIBLE_DEVICES=GPU-a")
        );
        let two = BTreeSet::from(["GPU-a", "GPU-b"]);
        let hidden = judge(&all, &two, Some("0,1".to_owned()), none());
        assert_eq!(hidden.verdict, Verdict::Warn);
        assert!(hidden.advice.unwrap().contains("CUDA_VISIBLE_DEVICES=0,1"));
    }
}
