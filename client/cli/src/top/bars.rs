//! A device's HBM as a stacked bar, which can be read without colours.

use ratatui::{
    style::{Color, Style},
    text::Span,
};
use swiftcache_proto::v1;

/// A part of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: &'static str,
    pub(super) glyph: &'static str,
    colour: Color,
}

impl Part {
    pub(super) fn span(self, cells: usize) -> Span<'static> {
        Span::styled(self.glyph.repeat(cells), Style::new().fg(self.colour))
    }
}

/// The parts in the order in which they are stacked. The rest of the bar is HBM that nobody uses.
pub(super) const PARTS: [Part; 7] = [
    part("others", "·", Color::DarkGray),
    part("leased", "█", Color::Green),
    part("working set", "W", Color::Magenta),
    part("draining", "▓", Color::Yellow),
    part("scrubbing", "▒", Color::Blue),
    part("zombie", "Z", Color::Red),
    part("free", "░", Color::Cyan),
];

const fn part(name: &'static str, glyph: &'static str, colour: Color) -> Part {
    Part {
        name,
        glyph,
        colour,
    }
}

/// The bytes of each of [`PARTS`].
pub(super) fn bytes(device: &v1::DeviceStatus) -> [u64; 7] {
    let account = device.account.unwrap_or_default();
    [
        // The HBM in use includes the offered HBM.
        device.hbm_used_bytes.saturating_sub(account.offered_bytes),
        (account.leased_bytes).saturating_sub(account.working_set_bytes),
        account.working_set_bytes,
        account.draining_bytes,
        account.scrubbing_bytes,
        account.zombie_bytes,
        account.free_bytes,
    ]
}

/// How many of `width` cells each part takes, in proportion to `total`. A part that is not empty takes at least one
/// cell, so that a single zombie can be seen.
pub(super) fn cells(parts: [u64; 7], total: u64, width: usize) -> [usize; 7] {
    let sum: u128 = parts.into_iter().map(u128::from).sum();
    let total = sum.max(total.into()).max(1);
    let mut cells = parts.map(|bytes| {
        let exact = (u128::from(bytes) * width as u128 + total / 2) / total;
        (exact as usize).max(usize::from(bytes > 0))
    });
    while cells.iter().sum::<usize>() > width {
        let Some(most) = cells.iter_mut().max() else {
            break;
        };
        *most -= 1;
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_long_as_its_bytes_and_shows_the_smallest() {
        assert_eq!(
            cells([0, 50, 0, 0, 0, 0, 25], 100, 20),
            [0, 10, 0, 0, 0, 0, 5]
        );
        assert_eq!(
            cells([0, 50, 0, 0, 0, 1, 49], 100, 10),
            [0, 5, 0, 0, 0, 1, 4]
        );
        assert_eq!(
            cells([90, 10, 10, 10, 10, 10, 10], 100, 7)
                .iter()
                .sum::<usize>(),
            7
        );
        assert_eq!(cells([0; 7], 0, 10), [0; 7]);
        assert_eq!(cells([1; 7], 7, 0), [0; 7]);
        assert_eq!(cells([u64::MAX / 8; 7], u64::MAX, 8), [1; 7]);
    }

    #[test]
    fn use_by_others_is_what_is_not_on_offer() {
        let device = v1::DeviceStatus {
            hbm_used_bytes: 60,
            account: Some(v1::Account {
                offered_bytes: 40,
                leased_bytes: 30,
                working_set_bytes: 20,
                free_bytes: 10,
                ..v1::Account::default()
            }),
            ..v1::DeviceStatus::default()
        };
        assert_eq!(bytes(&device), [20, 10, 20, 0, 0, 0, 10]);
    }
}
