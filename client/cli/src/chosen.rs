//! The flag `--device`: one device of the node, or for some commands all.

use std::str::FromStr;

use swiftcache_proto::domain::{Device, DeviceUuid, Medium};

use super::CliError;

/// Which devices to lend from: one, or all of the node's GPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    All,
    One(DeviceUuid),
}

impl FromStr for Chosen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(Self::All),
            uuid => uuid.parse().map(Self::One),
        }
    }
}

impl Chosen {
    /// Whether it names host memory.
    pub(super) fn is_host_memory(&self) -> bool {
        matches!(self, Self::One(uuid) if uuid.medium() == Medium::Host)
    }

    /// The disk that it names, if it does: `DISK-0`.
    pub(super) fn disk(&self) -> Option<&DeviceUuid> {
        match self {
            Self::One(uuid) => Some(uuid).filter(|uuid| is_disk(uuid.as_str())),
            Self::All => None,
        }
    }

    /// The chosen devices among `known`: one at least, or an error. Host memory is only chosen by its name.
    pub(super) fn among<'a>(&self, known: &'a [Device]) -> Result<Vec<&'a Device>, CliError> {
        let chosen: Vec<&Device> = known
            .iter()
            .filter(|device| match self {
                Self::All => device.uuid.medium() == Medium::Hbm,
                Self::One(uuid) => device.uuid == *uuid,
            })
            .collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let known: Vec<&str> = known.iter().map(|device| device.uuid.as_str()).collect();
        Err(CliError::Usage(match self {
            Self::All => "--device: the node has no device".to_owned(),
            Self::One(uuid) => format!(
                "--device: the node has no {uuid}; takes one of {}, or all",
                known.join(", ")
            ),
        }))
    }
}

fn is_disk(name: &str) -> bool {
    let digits = name.strip_prefix("DISK-");
    digits.is_some_and(|digits| {
        (1..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// One device, by its UUID or its number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Number(u32),
    Uuid(DeviceUuid),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            Ok(number) => Ok(Self::Number(number)),
            Err(_) => text.parse().map(Self::Uuid),
        }
    }
}

impl Place {
    /// The device among `known`.
    pub(super) fn of(&self, known: &[Device]) -> Result<Device, CliError> {
        let named = known.iter().find(|device| match self {
            Self::Number(number) => device.ordinal == *number,
            Self::Uuid(uuid) => device.uuid == *uuid,
        });
        named.cloned().ok_or_else(|| {
            let this = match self {
                Self::Number(number) => number.to_string(),
                Self::Uuid(uuid) => uuid.to_string(),
            };
            let names = known
                .iter()
                .map(|device| format!("{} ({})", device.uuid, device.ordinal));
            let names: Vec<String> = names.collect();
            CliError::Usage(format!(
                "--device: the node has no {this}; takes one of {}, or its number",
                names.join(", ")
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_goes_by_its_name_or_its_number() {
        let device = |ordinal| Device {
            uuid: format!("GPU-{ordinal}").parse().unwrap(),
            name: "simulated".to_owned(),
            hbm_bytes: 1 << 30,
            ordinal,
        };
        let known = [device(0), device(3)];
        let of = |text: &str| text.parse::<Place>().unwrap().of(&known);
        assert_eq!(of("3").unwrap(), known[1]);
        assert_eq!(of("GPU-0").unwrap(), known[0]);
        for other in ["1", "GPU-1"] {
            let refused = of(other).unwrap_err().to_string();
            assert!(
                refused.contains(other) && refused.contains("GPU-3 (3)"),
                "{refused}"
            );
        }
    }
}
