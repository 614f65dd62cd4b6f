//! Shards: safetensors files of ragged arrays, flat values with offsets.
//!
//! A shard stands alone. Contexts are stored once, and one that is the beginning of another is not stored at all: it
//! refers to the longer one and has its own length. `layout` reads what is written here.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::datapoint::Datapoint;
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

    fn from_rows<'a>(rows: impl Iterator<Item = &'a [T]> + Clone) -> Self
    where
        T: 'a,
    {
        let mut ragged = Self::new();
        let (count, length) = rows.clone().fold((0, 0), |(count, length), row| (count + 1, length + row.len()));
        ragged.offsets.reserve_exact(count);
        ragged.values.reserve_exact(length);
        rows.for_each(|row| ragged.push(row));
        ragged
    }
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

/// The bytes of a shard that holds `datapoints`, in order. `stats` get what only the stored arrays tell, then `header`
/// says what the metadata hold beside the sources' names.
///
/// # Errors
/// If there are more than 256 sources.
pub fn encode(datapoints: &[Datapoint], stats: &mut Stats, header: impl FnOnce(&Stats) -> Value) -> Result<Vec<u8>> {
    let sources = sources_of(datapoints)?;
    let contexts = SharedContexts::new(datapoints);
    let texts = |text: fn(&Datapoint) -> &str| Ragged::from_rows(datapoints.iter().map(|d| text(d).as_bytes()));
    let (ids, metas) = (texts(|d| &d.id), texts(|d| &d.meta));
    let (questions, answers) = (texts(|d| &d.question), texts(|d| &d.answer));
    let inputs = Ragged::from_rows(datapoints.iter().map(|d| d.input_ids.as_slice()));
    let placeholders = Ragged::from_rows(datapoints.iter().map(|d| d.placeholders.as_slice()));
    let layers = Ragged::from_rows(datapoints.iter().map(|d| d.layers.as_slice()));
    let positions = Ragged::from_rows(datapoints.iter().map(|d| d.read_positions.as_slice()));
    let mut arrays = Arrays::default();
    arrays.ragged("id_bytes", "id_offsets", &ids);
    arrays.ragged("question_bytes", "question_offsets", &questions);
    arrays.ragged("answer_bytes", "answer_offsets", &answers);
    arrays.ragged("meta_bytes", "meta_offsets", &metas);
    arrays.each("answer_start", datapoints, |d| d.answer_start);
    arrays.each("context_length", datapoints, |d| d.context_ids.len() as i32);
    arrays.each("kind", datapoints, |d| d.kind);
    arrays.each("source", datapoints, |d| sources.binary_search(&&*d.source).expect("every source was listed") as u8);
    arrays.ragged("input_ids", "input_offsets", &inputs);
    arrays.ragged("placeholders", "placeholder_offsets", &placeholders);
    arrays.flat("layers", &layers.values);
    arrays.flat("read_positions", &positions.values);
    arrays.ragged("context_ids", "context_offsets", &contexts.stored);
    arrays.flat("context", &contexts.rows);
    stats.contexts = contexts.stored.offsets.len() as u64 - 1;
    stats.context_tokens = contexts.stored.values.len() as u64;
    stats.placeholders = placeholders.values.len() as u64;
    stats.duplicates = duplicates(datapoints);
    let mut metadata = header(stats);
    metadata["schema"] = json!(SCHEMA);
    metadata["sources"] = json!(sources);
    arrays.serialize(metadata)
}

/// How many datapoints have the same input, context and positions as one before them.
fn duplicates(datapoints: &[Datapoint]) -> u64 {
    let mut seen = HashSet::with_capacity(datapoints.len());
    let repeated = |datapoint: &&Datapoint| {
        let mut hasher = Xxh3::new();
        for part in [&*datapoint.input_ids, &*datapoint.context_ids, &*datapoint.read_positions] {
            hasher.update(&part.len().to_le_bytes());
            hasher.update(bytemuck::cast_slice(part));
        }
        !seen.insert(hasher.digest128())
    };
    datapoints.iter().filter(repeated).count() as u64
}

/// The names of the sources, sorted; a shard numbers them with a byte.
fn sources_of(datapoints: &[Datapoint]) -> Result<Vec<&str>> {
    let distinct: BTreeSet<&str> = datapoints.iter().map(|datapoint| &*datapoint.source).collect();
    let sources: Vec<&str> = distinct.into_iter().collect();
    if sources.len() > 256 {
        return Err(Error::input(format!(
            "a shard has {} sources, at most 256 fit; give the records fewer distinct \"source\" fields",
            sources.len()
        )));
    }
    Ok(sources)
}

/// Arrays by name, as bytes.
#[derive(Default)]
struct Arrays<'a>(Vec<(&'static str, Dtype, usize, Cow<'a, [u8]>)>);

impl<'a> Arrays<'a> {
    fn flat<T: Stored>(&mut self, name: &'static str, values: &'a [T]) {
        self.0.push((name, T::DTYPE, values.len(), Cow::Borrowed(bytemuck::cast_slice(values))));
    }

    fn each<T: Stored>(&mut self, name: &'static str, datapoints: &[Datapoint], value: impl Fn(&Datapoint) -> T) {
        let values: Vec<T> = datapoints.iter().map(value).collect();
        self.0.push((name, T::DTYPE, values.len(), Cow::Owned(bytemuck::cast_slice(&values).to_vec())));
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
    fn new(datapoints: &[Datapoint]) -> Self {
        let held = Held::new(datapoints);
        let mut order: Vec<usize> = (0..held.longest.len()).collect();
        order.sort_by(|&a, &b| held.longest[a].cmp(held.longest[b]).then(a.cmp(&b)));
        // Whatever begins with a context stands right behind it, so the neighbour decides, from the longest back.
        let mut holder = vec![0; held.longest.len()];
        let mut later: Option<usize> = None;
        for &at in order.iter().rev() {
            holder[at] = match later {
                Some(next) if held.longest[next].starts_with(held.longest[at]) => holder[next],
                _ => at,
            };
            later = Some(at);
        }
        let mut shared = Self { stored: Ragged::new(), rows: Vec::with_capacity(datapoints.len()) };
        let mut row_of: HashMap<usize, i32> = HashMap::new();
        for &group in &held.groups {
            let next = row_of.len() as i32;
            let row = *row_of.entry(holder[group]).or_insert_with(|| {
                shared.stored.push(held.longest[holder[group]]);
                next
            });
            shared.rows.push(row);
        }
        shared
    }
}

/// Datapoints by the tokens that they hold in common, which need not be compared with each other.
struct Held<'a> {
    /// For each datapoint, its group.
    groups: Vec<usize>,
    /// For each group, the longest context that one of it shows.
    longest: Vec<&'a [i32]>,
}

impl<'a> Held<'a> {
    fn new(datapoints: &'a [Datapoint]) -> Self {
        let mut held = Self { groups: Vec::with_capacity(datapoints.len()), longest: Vec::new() };
        let mut group_at = HashMap::new();
        for datapoint in datapoints {
            let own: &[i32] = &datapoint.context_ids;
            let group = *group_at.entry(datapoint.context_ids.place()).or_insert(held.longest.len());
            match held.longest.get_mut(group) {
                None => held.longest.push(own),
                Some(longest) if longest.len() < own.len() => *longest = own,
                Some(_) => {}
            }
            held.groups.push(group);
        }
        held
    }
}
