//! Builds in parts, builds that stop and go on, and what is counted: always the same bytes as one run.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod common;

use std::path::Path;
use std::sync::Arc;

use ao_core::datapoint::Datapoint;
use ao_core::folder::{Part, merge};
use ao_core::frame::Framer;
use ao_core::layout::{decode, metadata};
use ao_core::pack::{PackWriter, Progress, Run};
use ao_core::sample::Draws;
use ao_core::shard::encode;
use ao_core::source::{Source, Survey};
use ao_core::stats::Stats;
use serde_json::{Value, json};

fn part(index: usize, of: usize) -> Run {
    Run { part: Part { index, of }, ..Run::default() }
}

const RESUME: Run = Run { part: Part { index: 0, of: 1 }, resume: true, max_errors: 0 };

/// Small shards, so that a build has many.
fn settings() -> Value {
    let mut settings = common::settings();
    settings["examples_per_shard"] = json!(5);
    settings
}

fn whole(framer: &Framer) -> std::collections::BTreeMap<String, Vec<u8>> {
    let folder = tempfile::tempdir().unwrap();
    common::pack(framer, folder.path(), &settings()).unwrap();
    common::files(folder.path())
}

#[test]
fn parts_in_any_order_make_the_same_bytes_as_one_run() {
    let framer = common::gemma();
    let expected = whole(&framer);
    assert!(expected.len() > 10 && expected.contains_key("manifest.json"), "{:?}", expected.keys());
    for of in [2, 3, 20] {
        let folder = tempfile::tempdir().unwrap();
        for index in (0..of).rev() {
            assert!(merge(folder.path()).unwrap_err().to_string().contains("parts are missing"));
            common::pack_with(&framer, folder.path(), &settings(), part(index, of)).unwrap();
        }
        merge(folder.path()).unwrap();
        assert_eq!(common::files(folder.path()), expected, "{of} parts");
    }
}

#[test]
fn a_part_on_another_disk_can_be_copied_in() {
    let framer = common::gemma();
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    common::pack_with(&framer, here.path(), &settings(), part(0, 2)).unwrap();
    common::pack_with(&framer, there.path(), &settings(), part(1, 2)).unwrap();
    for (name, bytes) in common::files(there.path()) {
        std::fs::write(here.path().join(name), bytes).unwrap();
    }
    merge(here.path()).unwrap();
    assert_eq!(common::files(here.path()), whole(&framer));
}

/// Flip a bit of the last of `bytes` where they stand in a file for the last time.
fn flip(file: &Path, bytes: &[u8]) {
    let mut content = std::fs::read(file).unwrap();
    let at = content.windows(bytes.len()).rposition(|window| window == bytes).unwrap();
    content[at + bytes.len() - 1] ^= 1;
    std::fs::write(file, content).unwrap();
}

/// Write a shard anew with another answer, whole and of the same build.
fn other_answer(file: &Path) {
    let mut datapoints = decode(file).unwrap();
    datapoints[0].answer = Arc::from("another");
    let header: Value = serde_json::from_str(&metadata(file).unwrap()).unwrap();
    let fields = ["build", "shard", "stats", "fingerprints"].map(|name| (name.to_owned(), header[name].clone()));
    let header = Value::Object(fields.into_iter().collect());
    std::fs::write(
        file,
        encode(&datapoints.iter().map(Datapoint::row).collect(), &mut Stats::default(), |_| header).unwrap(),
    )
    .unwrap();
}

#[test]
fn a_merge_proves_every_shard() {
    let framer = common::gemma();
    let build = |damage: &dyn Fn(&Path)| {
        let folder = tempfile::tempdir().unwrap();
        for index in 0..2 {
            common::pack_with(&framer, folder.path(), &settings(), part(index, 2)).unwrap();
        }
        damage(folder.path());
        let error = merge(folder.path()).unwrap_err().to_string();
        assert!(!folder.path().join("manifest.json").exists());
        error
    };
    let shard = "shard-00003.safetensors";
    assert!(build(&|folder| std::fs::remove_file(folder.join(shard)).unwrap()).contains("no such file"));
    let flip = |folder: &Path| flip(&folder.join(shard), b"What");
    assert!(build(&flip).contains("damaged: digest expected"));
    assert!(build(&|folder| other_answer(&folder.join(shard))).contains("not the file that its part wrote"));
    let cut = |folder: &Path| {
        let bytes = std::fs::read(folder.join(shard)).unwrap();
        std::fs::write(folder.join(shard), &bytes[..bytes.len() - 8]).unwrap();
    };
    assert!(build(&cut).contains("the file is cut or has grown"));
    let foreign = |folder: &Path| {
        let mut other = settings();
        other["seed"] = json!(8);
        let elsewhere = tempfile::tempdir().unwrap();
        common::pack(&framer, elsewhere.path(), &other).unwrap();
        std::fs::copy(elsewhere.path().join(shard), folder.join(shard)).unwrap();
    };
    assert!(build(&foreign).contains("belongs to another build"));
}

/// A process that is killed while it writes leaves a torn file beside the place of the whole one.
#[test]
fn torn_files_of_every_kind_go() {
    let framer = common::gemma();
    let expected = whole(&framer);
    let torn = |folder: &Path| {
        for name in ["manifest.json", "shard-00002.safetensors", "shard-00003.safetensors", "part-1-of-2.json"] {
            std::fs::write(folder.join(format!(".{name}.4711.12.partial")), b"torn").unwrap();
        }
    };
    let folder = tempfile::tempdir().unwrap();
    torn(folder.path());
    common::pack_with(&framer, folder.path(), &settings(), RESUME).unwrap();
    assert_eq!(common::files(folder.path()), expected);

    let folder = tempfile::tempdir().unwrap();
    torn(folder.path());
    common::pack_with(&framer, folder.path(), &settings(), part(1, 2)).unwrap();
    let left: Vec<String> =
        common::files(folder.path()).into_keys().filter(|name| name.ends_with(".partial")).collect();
    assert_eq!(left, [".manifest.json.4711.12.partial", ".shard-00002.safetensors.4711.12.partial"], "not its own");
    common::pack_with(&framer, folder.path(), &settings(), part(0, 2)).unwrap();
    merge(folder.path()).unwrap();
    assert_eq!(common::files(folder.path()), expected);
}

#[test]
fn a_merge_that_was_stopped_can_be_repeated() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    for index in 0..2 {
        common::pack_with(&framer, folder.path(), &settings(), part(index, 2)).unwrap();
    }
    let part_file = folder.path().join("part-1-of-2.json");
    let kept = std::fs::read(&part_file).unwrap();
    let text = merge(folder.path()).unwrap();
    // Stopped between the manifest and the removal of the last part.
    std::fs::write(&part_file, kept).unwrap();
    assert_eq!(merge(folder.path()).unwrap(), text);
    assert_eq!(common::files(folder.path()), whole(&framer));
    std::fs::write(folder.path().join("shard-00001.safetensors"), b"damaged").unwrap();
    assert!(merge(folder.path()).unwrap_err().to_string().contains("damaged: sha256 expected"));
}

/// Builds the first `examples` of the records and stops there, as a kill would, with a torn file beside.
fn stop_early(framer: &Framer, folder: &Path, examples: usize) {
    let mut writer = common::writer(framer, folder, &settings()).unwrap();
    common::add(&mut writer, framer, &common::records_source(), 0, &common::records()[..examples]).unwrap();
    drop(writer);
    std::fs::write(folder.join(".shard-00004.safetensors.77.0.partial"), b"torn").unwrap();
}

#[test]
fn a_build_that_stopped_goes_on_to_the_same_bytes() {
    let framer = common::gemma();
    let expected = whole(&framer);
    for examples in [0, 4, 11, 28] {
        let folder = tempfile::tempdir().unwrap();
        stop_early(&framer, folder.path(), examples);
        common::pack_with(&framer, folder.path(), &settings(), RESUME).unwrap();
        assert_eq!(common::files(folder.path()), expected, "stopped after {examples}");
    }
}

#[test]
fn shards_that_are_there_are_not_built_again() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    stop_early(&framer, folder.path(), 28);
    let mut writer = PackWriter::new(folder.path(), &framer, &settings().to_string(), RESUME).unwrap();
    let progress = common::add(&mut writer, &framer, &common::records_source(), 0, &common::records()).unwrap();
    assert_eq!(progress.offered, 28);
    assert!(progress.skipped >= 15, "{progress:?}");
}

#[test]
fn a_damaged_shard_is_named_and_only_it_is_built_again() {
    let framer = common::gemma();
    let expected = whole(&framer);
    let shard = "shard-00001.safetensors";
    let flips: [(&[u8], &str); 3] = [
        (b"What", "damaged: digest expected"),
        (br#"\"offered\":5"#, "damaged: digest expected"),
        (b"__metadata__", "no shard header"),
    ];
    for (bytes, what) in flips {
        let folder = tempfile::tempdir().unwrap();
        stop_early(&framer, folder.path(), 28);
        flip(&folder.path().join(shard), bytes);
        let error = common::pack_with(&framer, folder.path(), &settings(), RESUME).unwrap_err().to_string();
        assert!(error.contains(shard) && error.contains(what), "{error}");
        assert!(error.ends_with("; remove this file and go on with --resume"), "{error}");
        std::fs::remove_file(folder.path().join(shard)).unwrap();
        common::pack_with(&framer, folder.path(), &settings(), RESUME).unwrap();
        assert_eq!(common::files(folder.path()), expected);
    }
}

#[test]
fn a_finished_part_that_is_run_again_is_compared_with_what_it_wrote() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let shard = folder.path().join("shard-00002.safetensors");
    let again = Run { resume: true, ..part(0, 2) };
    for run in [part(0, 2), part(1, 2), again] {
        common::pack_with(&framer, folder.path(), &settings(), run).unwrap();
    }
    other_answer(&shard);
    let error = common::pack_with(&framer, folder.path(), &settings(), again).unwrap_err().to_string();
    assert!(
        error.contains("it is not the file that its part wrote; remove this file and go on with --resume"),
        "{error}"
    );
    std::fs::remove_file(shard).unwrap();
    common::pack_with(&framer, folder.path(), &settings(), again).unwrap();
    merge(folder.path()).unwrap();
    assert_eq!(common::files(folder.path()), whole(&framer));
}

#[test]
fn an_unfinished_build_is_neither_overwritten_nor_mixed_with_another() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    stop_early(&framer, folder.path(), 28);
    let before = common::files(folder.path());
    let refused = |settings: &Value, run: Run| {
        PackWriter::new(folder.path(), &framer, &settings.to_string(), run).err().unwrap().to_string()
    };
    assert!(refused(&settings(), Run::default()).contains("go on with --resume, or remove the folder"));
    for (field, value) in [("seed", json!(8)), ("inputs", json!([{"file": "a", "xxh3": "0"}]))] {
        let mut other = settings();
        other[field] = value;
        assert!(refused(&other, RESUME).contains("belongs to another build"));
    }
    let shards = |files: &std::collections::BTreeMap<String, Vec<u8>>| {
        files
            .iter()
            .filter(|(name, _)| name.starts_with("shard"))
            .map(|(n, b)| (n.clone(), b.clone()))
            .collect::<Vec<_>>()
    };
    assert_eq!(shards(&common::files(folder.path())), shards(&before));
    let _first = PackWriter::new(folder.path(), &framer, &settings().to_string(), RESUME).unwrap();
    assert!(refused(&settings(), RESUME).contains("another process is building this part"));
    assert!(refused(&settings(), part(2, 2)).contains("part 2/2 does not exist"));
}

#[test]
fn bad_examples_are_passed_over_and_counted_up_to_a_number() {
    let framer = common::gemma();
    let mut rows: Vec<String> = common::records().iter().map(ToString::to_string).collect();
    rows[3] = "{\"id\": \"r3\", ".to_owned();
    rows[7] = json!({"id": "r7", "context": "a", "question": "q"}).to_string();
    rows[9] = rows[8].clone();
    rows[11] = json!({"id": "r11", "context": "a", "question": "q", "answer": "a", "extra": 1}).to_string();
    rows[12] = "  ".to_owned();
    let run = |max_errors: usize| {
        let folder = tempfile::tempdir().unwrap();
        let mut writer =
            PackWriter::new(folder.path(), &framer, &settings().to_string(), Run { max_errors, ..Run::default() })
                .unwrap();
        let done = common::add(&mut writer, &framer, &common::records_source(), 0, &rows)
            .and_then(|progress| Ok((progress, writer.finish(&framer)?)));
        let ids: Vec<String> = (0..6)
            .filter_map(|at| decode(&folder.path().join(format!("shard-{at:05}.safetensors"))).ok())
            .flatten()
            .map(|datapoint| datapoint.id)
            .collect();
        done.map(|(progress, text)| (progress, serde_json::from_str::<Value>(&text).unwrap(), ids))
    };
    let (progress, manifest, ids): (Progress, Value, Vec<String>) = run(4).unwrap();
    assert_eq!(manifest["errors"], json!({"bad_field": 1, "bad_value": 1, "duplicate_id": 1, "not_json": 1}));
    assert_eq!(manifest["counts"]["offered"], 27);
    assert_eq!(manifest["counts"]["examples"], 23);
    assert_eq!(progress.messages.len(), 4);
    assert!(progress.messages[0].contains("records.jsonl: line 4: not JSON, from column"), "{:?}", progress.messages);
    assert!(ids.contains(&"r8".to_owned()) && !ids.contains(&"r7".to_owned()), "{ids:?}");
    let error = run(1).unwrap_err().to_string();
    assert!(error.contains("3 rows cannot be used, more than the 1 that are passed over"), "{error}");
    assert!(run(0).unwrap_err().to_string().contains("line 4: not JSON"));
}

/// The manifest and the messages of a build that passes over all that is bad.
fn passed_over(framer: &Framer, source: &Value, rows: &[Value]) -> (Value, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let run = Run { max_errors: usize::MAX, ..Run::default() };
    let mut writer = PackWriter::new(folder.path(), framer, &settings().to_string(), run).unwrap();
    common::add(&mut writer, framer, source, 0, rows).unwrap();
    let manifest = serde_json::from_str(&writer.finish(framer).unwrap()).unwrap();
    (manifest, writer.progress().messages.clone())
}

#[test]
fn a_context_that_cannot_be_used_is_bad_in_its_own_row_alone() {
    let framer = common::gemma();
    let mut source = common::records_source();
    source["unanswerable"] = json!({"share": 0.9, "answer": "No."});
    let record = |id: usize, more: Value| {
        let mut row =
            json!({"id": format!("r{id}"), "context": format!("Text {id} of some."), "question": "q", "answer": "a"});
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let mut rows: Vec<Value> = (0..20).map(|id| record(id, json!({}))).collect();
    rows[13] = record(13, json!({"positions": [99]}));
    rows[17] = record(17, json!({"context": [{"role": "user", "content": ""}]}));
    rows[18] = record(
        18,
        json!({"context": [{"role": "user", "content": " x"}], "read": [{"message": 0, "start": 0, "end": 1}]}),
    );
    let (manifest, messages) = passed_over(&framer, &source, &rows);
    assert_eq!(manifest["errors"], json!({"bad_value": 1, "empty_context": 1, "position_out_of_range": 1}));
    for (message, line) in messages.iter().zip([14, 18, 19]) {
        assert!(message.contains(&format!("line {line},")), "{messages:?}");
    }
    assert_eq!(manifest["counts"]["examples"], 17);
    assert!(manifest["counts"]["unanswerable"].as_u64().unwrap() > 10);
}

#[test]
fn a_row_is_one_error_however_often_it_is_asked() {
    let framer = common::qwen();
    let questions = json!({"a": [["What?", "It."], [" ", "It."], ["", "It."]]});
    let source = json!({"name": "qa", "kind": "latentqa", "questions": questions});
    let mut table = common::table(&source);
    table.r#type = Some("control".to_owned());
    let folder = tempfile::tempdir().unwrap();
    let run = Run { max_errors: 2, ..Run::default() };
    let mut settings = settings();
    settings["examples_per_shard"] = json!(100);
    let mut writer = PackWriter::new(folder.path(), &framer, &settings.to_string(), run).unwrap();
    let row = json!({"label": "a", "control_user": "x"}).to_string();
    let source = Arc::new(Source::from_json(&source.to_string()).unwrap());
    writer.add(&framer, &source, &table, 0, &[row.as_bytes(); 2]).unwrap();
    let manifest: Value = serde_json::from_str(&writer.finish(&framer).unwrap()).unwrap();
    assert_eq!(manifest["errors"], json!({"empty_question": 2}));
    assert_eq!(manifest["drops"], json!({"of_a_bad_row": 2}));
    assert_eq!(manifest["counts"]["examples"], 2);
}

#[test]
fn documents_without_text_are_left_out() {
    let template = common::read("qwen.jinja");
    let refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no') }}{% endif %}";
    let specials = json!({"eos_token": "<|im_end|>"}).to_string();
    let framer =
        Framer::new(&common::read("qwen.json"), &format!("{refusing}{template}"), &specials, " ?", "2025-01-01")
            .unwrap();
    let said = |role: &str, content: Value| json!({"role": role, "content": content, "at": 1});
    let rows = [
        json!({"text": "one two three four"}),
        json!({"text": " \n"}),
        json!({"text": null}),
        json!({"messages": []}),
        json!({"messages": [said("user", json!("one two three")), said("assistant", json!(""))]}),
        json!({"messages": [said("user", json!(null)), said("assistant", json!("one two three"))]}),
        json!({"messages": [said("tool", json!("one two three"))]}),
        json!({"messages": null, "text": "one two three"}),
        json!({"other": 1}),
        json!({"messages": [{"content": "x"}]}),
    ];
    let source =
        json!({"name": "t", "kind": "context_prediction", "draws_per_text": 3, "predict": [1, 1], "window": [1, 1]});
    let (manifest, messages) = passed_over(&framer, &source, &rows);
    assert_eq!(manifest["drops"], json!({"empty_context": 15, "refused_by_template": 3}));
    assert_eq!(manifest["errors"], json!({"bad_field": 2}), "{messages:?}");
    assert_eq!(manifest["counts"]["examples"], 6);
}

#[test]
fn a_null_in_a_table_of_documents_is_no_text() {
    let framer = common::gemma();
    let source = common::lens_source();
    let table = json!({"prefix": "texts", "origin": "texts.parquet", "unit": "row"});
    let table = ao_core::rows::Table::from_json(&table.to_string()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &settings()).unwrap();
    let settled = Arc::new(Source::from_json(&source.to_string()).unwrap());
    let text = common::texts()[0].to_string();
    writer.add(&framer, &settled, &table, 0, &[b"{}", text.as_bytes()]).unwrap();
    let manifest: Value = serde_json::from_str(&writer.finish(&framer).unwrap()).unwrap();
    assert_eq!(manifest["drops"], json!({"empty_context": 1}));
}

#[test]
fn what_the_assistant_says_is_drawn_among_the_turns_in_reach() {
    let framer = common::gemma();
    let said = "the sea is kind ".repeat(8);
    let turn = |at: usize| json!({"role": if at.is_multiple_of(2) { "user" } else { "assistant" }, "content": said});
    let chat = |turns: usize| json!({"messages": (0..turns).map(turn).collect::<Vec<_>>()});
    let source = |most: usize| {
        json!({"name": "chats", "kind": "context_prediction", "within": "assistant", "draws_per_text": 5, "window": [1, 5],
            "predict": [1, 4], "max_context_tokens": most})
    };
    let manifest = |most: usize, rows: &[Value]| passed_over(&framer, &source(most), rows).0;
    let rows: Vec<Value> = [2, 20, 20, 20].map(chat).to_vec();
    let ids = framer.context(&serde_json::from_value(chat(2)["messages"].clone()).unwrap()).unwrap().ids.len();
    let all = manifest(ids + 20, &rows);
    assert_eq!((&all["counts"]["examples"], &all["drops"]), (&json!(20), &json!({})));
    let beyond = json!({"messages": [turn(0), turn(1)]});
    let short = json!({"messages": [turn(0), {"role": "assistant", "content": "a"}]});
    let alone = json!({"messages": [turn(0)]});
    let brief = json!({"messages": [{"role": "user", "content": "a"}, turn(1)]});
    let some = manifest(ids / 3, &[beyond, short, alone, brief]);
    let drops = json!({"beyond_max_context_tokens": 5, "context_too_short": 5, "no_assistant_turn": 5});
    assert_eq!((&some["counts"]["examples"], &some["drops"]), (&json!(5), &drops));
}

#[test]
fn a_part_of_another_build_is_refused_at_its_start() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    for index in 0..2 {
        common::pack_with(&framer, folder.path(), &settings(), part(index, 3)).unwrap();
    }
    let before = common::files(folder.path());
    let mut other = settings();
    other["seed"] = json!(8);
    let start = |settings: &Value, index: usize| {
        let run = Run { resume: true, ..part(index, 3) };
        PackWriter::new(folder.path(), &framer, &settings.to_string(), run).map(drop).map_err(|error| error.to_string())
    };
    let remedy = "remove shards 0, 3, 6 and so on, and part-0-of-3.json, and build it again";
    let error = start(&other, 2).unwrap_err();
    assert!(error.contains("part 0/3 in it is of another build") && error.contains(remedy), "{error}");
    // A part that is not finished shows it by its shards.
    for index in 0..2 {
        std::fs::remove_file(folder.path().join(format!("part-{index}-of-3.json"))).unwrap();
    }
    assert!(start(&other, 2).unwrap_err().contains(remedy));
    assert!(
        before.iter().all(|(name, bytes)| {
            name.starts_with("part-") || common::files(folder.path()).get(name) == Some(bytes)
        })
    );
    start(&settings(), 2).unwrap();
    // Its own shards of another build are all that has to go.
    let elsewhere = tempfile::tempdir().unwrap();
    common::pack(&framer, elsewhere.path(), &other).unwrap();
    let shard = "shard-00002.safetensors";
    std::fs::copy(elsewhere.path().join(shard), folder.path().join(shard)).unwrap();
    let error = start(&settings(), 2).unwrap_err();
    assert!(error.contains("remove shards 2, 5, 8 and so on, and part-2-of-3.json, to build anew"), "{error}");
}

#[test]
fn bad_examples_of_shards_that_are_there_count_too() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let bad = |id: usize| json!({"id": format!("b{id}"), "context": "a", "question": "q"});
    let rows: Vec<Value> = (0..2).map(bad).chain(common::records()).collect();
    let start = |resume: bool, max_errors: usize| {
        PackWriter::new(folder.path(), &framer, &settings().to_string(), Run { resume, max_errors, ..Run::default() })
    };
    let mut writer = start(false, 2).unwrap();
    common::add(&mut writer, &framer, &common::records_source(), 0, &rows[..20]).unwrap();
    drop(writer);
    let rest: Vec<Value> = rows.into_iter().chain([bad(2)]).collect();
    let finish = |max_errors: usize| {
        let mut writer = start(true, max_errors).unwrap();
        common::add(&mut writer, &framer, &common::records_source(), 0, &rest).and_then(|_| writer.finish(&framer))
    };
    assert!(finish(2).unwrap_err().to_string().contains("3 rows cannot be used"));
    finish(3).unwrap();
}

fn surveyed(source: &Value, rows: &[Value]) -> (Arc<Source>, Option<usize>) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
    let mut survey = Survey::new(&source.to_string()).unwrap();
    assert!(survey.is_needed());
    survey.add(&common::table(source), 0, &rows[..rows.len() / 2]);
    survey.add(&common::table(source), rows.len() / 2, &rows[rows.len() / 2..]);
    let (source, examples) = survey.settle().unwrap();
    (Arc::new(source), examples)
}

fn packed(
    framer: &Framer,
    settings: &Value,
    source: &Arc<Source>,
    described: &Value,
    rows: &[Value],
) -> Vec<Datapoint> {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(framer, folder.path(), settings).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
    writer.add(framer, source, &common::table(described), 0, &rows).unwrap();
    writer.finish(framer).unwrap();
    (0..100).map_while(|at| decode(&folder.path().join(format!("shard-{at:05}.safetensors"))).ok()).flatten().collect()
}

#[test]
fn a_count_takes_the_examples_with_the_smallest_keys_in_their_order() {
    let framer = common::gemma();
    let described = json!({"name": "texts", "kind": "context_prediction", "seed": 7, "count": 20, "draws_per_text": 2,
        "window": [1, 3], "predict": [1, 2]});
    let (source, examples) = surveyed(&described, &common::texts());
    assert_eq!(examples, Some(20));
    let ids: Vec<String> =
        packed(&framer, &settings(), &source, &described, &common::texts()).into_iter().map(|d| d.id).collect();
    let mut keyed: Vec<(u64, usize, String)> = (0..48)
        .map(|at| {
            let id = format!("texts/{}/{}", at / 2, at % 2);
            (Draws::new(7, &id, "draw").bits(), at, id)
        })
        .collect();
    keyed.sort();
    keyed.truncate(20);
    keyed.sort_by_key(|(_, at, _)| *at);
    let drawn: Vec<&String> = keyed.iter().map(|(_, _, id)| id).collect();
    assert!(ids.iter().all(|id| drawn.contains(&id)), "only what was drawn");
    assert!(ids.len() > 10, "but for drops, all of it: {ids:?}");
    assert!(ids.is_sorted_by_key(|id| drawn.iter().position(|other| *other == id)));
}

#[test]
fn labelled_texts_are_asked_about_labels_that_are_not_worded_alike() {
    let framer = common::gemma();
    let described = json!({"name": "tense", "kind": "classification", "seed": 3, "text": "{who} {what}", "label": "y",
        "questions": ["Is it {label}?", "What is it?"], "labels": {"0": ["past", "over"], "1": ["present"], "2": ["past"]},
        "questions_per_text": 2, "prefix": "Say: ", "reads": [{"share": 1, "all": true}]});
    let rows: Vec<Value> = (0..40).map(|at| json!({"who": "He", "what": format!("went {at}"), "y": at % 3})).collect();
    let (source, _) = surveyed(&described, &rows);
    let datapoints = packed(&framer, &settings(), &source, &described, &rows);
    assert_eq!(datapoints.len(), 80);
    let (mut yes, mut no) = (0, 0);
    for datapoint in &datapoints {
        let number: usize = datapoint.id.split('/').nth(1).unwrap().parse().unwrap();
        let words: &[&str] = [&["past", "over"][..], &["present"], &["past"]][number % 3];
        let read: Vec<i32> = datapoint.read_positions.iter().map(|&at| datapoint.context_ids[at as usize]).collect();
        assert!(framer.tokenizer().decode(&read).unwrap().starts_with(&format!("He went {number}")));
        match datapoint.question.strip_prefix("Say: Is it ") {
            Some(asked) => {
                let asked = asked.trim_end_matches('?');
                assert_eq!(&*datapoint.answer, if words.contains(&asked) { "Yes" } else { "No" }, "{datapoint:?}");
                if &*datapoint.answer == "Yes" { yes += 1 } else { no += 1 }
            }
            None => assert!(words.contains(&&*datapoint.answer), "{datapoint:?}"),
        }
    }
    assert!(yes + no == 40 && yes > 10 && no > 10, "each text is asked both ways: {yes} {no}");
}

#[test]
fn a_table_that_leaves_nothing_to_ask_wrongly_stops_the_build() {
    let described = json!({"name": "c", "kind": "classification", "label": "y", "questions": ["Is it {label}?"],
        "reads": [{"share": 1, "all": true}]});
    let settled = |labels: &Value, questions: &Value, values: &[&str]| {
        let mut described = described.clone();
        described["labels"] = labels.clone();
        described["questions"] = questions.clone();
        let lines: Vec<String> = values.iter().map(|label| json!({"text": "a", "y": label}).to_string()).collect();
        let rows: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
        let mut survey = Survey::new(&described.to_string()).unwrap();
        survey.add(&common::table(&described), 0, &rows);
        survey.settle().map(|_| ()).map_err(|error| error.to_string())
    };
    let asks = json!(["Is it {label}?"]);
    for (labels, values) in [(json!({}), ["1", "1"]), (json!({"0": ["so"], "1": ["so"]}), ["0", "1"])] {
        let error = settled(&labels, &asks, &values).unwrap_err();
        assert!(error.contains("source \"c\"") && error.contains("needs two labels or more"), "{error}");
        settled(&labels, &json!(["What is it?"]), &values).unwrap();
    }
    settled(&json!({}), &asks, &["0", "1"]).unwrap();
    settled(&json!({}), &asks, &[]).unwrap();
}

/// Labels that are given do not tell which of them one text has.
#[test]
fn given_labels_are_surveyed_where_a_question_asks_for_one() {
    let needs = |question: &str| {
        let described = json!({"name": "c", "kind": "classification", "questions": [question], "words": ["a", "b"]});
        Survey::new(&described.to_string()).unwrap().is_needed()
    };
    assert!(needs("Is it {label}?") && !needs("What is it?"));
}

#[test]
fn errors_of_settings_are_not_passed_over() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let described = json!({"name": "qa", "kind": "latentqa", "questions": {"a": [["What?", "It."]]}});
    let source = Arc::new(Source::from_json(&described.to_string()).unwrap());
    let run = Run { max_errors: usize::MAX, ..Run::default() };
    let mut writer = PackWriter::new(folder.path(), &framer, &settings().to_string(), run).unwrap();
    let row = json!({"label": "a", "control_user": "Hi."}).to_string();
    let error = writer
        .add(&framer, &source, &common::table(&described), 0, &[row.as_bytes(); 5])
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("settings: a LatentQA table has type"), "{error}");
}

#[test]
fn what_is_common_is_counted_by_itself() {
    let framer = common::gemma();
    let sound = json!({"context": "a b", "question": "q", "answer": "a"});
    let cases = [
        ("context", json!(""), "empty_context"),
        ("context", json!([]), "empty_context"),
        ("context", json!([{"role": "user", "content": ""}]), "empty_context"),
        ("question", json!(" "), "empty_question"),
        ("answer", json!(""), "empty_answer"),
        ("positions", json!([9]), "position_out_of_range"),
        ("layers", json!([12]), "layer_out_of_range"),
        ("layers", json!([6, 0.5]), "repeated_layer"),
        ("id", json!(""), "bad_field"),
    ];
    let mut expected = std::collections::BTreeMap::<&str, u64>::new();
    let mut rows = vec![sound.clone()];
    for (field, value, reason) in &cases {
        let mut row = sound.clone();
        row[field] = value.clone();
        rows.push(row);
        *expected.entry(reason).or_default() += 1;
    }
    for (number, row) in rows.iter_mut().enumerate() {
        if row["id"].is_null() {
            row["id"] = json!(format!("r{number}"));
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let run = Run { max_errors: cases.len(), ..Run::default() };
    let mut writer = PackWriter::new(folder.path(), &framer, &settings().to_string(), run).unwrap();
    common::add(&mut writer, &framer, &common::records_source(), 0, &rows).unwrap();
    let manifest: Value = serde_json::from_str(&writer.finish(&framer).unwrap()).unwrap();
    assert_eq!(manifest["errors"], json!(expected));
}

#[test]
fn ids_of_records_and_ids_that_are_made_cannot_meet() {
    let framer = common::gemma();
    let record = |id: &str| vec![json!({"id": id, "context": "a b", "question": "q", "answer": "a"})];
    let (records, texts) = (common::records_source(), common::lens_source());
    let add = |id: &str, is_first: bool| {
        let folder = tempfile::tempdir().unwrap();
        let run = Run { max_errors: usize::MAX, ..Run::default() };
        let mut writer = PackWriter::new(folder.path(), &framer, &settings().to_string(), run).unwrap();
        let mut sources = [(&records, record(id)), (&texts, common::texts())];
        if !is_first {
            sources.reverse();
        }
        sources.iter().try_for_each(|(source, rows)| {
            common::add(&mut writer, &framer, source, 0, rows).map(|_| ()).map_err(|error| error.to_string())
        })
    };
    for is_first in [true, false] {
        let error = add("texts/0/0", is_first).unwrap_err();
        assert!(error.contains("begin with \"texts/\"") && error.contains("rename the source"), "{error}");
        for id in ["records/0", "texts", "textures/0/0", "a/texts/0"] {
            add(id, is_first).unwrap();
        }
    }
}

#[test]
fn labels_are_left_out_and_questions_name_columns() {
    let framer = common::gemma();
    let described = json!({"name": "snli", "kind": "classification", "seed": 3, "count": 30, "text": "premise",
        "label": "y", "questions": ["Does {claim} follow? {label} {", "So: {claim}"],
        "labels": {"0": ["Yes"], "1": [], "2": ["No"]}, "questions_per_text": 2,
        "reads": [{"share": 1, "all": true}]});
    let rows: Vec<Value> = (0..40)
        .map(|at| json!({"premise": format!("He went {at}."), "claim": format!("{{label}} {at}"), "y": at % 3}))
        .collect();
    let (source, _) = surveyed(&described, &rows);
    let datapoints = packed(&framer, &settings(), &source, &described, &rows);
    assert_eq!(datapoints.len(), 30, "the count is of those that are not left out");
    for datapoint in &datapoints {
        let number: usize = datapoint.id.split('/').nth(1).unwrap().parse().unwrap();
        let own = ["Yes", "", "No"][number % 3];
        assert_ne!(own, "", "{datapoint:?}");
        if let Some(asked) = datapoint.question.strip_prefix(&format!("Does {{label}} {number} follow? ")) {
            let asked = asked.strip_suffix(" {").unwrap();
            assert!(["Yes", "No"].contains(&asked), "{datapoint:?}");
            assert_eq!(&*datapoint.answer, if asked == own { "Yes" } else { "No" }, "{datapoint:?}");
        } else {
            assert_eq!(&*datapoint.question, format!("So: {{label}} {number}"));
            assert_eq!(&*datapoint.answer, own);
        }
    }
    let missing = json!({"premise": "He went.", "y": 0});
    let (source, _) = surveyed(&described, std::slice::from_ref(&missing));
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &settings()).unwrap();
    let row = missing.to_string();
    let table = common::table(&described);
    writer.add(&framer, &source, &table, 0, &[row.as_bytes()]).unwrap();
    assert!(writer.finish(&framer).unwrap_err().to_string().contains("\"claim\""));
}

#[test]
fn unanswerable_examples_read_another_labels_context() {
    let framer = common::gemma();
    let questions = json!({"a": [["What is a?", "It is a."]], "b": [["What is b?", "It is b."]], "c": []});
    let described = json!({"name": "qa", "kind": "latentqa", "seed": 5, "questions": questions,
        "unanswerable": {"share": 0.4, "answer": "Cannot tell."}, "reads": [{"share": 1, "all": true}]});
    let rows: Vec<Value> = (0..30)
        .map(|at| {
            let (label, shown) = [("a", "A"), ("b", "B"), ("c", "C")][at % 3];
            json!({"label": label, "control_user": format!("{shown} {at}")})
        })
        .collect();
    let mut table = common::table(&described);
    table.r#type = Some("control".to_owned());
    let source = Arc::new(Source::from_json(&described.to_string()).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    let lines: Vec<&[u8]> = lines.iter().map(String::as_bytes).collect();
    writer.add(&framer, &source, &table, 0, &lines).unwrap();
    let manifest: Value = serde_json::from_str(&writer.finish(&framer).unwrap()).unwrap();
    assert_eq!(manifest["drops"], json!({"label_without_questions": 10}));
    let mut counts = [0, 0];
    for shard in 0..2 {
        for datapoint in decode(&folder.path().join(format!("shard-{shard:05}.safetensors"))).unwrap() {
            let shown = framer.tokenizer().decode(&datapoint.context_ids).unwrap();
            let own =
                if datapoint.question.contains('a') && !datapoint.question.contains("b?") { "\nA " } else { "\nB " };
            let unanswerable = &*datapoint.answer == "Cannot tell.";
            assert_eq!(shown.contains(own), !unanswerable, "{shown} {datapoint:?}");
            counts[usize::from(unanswerable)] += 1;
        }
    }
    assert!(counts[0] > 5 && counts[1] > 3, "{counts:?}");
}
