//! The gather/scatter kernel, and the ring of piece descriptors that it reads.

use std::{
    collections::VecDeque,
    ffi::{CStr, c_int, c_uint, c_void},
    sync::Arc,
};

use super::{
    context::{Context, Entered, Event, report},
    driver::sys,
    route::Route,
};
use crate::{Part, Piece, Result};

/// `gather.cu`, compiled; see there for the command.
const PTX: &str = concat!(include_str!("gather.ptx"), "\0");

/// Threads of a block, as `gather.cu` expects.
const THREADS: c_uint = 512;

/// Groups of a block's threads: each copies a tile of its own.
const GROUPS: c_uint = 4;

/// What a group copies in one round, bytes: the kernel cuts pieces into tiles of this, or of twice as much where there
/// is so much to do that fewer trips for descriptors matter more than that all groups end together.
const TILE_BYTES: u64 = 16 << 10;

/// Double tiles that each group has at least, where tiles are doubled.
const DOUBLE_TILES: u64 = 6;

/// Pieces of up to this size, bytes, leave most of a group's threads idle: they take twice the blocks.
const SMALL_BYTES: u64 = 4 << 10;

/// Descriptors that fit a launch's own parameters, as `gather.cu` declares them.
const FEW: usize = 1360;

/// Launches of fewer tiles read their descriptors from pinned memory all the same: 32 KiB of parameters cost a launch
/// about 1 us. With more tiles the trips over PCIe cost more: 1 us for 256 of them, 3 us for 2048, and 60 us for
/// 4096 tiles of only 16 pieces, which all ask for the same bytes (H200, 2026-11-23).
const FEW_FROM_TILES: u64 = 128;

/// Descriptors of a segment of the ring: more than a layer of 64k tokens has.
const SEGMENT: usize = 16_384;

/// Segments of one stream's ring, in flight, before a copy waits for the oldest: half a million descriptors.
const MOST_SEGMENTS: usize = 32;

/// One piece, as `gather.cu` lays it out.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Descriptor {
    from: u64,
    to: u64,
    bytes: u64,
}

/// How a list of pieces becomes descriptors and tiles.
#[derive(Clone, Copy)]
struct Cut {
    /// No descriptor is longer, bytes.
    most_bytes: u64,
    /// The kernel cuts descriptors every so many bytes.
    tile: u32,
    /// Tiles of each descriptor.
    split: u32,
    descriptors: u64,
}

impl Cut {
    /// Pieces of one size, as blocks are, are left for the kernel to cut; pieces of several sizes are cut here, so
    /// that no group of threads has more to do than another.
    fn of(pieces: &[Piece], blocks: c_uint) -> Self {
        let (mut largest, mut total, mut count, mut tiles) = (0, 0, 0, 0);
        for piece in pieces {
            largest = piece.bytes.max(largest);
            total += piece.bytes;
            count += u64::from(piece.bytes > 0);
            tiles += piece.bytes.div_ceil(TILE_BYTES);
        }
        let even = largest.checked_mul(count) == Some(total);
        let much = 2 * TILE_BYTES * DOUBLE_TILES * u64::from(blocks * GROUPS);
        let tile = if total >= much { 2 } else { 1 } * TILE_BYTES;
        match u32::try_from(largest.div_ceil(tile)) {
            Ok(split) if even => Self {
                most_bytes: largest,
                tile: tile as u32,
                split,
                descriptors: count,
            },
            _ => Self {
                most_bytes: TILE_BYTES,
                tile: TILE_BYTES as u32,
                split: 1,
                descriptors: tiles,
            },
        }
    }

    /// The most descriptors of one launch, whose tiles the kernel counts in 32 bits.
    fn most_descriptors(self) -> usize {
        let most = u32::MAX / self.split.max(1);
        usize::try_from(most).map_or(SEGMENT, |most| most.clamp(1, SEGMENT))
    }
}

/// The descriptors of pieces, in order. A layer has thousands, and the GPU waits for them: nothing is checked here.
struct Descriptors<'a> {
    most_bytes: u64,
    parts: std::slice::Iter<'a, Part>,
    /// Where the memories of the current part lie, and how many of its pieces are left.
    bases: (u64, u64),
    left: usize,
    pieces: std::slice::Iter<'a, Piece>,
    /// What is left of the current piece.
    rest: Piece,
}

impl<'a> Descriptors<'a> {
    fn new(cut: Cut, parts: &'a [Part], pieces: &'a [Piece]) -> Self {
        Self {
            most_bytes: cut.most_bytes,
            parts: parts.iter(),
            bases: (0, 0),
            left: 0,
            pieces: pieces.iter(),
            rest: Piece {
                from: 0,
                to: 0,
                bytes: 0,
            },
        }
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    #[inline]
    fn next(&mut self) -> Option<Descriptor> {
        while self.rest.bytes == 0 {
            while self.left == 0 {
                let part = self.parts.next()?;
                self.bases = (part.from.base(), part.to.base());
                self.left = part.pieces;
            }
            self.rest = *self.pieces.next()?;
            self.left -= 1;
        }
        let bytes = self.rest.bytes.min(self.most_bytes);
        let descriptor = Descriptor {
            from: self.bases.0 + self.rest.from,
            to: self.bases.1 + self.rest.to,
            bytes,
        };
        self.rest.from += bytes;
        self.rest.to += bytes;
        self.rest.bytes -= bytes;
        Some(descriptor)
    }
}

/// The kernel, loaded in one context.
pub(super) struct GatherKernel {
    /// The `CUfunction` that reads descriptors from pinned memory. The module stays loaded as long as the context.
    any: usize,
    /// The `CUfunction` whose parameters are the descriptors.
    few: usize,
    multiprocessors: c_uint,
}

impl GatherKernel {
    /// Loads the kernel into `context`, which is current.
    pub(super) fn load(context: &Context, entered: &Entered<'_>) -> Result<Self> {
        let core = entered.core();
        let mut module = std::ptr::null_mut();
        // SAFETY: the context is current and the text NUL-terminated; one pointer is written, to one of ours.
        let code = unsafe { (core.module_load)(&raw mut module, PTX.as_ptr().cast()) };
        context.check(code, "loading the gather kernel")?;
        let find = |name: &CStr| {
            let mut function = std::ptr::null_mut();
            // SAFETY: the module was just loaded; one pointer is written, to one of ours.
            let code = unsafe { (core.module_function)(&raw mut function, module, name.as_ptr()) };
            context.check(code, "finding the gather kernel")?;
            Ok(function as usize)
        };
        let mut multiprocessors: c_int = 0;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        // SAFETY: one int is written, to one of ours.
        let code =
            unsafe { (core.device_attribute)(&raw mut multiprocessors, attribute, context.device) };
        context.check(code, "counting multiprocessors")?;
        Ok(Self {
            any: find(c"swiftcache_gather")?,
            few: find(c"swiftcache_gather_few")?,
            multiprocessors: c_uint::try_from(multiprocessors).unwrap_or(1).max(1),
        })
    }

    /// Launches `function`, whose first parameter is at `pieces`, over `count` descriptors.
    fn launch(
        &self,
        entered: &Entered<'_>,
        function: usize,
        pieces: *mut c_void,
        (cut, count): (Cut, usize),
        (stream, blocks): (sys::CUstream, c_uint),
    ) -> Result<()> {
        let mut tiles = count as c_uint * cut.split;
        let (mut split, mut tile) = (cut.split, cut.tile);
        let mut parameters: [*mut c_void; 4] = [
            pieces,
            (&raw mut tiles).cast(),
            (&raw mut split).cast(),
            (&raw mut tile).cast(),
        ];
        let crowd = if cut.most_bytes <= SMALL_BYTES { 2 } else { 1 };
        let blocks = tiles.min(crowd * blocks);
        // SAFETY: the kernel takes these four parameters, which the driver copies before it returns. Descriptors in
        // pinned memory stay untouched until an event behind this launch is over, and whoever queued the pieces
        // checked them and keeps both memories mapped.
        let code = unsafe {
            (entered.core().launch)(
                function as sys::CUfunction,
                blocks,
                1,
                1,
                THREADS,
                1,
                1,
                0,
                stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        entered.check(code, "launching the gather kernel")
    }
}

/// One stream's descriptors. Few of them travel in a launch's parameters. More lie in segments of pinned memory, which
/// launches fill one after another; a full one is used again once an event behind its last launch is over, so that
/// copies allocate nothing once the ring has grown to what is in flight.
pub(super) struct Ring {
    context: Arc<Context>,
    /// Made at the first launch: wrappers of engines' streams never launch.
    few: Option<Box<[Descriptor; FEW]>>,
    current: Option<Segment>,
    busy: VecDeque<(Event, Segment)>,
}

struct Segment {
    /// `SEGMENT` descriptors in pinned memory, at the same address for the host and the device.
    address: usize,
    used: usize,
}

impl Ring {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self {
            context,
            few: None,
            current: None,
            busy: VecDeque::new(),
        }
    }

    /// Queues `pieces`, which were checked to lie inside the memories of their parts, in as few launches as the segments
    /// allow.
    pub(super) fn launch(
        &mut self,
        kernel: &GatherKernel,
        (stream, route, blocks): (sys::CUstream, Route, Option<c_uint>),
        parts: &[Part],
        pieces: &[Piece],
        entered: &Entered<'_>,
    ) -> Result<()> {
        let blocks = blocks.unwrap_or_else(|| route.blocks(kernel.multiprocessors));
        let blocks = blocks.max(1);
        let way = (stream, blocks);
        let cut = Cut::of(pieces, blocks);
        let mut descriptors = Descriptors::new(cut, parts, pieces);
        let most = cut.most_descriptors();
        if let Ok(count) = usize::try_from(cut.descriptors)
            && count <= FEW.min(most)
            && cut.descriptors * u64::from(cut.split) >= FEW_FROM_TILES
        {
            let few = (self.few).get_or_insert_with(|| Box::new([Descriptor::default(); FEW]));
            for (slot, descriptor) in few.iter_mut().zip(descriptors) {
                *slot = descriptor;
            }
            let parameter = few.as_mut_ptr().cast();
            return kernel.launch(entered, kernel.few, parameter, (cut, count), way);
        }
        let mut left = cut.descriptors;
        while left > 0 {
            let count = usize::try_from(left).map_or(most, |left| left.min(most));
            let first = self.make_room(count, stream, entered)?;
            let Some(segment) = &mut self.current else {
                break;
            };
            for (index, descriptor) in descriptors.by_ref().take(count).enumerate() {
                let target = segment.address as *mut Descriptor;
                // SAFETY: `make_room` found `count` descriptors free from `first` on, and the device does not
                // read them before the launch behind this.
                unsafe { target.add(first + index).write(descriptor) };
            }
            segment.used = first + count;
            let mut address = (segment.address + first * size_of::<Descriptor>()) as u64;
            let parameter = (&raw mut address).cast();
            kernel.launch(entered, kernel.any, parameter, (cut, count), way)?;
            left -= count as u64;
        }
        Ok(())
    }

    /// Goes on to another segment unless `count` more descriptors fit, `SEGMENT` at most; gives where they start.
    fn make_room(
        &mut self,
        count: usize,
        stream: sys::CUstream,
        entered: &Entered<'_>,
    ) -> Result<usize> {
        if let Some(segment) = &self.current
            && count <= SEGMENT - segment.used
        {
            return Ok(segment.used);
        }
        if let Some(full) = self.current.take() {
            match self.context.mark(stream, entered) {
                Ok(event) => self.busy.push_back((event, full)),
                Err(error) => {
                    self.current = Some(full);
                    return Err(error);
                }
            }
        }
        let segment = match self.reusable(entered)? {
            Some(segment) => segment,
            None => self.allocate(entered)?,
        };
        self.current = Some(segment);
        Ok(0)
    }

    /// The oldest segment, if its launches are over; waits for it when there are too many.
    fn reusable(&mut self, entered: &Entered<'_>) -> Result<Option<Segment>> {
        let core = entered.core();
        let Some((event, _)) = self.busy.front() else {
            return Ok(None);
        };
        // SAFETY: the event is alive, recorded, and of this context.
        let over = unsafe { (core.event_query)(event.raw()) } == super::driver::SUCCESS;
        if !over && self.busy.len() < MOST_SEGMENTS {
            return Ok(None);
        }
        if !over {
            // SAFETY: as above.
            let code = unsafe { (core.event_synchronize)(event.raw()) };
            self.context.check(code, "waiting for the ring")?;
        }
        Ok(self
            .busy
            .pop_front()
            .map(|(_, segment)| Segment { used: 0, ..segment }))
    }

    fn allocate(&self, entered: &Entered<'_>) -> Result<Segment> {
        let mut address: *mut c_void = std::ptr::null_mut();
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let size = SEGMENT * size_of::<Descriptor>();
        // SAFETY: the context is current; one address is written, to one of ours.
        let code = unsafe { (entered.core().allocate_host)(&raw mut address, size, flags) };
        self.context.check(code, "allocating descriptors")?;
        Ok(Segment {
            address: address as usize,
            used: 0,
        })
    }
}

impl Drop for Ring {
    /// Its launches are known to be over: whoever drops a stream sees to that.
    fn drop(&mut self) {
        let Ok(entered) = self.context.enter() else {
            return;
        };
        let segments = self.busy.drain(..).map(|(_, segment)| segment);
        for segment in segments.chain(self.current.take()) {
            // SAFETY: allocated by `allocate`, freed once, and no launch reads it any more.
            let code = unsafe { (entered.core().free_host)(segment.address as *mut c_void) };
            report(
                &self.context.driver,
                code,
                "freeing descriptors",
                &self.context.uuid,
            );
        }
    }
}
