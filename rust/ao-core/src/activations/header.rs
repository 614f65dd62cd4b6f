//! The header of a file of rows: one safetensors header, padded to a fixed size so that the row count can be put in last.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::Metadata;
use serde_json::{Value, json};

use super::{HEADER_BYTES, RowType, SCHEMA, TENSOR};
use crate::error::{Error, Result};
use crate::manifest::canonical_json;
use crate::shard::METADATA_KEY;

/// What the header of the rows of one layer says of them.
pub(crate) fn about(contract: &Value, run: &str, unit: u32, layer: u16) -> Value {
    json!({"schema": SCHEMA, "contract": contract, "run": run, "unit": unit, "layer": layer})
}

/// The first [`HEADER_BYTES`] of a file of `rows` rows.
///
/// # Errors
/// If what it says does not fit.
pub(crate) fn encode(about: &Value, row: RowType, rows: u64) -> Result<Vec<u8>> {
    let header = json!({
        "__metadata__": {METADATA_KEY: canonical_json(about)},
        TENSOR: {"dtype": row.name(), "shape": [rows, row.width], "data_offsets": [0, rows * row.bytes() as u64]},
    });
    let mut bytes = (HEADER_BYTES as u64 - 8).to_le_bytes().to_vec();
    bytes.extend(canonical_json(&header).into_bytes());
    if bytes.len() > HEADER_BYTES {
        return Err(Error::input(format!(
            "the header of a file of activations would have {} bytes, and {HEADER_BYTES} are kept for it; shorten the \
             contract",
            bytes.len()
        )));
    }
    bytes.resize(HEADER_BYTES, b' ');
    Ok(bytes)
}

/// The safetensors header at the beginning of `bytes`, its metadata under our key, and where its tensors begin. `bytes` need
/// not hold the tensors.
pub(crate) fn decode(path: &Path, bytes: &[u8]) -> Result<(Metadata, Value, usize)> {
    let wrong = |what: String| Error::cached(path, format!("not a file of activations: {what}"));
    let length = bytes.get(..8).map_or(u64::MAX, |length| u64::from_le_bytes(length.try_into().expect("eight bytes")));
    let end = usize::try_from(length).ok().and_then(|length| length.checked_add(8));
    let text = end.and_then(|end| bytes.get(8..end)).ok_or_else(|| wrong("its header is cut".to_owned()))?;
    let header: Metadata =
        serde_json::from_slice(text).map_err(|error| wrong(format!("its header is damaged ({error})")))?;
    let own = header.metadata().as_ref().and_then(|texts: &HashMap<String, String>| texts.get(METADATA_KEY));
    let own = own.ok_or_else(|| wrong(format!("it has no metadata key {METADATA_KEY:?}")))?;
    let own: Value = serde_json::from_str(own).map_err(|error| wrong(format!("its metadata is not JSON: {error}")))?;
    if own["schema"].as_u64() != Some(SCHEMA) {
        return Err(wrong(format!("expected schema {SCHEMA}, got {}", own["schema"])));
    }
    Ok((header, own, 8 + text.len()))
}
