//! What holds of any bytes at all: the readers of JSONL, templates, tokenizers, shards, parts and activations refuse or
//! read them, but never panic, never hang and never ask for more memory than the input is worth; and what they do read is sound.
//!
//! The fuzz targets run these checks, and so does `tests/rust/fuzz_findings.rs`, on what was found and on mutated seeds.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use ao_core::activations::index::{self, Unit};
use ao_core::activations::reader::{Mode, RowReader};
use ao_core::activations::units;
use ao_core::activations::writer::UnitWriter;
use ao_core::activations::{HEADER_BYTES, RowType};
use ao_core::example::Message;
use ao_core::folder::{Part, merge};
use ao_core::frame::Framer;
use ao_core::layout::{decode, layout, metadata};
use ao_core::manifest::sha256_hex;
use ao_core::pack::{PackWriter, Run};
use ao_core::rows::Table;
use ao_core::source::Survey;
use ao_core::template::Template;
use ao_core::tokenize::Tokenizer;
use serde_json::{Map, Value, json};

const TOKENIZER: &str = include_str!("../golden/qwen.json");
const TEMPLATE: &str = include_str!("../golden/qwen.jinja");

static FRAMER: LazyLock<Framer> = LazyLock::new(|| {
    let specials = json!({"bos_token": null, "eos_token": "<|im_end|>"});
    Framer::new(TOKENIZER, TEMPLATE, &specials.to_string(), " ?", "2025-01-01").expect("the golden files fit")
});

fn settings() -> String {
    json!({
        "seed": 7, "num_layers": 12, "read_layers": [3, 6], "layers_per_example": "one", "examples_per_shard": 4,
        "max_input_tokens": 300, "max_context_tokens": 200,
    })
    .to_string()
}

/// One source of each kind, and the table that its rows are of.
fn sources() -> Vec<(Value, Value)> {
    let table = |name: &str| json!({"prefix": name, "origin": format!("{name}.jsonl"), "unit": "line"});
    let with = |mut value: Value, field: &str, new: Value| {
        value[field] = new;
        value
    };
    let records =
        json!({"name": "r", "kind": "records", "reads": [{"share": 1, "window": [1, 4], "before_end": [0, 3]}]});
    let texts =
        json!({"name": "t", "kind": "context_prediction", "draws_per_text": 2, "window": [1, 3], "predict": [1, 2]});
    let labels = json!({"name": "c", "kind": "classification", "questions": ["Is it {label}?", "What?"],
        "questions_per_text": 2, "unanswerable": {"share": 0.5, "answer": "no"}});
    let stimuli =
        json!({"name": "q", "kind": "latentqa", "questions": {"a": [["What?", "A."], ["Is it?", "Yes"]], "b": []}});
    let relation = with(table("c"), "templates", json!(["{} is in", "Where {} is:"]));
    let unanswerable = with(records.clone(), "unanswerable", json!({"share": 0.7, "answer": "no"}));
    vec![
        (records.clone(), table("r")),
        (with(records, "count", json!(2)), table("r")),
        (texts.clone(), table("t")),
        (with(with(texts, "within", json!("assistant")), "count", json!(3)), table("t")),
        (labels.clone(), table("c")),
        (labels, relation),
        (with(stimuli.clone(), "questions_per_stimulus", json!(1)), with(table("q"), "type", json!("control"))),
        (stimuli, with(table("q"), "type", json!("stimulus_completion"))),
        (unanswerable, table("r")),
    ]
}

/// The first byte chooses the source, the lines behind it are its rows: survey, pack, and read back what was packed.
pub fn jsonl(data: &[u8]) {
    let Some((choice, text)) = data.split_first() else { return };
    let mut sources = sources();
    let (source, table) = sources.swap_remove(usize::from(*choice) % sources.len());
    let rows: Vec<&[u8]> = text.split(|&byte| byte == b'\n').collect();
    let table = Table::from_json(&table.to_string()).expect("the table is sound");
    let mut survey = Survey::new(&source.to_string()).expect("the source is sound");
    survey.add(&table, 0, &rows);
    // Rows with one label alone leave nothing to ask wrongly.
    let Ok((source, _)) = survey.settle() else { return };
    let source = Arc::new(source);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = Run { max_errors: usize::MAX, ..Run::default() };
    let mut writer = PackWriter::new(folder.path(), &FRAMER, &settings(), run).expect("the settings are sound");
    let progress = writer.add(&FRAMER, &source, &table, 0, &rows).expect("bad rows are passed over").clone();
    let Ok(manifest) = writer.finish(&FRAMER) else {
        assert_eq!(progress.stats.total().datapoints, 0, "only a build without datapoints fails");
        return;
    };
    let manifest: Value = serde_json::from_str(&manifest).expect("a manifest is JSON");
    let shards = manifest["shards"].as_array().expect("a manifest lists its shards");
    let read: usize = shards
        .iter()
        .map(|shard| {
            let file = shard["file"].as_str().expect("a shard has a name");
            decode(&folder.path().join(file)).expect("what was written can be read").len()
        })
        .sum();
    assert_eq!(manifest["counts"]["datapoints"].as_u64(), Some(read as u64));
    assert_eq!(manifest["counts"]["offered"].as_u64(), Some(progress.offered as u64));
}

/// A template, behind a zero byte the turns of a conversation (a letter for the role, then the content, ended by a zero
/// byte each): whatever is rendered is also what is joined, and the contents stand where that says.
pub fn template(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let mut parts = text.split('\0');
    let source = parts.next().unwrap_or_default();
    let messages: Vec<Message> = parts
        .filter_map(|part| {
            let mut letters = part.chars();
            let role = match letters.next()? {
                's' => "system",
                'a' => "assistant",
                'u' => "user",
                _ => "tool",
            };
            Some(Message { role: role.to_owned(), content: letters.as_str().to_owned() })
        })
        .collect();
    let variables = Map::from_iter([("bos_token".to_owned(), json!("<s>")), ("eos_token".to_owned(), json!("</s>"))]);
    let Ok(template) = Template::new(source, &variables, "2025-01-01") else { return };
    for generation in [false, true] {
        let rendered = template.render(&messages, generation);
        let joined = template.join(&messages, generation);
        assert_eq!(rendered.is_ok(), joined.is_ok(), "{rendered:?} {joined:?}");
        let (Ok(rendered), Ok((joined, located))) = (rendered, joined) else { continue };
        assert_eq!(rendered, joined);
        for (message, span) in messages.iter().zip(located.iter().flat_map(|located| &located.contents)) {
            assert!(message.content.contains(&rendered[span.start..span.end]));
        }
    }
}

/// Any JSON as a tokenizer: a text that it encodes is spelled by its spans.
pub fn tokenizer_json(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(tokenizer) = Tokenizer::from_json(text) else { return };
    for text in ["", "Is it ?  caf\u{e9} \u{1f600}\n\n", "<|im_start|>user\nx<|im_end|>"] {
        let Ok(ids) = tokenizer.encode(text) else { continue };
        if let Ok(spans) = tokenizer.spans(text, &ids) {
            assert_eq!(spans.len(), ids.len());
            assert!(spans.iter().all(|span| text.get(span.start..span.end).is_some()), "{spans:?}");
        }
        let _ = tokenizer.decode(&ids);
    }
}

/// Any bytes as a shard: what has a layout lies inside the file and decodes.
pub fn shard(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("shard-00000.safetensors");
    std::fs::write(&path, data).expect("it can be written");
    let Ok(arrays) = layout(&path) else {
        assert!(decode(&path).is_err());
        return;
    };
    for array in &arrays {
        let width = array.dtype[1..].parse::<u64>().map_or(1, |bits| bits / 8);
        let length: u64 = array.shape.iter().map(|&side| side as u64).product();
        assert!(array.offset + length * width <= data.len() as u64, "{array:?}");
    }
    serde_json::from_str::<Value>(&metadata(&path).expect("it has a layout")).expect("metadata are JSON");
    // A text that is not UTF-8 is the only thing that a layout does not look at.
    if let Ok(datapoints) = decode(&path) {
        let rows = arrays.iter().find(|array| array.name == "answer_start").map(|array| array.shape[0]);
        assert_eq!(rows, Some(datapoints.len()));
    }
}

/// The files of a build in two parts.
static PARTS: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (source, table) = sources().swap_remove(0);
    let table = Table::from_json(&table.to_string()).expect("the table is sound");
    let rows: Vec<String> = (0..9)
        .map(|at| json!({"id": format!("r{at}"), "context": "a b c", "question": "q", "answer": "a"}).to_string())
        .collect();
    let rows: Vec<&[u8]> = rows.iter().map(String::as_bytes).collect();
    for index in 0..2 {
        let run = Run { part: Part { index, of: 2 }, ..Run::default() };
        let survey = Survey::new(&source.to_string()).expect("the source is sound");
        let source = Arc::new(survey.settle().expect("records need no labels").0);
        let mut writer = PackWriter::new(folder.path(), &FRAMER, &settings(), run).expect("the settings are sound");
        writer.add(&FRAMER, &source, &table, 0, &rows).expect("the rows are sound");
        writer.finish(&FRAMER).expect("it can be written");
    }
    files(folder.path())
});

fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<(String, Vec<u8>)> = std::fs::read_dir(folder)
        .expect("the folder is there")
        .map(|entry| {
            let path = entry.expect("the entry can be read").path();
            let name = path.file_name().expect("it has a name").to_string_lossy().into_owned();
            (name, std::fs::read(&path).expect("the file can be read"))
        })
        .collect();
    files.sort();
    files
}

/// Two part files, then perhaps a manifest, each ended by a zero byte, beside the shards of a real build: a merge that
/// succeeds leaves a manifest that proves every shard, and it gives the same manifest again.
pub fn manifest(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let shards = PARTS.iter().filter(|(name, _)| name.starts_with("shard-"));
    let given = data.split(|&byte| byte == 0).filter(|text| !text.is_empty());
    let names = ["part-0-of-2.json", "part-1-of-2.json", "manifest.json"];
    for (name, bytes) in
        shards.map(|(name, bytes)| (name.as_str(), bytes.as_slice())).chain(names.into_iter().zip(given))
    {
        std::fs::write(folder.path().join(name), bytes).expect("it can be written");
    }
    let Ok(text) = merge(folder.path()) else { return };
    let manifest: Value = serde_json::from_str(&text).expect("a manifest is JSON");
    for shard in manifest["shards"].as_array().expect("a manifest lists its shards") {
        let file = folder.path().join(shard["file"].as_str().expect("a shard has a name"));
        ao_core::layout::verify(&file, shard["sha256"].as_str().expect("a shard has a digest")).expect("it is proved");
    }
    assert_eq!(merge(folder.path()).expect("a merge can be repeated"), text);
}

/// The files of a unit of activations: the rows of a layer, then the index.
static UNIT: LazyLock<Vec<(String, Vec<u8>)>> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let row = RowType::new("F16", 5).expect("such rows are kept");
    let unit = Unit { run: "r".to_owned(), number: 0, contract: json!({"model": "m"}), row };
    let mut writer = UnitWriter::new(folder.path(), unit, &[3, 4]).expect("the unit is sound");
    let rows: Vec<u8> = (0..70).collect();
    writer.append(3, &[1 << 70, 5, 6, 7, 1, 2, 3], &[1.5; 7], &rows).expect("the rows are sound");
    writer.finish().expect("it can be written");
    files(folder.path())
});

/// What the manifest of that unit's cache says.
fn cache_manifest() -> Vec<u8> {
    let (index, bytes) = &UNIT[1];
    let listed = json!({"index": index, "bytes": bytes.len(), "rows": {"3": 7}, "xxh3": "-"});
    let about = json!({
        "schema": 1, "kind": "activations", "contract": {"model": "m"}, "dtype": "F16", "width": 5, "units": [listed],
    });
    let text = about.to_string();
    let said = &text[..text.len() - 1];
    format!("{said},\"sha256\":\"{}\"}}\n", sha256_hex(said.as_bytes())).into_bytes()
}

/// Any bytes as the rows (behind a zero byte), the index (one) or the manifest (two) of a unit: what has a layout lies
/// inside the file, rows that are proved are those that were written, what can be read is what the file holds, and a unit
/// is there whatever the manifest says.
pub fn activations(data: &[u8]) {
    let Some((&choice, data)) = data.split_first() else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    if choice == 2 {
        for (name, sound) in UNIT.iter() {
            std::fs::write(folder.path().join(name), sound).expect("it can be written");
        }
        std::fs::write(folder.path().join("manifest.json"), data).expect("it can be written");
        let name = [UNIT[1].0.clone()];
        let [listed, header] = [false, true].map(|headers| units::summaries(folder.path(), &name, headers));
        let (listed, header) = (listed.expect("its index is sound"), header.expect("its index is sound"));
        assert_eq!((listed.len(), &*listed[0].run, listed[0].number), (1, &*header[0].run, header[0].number));
        assert!(listed[0].rows.values().all(|&rows| rows > 0), "{listed:?}");
        return;
    }
    let is_index = usize::from(choice != 0);
    let paths: Vec<_> = UNIT.iter().map(|(name, _)| folder.path().join(name)).collect();
    for (at, (path, (_, sound))) in paths.iter().zip(UNIT.iter()).enumerate() {
        std::fs::write(path, if at == is_index { data } else { sound }).expect("it can be written");
    }
    let [rows, index] = &paths[..] else { panic!("a unit of one layer has two files") };
    let is_proved = index::verify(index).is_ok();
    match index::layout(index) {
        Err(_) => assert!(!is_proved),
        Ok(arrays) => {
            let name = UNIT[1].0.clone();
            let rows = units::summaries(folder.path(), &[name], true).expect("its header is sound").remove(0).rows;
            let size = std::fs::metadata(index).expect("it is there").len();
            for array in arrays {
                let width = array.dtype[1..].parse::<u64>().expect("a type and its bits") / 8;
                let [length] = array.shape[..] else { panic!("{array:?}") };
                assert!(array.offset + length as u64 * width <= size, "{array:?}");
                let (name, layer) = array.name.split_once('.').expect("an array is of a layer");
                let layer: u16 = layer.parse().expect("a layer is a number");
                assert!(name == "blocks" || rows.get(&layer).copied().unwrap_or(0) == length, "{array:?}");
            }
        }
    }
    let row = RowType::new("F16", 5).expect("such rows are kept");
    if is_index == 0 {
        assert_eq!(is_proved, data == UNIT[0].1);
    }
    if let Ok(reader) = RowReader::open(std::slice::from_ref(rows), row) {
        let held = &std::fs::read(rows).expect("it is there")[HEADER_BYTES..];
        let places: Vec<(u32, u32)> = (0..(held.len() / row.bytes()) as u32).rev().map(|row| (0, row)).collect();
        let mut out = vec![0; held.len()];
        reader.gather(&places, &mut out, Mode::Auto).expect("the rows are there");
        assert_eq!(out, held.rchunks(row.bytes()).flatten().copied().collect::<Vec<_>>());
        assert!(reader.prefetch(&[(0, places.len() as u32)]).is_err(), "there is no row behind the last");
    }
}

/// Sound inputs of a check, to mutate.
#[allow(dead_code, reason = "the fuzz targets start from files")]
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let shards = || PARTS.iter().filter(|(name, _)| name.starts_with("shard-")).map(|(_, bytes)| bytes.clone());
    let parts = || PARTS.iter().filter(|(name, _)| name.starts_with("part-")).map(|(_, bytes)| bytes.as_slice());
    match target {
        "jsonl" => rows().into_iter().zip(0u8..).map(|(text, at)| [&[at], text.as_bytes()].concat()).collect(),
        "template" => {
            templates().iter().map(|text| format!("{text}\0s Be kind.\0u\n a b \n\0a c\0u?").into_bytes()).collect()
        }
        "tokenizer_json" => vec![TOKENIZER.as_bytes().to_vec(), small_tokenizer().to_string().into_bytes()],
        "shard" => shards().collect(),
        "manifest" => vec![parts().flat_map(|bytes| [bytes, &[0]].concat()).collect()],
        "activations" => {
            let files = UNIT.iter().map(|(_, bytes)| bytes.clone()).chain([cache_manifest()]);
            (0..).zip(files).map(|(at, bytes)| [&[at], bytes.as_slice()].concat()).collect()
        }
        other => panic!("there is no check {other:?}"),
    }
}

fn rows() -> Vec<String> {
    let lines = |rows: &[Value]| rows.iter().map(Value::to_string).collect::<Vec<_>>().join("\n");
    let chat = json!([{"role": "user", "content": " a b \u{e9}"}, {"role": "assistant", "content": "c d e"}]);
    let records = lines(&[
        json!({"id": "a", "context": "a b c d", "question": "q ?", "answer": "a", "positions": [0, -1], "meta": {"k": [1.5, null]}}),
        json!({"id": "b", "context": chat, "read": [{"message": 1}, {"message": 0, "start": 0, "end": 2}], "question": "q",
            "answer": "a", "positions": {"window": [1, 2], "before_end": [0, 1]}, "layers": [0.5, 3]}),
        json!({"id": "c", "context": "a b", "read": [{"start": 0, "end": 1}], "question": "q", "answer": "a",
            "positions": "all", "target": "difference", "source": "s"}),
        json!({"id": "d", "context": chat, "read": [{"message": 0, "onwards": true}], "question": "q", "answer": "a"}),
    ]);
    let texts =
        lines(&[json!({"text": "a b c d e f g"}), json!({"messages": chat}), json!({"text": "a", "b": {"c": [1]}})]);
    let labels = lines(&[
        json!({"text": " a b", "label": "x"}),
        json!({"text": "c", "label": 1}),
        json!({"text": "d", "label": true}),
    ]);
    let relation = lines(&[json!({"subject": "a", "object": "b"}), json!({"subject": "c", "object": "d"})]);
    let control = lines(&[json!({"label": "a", "control_user": "x"}), json!({"label": "b", "control_user": "y"})]);
    let stimulus =
        json!({"label": "a", "control_user": "x", "control_model": "y", "stimulus_user": "z", "stimulus_model": "w"});
    let bad = lines(&[
        json!({"id": "e", "context": "a b", "question": "q", "answer": "a", "positions": [9]}),
        json!({"id": "f", "context": [{"role": "user", "content": ""}], "question": "q", "answer": "<|im_end|>"}),
    ]);
    let mixed = format!("{records}\n{bad}");
    vec![records.clone(), records, texts.clone(), texts, labels, relation, control, lines(&[stimulus]), mixed]
}

fn templates() -> Vec<&'static str> {
    vec![
        TEMPLATE,
        include_str!("../golden/gemma.jinja"),
        include_str!("../python/templates/llama_3.jinja"),
        include_str!("../python/templates/mistral.jinja"),
        include_str!("../python/templates/gemma_3.jinja"),
        include_str!("../python/templates/masked.jinja"),
    ]
}

/// A tokenizer with every part that a `tokenizer.json` has, and little in it.
fn small_tokenizer() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 6, "content": "<s>", "special": true, "normalized": false, "single_word": false,
            "lstrip": false, "rstrip": false}],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": {"a": 0, "b": 1, "\u{2581}": 2, "ab": 3, "\u{2581}a": 4, "c": 5, "<s>": 6},
            "merges": [["a", "b"], ["\u{2581}", "a"]]},
    })
}
