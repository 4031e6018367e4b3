//! A GPU node whose driver does not answer for one of its GPUs. Then that GPU or that figure is missing, and nothing
//! else. The broker and the command are real, and use a stub of NVML whose answers the test chooses.

use std::{
    env, fs,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use nvml_wrapper::{Nvml, error::NvmlError};
use serde_json::Value;
use swiftcache_proto::v1;
use swiftcache_stub_nvml::{HBM_BYTES, RESERVED_BYTES, USED_BYTES, uuid};
use swiftcache_tests::{
    engine::eventually,
    programs::{Program, program},
    wire::Wire,
};

const LOST: u32 = 15;
const NOT_SUPPORTED: u32 = 3;
const UNKNOWN: u32 = 999;
/// The codes that NVML answers with when it cannot tell something about a GPU.
const CODES: [u32; 3] = [LOST, NOT_SUPPORTED, UNKNOWN];

/// The library of the stub. Cargo builds it beside this test.
fn stub() -> Result<PathBuf> {
    let library = env::current_exe()?.with_file_name("libswiftcache_stub_nvml.so");
    ensure!(library.is_file(), "{} is missing", library.display());
    Ok(library)
}

/// A machine with three GPUs, and a broker that finds them through NVML.
struct Machine {
    directory: tempfile::TempDir,
    library: PathBuf,
    broker: Option<Program>,
}

impl Machine {
    /// A machine whose NVML is `library`, with these lines in the stub's file.
    fn with(library: PathBuf, answers: &str) -> Result<Self> {
        let machine = Self {
            directory: tempfile::tempdir()?,
            library,
            broker: None,
        };
        machine.answers(answers)?;
        Ok(machine)
    }

    fn started(answers: &str) -> Result<Self> {
        Self::with(stub()?, answers)?.start()
    }

    fn start(mut self) -> Result<Self> {
        self.restart()?;
        Ok(self)
    }

    /// Starts the broker, after killing the one that runs.
    fn restart(&mut self) -> Result<()> {
        self.broker = None;
        let mut broker =
            Program::start(self.broker_command()?.stderr(fs::File::create(self.log())?))?;
        eventually("the broker to listen", || {
            ensure!(!broker.has_ended()?, "{}", fs::read_to_string(self.log())?);
            Ok(UnixStream::connect(self.socket()).is_ok())
        })?;
        self.broker = Some(broker);
        // The sockets are bound before the ledger is read. An answer says that it has been read.
        self.node()?;
        Ok(())
    }

    fn broker_command(&self) -> Result<Command> {
        let mut command = self.command("swiftcache-broker")?;
        command.arg("--socket").arg(self.socket());
        Ok(command)
    }

    fn command(&self, name: &str) -> Result<Command> {
        let mut command = Command::new(program(name)?);
        command
            .env("SWIFTCACHE_LIBNVML", &self.library)
            .env("SWIFTCACHE_LIBCUDA", "/nowhere/libcuda.so")
            .env("SWIFTCACHE_STUB_DIR", self.path());
        Ok(command)
    }

    /// Makes NVML answer by these lines from now on.
    fn answers(&self, answers: &str) -> Result<()> {
        let file = self.path().join("nvml");
        let fresh = self.path().join("nvml.new");
        fs::write(&fresh, answers)?;
        Ok(fs::rename(fresh, file)?)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn socket(&self) -> PathBuf {
        self.path().join("broker.sock")
    }

    fn log(&self) -> PathBuf {
        self.path().join("log")
    }

    /// Waits until the broker's log has all of this: the broker goes on before it is written.
    fn says(&self, what: &[&str]) -> Result<()> {
        let mut log = String::new();
        let said = eventually("the broker's log to say it", || {
            log = fs::read_to_string(self.log())?;
            Ok(what.iter().all(|what| log.contains(what)))
        });
        said.with_context(|| format!("{what:?} in {log}"))
    }

    fn node(&self) -> Result<v1::GetNodeResponse> {
        let wire = Wire::new(&self.socket())?;
        let mut admin = wire.admin();
        Ok(wire
            .wait(admin.get_node(v1::GetNodeRequest {}))?
            .into_inner())
    }

    fn swiftcache(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = self.command("swiftcache")?;
        command
            .args(arguments)
            .env("SWIFTCACHE_SOCKET", self.socket());
        Ok(command.output()?)
    }

    fn status(&self) -> Result<(Value, String)> {
        let json = self.swiftcache(&["status", "--json"])?;
        ensure!(json.status.success(), "{json:?}");
        let text = self.swiftcache(&["status"])?;
        Ok((
            serde_json::from_slice(&json.stdout)?,
            String::from_utf8(text.stdout)?,
        ))
    }
}

fn link(node: &v1::GetNodeResponse, from: u32, to: u32) -> Option<&v1::Link> {
    let joins = |link: &&v1::Link| link.from_uuid == uuid(from) && link.to_uuid == uuid(to);
    node.links.iter().find(joins)
}

fn device(node: &v1::GetNodeResponse, number: u32) -> Option<&v1::DeviceStatus> {
    let is = |status: &&v1::DeviceStatus| {
        (status.device.as_ref()).is_some_and(|device| device.uuid == uuid(number))
    };
    node.devices.iter().find(is)
}

/// Checks that the broker knows everything about a GPU.
fn whole(node: &v1::GetNodeResponse, number: u32) -> Result<()> {
    let status = device(node, number).with_context(|| format!("GPU {number} is missing"))?;
    let device = status.device.as_ref().context("no device")?;
    ensure!(
        device.name == "stub GPU" && device.hbm_bytes == HBM_BYTES,
        "{status:?}"
    );
    ensure!(
        !status.hbm_used_unknown && status.problem.is_empty(),
        "{status:?}"
    );
    ensure!(
        status.hbm_used_bytes == RESERVED_BYTES + USED_BYTES,
        "{status:?}"
    );
    Ok(())
}

/// Checks that GPUs 0 and 2 and the link between them are the same as on the machine without faults.
fn others_are_whole(node: &v1::GetNodeResponse, well: &v1::GetNodeResponse) -> Result<()> {
    ensure!(node.probe == "nvml", "{}", node.probe);
    for (from, to) in [(0, 2), (2, 0)] {
        whole(node, from)?;
        let (now, usual) = (link(node, from, to), link(well, from, to));
        ensure!(now.is_some() && now == usual, "{now:?} is not {usual:?}");
    }
    Ok(())
}

#[test]
fn a_machine_that_is_well_has_all_its_gpus() -> Result<()> {
    let machine = Machine::started("")?;
    let node = machine.node()?;
    ensure!(
        node.devices.len() == 3 && node.left_out.is_empty(),
        "{node:?}"
    );
    for number in 0..3 {
        whole(&node, number)?;
    }
    let nvlink = link(&node, 0, 1).context("no link")?;
    ensure!(nvlink.kind() == v1::LinkKind::Nvlink && nvlink.bytes_per_second > 0);
    let (json, text) = machine.status()?;
    ensure!(
        json["simulated"] == false && !text.contains("SIMULATED"),
        "{text}"
    );
    ensure!(!fs::read_to_string(machine.log())?.contains("WARN"));
    Ok(())
}

/// What is missing when a call about a GPU is answered with an error at start.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cost {
    /// The GPU is left out.
    Gpu,
    /// The GPU is listed, and the broker says which fact is missing.
    Figure,
    /// The GPU is listed, and nothing that matters is missing.
    Nothing,
}

#[test]
fn an_answer_that_is_missing_at_start_costs_that_gpu_or_that_figure_only() -> Result<()> {
    use Cost::{Figure, Gpu, Nothing};
    // The costs of each call's codes, in the order of CODES: lost, not supported, unknown.
    let calls = [
        ("nvmlDeviceGetHandleByIndex_v2", [Gpu, Gpu, Gpu]),
        ("nvmlDeviceGetUUID", [Gpu, Gpu, Gpu]),
        ("nvmlDeviceGetMigMode", [Gpu, Nothing, Figure]),
        ("nvmlDeviceGetName", [Gpu, Figure, Figure]),
        ("nvmlDeviceGetMemoryInfo_v2", [Gpu, Figure, Figure]),
        ("nvmlDeviceGetPciInfo_v3", [Gpu, Figure, Figure]),
        ("nvmlDeviceGetP2PStatus", [Figure, Nothing, Figure]),
        ("nvmlDeviceGetNvLinkState", [Nothing; 3]),
        ("nvmlDeviceGetNvLinkVersion", [Nothing; 3]),
        ("nvmlDeviceGetNvLinkRemotePciInfo_v2", [Nothing; 3]),
        ("nvmlDeviceGetFieldValues", [Nothing; 3]),
        ("*", [Gpu, Gpu, Gpu]),
    ];
    let well = Machine::started("")?.node()?;
    for (call, costs) in calls {
        for (code, cost) in CODES.into_iter().zip(costs) {
            let fault = format!("{call}@1={code}");
            check_start(&fault, cost, &well).with_context(|| fault)?;
        }
    }
    check_start("name@1=", Figure, &well).context("a name that is no text")
}

fn check_start(fault: &str, cost: Cost, well: &v1::GetNodeResponse) -> Result<()> {
    let machine = Machine::started(fault)?;
    let node = machine.node()?;
    // Peer access belongs to two GPUs. Without an answer for GPU 1, the other GPUs' links to it are unknown too.
    if fault.starts_with("nvmlDeviceGetP2PStatus") {
        ensure!(node.devices.len() == 3 && link(&node, 0, 2) == link(well, 0, 2));
        let kind = link(&node, 0, 1).context("no link")?.kind();
        ensure!(kind == v1::LinkKind::Host, "{kind:?}");
        let doubts = node
            .devices
            .iter()
            .filter(|status| !status.problem.is_empty());
        ensure!(
            doubts.count() == if cost == Cost::Figure { 3 } else { 0 },
            "{node:?}"
        );
        return Ok(());
    }
    others_are_whole(&node, well)?;
    let (json, text) = machine.status()?;
    ensure!(!text.contains("SIMULATED"), "{text}");
    match cost {
        Cost::Gpu => {
            ensure!(node.devices.len() == 2, "{node:?}");
            let [left] = &node.left_out[..] else {
                anyhow::bail!("{:?}", node.left_out);
            };
            ensure!(left.ordinal == 1 && !left.reason.is_empty(), "{left:?}");
            ensure!(json["left_out"][0]["ordinal"] == 1, "{json}");
            ensure!(
                text.contains("GPU 1") && text.contains("is left out"),
                "{text}"
            );
            machine.says(&["WARN", "GPU 1"])?;
        }
        Cost::Figure => {
            let status = device(&node, 1).context("it is left out")?;
            ensure!(
                node.left_out.is_empty() && !status.problem.is_empty(),
                "{node:?}"
            );
            ensure!(text.contains(&format!("{}: ", uuid(1))), "{text}");
            machine.says(&["WARN", &uuid(1)])?;
            if fault.contains("MemoryInfo") {
                ensure!(json["devices"][1]["hbm"] == Value::Null, "{json}");
                ensure!(json["devices"][1]["hbm_used"] == Value::Null, "{json}");
            } else {
                ensure!(!status.hbm_used_unknown, "{status:?}");
            }
        }
        Cost::Nothing => whole(&node, 1)?,
    }
    Ok(())
}

#[test]
fn an_answer_that_is_missing_later_makes_one_gpus_use_unknown_until_it_comes_again() -> Result<()> {
    let machine = Machine::started("")?;
    let well = machine.node()?;
    for call in [
        "nvmlDeviceGetHandleByIndex_v2",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetMemoryInfo_v2",
        "*",
    ] {
        for code in CODES {
            machine.answers(&format!("{call}@1={code}"))?;
            let node = machine.node()?;
            others_are_whole(&node, &well).with_context(|| format!("{call}={code}"))?;
            let status = device(&node, 1).context("it is gone")?;
            ensure!(
                status.hbm_used_unknown && status.hbm_used_bytes == 0,
                "{status:?}"
            );
            ensure!(!status.problem.is_empty(), "{status:?}");
            let (json, text) = machine.status()?;
            ensure!(json["devices"][1]["hbm_used"] == Value::Null, "{json}");
            ensure!(text.contains("unknown of"), "{text}");
            machine.answers("")?;
            let node = machine.node()?;
            ensure!(node.devices == well.devices, "{node:?}");
        }
    }
    Ok(())
}

/// This is why the broker asks for GPUs by ordinal: asked by UUID, NVML finds no GPU at all while one of them is lost.
#[test]
fn asked_by_uuid_one_lost_gpu_would_cost_them_all() -> Result<()> {
    // The stub reads its directory from the environment of its process, so this test asks in a child process.
    if env::var_os("SWIFTCACHE_STUB_DIR").is_some() {
        let library = Nvml::builder().lib_path(stub()?.as_os_str()).init()?;
        let by_uuid = library.device_by_uuid(uuid(0));
        ensure!(matches!(by_uuid, Err(NvmlError::GpuLost)), "{by_uuid:?}");
        library.device_by_index(0)?;
        return Ok(());
    }
    let machine = Machine::with(stub()?, "*@1=15")?;
    let asked = Command::new(env::current_exe()?)
        .args(["--exact", "asked_by_uuid_one_lost_gpu_would_cost_them_all"])
        .env("SWIFTCACHE_STUB_DIR", machine.path())
        .output()?;
    ensure!(asked.status.success(), "{asked:?}");
    let said = String::from_utf8_lossy(&asked.stdout);
    ensure!(said.contains("1 passed"), "{said}");
    Ok(())
}

#[test]
fn only_a_machine_without_gpus_is_simulated_and_says_so_everywhere() -> Result<()> {
    let absent = Machine::with("/nowhere/libnvidia-ml.so.1".into(), "")?.start()?;
    let empty = Machine::started("devices=0")?;
    for machine in [absent, empty] {
        let node = machine.node()?;
        ensure!(node.probe.starts_with("simulated"), "{}", node.probe);
        let (json, text) = machine.status()?;
        ensure!(json["simulated"] == true, "{json}");
        ensure!(text.contains("device (SIMULATED)"), "{text}");
        let doctor = String::from_utf8(machine.swiftcache(&["doctor"])?.stdout)?;
        ensure!(doctor.contains("SIMULATED"), "{doctor}");
        machine.says(&["SIMULATES"])?;
    }
    Ok(())
}

#[test]
fn a_driver_that_does_not_work_is_an_error_and_no_reason_to_simulate() -> Result<()> {
    let all_lost = "*@0=15\n*@1=15\n*@2=15";
    for (answers, named) in [
        ("nvmlInit_v2=9", "libswiftcache_stub_nvml.so"),
        ("nvmlInit_v2=999", "libswiftcache_stub_nvml.so"),
        ("nvmlDeviceGetCount_v2=999", "libswiftcache_stub_nvml.so"),
        (all_lost, "GPU 2: "),
    ] {
        let machine = Machine::with(stub()?, answers)?;
        let ended = machine.broker_command()?.output()?;
        let said = String::from_utf8_lossy(&ended.stderr);
        ensure!(ended.status.code() == Some(1), "{answers}: {said}");
        ensure!(
            said.contains(named) && said.contains("--probe simulated"),
            "{said}"
        );
    }
    Ok(())
}

/// A donor lends 4 slabs of GPU 1 and 4 of GPU 2, and a borrower on GPU 0 leases one of each. Both are sessions of this
/// process that do nothing by themselves: one that connected again and said that it holds nothing would give its leases
/// back.
fn lend(machine: &Machine) -> Result<()> {
    let wire = Wire::new(&machine.socket())?;
    let (donor, borrower) = (wire.member("donor", "")?, wire.member("borrower", "")?);
    for number in [1, 2] {
        let id = vec![number as u8; 16];
        wire.wait(wire.broker().offer(v1::OfferRequest {
            session_id: donor.session,
            region_id: id.clone().into(),
            device_uuid: uuid(number),
            allocation_id: id.into(),
            offset: 0,
            bytes: 4 << 20,
            slab_bytes: 1 << 20,
            handle: Some(v1::Handle {
                kind: v1::HandleKind::CudaIpc.into(),
                opaque: vec![number as u8; 64].into(),
                ..Default::default()
            }),
            ..Default::default()
        }))?;
        let leased = borrower.lease("a model", &uuid(0), 1 << 20, 1 << 16)?;
        ensure!(leased.grants.len() == 1);
    }
    Ok(())
}

fn leases_on(machine: &Machine, number: u32) -> Result<usize> {
    let wire = Wire::new(&machine.socket())?;
    let mut admin = wire.admin();
    let request = v1::ListLeasesRequest {
        device_uuid: uuid(number),
        ..Default::default()
    };
    Ok(wire
        .wait(admin.list_leases(request))?
        .into_inner()
        .leases
        .len())
}

/// One ledger holds what is lent on the other GPUs, and what is mapped of the lost one. So it must not be set aside.
#[test]
fn a_gpu_that_is_lost_at_a_restart_costs_no_lease_on_another() -> Result<()> {
    let mut machine = Machine::started("")?;
    lend(&machine)?;
    ensure!(leases_on(&machine, 1)? == 1 && leases_on(&machine, 2)? == 1);
    machine.answers("*@1=15")?;
    machine.broker = None;
    machine.restart()?;
    let log = fs::read_to_string(machine.log())?;
    ensure!(!log.contains("aside"), "{log}");
    let node = machine.node()?;
    ensure!(node.left_out.len() == 1, "{node:?}");
    whole(&node, 2)?;
    let lost = device(&node, 1).context("nobody accounts for what is lent there")?;
    ensure!(
        lost.hbm_used_unknown && !lost.problem.is_empty(),
        "{lost:?}"
    );
    ensure!(leases_on(&machine, 1)? == 1 && leases_on(&machine, 2)? == 1);
    for offered in [lost, device(&node, 2).context("no GPU 2")?] {
        let account = offered.account.unwrap_or_default();
        ensure!(account.offered_bytes == 4 << 20, "{offered:?}");
    }
    Ok(())
}

/// The twin: no GPU is left out, so a ledger that names a GPU which is not there is another machine's.
#[test]
fn a_ledger_of_other_gpus_is_set_aside() -> Result<()> {
    let mut machine = Machine::started("")?;
    lend(&machine)?;
    machine.answers("devices=2")?;
    machine.restart()?;
    machine.says(&["aside"])?;
    ensure!(leases_on(&machine, 1)? == 0);
    Ok(())
}

#[test]
fn doctor_names_the_gpu_that_does_not_answer() -> Result<()> {
    let machine = Machine::started("*@1=15")?;
    let doctor = machine.swiftcache(&["doctor", "--json"])?;
    let report: Value = serde_json::from_slice(&doctor.stdout)?;
    let findings = report["findings"].as_array().context("no findings")?;
    let finding = |check: &str| findings.iter().find(|found| found["check"] == check);
    for check in ["nvml", "broker-devices"] {
        let found = finding(check).context("no such check")?;
        ensure!(found["verdict"] == "warn", "{found}");
        ensure!(found["found"].to_string().contains("GPU 1"), "{found}");
    }
    ensure!(finding("gpu-modes").context("no modes")?["verdict"] == "ok");
    Ok(())
}
