//! Shards: what is written is read back, and every kind of damage is told.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cases;
mod common;

use std::path::Path;
use std::sync::Arc;

use ao_core::columns::Columns;
use ao_core::datapoint::{ContextIds, Datapoint};
use ao_core::layout::{decode, layout, metadata, verify};
use ao_core::manifest::{sha256_hex, write_atomic};
use ao_core::stats::Stats;
use ao_core::{Error, shard};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A datapoint with a context that is a piece of a small alphabet, so that contexts repeat and begin each other.
fn datapoint(number: usize, context: &[i32], prompt: usize, answer: usize, seed: usize) -> Datapoint {
    let num_positions = 1 + seed % prompt.min(3);
    let last = context.len() - 1;
    Datapoint {
        id: format!("d{number}@L{seed}"),
        source: Arc::from(["a", "b", "\u{e9}"][seed % 3]),
        input_ids: (0..(prompt + answer) as i32).map(|at| at * 31 % 97).collect(),
        answer_start: prompt as i32,
        placeholders: (0..num_positions as i32).collect(),
        layers: vec![(seed % 60) as i16; num_positions],
        read_positions: (0..num_positions).map(|at| last.saturating_sub(at) as i32).collect(),
        context_ids: ContextIds::from(context),
        kind: (seed % 3) as u8,
        question: Arc::from("q\u{1f600}".repeat(seed % 4)),
        answer: Arc::from("a"),
        meta: Arc::from("{}"),
    }
}

fn datapoints() -> impl Strategy<Value = Vec<Datapoint>> {
    let one = (prop::collection::vec(0i32..3, 1..7), 1usize..9, 1usize..4, 0usize..1000);
    prop::collection::vec(one, 1..40).prop_map(|rows| {
        rows.into_iter()
            .enumerate()
            .map(|(number, (context, prompt, answer, seed))| datapoint(number, &context, prompt, answer, seed))
            .collect()
    })
}

fn columns(datapoints: &[Datapoint]) -> Columns {
    datapoints.iter().map(Datapoint::row).collect()
}

fn in_folder(work: impl FnOnce(&Path)) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    work(folder.path());
}

proptest! {
    #![proptest_config(cases::cases(96))]

    #[test]
    fn what_is_written_is_read_back(datapoints in datapoints()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard-00000.safetensors");
        let bytes = shard::encode(&columns(&datapoints), &mut Stats::default(), |stats| json!({"stats": stats})).unwrap();
        write_atomic(&path, &bytes).unwrap();
        prop_assert_eq!(decode(&path).unwrap(), datapoints.clone());
        // Distinct contexts that begin no other, by comparing all pairs.
        let mut stored: Vec<&[i32]> = datapoints.iter().map(|datapoint| &*datapoint.context_ids).collect();
        stored.sort_unstable();
        stored.dedup();
        let held = stored.iter().filter(|one| !stored.iter().any(|other| other != *one && other.starts_with(one))).count();
        let described: Value = serde_json::from_str(&metadata(&path).unwrap()).unwrap();
        prop_assert_eq!(described["stats"]["contexts"].as_u64(), Some(held as u64));
        for array in layout(&path).unwrap() {
            prop_assert_eq!(array.offset % u64::from(array.dtype[1..].parse::<u32>().unwrap() / 8), 0);
        }
    }

    /// Whatever bytes change or go, reading never panics, and a shard that still reads has the same structure.
    #[test]
    fn damage_never_panics(datapoints in datapoints(), at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("shard-00000.safetensors");
        let mut bytes = shard::encode(&columns(&datapoints), &mut Stats::default(), |_| json!({})).unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] = to }
        std::fs::write(&path, &bytes).unwrap();
        let read = decode(&path);
        if cut { prop_assert!(read.is_err()) }
        if let Ok(read) = read { prop_assert_eq!(read.len(), datapoints.len()) }
    }
}

/// A small shard, and a way to break it: its header as JSON and its data.
struct Broken {
    header: Value,
    data: Vec<u8>,
}

impl Broken {
    fn new() -> Self {
        let datapoints: Vec<_> = (0..3).map(|at| datapoint(at, &[1, 2, at as i32], 5, 2, at)).collect();
        let bytes =
            shard::encode(&columns(&datapoints), &mut Stats::default(), |_| json!({})).expect("it can be written");
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header = serde_json::from_slice(&bytes[8..8 + length]).expect("a header is JSON");
        Self { header, data: bytes[8 + length..].to_vec() }
    }

    fn bytes(&self) -> Vec<u8> {
        let header = self.header.to_string();
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &self.data].concat()
    }

    /// Overwrite entry `at` of an array of `width` bytes.
    fn set(mut self, name: &str, at: usize, value: &[u8]) -> Self {
        let start = self.header[name]["data_offsets"][0].as_u64().expect("the array is there") as usize;
        self.data[start + at * value.len()..][..value.len()].copy_from_slice(value);
        self
    }

    fn with_header(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.header);
        self
    }
}

fn error_of(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("s.safetensors");
    std::fs::write(&path, bytes).expect("it can be written");
    layout(&path).expect_err("it must be refused").to_string()
}

#[test]
fn an_undamaged_rewrite_is_read() {
    in_folder(|folder| {
        let path = folder.join("s.safetensors");
        std::fs::write(&path, Broken::new().bytes()).unwrap();
        assert_eq!(decode(&path).unwrap().len(), 3);
    });
}

#[test]
fn each_kind_of_damage_has_its_message() {
    let sound = Broken::new().bytes();
    let retyped = |name: &'static str, dtype: &'static str, shape: Value| {
        Broken::new().with_header(|header| {
            header[name]["dtype"] = json!(dtype);
            header[name]["shape"] = shape;
        })
    };
    let four = |value: i32| value.to_le_bytes();
    let eight = |value: i64| value.to_le_bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![1, 2, 3], "3 bytes, fewer than a header"),
        (u64::MAX.to_le_bytes().to_vec(), "its header claims"),
        ([&200_000_000u64.to_le_bytes()[..], &[0; 100]].concat(), "its header claims 200000000"),
        ([&5u64.to_le_bytes()[..], b"hello"].concat(), "no shard header"),
        (sound[..sound.len() - 1].to_vec(), "is cut or has grown"),
        ([&sound[..], &[0]].concat(), "is cut or has grown"),
        (Broken::new().with_header(|header| header["__metadata__"] = json!({})).bytes(), "no metadata key"),
        (Broken::new().with_header(|header| header["__metadata__"]["ao"] = json!("{")).bytes(), "metadata is not JSON"),
        (
            Broken::new().with_header(|header| header["__metadata__"]["ao"] = json!("{\"schema\":2}")).bytes(),
            "expected schema 1, got 2",
        ),
        (retyped("kind", "I8", json!([3])).bytes(), "\"kind\" must be a list of U8, got I8"),
        (retyped("answer_start", "I32", json!([3, 1])).bytes(), "of shape [3, 1]"),
        (retyped("input_offsets", "I32", json!([8])).bytes(), "must be a list of I64, got I32"),
        (
            Broken::new()
                .with_header(|header| {
                    let moved = header.as_object_mut().and_then(|map| map.remove("context")).expect("it is there");
                    header["other"] = moved;
                })
                .bytes(),
            "\"context\" is missing",
        ),
        (Broken::new().set("input_offsets", 1, &eight(99)).bytes(), "\"input_offsets\" must rise"),
        (Broken::new().set("id_offsets", 0, &eight(1)).bytes(), "\"id_offsets\" must rise"),
        (Broken::new().set("context_offsets", 1, &eight(-1)).bytes(), "\"context_offsets\" must rise"),
        (Broken::new().set("answer_start", 0, &four(7)).bytes(), "its answer begins at 7 of 7 tokens"),
        (Broken::new().set("answer_start", 0, &four(0)).bytes(), "its answer begins at 0"),
        (Broken::new().set("placeholders", 0, &four(5)).bytes(), "datapoint 0: its placeholders"),
        (Broken::new().set("placeholders", 0, &four(-1)).bytes(), "datapoint 0: its placeholders"),
        (Broken::new().set("context", 2, &four(3)).bytes(), "datapoint 2: context 3"),
        (Broken::new().set("context", 2, &four(-1)).bytes(), "datapoint 2: context -1"),
        (Broken::new().set("context_length", 1, &four(4)).bytes(), "of length 4 is not stored"),
        (Broken::new().set("read_positions", 0, &four(3)).bytes(), "datapoint 0: it reads outside"),
        (Broken::new().set("layers", 0, &(-1i16).to_le_bytes()).bytes(), "negative layer"),
        (Broken::new().set("source", 0, &[3]).bytes(), "\"source\" names one beyond"),
        (Broken::new().set("kind", 0, &[3]).bytes(), "\"kind\" holds a number"),
    ];
    for (bytes, what) in cases {
        let error = error_of(&bytes);
        assert!(error.contains(what), "{error} does not contain {what}");
        assert!(error.contains("s.safetensors"), "{error}");
    }
}

#[test]
fn too_many_sources_are_refused() {
    let from = |number: usize| Datapoint { source: Arc::from(number.to_string()), ..datapoint(number, &[1], 2, 1, 0) };
    let encoded = |count: usize| {
        let datapoints: Vec<Datapoint> = (0..count).map(from).collect();
        shard::encode(&columns(&datapoints), &mut Stats::default(), |_| json!({}))
    };
    encoded(256).unwrap();
    let error = encoded(257).unwrap_err().to_string();
    assert!(error.contains("257 sources") && error.contains("fewer distinct \"source\" fields"), "{error}");
}

#[test]
fn a_missing_file_is_its_own_error() {
    let nowhere = Path::new("nowhere/shard-00000.safetensors");
    assert!(matches!(layout(nowhere), Err(Error::Missing { .. })));
    assert!(matches!(metadata(nowhere), Err(Error::Missing { .. })));
    assert!(matches!(verify(nowhere, ""), Err(Error::Missing { .. })));
}

#[test]
fn a_flipped_bit_is_found_by_its_hash() {
    in_folder(|folder| {
        let path = folder.join("s.safetensors");
        let mut bytes = Broken::new().bytes();
        let sha256 = sha256_hex(&bytes);
        std::fs::write(&path, &bytes).unwrap();
        verify(&path, &sha256.to_uppercase()).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert!(verify(&path, &sha256).unwrap_err().to_string().contains("damaged: sha256 expected"));
    });
}
