//! An engine of one layer that keeps the KV cache of four blocks in a neighbour's memory, and loads it back.
//!
//! ```text
//! cargo run -p swiftcache-client --example borrower -- /run/swiftcache/broker.sock SIM-0
//! ```

use std::{env, error::Error, path::PathBuf, sync::Arc, time::Duration};

use swiftcache_client::{
    cache::{Borrower, BorrowerConfig, Layout, PagedKv, PagedLayer},
    device::{self, Choice},
    session::{Session, SessionConfig},
};
use swiftcache_proto::domain::BlockHash;

/// Bytes of a block in each layer; this engine has one.
const BLOCK_BYTES: u64 = 64 << 10;
/// Blocks of the engine's own pool.
const BLOCKS: u32 = 4;

/// Stores four blocks, forgets them, and loads them back. Returns how many came back right.
///
/// # Errors
/// When the broker does not answer, or the device is not there.
pub(crate) fn store_and_load(socket: PathBuf, device: &str) -> Result<u32, Box<dyn Error>> {
    let session = Session::connect(SessionConfig {
        socket,
        name: "an example".to_owned(),
        tenant: String::new(),
    })?;
    session.wait_connected(Duration::from_secs(60))?;
    let (devices, links) = session.node().ok_or("the broker is gone")?;
    let layer = device::open_node(Choice::Auto, &devices, &links, None)?;
    let device = device.parse()?;

    // The engine's pool: block `b` of the layer stands at `b * BLOCK_BYTES`. A real engine registers its own.
    let pool = layer.allocate_host(&device, u64::from(BLOCKS) * BLOCK_BYTES)?;
    let stream = layer.stream(&device)?;
    let kv = PagedKv {
        layers: vec![PagedLayer {
            memory: pool.clone(),
            offset: 0,
            block_stride: BLOCK_BYTES,
        }],
        blocks: BLOCKS,
    };

    // Engines of one namespace share blocks: the model, its weights and its layout are what the name stands for.
    let layout = Layout {
        namespace: "an example's model".to_owned(),
        layer_bytes: vec![BLOCK_BYTES],
    };
    let borrower = Borrower::open(
        Some(session),
        Arc::clone(&layer),
        BorrowerConfig::new(device, layout, 256 << 20),
    )?;
    if borrower.reserve(1) == 0 {
        return Err("no donor has memory on offer".into());
    }

    // A block's hash stands for its tokens and all before them.
    let hashes: Vec<BlockHash> = (0..BLOCKS).map(|n| BlockHash([n as u8 + 1; 16])).collect();
    for (n, block) in (0..BLOCKS).zip(0_u64..) {
        let bytes = vec![n as u8 + 1; BLOCK_BYTES as usize];
        stream.write(&pool, block * BLOCK_BYTES, &bytes)?;
    }
    let blocks: Vec<_> = hashes.iter().copied().zip(0..).collect();
    let stored = borrower.store(&blocks, &kv, &|_| None).finish();
    if stored.stored != BLOCKS {
        return Err(format!("of {BLOCKS} blocks {} were kept", stored.stored).into());
    }

    // The engine uses its pool for something else.
    let size = (u64::from(BLOCKS) * BLOCK_BYTES) as usize;
    stream.write(&pool, 0, &vec![0; size])?;

    // The next turn of the conversation. Whatever is missing is a miss, and the engine computes it again.
    let hit = borrower.lookup(&hashes);
    let into: Vec<u32> = (0..hit.blocks()).collect();
    let load = borrower.load(&hit, &into, &kv);
    let failed = load.finish().failed;
    let mut right = 0;
    for block in into {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        stream.read(&pool, u64::from(block) * BLOCK_BYTES, &mut bytes)?;
        let whole = bytes.iter().all(|byte| u32::from(*byte) == block + 1);
        right += u32::from(whole && !failed.contains(&block));
    }
    Ok(right)
}

#[allow(dead_code, reason = "a test calls the parts of this example")]
fn main() -> Result<(), Box<dyn Error>> {
    let [socket, device] = &env::args().skip(1).collect::<Vec<_>>()[..] else {
        return Err("usage: borrower SOCKET DEVICE".into());
    };
    let right = store_and_load(PathBuf::from(socket), device)?;
    if right == BLOCKS {
        Ok(())
    } else {
        Err(format!("{right} of {BLOCKS} blocks came back").into())
    }
}
