//! A course of copies: where bytes are copied from and to, and the plain copy that takes the same way.

use anyhow::Result;
use swiftcache_client::device::Memory;

use super::{Bench, Row};
use crate::engine::Place;

/// Copies from one memory to another.
pub(super) struct Course<'a> {
    pub(super) bench: &'a Bench<'a>,
    /// Stands before the group of every row that is measured on this course.
    pub(super) prefix: &'static str,
    /// Stands before the case of every row.
    pub(super) way: String,
    pub(super) from: &'a Memory,
    pub(super) to: &'a Memory,
    /// Where the plain copy reads: an allocation of the engine, as large as `from`.
    pub(super) plain_from: Place,
    /// Where the plain copy writes: an allocation of the engine, as large as `to`.
    pub(super) plain_to: Place,
    /// The name of the plain copy.
    pub(super) against: String,
}

/// Times of a copy and of the plain copy of the same number of bytes.
#[derive(Clone, Copy)]
pub(super) struct Times {
    /// The copy, seconds.
    pub(super) seconds: f64,
    /// The plain copy, seconds.
    pub(super) plain: f64,
}

impl<'a> Course<'a> {
    /// Copies inside the first device.
    pub(super) fn within(bench: &'a Bench<'a>) -> Self {
        let [from, to] = &bench.memories;
        let [plain_from, plain_to] = bench.addresses.map(|address| bench.engine.near(address));
        Self {
            bench,
            prefix: "",
            way: String::new(),
            from,
            to,
            plain_from,
            plain_to,
            against: "plain device-to-device copy".to_owned(),
        }
    }

    /// Bytes that both sides hold: the size of the smaller one.
    pub(super) fn size(&self) -> u64 {
        self.from.bytes().min(self.to.bytes())
    }

    /// The row of a copy of `bytes` on this course.
    pub(super) fn row(&self, group: &str, case: &str, bytes: u64, times: Times) -> Row {
        Row {
            group: format!("{}{group}", self.prefix),
            case: format!("{}{case}", self.way),
            bytes,
            seconds: times.seconds,
            against: self.against.clone(),
            ratio: Some(times.plain / times.seconds),
        }
    }

    /// Seconds of one plain copy of `bytes`, when many follow one another.
    pub(super) fn plain(&self, bytes: u64) -> Result<f64> {
        let bench = self.bench;
        let (to, from) = (self.plain_to, self.plain_from);
        let places = (bench.scale.memory / bytes).max(1);
        bench.time(
            |number| {
                let offset = (number % places) * bytes;
                (bench.engine).copy_across(bench.plain, to, from, offset, bytes)
            },
            || bench.engine.synchronize(bench.plain),
        )
    }
}
