//! Measures which method copies fastest between two GPUs. The constants in `client/device/src/cuda/route.rs` are chosen
//! from these figures.

use anyhow::Result;
use swiftcache_client::device::{DeviceLayer, cuda::Method};

use super::{
    Bench, Course, Rows,
    copies::{self, Pieces},
    course::Times,
    peers::Neighbour,
    pipeline,
};

const KIB: u64 = 1 << 10;

/// Numbers of blocks of the gather kernel. An H100 has 132 multiprocessors.
const BLOCKS: [u32; 8] = [8, 16, 24, 32, 48, 64, 96, 132];

/// Sizes of pieces, bytes.
const PIECES: [u64; 5] = [16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB];

/// The fewest pieces of a copy. Fewer pieces cannot show whether they are copied side by side.
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
    let directions = [pipeline::Direction::Fetch, pipeline::Direction::WriteBack];
    for (course, direction) in courses.iter().zip(directions) {
        pipeline::tune(course, &lent.memory, direction, &methods(), rows)?;
    }
    Ok(())
}

/// Measures scattered pieces on an idle GPU. This shows which methods saturate the link.
fn alone(course: &Course<'_>, rows: &mut Rows<'_>) -> Result<()> {
    for bytes in PIECES {
        let count = (course.bench.scale.bytes / bytes).max(FEWEST);
        let count = count.min(course.size() / bytes);
        let pieces = Pieces { bytes, count };
        let plain = course.plain(pieces.total())?;
        let mut summary = format!("{}{}:", course.way, copies::size(bytes));
        for method in methods() {
            let seconds = copies::time_pieces(course, pieces, method)?.seconds;
            let name = copies::name(method);
            summary += &format!(" {name} {:.3},", plain / seconds);
            let case = format!("{count} x {}, {name}", copies::size(bytes));
            let times = Times { seconds, plain };
            rows.push(course.row("tune", &case, pieces.total(), times));
        }
        rows.say(&summary);
    }
    Ok(())
}
