//! The units of a folder: what the manifest says of them, and of the others what the headers of their indexes say.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::thread;
use std::time::SystemTime;

use serde::Deserialize;
use serde_json::{Value, json};

use super::{INDEX_SUFFIX, SCHEMA, index};
use crate::error::Result;
use crate::manifest::canonical_json;

/// Name of the manifest.
const MANIFEST: &str = "manifest.json";
/// Fewer indexes than these are looked at by one thread.
const FEW: usize = 32;

/// What can be told of a unit without reading its keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// What all units of a cache have in common, as canonical JSON: `contract`, `dtype` and `width`.
    pub common: String,
    /// The run that wrote the unit.
    pub run: String,
    /// Number of the unit in its run.
    pub number: u32,
    /// Rows of each layer that has any.
    pub rows: BTreeMap<u16, usize>,
}

pub(crate) fn common(about: &Value) -> String {
    canonical_json(&json!({"contract": about["contract"], "dtype": about["dtype"], "width": about["width"]}))
}

/// What is known of the units with these indexes in a folder.
///
/// What the manifest lists is taken from it, which costs a fraction of opening the index. Of an index that it does not
/// list, that has another size than listed or was written since, the header is read.
///
/// # Errors
/// If an index is missing, cut, or none: that of the first one.
pub fn summaries(folder: &Path, names: &[String]) -> Result<Vec<Summary>> {
    // Of one index the header is less to read than the manifest.
    let manifest = if names.len() > 1 { Manifest::read(folder) } else { None };
    let one = |name: &String| {
        let listed = manifest.as_ref().and_then(|manifest| manifest.summary(folder, name));
        listed.map_or_else(|| index::summary(&folder.join(name)), Ok)
    };
    // Threads of their own: a pool of threads does not outlive a fork of the process.
    let threads = if names.len() < FEW { 1 } else { thread::available_parallelism().map_or(1, usize::from) };
    let found = thread::scope(|scope| {
        let each = |names: &[String]| names.iter().map(one).collect::<Result<Vec<_>>>();
        let shares = names.chunks(names.len().div_ceil(threads).max(1));
        let shares: Vec<_> = shares.map(|share| scope.spawn(move || each(share))).collect();
        shares
            .into_iter()
            .map(|share| share.join().expect("a thread that reads does not panic"))
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(found.into_iter().flatten().collect())
}

/// A manifest, and when it was written.
struct Manifest {
    written: SystemTime,
    common: String,
    units: HashMap<String, ListedUnit>,
}

#[derive(Deserialize)]
struct ListedUnit {
    index: String,
    bytes: u64,
    rows: BTreeMap<u16, usize>,
}

impl Manifest {
    /// None where there is none that can be used: it is a shorter way to what the indexes say, and `ao inspect` tells of
    /// one that is damaged.
    fn read(folder: &Path) -> Option<Self> {
        #[derive(Deserialize)]
        struct Fields {
            kind: String,
            schema: u64,
            contract: Value,
            dtype: Value,
            width: Value,
            units: Vec<ListedUnit>,
        }

        let path = folder.join(MANIFEST);
        // Looked at first: a manifest that comes meanwhile is taken for older than it is, never for newer.
        let written = path.metadata().and_then(|about| about.modified()).ok()?;
        let fields: Fields = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (fields.kind == "activations" && fields.schema == SCHEMA).then(|| Self {
            written,
            common: common(&json!({"contract": fields.contract, "dtype": fields.dtype, "width": fields.width})),
            units: fields.units.into_iter().map(|unit| (unit.index.clone(), unit)).collect(),
        })
    }

    /// Of a unit whose index is the one that was listed.
    fn summary(&self, folder: &Path, name: &str) -> Option<Summary> {
        let listed = self.units.get(name)?;
        let (run, number) = name.strip_suffix(INDEX_SUFFIX)?.rsplit_once('-')?;
        let now = folder.join(name).metadata().ok()?;
        (now.len() == listed.bytes && now.modified().ok()? <= self.written).then_some(Summary {
            common: self.common.clone(),
            run: run.to_owned(),
            number: number.parse().ok()?,
            rows: listed.rows.clone(),
        })
    }
}
