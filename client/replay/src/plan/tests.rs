//! Plans of small traces that are worked out by hand, and what a plan says of each kind of traffic.

use swiftcache_proto::domain::BlockHash;

use super::*;
use crate::{
    donor_load::NeighbourRequest,
    trace::{BLOCK_TOKENS, Request},
};

pub(crate) const GIB: u64 = 1 << 30;

/// A conversation's turn: `blocks` of the conversation so far.
fn turn(at_s: f64, conversation: u32, blocks: u32) -> Request {
    let hash = |block: u32| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&conversation.to_le_bytes());
        bytes[4..8].copy_from_slice(&block.to_le_bytes());
        BlockHash(bytes)
    };
    Request {
        arrival_s: at_s,
        input_tokens: u64::from(blocks) * BLOCK_TOKENS,
        output_tokens: 64,
        blocks: (0..blocks).map(hash).collect(),
    }
}

fn trace(requests: Vec<Request>) -> Trace {
    Trace {
        name: "test".to_owned(),
        format: "made up",
        notes: Vec::new(),
        block_tokens: BLOCK_TOKENS,
        requests,
    }
}

/// Rounds of `conversations`, each of `blocks` blocks: a block is used again after all others were.
pub(crate) fn rounds(conversations: u32, blocks: u32, rounds: u32) -> Trace {
    let turns = (0..rounds * conversations)
        .map(|index| turn(f64::from(index), index % conversations, blocks));
    trace(turns.collect())
}

fn plan(trace: &Trace, lending: Lending, host_bytes: u64) -> Plan<'_> {
    let node = NodeShape::by_name("hgx-h100").unwrap();
    let model = *ModelShape::by_name("qwen3-8b").unwrap();
    let roofline = Roofline {
        model,
        gpu: node.gpu,
        engine: Engine::VLLM,
    };
    let load = [NeighbourRequest {
        arrival_s: 0.0,
        input_tokens: 1_000,
        output_tokens: 100,
    }];
    Plan {
        trace,
        model,
        tensor_parallel: 1,
        lenders: Lenders {
            lending,
            hbm_bytes: node.gpu.hbm_bytes,
            slab_bytes: GIB,
            headroom_bytes: 4 * GIB,
            load: TokensInFlight::new(&load, &roofline, 8),
            base_bytes: 20 * GIB,
            token_bytes: model.bytes_per_token(),
        },
        node,
        donors: 3,
        host_bytes,
        stretch: Some(1.0),
        move_blocks: true,
        retention: Retention::Value,
    }
}

use crate::donor_load::TokensInFlight;

pub(crate) fn planned(trace: &Trace, lending: Lending, host_bytes: u64) -> PlanReport {
    plan(trace, lending, host_bytes)
        .run(&mut |_, _| ())
        .unwrap()
}

#[test]
fn a_working_set_that_two_donors_hold_is_found_with_two_donors() {
    // 60 conversations of 40 blocks are 2,400; the pool holds 778, and a donor of 64 slabs of 14 blocks 896.
    let trace = rounds(60, 40, 4);
    let report = planned(&trace, Lending::Fixed(64 * GIB), 0);
    // Without host memory of its own, the sweep still tries some.
    let sizes = report.host_sweep.iter().map(|point| point.host_bytes);
    assert!(sizes.collect::<Vec<_>>().is_sorted_by(|a, b| a < b));
    let found: Vec<f64> = report.ladder().map(|arm| arm.hit_rate).collect();
    assert_eq!(found.len(), 4);
    assert!((report.workload.unbounded_hit_rate - 0.75).abs() < 1e-9);
    assert!(
        found[0] < 0.05,
        "a cycle longer than an LRU pool: {found:?}"
    );
    assert!(found[3] > 0.74, "2,688 slots hold all 2,400: {found:?}");
    assert!(found.is_sorted(), "{found:?}");
    let all = report.arm("swiftcache-3").unwrap();
    assert_eq!(all.holds.donor_bytes, 3 * 64 * 14 * report.node.block_bytes);
    assert_eq!(all.lent_least_bytes, all.holds.donor_bytes);
    assert!(all.longest_stitched_tokens > 3 * all.longest_context_tokens);
    assert!(
        report
            .advice
            .contains("3 donors of 67.6 GB each give 100 %")
            && report.advice.contains("that is all that repeats")
            && report.advice.contains("would do about the same"),
        "{}",
        report.advice
    );
    // The twin: traffic that repeats nothing gains nothing, and the plan says so.
    let once = trace_once();
    let report = planned(&once, Lending::Fixed(64 * GIB), 0);
    assert!(report.advice.contains("gives nothing"), "{}", report.advice);
}

fn trace_once() -> Trace {
    trace(
        (0..100)
            .map(|index| turn(f64::from(index), index, 9))
            .collect(),
    )
}

#[test]
fn what_lies_further_apart_than_the_node_holds_is_said_to() {
    let trace = rounds(400, 40, 2);
    let report = planned(&trace, Lending::Fixed(16 * GIB), 0);
    assert!(
        report.advice.contains("further apart than this node holds"),
        "{}",
        report.advice
    );
    // The twin: what the own pool holds needs nobody.
    let report = planned(&rounds(10, 40, 4), Lending::Fixed(16 * GIB), 0);
    assert!(
        report.advice.contains("vLLM's own pool already"),
        "{}",
        report.advice
    );
}

#[test]
fn arms_of_equal_bytes_have_equal_bytes_and_all_state_theirs() {
    let trace = rounds(60, 40, 3);
    let report = planned(&trace, Lending::Elastic, 256 * GIB);
    let all = report.ladder().last().unwrap();
    let equal = report.arm("offload-equal-bytes").unwrap();
    assert_eq!(equal.holds.total(), all.holds.total());
    assert!(all.holds.donor_bytes > 100 * GIB, "{:?}", all.holds);
    for arm in &report.arms {
        assert!(arm.holds.pool_bytes > 0, "{arm:?}");
    }
    assert_eq!(report.host_sweep.len(), SWEEP.len());
    let found = |name: &str| report.arm(name).unwrap().hit_rate;
    assert_eq!(found("no-cache"), 0.0);
    assert!(found("vllm") <= found("vllm-offload"));
    let p50 = |name: &str| report.arm(name).unwrap().ttft.p50_ms;
    assert!(p50("offload-ideal") < p50("vllm-offload"));
}

#[test]
fn the_table_is_80_columns_wide_and_has_the_figures_of_the_document() {
    let trace = rounds(60, 40, 3);
    let report = planned(&trace, Lending::Elastic, 64 * GIB);
    let text = report.text();
    for line in text.lines() {
        assert!(
            line.chars().count() <= 80,
            "{}: {line}",
            line.chars().count()
        );
    }
    for arm in &report.arms {
        assert!(text.contains(&arm.what), "{} is not in\n{text}", arm.what);
        let found = format!("{:.1} %", arm.hit_rate * 100.0);
        assert!(text.contains(&found), "{found} is not in\n{text}");
    }
    assert!(text.contains("MODELLED"));
    let json = serde_json::to_string(&report).unwrap();
    let read: PlanReport = serde_json::from_str(&json).unwrap();
    for (read, arm) in read.arms.iter().zip(&report.arms) {
        assert_eq!((&read.name, read.holds), (&arm.name, arm.holds));
        assert!((read.hit_rate - arm.hit_rate).abs() < 1e-9);
    }
    assert_eq!(read.advice, report.advice);
}

#[test]
fn more_donors_than_the_node_has_are_refused() {
    let trace = trace_once();
    let mut plan = plan(&trace, Lending::Idle, 0);
    plan.donors = 8;
    let error = plan.run(&mut |_, _| ()).unwrap_err().to_string();
    assert!(
        error.contains("--donors") && error.contains("8 GPUs"),
        "{error}"
    );
}

#[test]
fn donors_that_lend_more_than_a_gpu_has_are_refused() {
    let trace = trace_once();
    let run = |size| plan(&trace, Lending::Fixed(size), 0).run(&mut |_, _| ());
    let error = run(1_000_000_000_000).unwrap_err().to_string();
    for part in ["--donor: ", "1.0 TB", "h100-sxm", "85.9 GB"] {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    assert!(run(80 * GIB + 1).is_err());
    // The twin: all that a GPU has.
    let report = run(80 * GIB).unwrap();
    assert!(
        report.node.lending.contains("85.9 GB"),
        "{}",
        report.node.lending
    );
}
