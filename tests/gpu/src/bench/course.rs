//! A way that bytes go, and the plain copy that goes the same way.

use anyhow::Result;
use swiftcache_client::device::Memory;

use super::{Bench, Row};
use crate::engine::Place;

/// From one memory to another.
pub(super) struct Course<'a> {
    pub(super) bench: &'a Bench<'a>,
    /// Goes before the group of whatever is measured on it.
    pub(super) prefix: &'static str,
    /// Goes before the case.
    pub(super) way: String,
    pub(super) from: &'a Memory,
    pub(super) to: &'a Memory,
    /// The engine's own memories for the plain copy, target first: as large as the others.
    pub(super) plain: (Place, Place),
    /// What the plain copy is called.
    pub(super) against: String,
}

impl<'a> Course<'a> {
    /// Inside the first device.
    pub(super) fn within(bench: &'a Bench<'a>) -> Self {
        let [from, to] = &bench.memories;
        let [plain_from, plain_to] = bench.addresses.map(|address| bench.engine.near(address));
        Self {
            bench,
            prefix: "",
            way: String::new(),
            from,
            to,
            plain: (plain_to, plain_from),
            against: "plain device-to-device copy".to_owned(),
        }
    }

    /// How much either side holds, bytes.
    pub(super) fn size(&self) -> u64 {
        self.from.bytes().min(self.to.bytes())
    }

    /// What a copy on it took, beside a plain one of the same bytes.
    pub(super) fn row(
        &self,
        group: &str,
        case: &str,
        bytes: u64,
        (took, plain): (f64, f64),
    ) -> Row {
        Row {
            group: format!("{}{group}", self.prefix),
            case: format!("{}{case}", self.way),
            bytes,
            seconds: took,
            against: self.against.clone(),
            ratio: Some(plain / took),
        }
    }

    /// Seconds for a plain copy of `bytes`, one of many.
    pub(super) fn plain(&self, bytes: u64) -> Result<f64> {
        let bench = self.bench;
        let places = (bench.scale.memory / bytes).max(1);
        bench.time(
            |number| {
                let offset = (number % places) * bytes;
                (bench.engine).copy_across(bench.plain, self.plain, offset, bytes)
            },
            || bench.engine.synchronize(bench.plain),
        )
    }
}
