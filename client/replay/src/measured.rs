//! The model beside what was measured: the next turn under vLLM 0.32 on two H200, eager, qwen3-8b's shapes, conversations of
//! 15,000 to 25,000 tokens, 256 new tokens. docs/replay.md shows the table; a test holds it to this.

use super::{
    models::ModelShape,
    pipeline::{LinkLoad, pipelined_s},
    plan::{NodeShape, OFFLOAD_SHARE_OF_RATE},
    roofline::{Engine, Roofline},
    serving::{ISSUE_S, PASS_TOKENS},
};

/// Tokens of the typical conversation, and of the longest.
const CONTEXT: [u64; 2] = [20_000, 25_000];
/// Tokens of a turn.
const TURN: u64 = 256;
/// An error above this share is a miss.
pub const GOOD: f64 = 0.15;
/// What vLLM's own processes do for each further turn of those that come together, seconds: they do it one after the other.
/// Of 16 resident turns that came at once, on three other machines of the kind and with CUDA graphs, each one more took 19.5,
/// 21.5 and 23.6 ms (docs/benchmarks.md), of which the forward of 256 tokens is 9.7.
const HOST_S: f64 = 0.012;
/// By how much the slowest of 24 to 32 turns is later than the same work otherwise is, seconds: processors rest, and other things
/// run on the host. Of turns beside a resident prefix with one client, on four other machines of the kind and with CUDA graphs, the
/// slowest came 9, 15, 17 and 18 ms after the median (docs/benchmarks.md).
const SCATTER_S: f64 = 0.015;

/// Where a turn's prefix comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Nowhere,
    /// Host memory, all of it before the turn computes. What comes at once shares the link.
    Host,
    /// The same, one turn's after the other's.
    HostInTurn,
    /// A neighbour's HBM, all of it before the turn computes; the engine takes a step without tokens meanwhile.
    NeighbourAtOnce,
    /// A neighbour's HBM, layer by layer.
    NeighbourByLayer,
    OwnPool,
}

/// One row of what was measured, milliseconds: the middle of the medians of several runs, and the longest.
struct Row {
    name: &'static str,
    source: Source,
    /// p50 and maximum with one client, and with four.
    measured: [f64; 4],
}

/// The measured table.
const TABLE: [Row; 6] = [
    Row {
        name: "computed again",
        source: Source::Nowhere,
        measured: [628.0, 821.0, 1360.0, 2778.0],
    },
    Row {
        name: "vLLM's OffloadingConnector",
        source: Source::Host,
        measured: [152.5, 190.0, 387.0, 498.0],
    },
    Row {
        name: "LMCache 0.5.6, MP server",
        source: Source::HostInTurn,
        measured: [146.0, 170.0, 295.5, 414.0],
    },
    Row {
        name: "SwiftCache `async`",
        source: Source::NeighbourAtOnce,
        measured: [83.0, 110.0, 130.5, 182.0],
    },
    Row {
        name: "SwiftCache `sync`",
        source: Source::NeighbourByLayer,
        measured: [55.5, 66.0, 109.5, 147.0],
    },
    Row {
        name: "resident in the engine's own pool",
        source: Source::OwnPool,
        measured: [62.5, 91.0, 127.0, 165.0],
    },
];

/// One cell: what was measured and what the model says, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cell {
    /// Which arm.
    pub arm: &'static str,
    /// Clients at a time.
    pub clients: usize,
    /// Whether it is the longest of all, rather than the median.
    pub longest: bool,
    /// What was measured.
    pub measured_ms: f64,
    /// What the model says.
    pub predicted_ms: f64,
}

impl Cell {
    /// By which share the prediction is too long, or too short when it is negative.
    pub fn error(&self) -> f64 {
        self.predicted_ms / self.measured_ms - 1.0
    }
}

/// Every cell of the table.
///
/// # Errors
/// Never, with the models and nodes that are known.
pub fn cells() -> Result<Vec<Cell>, String> {
    let node = NodeShape::by_name("hgx-h200")?;
    let roofline = Roofline {
        model: *ModelShape::by_name("qwen3-8b")?,
        gpu: node.gpu,
        engine: Engine::VLLM_EAGER,
    };
    let mut cells = Vec::new();
    for row in TABLE {
        for (index, measured_ms) in row.measured.into_iter().enumerate() {
            let (clients, longest) = ([1, 4][index / 2], index % 2 == 1);
            let times = turns_s(&roofline, &node, row.source, clients, longest);
            let predicted_s = if longest {
                times[times.len() - 1] + SCATTER_S
            } else {
                (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2.0
            };
            cells.push(Cell {
                arm: row.name,
                clients,
                longest,
                measured_ms,
                predicted_ms: predicted_s * 1e3,
            });
        }
    }
    Ok(cells)
}

/// When each of the turns that come at once has its first token, seconds. The longest comes behind typical ones, and has
/// just missed a pass of the others.
fn turns_s(
    roofline: &Roofline,
    node: &NodeShape,
    source: Source,
    clients: usize,
    longest: bool,
) -> Vec<f64> {
    let engine = roofline.engine;
    let layers = roofline.model.layers;
    let bytes = |context: &u64| (context * roofline.model.bytes_per_token()) as f64;
    let mut contexts = vec![CONTEXT[0]; clients];
    if longest && let Some(last) = contexts.last_mut() {
        *last = CONTEXT[1];
    }
    let compute_s = |context: &u64| match source {
        Source::Nowhere => roofline.prefill_s(context + TURN, 0),
        _ => roofline.prefill_s(TURN, *context),
    };
    // Turns that fit into one pass together end together; longer ones, and those whose loads follow one another, do not.
    let together = match source {
        Source::Nowhere | Source::HostInTurn => 1,
        _ => (PASS_TOKENS / TURN) as usize,
    };
    let all: f64 = contexts.iter().map(bytes).sum();
    let host_s = node.rates.host * OFFLOAD_SHARE_OF_RATE;
    let before_s = match source {
        Source::Host => all / host_s,
        Source::NeighbourAtOnce => all / node.rates.nvlink + engine.step_s,
        _ => 0.0,
    };
    // The host's work for the others goes on beside loads.
    let others_s = HOST_S * (together.min(clients) - 1) as f64;
    let mut at_s = engine.request_s + before_s.max(others_s);
    if longest && together > 1 {
        at_s += contexts[1..].iter().map(compute_s).sum::<f64>();
    }
    let mut loaded_s = at_s;
    let mut ends_s = Vec::with_capacity(clients);
    for pass in contexts.chunks(together) {
        let pass_s = pass.iter().map(compute_s).sum::<f64>().max(engine.step_s);
        if source == Source::HostInTurn {
            loaded_s += pass.iter().map(bytes).sum::<f64>() / host_s;
            at_s = at_s.max(loaded_s);
        }
        let load = LinkLoad {
            layer_bytes: pass.iter().map(bytes).sum::<f64>() / layers as f64,
            bytes_per_second: node.rates.nvlink,
            issue_s: ISSUE_S,
        };
        at_s += match source {
            Source::NeighbourByLayer => pipelined_s(layers, pass_s / layers as f64, &[load]),
            _ => pass_s,
        };
        ends_s.resize(ends_s.len() + pass.len(), at_s);
    }
    ends_s
}

/// The table for docs/replay.md, in Markdown.
///
/// # Errors
/// As [`cells`].
pub fn markdown() -> Result<String, String> {
    let mut text = "| next turn, two H200, eager | 1 client: p50 | max | 4 clients: p50 | max |\n\
                    | --- | ---: | ---: | ---: | ---: |\n"
        .to_owned();
    for row in cells()?.chunks(4) {
        text += &format!("| {} |", row[0].arm);
        for cell in row {
            let miss = if cell.error().abs() > GOOD { "**" } else { "" };
            text += &format!(
                " {:.0} of {:.0} ms, {miss}{:+.0} %{miss} |",
                cell.predicted_ms,
                cell.measured_ms,
                cell.error() * 100.0
            );
        }
        text += "\n";
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = include_str!("../../../docs/replay.md");

    #[test]
    fn the_page_shows_every_cell_and_its_error() {
        let table = markdown().unwrap();
        assert!(PAGE.contains(&table), "docs/replay.md lacks\n{table}");
        let cells = cells().unwrap();
        let misses = cells
            .iter()
            .filter(|cell| cell.error().abs() > GOOD)
            .count();
        let said = format!("{misses} of {} cells miss 15 %", cells.len());
        assert!(PAGE.contains(&said), "docs/replay.md lacks: {said}");
    }

    #[test]
    fn one_client_is_predicted_and_a_wrong_model_would_be_found_out() {
        let cells = cells().unwrap();
        let medians = cells
            .iter()
            .filter(|cell| cell.clients == 1 && !cell.longest);
        for cell in medians {
            assert!(cell.error().abs() <= GOOD, "{cell:?}: {:+.2}", cell.error());
        }
        // The twin: the efficiency that was assumed before is far off.
        let node = NodeShape::by_name("hgx-h200").unwrap();
        let roofline = Roofline {
            model: *ModelShape::by_name("qwen3-8b").unwrap(),
            gpu: node.gpu,
            engine: Engine {
                compute_efficiency: 0.5,
                ..Engine::VLLM_EAGER
            },
        };
        let slow = turns_s(&roofline, &node, Source::Nowhere, 1, false)[0] * 1e3;
        assert!(slow / TABLE[0].measured[0] - 1.0 > GOOD, "{slow}");
    }
}
