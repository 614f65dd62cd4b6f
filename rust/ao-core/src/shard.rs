//! Shards: safetensors files of ragged arrays, written from datapoints, read back by their layout.
//!
//! A shard stands alone. Contexts are stored once, and one that is the beginning of another is not stored at all: it
//! refers to the longer one and has its own length. Readers map the file; this module tells them where what lies, after
//! checking everything but the ids themselves.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::{Metadata, TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::datapoint::Datapoint;
use crate::error::{Error, Result};
use crate::manifest::{canonical_json, hex};

/// The version of the layout; others are refused.
pub const SCHEMA: u64 = 1;

/// The one metadata key. Several would come in random order, and equal shards would differ.
pub const METADATA_KEY: &str = "ao";

/// The same limit as the safetensors format has.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The arrays of a shard and their types.
const ARRAYS: [(&str, Dtype); 20] = [
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
];

const META_OFFSETS: (&str, Dtype) = ("meta_offsets", Dtype::I64);

/// Values and the offsets that cut them into rows.
struct Ragged<T> {
    values: Vec<T>,
    offsets: Vec<i64>,
}

impl<T: Copy> Ragged<T> {
    fn new() -> Self {
        Self { values: Vec::new(), offsets: vec![0] }
    }

    fn push(&mut self, row: &[T]) {
        self.values.extend_from_slice(row);
        self.offsets.push(self.values.len() as i64);
    }
}

/// Little-endian bytes, whatever the machine.
trait Bytes: Copy {
    const DTYPE: Dtype;
    fn write(values: &[Self]) -> Vec<u8>;
}

macro_rules! little_endian {
    ($($type:ty => $dtype:ident),*) => {$(
        impl Bytes for $type {
            const DTYPE: Dtype = Dtype::$dtype;
            fn write(values: &[Self]) -> Vec<u8> {
                values.iter().flat_map(|value| value.to_le_bytes()).collect()
            }
        }
    )*};
}
little_endian!(i64 => I64, i32 => I32, i16 => I16, u8 => U8);

/// The bytes of a shard that holds `datapoints`, in order.
///
/// # Errors
/// If there are more than 256 sources.
pub fn encode(datapoints: &[Datapoint], fingerprints: &Value) -> Result<Vec<u8>> {
    let contexts = SharedContexts::new(datapoints);
    let mut sources: Vec<&str> = datapoints.iter().map(|datapoint| &*datapoint.source).collect();
    sources.sort_unstable();
    sources.dedup();
    if sources.len() > 256 {
        return Err(Error::input(format!("a shard has {} sources, at most 256 fit", sources.len())));
    }
    let mut arrays = Arrays::default();
    let ragged = |rows: &dyn Fn(&Datapoint) -> Vec<u8>| {
        let mut out = Ragged::new();
        for datapoint in datapoints {
            out.push(&rows(datapoint));
        }
        out
    };
    arrays.ragged("id_bytes", "id_offsets", ragged(&|d| d.id.as_bytes().to_vec()));
    arrays.ragged("question_bytes", "question_offsets", ragged(&|d| d.question.as_bytes().to_vec()));
    arrays.ragged("answer_bytes", "answer_offsets", ragged(&|d| d.answer.as_bytes().to_vec()));
    arrays.ragged(
        "meta_bytes",
        META_OFFSETS.0,
        ragged(&|d| canonical_json(&Value::Object((*d.meta).clone())).into_bytes()),
    );
    let mut inputs = Ragged::new();
    let mut placeholders = Ragged::new();
    for datapoint in datapoints {
        inputs.push(&datapoint.input_ids);
        placeholders.push(&datapoint.placeholders);
    }
    arrays.ragged("input_ids", "input_offsets", inputs);
    arrays.ragged("placeholders", "placeholder_offsets", placeholders);
    let each = |field: fn(&Datapoint) -> i32| datapoints.iter().map(field).collect::<Vec<_>>();
    arrays.flat("answer_start", &each(|d| d.answer_start));
    arrays.flat("context_length", &each(|d| d.context_ids.len() as i32));
    arrays
        .flat("read_positions", &datapoints.iter().flat_map(|d| d.read_positions.iter().copied()).collect::<Vec<_>>());
    arrays.flat("layers", &datapoints.iter().flat_map(|d| d.layers.iter().copied()).collect::<Vec<_>>());
    arrays.flat("kind", &datapoints.iter().map(|d| d.kind).collect::<Vec<_>>());
    let place = |d: &Datapoint| sources.binary_search(&&*d.source).expect("every source was listed") as u8;
    arrays.flat("source", &datapoints.iter().map(place).collect::<Vec<_>>());
    let counts = json!({
        "datapoints": datapoints.len(),
        "contexts": contexts.stored.offsets.len() - 1,
        "input_tokens": datapoints.iter().map(|d| d.input_ids.len()).sum::<usize>(),
        "context_tokens": contexts.stored.values.len(),
        "placeholders": datapoints.iter().map(|d| d.placeholders.len()).sum::<usize>(),
    });
    arrays.ragged("context_ids", "context_offsets", contexts.stored);
    arrays.flat("context", &contexts.rows);
    let metadata = json!({
        "schema": SCHEMA,
        "sources": sources,
        "counts": counts,
        "fingerprints": fingerprints,
    });
    arrays.serialize(&metadata)
}

/// Arrays by name, as bytes.
#[derive(Default)]
struct Arrays(Vec<(&'static str, Dtype, usize, Vec<u8>)>);

impl Arrays {
    fn flat<T: Bytes>(&mut self, name: &'static str, values: &[T]) {
        self.0.push((name, T::DTYPE, values.len(), T::write(values)));
    }

    fn ragged<T: Bytes>(&mut self, values: &'static str, offsets: &'static str, rows: Ragged<T>) {
        self.flat(values, &rows.values);
        self.flat(offsets, &rows.offsets);
    }

    fn serialize(&self, metadata: &Value) -> Result<Vec<u8>> {
        let views = self
            .0
            .iter()
            .map(|(name, dtype, length, bytes)| {
                TensorView::new(*dtype, vec![*length], bytes)
                    .map(|view| (*name, view))
                    .map_err(|error| Error::input(format!("array {name}: {error}")))
            })
            .collect::<Result<Vec<_>>>()?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), canonical_json(metadata))]);
        safetensors::serialize(views, Some(metadata)).map_err(|error| Error::input(format!("shard: {error}")))
    }
}

/// The distinct contexts of a shard, none the beginning of another, in the order of their first use.
struct SharedContexts {
    stored: Ragged<i32>,
    rows: Vec<i32>,
}

impl SharedContexts {
    fn new(datapoints: &[Datapoint]) -> Self {
        let mut order: Vec<usize> = (0..datapoints.len()).collect();
        order.sort_by(|&a, &b| datapoints[a].context_ids.cmp(&datapoints[b].context_ids).then(a.cmp(&b)));
        // Whatever begins with a context stands right behind it, so the neighbour decides, from the longest back.
        let mut holder = vec![0; datapoints.len()];
        let mut later: Option<usize> = None;
        for &at in order.iter().rev() {
            let own = &datapoints[at].context_ids;
            holder[at] = match later {
                Some(next) if datapoints[next].context_ids.starts_with(own) => holder[next],
                _ => at,
            };
            later = Some(at);
        }
        let mut shared = Self { stored: Ragged::new(), rows: Vec::with_capacity(datapoints.len()) };
        let mut row_of: HashMap<usize, i32> = HashMap::new();
        for &at in &holder {
            let next = row_of.len() as i32;
            let row = *row_of.entry(at).or_insert_with(|| {
                shared.stored.push(&datapoints[at].context_ids);
                next
            });
            shared.rows.push(row);
        }
        shared
    }
}

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
    Ok(shard
        .header
        .offset_keys()
        .into_iter()
        .map(|name| {
            let info = shard.header.info(&name).expect("the key comes from this header");
            ArrayLayout {
                dtype: format!("{:?}", info.dtype),
                shape: info.shape.clone(),
                offset: shard.data_start + info.data_offsets.0 as u64,
                name,
            }
        })
        .collect())
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
    let mut file = open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer).map_err(|error| Error::io(path, "reading", error))?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    let found = hex(&hasher.finalize());
    if found == sha256.to_ascii_lowercase() {
        return Ok(());
    }
    Err(Error::shard(path, format!("damaged: sha256 expected {sha256}, got {found}; build the packed data set again")))
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
        let wrong = |what: String| Error::shard(path, format!("not a shard: {what}; build the packed data set again"));
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
        Error::shard(self.path, format!("{what}; build the packed data set again"))
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
            .chain([&META_OFFSETS])
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
        for (name, dtype) in ARRAYS.into_iter().chain([META_OFFSETS]) {
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
        let layers = self.bytes("layers", Dtype::I16)?;
        if positions.len() as i64 != offsets[rows] || layers.len() != 2 * positions.len() {
            return Err(self.wrong("\"layers\" and \"read_positions\" must have one entry for each placeholder"));
        }
        if layers.as_chunks::<2>().0.iter().any(|layer| i16::from_le_bytes(*layer) < 0) {
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
    layout(path)?;
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "reading", error))?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| Error::shard(path, error))?;
    let metadata: Value = serde_json::from_str(&metadata(path)?).map_err(|error| Error::shard(path, error))?;
    let raw =
        |name: &str| tensors.tensor(name).map(|view| view.data().to_vec()).map_err(|error| Error::shard(path, error));
    let i32s = |name: &str| {
        raw(name).map(|bytes| bytes.as_chunks::<4>().0.iter().map(|c| i32::from_le_bytes(*c)).collect::<Vec<_>>())
    };
    let i64s = |name: &str| {
        raw(name)
            .map(|bytes| bytes.as_chunks::<8>().0.iter().map(|c| i64::from_le_bytes(*c) as usize).collect::<Vec<_>>())
    };
    let texts = |name: &str| -> Result<Vec<String>> {
        let bytes = raw(&format!("{name}_bytes"))?;
        i64s(&format!("{name}_offsets"))?
            .windows(2)
            .map(|ends| String::from_utf8(bytes[ends[0]..ends[1]].to_vec()).map_err(|error| Error::shard(path, error)))
            .collect()
    };
    let (ids, questions, answers, metas) = (texts("id")?, texts("question")?, texts("answer")?, texts("meta")?);
    let (inputs, input_offsets) = (i32s("input_ids")?, i64s("input_offsets")?);
    let (placeholders, placeholder_offsets) = (i32s("placeholders")?, i64s("placeholder_offsets")?);
    let (positions, layers) = (i32s("read_positions")?, raw("layers")?);
    let layers: Vec<i16> = layers.as_chunks::<2>().0.iter().map(|c| i16::from_le_bytes(*c)).collect();
    let (stored, stored_offsets) = (i32s("context_ids")?, i64s("context_offsets")?);
    let (contexts, lengths) = (i32s("context")?, i32s("context_length")?);
    let (starts, kinds, sources) = (i32s("answer_start")?, raw("kind")?, raw("source")?);
    (0..starts.len())
        .map(|row| {
            let own = placeholder_offsets[row]..placeholder_offsets[row + 1];
            let context = stored_offsets[contexts[row] as usize];
            Ok(Datapoint {
                id: ids[row].clone(),
                source: Arc::from(metadata["sources"][usize::from(sources[row])].as_str().unwrap_or_default()),
                input_ids: inputs[input_offsets[row]..input_offsets[row + 1]].to_vec(),
                answer_start: starts[row],
                placeholders: placeholders[own.clone()].to_vec(),
                layers: layers[own.clone()].to_vec(),
                read_positions: positions[own].to_vec(),
                context_ids: Arc::from(&stored[context..context + lengths[row] as usize]),
                kind: kinds[row],
                question: Arc::from(questions[row].as_str()),
                answer: Arc::from(answers[row].as_str()),
                meta: Arc::new(serde_json::from_str(&metas[row]).map_err(|error| Error::shard(path, error))?),
            })
        })
        .collect()
}
