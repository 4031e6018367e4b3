//! An area of blocks: slots in one piece of memory, and the way to it.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use swiftcache_proto::domain::LinkKind;

use super::route::Route;
use crate::device::Memory;

/// An area's number. Never used again in this process: who holds on to the number of an area that is gone finds nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct AreaId(pub(crate) u64);

impl AreaId {
    fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What copies need to know of an area. Shared with a transfer only while that is being queued: it keeps the memory mapped.
#[derive(Debug)]
pub(crate) struct BlockArea {
    pub(crate) id: AreaId,
    pub(crate) memory: Memory,
    /// Where each layer's slot 0 starts in `memory`, bytes.
    pub(crate) layer_offsets: Vec<u64>,
    pub(crate) slots: u32,
    pub(crate) link: LinkKind,
    pub(crate) route: Arc<Route>,
    /// The bytes outlive whoever allocated the memory, as long as it is mapped here.
    pub(crate) lasts: bool,
    open: AtomicBool,
    /// Keeps the memory mapped, where that takes more than the memory itself.
    _mapping: Option<Box<dyn Any + Send + Sync>>,
}

impl BlockArea {
    /// `slots` slots at `base` in `memory`, layer-major; a block has `layer_bytes` in each layer.
    pub(crate) fn new(
        memory: Memory,
        base: u64,
        slots: u32,
        layer_bytes: &[u64],
        link: LinkKind,
        route: Arc<Route>,
    ) -> Self {
        let mut offset = base;
        let layer_offsets = layer_bytes
            .iter()
            .map(|bytes| {
                let here = offset;
                offset += bytes * u64::from(slots);
                here
            })
            .collect();
        Self {
            id: AreaId::next(),
            memory,
            layer_offsets,
            slots,
            link,
            route,
            lasts: false,
            open: AtomicBool::new(true),
            _mapping: None,
        }
    }

    /// Says that the bytes outlive whoever allocated the memory, as long as it is mapped here.
    pub(crate) fn lasting(mut self, lasts: bool) -> Self {
        self.lasts = lasts;
        self
    }

    /// Keeps `mapping` as long as the area.
    pub(crate) fn keeping(mut self, mapping: impl Any + Send + Sync) -> Self {
        self._mapping = Some(Box::new(mapping));
        self
    }

    /// Whether new transfers may touch it, as far as is known: whoever registers them knows for certain.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// From now on new transfers may touch it, or may not.
    pub(crate) fn set_open(&self, open: bool) {
        self.open.store(open, Ordering::Release);
    }
}
