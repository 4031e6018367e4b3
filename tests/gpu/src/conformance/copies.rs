//! Copies arrive byte for byte.

use anyhow::{Context, Result, ensure};
use proptest::{
    collection::vec as list_of,
    strategy::Strategy,
    test_runner::{Config, TestCaseError, TestRunner},
};
use swiftcache_client::device::{CopyStream, DeviceError, Memory, Part, Piece};

use crate::{pattern, subject::Subject};

const MIB: u64 = 1 << 20;

fn two_memories(subject: &Subject, bytes: u64) -> Result<(Memory, Memory)> {
    let device = subject.device()?;
    let kind = *subject
        .layer
        .handle_kinds()
        .first()
        .context("no handle kind")?;
    let allocate = || subject.layer.allocate(&device, bytes, kind);
    Ok((allocate()?, allocate()?))
}

pub(super) fn bounds(subject: &Subject) -> Result<()> {
    let (from, to) = two_memories(subject, MIB)?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &from, 0, MIB, 1)?;
    pattern::write(&*stream, &to, 0, MIB, 2)?;
    let inside = Piece {
        from: 0,
        to: 0,
        bytes: 4096,
    };
    let outside = [
        Piece {
            from: MIB - 4095,
            ..inside
        },
        Piece {
            to: MIB - 4095,
            ..inside
        },
        Piece {
            from: u64::MAX,
            ..inside
        },
        Piece {
            to: u64::MAX - 4095,
            ..inside
        },
        Piece {
            bytes: u64::MAX,
            ..inside
        },
        Piece {
            from: MIB + 1,
            bytes: 0,
            ..inside
        },
    ];
    for piece in outside {
        let error = stream.copy(&from, &to, &[inside, piece]).err();
        let error = error.with_context(|| format!("{piece:?} was accepted"))?;
        ensure!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
    }
    let refused = [
        stream.zero(&to, 1, MIB),
        stream.write(&to, MIB - 3, &[0; 4]),
        stream.read(&to, MIB - 3, &mut [0; 4]),
    ];
    for result in refused {
        let error = result.err().context("a range outside was accepted")?;
        ensure!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
    }
    stream.record()?.wait()?;
    pattern::verify(&*stream, &to, 0, MIB, 2).context("a refused copy left bytes behind")?;
    // Without the piece outside, the same call works. An empty list works too.
    stream.copy(&from, &to, &[])?;
    stream.copy(&from, &to, &[inside])?;
    pattern::verify(&*stream, &to, 0, 4096, 1)
}

pub(super) fn extents(subject: &Subject) -> Result<()> {
    let size = 48 * MIB;
    let (from, to) = two_memories(subject, size)?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &from, 0, size, 3)?;
    let half = size / 2;
    // The two halves are exchanged.
    let pieces = [(0, half), (half, 0)].map(|(from, to)| Piece {
        from,
        to,
        bytes: half,
    });
    stream.copy(&from, &to, &pieces)?;
    let mut wanted = pattern::bytes(3, size as usize);
    wanted.rotate_left(half as usize);
    let mut found = vec![0; size as usize];
    stream.read(&to, 0, &mut found)?;
    pattern::expect(&found, &wanted)
}

pub(super) fn scattered(subject: &Subject) -> Result<()> {
    // One call copies the blocks of a layer to mirrored positions. The sizes are around every vector width, and there
    // are more blocks than one launch takes.
    let sizes = [1, 2, 3, 8, 15, 16, 17, 100, 4096, 65_536].map(|bytes| (bytes, 513));
    for (bytes, count) in sizes.into_iter().chain([(16, 40_001), (20_000, 1500)]) {
        let size = bytes * count;
        let (from, to) = two_memories(subject, size)?;
        let stream = subject.stream()?;
        pattern::write(&*stream, &from, 0, size, bytes)?;
        let pieces: Vec<Piece> = (0..count)
            .map(|block| Piece {
                from: block * bytes,
                to: (count - 1 - block) * bytes,
                bytes,
            })
            .collect();
        stream.copy(&from, &to, &pieces)?;
        let mut found = vec![0; size as usize];
        stream.read(&to, 0, &mut found)?;
        let source = pattern::bytes(bytes, size as usize);
        let wanted: Vec<u8> = source
            .chunks(bytes as usize)
            .rev()
            .flatten()
            .copied()
            .collect();
        pattern::expect(&found, &wanted)
            .with_context(|| format!("{count} pieces of {bytes} bytes"))?;
    }
    Ok(())
}

pub(super) fn parts(subject: &Subject) -> Result<()> {
    // The blocks of a layer lie in slabs and go to an engine's pool. There are small pieces, large pieces, and a slab
    // without pieces.
    let counts = [5_u64, 0, 700, 3];
    for bytes in [48_u64, 4096, 3 * MIB] {
        let total: u64 = counts.iter().sum();
        let total = if bytes > MIB { 8 } else { total };
        let stream = subject.stream()?;
        let (_, pool) = two_memories(subject, total * bytes)?;
        let (mut parts, mut pieces, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for (slab, count) in (1..).zip(counts) {
            let count = count.min(total - pieces.len() as u64);
            let (from, _) = two_memories(subject, bytes * count.max(1))?;
            pattern::write(&*stream, &from, 0, bytes * count, slab)?;
            // The blocks of the slab go to the next blocks of the pool, in the opposite order.
            let first = pieces.len() as u64;
            pieces.extend((0..count).map(|block| Piece {
                from: (count - 1 - block) * bytes,
                to: (first + block) * bytes,
                bytes,
            }));
            let source = pattern::bytes(slab, (bytes * count) as usize);
            wanted.extend(source.chunks(bytes as usize).rev().flatten().copied());
            parts.push(Part {
                from,
                to: pool.clone(),
                pieces: count as usize,
            });
        }
        stream.copy_parts(&parts, &pieces)?;
        // The stream itself keeps the memories that it needs.
        parts.clear();
        let mut found = vec![0; wanted.len()];
        stream.read(&pool, 0, &mut found)?;
        pattern::expect(&found, &wanted).with_context(|| format!("pieces of {bytes} bytes"))?;
    }
    let (from, to) = two_memories(subject, MIB)?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &from, 0, MIB, 9)?;
    let part = || Part {
        from: from.clone(),
        to: to.clone(),
        pieces: 1,
    };
    let inside = Piece {
        from: 0,
        to: 0,
        bytes: 4096,
    };
    let stray = Piece {
        from: MIB,
        ..inside
    };
    // Pieces beyond those of the parts are ignored, and a part may name more pieces than there are.
    let many = Part {
        pieces: usize::MAX,
        ..part()
    };
    stream.copy_parts(&[part()], &[inside, stray])?;
    stream.copy_parts(&[part(), many], &[inside])?;
    pattern::verify(&*stream, &to, 0, 4096, 9)?;
    // A piece outside is refused in every part.
    let refused = stream.copy_parts(&[part(), part()], &[inside, stray]);
    let error = refused.err().context("a range outside was accepted")?;
    ensure!(matches!(error, DeviceError::OutOfRange { .. }), "{error}");
    Ok(())
}

pub(super) fn across_devices(subject: &Subject) -> Result<()> {
    let (near, far) = (subject.device()?, subject.other_device()?);
    let layer = &subject.layer;
    let kind = *layer.handle_kinds().first().context("no handle kind")?;
    let here = layer.allocate(&near, 2 * MIB, kind)?;
    let there = layer.allocate(&far, 2 * MIB, kind)?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &here, 0, 2 * MIB, 4)?;
    let extent = Piece {
        from: 0,
        to: 0,
        bytes: MIB,
    };
    let small = (0..64).map(|block| Piece {
        from: MIB + block * 16_384,
        to: MIB + block * 16_384,
        bytes: 16_384,
    });
    let pieces: Vec<Piece> = std::iter::once(extent).chain(small).collect();
    stream.copy(&here, &there, &pieces)?;
    stream.zero(&here, 0, 2 * MIB)?;
    stream.copy(&there, &here, &pieces)?;
    pattern::verify(&*stream, &here, 0, 2 * MIB, 4)?;
    let far_stream = layer.stream(&far)?;
    pattern::verify(&*far_stream, &there, 0, 2 * MIB, 4)
}

pub(super) fn zeroing(subject: &Subject) -> Result<()> {
    let (memory, _) = two_memories(subject, MIB)?;
    let stream = subject.stream()?;
    pattern::write(&*stream, &memory, 0, MIB, 5)?;
    stream.zero(&memory, 4097, 70_000)?;
    let mut wanted = pattern::bytes(5, MIB as usize);
    wanted[4097..74_097].fill(0);
    let mut found = vec![1; MIB as usize];
    stream.read(&memory, 0, &mut found)?;
    pattern::expect(&found, &wanted)
}

/// For each piece: its start in the source, its length, and the length of the gap behind it in the target.
type Layout = Vec<(u64, u64, u64)>;

const RANDOM_SIZE: u64 = 512 << 10;

pub(super) fn random_pieces(subject: &Subject) -> Result<()> {
    let (from, to) = two_memories(subject, RANDOM_SIZE)?;
    let stream = subject.stream()?;
    let mut runner = TestRunner::new(Config {
        cases: 64,
        failure_persistence: None,
        ..Config::default()
    });
    let sizes = proptest::prop_oneof![0..64_u64, 1000..9000_u64, 60_000..140_000_u64];
    let piece = (0..RANDOM_SIZE, sizes, 0..3000_u64);
    let layouts = list_of(list_of(piece, 0..200), 1..4).no_shrink();
    runner
        .run(&layouts, |layouts| {
            one_random_case(&*stream, &from, &to, &layouts)
                .map_err(|error| TestCaseError::fail(format!("{error:#}")))
        })
        .map_err(|error| anyhow::anyhow!("{error}"))
}

fn one_random_case(
    stream: &dyn CopyStream,
    from: &Memory,
    to: &Memory,
    layouts: &[Layout],
) -> Result<()> {
    let source = pattern::bytes(6, RANDOM_SIZE as usize);
    stream.write(from, 0, &source)?;
    stream.zero(to, 0, RANDOM_SIZE)?;
    let mut wanted = vec![0; RANDOM_SIZE as usize];
    for layout in layouts {
        let mut next = 0;
        let mut pieces = Vec::new();
        for &(from, bytes, gap) in layout {
            let room = RANDOM_SIZE - from.max(next);
            let bytes = bytes.min(room);
            pieces.push(Piece {
                from,
                to: next,
                bytes,
            });
            next = (next + bytes + gap).min(RANDOM_SIZE);
        }
        for piece in &pieces {
            let [from, to, bytes] = [piece.from, piece.to, piece.bytes].map(|n| n as usize);
            wanted[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
        }
        stream.copy(from, to, &pieces)?;
    }
    let mut found = vec![0; RANDOM_SIZE as usize];
    stream.read(to, 0, &mut found)?;
    pattern::expect(&found, &wanted)
}
