//! Lends memory of a device until a line arrives on standard input, then asks for it back.
//!
//! ```text
//! cargo run -p swiftcache-client --example donor -- /run/swiftcache/broker.sock SIM-1 268435456
//! ```

use std::{env, error::Error, io, path::PathBuf, time::Duration};

use swiftcache_client::{
    device::{self, Choice},
    donor::{Donor, DonorConfig},
    session::{Session, SessionConfig},
};

/// Offers `slabs` slabs of `slab_bytes` bytes each of a device's memory. They stay on offer until the donor is closed.
///
/// # Errors
/// When the broker does not answer, or the device is not there or is too full.
pub(crate) fn lend(
    socket: PathBuf,
    device: &str,
    slabs: u64,
    slab_bytes: u64,
) -> Result<Donor, Box<dyn Error>> {
    let session = Session::connect(SessionConfig {
        socket,
        name: "an example".to_owned(),
        tenant: String::new(),
    })?;
    session.wait_connected(Duration::from_secs(60))?;
    let (devices, links) = session.node().ok_or("the broker is gone")?;
    // CUDA where the broker found GPUs, shared memory where its devices are simulated.
    let layer = device::open_node(Choice::Auto, &devices, &links, None)?;
    let config = DonorConfig {
        device: device.parse()?,
        slab_bytes,
        // Borrowers get the broker's own time to move away when this donor leaves.
        drain: Duration::ZERO,
        handle: None,
    };
    let donor = Donor::open(session, layer, config)?;
    let offered = donor.grow(slabs * slab_bytes)?;
    if offered < slabs * slab_bytes {
        return Err(format!("{device} has room for {offered} bytes only").into());
    }
    Ok(donor)
}

#[allow(dead_code, reason = "a test calls the parts of this example")]
fn main() -> Result<(), Box<dyn Error>> {
    let [socket, device, bytes] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        return Err("usage: donor SOCKET DEVICE BYTES".into());
    };
    const SLAB_BYTES: u64 = 16 << 20;
    let donor = lend(
        PathBuf::from(socket),
        device,
        bytes.parse::<u64>()? / SLAB_BYTES,
        SLAB_BYTES,
    )?;
    io::stdin().read_line(&mut String::new())?;
    // Borrowers move their blocks away, and say so. Only then is the memory free.
    if donor.close(Duration::from_secs(10)) {
        Ok(())
    } else {
        Err("a borrower still maps what was lent".into())
    }
}
