//! Reading shards: where each array lies in the file, after checking everything but the ids themselves.
//!
//! Readers map the file and view the arrays in place, so what is checked here is all that stands between a damaged file
//! and a wrong datapoint.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::Value;
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3;

use crate::datapoint::{ContextIds, Datapoint};
use crate::error::{Error, Result};
use crate::manifest::{each_block, hex};
use crate::shard::{DIGEST_KEY, METADATA_KEY, SCHEMA, digest_of};

/// The same limit as the safetensors format has.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The arrays of a shard and their types.
const ARRAYS: [(&str, Dtype); 21] = [
    ("input_ids", Dtype::I32),
    ("input_offsets", Dtype::I64),
    ("answer_start", Dtype::I32),
    ("placeholders", Dtype::I32),
    ("layers", Dtype::I16),
    ("read_positions", Dtype::I32),
    ("placeholder_offsets", Dtype::I64),
    ("context_ids", Dtype::I32),
    ("context_offsets", Dtype::I64),
    ("context", Dtype::I32),
    ("context_length", Dtype::I32),
    ("kind", Dtype::U8),
    ("source", Dtype::U8),
    ("id_bytes", Dtype::U8),
    ("id_offsets", Dtype::I64),
    ("question_bytes", Dtype::U8),
    ("question_offsets", Dtype::I64),
    ("answer_bytes", Dtype::U8),
    ("answer_offsets", Dtype::I64),
    ("meta_bytes", Dtype::U8),
    ("meta_offsets", Dtype::I64),
];

/// One array of a shard, for readers that map the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArrayLayout {
    /// Its name.
    pub name: String,
    /// Its type, as safetensors writes it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Where it begins, in bytes from the start of the file.
    pub offset: u64,
}

/// The arrays of a shard in the order in which they lie, after checking the whole structure: header, length, types,
/// offsets and every index.
///
/// # Errors
/// If the file is missing or not a shard of this version.
pub fn layout(path: &Path) -> Result<Vec<ArrayLayout>> {
    let mut shard = OpenShard::open(path)?;
    shard.check()?;
    Ok(arrays(&shard.header, shard.data_start))
}

/// The arrays of a safetensors file in the order in which they lie.
pub(crate) fn arrays(header: &Metadata, data_start: u64) -> Vec<ArrayLayout> {
    header
        .offset_keys()
        .into_iter()
        .map(|name| {
            let info = header.info(&name).expect("the key comes from this header");
            ArrayLayout {
                dtype: format!("{:?}", info.dtype),
                shape: info.shape.clone(),
                offset: data_start + info.data_offsets.0 as u64,
                name,
            }
        })
        .collect()
}

/// The canonical JSON under the metadata key.
///
/// # Errors
/// If the file is missing or not a shard of this version.
pub fn metadata(path: &Path) -> Result<String> {
    OpenShard::open(path)?.metadata()
}

/// Check the whole content of a shard against its sha256 in the manifest.
///
/// # Errors
/// If the file is missing or its content is not what was written.
pub fn verify(path: &Path, sha256: &str) -> Result<()> {
    let (found, _) = digest(path)?;
    if found == sha256.to_ascii_lowercase() {
        return Ok(());
    }
    Err(Error::shard(path, format!("damaged: sha256 expected {sha256}, got {found}")))
}

/// Check the content of a shard against the digest in its own header, which is all that an unfinished build has.
///
/// # Errors
/// If the file is missing or its content is not what was written.
pub fn check_digest(path: &Path) -> Result<()> {
    let mut shard = OpenShard::open(path)?;
    let mut metadata: Value = serde_json::from_str(&shard.metadata()?).expect("checked when it was read");
    let expected = metadata.as_object_mut().and_then(|fields| fields.remove(DIGEST_KEY)).unwrap_or_default();
    shard.file.seek(SeekFrom::Start(shard.data_start)).map_err(|error| Error::io(path, "reading", error))?;
    let mut data = Xxh3::new();
    each_block(&mut shard.file, path, |block| data.update(block))?;
    let found = digest_of(data, &metadata);
    if expected == *found {
        return Ok(());
    }
    Err(shard.wrong(format!("damaged: digest expected {expected}, got {found:?}")))
}

/// The sha256 of a file, in lower-case hexadecimal, and its length in bytes.
///
/// # Errors
/// If the file is missing or cannot be read.
pub fn digest(path: &Path) -> Result<(String, u64)> {
    let mut file = open(path)?;
    let mut hasher = Sha256::new();
    let mut length = 0;
    each_block(&mut file, path, |block| {
        hasher.update(block);
        length += block.len() as u64;
    })?;
    Ok((hex(&hasher.finalize()), length))
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::io(path, "opening", error))
}

/// A shard whose header has been read.
struct OpenShard<'a> {
    path: &'a Path,
    file: File,
    header: Metadata,
    data_start: u64,
}

impl<'a> OpenShard<'a> {
    fn open(path: &'a Path) -> Result<Self> {
        let mut file = open(path)?;
        let size = file.metadata().map_err(|error| Error::io(path, "reading", error))?.len();
        let wrong = |what: String| Error::shard(path, format!("not a shard: {what}"));
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|_| wrong(format!("it has {size} bytes, fewer than a header needs")))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES || length + 8 > size {
            return Err(wrong(format!("its header claims {length} bytes, the file has {size}")));
        }
        let mut text = vec![0; 8 + length as usize];
        text[..8].copy_from_slice(&length.to_le_bytes());
        file.read_exact(&mut text[8..]).map_err(|error| Error::io(path, "reading", error))?;
        let header: Metadata = serde_json::from_slice(&text[8..])
            .map_err(|error| wrong(format!("its header is no shard header: {error}")))?;
        let expected = 8 + length + header.data_len() as u64;
        if expected != size {
            return Err(wrong(format!("expected {expected} bytes, got {size}: the file is cut or has grown")));
        }
        Ok(Self { path, file, header, data_start: 8 + length })
    }

    fn wrong(&self, what: impl std::fmt::Display) -> Error {
        Error::shard(self.path, what)
    }

    fn metadata(&self) -> Result<String> {
        let text = self
            .header
            .metadata()
            .as_ref()
            .and_then(|metadata| metadata.get(METADATA_KEY))
            .ok_or_else(|| self.wrong(format!("not a shard: it has no metadata key {METADATA_KEY:?}")))?;
        let value: Value =
            serde_json::from_str(text).map_err(|error| self.wrong(format!("its metadata is not JSON: {error}")))?;
        if value["schema"].as_u64() != Some(SCHEMA) {
            return Err(self.wrong(format!("expected schema {SCHEMA}, got {}", value["schema"])));
        }
        Ok(text.clone())
    }

    fn info(&self, name: &str, dtype: Dtype) -> Result<&TensorInfo> {
        let info = self.header.info(name).ok_or_else(|| self.wrong(format!("the array {name:?} is missing")))?;
        if info.dtype != dtype || info.shape.len() != 1 {
            return Err(self.wrong(format!(
                "the array {name:?} must be a list of {dtype:?}, got {:?} of shape {:?}",
                info.dtype, info.shape
            )));
        }
        Ok(info)
    }

    fn length(&self, name: &str) -> Result<usize> {
        let dtype = ARRAYS
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, dtype)| *dtype)
            .expect("only known arrays are asked for");
        Ok(self.info(name, dtype)?.shape[0])
    }

    fn bytes(&mut self, name: &str, dtype: Dtype) -> Result<Vec<u8>> {
        let (start, end) = self.info(name, dtype)?.data_offsets;
        let mut bytes = vec![0; end - start];
        self.file
            .seek(SeekFrom::Start(self.data_start + start as u64))
            .and_then(|_| self.file.read_exact(&mut bytes))
            .map_err(|error| Error::io(self.path, "reading", error))?;
        Ok(bytes)
    }

    fn i32s(&mut self, name: &str) -> Result<Vec<i64>> {
        let bytes = self.bytes(name, Dtype::I32)?;
        let (chunks, _) = bytes.as_chunks::<4>();
        Ok(chunks.iter().map(|chunk| i64::from(i32::from_le_bytes(*chunk))).collect())
    }

    fn i64s(&mut self, name: &str) -> Result<Vec<i64>> {
        let bytes = self.bytes(name, Dtype::I64)?;
        let (chunks, _) = bytes.as_chunks::<8>();
        Ok(chunks.iter().map(|chunk| i64::from_le_bytes(*chunk)).collect())
    }

    /// Offsets that begin at 0, never fall and end at the number of `values`.
    fn offsets(&mut self, name: &str, values: &str, rows: Option<usize>) -> Result<Vec<i64>> {
        let offsets = self.i64s(name)?;
        let end = self.length(values)? as i64;
        let grows = offsets.first() == Some(&0) && offsets.last() == Some(&end) && offsets.is_sorted();
        if !grows || rows.is_some_and(|rows| offsets.len() != rows + 1) {
            return Err(self.wrong(format!(
                "{name:?} must rise from 0 to {end} in {} steps",
                rows.map_or_else(|| "any number of".to_owned(), |rows| rows.to_string())
            )));
        }
        Ok(offsets)
    }

    /// Everything that a reader relies on.
    fn check(&mut self) -> Result<()> {
        let metadata: Value = serde_json::from_str(&self.metadata()?).expect("checked when it was read");
        for (name, dtype) in ARRAYS {
            self.info(name, dtype)?;
        }
        let rows = self.length("answer_start")?;
        for name in ["context", "context_length", "kind", "source"] {
            if self.length(name)? != rows {
                return Err(self.wrong(format!("{name:?} must have one entry for each of {rows} datapoints")));
            }
        }
        for name in ["id", "question", "answer", "meta"] {
            self.offsets(&format!("{name}_offsets"), &format!("{name}_bytes"), Some(rows))?;
        }
        self.check_inputs(rows)?;
        self.check_contexts(rows)?;
        let sources = metadata["sources"].as_array().map_or(0, Vec::len);
        if self.bytes("source", Dtype::U8)?.iter().any(|&source| usize::from(source) >= sources) {
            return Err(self.wrong(format!("\"source\" names one beyond the {sources} listed")));
        }
        if self.bytes("kind", Dtype::U8)?.iter().any(|&kind| kind > 2) {
            return Err(self.wrong("\"kind\" holds a number other than 0, 1 and 2"));
        }
        Ok(())
    }

    /// Answers and placeholders lie inside their inputs, the placeholders before the answer.
    fn check_inputs(&mut self, rows: usize) -> Result<()> {
        let inputs = self.offsets("input_offsets", "input_ids", Some(rows))?;
        let answers = self.i32s("answer_start")?;
        let offsets = self.offsets("placeholder_offsets", "placeholders", Some(rows))?;
        let placeholders = self.i32s("placeholders")?;
        for row in 0..rows {
            let length = inputs[row + 1] - inputs[row];
            if !(1..length).contains(&answers[row]) {
                return Err(
                    self.wrong(format!("datapoint {row}: its answer begins at {} of {length} tokens", answers[row]))
                );
            }
            let own = &placeholders[offsets[row] as usize..offsets[row + 1] as usize];
            if own.is_empty() || own.iter().any(|at| !(0..answers[row]).contains(at)) || !own.is_sorted() {
                return Err(self.wrong(format!("datapoint {row}: its placeholders do not lie in its prompt, in order")));
            }
        }
        Ok(())
    }

    /// Contexts exist and are as long as they say, positions lie inside them, layers are not negative.
    fn check_contexts(&mut self, rows: usize) -> Result<()> {
        let stored = self.offsets("context_offsets", "context_ids", None)?;
        let contexts = self.i32s("context")?;
        let lengths = self.i32s("context_length")?;
        let offsets = self.i64s("placeholder_offsets")?;
        let positions = self.i32s("read_positions")?;
        let layers = self.layers()?;
        if positions.len() as i64 != offsets[rows] || layers.len() != positions.len() {
            return Err(self.wrong("\"layers\" and \"read_positions\" must have one entry for each placeholder"));
        }
        if layers.iter().any(|&layer| layer < 0) {
            return Err(self.wrong("\"layers\" holds a negative layer"));
        }
        for row in 0..rows {
            let held = usize::try_from(contexts[row])
                .ok()
                .filter(|&context| context + 1 < stored.len())
                .map(|context| stored[context + 1] - stored[context]);
            if held.is_none_or(|held| !(1..=held).contains(&lengths[row])) {
                return Err(self.wrong(format!(
                    "datapoint {row}: context {} of length {} is not stored",
                    contexts[row], lengths[row]
                )));
            }
            let own = &positions[offsets[row] as usize..offsets[row + 1] as usize];
            if own.iter().any(|at| !(0..lengths[row]).contains(at)) {
                return Err(self.wrong(format!("datapoint {row}: it reads outside its context")));
            }
        }
        Ok(())
    }
}

/// Read a whole shard back into datapoints. For tests and for tools that want all of it.
///
/// # Errors
/// If it is not a shard of this version.
pub fn decode(path: &Path) -> Result<Vec<Datapoint>> {
    let mut shard = OpenShard::open(path)?;
    shard.check()?;
    let metadata: Value = serde_json::from_str(&shard.metadata()?).expect("checked when it was read");
    let (inputs, answers) = (shard.rows("input_offsets", "input_ids")?, shard.i32s("answer_start")?);
    let placeholders = shard.rows("placeholder_offsets", "placeholders")?;
    let positions = shard.rows("placeholder_offsets", "read_positions")?;
    let layers = shard.layers()?;
    let layer_rows = shard.i64s("placeholder_offsets")?;
    let stored = shard.rows("context_offsets", "context_ids")?;
    let (contexts, lengths) = (shard.i32s("context")?, shard.i32s("context_length")?);
    let (kinds, sources) = (shard.bytes("kind", Dtype::U8)?, shard.bytes("source", Dtype::U8)?);
    let (ids, metas) = (shard.texts("id")?, shard.texts("meta")?);
    let (questions, asked) = (shard.texts("question")?, shard.texts("answer")?);
    (0..answers.len())
        .map(|row| {
            Ok(Datapoint {
                id: ids[row].clone(),
                source: Arc::from(metadata["sources"][usize::from(sources[row])].as_str().unwrap_or_default()),
                input_ids: inputs[row].clone(),
                answer_start: answers[row] as i32,
                placeholders: placeholders[row].clone(),
                layers: layers[layer_rows[row] as usize..layer_rows[row + 1] as usize].to_vec(),
                read_positions: positions[row].clone(),
                context_ids: ContextIds::from(&stored[contexts[row] as usize][..lengths[row] as usize]),
                kind: kinds[row],
                question: Arc::from(questions[row].as_str()),
                answer: Arc::from(asked[row].as_str()),
                meta: Arc::from(metas[row].as_str()),
            })
        })
        .collect()
}

impl OpenShard<'_> {
    /// The rows of a ragged int32 array.
    fn rows(&mut self, offsets: &str, values: &str) -> Result<Vec<Vec<i32>>> {
        let values = self.i32s(values)?;
        let ends = self.i64s(offsets)?;
        let row = |ends: &[i64]| values[ends[0] as usize..ends[1] as usize].iter().map(|&value| value as i32).collect();
        Ok(ends.windows(2).map(row).collect())
    }

    fn layers(&mut self) -> Result<Vec<i16>> {
        let bytes = self.bytes("layers", Dtype::I16)?;
        Ok(bytes.as_chunks::<2>().0.iter().map(|layer| i16::from_le_bytes(*layer)).collect())
    }

    /// The rows of a text array.
    fn texts(&mut self, name: &str) -> Result<Vec<String>> {
        let bytes = self.bytes(&format!("{name}_bytes"), Dtype::U8)?;
        self.i64s(&format!("{name}_offsets"))?
            .windows(2)
            .map(|ends| {
                String::from_utf8(bytes[ends[0] as usize..ends[1] as usize].to_vec())
                    .map_err(|error| self.wrong(format!("{name:?} is not UTF-8: {error}")))
            })
            .collect()
    }
}
