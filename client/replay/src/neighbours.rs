//! The neighbours: the donors' own models. While trace time goes by, this module works out how much HBM each of
//! them needs, and writes it to the files that the simulated probe reads.

use std::{
    fs,
    path::{Path, PathBuf},
};

use swiftcache_proto::domain::Device;

use super::{ReplayError, donor_load::TokensInFlight, sizing::Scale};

/// The largest share of its GPU's HBM that a neighbour uses. When it needs more, its requests wait in a queue.
pub(crate) const MOST_SHARE: f64 = 0.95;

/// One neighbour's device.
#[derive(Clone, Debug)]
struct Neighbour {
    file: PathBuf,
    most_bytes: u64,
    written: Option<u64>,
}

/// The neighbours' HBM use, in bytes of the scaled node.
#[derive(Debug)]
pub struct NeighbourUse {
    neighbours: Vec<Neighbour>,
    curve: TokensInFlight,
    base_bytes: u64,
    token_bytes: u64,
    scale: Scale,
}

impl NeighbourUse {
    /// One neighbour on each of `devices`, whose HBM is already scaled. A neighbour uses `base_bytes` for weights
    /// and activations and `token_bytes` for each token in flight, both full-size. All neighbours have the same
    /// load, and each is at another phase of it.
    ///
    /// # Errors
    /// When `usage_dir` cannot be created.
    pub fn new(
        usage_dir: &Path,
        devices: &[Device],
        curve: TokensInFlight,
        base_bytes: u64,
        token_bytes: u64,
        scale: Scale,
    ) -> Result<Self, ReplayError> {
        fs::create_dir_all(usage_dir).map_err(|source| ReplayError::File {
            path: usage_dir.to_owned(),
            source,
        })?;
        let neighbours = devices.iter().map(|device| Neighbour {
            file: usage_dir.join(device.uuid.as_str()),
            most_bytes: (device.hbm_bytes as f64 * MOST_SHARE) as u64,
            written: None,
        });
        Ok(Self {
            neighbours: neighbours.collect(),
            curve,
            base_bytes,
            token_bytes,
            scale,
        })
    }

    /// Writes how much HBM each neighbour uses at `now_s`. It replaces a file as a whole, so that a reader never
    /// sees half a number.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn set(&mut self, now_s: f64) -> Result<(), ReplayError> {
        let count = self.neighbours.len() as f64;
        for (index, neighbour) in self.neighbours.iter_mut().enumerate() {
            let tokens = self.curve.at(now_s, index as f64 / count);
            let full = self.base_bytes + tokens * self.token_bytes;
            let bytes = self.scale.shrink(full).min(neighbour.most_bytes);
            if neighbour.written != Some(bytes) {
                replace(&neighbour.file, &bytes.to_string())?;
                neighbour.written = Some(bytes);
            }
        }
        Ok(())
    }
}

fn replace(path: &Path, text: &str) -> Result<(), ReplayError> {
    let fresh = path.with_file_name(format!(
        ".{}.new",
        path.file_name().unwrap_or_default().to_string_lossy()
    ));
    let result = fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, path));
    result.map_err(|source| ReplayError::File {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        donor_load::NeighbourRequest,
        models::ModelShape,
        roofline::{Engine, Gpu, Roofline},
        trace::BLOCK_TOKENS,
    };

    #[test]
    fn usage_rises_with_the_load_and_stays_on_the_device() {
        let model = *ModelShape::by_name("qwen3-8b").unwrap();
        let gpu = *Gpu::by_name("h100-sxm").unwrap();
        let engine = Engine::VLLM;
        let load = |arrival_s, input_tokens| NeighbourRequest {
            arrival_s,
            input_tokens,
            output_tokens: 1000,
        };
        let requests = [load(10.0, 100_000), load(60.0, 4_000_000), load(999.0, 1)];
        let curve = TokensInFlight::new(&requests, &Roofline { model, gpu, engine }, 8);
        let dir = tempfile::tempdir().unwrap();
        let scale = Scale::new(&model, BLOCK_TOKENS, 1024.0).unwrap();
        let hbm = scale.shrink(80 << 30);
        let devices = [Device {
            uuid: "SIM-1".parse().unwrap(),
            name: "simulated".to_owned(),
            hbm_bytes: hbm,
            ordinal: 1,
        }];
        let mut uses =
            NeighbourUse::new(dir.path(), &devices, curve, 1 << 30, 1 << 17, scale).unwrap();
        let mut used = |now_s| -> u64 {
            uses.set(now_s).unwrap();
            let text = fs::read_to_string(dir.path().join("SIM-1")).unwrap();
            text.parse().unwrap()
        };
        assert_eq!(used(0.0), 1 << 20);
        // 101,000 tokens of 128 bytes each, rounded up to whole pages.
        assert_eq!(
            used(10.5),
            ((1 << 20) + 101_000 * 128_u64).next_multiple_of(4096)
        );
        assert_eq!(used(61.0), (hbm as f64 * 0.95) as u64);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
