//! The server with small numbers, which the comments work out by hand.

use super::*;
use crate::{
    models::ModelShape,
    roofline::{Gpu, tests::ROUND},
    trace::BLOCK_TOKENS,
};

/// The GPU reaches 1 FLOP/s, so a token takes 2 s of prefill in any context. Reading memory takes no time.
fn serving(pool_blocks: u32) -> Serving {
    Serving {
        roofline: Roofline {
            model: ModelShape {
                name: "round",
                source: "test",
                parameters: 1.0,
                layers: 2,
                heads: 0,
                kv_heads: 1,
                head_dim: 1,
            },
            gpu: Gpu {
                name: "round",
                source: "test",
                flops: 2.0,
                hbm_bytes_per_second: 1e30,
                hbm_bytes: 1,
                host_bytes_per_second: 1,
            },
            engine: ROUND,
        },
        rates: LinkRates {
            nvlink: 1e30,
            pcie: 1e30,
            host: 1e30,
        },
        pool_blocks,
        block_tokens: BLOCK_TOKENS,
        prefix_caching: true,
        loading: Loading::LayerByLayer,
        stretch: 1.0,
    }
}

fn request(arrival_s: f64, input_tokens: u64, output_tokens: u64, ids: &[u8]) -> Request {
    Request {
        arrival_s,
        input_tokens,
        output_tokens,
        blocks: ids.iter().map(|id| BlockHash([*id; 16])).collect(),
    }
}

fn run(requests: &[Request], serving: &Serving) -> Outcome {
    serve(requests, serving, &mut Recompute, &mut |_| ()).unwrap()
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{found:?}");
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < 1e-6, "{found:?} is not {expected:?}");
    }
}

#[test]
fn first_come_first_served_by_hand() {
    let requests = [
        request(0.0, 10, 0, &[1]),
        request(5.0, 20, 0, &[2]),
        request(90.0, 30, 0, &[3]),
    ];
    // The first runs 0..20. The second waits from 5 and runs 20..60. The server is idle until 90; the third runs
    // 90..150.
    let outcome = run(&requests, &serving(8));
    close(&outcome.ttft_s, &[20.0, 55.0, 60.0]);
    // Busy 0..60 and 90..150.
    close(&[outcome.busy_s, outcome.span_s], &[120.0, 150.0]);
    assert_eq!(outcome.utilisation(), 0.8);
}

#[test]
fn stretching_moves_arrivals_apart() {
    let requests = [request(0.0, 10, 0, &[1]), request(5.0, 20, 0, &[2])];
    let stretched = Serving {
        stretch: 4.0,
        ..serving(8)
    };
    close(&run(&requests, &stretched).ttft_s, &[20.0, 40.0]);
}

#[test]
fn a_prefix_in_the_pool_is_not_computed_again() {
    let requests = [
        request(0.0, 600, 0, &[1, 2]),
        request(2000.0, 700, 0, &[1, 3]),
        request(4000.0, 600, 0, &[1, 2]),
    ];
    let outcome = run(&requests, &serving(8));
    // The second computes 700 - 512 tokens. The third finds both blocks and computes only its last token.
    close(&outcome.ttft_s, &[1200.0, 376.0, 2.0]);
    assert_eq!((outcome.hits[&Tier::Local], outcome.blocks), (3, 6));
}

#[test]
fn decoding_rides_along_with_a_prefill() {
    let requests = [request(0.0, 10, 5, &[1]), request(20.0, 10, 0, &[2])];
    // The one pass of the second also decodes one token of the first, which costs 2 s like any token.
    close(&run(&requests, &serving(8)).ttft_s, &[20.0, 22.0]);
}

#[test]
fn a_full_pool_makes_the_next_wait_for_an_answer_to_end() {
    let requests = [request(0.0, 10, 5, &[1]), request(0.0, 10, 5, &[2])];
    // Two slots hold prompt and answer of the first. Its five tokens take 2 s each; then the second takes 20 s.
    let outcome = run(&requests, &serving(2));
    close(&outcome.ttft_s, &[20.0, 50.0]);
    close(&[outcome.busy_s], &[50.0]);
    // With four slots the second need not wait, but one token of the first is decoded in its pass.
    close(&run(&requests, &serving(4)).ttft_s, &[20.0, 42.0]);
}

#[test]
fn what_can_never_fit_is_refused_and_counted() {
    let requests = [request(0.0, 1025, 0, &[1, 2, 3]), request(0.0, 10, 0, &[4])];
    let outcome = run(&requests, &serving(2));
    assert_eq!(outcome.refused, 1);
    close(&outcome.ttft_s, &[20.0]);
}

/// Finds every block that the pool lacks in one tier.
struct Everything(Tier);

impl Arm for Everything {
    fn advance(&mut self, _now_s: f64) -> Result<(), ReplayError> {
        Ok(())
    }

    fn prefill(
        &mut self,
        blocks: &[BlockHash],
        allocation: &Allocation,
    ) -> Result<Vec<Fetched>, ReplayError> {
        Ok(vec![Fetched {
            tier: self.0,
            blocks: (blocks.len() - allocation.hits) as u64,
        }])
    }
}

#[test]
fn loads_take_the_time_of_their_link() {
    // Two layers of 512 tokens * 4 bytes are 2048 bytes each. At 256 B/s a layer takes 8 s and 10 us. After both,
    // one layer of the last token computes (1 s).
    let rates = LinkRates {
        host: 256.0,
        pcie: 512.0,
        nvlink: 2048.0,
    };
    let serving = Serving {
        rates,
        ..serving(8)
    };
    let requests = [request(0.0, 512, 0, &[1])];
    for (tier, expected) in [
        (Tier::Host, 17.000_02),
        (Tier::DonorHost, 33.000_02),
        (Tier::DonorPcie, 9.000_02),
        (Tier::DonorNvlink, 3.000_02),
        (Tier::Local, 2.0),
    ] {
        let mut arm = Everything(tier);
        let outcome = serve(&requests, &serving, &mut arm, &mut |_| ()).unwrap();
        close(&outcome.ttft_s, &[expected]);
        assert_eq!(outcome.hits[&tier], 1);
    }
}

#[test]
fn the_stretch_brings_the_server_to_the_asked_utilisation() {
    let requests: Vec<_> = (0..200u32)
        .map(|index| {
            request(
                f64::from(index),
                10 + u64::from(index % 7),
                3,
                &[index as u8],
            )
        })
        .collect();
    let serving = serving(1000);
    let stretch = stretch_for(&requests, &serving, 0.8).unwrap();
    let outcome = run(&requests, &Serving { stretch, ..serving });
    let found = outcome.utilisation();
    assert!(
        (found - 0.8).abs() < 0.02,
        "{found} at a stretch of {stretch}"
    );
}
