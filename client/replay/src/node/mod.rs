//! A private node for one replay: a broker and its donors, as child processes that end with the replay.

mod shape;

use std::{
    fs::{self, File},
    io,
    os::unix::{
        fs::{DirBuilderExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use shape::{shrink, to_toml};
use swiftcache_client::donor::{Observation, Policy, PolicyConfig};
use swiftcache_proto::{domain::Device, topology::Topology};

use super::{ReplayError, plan::Lending, roofline::Gpu, sizing::Scale};

/// How long a process may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(15);
/// How long a process may take to exit after SIGTERM.
const LEAVE_LIMIT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(10);

// The donors' policy, in trace time. The values are the defaults of `swiftcache donate`.
const PERIOD: Duration = Duration::from_millis(250);
const SETTLE: Duration = Duration::from_secs(10);
const HORIZON: Duration = Duration::from_secs(2);
const HALF_LIFE: Duration = Duration::from_secs(120);
/// The shortest period of a donor's policy, wall-clock time.
const LEAST_PERIOD: Duration = Duration::from_millis(5);

/// How to build the node.
#[derive(Clone, Debug)]
pub struct NodePlan {
    /// The topology that the links come from: a name or a file.
    pub topology: String,
    /// The GPU that every device is, before its HBM is scaled down.
    pub gpu: Gpu,
    /// How much smaller the node is than a full-size one.
    pub scale: Scale,
    /// Donor processes, each on its own device. The busy model has one more device.
    pub donors: usize,
    /// Trace seconds per second of wall clock. The times of the donors' policy are divided by it.
    pub pace: f64,
    /// HBM that an elastic donor keeps free for its own model's growth, full-size bytes.
    pub headroom_bytes: u64,
    /// What donors lend.
    pub lending: Lending,
    /// The broker's program.
    pub broker: PathBuf,
    /// The `swiftcache` program.
    pub swiftcache: PathBuf,
    /// The directory of the node's socket and files. None: a new temporary directory.
    pub directory: Option<PathBuf>,
}

/// The node's directory.
#[derive(Debug)]
enum Directory {
    Temporary(tempfile::TempDir),
    Named(PathBuf),
}

impl Directory {
    fn path(&self) -> &Path {
        match self {
            Self::Temporary(directory) => directory.path(),
            Self::Named(path) => path,
        }
    }
}

/// A running node. Drop ends its processes, donors first, and removes its directory.
#[derive(Debug)]
pub struct PrivateNode {
    topology: Topology,
    usage_dir: PathBuf,
    socket: PathBuf,
    children: Vec<(String, Child)>,
    swiftcache: PathBuf,
    directory: Directory,
}

impl PrivateNode {
    /// Starts the broker and waits until it answers. [`start_donors`](Self::start_donors) starts the donors.
    ///
    /// # Errors
    /// When donors are to lend more than a GPU has, the topology is too small, the directory cannot be created, or the broker
    /// does not become ready.
    pub fn launch(plan: &NodePlan) -> Result<Self, ReplayError> {
        plan.lending.check(&plan.gpu)?;
        let directory = open_directory(plan.directory.as_deref())?;
        let usage_dir = directory.path().join("usage");
        let topology = shrink(plan, &usage_dir)?;
        let file = directory.path().join("topology.toml");
        let text = to_toml(&topology);
        write(&file, &text)?;
        fs::create_dir_all(&usage_dir).map_err(|source| at(&usage_dir, source))?;
        let socket = directory.path().join("broker.sock");
        let mut node = Self {
            topology,
            usage_dir,
            socket,
            children: Vec::new(),
            swiftcache: plan.swiftcache.clone(),
            directory,
        };
        let mut broker = node.tethered(&plan.broker);
        broker
            .arg("--socket")
            .arg(&node.socket)
            .args(["--probe", "simulated", "--topology"])
            .arg(&file);
        node.spawn("swiftcache-broker", broker)?;
        node.wait_until("swiftcache-broker", &mut |node| {
            Ok(UnixStream::connect(&node.socket).is_ok())
        })?;
        Ok(node)
    }

    /// Starts a donor on every device except the first, and waits until `ready` says that all of them
    /// lend.
    ///
    /// # Errors
    /// When a donor does not become ready.
    pub fn start_donors(
        &mut self,
        plan: &NodePlan,
        ready: &mut dyn FnMut() -> Result<bool, ReplayError>,
    ) -> Result<(), ReplayError> {
        let names: Vec<String> = (1..=plan.donors).map(|n| format!("donor-{n}")).collect();
        for (name, device) in names.iter().zip(self.donor_devices().to_vec()) {
            let mut donor = self.tethered(&self.swiftcache);
            let bytes = |full: u64| plan.scale.shrink(full).to_string();
            donor
                .args(["donate", "--name", name.as_str()])
                .args(["--device", device.uuid.as_str()])
                .args(["--slab", &plan.scale.slab_bytes().to_string()])
                .arg("--socket")
                .arg(&self.socket)
                .arg("--usage-dir")
                .arg(&self.usage_dir)
                // What it says of itself would stand between the lines of this program.
                .stdout(Stdio::null());
            let reserve = PolicyConfig::new(plan.gpu.hbm_bytes, 1).reserve_bytes;
            match plan.lending {
                // Its engine takes memory as it needs it: with a reserve that is given it is never settled.
                Lending::Elastic => donor
                    .arg("--elastic")
                    .args(["--reserve", &bytes(reserve)])
                    .args(["--headroom", &bytes(plan.headroom_bytes)])
                    .args(["--period", &shortened(PERIOD, plan.pace)])
                    .args(["--settle", &shortened(SETTLE, plan.pace)])
                    .args(["--horizon", &shortened(HORIZON, plan.pace)])
                    .args(["--half-life", &shortened(HALF_LIFE, plan.pace)]),
                Lending::Fixed(size) => donor.args(["--bytes", &bytes(size)]),
                Lending::Idle => donor.args(["--bytes", &bytes(plan.gpu.hbm_bytes - reserve)]),
            };
            self.spawn(name, donor)?;
        }
        self.wait_until("donors", &mut |_| ready())
            .map_err(|error| match error {
                ReplayError::Process { process, problem } if process == "donors" => {
                    let problem = format!("{problem}{}", self.why_not(plan));
                    ReplayError::Process { process, problem }
                }
                other => other,
            })
    }

    /// What each donor would come to lend, and why.
    fn why_not(&self, plan: &NodePlan) -> String {
        if plan.lending != Lending::Elastic {
            return "\n  The donors' logs say what their offers met".to_owned();
        }
        let mut reasons = String::new();
        for device in self.donor_devices() {
            let file = self.usage_dir.join(device.uuid.as_str());
            let used = fs::read_to_string(file).ok();
            let used: u64 = used.and_then(|used| used.parse().ok()).unwrap_or(0);
            let policy = PolicyConfig {
                least_headroom_bytes: plan.scale.shrink(plan.headroom_bytes),
                ..PolicyConfig::new(device.hbm_bytes, plan.scale.slab_bytes())
            };
            let seen = Observation {
                now: Duration::ZERO,
                free: device.hbm_bytes.saturating_sub(used),
                total: device.hbm_bytes,
                donated: 0,
                offered: 0,
                held: None,
            };
            // An explanation that cannot be given costs the explanation only.
            if let Ok(decision) = Policy::new(policy).map(|mut policy| policy.step(seen)) {
                let full = |bytes: u64| plan.scale.grow(bytes) as f64 / f64::from(1 << 30);
                reasons += &format!(
                    "\n  {}: {:.1} of {:.1} GiB free; after {:.1} GiB reserve and {:.1} GiB for its own growth {:.1} GiB could be \
                     lent, in slabs of {:.1} GiB",
                    device.uuid,
                    full(seen.free),
                    full(seen.total),
                    full(decision.reserve),
                    full(decision.headroom),
                    full(decision.ceiling),
                    full(plan.scale.slab_bytes()),
                );
            }
        }
        reasons + "\n  A smaller --donor-headroom or --donor-model leaves more to lend"
    }

    /// The broker's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The topology of the scaled node.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The directory where each neighbour's HBM use is written.
    pub fn usage_dir(&self) -> &Path {
        &self.usage_dir
    }

    /// The busy model's device.
    pub fn busy_device(&self) -> &Device {
        &self.topology.devices[0]
    }

    /// The donors' devices.
    pub fn donor_devices(&self) -> &[Device] {
        &self.topology.devices[1..]
    }

    /// The child processes, by name.
    pub fn processes(&self) -> impl Iterator<Item = (&str, u32)> {
        self.children
            .iter()
            .map(|(name, child)| (name.as_str(), child.id()))
    }

    /// A command whose process ends when this process ends, in whatever way this process ends.
    fn tethered(&self, program: &Path) -> Command {
        let mut command = Command::new(&self.swiftcache);
        command
            .args(["tether", &std::process::id().to_string(), "--"])
            .arg(program)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        // The settings in this process's environment are not meant for its children.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("SWIFTCACHE_") {
                command.env_remove(name);
            }
        }
        command
    }

    fn spawn(&mut self, name: &str, mut command: Command) -> Result<(), ReplayError> {
        let log = self.log(name);
        let file = File::create(&log).map_err(|source| at(&log, source))?;
        let child = command.stderr(file).spawn();
        let child = child.map_err(|error| ReplayError::Process {
            process: name.to_owned(),
            problem: format!("cannot start {}: {error}", self.swiftcache.display()),
        })?;
        self.children.push((name.to_owned(), child));
        Ok(())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.log"))
    }

    fn wait_until(
        &mut self,
        what: &str,
        ready: &mut dyn FnMut(&Self) -> Result<bool, ReplayError>,
    ) -> Result<(), ReplayError> {
        let started = Instant::now();
        loop {
            self.check_alive()?;
            if ready(self)? {
                return Ok(());
            }
            if started.elapsed() > READY_LIMIT {
                return Err(ReplayError::Process {
                    process: what.to_owned(),
                    problem: format!(
                        "not ready after {} s{}",
                        READY_LIMIT.as_secs(),
                        self.end_of_log(what)
                    ),
                });
            }
            std::thread::sleep(POLL);
        }
    }

    /// Checks that every process still runs.
    ///
    /// # Errors
    /// When a process has ended. The error names it and quotes the end of its log.
    pub fn check_alive(&mut self) -> Result<(), ReplayError> {
        let mut ended = None;
        for (name, child) in &mut self.children {
            if let Ok(Some(status)) = child.try_wait() {
                ended = Some((name.clone(), status));
            }
        }
        match ended {
            None => Ok(()),
            Some((name, status)) => Err(ReplayError::Process {
                problem: format!("ended early ({status}){}", self.end_of_log(&name)),
                process: name,
            }),
        }
    }

    fn end_of_log(&self, name: &str) -> String {
        let text = fs::read_to_string(self.log(name)).unwrap_or_default();
        let lines: Vec<&str> = text.trim_end().lines().collect();
        let tail = &lines[lines.len().saturating_sub(5)..];
        if tail.is_empty() {
            String::new()
        } else {
            format!("; the end of its log:\n  {}", tail.join("\n  "))
        }
    }
}

impl Drop for PrivateNode {
    fn drop(&mut self) {
        // Donors first, so that they can withdraw while the broker still runs.
        while let Some((_, mut child)) = self.children.pop() {
            end(&mut child);
        }
        if let Directory::Named(path) = &self.directory {
            // An error does not matter: the next launch removes what is left.
            let _ = fs::remove_dir_all(path);
        }
    }
}

/// Asks a process to exit, and kills it when it does not.
fn end(child: &mut Child) {
    let asked = i32::try_from(child.id()).is_ok_and(|pid| {
        // The child is not reaped yet, so the pid is still its own.
        kill(Pid::from_raw(pid), Signal::SIGTERM).is_ok()
    });
    let started = Instant::now();
    while asked && started.elapsed() < LEAVE_LIMIT {
        match child.try_wait() {
            Ok(None) => std::thread::sleep(POLL),
            _ => return,
        }
    }
    // Both calls fail only when the process is already gone.
    let _ = child.kill();
    let _ = child.wait();
}

fn at(path: &Path, source: io::Error) -> ReplayError {
    ReplayError::File {
        path: path.to_owned(),
        source,
    }
}

fn write(path: &Path, text: &str) -> Result<(), ReplayError> {
    fs::write(path, text).map_err(|source| at(path, source))
}

/// Opens a private directory. The parent of a named directory may be writable by other users. So a named directory
/// must belong to this user, and no running node may use it.
fn open_directory(named: Option<&Path>) -> Result<Directory, ReplayError> {
    let Some(path) = named else {
        let directory = tempfile::Builder::new().prefix("swiftcache-").tempdir();
        return directory
            .map(Directory::Temporary)
            .map_err(|source| at(&std::env::temp_dir(), source));
    };
    if UnixStream::connect(path.join("broker.sock")).is_ok() {
        return Err(at(
            path,
            io::Error::new(
                io::ErrorKind::AddrInUse,
                "another node is running in this directory",
            ),
        ));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() => {
            fs::remove_dir_all(path).map_err(|source| at(path, source))?;
        }
        Ok(_) => {
            let problem =
                "exists and is not a directory of yours; remove it or set XDG_RUNTIME_DIR";
            return Err(at(path, io::Error::other(problem)));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at(path, error)),
    }
    let made = fs::DirBuilder::new().mode(0o700).create(path);
    made.map_err(|source| at(path, source))?;
    Ok(Directory::Named(path.to_owned()))
}

/// The wall-clock time that a trace time takes at `pace`, as a flag's value.
fn shortened(time: Duration, pace: f64) -> String {
    let short = Duration::from_secs_f64(time.as_secs_f64() / pace);
    format!("{}us", short.max(LEAST_PERIOD).as_micros())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{models::ModelShape, trace::BLOCK_TOKENS};

    fn plan(donors: usize, topology: &str) -> NodePlan {
        let model = ModelShape::by_name("qwen3-8b").unwrap();
        NodePlan {
            topology: topology.to_owned(),
            gpu: *Gpu::by_name("h100-sxm").unwrap(),
            scale: Scale::new(model, BLOCK_TOKENS, 1024.0).unwrap(),
            donors,
            pace: 60.0,
            headroom_bytes: 4 << 30,
            lending: Lending::Elastic,
            broker: "/nowhere/broker".into(),
            swiftcache: "/nowhere/swiftcache".into(),
            directory: None,
        }
    }

    #[test]
    fn the_shrunk_node_survives_its_own_file() {
        for name in ["hgx-8", "pcie-4"] {
            let topology = shrink(&plan(3, name), Path::new("/tmp/a \"b\"")).unwrap();
            assert_eq!(topology.devices.len(), 4);
            assert_eq!(topology.devices[3].hbm_bytes, 80 << 20);
            let read = Topology::parse(&to_toml(&topology), "test").unwrap();
            assert_eq!(read.devices, topology.devices);
            assert_eq!(read.usage_dir, topology.usage_dir);
            let key = |link: &swiftcache_proto::domain::Link| (link.from.clone(), link.to.clone());
            let sorted = |mut links: Vec<_>| {
                links.sort_by_key(key);
                links
            };
            assert_eq!(sorted(read.links), sorted(topology.links));
        }
    }

    #[test]
    fn too_many_donors_are_refused() {
        for donors in [0, 4] {
            let error = shrink(&plan(donors, "pcie-4"), Path::new("/tmp")).unwrap_err();
            assert!(error.to_string().contains("takes 1 to 3"), "{error}");
        }
    }

    #[test]
    fn what_no_gpu_can_lend_is_refused_before_anything_is_started() {
        let launch = |size| {
            let lending = Lending::Fixed(size);
            let plan = NodePlan {
                lending,
                ..plan(1, "hgx-8")
            };
            PrivateNode::launch(&plan).unwrap_err().to_string()
        };
        let error = launch(1_000_000_000_000);
        for part in ["--donor: ", "1.0 TB", "h100-sxm", "85.9 GB"] {
            assert!(error.contains(part), "{part:?} is not in {error}");
        }
        // The twin: what a GPU has is tried, as far as there is a program.
        let error = launch(80 << 30);
        assert!(error.contains("/nowhere/swiftcache"), "{error}");
    }

    #[test]
    fn a_missing_program_is_named_and_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("demo");
        let plan = NodePlan {
            directory: Some(directory.clone()),
            ..plan(1, "hgx-8")
        };
        let error = PrivateNode::launch(&plan).unwrap_err().to_string();
        assert!(error.contains("/nowhere/swiftcache"), "{error}");
        assert!(!directory.exists());
    }

    #[test]
    fn a_named_directory_must_be_ours() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("demo");
        std::os::unix::fs::symlink(parent.path(), &path).unwrap();
        let error = open_directory(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("not a directory of yours"), "{error}");
    }
}
