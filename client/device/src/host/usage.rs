//! How much of each simulated device's HBM is used, by this process, by others and by simulated neighbours.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use swiftcache_proto::domain::{Device, DeviceUuid};

use super::{DeviceError, Result};

/// The layers of this process that share a usage directory, since they also share its files.
static OPEN: Mutex<Vec<(PathBuf, Weak<Usage>)>> = Mutex::new(Vec::new());

/// HBM in use.
#[derive(Debug)]
pub(super) struct Usage {
    own: Mutex<HashMap<DeviceUuid, Own>>,
    dir: Option<PathBuf>,
}

/// What this process uses of one device.
#[derive(Debug, Default)]
struct Own {
    bytes: u64,
    /// `<dir>/alloc/<uuid>.<pid>`, locked as long as this process lives: an unlocked file is a dead process's,
    /// whoever may have its number now.
    file: Option<File>,
}

impl Usage {
    /// The account of a usage directory, or one of this layer alone.
    pub(super) fn open(dir: Option<&Path>, devices: &[Device]) -> Result<Arc<Self>> {
        let Some(dir) = dir else {
            return Ok(Arc::new(Self {
                own: Mutex::default(),
                dir: None,
            }));
        };
        let unavailable = |problem: String| DeviceError::Unavailable {
            backend: "host",
            problem,
        };
        if let Some(device) = devices.iter().find(|device| {
            let uuid = device.uuid.as_str();
            uuid.contains('/') || uuid.starts_with('.')
        }) {
            let uuid = &device.uuid;
            return Err(unavailable(format!(
                "device {uuid} cannot be a file name in {}",
                dir.display()
            )));
        }
        let prepared = std::fs::create_dir_all(dir.join("alloc")).and_then(|()| dir.canonicalize());
        let dir = prepared
            .map_err(|error| unavailable(format!("usage directory {}: {error}", dir.display())))?;
        let mut open = OPEN.lock();
        open.retain(|(_, usage)| usage.strong_count() > 0);
        let shared = open.iter().find(|(path, _)| *path == dir);
        if let Some(usage) = shared.and_then(|(_, usage)| usage.upgrade()) {
            return Ok(usage);
        }
        let usage = Arc::new(Self {
            own: Mutex::default(),
            dir: Some(dir.clone()),
        });
        open.push((dir, Arc::downgrade(&usage)));
        Ok(usage)
    }

    /// Bytes of `device` that anybody uses.
    pub(super) fn used(&self, device: &DeviceUuid) -> Result<u64> {
        let own = self.own.lock().get(device).map_or(0, |own| own.bytes);
        self.used_by_others(device)
            .map(|others| own.saturating_add(others))
            .map_err(|error| self.failed(device, &error))
    }

    /// Takes `bytes` of `device`, which holds `total`, until the claim is dropped.
    pub(super) fn claim(
        usage: &Arc<Self>,
        device: &DeviceUuid,
        bytes: u64,
        total: u64,
    ) -> Result<Claim> {
        let out_of_memory = |problem: String| DeviceError::OutOfMemory {
            uuid: device.clone(),
            bytes,
            problem,
        };
        if bytes == 0 {
            return Err(out_of_memory(
                "an allocation has at least one byte".to_owned(),
            ));
        }
        let failed = |error: io::Error| usage.failed(device, &error);
        let mut own = usage.own.lock();
        // Held until the new total is on file, so that two processes cannot take the same bytes.
        let _turn = usage.take_turn().map_err(failed)?;
        let used_here = own.get(device).map_or(0, |own| own.bytes);
        let others = usage.used_by_others(device).map_err(failed)?;
        let used = used_here.saturating_add(others);
        if used.checked_add(bytes).is_none_or(|sum| sum > total) {
            return Err(out_of_memory(format!("{used} of {total} bytes are in use")));
        }
        let own = own.entry(device.clone()).or_default();
        if let (Some(dir), None) = (&usage.dir, &own.file) {
            own.file = Some(open_own(dir, device).map_err(failed)?);
        }
        own.bytes += bytes;
        if let Err(error) = own.publish() {
            own.bytes -= bytes;
            return Err(failed(error));
        }
        Ok(Claim {
            usage: Arc::clone(usage),
            device: device.clone(),
            bytes,
        })
    }

    fn take_turn(&self) -> io::Result<Option<File>> {
        let Some(dir) = &self.dir else {
            return Ok(None);
        };
        let path = dir.join("alloc").join(".lock");
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
        Ok(Some(file))
    }

    /// What live processes and simulated neighbours have on file. Files of dead processes are removed.
    fn used_by_others(&self, device: &DeviceUuid) -> io::Result<u64> {
        let Some(dir) = &self.dir else {
            return Ok(0);
        };
        let mut used = match std::fs::read_to_string(dir.join(device.as_str())) {
            Ok(text) => decimal(&text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
        let own = own_name(device);
        let prefix = format!("{device}.");
        for entry in std::fs::read_dir(dir.join("alloc"))? {
            let entry = entry?;
            let name = entry.file_name();
            let theirs = name
                .to_str()
                .is_some_and(|name| name.starts_with(&prefix) && name != own);
            if !theirs {
                continue;
            }
            let Ok(file) = File::open(entry.path()) else {
                continue; // its process removed it on the way out
            };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
                let _ = std::fs::remove_file(entry.path());
            } else {
                used = used.saturating_add(decimal(&io::read_to_string(file)?)?);
            }
        }
        Ok(used)
    }

    fn failed(&self, device: &DeviceUuid, error: &io::Error) -> DeviceError {
        let dir = self.dir.as_deref().unwrap_or(Path::new(""));
        DeviceError::Failed {
            operation: "accounting HBM",
            device: device.clone(),
            problem: format!("usage directory {}: {error}", dir.display()),
        }
    }
}

impl Drop for Usage {
    fn drop(&mut self) {
        let Some(dir) = &self.dir else { return };
        for (device, _) in self.own.get_mut().drain() {
            // Left behind it would do no harm: it is no longer locked.
            let _ = std::fs::remove_file(dir.join("alloc").join(own_name(&device)));
        }
    }
}

impl Own {
    fn publish(&self) -> io::Result<()> {
        // A fixed width, written at once: a reader never sees half of a number.
        self.file.as_ref().map_or(Ok(()), |file| {
            file.write_all_at(format!("{:020}\n", self.bytes).as_bytes(), 0)
        })
    }
}

fn own_name(device: &DeviceUuid) -> String {
    format!("{device}.{}", std::process::id())
}

fn open_own(dir: &Path, device: &DeviceUuid) -> io::Result<File> {
    let path = dir.join("alloc").join(own_name(device));
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)?;
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
        let problem = format!("{} belongs to a live process ({error})", path.display());
        io::Error::other(problem)
    })?;
    Ok(file)
}

fn decimal(text: &str) -> io::Result<u64> {
    let text = text.trim();
    if text.is_empty() {
        return Ok(0); // created, not yet written
    }
    text.parse()
        .map_err(|_| io::Error::other(format!("{text:?} is not a number of bytes")))
}

/// HBM taken; given back when dropped.
#[derive(Debug)]
pub(super) struct Claim {
    usage: Arc<Usage>,
    device: DeviceUuid,
    bytes: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(own) = self.usage.own.lock().get_mut(&self.device) {
            own.bytes -= self.bytes;
            if let Err(error) = own.publish() {
                tracing::warn!(device = %self.device, %error, "freed HBM stays on file as used");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(hbm_bytes: u64) -> Device {
        Device {
            uuid: "SIM-0".parse().unwrap(),
            name: "simulated".to_owned(),
            hbm_bytes,
            ordinal: 0,
        }
    }

    #[test]
    fn neighbours_live_and_dead_processes_count_for_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(1000);
        let usage = Usage::open(Some(dir.path()), std::slice::from_ref(&device)).unwrap();
        assert_eq!(usage.used(&device.uuid).unwrap(), 0);

        std::fs::write(dir.path().join("SIM-0"), "300\n").unwrap();
        let live_path = dir.path().join("alloc/SIM-0.1");
        std::fs::write(&live_path, "50").unwrap();
        // Another open file description stands for another process, which is what flock goes by.
        let live = File::open(&live_path).unwrap();
        rustix::fs::flock(&live, FlockOperation::LockExclusive).unwrap();
        let dead_path = dir.path().join("alloc/SIM-0.2");
        std::fs::write(&dead_path, "400").unwrap();
        std::fs::write(dir.path().join("alloc/SIM-00.3"), "7").unwrap();
        assert_eq!(usage.used(&device.uuid).unwrap(), 350);
        assert!(!dead_path.exists() && live_path.exists());

        let claim = Usage::claim(&usage, &device.uuid, 650, 1000).unwrap();
        assert_eq!(usage.used(&device.uuid).unwrap(), 1000);
        let own = dir.path().join("alloc").join(own_name(&device.uuid));
        assert_eq!(
            decimal(&std::fs::read_to_string(&own).unwrap()).unwrap(),
            650
        );
        let refused = Usage::claim(&usage, &device.uuid, 1, 1000).unwrap_err();
        assert!(
            matches!(refused, DeviceError::OutOfMemory { bytes: 1, .. }),
            "{refused}"
        );

        drop(claim);
        assert_eq!(usage.used(&device.uuid).unwrap(), 350);
        drop(usage);
        assert!(!own.exists());
    }

    #[test]
    fn layers_of_one_process_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(1000);
        let open = || Usage::open(Some(dir.path()), std::slice::from_ref(&device)).unwrap();
        let (one, other) = (open(), open());
        let _claim = Usage::claim(&one, &device.uuid, 600, 1000).unwrap();
        assert_eq!(other.used(&device.uuid).unwrap(), 600);
        assert!(Usage::claim(&other, &device.uuid, 600, 1000).is_err());
    }

    #[test]
    fn a_file_that_is_no_number_is_named_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        let device = device(1000);
        std::fs::write(dir.path().join("SIM-0"), "lots").unwrap();
        let usage = Usage::open(Some(dir.path()), std::slice::from_ref(&device)).unwrap();
        let error = usage.used(&device.uuid).unwrap_err().to_string();
        assert!(error.contains("\"lots\" is not a number"), "{error}");
    }
}
