//! The index of a unit: which rows it holds, under which keys, with which checksums.
//!
//! A safetensors file. For each layer L: `keys_hi.L` and `keys_lo.L` (U64, ascending together), `rows.L` (U32, the row of
//! each key), `norms.L` (F32, by row) and `blocks.L` (U64, the xxh3 of each block of rows). It is written last, so that
//! where it stands the unit is whole.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorView};
use serde_json::{Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::units::{Summary, common};
use super::{BLOCK_BYTES, HEADER_BYTES, INDEX_SUFFIX, RowType, SCHEMA, TENSOR, header};
use crate::error::{Error, Result};
use crate::layout::{ArrayLayout, MAX_HEADER_BYTES, arrays};
use crate::manifest::canonical_json;
use crate::shard::METADATA_KEY;

/// One unit: by whom it was written, and of what.
#[derive(Debug, Clone)]
pub struct Unit {
    /// What the collecting process was to do, as a digest; units of one run belong together.
    pub run: String,
    /// Number of the unit in its run.
    pub number: u32,
    /// What the rows are: model, precision, what was read. A JSON object.
    pub contract: Value,
    /// What a row is made of.
    pub row: RowType,
}

impl Unit {
    /// Name of the index.
    #[must_use]
    pub fn index_name(&self) -> String {
        format!("{}-{:05}{INDEX_SUFFIX}", self.run, self.number)
    }

    /// Name of the file of a layer's rows.
    #[must_use]
    pub fn rows_name(&self, layer: u16) -> String {
        rows_name(&self.run, u64::from(self.number), u64::from(layer))
    }

    /// The name that a file of rows has by what its header says of it.
    pub(crate) fn rows_name_of(about: &Value) -> Option<String> {
        Some(rows_name(about["run"].as_str()?, about["unit"].as_u64()?, about["layer"].as_u64()?))
    }

    pub(crate) fn header(&self, layer: u16, rows: u64) -> Result<Vec<u8>> {
        header::encode(&header::about(&self.contract, &self.run, self.number, layer), self.row, rows)
    }
}

fn rows_name(run: &str, number: u64, layer: u64) -> String {
    format!("{run}-{number:05}-L{layer:03}.safetensors")
}

/// The rows of one layer of a unit.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct LayerRows {
    /// By row.
    pub(crate) keys: Vec<u128>,
    /// By row.
    pub(crate) norms: Vec<f32>,
    /// By block.
    pub(crate) blocks: Vec<u64>,
}

/// The arrays of a layer and their types.
const COLUMNS: [(&str, Dtype); 5] = [
    ("keys_hi", Dtype::U64),
    ("keys_lo", Dtype::U64),
    ("rows", Dtype::U32),
    ("norms", Dtype::F32),
    ("blocks", Dtype::U64),
];

fn item_bytes(dtype: Dtype) -> usize {
    if dtype == Dtype::U64 { 8 } else { 4 }
}

fn le_bytes<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// The bytes of the index of a unit.
///
/// # Errors
/// If a key is there twice in a layer.
pub(crate) fn encode(unit: &Unit, layers: &BTreeMap<u16, &LayerRows>) -> Result<Vec<u8>> {
    let mut tensors: BTreeMap<String, (Dtype, usize, Vec<u8>)> = BTreeMap::new();
    for (layer, held) in layers {
        let mut order: Vec<u32> = (0..held.keys.len() as u32).collect();
        order.sort_unstable_by_key(|&row| held.keys[row as usize]);
        if let Some(twice) = order.windows(2).find(|pair| held.keys[pair[0] as usize] == held.keys[pair[1] as usize]) {
            return Err(Error::input(format!(
                "rows {} and {} of layer {layer} have the same key; a unit holds each row once",
                twice[0].min(twice[1]),
                twice[0].max(twice[1])
            )));
        }
        let sorted =
            |half: fn(u128) -> u64| -> Vec<u64> { order.iter().map(|&row| half(held.keys[row as usize])).collect() };
        let columns = [
            le_bytes(&sorted(|key| (key >> 64) as u64)),
            le_bytes(&sorted(|key| key as u64)),
            le_bytes(&order),
            le_bytes(&held.norms),
            le_bytes(&held.blocks),
        ];
        for ((name, dtype), bytes) in COLUMNS.into_iter().zip(columns) {
            tensors.insert(format!("{name}.{layer}"), (dtype, bytes.len() / item_bytes(dtype), bytes));
        }
    }
    let rows: serde_json::Map<String, Value> =
        layers.iter().map(|(layer, held)| (layer.to_string(), json!(held.keys.len()))).collect();
    let mut about = json!({
        "schema": SCHEMA, "contract": unit.contract, "run": unit.run, "unit": unit.number, "dtype": unit.row.name(),
        "width": unit.row.width, "rows": rows,
    });
    let digest = digest(&about, tensors.iter().map(|(name, tensor)| (name.as_str(), &*tensor.2)));
    about["xxh3"] = digest.into();
    let failed = |error| Error::input(format!("an index cannot be written: {error}"));
    let views = tensors
        .iter()
        .map(|(name, (dtype, length, bytes))| Ok((name.clone(), TensorView::new(*dtype, vec![*length], bytes)?)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(failed)?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), canonical_json(&about))]);
    safetensors::serialize(views, Some(metadata)).map_err(failed)
}

/// The xxh3-128 over what an index says, without the digest itself, and its tensors in the order of their names.
fn digest<'a>(about: &Value, tensors: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut about = about.clone();
    about.as_object_mut().map(|about| about.remove("xxh3"));
    let mut hasher = Xxh3::new();
    hasher.update(canonical_json(&about).as_bytes());
    for (name, bytes) in tensors {
        hasher.update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    format!("{:032x}", hasher.digest128())
}

/// Of one unit what its header says; nothing else of the index is read.
///
/// # Errors
/// If the file is missing, cut, or no index.
pub(crate) fn summary(path: &Path) -> Result<Summary> {
    let Opened { about, unit, rows, .. } = Opened::new(path)?;
    let rows = rows.into_iter().filter(|(_, count)| *count > 0).collect();
    Ok(Summary { common: common(&about), run: unit.run, number: unit.number, rows })
}

/// Where each array of an index lies. Only the header is read.
///
/// # Errors
/// If the file is missing, cut, or no index.
pub fn layout(path: &Path) -> Result<Vec<ArrayLayout>> {
    let opened = Opened::new(path)?;
    Ok(arrays(&opened.header, opened.start))
}

/// An index whose header was read, says all that it must, and fits the file; what is behind it was not looked at.
struct Opened {
    file: File,
    header: Metadata,
    about: Value,
    /// Where the arrays begin, and how many bytes they have.
    start: u64,
    length: usize,
    unit: Unit,
    /// Rows of each layer.
    rows: BTreeMap<u16, usize>,
}

impl Opened {
    fn new(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(|error| Error::io(path, "opening", error))?;
        let size = file.metadata().map_err(|error| Error::io(path, "reading", error))?.len();
        let mut read = |bytes: &mut [u8]| file.read_exact(bytes).map_err(|error| Error::io(path, "reading", error));
        let mut bytes = vec![0; 8.min(size as usize)];
        read(&mut bytes)?;
        // No more is asked for than the file has, or than a header may have: its length may be anything.
        let end = bytes.first_chunk().map(|length| u64::from_le_bytes(*length).saturating_add(8));
        if let Some(end) = end.filter(|&end| end <= size.min(MAX_HEADER_BYTES)) {
            bytes.resize(end as usize, 0);
            read(&mut bytes[8..])?;
        }
        let (header, about, start) = header::decode(path, &bytes)?;
        let (start, length) = (start as u64, header.data_len());
        if size - start != length as u64 {
            let expected = start + length as u64;
            let what = format!("damaged: expected {expected} bytes, got {size}");
            return Err(Error::cached(path, what));
        }
        let (unit, rows) = described(&header, &about).map_err(|what| wrong(path, what))?;
        Ok(Self { file, header, about, start, length, unit, rows })
    }
}

fn wrong(path: &Path, what: impl Display) -> Error {
    Error::cached(path, format!("not an index of activations: {what}"))
}

/// Of which unit a header is the index, and the rows of each layer; its arrays are those of that many rows, no others.
fn described(header: &Metadata, about: &Value) -> std::result::Result<(Unit, BTreeMap<u16, usize>), String> {
    let missing = |name: &str| format!("{name:?} is missing, or nothing that it can be");
    let text = |name: &str| about[name].as_str().map(str::to_owned).ok_or_else(|| missing(name));
    let number = |name: &str| about[name].as_u64().ok_or_else(|| missing(name));
    let unit = Unit {
        run: text("run")?,
        number: u32::try_from(number("unit")?).map_err(|_| missing("unit"))?,
        contract: about["contract"].clone(),
        row: RowType::new(&text("dtype")?, number("width")? as usize).map_err(|error| error.to_string())?,
    };
    let mut rows = BTreeMap::new();
    for (layer, count) in about["rows"].as_object().ok_or_else(|| missing("rows"))? {
        let count = count.as_u64().filter(|&count| u32::try_from(count).is_ok()).ok_or_else(|| missing("rows"))?;
        let number = layer.parse().ok().filter(|number: &u16| number.to_string() == *layer);
        let layer = number.ok_or_else(|| format!("{layer:?} is no number of a layer"))?;
        let blocks = (count * unit.row.bytes() as u64).div_ceil(BLOCK_BYTES as u64);
        for (name, dtype) in COLUMNS {
            let length = if name == "blocks" { blocks } else { count } as usize;
            let info = header.info(&format!("{name}.{layer}"));
            if info.is_none_or(|info| info.dtype != dtype || info.shape != [length]) {
                return Err(format!("layer {layer}: {name:?} are not {length} values of {dtype:?}"));
            }
        }
        rows.insert(layer, count as usize);
    }
    if header.tensors().len() != COLUMNS.len() * rows.len() {
        return Err(format!("there are other arrays than those of its {} layers", rows.len()));
    }
    Ok((unit, rows))
}

/// An index, read and checked.
struct Whole {
    unit: Unit,
    layers: BTreeMap<u16, LayerRows>,
}

fn read(path: &Path) -> Result<Whole> {
    let mut opened = Opened::new(path)?;
    let mut bytes = vec![0; opened.length];
    opened.file.read_exact(&mut bytes).map_err(|error| Error::io(path, "reading", error))?;
    let by_name: BTreeMap<String, &[u8]> = opened
        .header
        .tensors()
        .into_iter()
        .map(|(name, info)| (name, &bytes[info.data_offsets.0..info.data_offsets.1]))
        .collect();
    let found = digest(&opened.about, by_name.iter().map(|(name, bytes)| (name.as_str(), *bytes)));
    if opened.about["xxh3"].as_str() != Some(&found) {
        return Err(wrong(path, format!("what it holds has xxh3 {found}, written was {}", opened.about["xxh3"])));
    }
    let mut layers = BTreeMap::new();
    for (layer, count) in opened.rows {
        let column = |name: &str| by_name[&format!("{name}.{layer}")];
        let u64s = |name: &str| column(name).as_chunks().0.iter().copied().map(u64::from_le_bytes);
        let u32s = |name: &str| column(name).as_chunks().0.iter().copied().map(u32::from_le_bytes);
        let mut keys: Vec<Option<u128>> = vec![None; count];
        let mut last = None;
        for ((hi, lo), row) in u64s("keys_hi").zip(u64s("keys_lo")).zip(u32s("rows")) {
            let key = u128::from(hi) << 64 | u128::from(lo);
            match keys.get_mut(row as usize) {
                Some(place) if place.is_none() && last.is_none_or(|last| last < key) => *place = Some(key),
                _ => return Err(wrong(path, format!("layer {layer}: keys out of order, or two of one row"))),
            }
            last = Some(key);
        }
        let held = LayerRows {
            keys: keys.into_iter().flatten().collect(),
            norms: u32s("norms").map(f32::from_bits).collect(),
            blocks: u64s("blocks").collect(),
        };
        layers.insert(layer, held);
    }
    Ok(Whole { unit: opened.unit, layers })
}

/// Check a unit whole: its index, and of each layer's file length, header and the checksum of every block.
///
/// # Errors
/// If the index is missing, damaged or foreign, or a file is missing, cut, has grown, or holds other rows than were
/// written; names the file and the rows.
pub fn verify(index: &Path) -> Result<()> {
    let read = read(index)?;
    let folder = index.parent().map_or_else(PathBuf::new, Path::to_path_buf);
    let expected = read.unit.index_name();
    if index.file_name().is_none_or(|name| name.to_string_lossy() != *expected) {
        return Err(Error::cached(index, format!("it is the index of {expected}; give it its name back")));
    }
    for (&layer, held) in read.layers.iter().filter(|(_, held)| !held.keys.is_empty()) {
        verify_rows(&folder.join(read.unit.rows_name(layer)), &read.unit, layer, held)?;
    }
    Ok(())
}

fn verify_rows(path: &Path, unit: &Unit, layer: u16, held: &LayerRows) -> Result<()> {
    let wrong = |what: String| Error::cached(path, format!("damaged: {what}"));
    let mut file = File::open(path).map_err(|error| Error::io(path, "opening", error))?;
    let size = file.metadata().map_err(|error| Error::io(path, "reading", error))?.len();
    let bytes = held.keys.len() * unit.row.bytes();
    if size != (HEADER_BYTES + bytes) as u64 {
        return Err(wrong(format!("expected {} bytes, got {size}", HEADER_BYTES + bytes)));
    }
    let mut read = |buffer: &mut [u8]| file.read_exact(buffer).map_err(|error| Error::io(path, "reading", error));
    let mut buffer = vec![0; HEADER_BYTES];
    read(&mut buffer)?;
    if buffer != unit.header(layer, held.keys.len() as u64)? {
        return Err(wrong(format!("its header is not the one of {TENSOR} of layer {layer} as its index says")));
    }
    buffer.resize(BLOCK_BYTES.min(bytes), 0);
    for (at, &sum) in held.blocks.iter().enumerate() {
        let here = &mut buffer[..BLOCK_BYTES.min(bytes - at * BLOCK_BYTES)];
        read(here)?;
        let found = xxh3_64(here);
        if found != sum {
            let first = at * BLOCK_BYTES / unit.row.bytes();
            let last = (at * BLOCK_BYTES + here.len() - 1) / unit.row.bytes();
            return Err(wrong(format!("rows {first} to {last} have xxh3 {found:016x}, written was {sum:016x}")));
        }
    }
    Ok(())
}
