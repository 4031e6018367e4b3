//! A sample of each format, written for this test, and what is refused of each.

use std::{fs, io::Write as _};

use flate2::{Compression, write::GzEncoder};
use proptest::prelude::*;

use super::*;

const MOONCAKE: &str = include_str!("../../samples/mooncake.jsonl");
const BAILIAN: &str = include_str!("../../samples/bailian.jsonl");
const CONVERSATIONS: &str = include_str!("../../samples/conversations.json");
const MESSAGES: &str = include_str!("../../samples/messages.jsonl");
const BATCH: &str = include_str!("../../samples/batch.jsonl");
const PROMPTS: &str = include_str!("../../samples/prompts.jsonl");
const SHAREGPT: &str = include_str!("../../samples/sharegpt.jsonl");
const AGENT_TEXTS: &str = include_str!("../../samples/agent-texts.jsonl");
const AZURE_2023: &str = include_str!("../../samples/azure-2023.csv");
const AZURE_2024: &str = include_str!("../../samples/azure-2024.csv");
const BURSTGPT: &str = include_str!("../../samples/burstgpt.csv");
const SERVEGEN: &str = include_str!("../../samples/servegen.csv");

fn with(text: &str, options: Options) -> Result<Trace, TraceError> {
    read(text.as_bytes(), "t", &options)
}

fn sniffed(text: &str) -> Trace {
    with(text, Options::default()).unwrap()
}

fn refused(text: &str) -> String {
    with(text, Options::default()).unwrap_err().to_string()
}

/// Arrival times, prompts and answers.
fn shape(trace: &Trace) -> Vec<(f64, u64, u64)> {
    let shape = |request: &Request| {
        let ms = (request.arrival_s * 1e3).round() / 1e3;
        (ms, request.input_tokens, request.output_tokens)
    };
    trace.requests.iter().map(shape).collect()
}

/// How many leading blocks two requests share.
fn shared(trace: &Trace, a: usize, b: usize) -> usize {
    let pairs = trace.requests[a]
        .blocks
        .iter()
        .zip(&trace.requests[b].blocks);
    pairs.take_while(|(a, b)| a == b).count()
}

#[test]
fn every_format_is_known_by_its_first_row_and_by_its_name() {
    let samples = [
        (MOONCAKE, "mooncake", 3),
        (BAILIAN, "bailian", 2),
        (CONVERSATIONS, "conversations", 6),
        (MESSAGES, "messages", 2),
        (BATCH, "messages", 2),
        (PROMPTS, "messages", 2),
        (SHAREGPT, "messages", 1),
        (AGENT_TEXTS, "agent-texts", 2),
        (AZURE_2023, "azure", 2),
        (AZURE_2024, "azure", 3),
        (BURSTGPT, "burstgpt", 3),
        (SERVEGEN, "servegen", 2),
    ];
    for (text, name, requests) in samples {
        let trace = sniffed(text);
        assert_eq!(
            (trace.format, trace.requests.len()),
            (name, requests),
            "{text}"
        );
        let named = Options {
            format: Some(name.parse().unwrap()),
            ..Options::default()
        };
        assert_eq!(with(text, named).unwrap(), trace, "{name}");
        // Read as any other format, it is refused or read as what it is: never as nothing.
        for (other, format) in Format::ALL {
            let options = Options {
                format: Some(format),
                ..Options::default()
            };
            if let Ok(read) = with(text, options) {
                let alike = ["mooncake", "bailian"];
                let same = other == name || alike.contains(&other) && alike.contains(&name);
                assert!(same, "a {name} sample was read as {other}: {read:?}");
            }
        }
    }
}

#[test]
fn bytes_that_do_not_matter_change_nothing() {
    let directory = tempfile::tempdir().unwrap();
    for (text, name) in [
        (MOONCAKE, "a.jsonl"),
        (AZURE_2024, "b.csv"),
        (CONVERSATIONS, "c.json"),
    ] {
        let plain = sniffed(text);
        let mark = format!("\u{feff}{text}");
        let crlf = text.replace('\n', "\r\n");
        let blank = format!("{}\n\n", text);
        for other in [&mark, &crlf, &blank] {
            assert_eq!(sniffed(other).requests, plain.requests, "{other:?}");
        }
        let path = directory.path().join(name);
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(text.as_bytes()).unwrap();
        fs::write(&path, packed.finish().unwrap()).unwrap();
        assert_eq!(
            load(&path, &Options::default()).unwrap().requests,
            plain.requests
        );
        // The twin: half of a compressed file is no shorter trace.
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 9]).unwrap();
        assert!(load(&path, &Options::default()).is_err(), "{name}");
    }
}

#[test]
fn a_mooncake_row_is_what_it_says() {
    let trace = sniffed(MOONCAKE);
    assert_eq!(
        shape(&trace),
        [(0.0, 1100, 20), (0.9, 600, 5), (2.5, 1700, 31)]
    );
    assert_eq!((shared(&trace, 0, 1), shared(&trace, 0, 2)), (1, 2));
    assert_eq!(unbounded_hits(&trace.requests), (3, 9));
    assert_eq!(trace.block_tokens, 512);
    assert!(trace.notes.is_empty(), "{:?}", trace.notes);
}

#[test]
fn ids_are_numbers_of_any_size_or_hexadecimal_and_differ_in_their_last_digit() {
    let line = |ids: &str| {
        format!(
            "{{\"timestamp\": 0, \"input_length\": 1024, \"output_length\": 1, \"hash_ids\": [{ids}]}}\n"
        )
    };
    let large = "340282366920938463463374607431768211455";
    let one_less = "340282366920938463463374607431768211454";
    for (a, b) in [
        ("7", "8"),
        (large, one_less),
        ("18446744073709551616", "18446744073709551617"),
        ("\"00ffee\"", "\"00ffef\""),
        ("\"0xab\"", "\"0xac\""),
    ] {
        let trace = sniffed(
            &[
                line(&format!("1, {a}")),
                line(&format!("1, {b}")),
                line(&format!("1, {a}")),
            ]
            .concat(),
        );
        assert_eq!(
            (shared(&trace, 0, 1), shared(&trace, 0, 2)),
            (1, 2),
            "{a} {b}"
        );
    }
}

#[test]
fn blocks_have_any_size_and_the_last_may_be_counted_or_not() {
    let line = |tokens: u64, ids: usize| {
        let ids: Vec<usize> = (0..ids).collect();
        format!(
            "{{\"timestamp\": 0, \"input_length\": {tokens}, \"output_length\": 1, \"hash_ids\": {ids:?}}}\n"
        )
    };
    for size in [16, 64, 100, 512] {
        for ids in [3, 4] {
            let options = Options {
                block_tokens: Some(size),
                ..Options::default()
            };
            let trace = with(&line(size * 3 + 1, ids), options).unwrap();
            assert_eq!(
                (trace.block_tokens, trace.requests[0].blocks.len()),
                (size, ids)
            );
        }
    }
    let error = refused(&line(49, 4));
    assert!(error.contains("--block-tokens 16 would fit"), "{error}");
    let options = Options {
        block_tokens: Some(0),
        ..Options::default()
    };
    assert!(
        with(MOONCAKE, options)
            .unwrap_err()
            .to_string()
            .contains("--block-tokens")
    );
}

#[test]
fn no_rows_are_refused_and_one_is_read() {
    let first = |rows| {
        let options = Options {
            first: Some(rows),
            ..Options::default()
        };
        with(MOONCAKE, options)
    };
    let error = first(0).unwrap_err().to_string();
    assert!(error.contains("--requests: is 0"), "{error}");
    assert_eq!(first(1).unwrap().requests.len(), 1);
}

#[test]
fn a_bailian_chat_shares_what_its_turns_share_and_failed_requests_are_counted() {
    let trace = sniffed(BAILIAN);
    assert_eq!(shape(&trace), [(10.25, 40, 9), (19.5, 70, 12)]);
    assert_eq!((trace.block_tokens, shared(&trace, 0, 1)), (16, 2));
    assert_eq!(trace.notes, ["1 rows without a prompt are left out"]);
}

#[test]
fn conversations_keep_their_ids_to_themselves_and_share_them_with_their_subagents() {
    let trace = sniffed(CONVERSATIONS);
    assert_eq!(trace.block_tokens, 64);
    // The second conversation begins a second later; its last request comes 2.5 s after the subagent's.
    let first: Vec<_> = (shape(&trace).into_iter())
        .filter(|row| row.0 == 0.0 || row.1 != 130)
        .collect();
    assert!(
        first.contains(&(4.5, 200, 6)) && first.contains(&(7.0, 260, 11)),
        "{first:?}"
    );
    let begins: Vec<usize> = (0..6)
        .filter(|at| trace.requests[*at].input_tokens == 130)
        .collect();
    assert_eq!(
        shared(&trace, begins[0], begins[1]),
        0,
        "another conversation's"
    );
    let subagents: Vec<usize> = (0..6)
        .filter(|at| trace.requests[*at].input_tokens == 200)
        .collect();
    assert_eq!(shared(&trace, begins[0], subagents[0]), 2, "its parent's");
    // The twin: where ids mean the same everywhere, they are the same.
    let global = sniffed(&CONVERSATIONS.replace("\"local\"", "\"global\""));
    assert_eq!(shared(&global, begins[0], begins[1]), 2);
}

#[test]
fn messages_share_what_they_begin_with_and_say_that_tokens_are_guessed() {
    let trace = sniffed(MESSAGES);
    assert_eq!(trace.requests[1].arrival_s, 3.5, "zones are minded");
    assert_eq!(trace.requests[0].output_tokens, 64);
    assert_eq!(trace.requests[1].output_tokens, 6, "the answer itself");
    assert_eq!(shared(&trace, 0, 1), 1, "256 bytes of the system prompt");
    assert!(trace.notes[0].contains("no tokenizer"), "{:?}", trace.notes);
    // Whoever knows the model's tokenizer says how long its tokens are.
    let shorter = Options {
        bytes_per_token: Some(2.0),
        ..Options::default()
    };
    let twice = with(MESSAGES, shorter).unwrap();
    let tokens = |trace: &Trace| trace.requests[0].input_tokens;
    assert!(tokens(&twice).abs_diff(2 * tokens(&trace)) <= 1);
    assert!(shared(&twice, 0, 1) >= 2, "the same bytes are more blocks");
    assert!(twice.notes[0].contains("2 bytes"), "{:?}", twice.notes);
    for text in [BATCH, PROMPTS] {
        let rate = Options {
            rate: Some(4.0),
            ..Options::default()
        };
        let trace = with(text, rate).unwrap();
        assert_eq!(trace.requests[1].arrival_s, 0.25);
        assert_eq!(shared(&trace, 0, 1), 1);
        assert!(
            trace.notes.iter().any(|note| note.contains("--rate")),
            "{:?}",
            trace.notes
        );
    }
    let mixed = [PROMPTS, "{\"prompt\": \"x\", \"timestamp\": 3}\n"].concat();
    assert!(refused(&mixed).contains("line 3: timestamp: some rows have one"));
}

/// Knows five words; every other one is one token, too.
const TOKENIZER: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
    "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
    "model": {"type": "WordLevel", "unk_token": "?",
              "vocab": {"?": 0, "user": 1, "one": 2, "two": 3, "three": 4, "four": 5}}}"#;

/// Two prompts of the same words at first, with other spaces between them.
const WORDS: &str = r#"{"timestamp": 1, "prompt": "user one two three", "max_tokens": 7}
{"timestamp": 2, "prompt": "user one    two three four one", "completion": "two two"}
"#;

fn tokenized(tokenizer: &str) -> Result<Trace, TraceError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(tokenizer.as_bytes()).unwrap();
    let options = Options {
        tokenizer: Some(file.path().to_owned()),
        block_tokens: Some(2),
        ..Options::default()
    };
    with(WORDS, options)
}

#[test]
fn with_a_tokenizer_its_tokens_count_and_their_blocks_are_shared() {
    let trace = tokenized(TOKENIZER).unwrap();
    assert_eq!(shape(&trace), [(1.0, 4, 7), (2.0, 6, 2)]);
    assert_eq!(shared(&trace, 0, 1), 2, "the same four tokens");
    assert!(
        trace.notes[0].contains("tokens are those of"),
        "{:?}",
        trace.notes
    );
    // The twin: their bytes part after the first words.
    let bytes = Options {
        block_tokens: Some(2),
        ..Options::default()
    };
    assert_eq!(shared(&with(WORDS, bytes).unwrap(), 0, 1), 1);
    let nothing = tokenized("{}").unwrap_err().to_string();
    assert!(nothing.contains("is no tokenizer"), "{nothing}");
    // It has no token for what it does not know.
    let strict = TOKENIZER.replace(r#""?": 0, "#, "").replace("four", "five");
    let refused = tokenized(&strict).unwrap_err().to_string();
    assert!(
        refused.contains("line 2: the tokenizer refuses"),
        "{refused}"
    );
}

#[test]
fn agents_texts_are_sorted_by_time_and_grow() {
    let trace = sniffed(AGENT_TEXTS);
    assert_eq!(trace.requests[0].arrival_s, 0.0);
    assert_eq!(trace.requests[1].arrival_s, 9.0);
    assert_eq!(shared(&trace, 0, 1), 2, "512 of 520 bytes");
    assert!(
        trace.notes.iter().any(|note| note.contains("sorted")),
        "{:?}",
        trace.notes
    );
}

#[test]
fn tables_have_no_prefixes_and_say_so() {
    let trace = sniffed(AZURE_2024);
    assert_eq!(
        shape(&trace),
        [(0.0, 2162, 5), (36.99, 2399, 6), (38.24, 76, 15)]
    );
    for text in [AZURE_2023, AZURE_2024, BURSTGPT, SERVEGEN] {
        let trace = sniffed(text);
        assert_eq!(unbounded_hits(&trace.requests).0, 0);
        assert!(
            trace.notes.iter().any(|note| note.contains("no prefixes")),
            "{:?}",
            trace.notes
        );
    }
    let trace = sniffed(BURSTGPT);
    assert_eq!(shape(&trace)[2], (121.0, 417, 276));
    assert_eq!(trace.notes[0], "1 rows with zero tokens are left out");
}

#[test]
fn only_so_many_rows_are_read() {
    for text in [
        MOONCAKE,
        BAILIAN,
        CONVERSATIONS,
        MESSAGES,
        AGENT_TEXTS,
        AZURE_2024,
        BURSTGPT,
        SERVEGEN,
    ] {
        let first = Options {
            first: Some(1),
            ..Options::default()
        };
        assert_eq!(with(text, first).unwrap().requests.len(), 1, "{text}");
    }
}

#[test]
fn what_cannot_be_read_is_refused_with_line_and_field() {
    let row = r#"{"timestamp": 27, "input_length": 513, "output_length": 2, "hash_ids": [4, 9]}"#;
    let second = |line: &str| format!("{row}\n{line}\n{row}\n");
    let bailian = |from: &str, to: &str| BAILIAN.replacen(from, to, 1);
    let conversation = |from: &str, to: &str| CONVERSATIONS.replacen(from, to, 1);
    let message = |row: &str| format!("{}\n{row}\n", MESSAGES.lines().next().unwrap());
    let azure = |row: &str| format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{row}\n");
    let burst = |row: &str| {
        format!("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n{row}\n")
    };
    let cases: Vec<(String, &str)> = vec![
        (second("{\"timestamp\": 27"), "t, line 2: is not JSON"),
        (second("[1]"), "line 2: is not a JSON object"),
        (
            second(&row.replace("timestamp", "time")),
            "line 2: timestamp: is missing",
        ),
        (second(&row.replace("27", "-1")), "line 2: timestamp: is -1"),
        (
            second(&row.replace("27", "\"noon\"")),
            "line 2: timestamp: is \"noon\"",
        ),
        (
            second(&row.replace("27", "1e300")),
            "line 2: timestamp: is 1e+300",
        ),
        (
            second(&row.replace("513", "0")),
            "line 2: input_length: is 0",
        ),
        (
            second(&row.replace("513", "1e18")),
            "line 2: input_length: is 1e+18",
        ),
        (
            second(&row.replace("513", "\"513\"")),
            "line 2: input_length: is \"513\"",
        ),
        (
            second(&row.replace("513", "1537")),
            "line 2: hash_ids: has 2 ids; input_length 1537 takes 3 or 4",
        ),
        (
            second(&row.replace(": 2,", ": 2.5,")),
            "line 2: output_length: is 2.5",
        ),
        (
            second(&row.replace("[4, 9]", "7")),
            "line 2: hash_ids: is 7",
        ),
        (
            second(&row.replace("9]", "-9]")),
            "line 2: hash_ids[1]: is -9",
        ),
        (
            second(&row.replace("9]", "9.5]")),
            "line 2: hash_ids[1]: is 9.5",
        ),
        (
            second(&row.replace("9]", "1e30]")),
            "line 2: hash_ids[1]: is 1e+30",
        ),
        (
            second(&row.replace("9]", "\"green\"]")),
            "line 2: hash_ids[1]: is \"green\"",
        ),
        (
            second(&row.replace("9]", "null]")),
            "line 2: hash_ids[1]: is null",
        ),
        (
            row.replace("27", "1700000000"),
            "t: timestamp: begins with a number that looks like seconds since 1970",
        ),
        (
            format!("{row}\n{}\n", row.replace("27", "1e15")),
            "t: spans",
        ),
        (
            String::new(),
            "t, line 1: begins with \"\", which is no format known",
        ),
        ("\n\n  \n".to_owned(), "which is no format known"),
        ("{\"a\": 1}\n".to_owned(), "line 1: begins with"),
        (
            "[{\"messages\": []}]\n".to_owned(),
            "line 1: is one JSON list",
        ),
        ("a,b,c\n1,2,3\n".to_owned(), "line 1: begins with \"a,b,c\""),
        (
            bailian("\"turn\": 1", "\"turn\": \"one\""),
            "line 1: turn: is \"one\"",
        ),
        (bailian("-1", "-2"), "line 1: parent_chat_id: is -2"),
        (
            bailian("40", "80"),
            "line 1: hash_ids: has 3 ids; input_length 80 takes 5 or 5 of 16",
        ),
        (
            conversation("64", "0"),
            "t: conversation 1: block_size: is 0",
        ),
        (
            conversation("\"block_size\": 64,", ""),
            "conversation 1: block_size: is missing; use --block-tokens",
        ),
        (
            conversation("\"local\"", "\"galactic\""),
            "conversation 1: hash_id_scope: is \"galactic\"",
        ),
        (
            conversation("\"in\": 130", "\"in\": -3"),
            "conversation 1: requests[0].in: is -3",
        ),
        (
            conversation("\"in\": 200", "\"in\": 2000"),
            "conversation 1: requests[1].requests[0].hash_ids: has 3 ids; in 2000",
        ),
        (
            conversation("2.5", "\"long\""),
            "conversation 1: requests[2].think_time: is \"long\"",
        ),
        (
            CONVERSATIONS[..CONVERSATIONS.len() - 9].to_owned(),
            "is not JSON",
        ),
        (
            message("{\"timestamp\": 3}"),
            "line 2: messages: is missing, and so are conversations and prompt",
        ),
        (
            message("{\"timestamp\": \"noon\", \"prompt\": \"x\"}"),
            "line 2: timestamp: is \"noon\"",
        ),
        (
            message("{\"timestamp\": 3, \"messages\": [{\"content\": \"x\"}]}"),
            "line 2: messages[0].role: is missing",
        ),
        (
            message("{\"timestamp\": 3, \"messages\": [{\"role\": \"user\"}]}"),
            "line 2: messages[0].content: is missing",
        ),
        (
            message(
                "{\"timestamp\": 3, \"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\"}]}]}",
            ),
            "line 2: messages[0].content[0].text: is missing",
        ),
        (
            message("{\"timestamp\": 3, \"messages\": 5}"),
            "line 2: messages: is 5",
        ),
        (
            message("{\"timestamp\": 3, \"prompt\": 5}"),
            "line 2: prompt: is 5",
        ),
        (
            message("{\"timestamp\": 3, \"prompt\": \"x\", \"max_tokens\": -1}"),
            "line 2: max_tokens: is -1",
        ),
        (
            AGENT_TEXTS.replacen("\"session_id\": \"s1\"", "\"session_id\": 4", 1),
            "line 1: session_id: is 4",
        ),
        (
            azure("yesterday,1,1"),
            "line 2: TIMESTAMP: is \"yesterday\"",
        ),
        (
            azure("2024-05-10 00:00:37+00:00:00,1,1"),
            "line 2: TIMESTAMP",
        ),
        (
            azure("2024-05-10 00:00:37,-1,1"),
            "line 2: ContextTokens: is \"-1\"",
        ),
        (
            azure("2024-05-10 00:00:37,1,"),
            "line 2: GeneratedTokens: is \"\"",
        ),
        (azure("2024-05-10 00:00:37,1"), "line: 2"),
        (
            azure("2024-05-10 00:00:37,0,0"),
            "holds no request (1 rows with zero tokens",
        ),
        (burst("soon,m,1,1,2,x"), "line 2: Timestamp: is \"soon\""),
        (burst("5,m,1.5,1,2,x"), "line 2: Request tokens: is \"1.5\""),
        (
            burst("1700000000000,m,1,1,2,x"),
            "looks like milliseconds since 1970",
        ),
    ];
    for (text, expected) in cases {
        let error = refused(&text);
        assert!(
            error.contains(expected),
            "{error:?} lacks {expected:?}\n{text}"
        );
    }
}

#[test]
fn an_endless_line_is_refused_within_bounds() {
    let blank = vec![b' '; 17 << 20];
    let error = read(&blank[..], "t", &Options::default()).unwrap_err();
    assert!(error.to_string().contains("is longer than"), "{error}");
}

#[test]
fn nested_without_end_is_refused() {
    let mut request = "{\"t\": 0, \"in\": 1, \"out\": 1, \"hash_ids\": [1]}".to_owned();
    for _ in 0..20 {
        request = format!("{{\"type\": \"subagent\", \"requests\": [{request}]}}");
    }
    let text = format!("{{\"block_size\": 64, \"requests\": [{request}]}}\n");
    assert!(
        refused(&text).contains("more than 16 deep"),
        "{}",
        refused(&text)
    );
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        for (_, format) in Format::ALL {
            let options = Options { format: Some(format), ..Options::default() };
            let _ = read(&bytes[..], "t", &options);
        }
        let _ = read(&bytes[..], "t", &Options::default());
    }

    #[test]
    fn no_damaged_sample_makes_it_panic(sample in 0usize..12, at in 0usize..2000, byte: u8, cut in 0usize..2000) {
        let samples = [
            MOONCAKE, BAILIAN, CONVERSATIONS, MESSAGES, BATCH, PROMPTS, SHAREGPT, AGENT_TEXTS,
            AZURE_2023, AZURE_2024, BURSTGPT, SERVEGEN,
        ];
        let mut bytes = samples[sample].as_bytes().to_vec();
        let at = at % bytes.len();
        bytes[at] = byte;
        bytes.truncate(bytes.len().saturating_sub(cut % 64));
        for request in read(&bytes[..], "t", &Options::default()).into_iter().flat_map(|trace| trace.requests) {
            prop_assert!(request.arrival_s.is_finite() && request.input_tokens > 0);
        }
    }
}
