//! The load of a donor's own model, and the tokens that the model holds in its KV cache under that load.
//!
//! A load file is CSV: rows of `timestamp,input,output` (ms, tokens, tokens), or one of the tables that a trace may be: Azure's,
//! BurstGPT's, ServeGen's.

use std::{io::Read, path::Path};

use super::{
    roofline::Roofline,
    trace::{MAX_SPAN_S, TraceError, open, rows},
};

/// One request to a donor's own model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NeighbourRequest {
    /// Seconds from the first row.
    pub arrival_s: f64,
    /// Prompt, tokens.
    pub input_tokens: u64,
    /// Answer, tokens.
    pub output_tokens: u64,
}

/// Reads a load file, which may be compressed with gzip.
///
/// # Errors
/// Fails on the first row that is not a request, and names its line and field. Fails on a file without rows.
pub fn load(path: &Path) -> Result<Vec<NeighbourRequest>, TraceError> {
    read(open(path)?, &path.display().to_string())
}

/// Reads a load from `input`, row by row; `origin` names it in errors.
///
/// # Errors
/// As [`load`].
pub fn read(input: impl Read, origin: &str) -> Result<Vec<NeighbourRequest>, TraceError> {
    let refuse = |problem: String| TraceError::new(origin, None, problem);
    let mut requests: Vec<NeighbourRequest> = Vec::new();
    let columns = rows(input, origin, |_, cells| {
        requests.push(NeighbourRequest {
            arrival_s: cells.stamp_s,
            input_tokens: cells.input_tokens,
            output_tokens: cells.output_tokens,
        });
        Ok(true)
    })?;
    if requests.is_empty() {
        return Err(refuse("holds no request".to_owned()));
    }
    requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
    let zero = requests[0].arrival_s;
    columns.stamps.zero_s(zero).map_err(refuse)?;
    for request in &mut requests {
        request.arrival_s -= zero;
    }
    if requests.last().map_or(0.0, |last| last.arrival_s) > MAX_SPAN_S {
        let problem = format!("{}: spans more than a year", columns.names[0]);
        return Err(refuse(problem));
    }
    Ok(requests)
}

/// The tokens that a neighbour holds in its KV cache over time. A request holds its prompt and its answer from its
/// arrival until its answer is complete. When the load is over, it starts again.
#[derive(Clone, Debug)]
pub struct TokensInFlight {
    /// Pairs of a time in seconds and the tokens held from then on, in order of time. The first time is 0.
    steps: Vec<(f64, u64)>,
    period_s: f64,
}

impl TokensInFlight {
    /// The curve of `requests` on a neighbour with this `roofline`. A request lasts for its prefill and for one
    /// decode step per token of its answer, in a batch of `batch` sequences.
    pub fn new(requests: &[NeighbourRequest], roofline: &Roofline, batch: u64) -> Self {
        let mut changes = Vec::with_capacity(requests.len() * 2);
        for request in requests {
            let tokens = request.input_tokens + request.output_tokens;
            let context = (tokens * batch) as f64;
            let decode_s = request.output_tokens as f64 * roofline.decode_step_s(batch, context);
            let prefill_s = roofline.prefill_s(request.input_tokens.max(1), 0);
            changes.push((request.arrival_s, tokens as i128));
            changes.push((request.arrival_s + prefill_s + decode_s, -(tokens as i128)));
        }
        changes.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut held = 0;
        let mut steps = vec![(0.0, 0)];
        for (at, change) in changes {
            held += change;
            steps.push((at, u64::try_from(held).unwrap_or(0)));
        }
        let period_s = steps.last().map_or(0.0, |last| last.0).max(1.0);
        Self { steps, period_s }
    }

    /// The tokens held at `now_s` by a neighbour whose load is ahead by `phase` (a share of the whole load).
    pub fn at(&self, now_s: f64, phase: f64) -> u64 {
        let moment = (now_s + phase * self.period_s).rem_euclid(self.period_s);
        let after = self.steps.partition_point(|(at, _)| *at <= moment);
        after.checked_sub(1).map_or(0, |index| self.steps[index].1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::ModelShape,
        roofline::{Gpu, tests},
    };
    use proptest::prelude::*;

    #[test]
    fn reads_milliseconds() {
        let rows = read(
            "timestamp,input,output\n5,10,2\n1505.5, 20 ,3\n".as_bytes(),
            "t",
        )
        .unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].arrival_s, rows[0].input_tokens), (0.0, 10));
        assert!((rows[1].arrival_s - 1.5005).abs() < 1e-9);
    }

    #[test]
    fn reads_wall_clock_across_midnight_and_a_leap_day() {
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
                    2024-02-28 23:59:59.5000000,374,44\n\
                    2024-02-29 00:00:00.2500000,396,109\n\
                    2024-03-01 00:00:00,1,1\n";
        let rows = read(text.as_bytes(), "t").unwrap();
        assert_eq!(rows[1].arrival_s, 0.75);
        assert_eq!(rows[2].arrival_s, 86_400.5);
        let zones = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
                    2024-05-10 00:00:01+00:00,374,44\n\
                    2024-05-10 00:00:37+00:00,396,109\n";
        let rows = read(zones.as_bytes(), "t").unwrap();
        assert_eq!(rows[1].arrival_s, 36.0, "not second 00");
    }

    #[test]
    fn a_bad_row_is_named_by_line_and_field() {
        let head = "timestamp,input,output\n1,2,3\n";
        let wall = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        let cases = [
            (String::new(), "line 1: header"),
            ("a,b,c\n1,2,3\n".to_owned(), "line 1: header"),
            ("timestamp,input,output\n".to_owned(), "holds no request"),
            (
                "timestamp,input,output\n1700000000,1,1\n1700000060,1,1\n".to_owned(),
                "looks like seconds since 1970",
            ),
            (format!("{head}x,2,3\n"), "line 3: timestamp: is \"x\""),
            (format!("{head}NaN,2,3\n"), "line 3: timestamp"),
            (format!("{head}1,-2,3\n"), "line 3: input: is \"-2\""),
            (format!("{head}1,2,\n"), "line 3: output: is \"\""),
            (format!("{head}1,2\n"), "line: 3"),
            (format!("{wall}yesterday,1,1\n"), "line 2: TIMESTAMP"),
            (format!("{wall}2023-13-01 00:00:00,1,1\n"), "TIMESTAMP"),
            (format!("{wall}2023-12-01 00:00:00.,1,1\n"), "TIMESTAMP"),
            (format!("{wall}2023-12-01 00:00,1,1\n"), "TIMESTAMP"),
        ];
        for (text, expected) in cases {
            let error = read(text.as_bytes(), "t.csv").unwrap_err().to_string();
            assert!(error.starts_with("t.csv"), "{error}");
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn tokens_are_held_from_arrival_until_the_answer_is_out_and_the_load_repeats() {
        let roofline = Roofline {
            model: *ModelShape::by_name("qwen3-8b").unwrap(),
            gpu: *Gpu::by_name("h100-sxm").unwrap(),
            engine: tests::ROUND,
        };
        let request = |arrival_s: f64| NeighbourRequest {
            arrival_s,
            input_tokens: 1000,
            output_tokens: 100,
        };
        let curve = TokensInFlight::new(&[request(0.0), request(0.2), request(50.0)], &roofline, 8);
        assert_eq!(curve.at(0.1, 0.0), 1100);
        assert_eq!(curve.at(0.3, 0.0), 2200);
        assert_eq!(curve.at(49.0, 0.0), 0);
        assert_eq!(curve.at(curve.period_s + 0.3, 0.0), 2200);
        assert_eq!(curve.at(0.3, 0.5), 0);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = read(&bytes[..], "t");
            let headed = [b"timestamp,input,output\n", &bytes[..]].concat();
            let _ = read(&headed[..], "t");
            let wall = [b"TIMESTAMP,ContextTokens,GeneratedTokens\n", &bytes[..]].concat();
            let _ = read(&wall[..], "t");
        }
    }
}
