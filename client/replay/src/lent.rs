//! What donors lent over time, in a bounded number of moments.

use crate::report::LentPoint;

/// The most points of a curve over time.
const MOST_MOMENTS: usize = 240;

/// What donors lent until some moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Moment {
    pub(crate) at_s: f64,
    /// Blocks of room on loan.
    pub(crate) slots: u64,
    /// Slabs with blocks that were taken back since the moment before.
    pub(crate) revoked: u64,
}

/// What donors lent over time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lent {
    pub(crate) moments: Vec<Moment>,
    /// Changes that make up one moment.
    step: usize,
    pending: usize,
    revoked: u64,
    pub(crate) revocations: u64,
    pub(crate) least: Option<u64>,
    pub(crate) most: u64,
    last: Option<(f64, u64)>,
    area: f64,
    span: f64,
}

impl Lent {
    /// So many slabs with blocks were taken back.
    pub(crate) fn revoke(&mut self, slabs: u64) {
        self.revoked += slabs;
        self.revocations += slabs;
    }

    /// The curve, for a report.
    pub(crate) fn points(&self, block_bytes: u64) -> Vec<LentPoint> {
        let points = self.moments.iter().map(|moment| LentPoint {
            at_s: moment.at_s,
            bytes: moment.slots * block_bytes,
            revocations: moment.revoked,
        });
        points.collect()
    }

    /// So many blocks' room is on loan at this moment.
    pub(crate) fn note(&mut self, at_s: f64, slots: u64) {
        if let Some((since, before)) = self.last {
            self.area += (at_s - since) * before as f64;
            self.span += at_s - since;
        }
        self.last = Some((at_s, slots));
        self.least = Some(self.least.map_or(slots, |least| least.min(slots)));
        self.most = self.most.max(slots);
        self.pending += 1;
        if self.pending < self.step.max(1) {
            return;
        }
        self.pending = 0;
        let revoked = std::mem::take(&mut self.revoked);
        self.moments.push(Moment {
            at_s,
            slots,
            revoked,
        });
        if self.moments.len() > MOST_MOMENTS {
            self.step = self.step.max(1) * 2;
            let pairs = self.moments.chunks(2);
            let merged = pairs.map(|pair| {
                let revoked = pair.iter().map(|moment| moment.revoked).sum();
                let last = pair[pair.len() - 1];
                Moment { revoked, ..last }
            });
            self.moments = merged.collect();
        }
    }

    /// The average over time.
    pub(crate) fn mean(&self) -> f64 {
        match self.span > 0.0 {
            true => self.area / self.span,
            false => self.last.map_or(0.0, |(_, slots)| slots as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_is_merged_and_loses_no_revocation() {
        let mut lent = Lent::default();
        for second in 0..5_000_u32 {
            lent.revoke(u64::from(second % 3));
            lent.note(f64::from(second), u64::from(second % 10));
        }
        assert!(lent.moments.len() <= MOST_MOMENTS, "{}", lent.moments.len());
        let seen: u64 = lent.moments.iter().map(|moment| moment.revoked).sum();
        assert!(
            lent.revocations - seen <= 64,
            "{seen} of {}",
            lent.revocations
        );
        assert_eq!((lent.least, lent.most), (Some(0), 9));
        assert!((lent.mean() - 4.5).abs() < 0.1, "{}", lent.mean());
    }
}
