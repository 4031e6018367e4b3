//! Generates workloads: the trace of a multi-turn chat service, and the load of the models on the donors' GPUs.
//! The same seed gives the same file on every machine.
//!
//! **Chat.** The trace is a window of a service that has already run for [`WARM_UP_S`]. Sessions arrive as a
//! Poisson process, and only turns inside the window are written. Each session opens with one of [`SYSTEM_PROMPTS`]
//! shared system prompts (Zipf: the k-th is 1/k as popular as the first; 1,024 to 4,608 tokens long). A share of the
//! sessions ([`Chat::documents`]) adds a document of 8,000 to 32,000 tokens (log-uniform). The number of turns is
//! geometric with a mean of 6, at most 30. A turn appends a question (log-normal, median 90 tokens, sigma 1.1) to
//! everything said so far; its answer (log-normal, median 230 tokens, sigma 0.8, at most 2,048) joins the next turn's
//! prompt. The next question comes after 20 ms for every token of the answer and a think time (log-normal, median
//! 60 s, sigma 1.2), in which the user reads the answer and types the next question. The block ids form a prefix
//! tree: a full block of a conversation keeps its id in later turns, sessions with the same system prompt share its
//! ids, and a partial last block gets a new id, because no later prompt contains it.
//!
//! **Neighbours.** Requests arrive as a Poisson process whose rate switches between calm and busy (exponential
//! phases, mean 90 s and 60 s; ten times the requests when busy). Prompts are log-normal (median 1,000 tokens,
//! sigma 1.0, at most 32,000), answers are log-normal (median 250, sigma 0.7, at most 2,048).

use std::io::{self, Write};

use super::{pattern::SplitMix, trace::BLOCK_TOKENS};

/// How many system prompts the sessions share.
pub const SYSTEM_PROMPTS: usize = 6;
/// How long the service has been running when the window opens, seconds: longer than most conversations last.
pub const WARM_UP_S: f64 = 1800.0;
/// The longest conversation, tokens. A conversation ends before it would grow longer.
const MAX_CONTEXT: u64 = 100_000;

/// How much chat to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chat {
    /// The seed of the random numbers.
    pub seed: u64,
    /// Conversations that begin per second.
    pub rate: f64,
    /// How long the window is, seconds.
    pub duration_s: f64,
    /// Share of the conversations that bring a document.
    pub documents: f64,
}

/// How much neighbours' load to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Neighbours {
    /// The seed of the random numbers.
    pub seed: u64,
    /// How long the load lasts, seconds.
    pub duration_s: f64,
    /// Requests per second in calm phases.
    pub calm_rate: f64,
}

struct Draw(SplitMix);

impl Draw {
    fn new(seed: u64) -> Self {
        Self(SplitMix::new(seed))
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.0.unit()).ln()
    }

    /// A log-normal number, by the Box-Muller transform.
    fn log_normal(&mut self, median: f64, sigma: f64) -> f64 {
        let radius = (-2.0 * (1.0 - self.0.unit()).ln()).sqrt();
        let normal = radius * (std::f64::consts::TAU * self.0.unit()).cos();
        median * (sigma * normal).exp()
    }

    fn tokens(&mut self, median: f64, sigma: f64, most: u64) -> u64 {
        (self.log_normal(median, sigma) as u64).clamp(1, most)
    }

    fn chance(&mut self, share: f64) -> bool {
        self.0.unit() < share
    }

    /// Returns 0 with weight 1, 1 with weight 1/2, and so on, below `count`.
    fn zipf(&mut self, count: usize) -> usize {
        let total: f64 = (1..=count).map(|rank| 1.0 / rank as f64).sum();
        let mut left = self.0.unit() * total;
        for rank in 0..count {
            left -= 1.0 / (rank + 1) as f64;
            if left < 0.0 {
                return rank;
            }
        }
        count - 1
    }
}

struct Turn {
    at_s: f64,
    input: u64,
    output: u64,
    ids: Vec<u64>,
}

/// Writes a chat trace in the Mooncake format. Returns how many requests it has.
///
/// # Errors
/// Fails only when `out` fails.
pub fn write_chat(chat: &Chat, out: &mut impl Write) -> io::Result<usize> {
    let mut draw = Draw::new(chat.seed);
    let mut next_id = 0;
    let mut fresh = move || {
        next_id += 1;
        next_id - 1
    };
    let systems: Vec<(u64, Vec<u64>)> = (0..SYSTEM_PROMPTS)
        .map(|_| {
            let tokens = 1024 + (draw.0.unit() * 3584.0) as u64;
            let blocks = tokens / BLOCK_TOKENS;
            (tokens, (0..blocks).map(|_| fresh()).collect())
        })
        .collect();
    let mut turns = Vec::new();
    let mut begins_s = -WARM_UP_S;
    loop {
        begins_s += draw.exponential(1.0 / chat.rate);
        if begins_s >= chat.duration_s {
            break;
        }
        let (system_tokens, system_ids) = &systems[draw.zipf(SYSTEM_PROMPTS)];
        let mut context = *system_tokens;
        let mut ids = system_ids.clone();
        if draw.chance(chat.documents) {
            context += (8_000.0 * 4f64.powf(draw.0.unit())) as u64;
        }
        let mut at_s = begins_s;
        for _ in 0..30 {
            context += draw.tokens(90.0, 1.1, 8_000);
            let output = draw.tokens(230.0, 0.8, 2_048);
            if context + output > MAX_CONTEXT {
                break;
            }
            ids.resize_with((context / BLOCK_TOKENS) as usize, &mut fresh);
            let mut asked = ids.clone();
            if !context.is_multiple_of(BLOCK_TOKENS) {
                asked.push(fresh());
            }
            if (0.0..chat.duration_s).contains(&at_s) {
                turns.push(Turn {
                    at_s,
                    input: context,
                    output,
                    ids: asked,
                });
            }
            if draw.chance(1.0 / 6.0) {
                break;
            }
            context += output;
            at_s += output as f64 * 0.02 + draw.log_normal(60.0, 1.2);
        }
    }
    turns.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
    for turn in &turns {
        let ids: Vec<String> = turn.ids.iter().map(u64::to_string).collect();
        writeln!(
            out,
            "{{\"timestamp\": {:.0}, \"input_length\": {}, \"output_length\": {}, \"hash_ids\": [{}]}}",
            turn.at_s * 1e3,
            turn.input,
            turn.output,
            ids.join(", ")
        )?;
    }
    Ok(turns.len())
}

/// Writes a load file of `timestamp,input,output`. Returns how many requests it has.
///
/// # Errors
/// Fails only when `out` fails.
pub fn write_neighbours(load: &Neighbours, out: &mut impl Write) -> io::Result<usize> {
    let mut draw = Draw::new(load.seed);
    writeln!(out, "timestamp,input,output")?;
    let (mut at_s, mut busy, mut switch_s, mut count) = (0.0, false, 0.0, 0);
    while at_s < load.duration_s {
        if at_s >= switch_s {
            busy = !busy && switch_s > 0.0;
            switch_s = at_s + draw.exponential(if busy { 60.0 } else { 90.0 });
        }
        let input = draw.tokens(1_000.0, 1.0, 32_000);
        let output = draw.tokens(250.0, 0.7, 2_048);
        writeln!(out, "{:.0},{input},{output}", at_s * 1e3)?;
        count += 1;
        let rate = load.calm_rate * if busy { 10.0 } else { 1.0 };
        at_s += draw.exponential(1.0 / rate);
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        donor_load,
        trace::{self, unbounded_hits},
    };

    const CHAT: Chat = Chat {
        seed: 7,
        rate: 0.2,
        duration_s: 300.0,
        documents: 0.25,
    };

    fn chat(chat: &Chat) -> Vec<u8> {
        let mut out = Vec::new();
        write_chat(chat, &mut out).unwrap();
        out
    }

    #[test]
    fn one_seed_one_file() {
        assert_eq!(chat(&CHAT), chat(&CHAT));
        assert_ne!(chat(&CHAT), chat(&Chat { seed: 8, ..CHAT }));
        let load = |seed| {
            let mut out = Vec::new();
            let load = Neighbours {
                seed,
                duration_s: 100.0,
                calm_rate: 1.0,
            };
            write_neighbours(&load, &mut out).unwrap();
            out
        };
        assert_eq!(load(1), load(1));
        assert_ne!(load(1), load(2));
    }

    #[test]
    fn the_first_numbers_of_a_seed_are_these() {
        // Pinned: a file must be reproducible from its seed in every later release.
        let mut numbers = SplitMix::new(1);
        assert_eq!(numbers.next_u64(), 0x910a_2dec_8902_5cc1);
        assert_eq!(numbers.next_u64(), 0xbeeb_8da1_658e_ec67);
    }

    #[test]
    fn a_chat_is_a_sound_trace_that_repeats_itself() {
        let file = chat(&CHAT);
        let trace = trace::read(&file[..], "chat", &trace::Options::default()).unwrap();
        assert!(trace.notes.is_empty(), "{:?}", trace.notes);
        let requests = trace.requests;
        assert!(requests.len() > 150, "{}", requests.len());
        assert!(requests.is_sorted_by(|a, b| a.arrival_s <= b.arrival_s));
        let (hits, all) = unbounded_hits(&requests);
        let rate = hits as f64 / all as f64;
        // A turn appends to the turn before, so an earlier prompt has most of its blocks.
        assert!((0.4..0.95).contains(&rate), "{rate}");
    }

    #[test]
    fn neighbours_are_a_sound_load_with_calm_and_busy_times() {
        let mut out = Vec::new();
        let load = Neighbours {
            seed: 3,
            duration_s: 1_200.0,
            calm_rate: 1.0,
        };
        let count = write_neighbours(&load, &mut out).unwrap();
        let requests = donor_load::read(&out[..], "n").unwrap();
        assert_eq!(requests.len(), count);
        let mut minutes = vec![0u32; 21];
        for request in &requests {
            minutes[(request.arrival_s / 60.0) as usize] += 1;
        }
        let (calm, busy) = (
            minutes.iter().filter(|n| **n < 120),
            minutes.iter().filter(|n| **n > 300),
        );
        assert!(calm.count() >= 3 && busy.count() >= 3, "{minutes:?}");
    }
}
