//! The shape of the node: a topology that is scaled down to the replay's size, and the file that describes it.

use std::path::Path;

use swiftcache_proto::{
    domain::{Device, LinkKind},
    topology::Topology,
};

use super::{NodePlan, ReplayError};

/// The first devices of the plan's topology and the links between them. Each device has the HBM of the plan's GPU,
/// scaled down.
pub(super) fn shrink(plan: &NodePlan, usage_dir: &Path) -> Result<Topology, ReplayError> {
    let full = Topology::load(&plan.topology)?;
    let wanted = plan.donors + 1;
    if plan.donors == 0 || full.devices.len() < wanted {
        return Err(ReplayError::Flag {
            flag: "--donors",
            problem: format!(
                "is {}; topology {} takes 1 to {}, because the busy model needs one device",
                plan.donors,
                full.name,
                full.devices.len() - 1
            ),
        });
    }
    let devices: Vec<Device> = full.devices[..wanted]
        .iter()
        .map(|device| Device {
            name: format!("simulated {} 1/{:.0}", plan.gpu.name, plan.scale.ratio),
            hbm_bytes: plan.scale.shrink(plan.gpu.hbm_bytes),
            ..device.clone()
        })
        .collect();
    let known = |uuid| devices.iter().any(|device| device.uuid == uuid);
    let links = full.links.into_iter();
    let links = links.filter(|link| known(link.from.clone()) && known(link.to.clone()));
    Ok(Topology {
        name: format!("{}, shrunk for a replay", full.name),
        links: links.collect(),
        usage_dir: Some(usage_dir.to_owned()),
        devices,
    })
}

/// The topology in its file format.
pub(super) fn to_toml(topology: &Topology) -> String {
    let quote = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let mut text = format!("name = {}\n", quote(&topology.name));
    if let Some(directory) = &topology.usage_dir {
        text += &format!("usage_dir = {}\n", quote(&directory.to_string_lossy()));
    }
    for device in &topology.devices {
        text += &format!(
            "\n[[device]]\nuuid = {}\nname = {}\nhbm_bytes = {}\n",
            quote(device.uuid.as_str()),
            quote(&device.name),
            device.hbm_bytes
        );
    }
    // A link in the file stands for both directions.
    for link in topology.links.iter().filter(|link| link.from < link.to) {
        let kind = match link.kind {
            LinkKind::SameDevice => continue,
            LinkKind::Nvlink => "nvlink",
            LinkKind::Pcie => "pcie",
            LinkKind::Host => "host",
        };
        text += &format!(
            "\n[[link]]\nbetween = [{}, {}]\nkind = {}\ngigabytes_per_second = {:?}\n",
            quote(link.from.as_str()),
            quote(link.to.as_str()),
            quote(kind),
            link.bytes_per_second as f64 / 1e9
        );
    }
    text
}
