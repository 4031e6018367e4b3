//! A donor that tests kill. It offers slabs, prints one line when they are offered, and keeps them until its input
//! ends.

use std::{
    io::{self, Read, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::Result;
use clap::Parser;
use swiftcache_client::{
    device::host::HostLayer,
    donor::{Donor, DonorConfig},
};
use swiftcache_proto::{domain::DeviceUuid, topology::Topology};
use swiftcache_tests::node;

#[derive(Parser)]
struct Flags {
    #[arg(long)]
    socket: std::path::PathBuf,
    #[arg(long)]
    topology: String,
    #[arg(long)]
    device: DeviceUuid,
    #[arg(long)]
    slab_bytes: u64,
    #[arg(long)]
    slabs: u64,
}

fn main() -> Result<()> {
    let flags = Flags::parse();
    let layer = HostLayer::from_topology(&Topology::load(&flags.topology)?, false)?;
    let session = node::connect(flags.socket, "donor")?;
    let config = DonorConfig {
        device: flags.device,
        slab_bytes: flags.slab_bytes,
        drain: Duration::from_secs(1),
        handle: None,
    };
    let donor = Donor::open(session, Arc::new(layer), config)?;
    let offered = donor.grow(flags.slabs * flags.slab_bytes)?;
    writeln!(io::stdout(), "offered {offered} bytes")?;
    io::copy(&mut io::stdin().by_ref(), &mut io::sink())?;
    donor.close(Duration::from_secs(5));
    Ok(())
}
