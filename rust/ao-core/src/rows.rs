//! Rows of a source as JSON objects, whatever file they were read from.
//!
//! Readers hand over Arrow record batches. A batch of one column `json` holds the lines of a JSONL file as they are; every
//! other batch is a table, and each of its rows is turned into the object that the same line would hold. So there is one
//! parser behind all formats, and one set of errors.

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use serde::Deserialize;
use serde_arrow::Deserializer;
use serde_json::Value;

use crate::error::{Error, Result};

/// What a batch must be called that holds JSON already.
const JSON: &str = "json";

/// What one row of a file is called in messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowUnit {
    /// A line of text, counted from 1.
    Line,
    /// A row of a table, counted from 0.
    #[default]
    Row,
    /// An entry of a JSON list, counted from 0.
    Entry,
}

/// One file or split of a source: where its rows come from and how their examples are called.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// What every example id of this table begins with.
    pub prefix: String,
    /// The file's name, for messages.
    pub origin: String,
    /// What a row is called.
    #[serde(default)]
    pub unit: RowUnit,
    /// Which kind of stimulus a `LatentQA` file holds.
    #[serde(default)]
    pub r#type: Option<String>,
    /// The statement templates of a relation file; its rows are subjects and objects.
    #[serde(default)]
    pub templates: Option<Vec<String>>,
    /// Whether these rows could not be read: instead of each stands what is wrong with it.
    #[serde(default)]
    pub unreadable: bool,
}

impl Table {
    /// Read a table's description from JSON.
    ///
    /// # Errors
    /// If a field is unknown or missing.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|error| Error::settings(format!("a table: {error}")))
    }

    /// Where row `row` stands, for people.
    #[must_use]
    pub fn place(&self, row: usize) -> String {
        match self.unit {
            RowUnit::Line => format!("{}: line {}", self.origin, row + 1),
            RowUnit::Row => format!("{}: row {row}", self.origin),
            RowUnit::Entry => format!("{}: entry {row}", self.origin),
        }
    }
}

/// The rows of `batch` as JSON objects; `scratch` holds them where they have to be made.
///
/// # Errors
/// If a column has a type that JSON has no words for, or a `json` column holds no text.
pub fn json_rows<'a>(batch: &'a RecordBatch, scratch: &'a mut Vec<u8>) -> Result<Vec<&'a [u8]>> {
    let schema = batch.schema_ref();
    if schema.fields().len() == 1 && schema.field(0).name() == JSON {
        return lines_of(batch.column(0).as_ref());
    }
    let failed = |error: &dyn std::fmt::Display| {
        Error::input(format!(
            "a table cannot be written as JSON rows: {error}; expected text, numbers, lists or structs"
        ))
    };
    scratch.clear();
    let mut ends = Vec::with_capacity(batch.num_rows());
    let rows = Deserializer::from_record_batch(batch).map_err(|error| failed(&error))?;
    for row in &rows {
        let mut row = Value::deserialize(row).map_err(|error| failed(&error))?;
        drop_nulls(&mut row);
        serde_json::to_writer(&mut *scratch, &row).map_err(|error| failed(&error))?;
        ends.push(scratch.len());
    }
    let mut start = 0;
    Ok(ends.into_iter().map(|end| &scratch[std::mem::replace(&mut start, end)..end]).collect())
}

/// A table has every field in every row: a null stands for a field that the object lacks.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn lines_of(column: &dyn Array) -> Result<Vec<&[u8]>> {
    fn collect<'a>(values: impl Iterator<Item = Option<&'a [u8]>>) -> Vec<&'a [u8]> {
        values.map(Option::unwrap_or_default).collect()
    }
    Ok(match column.data_type() {
        DataType::Binary => collect(column.as_binary::<i32>().iter()),
        DataType::LargeBinary => collect(column.as_binary::<i64>().iter()),
        DataType::BinaryView => collect(column.as_binary_view().iter()),
        DataType::Utf8 => collect(column.as_string::<i32>().iter().map(|text| text.map(str::as_bytes))),
        DataType::LargeUtf8 => collect(column.as_string::<i64>().iter().map(|text| text.map(str::as_bytes))),
        DataType::Utf8View => collect(column.as_string_view().iter().map(|text| text.map(str::as_bytes))),
        other => {
            return Err(Error::input(format!("the column {JSON:?} must hold text or bytes, got {other}")));
        }
    })
}
