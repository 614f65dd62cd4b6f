//! The units of a folder: what the manifest says of them, and of the others what the headers of their indexes say.

use std::collections::{BTreeMap, HashMap};
use std::fs::Metadata;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{INDEX_SUFFIX, RowType, SCHEMA, index};
use crate::error::Result;
use crate::manifest::{canonical_json, sha256_hex};

/// Name of the manifest.
const MANIFEST: &str = "manifest.json";
/// What stands behind all that a manifest says, and before the digest of that.
const OWN_DIGEST: &str = ",\"sha256\":\"";
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
/// Without `headers` what the manifest lists is taken from it, which costs a fraction of opening the index. Of an index that
/// it does not list, that has another size than listed or was written, moved or copied there since, the header is read.
///
/// # Errors
/// If an index is missing, cut, or none: that of the first one.
pub fn summaries(folder: &Path, names: &[String], headers: bool) -> Result<Vec<Summary>> {
    let manifest = if headers { None } else { Manifest::read(folder) };
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

/// A manifest, and when it came to where it is.
struct Manifest {
    came: SystemTime,
    common: String,
    units: HashMap<String, ListedUnit>,
}

#[derive(Deserialize)]
struct ListedUnit {
    index: String,
    bytes: u64,
    rows: BTreeMap<u16, u32>,
}

impl Manifest {
    /// None where there is none that can be used: it is a shorter way to what the indexes say, and the check of a cache
    /// tells of one that says something else.
    fn read(folder: &Path) -> Option<Self> {
        #[derive(Deserialize)]
        struct Fields {
            kind: String,
            schema: u64,
            contract: Map<String, Value>,
            dtype: String,
            width: usize,
            units: Vec<ListedUnit>,
        }

        let path = folder.join(MANIFEST);
        // Looked at first: a manifest that comes meanwhile is taken for older than it is, never for newer.
        let came = came(&path.metadata().ok()?)?;
        let text = std::fs::read_to_string(path).ok()?;
        let (said, digest) = text.rsplit_once(OWN_DIGEST)?;
        if digest.strip_suffix("\"}\n")? != sha256_hex(said.as_bytes()) {
            return None;
        }
        let fields: Fields = serde_json::from_str(&text).ok()?;
        RowType::new(&fields.dtype, fields.width).ok()?;
        (fields.kind == "activations" && fields.schema == SCHEMA).then(|| Self {
            came,
            common: common(&json!({"contract": fields.contract, "dtype": fields.dtype, "width": fields.width})),
            units: fields.units.into_iter().map(|unit| (unit.index.clone(), unit)).collect(),
        })
    }

    /// Of a unit whose index is the one that was listed.
    fn summary(&self, folder: &Path, name: &str) -> Option<Summary> {
        let listed = self.units.get(name)?;
        let (run, number) = name.strip_suffix(INDEX_SUFFIX)?.rsplit_once('-')?;
        let now = folder.join(name).metadata().ok()?;
        let rows = listed.rows.iter().filter(|(_, count)| **count > 0);
        (now.len() == listed.bytes && came(&now)? <= self.came).then_some(Summary {
            common: self.common.clone(),
            run: run.to_owned(),
            number: number.parse().ok()?,
            rows: rows.map(|(&layer, &count)| (layer, count as usize)).collect(),
        })
    }
}

/// When a file came to where it is: it may have been written before, and moved or copied there with its times.
fn came(about: &Metadata) -> Option<SystemTime> {
    let written = about.modified().ok()?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let changed = Duration::new(u64::try_from(about.ctime()).ok()?, u32::try_from(about.ctime_nsec()).ok()?);
        Some(written.max(SystemTime::UNIX_EPOCH + changed))
    }
    #[cfg(not(unix))]
    Some(written)
}
