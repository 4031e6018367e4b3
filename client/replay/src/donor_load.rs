//! The load of a donor's own model, and the tokens that the model holds in its KV cache under that load.
//!
//! A load file is CSV: rows of `timestamp,input,output` (ms, tokens, tokens), or the Azure traces'
//! `TIMESTAMP,ContextTokens,GeneratedTokens` with wall-clock timestamps.

use std::{fs::File, io::Read, path::Path};

use csv::{ReaderBuilder, StringRecord, Trim};

use super::{
    roofline::Roofline,
    trace::{MAX_TIMESTAMP_MS, TraceError},
};

/// The longest prompt or answer accepted, tokens.
const MAX_TOKENS: u64 = 1 << 32;

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

/// How a file writes its timestamps.
#[derive(Clone, Copy)]
enum Clock {
    Milliseconds,
    Wall,
}

/// Reads a load file.
///
/// # Errors
/// Fails on the first row that is not a request, and names its line and field. Fails on a file without rows.
pub fn load(path: &Path) -> Result<Vec<NeighbourRequest>, TraceError> {
    let origin = path.display().to_string();
    let file =
        File::open(path).map_err(|error| TraceError::new(&origin, None, error.to_string()))?;
    read(file, &origin)
}

/// Reads a load from `input`, row by row; `origin` names it in errors.
///
/// # Errors
/// As [`load`].
pub fn read(input: impl Read, origin: &str) -> Result<Vec<NeighbourRequest>, TraceError> {
    let mut rows = ReaderBuilder::new().trim(Trim::All).from_reader(input);
    let refuse = |line: Option<u64>, problem: String| TraceError::new(origin, line, problem);
    let csv_error = |error: csv::Error| {
        let line = error.position().map(csv::Position::line);
        refuse(line, error.to_string())
    };
    let header = rows.headers().map_err(csv_error)?;
    let names: Vec<&str> = header.iter().collect();
    let (clock, names) = match names[..] {
        ["timestamp", "input", "output"] => (Clock::Milliseconds, ["timestamp", "input", "output"]),
        ["TIMESTAMP", "ContextTokens", "GeneratedTokens"] => (
            Clock::Wall,
            ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
        ),
        _ => {
            return Err(refuse(
                Some(1),
                "header: takes timestamp,input,output or TIMESTAMP,ContextTokens,GeneratedTokens"
                    .to_owned(),
            ));
        }
    };
    let mut requests: Vec<NeighbourRequest> = Vec::new();
    for row in rows.records() {
        let row = row.map_err(csv_error)?;
        let line = row.position().map(csv::Position::line);
        requests.push(request(&row, clock, names).map_err(|problem| refuse(line, problem))?);
    }
    if requests.is_empty() {
        return Err(refuse(None, "holds no request".to_owned()));
    }
    requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
    let zero = requests[0].arrival_s;
    for request in &mut requests {
        request.arrival_s -= zero;
    }
    let end_ms = requests.last().map_or(0.0, |last| last.arrival_s * 1e3);
    if end_ms > MAX_TIMESTAMP_MS {
        let problem = format!("{}: spans more than a year", names[0]);
        return Err(refuse(None, problem));
    }
    Ok(requests)
}

fn request(row: &StringRecord, clock: Clock, names: [&str; 3]) -> Result<NeighbourRequest, String> {
    let text = |column: usize| row.get(column).unwrap_or_default();
    let tokens = |column: usize| {
        let parsed = text(column).parse().ok();
        let bounded = parsed.filter(|count: &u64| *count <= MAX_TOKENS);
        bounded.ok_or_else(|| {
            format!(
                "{}: is {:?}; takes 0 to {MAX_TOKENS} tokens",
                names[column],
                short(text(column))
            )
        })
    };
    let stamp = text(0);
    let arrival_s = match clock {
        Clock::Milliseconds => stamp
            .parse()
            .ok()
            .filter(|ms: &f64| (0.0..=MAX_TIMESTAMP_MS).contains(ms))
            .map(|ms| ms / 1e3),
        Clock::Wall => wall_clock_s(stamp),
    };
    let takes = match clock {
        Clock::Milliseconds => "milliseconds from 0",
        Clock::Wall => "YYYY-MM-DD hh:mm:ss.fraction",
    };
    Ok(NeighbourRequest {
        arrival_s: arrival_s
            .ok_or_else(|| format!("{}: is {:?}; takes {takes}", names[0], short(stamp)))?,
        input_tokens: tokens(1)?,
        output_tokens: tokens(2)?,
    })
}

fn short(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Seconds since 1970 of `YYYY-MM-DD hh:mm:ss[.fraction]`.
fn wall_clock_s(stamp: &str) -> Option<f64> {
    let (date, time) = stamp.split_once([' ', 'T'])?;
    let whole = |text: &str, range: std::ops::RangeInclusive<u32>| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|_| digits)?;
        range.contains(&number).then_some(number)
    };
    let mut date = date.split('-');
    let year = whole(date.next()?, 1970..=2200)?;
    let month = whole(date.next()?, 1..=12)?;
    let day = whole(date.next()?, 1..=31)?;
    let mut clock = time.splitn(3, ':');
    let hour = whole(clock.next()?, 0..=23)?;
    let minute = whole(clock.next()?, 0..=59)?;
    let (second, fraction) = clock.next()?.split_once('.').unwrap_or_else(|| {
        let seconds = time.rsplit(':').next().unwrap_or_default();
        (seconds, "0")
    });
    let second = whole(second, 0..=60)?;
    let fraction_ok = !fraction.is_empty() && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let fraction: f64 = format!("0.{fraction}")
        .parse()
        .ok()
        .filter(|_| fraction_ok)?;
    if date.next().is_some() {
        return None;
    }
    let seconds = (hour * 60 + minute) * 60 + second;
    Some(f64::from(days_since_1970(year, month, day)) * 86_400.0 + f64::from(seconds) + fraction)
}

/// Days of the Gregorian calendar since 1 January 1970. A year begins in March here, so that the leap day is its
/// last day.
fn days_since_1970(year: u32, month: u32, day: u32) -> u32 {
    let year = if month <= 2 { year - 1 } else { year };
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    365 * year + year / 4 - year / 100 + year / 400 + day_of_year - 719_468
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
    use crate::{models::ModelShape, roofline::Gpu};
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
        assert_eq!(days_since_1970(1970, 1, 1), 0);
        assert_eq!(days_since_1970(2023, 11, 16), 19_677);
    }

    #[test]
    fn a_bad_row_is_named_by_line_and_field() {
        let head = "timestamp,input,output\n1,2,3\n";
        let wall = "TIMESTAMP,ContextTokens,GeneratedTokens\n";
        let cases = [
            (String::new(), "line 1: header"),
            ("a,b,c\n1,2,3\n".to_owned(), "line 1: header"),
            ("timestamp,input,output\n".to_owned(), "holds no request"),
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

        #[test]
        fn no_timestamp_makes_it_panic(stamp in "[0-9]{1,5}-[0-9]{1,3}-[0-9]{1,3}[ T][0-9:.]{0,20}") {
            if let Some(seconds) = wall_clock_s(&stamp) {
                prop_assert!((0.0..8e9).contains(&seconds));
            }
        }
    }
}
