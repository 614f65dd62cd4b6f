//! What packing costs, stage by stage. Words are made up and drawn as unevenly as in prose, because the engine remembers
//! the words it has seen. Each bench checks its result before it is timed; throughput is per token, example or datapoint.

#![allow(missing_docs, reason = "criterion's macros make public items")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ao_core::datapoint::Datapoint;
use ao_core::example::Context;
use ao_core::frame::Framer;
use ao_core::pack::{PackWriter, Run};
use ao_core::plan::{Datapoints, PlanSettings, Reach, RowLimits, pack_rows, plan};
use ao_core::rows::Table;
use ao_core::sample::Draws;
use ao_core::source::Source;
use ao_core::stats::Stats;
use ao_core::{layout, shard};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use serde_json::{Value, json};

const SYLLABLES: [&str; 24] = [
    "the", "we", "ther", "in", "par", "is", "fi", "ne", "to", "day", "you", "are", "hel", "pful", "as", "who", "li",
    "kes", "sea", "ki", "nd", "us", "na\u{ef}", "01",
];
const EXAMPLES: usize = 6000;

fn golden(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    std::fs::read_to_string(path).expect("the golden files are in the repository")
}

fn framers() -> [(&'static str, Framer); 2] {
    let build = |name: &str, specials: Value| {
        let (tokenizer, template) = (golden(&format!("{name}.json")), golden(&format!("{name}.jinja")));
        Framer::new(&tokenizer, &template, &specials.to_string(), " ?", "2025-01-01").expect("the golden files fit")
    };
    [
        ("gemma", build("gemma", json!({"bos_token": "<bos>", "eos_token": "<eos>"}))),
        ("qwen", build("qwen", json!({"eos_token": "<|im_end|>"}))),
    ]
}

/// Words of one to three syllables; a few of them make up most of the text.
fn prose(draws: &mut Draws, words: usize) -> String {
    let mut text = String::new();
    for _ in 0..words {
        for _ in 0..draws.between(1, 3) {
            let uneven = draws.unit().powi(2);
            text.push_str(SYLLABLES[(uneven * SYLLABLES.len() as f64) as usize]);
        }
        text.push(' ');
    }
    text
}

/// A third each of chats with spans, chats read whole, and texts for context prediction; three questions a context.
fn examples() -> (Vec<u8>, Vec<u8>) {
    let mut draws = Draws::new(0, "bench", "text");
    let mut records = Vec::new();
    let mut texts = Vec::new();
    for at in 0..EXAMPLES / 3 {
        let (system, user) = (prose(&mut draws, 40), prose(&mut draws, 30));
        let context = json!([{"role": "system", "content": system}, {"role": "user", "content": user}]);
        for (number, read) in [json!([{"message": 1, "start": 3, "end": 60}]), Value::Null].into_iter().enumerate() {
            let example = json!({
                "id": format!("r{at}.{number}"), "context": context, "read": read,
                "question": prose(&mut draws, 12), "answer": "Yes",
            });
            records.extend(format!("{example}\n").into_bytes());
        }
        let example = json!({"text": prose(&mut draws, 120)});
        texts.extend(format!("{example}\n").into_bytes());
    }
    (records, texts)
}

fn pack_into(folder: &Path, framer: &Framer, (records, texts): &(Vec<u8>, Vec<u8>)) -> Value {
    let settings = json!({
        "seed": 0, "num_layers": 48, "read_layers": [12, 24, 36], "layers_per_example": "one",
        "max_input_tokens": 4096, "max_context_tokens": 4096,
    });
    let reads = json!([{"share": 0.4, "all": true}, {"share": 0.6, "window": [1, 3], "before_end": [0, 9]}]);
    let mut writer =
        PackWriter::new(folder, framer, &settings.to_string(), Run::default()).expect("the settings are sound");
    for (source, lines) in [
        (json!({"name": "records", "kind": "records", "reads": reads}), records),
        (json!({"name": "texts", "kind": "context_prediction"}), texts),
    ] {
        let table = json!({"prefix": source["name"], "origin": "memory"});
        let table = Table::from_json(&table.to_string()).expect("the table is sound");
        let source = Arc::new(Source::from_json(&source.to_string()).expect("the source is sound"));
        let rows: Vec<&[u8]> = lines.split(|&byte| byte == b'\n').collect();
        writer.add(framer, &source, &table, 0, &rows).expect("the examples are sound");
    }
    serde_json::from_str(&writer.finish(framer).expect("the folder can be written")).expect("the manifest is JSON")
}

fn tokenize(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("tokenize");
    let mut draws = Draws::new(1, "bench", "text");
    let texts: Vec<String> = (0..512).map(|_| prose(&mut draws, 200)).collect();
    for (name, framer) in framers() {
        let tokenizer = framer.tokenizer();
        let encoded: Vec<Vec<i32>> =
            texts.iter().map(|text| tokenizer.encode(text).expect("the text is plain")).collect();
        for (text, ids) in texts.iter().zip(&encoded) {
            assert_eq!(&tokenizer.decode(ids).expect("the ids are its own"), text);
        }
        group.throughput(Throughput::Elements(encoded.iter().map(Vec::len).sum::<usize>() as u64 / 512));
        let mut turn = (0..512).cycle();
        group.bench_function(format!("{name}/ids"), |bench| {
            bench.iter(|| tokenizer.encode(black_box(&texts[turn.next().unwrap_or(0)])));
        });
        group.bench_function(format!("{name}/spans"), |bench| {
            bench.iter(|| {
                let at = turn.next().unwrap_or(0);
                tokenizer.spans(black_box(&texts[at]), &encoded[at])
            });
        });
    }
}

fn frame(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Elements(1));
    for (name, framer) in framers() {
        let chat =
            json!([{"role": "system", "content": "You are kind."}, {"role": "user", "content": "Is the sea fine?"}]);
        let chat: Context = serde_json::from_value(chat).expect("it is a conversation");
        let framed = framer.prompt(&[24], 16, "What is the model thinking about?").expect("the prompt fits");
        assert_eq!(framed.placeholders.len(), 16);
        group.bench_function(format!("{name}/prompt"), |bench| {
            bench.iter(|| framer.prompt(black_box(&[24]), 16, "What is the model thinking about?"));
        });
        group.bench_function(format!("{name}/context"), |bench| {
            bench.iter(|| framer.context(black_box(&chat)));
        });
    }
}

fn pack(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pack");
    group.sample_size(10).throughput(Throughput::Elements((EXAMPLES / 3 * 3) as u64));
    let examples = examples();
    for (name, framer) in framers() {
        group.bench_function(format!("{name}/examples"), |bench| {
            bench.iter_batched(
                || tempfile::tempdir().expect("a temporary folder"),
                |folder| {
                    let manifest = pack_into(folder.path(), &framer, &examples);
                    assert!(
                        manifest["counts"]["examples"].as_u64().is_some_and(|kept| kept > 5800),
                        "{}",
                        manifest["drops"]
                    );
                },
                BatchSize::PerIteration,
            );
        });
    }
}

/// Lengths as examples have them: most around 75, one in thirty up to 512.
fn example_lengths(count: usize) -> Vec<i32> {
    let mut draws = Draws::new(7, "bench", "lengths");
    let mut length = || {
        if draws.unit() < 0.033 {
            return draws.between(100, 512) as i32;
        }
        let bell = (0..12).map(|_| draws.unit()).sum::<f64>() - 6.0;
        ((75.0 * (0.41 * bell).exp()).round() as i32).clamp(8, 512)
    };
    (0..count).map(|_| length()).collect()
}

fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    let lengths = example_lengths(1_000_000);
    let tokens: usize = lengths.iter().map(|&length| length as usize).sum();
    group.sample_size(20).throughput(Throughput::Elements(lengths.len() as u64));
    for (name, reach, least) in [("all", Reach::All, 0.999), ("window", Reach::Next(4096), 0.996)] {
        for budget in [2048, 4096, 8192, 16384] {
            let pack = || pack_rows(black_box(&lengths), &[], RowLimits::of_tokens(budget), reach).expect("all fit");
            let fill = tokens as f64 / (pack().len() * budget) as f64;
            assert!(fill >= least, "{name} {budget}: {fill}");
            group.bench_function(format!("{name}/{budget}"), |bench| bench.iter(pack));
        }
    }
}

fn order(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plan");
    let lengths = example_lengths(1_000_000);
    let groups: Vec<i64> = (0..lengths.len() as i64).map(|at| at / 6).collect();
    let contexts: Vec<i32> = groups.iter().map(|group| 40 + (group * 7919 % 300) as i32).collect();
    let datapoints = Datapoints { lengths: &lengths, context_lengths: &contexts, groups: &groups };
    group.sample_size(10).throughput(Throughput::Elements(lengths.len() as u64));
    for (name, step, ranks) in [
        ("examples/1", json!({"examples_per_step": 64}), 1),
        ("examples/4", json!({"examples_per_step": 64}), 4),
        ("tokens/4", json!({"tokens_per_step": 8 * 2048}), 4),
    ] {
        let mut settings = json!({"tokens_per_row": 2048, "window": 64, "ranks": ranks, "seed": 0, "epoch": 0});
        settings.as_object_mut().expect("it is one").extend(step.as_object().expect("it is one").clone());
        let settings = PlanSettings::from_json(&settings.to_string()).expect("the settings are sound");
        let run = || plan(black_box(datapoints), &settings).expect("the datapoints are sound");
        let made = run();
        assert!(made.order.len() > 999_000, "{name}: {} datapoints", made.order.len());
        assert!(made.sharing.alone > 5 * made.sharing.in_windows, "{name}: {:?}", made.sharing);
        group.bench_function(name, |bench| bench.iter(run));
    }
}

fn open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("shard");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [(_, framer), _] = framers();
    pack_into(folder.path(), &framer, &examples());
    let path = folder.path().join("shard-00000.safetensors");
    let datapoints = layout::decode(&path).expect("the shard is whole");
    let columns = datapoints.iter().map(Datapoint::row).collect();
    group.throughput(Throughput::Elements(datapoints.len() as u64));
    group.bench_function("open", |bench| bench.iter(|| layout::layout(black_box(&path)).expect("it is whole")));
    group.bench_function("encode", |bench| {
        bench.iter(|| shard::encode(black_box(&columns), &mut Stats::default(), |_| json!({})));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = tokenize, frame, pack, rows, order, open
}
criterion_main!(benches);
