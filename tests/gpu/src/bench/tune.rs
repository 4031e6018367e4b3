//! How copies between two GPUs are best done: for the constants of `client/src/device/cuda/route.rs`, which says what
//! was chosen.

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, cuda::Method};

use super::{Bench, Course, Rows, copies, peers::Neighbour, pipeline};

const KIB: u64 = 1 << 10;

/// Blocks of the gather kernel; an H100 has 132 multiprocessors.
const BLOCKS: [u32; 8] = [8, 16, 24, 32, 48, 64, 96, 132];

/// Sizes of pieces, bytes.
const PIECES: [u64; 5] = [16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB];

/// The fewest pieces of a copy: with less there is nothing to do side by side.
const FEWEST: u64 = 32;

fn methods() -> Vec<Method> {
    let kernels = BLOCKS.map(Method::KernelOn);
    let methods = [Method::Each, Method::Batch].into_iter();
    methods.chain(kernels).collect()
}

pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let Some(neighbour) = Neighbour::find(bench, rows)? else {
        return Ok(());
    };
    let Some(&kind) = bench.layer.handle_kinds().first() else {
        return Ok(());
    };
    let lent = neighbour.lend(bench, kind)?;
    let courses = neighbour.courses(bench, &lent);
    for course in &courses {
        alone(course, rows)?;
    }
    let ways = [pipeline::Way::Fetch, pipeline::Way::WriteBack];
    for (course, way) in courses.iter().zip(ways) {
        pipeline::tune(course, (&lent.memory, way), &methods(), rows)?;
    }
    Ok(())
}

/// Scattered pieces on an idle GPU: what saturates the link.
fn alone(course: &Course<'_>, rows: &mut Rows<'_>) -> Result<()> {
    for bytes in PIECES {
        let count = (course.bench.scale.bytes / bytes).max(FEWEST);
        let count = count.min(course.size() / bytes);
        let plain = course.plain(bytes * count)?;
        let mut summary = format!("{}{}:", course.way, copies::size(bytes));
        for method in methods() {
            let (_, _, seconds) = copies::time_pieces(course, (bytes, count), method)?;
            let name = copies::name(method);
            summary += &format!(" {name} {:.3},", plain / seconds);
            let case = format!("{count} x {}, {name}", copies::size(bytes));
            rows.push(course.row("tune", &case, bytes * count, (seconds, plain)));
        }
        rows.say(&summary);
    }
    Ok(())
}
