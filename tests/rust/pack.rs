//! Packing: golden bytes, independence of threads, and errors that leave nothing half-written.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use ao_core::error::Error;
use ao_core::layout::decode;
use ao_core::manifest::{canonical_json, sha256_hex, write_atomic};
use ao_core::source::Source;
use serde_json::{Value, json};

/// Hashes of all files and a readable dump of some datapoints. With `AO_UPDATE_GOLDEN` set it is written, not compared.
#[test]
fn golden_bytes() {
    for (name, framer) in [("gemma", common::gemma()), ("qwen", common::qwen())] {
        let folder = tempfile::tempdir().unwrap();
        common::pack(&framer, folder.path(), &common::settings()).unwrap();
        let files = common::files(folder.path());
        let hashes: BTreeMap<_, _> = files.iter().map(|(name, bytes)| (name.clone(), sha256_hex(bytes))).collect();
        let mut dump = Vec::new();
        for shard in files.keys().filter(|name| name.starts_with("shard-")) {
            for datapoint in decode(&folder.path().join(shard)).unwrap().iter().step_by(5) {
                dump.push(json!({
                    "id": datapoint.id,
                    "source": *datapoint.source,
                    "input": framer.tokenizer().decode(&datapoint.input_ids).unwrap(),
                    "input_ids": datapoint.input_ids,
                    "answer_start": datapoint.answer_start,
                    "placeholders": datapoint.placeholders,
                    "layers": datapoint.layers,
                    "read_positions": datapoint.read_positions,
                    "context": framer.tokenizer().decode(&datapoint.context_ids).unwrap(),
                    "kind": datapoint.kind,
                    "answer": *datapoint.answer,
                    "meta": *datapoint.meta,
                }));
            }
        }
        let lines: Vec<String> = dump.iter().map(canonical_json).collect();
        let text = format!("{{\"files\":{},\"datapoints\":[\n{}\n]}}\n", json!(hashes), lines.join(",\n"));
        let path = common::golden(&format!("{name}.expected.json"));
        if std::env::var_os("AO_UPDATE_GOLDEN").is_some() {
            write_atomic(&path, text.as_bytes()).unwrap();
        }
        let expected = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, expected, "{name}: run with AO_UPDATE_GOLDEN=1 if the format was meant to change");
    }
}

#[test]
fn any_number_of_threads_writes_the_same_bytes() {
    let framer = common::gemma();
    let with = |threads: usize| {
        let folder = tempfile::tempdir().unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| common::pack(&framer, folder.path(), &common::settings())).unwrap();
        common::files(folder.path())
    };
    let one = with(1);
    assert_eq!(one, with(2));
    assert_eq!(one, with(4));
}

#[test]
fn any_cut_of_the_input_writes_the_same_bytes() {
    let framer = common::gemma();
    let whole = tempfile::tempdir().unwrap();
    common::pack(&framer, whole.path(), &common::settings()).unwrap();
    let pieces = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, pieces.path(), &common::settings()).unwrap();
    for (source, table, rows) in common::sources() {
        for (at, row) in rows.iter().enumerate() {
            writer.add(&framer, &source, &table, at, &[row.as_bytes()]).unwrap();
        }
    }
    writer.finish(&framer).unwrap();
    drop(writer);
    assert_eq!(common::files(whole.path()), common::files(pieces.path()));
}

#[test]
fn an_example_draws_the_same_whatever_stands_beside_it() {
    let framer = common::gemma();
    let read = |examples: &[Value]| {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
        common::add(&mut writer, &framer, &common::records_source(), 0, examples).unwrap();
        writer.finish(&framer).unwrap();
        decode(&folder.path().join("shard-00000.safetensors")).unwrap()
    };
    let together = read(&common::records()[..12]);
    assert_eq!(together[5], read(&common::records()[5..6])[0]);
}

#[test]
fn the_manifest_says_what_was_packed() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let manifest = common::pack(&framer, folder.path(), &common::settings()).unwrap();
    let text = std::fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    assert_eq!(text, canonical_json(&manifest));
    assert_eq!(manifest["schema"], 1);
    assert_eq!(manifest["oracle"], common::settings()["oracle"]);
    assert_eq!(manifest["sources"]["records"]["examples"], 27);
    assert_eq!(manifest["sources"]["other"]["examples"], 1, "of a record that says its own source");
    let mut datapoints = 0;
    for shard in manifest["shards"].as_array().unwrap() {
        let path = folder.path().join(shard["file"].as_str().unwrap());
        ao_core::layout::verify(&path, shard["sha256"].as_str().unwrap()).unwrap();
        assert_eq!(shard["bytes"].as_u64().unwrap(), path.metadata().unwrap().len());
        let read = decode(&path).unwrap();
        assert_eq!(shard["datapoints"].as_u64().unwrap() as usize, read.len());
        datapoints += read.len();
    }
    assert_eq!(manifest["counts"]["datapoints"].as_u64().unwrap() as usize, datapoints);
}

#[test]
fn what_was_asked_for_is_what_is_read() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let settings = json_with(&common::settings(), "layers_per_example", &json!("together"));
    common::pack(&framer, folder.path(), &settings).unwrap();
    let all: Vec<_> = (0..4)
        .filter_map(|at| decode(&folder.path().join(format!("shard-{at:05}.safetensors"))).ok())
        .flatten()
        .collect();
    let find = |id: &str| all.iter().find(|datapoint| datapoint.id == id).unwrap();
    let text = |ids: &[i32]| framer.tokenizer().decode(ids).unwrap();

    let spans = find("spans");
    assert_eq!((spans.kind, &*spans.source), (2, "other"));
    assert_eq!(spans.meta.as_ref(), "{\"a\":[true,null,\"\u{e9}\"],\"z\":1}");
    let one = spans.read_positions.len() / 2;
    assert_eq!(spans.layers, [vec![6; one], vec![11; one]].concat());
    let first: Vec<i32> = spans.read_positions[..one].iter().map(|&at| spans.context_ids[at as usize]).collect();
    assert_eq!(text(&first), "\u{e9}<|turn>model\nYes \u{1f600}.<turn|>\n");
    assert_eq!(spans.read_positions[one..], spans.read_positions[..one]);

    let window = find("window");
    let length = window.context_ids.len() as i32;
    assert_eq!(window.read_positions[..2], [length - 2, length - 1], "the context is cut behind what is read");
    assert!(find("whole").context_ids.starts_with(&find("prefix").context_ids));
    for datapoint in &all {
        let answer = &datapoint.input_ids[datapoint.answer_start as usize..];
        assert_eq!(text(answer), format!("{}<turn|>", datapoint.answer));
        let last = datapoint.read_positions.iter().max().unwrap() + 1;
        assert_eq!(datapoint.context_ids.len() as i32, last);
    }
}

/// The answer of a context prediction is what stands beside the tokens that are read.
#[test]
fn context_prediction_asks_about_the_neighbours() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
    common::add(&mut writer, &framer, &common::lens_source(), 0, &common::texts()).unwrap();
    writer.finish(&framer).unwrap();
    let mut seen = [0, 0];
    for datapoint in
        (0..2).flat_map(|at| decode(&folder.path().join(format!("shard-{at:05}.safetensors"))).unwrap_or_default())
    {
        let number: usize = datapoint.id.split('/').nth(1).unwrap().parse().unwrap();
        let example = serde_json::from_value(common::texts()[number]["text"].clone()).unwrap();
        let full = framer.context(&example).unwrap().ids;
        let (first, last) = (datapoint.read_positions[0] as usize, *datapoint.read_positions.last().unwrap() as usize);
        assert!(first >= 1, "the beginning-of-sequence token is not read");
        assert_eq!(datapoint.read_positions.len(), last + 1 - first);
        let count: usize = datapoint.question.split(' ').find_map(|word| word.parse().ok()).unwrap();
        let next = datapoint.question.contains("next");
        let beside = if next { &full[last + 1..last + 1 + count] } else { &full[first - count..first] };
        assert_eq!(*datapoint.answer, framer.tokenizer().decode(beside).unwrap());
        assert_eq!(datapoint.question.contains("tokens"), count > 1);
        seen[usize::from(next)] += 1;
    }
    assert!(seen[0] > 3 && seen[1] > 3, "{seen:?}");
}

#[test]
fn each_layer_can_be_its_own_datapoint() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let settings = json_with(&common::settings(), "layers_per_example", &json!("each"));
    let mut writer = common::writer(&framer, folder.path(), &settings).unwrap();
    common::add(&mut writer, &framer, &common::records_source(), 0, &common::records()[..2]).unwrap();
    writer.finish(&framer).unwrap();
    let ids: Vec<String> =
        decode(&folder.path().join("shard-00000.safetensors")).unwrap().into_iter().map(|d| d.id).collect();
    assert_eq!(ids, ["r0@L3", "r0@L6", "r0@L9", "r1@L3", "r1@L6", "r1@L9"]);
}

#[test]
fn what_is_too_long_is_counted() {
    let framer = common::gemma();
    for (field, limit, reason) in
        [("max_context_tokens", 3, "context_too_long"), ("max_input_tokens", 40, "input_too_long")]
    {
        let folder = tempfile::tempdir().unwrap();
        let settings = json_with(&common::settings(), field, &json!(limit));
        let manifest = common::pack(&framer, folder.path(), &settings).unwrap();
        assert!(manifest["drops"][reason].as_u64().unwrap() > 0, "{}", manifest["drops"]);
        let total = manifest["drops"].as_object().unwrap().values().filter_map(Value::as_u64).sum::<u64>()
            + manifest["counts"]["examples"].as_u64().unwrap();
        assert_eq!(total, manifest["counts"]["offered"].as_u64().unwrap());
    }
}

#[test]
fn texts_without_room_or_text_are_counted() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
    let source =
        json!({"name": "t", "kind": "context_prediction", "single_share": 1.0, "predict": [1, 1], "direction": "next"});
    let texts = ["a", "\u{1f600}", "a<turn|>"].map(|text| json!({"text": text}));
    common::add(&mut writer, &framer, &source, 0, &texts).unwrap();
    let error = writer.finish(&framer).unwrap_err().to_string();
    assert!(error.contains("no example was kept"), "{error}");
    for reason in ["context_too_short", "answer_not_decodable", "special_token_in_answer"] {
        assert!(error.contains(&format!("{reason:?}: 1")), "{error}");
    }
}

#[test]
fn an_answer_with_a_special_token_is_dropped() {
    let framer = common::gemma();
    let rows: Vec<Value> = ["yes", "<turn|>", " yes <bos>", "<eos>no", "< turn|>"]
        .iter()
        .enumerate()
        .map(|(at, answer)| json!({"id": format!("r{at}"), "context": "a b", "question": "q", "answer": answer}))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
    common::add(&mut writer, &framer, &common::records_source(), 0, &rows).unwrap();
    let manifest: Value = serde_json::from_str(&writer.finish(&framer).unwrap()).unwrap();
    assert_eq!(manifest["drops"], json!({"special_token_in_answer": 3}));
    let kept = decode(&folder.path().join("shard-00000.safetensors")).unwrap();
    assert_eq!(kept.iter().map(|datapoint| &*datapoint.id).collect::<Vec<_>>(), ["r0", "r4"]);
}

#[test]
fn meta_keeps_its_numbers_or_is_refused() {
    let framer = common::gemma();
    let meta = |text: &str| {
        let row = format!(
            r#"{{"id": "12\" 1234567890123456789012", "context": "a b", "question": "q", "answer": "a", "meta": {text}}}"#
        );
        let folder = tempfile::tempdir().unwrap();
        let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
        common::add(&mut writer, &framer, &common::records_source(), 0, &[row]).map_err(|error| error.to_string())?;
        writer.finish(&framer).map_err(|error| error.to_string())?;
        Ok(decode(&folder.path().join("shard-00000.safetensors")).unwrap()[0].meta.to_string())
    };
    for kept in [
        r#"{"x":18446744073709551615,"y":-9223372036854775808}"#,
        r#"{"x":[1e+30,-1.5e+300,0.1],"y":"123456789012345678901234567890"}"#,
        r#"{"x":"\\","y":1e+300}"#,
    ] {
        assert_eq!(meta(kept).unwrap(), kept);
    }
    for refused in [r#"{"x":123456789012345678901234567890}"#, r#"{"\"":1,"x":[{"y": -9223372036854775809 }]}"#] {
        let error: String = meta(refused).unwrap_err();
        assert!(error.contains("line 1") && error.contains("does not fit 64 bits; write it as text"), "{error}");
    }
}

fn json_with(value: &Value, field: &str, new: &Value) -> Value {
    let mut changed = value.clone();
    changed[field] = new.clone();
    changed
}

/// What adding one example that differs from a sound one by `changes` says.
fn refused(changes: &Value) -> (Error, BTreeMap<String, Vec<u8>>) {
    let framer = common::gemma();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let settings = json_with(&common::settings(), "examples_per_shard", &json!(1));
    let mut writer = common::writer(&framer, folder.path(), &settings).expect("the settings are sound");
    let sound = json!({"id": "sound", "context": "a b c", "question": "q", "answer": "a"});
    let mut broken = json_with(&sound, "id", &json!("broken"));
    for (field, value) in changes.as_object().expect("changes are an object") {
        if value.is_null() {
            broken.as_object_mut().expect("an object").remove(field);
        } else {
            broken[field] = value.clone();
        }
    }
    let error = common::add(&mut writer, &framer, &common::records_source(), 0, &[sound, broken])
        .expect_err("it must be refused");
    assert!(writer.finish(&framer).is_err(), "a failed writer writes no manifest");
    drop(writer);
    (error, common::files(folder.path()))
}

#[test]
fn a_bad_example_is_named_and_leaves_nothing_half_written() {
    let chat = json!([{"role": "user", "content": "hi"}]);
    let cases = [
        (json!({"id": null}), "records.jsonl: line 2: missing field `id`"),
        (json!({"quesiton": "q"}), "line 2: unknown field `quesiton`, expected one of `id`, `source`, `context`"),
        (json!({"id": 3}), "line 2: in \"id\": invalid type: integer `3`, expected a string"),
        (json!({"context": 3}), "expected a string or a list"),
        (json!({"context": [{"role": "user", "text": "x"}]}), "in \"context[0].text\": unknown field `text`"),
        (json!({"target": "basis"}), "unknown variant `basis`"),
        (json!({"positions": "some"}), "\"positions\" must be"),
        (json!({"positions": {"window": [3, 1]}}), "1 <= least <= greatest"),
        (json!({"read": []}), "\"read\" is an empty list"),
        (json!({"read": [{"strat": 1}]}), "unknown field `strat`"),
        (json!({"question": null}), "example \"broken\": the field \"question\" is missing"),
        (json!({"answer": null}), "example \"broken\": the field \"answer\" is missing"),
        (json!({"answer": ""}), "example \"broken\": the answer is empty: an example without a supervised token"),
        (json!({"context": ""}), "the context is an empty string"),
        (json!({"positions": []}), "\"positions\" is an empty list"),
        (json!({"positions": [99]}), "names index 99, but there are"),
        (json!({"positions": [-99]}), "names index -99, but there are"),
        (json!({"layers": []}), "\"layers\" is an empty list"),
        (json!({"layers": [12]}), "the model has layers 0 to 11"),
        (json!({"layers": [1.0]}), "the model has layers 0 to 11"),
        (json!({"layers": [6, 0.5]}), "\"layers\" names layer 6 twice"),
        (json!({"question": " \n"}), "example \"broken\": the question is empty"),
        (json!({"id": ""}), "records.jsonl: line 2: the id is empty"),
        (json!({"read": [{"start": 0, "end": 9}]}), "outside the context"),
        (json!({"context": chat, "read": [{"message": 4}]}), "names message 4"),
        (json!({"id": "sound"}), "ids must be unique"),
    ];
    for (changes, what) in cases {
        let (error, files) = refused(&changes);
        let text = error.to_string();
        assert!(text.contains("source \"records\", records.jsonl: line 2"), "{text} names no place");
        assert!(text.contains(what), "{text} does not contain {what}");
        let kept: Vec<&String> = files.keys().filter(|name| !name.starts_with(".lock")).collect();
        assert_eq!(kept, ["shard-00000.safetensors"], "what was finished before stays, and nothing else");
    }
}

#[test]
fn wrong_settings_are_refused() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    for (field, value, what) in [
        ("read_layers", json!([]), "is empty"),
        ("read_layers", json!([12]), "names layer 12"),
        ("read_layers", json!([3, 6, 3]), "names layer 3 twice"),
        ("layers_per_example", json!("some"), "unknown variant `some`"),
        ("examples_per_shard", json!(0), "at least 1"),
        ("num_layers", json!(100_000), "at most 32767"),
        ("seeds", json!(1), "unknown field `seeds`"),
    ] {
        let settings = json_with(&common::settings(), field, &value);
        let error = common::writer(&framer, folder.path(), &settings).err().unwrap().to_string();
        assert!(error.contains(what), "{error} does not contain {what}");
    }
}

#[test]
fn wrong_sources_are_refused() {
    let classification = |field: &str, value: Value| {
        let sound =
            json!({"name": "x", "kind": "classification", "questions": ["Is it {label}?"], "words": ["a", "b"]});
        json_with(&sound, field, &value)
    };
    let records = |field: &str, value: Value| json_with(&json!({"name": "x", "kind": "records"}), field, &value);
    let lens =
        |field: &str, value: Value| json_with(&json!({"name": "x", "kind": "context_prediction"}), field, &value);
    for (source, what) in [
        (json!({"name": "x", "kind": "texts"}), "unknown variant `texts`"),
        (json!({"name": "x", "kind": "latentqa"}), "missing field `questions`"),
        (records("window", json!([1, 2])), "unknown field `window`"),
        (records("reads", json!([{"share": 0.5, "all": true}])), "must add up to 1, got 0.5"),
        (records("reads", json!([{"share": 0.0, "all": true}])), "must be above 0"),
        (records("reads", json!([{"share": 1.0}])), "needs one of"),
        (records("reads", json!([{"share": 1, "wide": 1}])), "unknown field `wide`"),
        (records("count", json!(0)), "\"count\" must be at least 1"),
        (records("count", json!(3)), "must be surveyed"),
        (records("unanswerable", json!({"share": 2.0, "answer": "no"})), "between 0 and 1"),
        (records("unanswerable", json!({"share": 0.5, "answer": " "})), "is empty"),
        (lens("predict", json!([0, 1])), "\"predict\" must be"),
        (lens("direction", json!("up")), "unknown variant `up`"),
        (lens("single_share", json!(2)), "between 0 and 1"),
        (lens("draws_per_text", json!(0)), "at least 1"),
        (lens("within", json!("user")), "unknown variant `user`"),
        (lens("reads", json!([{"share": 1.0, "all": true}])), "is not for the kind"),
        (lens("unanswerable", json!({"share": 0.5, "answer": "no"})), "is not for the kind"),
        (classification("questions", json!([])), "\"questions\" is empty"),
        (classification("questions_per_text", json!(0)), "at least 1"),
        (classification("words", Value::Null), "must be surveyed"),
    ] {
        let error = Source::from_json(&source.to_string()).unwrap_err().to_string();
        assert!(error.contains(what), "{error} does not contain {what}");
    }
}

#[test]
fn a_finished_writer_refuses_more() {
    let framer = common::gemma();
    let folder = tempfile::tempdir().unwrap();
    let mut writer = common::writer(&framer, folder.path(), &common::settings()).unwrap();
    common::add(&mut writer, &framer, &common::records_source(), 0, &common::records()).unwrap();
    writer.finish(&framer).unwrap();
    assert!(writer.finish(&framer).unwrap_err().to_string().contains("has finished"));
}

#[test]
fn a_write_that_cannot_be_made_leaves_no_trace() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(write_atomic(&folder.path().join("no/such/file"), b"x"), Err(Error::Missing { .. })));
    let taken = folder.path().join("taken");
    std::fs::create_dir(&taken).unwrap();
    assert!(matches!(write_atomic(&taken, b"x"), Err(Error::Io { .. })));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    write_atomic(&folder.path().join("file"), b"one").unwrap();
    write_atomic(&folder.path().join("file"), b"two").unwrap();
    assert_eq!(std::fs::read(folder.path().join("file")).unwrap(), b"two");
    assert!(write_atomic(Path::new("/"), b"x").is_err());
}
