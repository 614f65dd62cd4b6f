//! Shards: safetensors files of ragged arrays, flat values with offsets.
//!
//! A shard stands alone. Contexts are stored once, and one that is the beginning of another is not stored at all: it
//! refers to the longer one and has its own length. `layout` reads what is written here.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::columns::{Columns, Ragged};
use crate::error::{Error, Result};
use crate::manifest::{canonical_json, xxh3_text};
use crate::stats::Stats;

/// The version of the layout; others are refused.
pub const SCHEMA: u64 = 1;

/// The one metadata key. Several would come in random order, and equal shards would differ.
pub const METADATA_KEY: &str = "ao";

/// Where the metadata hold the xxh3-128 of all else that a shard says.
pub(crate) const DIGEST_KEY: &str = "digest";

/// What stands there: the digest of the data, which `data` has seen, and of the metadata without it.
pub(crate) fn digest_of(mut data: Xxh3, metadata: &Value) -> String {
    data.update(canonical_json(metadata).as_bytes());
    xxh3_text(&data)
}

#[cfg(target_endian = "big")]
compile_error!("shards are little-endian and are viewed in place, so this machine can neither write nor read them");

/// Values that a shard holds as they lie in memory.
trait Stored: bytemuck::NoUninit {
    const DTYPE: Dtype;
}

macro_rules! stored {
    ($($type:ty => $dtype:ident),*) => {$(
        impl Stored for $type {
            const DTYPE: Dtype = Dtype::$dtype;
        }
    )*};
}
stored!(i64 => I64, i32 => I32, i16 => I16, u8 => U8);

/// The bytes of a shard that holds the datapoints `columns`, in order. `stats` get what only the stored arrays tell, then
/// `header` says what the metadata hold beside the sources' names.
///
/// # Errors
/// If there are more than 256 sources.
pub fn encode(columns: &Columns, stats: &mut Stats, header: impl FnOnce(&Stats) -> Value) -> Result<Vec<u8>> {
    let (source_names, sources) = sorted_sources(columns)?;
    let contexts = SharedContexts::new(columns);
    let mut arrays = Arrays::default();
    arrays.ragged("id_bytes", "id_offsets", &columns.ids);
    arrays.ragged("question_bytes", "question_offsets", &columns.questions);
    arrays.ragged("answer_bytes", "answer_offsets", &columns.answers);
    arrays.ragged("meta_bytes", "meta_offsets", &columns.metas);
    arrays.flat("answer_start", &columns.answer_starts);
    arrays.flat("context_length", &columns.context_lengths);
    arrays.flat("kind", &columns.kinds);
    arrays.flat("source", &sources);
    arrays.ragged("input_ids", "input_offsets", &columns.inputs);
    arrays.ragged("placeholders", "placeholder_offsets", &columns.placeholders);
    arrays.flat("layers", &columns.layers);
    arrays.flat("read_positions", &columns.read_positions);
    arrays.ragged("context_ids", "context_offsets", &contexts.stored);
    arrays.flat("context", &contexts.rows);
    stats.contexts = contexts.stored.offsets.len() as u64 - 1;
    stats.context_tokens = contexts.stored.values.len() as u64;
    stats.placeholders = columns.placeholders.values.len() as u64;
    stats.duplicates = duplicates(columns);
    let mut metadata = header(stats);
    metadata["schema"] = json!(SCHEMA);
    metadata["sources"] = json!(source_names);
    arrays.serialize(metadata)
}

/// How many datapoints have the same input, context, positions and kind as one before them.
fn duplicates(columns: &Columns) -> u64 {
    let mut seen = HashSet::with_capacity(columns.len());
    let is_repeated = |&at: &usize| {
        let mut hasher = Xxh3::new();
        hasher.update(&[columns.kinds[at]]);
        for part in [columns.inputs.row(at), columns.context_ids(at), columns.positions(at)] {
            hasher.update(&part.len().to_le_bytes());
            hasher.update(bytemuck::cast_slice(part));
        }
        !seen.insert(hasher.digest128())
    };
    (0..columns.len()).filter(is_repeated).count() as u64
}

/// The names of the sources, sorted, and for each datapoint the number of its own; a shard holds it in a byte.
fn sorted_sources(columns: &Columns) -> Result<(Vec<&str>, Vec<u8>)> {
    let distinct: BTreeSet<&str> = columns.source_names.iter().map(|name| &**name).collect();
    let names: Vec<&str> = distinct.into_iter().collect();
    if names.len() > 256 {
        return Err(Error::input(format!(
            "a shard has {} sources, at most 256 fit; give the records fewer distinct \"source\" fields",
            names.len()
        )));
    }
    let number = |name: &Arc<str>| names.binary_search(&&**name).expect("every source was listed") as u8;
    let numbers: Vec<u8> = columns.source_names.iter().map(number).collect();
    let sources = columns.sources.iter().map(|&own| numbers[own as usize]).collect();
    Ok((names, sources))
}

/// Arrays by name, as bytes.
#[derive(Default)]
struct Arrays<'a>(Vec<(&'static str, Dtype, usize, &'a [u8])>);

impl<'a> Arrays<'a> {
    fn flat<T: Stored>(&mut self, name: &'static str, values: &'a [T]) {
        self.0.push((name, T::DTYPE, values.len(), bytemuck::cast_slice(values)));
    }

    fn ragged<T: Stored>(&mut self, values: &'static str, offsets: &'static str, rows: &'a Ragged<T>) {
        self.flat(values, &rows.values);
        self.flat(offsets, &rows.offsets);
    }

    fn serialize(mut self, mut metadata: Value) -> Result<Vec<u8>> {
        // As safetensors lays them in the file, so that their digest is that of the file's data.
        self.0.sort_by(|(name, dtype, ..), (other, its, ..)| its.cmp(dtype).then(name.cmp(other)));
        let mut data = Xxh3::new();
        self.0.iter().for_each(|(.., bytes)| data.update(bytes));
        metadata[DIGEST_KEY] = json!(digest_of(data, &metadata));
        let failed = |error| Error::input(format!("a shard cannot be written: {error}"));
        let views = self
            .0
            .iter()
            .map(|(name, dtype, length, bytes)| Ok((*name, TensorView::new(*dtype, vec![*length], bytes)?)))
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(failed)?;
        let metadata = HashMap::from([(METADATA_KEY.to_owned(), canonical_json(&metadata))]);
        safetensors::serialize(views, Some(metadata)).map_err(failed)
    }
}

/// The distinct contexts of a shard, none the beginning of another, in the order of their first use.
struct SharedContexts {
    stored: Ragged<i32>,
    rows: Vec<i32>,
}

impl SharedContexts {
    fn new(columns: &Columns) -> Self {
        let longest = longest(columns);
        let mut order: Vec<usize> = (0..longest.len()).collect();
        order.sort_by(|&a, &b| longest[a].cmp(longest[b]).then(a.cmp(&b)));
        // Whatever begins with a context stands right behind it, so the neighbour decides, from the longest back.
        let mut holder = vec![0; longest.len()];
        let mut later: Option<usize> = None;
        for &at in order.iter().rev() {
            holder[at] = match later {
                Some(next) if longest[next].starts_with(longest[at]) => holder[next],
                _ => at,
            };
            later = Some(at);
        }
        let mut shared = Self { stored: Ragged::default(), rows: Vec::with_capacity(columns.len()) };
        let mut row_of: HashMap<usize, i32> = HashMap::new();
        for &own in &columns.context {
            let next = row_of.len() as i32;
            let holder = holder[own as usize];
            let row = *row_of.entry(holder).or_insert_with(|| {
                shared.stored.push(longest[holder]);
                next
            });
            shared.rows.push(row);
        }
        shared
    }
}

/// For each context, as much of it as any datapoint shows.
fn longest(columns: &Columns) -> Vec<&[i32]> {
    let mut shown = vec![0; columns.contexts.len()];
    for (&context, &length) in columns.context.iter().zip(&columns.context_lengths) {
        let longest = &mut shown[context as usize];
        *longest = length.max(*longest);
    }
    columns.contexts.iter().zip(shown).map(|(ids, length)| &ids[..length as usize]).collect()
}
