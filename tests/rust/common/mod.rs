//! What the tests share: two small framers, examples with everything odd in them, and a data set written from them.

#![allow(dead_code, reason = "no test uses all of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ao_core::Result;
use ao_core::frame::Framer;
use ao_core::pack::{PackWriter, Progress, Run};
use ao_core::rows::Table;
use ao_core::source::{Source, Survey};
use serde_json::{Value, json};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

pub fn read(name: &str) -> String {
    std::fs::read_to_string(golden(name)).expect("the golden files are in the repository")
}

/// A framer like Gemma 4's: the generation prompt ends with an empty thought.
pub fn gemma() -> Framer {
    let specials = json!({"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": null});
    Framer::new(&read("gemma.json"), &read("gemma.jinja"), &specials.to_string(), " ?", "2025-01-01")
        .expect("the golden files fit")
}

/// A framer like Qwen 3's: no beginning-of-sequence token, contents shown as they are.
pub fn qwen() -> Framer {
    let specials = json!({"bos_token": null, "eos_token": "<|im_end|>"});
    Framer::new(&read("qwen.json"), &read("qwen.jinja"), &specials.to_string(), " ?", "2025-01-01")
        .expect("the golden files fit")
}

pub fn settings() -> Value {
    json!({
        "seed": 7,
        "num_layers": 12,
        "read_layers": [3, 6, 9],
        "layers_per_example": "one",
        "examples_per_shard": 16,
        "max_input_tokens": 400,
        "max_context_tokens": 400,
        "oracle": {"model": "tiny", "tokenizer": "1"},
        "targets": {"base": {"model": "tiny"}},
        "config": {"read_depths": [0.25, 0.5, 0.75]},
    })
}

pub fn records_source() -> Value {
    json!({
        "name": "records",
        "kind": "records",
        "reads": [{"share": 0.4, "all": true}, {"share": 0.6, "window": [1, 3], "before_end": [0, 9]}],
    })
}

pub fn lens_source() -> Value {
    json!({"name": "texts", "kind": "context_prediction", "single_share": 0.5, "window": [1, 10], "predict": [1, 4]})
}

/// Examples that use every field and share contexts in every way.
pub fn records() -> Vec<Value> {
    let chat =
        |user: &str| json!([{"role": "system", "content": " You are kind. "}, {"role": "user", "content": user}]);
    let closed = json!([{"role": "user", "content": "caf\u{e9}?"}, {"role": "assistant", "content": "Yes \u{1f600}."}]);
    let mut examples: Vec<Value> = (0..24)
        .map(|at| {
            json!({
                "id": format!("r{at}"),
                "context": chat(&format!("number {}", at / 4)),
                "question": if at % 2 == 0 { "Is the user kind? " } else { "What ? ? is <|turn> this" },
                "answer": if at % 3 == 0 { "Yes" } else { "No, na\u{ef}ve" },
            })
        })
        .collect();
    examples
        .push(json!({"id": "whole", "context": "a b c d e f g", "question": "q", "answer": "a", "positions": "all"}));
    examples
        .push(json!({"id": "prefix", "context": "a b c d e f g", "question": "q", "answer": "a", "positions": [0, 1]}));
    examples.push(json!({
        "id": "spans", "context": closed, "read": [{"message": 0, "start": 3, "end": 4}, {"message": 1}],
        "question": "q", "answer": "a", "positions": "all", "layers": [0.5, 11], "target": "difference",
        "meta": {"z": 1, "a": [true, null, "\u{e9}"]}, "source": "other",
    }));
    examples.push(json!({
        "id": "window", "context": closed, "question": "q", "answer": "a",
        "positions": {"window": [2, 2], "before_end": [1, 1]}, "target": "adapter",
    }));
    examples
}

pub fn texts() -> Vec<Value> {
    (0..24).map(|at| json!({"text": format!("The weather in Paris is fine today, {at} \u{1f600} times.")})).collect()
}

/// Labelled texts, true and false statements, and stimuli, some of them unanswerable: sources with their tables and rows.
fn labelled() -> Vec<(Value, Table, Vec<Value>)> {
    let unanswerable = json!({"share": 0.3, "answer": "I cannot tell."});
    let reads = json!([{"share": 1, "window": [1, 4], "before_end": [0, 6]}]);
    let labels = json!({"name": "labels", "kind": "classification", "seed": 7, "text": "{who} {what}", "label": "y",
        "questions": ["Is it {label}?", "What is it?", "{who}: {label}?"], "questions_per_text": 2, "prefix": "Say: ",
        "labels": {"0": ["past", "over"], "1": ["present"], "2": ["past"], "3": []}, "reads": reads,
        "unanswerable": unanswerable});
    let texts = (0..16).map(|at| {
        let (who, what) = (if at % 2 == 0 { "He" } else { "She" }, format!("went {}", at / 3));
        json!({"who": who, "what": what, "y": at % 4})
    });
    let facts = json!({"name": "facts", "kind": "classification", "seed": 7, "count": 14, "reads": reads,
        "questions": ["Is this {label}?"], "unanswerable": unanswerable});
    let pairs = [("Paris", "France"), ("Rome", "Italy"), ("Lyon", "France"), ("Caf\u{e9}", "\u{1f600}")];
    let pairs = pairs.repeat(2).into_iter().map(|(subject, object)| json!({"subject": subject, "object": object}));
    let mut statements = table(&facts);
    statements.templates = Some(vec!["The city of {} is in".to_owned(), "Where {} is:".to_owned()]);
    let stimuli = json!({"name": "qa", "kind": "latentqa", "seed": 7, "questions_per_stimulus": 2, "reads": reads,
        "questions": {"a": [["What is a?", "It is a."], ["Is it b?", "No"], ["So?", "Yes"]], "b": [["What?", "It is b."]], "c": []},
        "unanswerable": unanswerable});
    let turns = (0..9).map(|at| {
        let [user, model] = ["user", "model"].map(|who| format!("The {who} says {at}."));
        let label = ["a", "b", "c"][at % 3];
        json!({"label": label, "control_user": user, "control_model": model, "stimulus_user": "And?"})
    });
    let mut chats = table(&stimuli);
    chats.r#type = Some("stimulus".to_owned());
    vec![
        (labels.clone(), table(&labels), texts.collect()),
        (facts, statements, pairs.collect()),
        (stimuli, chats, turns.collect()),
    ]
}

/// One source of every kind with its table and its rows, ready to be packed.
pub fn sources() -> Vec<(Arc<Source>, Table, Vec<String>)> {
    let plain = [(records_source(), records()), (lens_source(), texts())];
    let plain = plain.into_iter().map(|(source, rows)| (source.clone(), table(&source), rows));
    plain
        .chain(labelled())
        .map(|(source, table, rows)| {
            let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
            let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
            let mut survey = Survey::new(&source.to_string()).expect("the source is sound");
            survey.add(&table, 0, &rows);
            let (source, _) = survey.settle().expect("there is something to ask");
            (Arc::new(source), table, lines)
        })
        .collect()
}

/// A writer that builds everything.
pub fn writer(framer: &Framer, folder: &Path, settings: &Value) -> Result<PackWriter> {
    PackWriter::new(folder, framer, &settings.to_string(), Run::default())
}

/// A table named after its source.
pub fn table(source: &Value) -> Table {
    let name = source["name"].as_str().expect("sources have names");
    Table::from_json(&json!({"prefix": name, "origin": format!("{name}.jsonl"), "unit": "line"}).to_string())
        .expect("the table is sound")
}

/// Add `rows`, of which the first has number `first`, of a source that needs no survey.
pub fn add(
    writer: &mut PackWriter,
    framer: &Framer,
    source: &Value,
    first: usize,
    rows: &[impl ToString],
) -> Result<Progress> {
    let lines: Vec<String> = rows.iter().map(ToString::to_string).collect();
    let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
    let settled = Arc::new(Source::from_json(&source.to_string())?);
    writer.add(framer, &settled, &table(source), first, &rows).cloned()
}

/// Pack one source of every kind into `folder` and return the manifest.
pub fn pack(framer: &Framer, folder: &Path, settings: &Value) -> Result<Value> {
    pack_with(framer, folder, settings, Run::default())
}

/// The same in a given way: a part, or going on.
pub fn pack_with(framer: &Framer, folder: &Path, settings: &Value, run: Run) -> Result<Value> {
    let mut writer = PackWriter::new(folder, framer, &settings.to_string(), run)?;
    for (source, table, lines) in sources() {
        let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
        writer.add(framer, &source, &table, 0, &rows)?;
    }
    let manifest = writer.finish(framer)?;
    Ok(serde_json::from_str(&manifest).expect("the manifest is JSON"))
}

/// All files of a folder by name.
pub fn files(folder: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    std::fs::read_dir(folder)
        .expect("the folder is there")
        .map(|entry| {
            let path = entry.expect("the entry can be read").path();
            let name = path.file_name().expect("it has a name").to_string_lossy().into_owned();
            (name, std::fs::read(&path).expect("the file can be read"))
        })
        .collect()
}
