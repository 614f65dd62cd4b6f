//! The index of a unit: which rows it holds, under which keys, with which checksums.
//!
//! A safetensors file. For each layer L: `keys_hi.L` and `keys_lo.L` (U64, ascending together), `rows.L` (U32, the row of
//! each key), `norms.L` (F32, by row) and `blocks.L` (U64, the xxh3 of each block of rows). It is written last, so that
//! where it stands the unit is whole.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::{BLOCK_BYTES, HEADER_BYTES, INDEX_SUFFIX, RowType, SCHEMA, TENSOR, header};
use crate::error::{Error, Result};
use crate::layout::{ArrayLayout, arrays};
use crate::manifest::{canonical_json, write_atomic};
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
        format!("{}-{:05}-L{layer:03}.safetensors", self.run, self.number)
    }

    pub(crate) fn header(&self, layer: u16, rows: u64) -> Result<Vec<u8>> {
        header::encode(&header::about(&self.contract, &self.run, self.number, layer), self.row, rows)
    }
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

fn le_bytes<T: bytemuck::NoUninit>(values: &[T]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

/// Write the index of a unit into `folder`, and return its name.
pub(crate) fn write(folder: &Path, unit: &Unit, layers: &BTreeMap<u16, LayerRows>) -> Result<String> {
    let mut tensors: BTreeMap<String, (Dtype, usize, Vec<u8>)> = BTreeMap::new();
    for (layer, held) in layers {
        let mut order: Vec<u32> = (0..held.keys.len() as u32).collect();
        order.sort_unstable_by_key(|&row| held.keys[row as usize]);
        if let Some(twice) = order.windows(2).find(|pair| held.keys[pair[0] as usize] == held.keys[pair[1] as usize]) {
            return Err(Error::input(format!(
                "rows {} and {} of layer {layer} have the same key; a unit holds each row once",
                twice[0], twice[1]
            )));
        }
        let sorted = |half: fn(u128) -> u64| -> Vec<u64> { order.iter().map(|&row| half(held.keys[row as usize])).collect() };
        let columns = [
            ("keys_hi", Dtype::U64, order.len(), le_bytes(&sorted(|key| (key >> 64) as u64))),
            ("keys_lo", Dtype::U64, order.len(), le_bytes(&sorted(|key| key as u64))),
            ("rows", Dtype::U32, order.len(), le_bytes(&order)),
            ("norms", Dtype::F32, held.norms.len(), le_bytes(&held.norms)),
            ("blocks", Dtype::U64, held.blocks.len(), le_bytes(&held.blocks)),
        ];
        for (name, dtype, length, bytes) in columns {
            tensors.insert(format!("{name}.{layer}"), (dtype, length, bytes));
        }
    }
    let rows: serde_json::Map<String, Value> =
        layers.iter().map(|(layer, held)| (layer.to_string(), json!(held.keys.len()))).collect();
    let about = json!({
        "schema": SCHEMA, "contract": unit.contract, "run": unit.run, "unit": unit.number, "dtype": unit.row.name(),
        "width": unit.row.width, "rows": rows, "xxh3": digest(tensors.iter().map(|(name, tensor)| (name.as_str(), &*tensor.2))),
    });
    let failed = |error| Error::input(format!("an index cannot be written: {error}"));
    let views = tensors
        .iter()
        .map(|(name, (dtype, length, bytes))| Ok((name.clone(), TensorView::new(*dtype, vec![*length], bytes)?)))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(failed)?;
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), canonical_json(&about))]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    let name = unit.index_name();
    write_atomic(&folder.join(&name), &bytes)?;
    Ok(name)
}

/// The xxh3-128 over tensors in the order of their names.
fn digest<'a>(tensors: impl Iterator<Item = (&'a str, &'a [u8])>) -> String {
    let mut hasher = Xxh3::new();
    for (name, bytes) in tensors {
        hasher.update(name.as_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    }
    format!("{:032x}", hasher.digest128())
}

/// What an index says of its unit, as canonical JSON, and where each of its arrays lies. Only the header is read.
///
/// # Errors
/// If the file is missing, cut, or no index.
pub fn layout(path: &Path) -> Result<(String, Vec<ArrayLayout>)> {
    let mut file = File::open(path).map_err(|error| Error::io(path, "opening", error))?;
    let size = file.metadata().map_err(|error| Error::io(path, "reading", error))?.len();
    let mut bytes = vec![0; 8];
    let mut fill = |bytes: &mut [u8]| file.read_exact(bytes).map_err(|error| Error::io(path, "reading", error));
    if size >= 8 {
        fill(&mut bytes)?;
    }
    let length = u64::from_le_bytes(bytes[..].try_into().expect("there are eight"));
    if let Some(end) = length.checked_add(8).filter(|&end| end <= size) {
        bytes.resize(end as usize, 0);
        fill(&mut bytes[8..])?;
    }
    let (header, about, start) = header::decode(path, &bytes)?;
    let expected = (start + header.data_len()) as u64;
    if size != expected {
        return Err(Error::shard(path, format!("damaged: expected {expected} bytes, got {size}; collect the unit again")));
    }
    Ok((canonical_json(&about), arrays(&header, start as u64)))
}

/// An index, read and checked.
struct Whole {
    unit: Unit,
    layers: BTreeMap<u16, LayerRows>,
}

fn read(path: &Path) -> Result<Whole> {
    let wrong = |what: String| Error::shard(path, format!("not an index of activations: {what}; collect the unit again"));
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "reading", error))?;
    let (_, about, _) = header::decode(path, &bytes)?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| wrong(error.to_string()))?;
    let mut by_name: BTreeMap<String, (Dtype, &[u8])> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        by_name.insert(name.to_owned(), (view.dtype(), view.data()));
    }
    let found = digest(by_name.iter().map(|(name, (_, bytes))| (name.as_str(), *bytes)));
    if about["xxh3"].as_str() != Some(&found) {
        return Err(wrong(format!("its arrays have xxh3 {found}, written was {}", about["xxh3"])));
    }
    let text = |name: &str| about[name].as_str().map(str::to_owned).ok_or_else(|| wrong(format!("{name:?} is missing")));
    let number = |name: &str| about[name].as_u64().ok_or_else(|| wrong(format!("{name:?} is missing")));
    let unit = Unit {
        run: text("run")?,
        number: number("unit")? as u32,
        contract: about["contract"].clone(),
        row: RowType::new(&text("dtype")?, number("width")? as usize)?,
    };
    let rows = about["rows"].as_object().ok_or_else(|| wrong("\"rows\" is missing".to_owned()))?;
    if by_name.len() != 5 * rows.len() {
        return Err(wrong(format!("expected five arrays for each of {} layers, got {}", rows.len(), by_name.len())));
    }
    let mut layers = BTreeMap::new();
    for (layer, count) in rows {
        let bad = |what: &str| wrong(format!("layer {layer}: {what}"));
        let column = |name: &str, dtype: Dtype, length: Option<usize>| {
            let (found, bytes) = by_name.get(&format!("{name}.{layer}")).ok_or_else(|| bad(&format!("{name} is missing")))?;
            let each = if matches!(dtype, Dtype::U64) { 8 } else { 4 };
            if *found != dtype || length.is_some_and(|length| length * each != bytes.len()) {
                return Err(bad(&format!("{name} has {} bytes of {found:?}", bytes.len())));
            }
            Ok(*bytes)
        };
        let count = count.as_u64().ok_or_else(|| bad("its rows are not counted"))? as usize;
        let u64s = |bytes: &[u8]| -> Vec<u64> { bytes.as_chunks::<8>().0.iter().map(|x| u64::from_le_bytes(*x)).collect() };
        let (hi, lo) = (
            u64s(column("keys_hi", Dtype::U64, Some(count))?),
            u64s(column("keys_lo", Dtype::U64, Some(count))?),
        );
        let order = column("rows", Dtype::U32, Some(count))?.as_chunks::<4>().0.iter().map(|x| u32::from_le_bytes(*x));
        let mut keys: Vec<Option<u128>> = vec![None; count];
        let mut last = None;
        for (at, row) in order.enumerate() {
            let key = u128::from(hi[at]) << 64 | u128::from(lo[at]);
            let place = keys.get_mut(row as usize).filter(|place| place.is_none());
            if place.is_none() || last.is_some_and(|last| last >= key) {
                return Err(bad("its keys are out of order or point twice to a row"));
            }
            place.into_iter().for_each(|place| *place = Some(key));
            last = Some(key);
        }
        let norms = column("norms", Dtype::F32, Some(count))?.as_chunks::<4>().0.iter();
        let blocks = (count * unit.row.bytes()).div_ceil(BLOCK_BYTES);
        let held = LayerRows {
            keys: keys.into_iter().flatten().collect(),
            norms: norms.map(|x| f32::from_le_bytes(*x)).collect(),
            blocks: u64s(column("blocks", Dtype::U64, Some(blocks))?),
        };
        let layer = layer.parse().map_err(|_| bad("no number of a layer"))?;
        layers.insert(layer, held);
    }
    Ok(Whole { unit, layers })
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
        return Err(Error::shard(index, format!("it is the index of {expected}; give it its name back")));
    }
    for (&layer, held) in read.layers.iter().filter(|(_, held)| !held.keys.is_empty()) {
        verify_rows(&folder.join(read.unit.rows_name(layer)), &read.unit, layer, held)?;
    }
    Ok(())
}

fn verify_rows(path: &Path, unit: &Unit, layer: u16, held: &LayerRows) -> Result<()> {
    let wrong = |what: String| Error::shard(path, format!("damaged: {what}; remove its index and collect the unit again"));
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
