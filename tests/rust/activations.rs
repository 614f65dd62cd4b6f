//! The activation cache: bytes on disk, the reader against slices, and every kind of damage.

#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]

mod cases;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ao_core::activations::index::{self, Unit};
use ao_core::activations::keys::context_keys;
use ao_core::activations::reader::{Mode, Place, RowReader};
use ao_core::activations::units;
use ao_core::activations::writer::UnitWriter;
use ao_core::activations::{BLOCK_BYTES, HEADER_BYTES, RowType, TENSOR};
use ao_core::manifest::sha256_hex;
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

const MODES: [Mode; 4] = [Mode::Auto, Mode::Warm, Mode::Hinted, Mode::Direct];

fn unit(number: u32, dtype: &str, width: usize) -> Unit {
    let contract = json!({"model": "tiny", "reads": "behind the block", "layers": {"of": 4}});
    Unit { run: "0123abcd".to_owned(), number, contract, row: RowType::new(dtype, width).unwrap() }
}

/// Bytes without a pattern of any length that files are cut into.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    (0..length.div_ceil(8) as u64)
        .flat_map(|at| xxh3_64(&(seed << 32 | at).to_le_bytes()).to_le_bytes())
        .take(length)
        .collect()
}

fn keys(rows: usize, seed: u64) -> Vec<u128> {
    (0..rows as u64).map(|row| xxh3_128(&(seed << 32 | row).to_le_bytes())).collect()
}

fn norms(rows: usize) -> Vec<f32> {
    (0..rows).map(|row| row as f32 + 0.5).collect()
}

/// Write a unit of so many rows for each layer, in batches of `batch`; returns its index and the bytes of each layer.
fn write(folder: &Path, unit: &Unit, rows: &[(u16, usize)], batch: usize) -> (PathBuf, BTreeMap<u16, Vec<u8>>) {
    let layers: Vec<u16> = rows.iter().map(|(layer, _)| *layer).collect();
    let mut writer = UnitWriter::new(folder, unit.clone(), &layers).unwrap();
    let each = unit.row.bytes();
    let expected: BTreeMap<u16, Vec<u8>> =
        rows.iter().map(|&(layer, rows)| (layer, noise(rows * each, u64::from(layer)))).collect();
    // A batch of one layer, then of the next, as a model gives them.
    for batch_at in 0.. {
        let first = batch_at * batch;
        if rows.iter().all(|(_, rows)| *rows <= first) {
            break;
        }
        for &(layer, rows) in rows {
            let here = first.min(rows)..(first + batch).min(rows);
            let bytes = &expected[&layer][here.start * each..here.end * each];
            writer.append(layer, &keys(rows, layer.into())[here.clone()], &norms(rows)[here], bytes).unwrap();
        }
    }
    (folder.join(writer.finish().unwrap()), expected)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The error of something that must fail.
#[track_caller]
fn refused<T>(result: ao_core::Result<T>) -> String {
    result.err().expect("it is refused").to_string()
}

/// Everything that `index::verify` looks at, the obvious way: by the safetensors crate, whole files, one row at a time.
fn assert_sound(folder: &Path, unit: &Unit, expected: &BTreeMap<u16, Vec<u8>>) {
    let bytes = std::fs::read(folder.join(unit.index_name())).unwrap();
    let index = SafeTensors::deserialize(&bytes).unwrap();
    let words = |name: &str, layer: u16| -> Vec<u64> {
        let tensor = index.tensor(&format!("{name}.{layer}")).unwrap();
        let each = tensor.data().len() / tensor.shape()[0].max(1);
        let word = |chunk: &[u8]| chunk.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        tensor.data().chunks(each.max(1)).map(word).collect()
    };
    for (&layer, expected) in expected {
        let rows = expected.len() / unit.row.bytes();
        let (hi, lo, order) = (words("keys_hi", layer), words("keys_lo", layer), words("rows", layer));
        let found: Vec<u128> = hi.iter().zip(&lo).map(|(hi, lo)| u128::from(*hi) << 64 | u128::from(*lo)).collect();
        assert!(found.is_sorted());
        let wanted = keys(rows, layer.into());
        assert_eq!(found, order.iter().map(|&row| wanted[row as usize]).collect::<Vec<_>>());
        assert_eq!(words("norms", layer), norms(rows).iter().map(|norm| u64::from(norm.to_bits())).collect::<Vec<_>>());
        assert_eq!(words("blocks", layer), expected.chunks(BLOCK_BYTES).map(xxh3_64).collect::<Vec<_>>());
        let path = folder.join(unit.rows_name(layer));
        assert_eq!(path.exists(), rows > 0);
        if rows > 0 {
            let bytes = std::fs::read(path).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            assert_eq!(file.names(), [TENSOR]);
            let tensor = file.tensor(TENSOR).unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (unit.row.dtype, &[rows, unit.row.width][..]));
            assert!(tensor.data() == expected);
            assert!(bytes[HEADER_BYTES..] == *expected);
        }
    }
    index::verify(&folder.join(unit.index_name())).unwrap();
}

/// The formats as they are: whoever changes them sees it here, and raises `SCHEMA`.
#[test]
fn golden_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let unit = unit(7, "BF16", 3);
    write(folder.path(), &unit, &[(2, 2), (11, 0)], 1);
    assert_eq!(names(folder.path()), ["0123abcd-00007-L002.safetensors", "0123abcd-00007.index.safetensors"]);
    let rows = std::fs::read(folder.path().join(unit.rows_name(2))).unwrap();
    let text = concat!(
        r#"{"__metadata__":{"ao":"{\"contract\":{\"layers\":{\"of\":4},\"model\":\"tiny\",\"reads\":\"behind the block\"},"#,
        r#"\"layer\":2,\"run\":\"0123abcd\",\"schema\":1,\"unit\":7}"},"#,
        r#""activations":{"data_offsets":[0,12],"dtype":"BF16","shape":[2,3]}}"#
    );
    let header = [&4088u64.to_le_bytes(), text.as_bytes(), &[b' '; HEADER_BYTES][..4088 - text.len()]].concat();
    assert_eq!(rows, [header, noise(12, 2)].concat());
    let index = std::fs::read(folder.path().join(unit.index_name())).unwrap();
    assert_eq!(
        sha256_hex(&index),
        "8f379c26fbe35427f487be2eb25649b7282e3fb68fbc27443b1063f8a648dbea",
        "{}",
        index.escape_ascii()
    );
}

#[test]
fn keys_are_a_chain() {
    let ids = [5, -1, 0, i32::MAX, 5];
    let mut expected = Vec::new();
    let mut last = 0u128;
    for id in ids {
        last = xxh3_128(&[last.to_le_bytes().as_slice(), &i32::to_le_bytes(id)].concat());
        expected.push(last);
    }
    assert_eq!(context_keys(&ids), expected);
    assert_eq!(context_keys(&ids[..3]), expected[..3], "a context that begins another has its keys");
    assert_eq!(context_keys(&[]), []);
    assert_eq!(
        context_keys(&[1])[0],
        284_374_437_700_739_053_714_175_958_772_438_597_267,
        "written by an earlier version"
    );
}

fn layers() -> impl Strategy<Value = Vec<(u16, usize)>> {
    prop::collection::btree_map(0u16..1200, 0usize..40, 1..4).prop_map(|layers| layers.into_iter().collect())
}

fn dtype() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["BF16", "F16", "F32"])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..cases::cases(24) })]

    /// Widths around and across pages.
    #[test]
    fn any_unit_is_read_back(
        rows in layers(), batch in 1usize..50, dtype in dtype(), width in prop_oneof![1usize..10, 500usize..3000],
        number in 0u32..200_000, places in prop::collection::vec((any::<Index>(), any::<Index>()), 0..60), sort in any::<bool>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let unit = unit(number, dtype, width);
        let (_, expected) = write(folder.path(), &unit, &rows, batch);
        assert_sound(folder.path(), &unit, &expected);
        prop_assert!(names(folder.path()).iter().all(|name| !name.ends_with(".partial")));

        let held: Vec<u16> = rows.iter().filter(|(_, rows)| *rows > 0).map(|(layer, _)| *layer).collect();
        let paths: Vec<PathBuf> = held.iter().map(|&layer| folder.path().join(unit.rows_name(layer))).collect();
        let reader = RowReader::open(&paths, unit.row).unwrap();
        let each = unit.row.bytes();
        let mut places: Vec<Place> = places
            .iter()
            .filter(|_| !held.is_empty())
            .map(|(file, row)| {
                let file = file.index(held.len());
                (file as u32, row.index(expected[&held[file]].len() / each) as u32)
            })
            .collect();
        if sort {
            places.sort_unstable();
        }
        let slice = |&(file, row): &Place| &expected[&held[file as usize]][row as usize * each..][..each];
        let wanted: Vec<u8> = places.iter().flat_map(slice).copied().collect();
        for mode in MODES {
            let mut out = vec![0xa5; wanted.len()];
            reader.gather(&places, &mut out, mode).unwrap();
            prop_assert!(out == wanted, "{mode:?}");
        }
        reader.prefetch(&places).unwrap();
    }

    /// Any bit of any file.
    #[test]
    fn a_flipped_bit_is_found(layers in layers(), file in any::<Index>(), at in any::<Index>(), bit in 0u8..8, front in any::<bool>()) {
        let folder = tempfile::tempdir().unwrap();
        let (index, _) = write(folder.path(), &unit(0, "BF16", 5), &layers, 9);
        let names = names(folder.path());
        let path = folder.path().join(&names[file.index(names.len())]);
        let mut bytes = std::fs::read(&path).unwrap();
        // The headers hold most of what can be said wrong.
        let at = at.index(if front { bytes.len().min(600) } else { bytes.len() });
        bytes[at] ^= 1 << bit;
        std::fs::write(&path, bytes).unwrap();
        prop_assert!(index::verify(&index).is_err(), "{}: bit {bit} of byte {at}", path.display());
    }
}

/// Every bit of a small index, and of the words of a header.
#[test]
fn every_flipped_bit_of_an_index_is_found() {
    let folder = tempfile::tempdir().unwrap();
    for rows in [[(3, 2)], [(3, 0)]] {
        let (index, _) = write(folder.path(), &unit(0, "F16", 1), &rows, 9);
        let sound = std::fs::read(&index).unwrap();
        // In place, because file systems flush a file that is cut and written anew.
        let file = File::options().write(true).open(&index).unwrap();
        for bit in 0..8 * sound.len() {
            let put = |byte: u8| FileExt::write_all_at(&file, &[byte], bit as u64 / 8).unwrap();
            put(sound[bit / 8] ^ 1 << (bit % 8));
            assert!(index::verify(&index).is_err(), "bit {} of byte {} of {}", bit % 8, bit / 8, sound.escape_ascii());
            put(sound[bit / 8]);
        }
        index::verify(&index).unwrap();
    }
}

/// Buffers end within a block, blocks within a buffer, rows within both: 7 layers leave buffers of 5.3 MB for none, so
/// 4 MiB; 20 leave 2.2 MB; and a row of 4,999 x 4 bytes fits into neither a whole number of times.
#[test]
fn blocks_and_buffers_end_anywhere() {
    let row = RowType::new("F32", 4999).unwrap();
    let block = BLOCK_BYTES.div_ceil(row.bytes());
    for (others, rows, batch) in [(0, 2 * block + 3, 100), (19, 2 * block + 3, 1000), (0, 1, 1)] {
        let folder = tempfile::tempdir().unwrap();
        let unit = unit(1, "F32", 4999);
        let layers: Vec<(u16, usize)> =
            (0..=others).map(|layer| (layer, if layer == others { rows } else { 0 })).collect();
        let (_, expected) = write(folder.path(), &unit, &layers, batch);
        assert_sound(folder.path(), &unit, &expected);
        // Backwards, over many windows of the greatest length.
        let reader = RowReader::open(&[folder.path().join(unit.rows_name(others))], row).unwrap();
        let places: Vec<Place> = (0..rows as u32).rev().map(|row| (0, row)).collect();
        let wanted: Vec<u8> = expected[&others].rchunks(row.bytes()).flatten().copied().collect();
        for mode in MODES {
            let mut out = vec![0; wanted.len()];
            reader.gather(&places, &mut out, mode).unwrap();
            assert!(out == wanted, "{mode:?}");
        }
    }
    // Rows that end with a block, and one value more or less.
    for rows in [BLOCK_BYTES / 2 - 1, BLOCK_BYTES / 2, BLOCK_BYTES / 2 + 1] {
        let folder = tempfile::tempdir().unwrap();
        let unit = unit(1, "BF16", 1);
        let mut writer = UnitWriter::new(folder.path(), unit.clone(), &[0]).unwrap();
        let bytes = noise(2 * rows, 0);
        writer.append(0, &keys(rows, 0), &norms(rows), &bytes).unwrap();
        writer.finish().unwrap();
        assert_sound(folder.path(), &unit, &BTreeMap::from([(0, bytes)]));
    }
}

#[test]
fn each_kind_of_damage_is_named() {
    let folder = tempfile::tempdir().unwrap();
    // Two blocks and a bit.
    let rows = 2 * BLOCK_BYTES / 4000 + 10;
    let unit = unit(3, "F16", 2000);
    let (index, _) = write(folder.path(), &unit, &[(1, rows), (2, rows)], 900);
    let path = folder.path().join(unit.rows_name(1));
    let sound = std::fs::read(&path).unwrap();
    let verify_with = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = refused(index::verify(&index));
        assert!(error.contains("L001.safetensors"), "{error}");
        error
    };
    let flipped = |at: usize| {
        let mut bytes = sound.clone();
        bytes[at] ^= 16;
        bytes
    };
    let zeroed = |from: usize| [&sound[..from], &vec![0; sound.len() - from]].concat();

    assert!(verify_with(&sound[..sound.len() - 1]).contains("expected 8432096 bytes, got 8432095"));
    assert!(verify_with(&sound[..100]).contains("got 100"));
    assert!(verify_with(&[&sound[..], b"\0"].concat()).contains("got 8432097"));
    assert!(verify_with(&zeroed(sound.len() - 3000)).contains("rows 2097 to 2106 have xxh3"));
    assert!(verify_with(&zeroed(HEADER_BYTES)).contains("rows 0 to 1048 have xxh3"));
    assert!(verify_with(&flipped(HEADER_BYTES + BLOCK_BYTES)).contains("rows 1048 to 2097 have xxh3"));
    assert!(verify_with(&flipped(HEADER_BYTES - 1)).contains("its header is not the one"));
    let other = std::fs::read(folder.path().join(unit.rows_name(2))).unwrap();
    assert!(verify_with(&other).contains("its header is not the one of activations of layer 1"));
    // The header of the one, the rows of the other.
    assert!(verify_with(&[&sound[..HEADER_BYTES], &other[HEADER_BYTES..]].concat()).contains("have xxh3"));
    std::fs::remove_file(&path).unwrap();
    assert!(refused(index::verify(&index)).contains("no such file"));
    std::fs::write(&path, &sound).unwrap();
    index::verify(&index).unwrap();

    // Indexes under other names, and of other units.
    let moved = folder.path().join("0123abcd-00004.index.safetensors");
    std::fs::copy(&index, &moved).unwrap();
    assert!(refused(index::verify(&moved)).contains("it is the index of 0123abcd-00003.index.safetensors"));
    std::fs::copy(&path, &moved).unwrap();
    assert!(refused(index::verify(&moved)).contains("not an index of activations"));
    let sound = std::fs::read(&index).unwrap();
    for length in [0, 7, 8, 9, 200, sound.len() - 1] {
        std::fs::write(&index, &sound[..length]).unwrap();
        refused(index::verify(&index));
        refused(index::layout(&index));
        refused(units::summaries(folder.path(), &[unit.index_name()], false));
    }
    std::fs::write(&index, [&sound[..], b"\0"].concat()).unwrap();
    assert!(refused(index::layout(&index)).contains("damaged: expected"));
}

/// An index whose header has `change` made to what it says, with arrays of no bytes.
fn claiming(change: impl FnOnce(&mut Value, &mut Value)) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    for (name, dtype) in [("keys_hi", "U64"), ("keys_lo", "U64"), ("rows", "U32"), ("norms", "F32"), ("blocks", "U64")]
    {
        header.insert(format!("{name}.3"), json!({"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}));
    }
    let mut header = Value::Object(header);
    let mut about =
        json!({"schema": 1, "contract": {}, "run": "r", "unit": 0, "dtype": "F32", "width": 4, "rows": {"3": 0}});
    change(&mut header, &mut about);
    header["__metadata__"] = json!({"ao": about.to_string()});
    let text = header.to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// What an index says was believed before its arrays were looked at: products wrapped around, and memory was asked for.
#[test]
fn an_index_may_claim_anything() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r-00000.index.safetensors");
    let check = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        assert!(refused(index::verify(&path)).contains("collect"));
        index::layout(&path)
    };
    check(&claiming(|_, _| ())).unwrap();
    // 2^61 keys have 2^64 bytes, which are none.
    for count in [1, 1u64 << 61, 1 << 62, u64::MAX] {
        refused(check(&claiming(|_, about| about["rows"]["3"] = count.into())));
    }
    for width in [0, 1u64 << 62, u64::MAX] {
        refused(check(&claiming(|_, about| about["width"] = width.into())));
    }
    for (name, value) in [
        ("unit", json!(1u64 << 32)),
        ("unit", json!("0")),
        ("run", json!(null)),
        ("dtype", json!("I64")),
        ("rows", json!([0])),
        ("rows", json!({"3": -1})),
        ("rows", json!({"03": 0})),
        ("rows", json!({"3": 0, "4": 0})),
        ("rows", json!({})),
        ("rows", json!({"70000": 0})),
    ] {
        refused(check(&claiming(|_, about| about[name] = value)));
    }
    // Python takes types, and one length each, from what the layout says.
    for (name, value) in [("dtype", json!("I64")), ("shape", json!([])), ("shape", json!([0, 4]))] {
        refused(check(&claiming(|header, _| header["keys_hi.3"][name] = value)));
    }
    refused(check(&claiming(|header, _| header["more"] = header["keys_hi.3"].clone())));
    // A header as long as 2^64 bytes, and as the file.
    for length in [u64::MAX, u64::MAX - 7, 1 << 40, 92] {
        refused(check(&[&length.to_le_bytes()[..], &[b' '; 92]].concat()));
    }
    // A terabyte of nothing behind a header that claims it all.
    let file = File::create(&path).unwrap();
    file.set_len(1 << 40).unwrap();
    FileExt::write_all_at(&file, &((1u64 << 40) - 8).to_le_bytes(), 0).unwrap();
    refused(index::layout(&path));
    refused(index::verify(&path));
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let new = |unit: Unit| UnitWriter::new(folder.path(), unit, &[1, 2]);
    let mut writer = new(unit(0, "BF16", 2)).unwrap();
    assert!(refused(writer.append(1, &[1, 2], &[0.0; 2], &[0; 7])).contains("2 keys and 2 norms for 7 bytes of rows"));
    assert!(refused(writer.append(1, &[1, 2], &[0.0; 1], &[0; 8])).contains("2 keys and 1 norms"));
    assert!(refused(writer.append(3, &[1], &[0.0], &[0; 4])).contains("layer 3 is not among the unit's, [1, 2]"));
    assert_eq!(writer.rows(), BTreeMap::from([(1, 0), (2, 0)]), "nothing was taken");

    // The first rows have their file under its name by then.
    writer.append(1, &[5], &[0.0], &[0; 4]).unwrap();
    writer.append(2, &[5, 6, 5], &[0.0; 3], &[0; 12]).unwrap();
    assert!(refused(writer.finish()).contains("rows 0 and 2 of layer 2 have the same key"));
    assert_eq!(names(folder.path()), [""; 0]);

    assert!(refused(RowType::new("F64", 2)).contains("rows of \"F64\" cannot be kept"));
    for width in [0, usize::MAX] {
        assert!(refused(RowType::new("F32", width)).contains("values cannot be kept"));
    }
    for run in ["", "a/b", "..", "/"] {
        assert!(
            refused(new(Unit { run: run.to_owned(), ..unit(0, "F32", 1) }).map(drop)).contains("part of a file's name")
        );
    }
    let long = json!({"model": "x".repeat(5000)});
    assert!(refused(new(Unit { contract: long, ..unit(0, "F32", 1) }).map(drop)).contains("shorten the contract"));
    for contract in [
        json!([]),
        json!(null),
        serde_json::from_str(&format!("{{\"a\": {}0{}}}", "[".repeat(126), "]".repeat(126))).unwrap(),
    ] {
        assert!(
            refused(new(Unit { contract, ..unit(0, "F32", 1) }).map(drop)).contains("no JSON object that reads back")
        );
    }

    let (_, _) = write(folder.path(), &unit(0, "BF16", 2), &[(1, 3)], 3);
    let path = folder.path().join(unit(0, "BF16", 2).rows_name(1));
    let reader = RowReader::open(std::slice::from_ref(&path), unit(0, "BF16", 2).row).unwrap();
    for mode in MODES {
        assert!(refused(reader.gather(&[(0, 3)], &mut [0; 4], mode)).contains("row 3 of file 0"));
        assert!(refused(reader.gather(&[(1, 0)], &mut [0; 4], mode)).contains("file 1: there are 1 files"));
        assert!(refused(reader.gather(&[(0, 0)], &mut [0; 8], mode)).contains("need a buffer of 4, got 8"));
    }
    assert!(refused(reader.prefetch(&[(0, 3)])).contains("row 3 of file 0"));
    assert!(
        refused(RowReader::open(std::slice::from_ref(&path), RowType::new("F32", 2).unwrap()).map(drop))
            .contains("damaged or another's")
    );
    // Cut behind the reader's back: an error, no rows of zeros.
    File::options().write(true).open(&path).unwrap().set_len(HEADER_BYTES as u64 + 5).unwrap();
    for mode in MODES {
        assert!(refused(reader.gather(&[(0, 2)], &mut [0; 4], mode)).contains("it ends before byte"), "{mode:?}");
    }
}

/// Whoever checks a unit writes its headers again: a fraction that JSON reads back as its neighbour made a sound unit
/// look damaged.
#[test]
fn a_contract_reads_back_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut refused = 0;
    for at in 0..2000u64 {
        let fraction = (xxh3_64(&at.to_le_bytes()) >> 11) as f64 * 0.1f64.powi(20);
        let contract = json!({"scale": fraction});
        let back: Value = serde_json::from_str(&contract.to_string()).unwrap();
        let new = UnitWriter::new(folder.path(), Unit { contract: contract.clone(), ..unit(0, "F32", 1) }, &[0]);
        assert_eq!(new.is_ok(), back == contract, "{fraction}");
        refused += usize::from(new.is_err());
    }
    assert!(refused > 0, "serde_json reads every fraction as it writes it now; the writer need not look any more");
}

#[test]
fn a_dropped_writer_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let unit = unit(0, "F32", 1000);
    let mut writer = UnitWriter::new(folder.path(), unit, &[1, 2]).unwrap();
    // More than a buffer, so that some is under way.
    writer.append(1, &keys(3000, 1), &norms(3000), &noise(12_000_000, 1)).unwrap();
    assert_eq!(names(folder.path()).len(), 1);
    drop(writer);
    assert_eq!(names(folder.path()), [""; 0]);
}

/// What a kill leaves: torn files, and rows under their names without an index.
#[test]
fn a_killed_unit_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    let (own, other) = (unit(0, "F32", 10), unit(1, "F32", 10));
    let torn = |unit: &Unit, process: &str| format!(".{}.{process}.0.partial", unit.rows_name(1));
    // Numbers of processes come again, in a container at once.
    let mine = std::process::id().to_string();
    for name in [torn(&own, "1"), torn(&own, &mine), format!(".{}.1.7.partial", own.index_name()), torn(&other, "1")] {
        std::fs::write(folder.path().join(name), b"torn").unwrap();
    }
    std::fs::write(folder.path().join(own.rows_name(1)), b"rows without an index").unwrap();
    let living = File::create(folder.path().join(torn(&own, "2"))).unwrap();
    living.lock().unwrap();
    let (_, expected) = write(folder.path(), &own, &[(1, 30)], 7);
    assert_sound(folder.path(), &own, &expected);
    let partial: Vec<String> = names(folder.path()).into_iter().filter(|name| name.ends_with(".partial")).collect();
    assert_eq!(partial, [torn(&own, "2"), torn(&other, "1")], "what is another's is left alone");
}

/// A unit that is written once more is never there with an index that is not its own.
#[test]
fn a_unit_can_be_written_again() {
    let folder = tempfile::tempdir().unwrap();
    let unit = unit(0, "F32", 10);
    write(folder.path(), &unit, &[(1, 30)], 7);
    // The rows of layer 1 cannot take their name; those of layer 0 have theirs by then.
    let rows = folder.path().join(unit.rows_name(1));
    std::fs::remove_file(&rows).unwrap();
    std::fs::create_dir_all(rows.join("in the way")).unwrap();
    let mut writer = UnitWriter::new(folder.path(), unit.clone(), &[0, 1]).unwrap();
    for layer in [0, 1] {
        writer.append(layer, &keys(1, 1), &norms(1), &noise(40, 1)).unwrap();
    }
    assert!(refused(writer.finish()).contains("renaming into place"));
    assert_eq!(names(folder.path()), [unit.rows_name(1)], "neither index nor torn rows");
    std::fs::remove_dir_all(&rows).unwrap();
    let (_, expected) = write(folder.path(), &unit, &[(1, 20)], 7);
    assert_sound(folder.path(), &unit, &expected);
}

/// Where direct I/O was long refused: plain files instead.
#[test]
fn a_folder_in_memory() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    let unit = unit(0, "BF16", 777);
    let (_, expected) = write(folder.path(), &unit, &[(1, 50), (2, 3)], 7);
    assert_sound(folder.path(), &unit, &expected);
    let reader = RowReader::open(&[folder.path().join(unit.rows_name(1))], unit.row).unwrap();
    for mode in MODES {
        let mut out = vec![0; 2 * unit.row.bytes()];
        reader.gather(&[(0, 49), (0, 0)], &mut out, mode).unwrap();
        let each = unit.row.bytes();
        assert!(out == [&expected[&1][49 * each..], &expected[&1][..each]].concat());
    }
}

/// By several threads, in the order that was asked for.
#[test]
fn many_headers_are_summarized() {
    let folder = tempfile::tempdir().unwrap();
    let (units, names) = many(folder.path());
    let found = units::summaries(folder.path(), &names, false).unwrap();
    for ((summary, unit), name) in found.iter().zip(&units).zip(&names) {
        assert_eq!(&units::summaries(folder.path(), std::slice::from_ref(name), false).unwrap()[0], summary);
        assert_eq!((summary.run.as_str(), summary.number), ("0123abcd", unit.number));
        assert_eq!(summary.rows, BTreeMap::from([(1, 1 + unit.number as usize), (3, 2)]));
        let common: Value = serde_json::from_str(&summary.common).unwrap();
        assert_eq!(common, json!({"contract": unit.contract, "dtype": "F16", "width": unit.row.width}));
    }
    assert_eq!(found.len(), 70);
    assert!(units::summaries(folder.path(), &[], false).unwrap().is_empty());
    std::fs::write(folder.path().join(&names[66]), b"cut").unwrap();
    assert!(refused(units::summaries(folder.path(), &names, false)).contains("0123abcd-00066.index"));
}

/// Units 0 to 69 of one width, and the names of their indexes.
fn many(folder: &Path) -> (Vec<Unit>, Vec<String>) {
    let units: Vec<Unit> = (0..70).map(|number| unit(number, "F16", 2)).collect();
    for unit in &units {
        write(folder, unit, &[(1, 1 + unit.number as usize), (3, 2)], 9);
    }
    let names = units.iter().map(Unit::index_name).collect();
    (units, names)
}

/// The text of a manifest.
fn with_digest(about: &Value) -> String {
    let text = about.to_string();
    let said = &text[..text.len() - 1];
    format!("{said},\"sha256\":\"{}\"}}\n", sha256_hex(said.as_bytes()))
}

/// What the manifest lists is what the headers say, is not read, and is not believed of an index that has changed since.
#[test]
fn what_the_manifest_lists_is_taken_from_it() {
    let folder = tempfile::tempdir().unwrap();
    let (written, names) = many(folder.path());
    let headers = units::summaries(folder.path(), &names, false).unwrap();
    let path = |at: usize| folder.path().join(&names[at]);
    let manifest = |change: &dyn Fn(&mut Value)| {
        let listed = names.iter().zip(&headers).take(60).enumerate();
        let listed: Vec<Value> = listed
            .map(|(at, (name, unit))| {
                json!({"index": name, "bytes": path(at).metadata().unwrap().len(), "rows": unit.rows, "xxh3": "-"})
            })
            .collect();
        let mut about = json!({
            "schema": 1, "kind": "activations", "contract": written[0].contract, "dtype": "F16", "width": 2, "layers": {},
            "units": listed,
        });
        change(&mut about);
        std::fs::write(folder.path().join("manifest.json"), with_digest(&about)).unwrap();
        units::summaries(folder.path(), &names, false)
    };
    assert_eq!(manifest(&|_| ()).unwrap(), headers);
    let lie: &dyn Fn(&mut Value) = &|about| {
        about["units"][5]["rows"] = json!({"1": 77});
        about["units"][6]["rows"] = json!({"1": 77});
    };
    let found = manifest(lie).unwrap();
    assert_eq!((found[5].rows[&1], found[6].rows[&1]), (77, 77), "the manifest is not read");

    // Written again: the same bytes behind the manifest, or others of another length.
    let sound = std::fs::read(path(5)).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    std::fs::write(path(5), &sound).unwrap();
    let found = units::summaries(folder.path(), &names, false).unwrap();
    assert_eq!((found[5].rows[&1], found[6].rows[&1]), (6, 77));
    // Moved there with its time.
    manifest(lie).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let time = path(5).metadata().unwrap().modified().unwrap();
    std::fs::rename(path(5), folder.path().join("aside")).unwrap();
    std::fs::rename(folder.path().join("aside"), path(5)).unwrap();
    assert_eq!(path(5).metadata().unwrap().modified().unwrap(), time);
    let found = units::summaries(folder.path(), &names, false).unwrap();
    assert_eq!((found[5].rows[&1], found[6].rows[&1]), (6, 77));
    assert_eq!(units::summaries(folder.path(), &names, true).unwrap(), headers);
    std::fs::write(path(6), b"cut").unwrap();
    let touched = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    File::options().write(true).open(path(6)).unwrap().set_modified(touched).unwrap();
    assert!(refused(units::summaries(folder.path(), &names, false)).contains("0123abcd-00006.index"));

    // One that says something else, or not all, is not believed in anything.
    std::fs::write(path(6), std::fs::read(path(7)).unwrap()).unwrap();
    let changes: [&dyn Fn(&mut Value); 6] = [
        &|about| about["schema"] = json!(2),
        &|about| about["kind"] = json!("packed"),
        &|about| about["units"][5]["rows"] = json!({"1": -1}),
        &|about| about["units"][5]["rows"] = json!({"L1": 1}),
        &|about| about["units"][5] = json!({"index": names[5]}),
        &|about| *about = json!([about]),
    ];
    for change in changes {
        let found = manifest(&|about| {
            lie(about);
            change(about);
        });
        assert_eq!(found.unwrap()[7..], headers[7..]);
        assert_eq!(units::summaries(folder.path(), &names, false).unwrap()[5], headers[5]);
    }
    let text = std::fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    manifest(lie).unwrap();
    let lying = std::fs::read_to_string(folder.path().join("manifest.json")).unwrap();
    for text in ["", "{", "null", &text, &lying.replace("77", "78"), &lying[..lying.len() - 1]] {
        std::fs::write(folder.path().join("manifest.json"), text).unwrap();
        assert_eq!(units::summaries(folder.path(), &names, false).unwrap()[5], headers[5]);
    }
}
