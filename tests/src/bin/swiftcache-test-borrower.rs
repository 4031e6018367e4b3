//! A borrower that tests stop and kill. It reads commands, one a line, stores and fetches sequences, checks every byte
//! that it gets, and prints a report after each operation. It exits at the end of its input.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use rand::{Rng, SeedableRng, rngs::StdRng};
use swiftcache_client::{
    cache::BorrowerConfig,
    device::{DeviceLayer, cuda::CudaLayer, host::HostLayer},
    session::{Session, SessionConfig},
};
use swiftcache_proto::{domain::DeviceUuid, topology::Topology};
use swiftcache_tests::{
    PATIENCE,
    crew::Report,
    engine::{self, BLOCK_BYTES, Engine},
};

/// The longest sequence, blocks.
const LONGEST: u32 = 20;

#[derive(Parser)]
struct Flags {
    #[arg(long)]
    socket: PathBuf,
    /// A topology of simulated devices. Without it, or when it names GPUs, the borrower uses the devices of CUDA.
    #[arg(long)]
    topology: Option<String>,
    #[arg(long)]
    device: DeviceUuid,
    #[arg(long)]
    name: String,
    #[arg(long)]
    tenant: String,
    #[arg(long)]
    namespace: String,
    #[arg(long)]
    slabs: u64,
    #[arg(long)]
    host_blocks: u64,
    #[arg(long)]
    conversations: u32,
    #[arg(long)]
    seed: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Mix,
    Store,
    Fetch,
}

enum Command {
    /// Do this many random operations.
    Random(Kind, u64),
    /// Store or fetch every sequence once, as a whole.
    Sweep(Kind),
    /// Lease this many slabs.
    Reserve(u64),
    /// Do nothing.
    Pause,
}

struct Borrower {
    engine: Engine,
    rng: StdRng,
    conversations: u32,
    report: Report,
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(io::stderr)
        .init();
    match run(Flags::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The test takes a line that is not a report as a complaint. An error is ignored, because the test may be
            // gone.
            let _ = writeln!(io::stdout(), "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(flags: Flags) -> Result<()> {
    // The session does not wait for a connection, because the broker may be away.
    let session = Session::start(SessionConfig {
        socket: flags.socket,
        name: flags.name,
        tenant: flags.tenant,
    })?;
    let layer = open(flags.topology.as_deref(), &session)?;
    let mut config = engine::config(flags.device, flags.slabs);
    // The usual limit, so that the borrower goes on when the broker is stopped.
    config.lookup_limit = BorrowerConfig::LOOKUP_LIMIT;
    config.layout.namespace = flags.namespace;
    config.host_tier_bytes = flags.host_blocks * BLOCK_BYTES;
    let mut borrower = Borrower {
        engine: Engine::new(Some(session), layer, config)?,
        rng: StdRng::seed_from_u64(flags.seed),
        conversations: flags.conversations,
        report: Report::default(),
    };
    let (send, commands) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let mut next = commands.recv().ok();
    while let Some(line) = next.take() {
        let command = Command::read(&line)?;
        next = borrower.obey(command, &commands)?;
        if next.is_none() {
            next = commands.recv().ok();
        }
    }
    Ok(())
}

/// On GPUs, the broker says which links there are to those that this process does not enumerate.
fn open(topology: Option<&str>, session: &Session) -> Result<Arc<dyn DeviceLayer>> {
    let topology = topology.map(Topology::load).transpose()?;
    let simulated = topology.filter(|topology| {
        let mut devices = topology.devices.iter();
        !devices.all(|device| device.uuid.as_str().starts_with("GPU-"))
    });
    if let Some(topology) = simulated {
        return Ok(Arc::new(HostLayer::from_topology(&topology, false)?));
    }
    session.wait_connected(PATIENCE)?;
    let (_, links) = session.node().context("the broker is gone again")?;
    Ok(Arc::new(CudaLayer::open_on(&links)?))
}

impl Command {
    fn read(line: &str) -> Result<Self> {
        let (word, number) = line.split_once(' ').unwrap_or((line, ""));
        let number = || number.parse().with_context(|| line.to_owned());
        Ok(match word {
            "mix" => Self::Random(Kind::Mix, number()?),
            "store" => Self::Random(Kind::Store, number()?),
            "fetch" => Self::Random(Kind::Fetch, number()?),
            "sweep-store" => Self::Sweep(Kind::Store),
            "sweep-fetch" => Self::Sweep(Kind::Fetch),
            "reserve" => Self::Reserve(number()?),
            "pause" => Self::Pause,
            _ => bail!("no such command: {line}"),
        })
    }
}

impl Borrower {
    /// Works on the command until it is done or another one comes. Returns the other one.
    fn obey(
        &mut self,
        command: Command,
        commands: &mpsc::Receiver<String>,
    ) -> Result<Option<String>> {
        let mut next = None;
        match command {
            Command::Random(kind, operations) => {
                for _ in 0..operations {
                    let conversation = self.rng.random_range(0..self.conversations);
                    let blocks = self.rng.random_range(1..=LONGEST);
                    let stores = match kind {
                        Kind::Mix => self.rng.random_bool(0.5),
                        kind => kind == Kind::Store,
                    };
                    self.operate(stores, conversation, blocks)?;
                    next = commands.try_recv().ok();
                    if next.is_some() {
                        break;
                    }
                }
            }
            Command::Sweep(kind) => {
                for conversation in 0..self.conversations {
                    self.operate(kind == Kind::Store, conversation, LONGEST)?;
                }
            }
            Command::Reserve(slabs) => self.engine.reserve(slabs)?,
            Command::Pause => {}
        }
        self.report.done += 1;
        self.say()?;
        Ok(next)
    }

    fn operate(&mut self, stores: bool, conversation: u32, blocks: u32) -> Result<()> {
        let sequence: Vec<u32> = (0..blocks).map(|n| conversation * 1_000 + n).collect();
        if stores {
            self.report.stored += u64::from(self.engine.store(&sequence)?.stored);
        } else {
            let fetched = self.engine.fetch(&sequence)?;
            self.report.found += u64::from(fetched.found);
            self.report.served += u64::from(fetched.served);
        }
        self.report.operations += 1;
        self.say()
    }

    fn say(&self) -> Result<()> {
        Ok(writeln!(io::stdout(), "{}", self.report.line())?)
    }
}
