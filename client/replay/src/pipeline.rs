//! The layer pipeline in modelled time. Layer `l` computes when layer `l - 1` has computed and the cached KV of
//! layer `l` has arrived. Loads over one link follow one another; loads over different links run side by side.

/// The load of one prefill over one link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkLoad {
    /// Bytes of one layer.
    pub layer_bytes: f64,
    /// The link's rate, bytes/s.
    pub bytes_per_second: f64,
    /// Time to issue one layer's copy, before its first byte moves, seconds.
    pub issue_s: f64,
}

impl LinkLoad {
    fn layer_s(&self) -> f64 {
        self.issue_s + self.layer_bytes / self.bytes_per_second
    }
}

/// Seconds from the start of the first load until the last layer has computed. All layers have the same cost.
///
/// `compute_start[l] = max(compute_done[l-1], load_done[l])`; on each link `load_done[l] = (l + 1) * layer_s`.
pub fn pipelined_s(layers: usize, layer_compute_s: f64, loads: &[LinkLoad]) -> f64 {
    let slowest = loads.iter().map(LinkLoad::layer_s).fold(0.0, f64::max);
    (1..=layers).fold(0.0, |done: f64, layer| {
        done.max(layer as f64 * slowest) + layer_compute_s
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The same machine, simulated tick by tick. Each link loads one layer at a time. The GPU computes one layer at
    /// a time, and only when the layer before is computed and all loads of the layer have arrived.
    fn tick_by_tick(layers: usize, compute: u32, loads: &[u32]) -> u32 {
        let mut landed = vec![vec![0u32; layers]; loads.len()];
        let mut computed = vec![0u32; layers];
        let mut now = 0;
        while computed[layers - 1] < compute {
            let ready: Vec<bool> = (0..layers)
                .map(|layer| {
                    let all = (0..loads.len()).all(|link| landed[link][layer] == loads[link]);
                    all && (layer == 0 || computed[layer - 1] == compute)
                })
                .collect();
            for (link, ticks) in loads.iter().enumerate() {
                if let Some(layer) = landed[link].iter_mut().find(|done| **done < *ticks) {
                    *layer += 1;
                }
            }
            let current = (0..layers).find(|layer| computed[*layer] < compute);
            if let Some(layer) = current
                && ready[layer]
            {
                computed[layer] += 1;
            }
            now += 1;
        }
        now
    }

    fn load(seconds: f64) -> LinkLoad {
        LinkLoad {
            layer_bytes: seconds * 8.0,
            bytes_per_second: 8.0,
            issue_s: 0.0,
        }
    }

    #[test]
    fn without_loads_it_is_the_compute_alone() {
        assert_eq!(pipelined_s(4, 2.0, &[]), 8.0);
    }

    #[test]
    fn the_longer_of_both_hides_all_but_one_layer_of_the_other() {
        assert_eq!(pipelined_s(4, 2.0, &[load(1.0)]), 9.0);
        assert_eq!(pipelined_s(4, 1.0, &[load(2.0)]), 9.0);
    }

    #[test]
    fn issuing_costs_count() {
        let slow = LinkLoad {
            issue_s: 0.5,
            ..load(1.0)
        };
        assert_eq!(pipelined_s(2, 1.0, &[slow]), 4.0);
    }

    proptest! {
        #[test]
        fn agrees_with_a_machine_run_tick_by_tick(
            layers in 1usize..12,
            compute in 1u32..9,
            loads in proptest::collection::vec(1u32..9, 0..3),
        ) {
            let links: Vec<_> = loads.iter().map(|ticks| load(f64::from(*ticks))).collect();
            let expected = f64::from(tick_by_tick(layers, compute, &loads));
            prop_assert_eq!(pipelined_s(layers, f64::from(compute), &links), expected);
        }
    }
}
