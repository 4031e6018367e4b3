//! A pattern of bytes. A byte is a function of a seed and its position, so that every byte can be checked anywhere.

use anyhow::{Result, ensure};
use swiftcache_client::device::{CopyStream, Memory, Piece};

/// How many bytes are written or read at a time.
const CHUNK: usize = 4 << 20;

/// The 8 bytes with number `index` of the pattern of `seed`.
fn word(seed: u64, index: u64) -> [u8; 8] {
    // SplitMix64: a change of the seed or the index affects every bit.
    let mut word = seed.wrapping_add(index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (word ^ (word >> 31)).to_le_bytes()
}

/// The pattern of `seed` from its first byte on.
pub fn bytes(seed: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    fill_from(seed, 0, &mut bytes);
    bytes
}

/// The pattern from `position`, which is a multiple of 8.
fn fill_from(seed: u64, position: u64, bytes: &mut [u8]) {
    for (index, chunk) in (position / 8..).zip(bytes.chunks_mut(8)) {
        chunk.copy_from_slice(&word(seed, index)[..chunk.len()]);
    }
}

/// Writes the pattern of `seed` to a range of a memory.
///
/// # Errors
/// When the device refuses.
pub fn write(
    stream: &dyn CopyStream,
    memory: &Memory,
    offset: u64,
    bytes: u64,
    seed: u64,
) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    for position in (0..bytes).step_by(CHUNK) {
        let chunk = &mut chunk[..CHUNK.min((bytes - position) as usize)];
        fill_from(seed, position, chunk);
        stream.write(memory, offset + position, chunk)?;
    }
    Ok(())
}

/// Checks every byte of a range against the pattern of `seed`.
///
/// # Errors
/// When a byte differs (the error names the first one), or when the device refuses.
pub fn verify(
    stream: &dyn CopyStream,
    memory: &Memory,
    offset: u64,
    bytes: u64,
    seed: u64,
) -> Result<()> {
    let (mut found, mut wanted) = (vec![0; CHUNK], vec![0; CHUNK]);
    for position in (0..bytes).step_by(CHUNK) {
        let size = CHUNK.min((bytes - position) as usize);
        fill_from(seed, position, &mut wanted[..size]);
        stream.read(memory, offset + position, &mut found[..size])?;
        expect(&found[..size], &wanted[..size])
            .map_err(|error| error.context(format!("at offset {}", offset + position)))?;
    }
    Ok(())
}

/// Checks every byte that `pieces` moved out of the pattern of `seed`. The sources of the pieces start at multiples of
/// 8.
///
/// # Errors
/// When a byte differs (the error names its piece), or when the device refuses.
pub fn verify_pieces(
    stream: &dyn CopyStream,
    to: &Memory,
    pieces: &[Piece],
    seed: u64,
) -> Result<()> {
    let mut sorted = pieces.to_vec();
    sorted.sort_unstable_by_key(|piece| piece.to);
    let (mut found, mut wanted) = (Vec::new(), Vec::new());
    let mut left = &sorted[..];
    while let Some(first) = left.first() {
        // Pieces that lie side by side are read together. To read the pieces of a layer one by one would take seconds.
        let mut end = first.to;
        let together = left.iter().take_while(|piece| {
            let joins = piece.to == end && (end == first.to || end - first.to < CHUNK as u64);
            end += if joins { piece.bytes } else { 0 };
            joins
        });
        let (here, rest) = left.split_at(together.count());
        found.resize((end - first.to) as usize, 0);
        stream.read(to, first.to, &mut found)?;
        for piece in here {
            wanted.resize(piece.bytes as usize, 0);
            fill_from(seed, piece.from, &mut wanted);
            let at = (piece.to - first.to) as usize;
            expect(&found[at..at + wanted.len()], &wanted)
                .map_err(|error| error.context(format!("{piece:?}")))?;
        }
        left = rest;
    }
    Ok(())
}

/// Checks that `found` is equal to `wanted`.
///
/// # Errors
/// When they differ. The error says where.
pub fn expect(found: &[u8], wanted: &[u8]) -> Result<()> {
    ensure!(
        found.len() == wanted.len(),
        "{} bytes, not {}",
        found.len(),
        wanted.len()
    );
    if let Some(at) = found
        .iter()
        .zip(wanted)
        .position(|(found, wanted)| found != wanted)
    {
        anyhow::bail!("byte {at} is {:#04x}, not {:#04x}", found[at], wanted[at]);
    }
    Ok(())
}
