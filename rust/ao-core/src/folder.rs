//! The folder of a build: which shards are there, to which build they belong, and the manifest made from them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::frame::Framer;
use crate::layout;
use crate::manifest::{canonical_json, sha256_hex, torn, write_atomic};
use crate::settings::PackSettings;
use crate::shard::{DIGEST_KEY, SCHEMA};
use crate::stats::{LENGTH_EDGES, Stats};

/// The file whose presence says that a data set is whole.
pub const MANIFEST: &str = "manifest.json";

/// The version of everything that decides a datapoint beside its settings: draws, windows, questions, ids. It goes up
/// whenever the same input would give other bytes, so that no build goes on with shards of another version.
pub const RULES: u64 = 3;

/// What mends a build that holds a damaged shard.
const REMEDY: &str = "remove this file and go on with --resume";

/// Which shards a process builds: those whose number is `index` modulo `of`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// From 0.
    pub index: usize,
    /// How many parts there are.
    pub of: usize,
}

impl Default for Part {
    fn default() -> Self {
        Self { index: 0, of: 1 }
    }
}

impl Part {
    pub(crate) fn has(self, shard: usize) -> bool {
        shard % self.of == self.index
    }

    fn is_all(self) -> bool {
        self.of == 1
    }

    /// The part of the same build that has `shard`.
    fn with(self, shard: usize) -> Self {
        Self { index: shard % self.of, of: self.of }
    }

    /// What it leaves in a folder, for people who are to remove that.
    fn remains(self) -> String {
        if self.is_all() {
            return "the folder".to_owned();
        }
        let next = |times: usize| self.index.saturating_add(self.of.saturating_mul(times));
        format!("shards {}, {}, {} and so on, and {},", self.index, next(1), next(2), part_name(self))
    }
}

/// What a build is: everything that decides its bytes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// The sha256 of all the rest.
    build: String,
    framer: Value,
    oracle: Value,
    targets: Value,
    config: Value,
    inputs: Value,
}

impl Identity {
    pub(crate) fn new(framer: &Framer, settings_json: &str, settings: PackSettings) -> Result<Self> {
        let framer = json!(framer.fingerprint());
        let settings_value: Value = serde_json::from_str(settings_json).map_err(Error::settings)?;
        let decisive = json!({"framer": framer, "settings": settings_value, "schema": SCHEMA, "rules": RULES});
        let build = sha256_hex(canonical_json(&decisive).as_bytes());
        let PackSettings { oracle, targets, config, inputs, .. } = settings;
        Ok(Self { build, framer, oracle, targets, config, inputs })
    }

    /// What the header of shard `number` says.
    pub(crate) fn header(&self, number: usize, stats: &Stats) -> Value {
        json!({
            "build": self.build,
            "shard": number,
            "stats": stats,
            "fingerprints": {"framer": self.framer, "oracle": self.oracle, "targets": self.targets},
        })
    }
}

/// A finished shard.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ShardEntry {
    pub(crate) number: usize,
    pub(crate) sha256: String,
    pub(crate) bytes: u64,
    pub(crate) stats: Stats,
}

impl ShardEntry {
    fn to_json(&self) -> Value {
        let total = self.stats.total();
        json!({
            "file": shard_name(self.number),
            "sha256": self.sha256,
            "bytes": self.bytes,
            "datapoints": total.datapoints,
            "examples": total.examples,
        })
    }
}

pub(crate) fn shard_name(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

fn shard_number(name: &str) -> Option<usize> {
    name.strip_prefix("shard-")?.strip_suffix(".safetensors")?.parse().ok()
}

/// A folder in which shards are built.
pub(crate) struct BuildFolder {
    pub(crate) path: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) part: Part,
    /// Held as long as this lives.
    _lock: File,
}

impl BuildFolder {
    /// Make the folder if it is not there, and keep other processes from building the same part.
    pub(crate) fn open(path: &Path, identity: Identity, part: Part) -> Result<Self> {
        if part.index >= part.of {
            return Err(Error::settings(format!(
                "part {}/{} does not exist; parts are numbered from 0, so expected 0/{of} to {}/{of}",
                part.index,
                part.of,
                part.of.saturating_sub(1),
                of = part.of
            )));
        }
        std::fs::create_dir_all(path).map_err(|error| Error::io(path, "creating the folder", error))?;
        let lock_path = path.join(lock_name(part));
        let lock = File::create(&lock_path).map_err(|error| Error::io(&lock_path, "creating", error))?;
        match lock.try_lock() {
            // Where the file system has no locks, two builds at once cannot be told apart from one.
            Ok(()) | Err(std::fs::TryLockError::Error(_)) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(Error::input(format!(
                    "{}: another process is building this part; wait for it, or stop it and go on with --resume",
                    path.display()
                )));
            }
        }
        Ok(Self { path: path.to_owned(), identity, part, _lock: lock })
    }

    /// The shards of this part that are there; without `resume` there must be none.
    pub(crate) fn shards(&self, resume: bool) -> Result<BTreeMap<usize, ShardEntry>> {
        let mut numbers = Vec::new();
        let names = names(&self.path)?;
        self.require_one_build(&names)?;
        for name in names {
            match shard_number(&name) {
                Some(number) if self.part.has(number) => numbers.push(number),
                _ if is_unfinished(&name, self.part) => remove(&self.path.join(&name))?,
                _ => {}
            }
        }
        if !resume && !numbers.is_empty() {
            return Err(Error::input(format!(
                "{} holds {} shards of a build that was not finished; go on with --resume, or remove {} to build anew",
                self.path.display(),
                numbers.len(),
                self.part.remains()
            )));
        }
        let entries = entries(&self.path, &self.identity.build, self.part, &numbers)?;
        let part_path = self.path.join(part_name(self.part));
        if part_path.exists() {
            let finished = read_part(&part_path)?;
            if finished.identity.build == self.identity.build {
                require_written(&self.path, &entries, &listed(&finished.shards))?;
            }
        }
        Ok(entries)
    }

    /// Refuse a folder whose other parts are of another build: what says that they are finished, and one of their shards.
    fn require_one_build(&self, names: &BTreeSet<String>) -> Result<()> {
        let of_part = |name: &String| Some((part_of(name)?, read_part(&self.path.join(name)).ok()?.identity.build));
        let of_shard = |name: &String| {
            let number = shard_number(name).filter(|&number| !self.part.has(number))?;
            let metadata = layout::metadata(&self.path.join(name)).ok()?;
            let metadata: Value = serde_json::from_str(&metadata).ok()?;
            Some((self.part.with(number), metadata["build"].as_str()?.to_owned()))
        };
        let parts = names.iter().filter_map(of_part).filter(|(part, _)| *part != self.part);
        // Those that are damaged are named when their part goes on, or by the merge.
        for (part, found) in parts.chain(names.iter().find_map(of_shard)) {
            if found != self.identity.build {
                return Err(Error::input(format!(
                    "{}: part {}/{} in it is of another build: recipe, model, version or source files differ (expected build \
                     {}, got {found}); build all parts from one recipe and the same files; where that part is the wrong one, \
                     remove {} and build it again",
                    self.path.display(),
                    part.index,
                    part.of,
                    self.identity.build,
                    part.remains()
                )));
            }
        }
        Ok(())
    }

    /// Write what a finished part or the whole data set needs, and return its text.
    pub(crate) fn finish(&self, num_shards: usize, done: &BTreeMap<usize, ShardEntry>) -> Result<String> {
        if let Some(&beyond) = done.keys().find(|&&number| number >= num_shards) {
            return Err(Error::input(format!(
                "{} holds shard {beyond}, but the sources give only {num_shards}; remove {} and build again",
                self.path.display(),
                self.part.remains()
            )));
        }
        if self.part.is_all() {
            let text = write_manifest(&self.path, &self.identity, done)?;
            clean(&self.path)?;
            return Ok(text);
        }
        let shards: Vec<Value> = done.values().map(ShardEntry::to_json).collect();
        let text = canonical_json(&json!({
            "schema": SCHEMA,
            "kind": "part",
            "part": self.part.index,
            "of": self.part.of,
            "num_shards": num_shards,
            "shards": shards,
            "identity": self.identity,
        }));
        write_atomic(&self.path.join(part_name(self.part)), text.as_bytes())?;
        Ok(text)
    }
}

fn part_name(part: Part) -> String {
    format!("part-{}-of-{}.json", part.index, part.of)
}

/// The part whose file is called `name`.
fn part_of(name: &str) -> Option<Part> {
    let (index, of) = name.strip_prefix("part-")?.strip_suffix(".json")?.split_once("-of-")?;
    Some(Part { index: index.parse().ok()?, of: of.parse().ok()? })
}

fn is_part(name: &str) -> bool {
    part_of(name).is_some()
}

fn lock_name(part: Part) -> String {
    format!(".lock-{}-of-{}", part.index, part.of)
}

/// Whether a file is what a killed process of this part left behind: a torn shard, its own file, or a torn manifest.
fn is_unfinished(name: &str, part: Part) -> bool {
    torn(name).is_some_and(|name| {
        shard_number(name).is_some_and(|number| part.has(number))
            || name == part_name(part)
            || (part.is_all() && name == MANIFEST)
    })
}

fn names(folder: &Path) -> Result<BTreeSet<String>> {
    std::fs::read_dir(folder)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect())
        .map_err(|error| Error::io(folder, "reading the folder", error))
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|error| Error::io(path, "removing", error))
}

/// Remove what only an unfinished build needs.
fn clean(folder: &Path) -> Result<()> {
    for name in names(folder)? {
        let is_torn = torn(&name).is_some_and(|name| shard_number(name).is_some() || is_part(name) || name == MANIFEST);
        if name.starts_with(".lock-") || is_part(&name) || is_torn {
            remove(&folder.join(name))?;
        }
    }
    Ok(())
}

/// Check that shards are whole and of this build, and describe them.
fn entries(folder: &Path, build: &str, part: Part, numbers: &[usize]) -> Result<BTreeMap<usize, ShardEntry>> {
    numbers.par_iter().map(|&number| Ok((number, entry(folder, build, part, number)?))).collect()
}

fn entry(folder: &Path, build: &str, part: Part, number: usize) -> Result<ShardEntry> {
    let path = folder.join(shard_name(number));
    described(&path, build, part, number).map_err(|error| error.with_remedy(REMEDY))
}

fn described(path: &Path, build: &str, part: Part, number: usize) -> Result<ShardEntry> {
    let arrays = layout::layout(path)?;
    let metadata: Value = serde_json::from_str(&layout::metadata(path)?).map_err(Error::input)?;
    let found = metadata["build"].as_str().unwrap_or_default();
    let is_ours = found == build && metadata["shard"].as_u64() == Some(number as u64);
    // Only shards of an older version have no digest, and those are of another build.
    if is_ours || !metadata[DIGEST_KEY].is_null() {
        layout::check_digest(path)?;
    }
    if !is_ours {
        return Err(Error::input(format!(
            "{} belongs to another build: recipe, model, version or source files differ (expected build {build} and shard \
             {number}, got {found} and {}); remove {} to build anew",
            path.display(),
            metadata["shard"],
            part.with(number).remains()
        )));
    }
    let stats: Stats = serde_json::from_value(metadata["stats"].clone())
        .map_err(|error| Error::shard(path, format!("its counts cannot be read: {error}")))?;
    let rows = arrays.iter().find(|array| array.name == "answer_start").map_or(0, |array| array.shape[0]);
    if !stats.are_of(rows) {
        return Err(Error::shard(path, format!("its counts are not those of its {rows} datapoints")));
    }
    let (sha256, bytes) = layout::digest(path)?;
    Ok(ShardEntry { number, sha256, bytes, stats })
}

/// The sha256 of shards by their file.
fn listed<'a>(shards: impl IntoIterator<Item = &'a WrittenShard>) -> HashMap<&'a str, &'a str> {
    shards.into_iter().map(|shard| (&*shard.file, &*shard.sha256)).collect()
}

/// Check that shards are the files that their parts wrote, of those that they list.
fn require_written(folder: &Path, shards: &BTreeMap<usize, ShardEntry>, written: &HashMap<&str, &str>) -> Result<()> {
    for shard in shards.values() {
        let name = shard_name(shard.number);
        if written.get(&*name).is_some_and(|sha256| *sha256 != shard.sha256) {
            let what = "it is not the file that its part wrote";
            return Err(Error::shard(&folder.join(name), what).with_remedy(REMEDY));
        }
    }
    Ok(())
}

/// The manifest of a data set with these shards.
fn write_manifest(folder: &Path, identity: &Identity, shards: &BTreeMap<usize, ShardEntry>) -> Result<String> {
    let mut stats = Stats::default();
    for shard in shards.values() {
        stats.add(&shard.stats);
    }
    let total = stats.total();
    if total.datapoints == 0 {
        return Err(Error::input(format!(
            "no example was kept, so there is nothing to pack; of {} offered, drops by reason: {:?}, errors: {:?}",
            total.offered, total.drops, total.errors
        )));
    }
    let Identity { build, framer, oracle, targets, config, inputs } = identity;
    let manifest = canonical_json(&json!({
        "schema": SCHEMA,
        "rules": RULES,
        "kind": "packed",
        "build": build,
        "framer": framer,
        "oracle": oracle,
        "targets": targets,
        "config": config,
        "inputs": inputs,
        "shards": shards.values().map(ShardEntry::to_json).collect::<Vec<_>>(),
        "counts": {
            "offered": total.offered,
            "examples": total.examples,
            "datapoints": total.datapoints,
            "input_tokens": total.input_tokens,
            "answer_tokens": total.answer_tokens,
            "contexts": stats.contexts,
            "context_tokens": stats.context_tokens,
            "context_tokens_read": total.context_tokens_read,
            "unanswerable": total.unanswerable,
            "without_donor": total.without_donor,
            "placeholders": stats.placeholders,
            "duplicates": stats.duplicates,
        },
        "drops": total.drops,
        "errors": total.errors,
        "lengths": {"edges": LENGTH_EDGES, "input": stats.input_lengths, "context": stats.context_lengths},
        "sources": stats.sources,
    }));
    write_atomic(&folder.join(MANIFEST), manifest.as_bytes())?;
    Ok(manifest)
}

/// A manifest that was written, as far as its shards are concerned.
#[derive(Deserialize)]
struct Written {
    shards: Vec<WrittenShard>,
}

#[derive(Deserialize)]
struct WrittenShard {
    file: String,
    sha256: String,
}

/// The manifest of a merge that was stopped behind it, its shards proved once more.
fn finished(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(MANIFEST);
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|error| Error::io(&path, "reading", error))?,
    };
    let wrong = |what: String| Error::input(format!("{}: {what}; remove it and merge again", path.display()));
    // By way of a value, because a struct passes over what it does not hold without looking at it.
    let written: Written = serde_json::from_str::<Value>(&text)
        .and_then(serde_json::from_value)
        .map_err(|error| wrong(format!("not the manifest of a data set: {error}")))?;
    if written.shards.is_empty() || written.shards.iter().any(|shard| shard_number(&shard.file).is_none()) {
        return Err(wrong("it lists no shards, or other files".to_owned()));
    }
    written.shards.par_iter().try_for_each(|shard| layout::verify(&folder.join(&shard.file), &shard.sha256))?;
    Ok(Some(text))
}

/// What a finished part says of itself.
#[derive(Deserialize)]
struct PartFile {
    part: usize,
    of: usize,
    num_shards: usize,
    shards: Vec<WrittenShard>,
    identity: Identity,
}

impl PartFile {
    fn which(&self) -> Part {
        Part { index: self.part, of: self.of }
    }
}

/// Prove that the parts in `folder` make one whole build, write its manifest and return its text. A merge that was
/// stopped can be run again.
///
/// # Errors
/// If a part or a shard is missing, changed since, or of another build.
pub fn merge(folder: &Path) -> Result<String> {
    if let Some(text) = finished(folder)? {
        clean(folder)?;
        return Ok(text);
    }
    let parts = read_parts(folder)?;
    let first = &parts[0];
    if let Some(other) = parts.iter().find(|part| part.identity.build != first.identity.build) {
        return Err(Error::input(format!(
            "{}: part {} and part {} are of different builds ({} and {}); build them from one recipe and the same files: \
             remove {} or {} whichever is the wrong one, and build it again",
            folder.display(),
            first.part,
            other.part,
            first.identity.build,
            other.identity.build,
            first.which().remains(),
            other.which().remains()
        )));
    }
    if let Some(other) = parts.iter().find(|part| part.num_shards != first.num_shards) {
        return Err(Error::input(format!(
            "{}: part {} counts {} shards, part {} counts {}; their sources differed, so build them again",
            folder.display(),
            first.part,
            first.num_shards,
            other.part,
            other.num_shards
        )));
    }
    let mut numbers = BTreeSet::new();
    for shard in parts.iter().flat_map(|part| &part.shards) {
        let number = shard_number(&shard.file).filter(|&number| number < first.num_shards).ok_or_else(|| {
            Error::input(format!(
                "{}: a part lists {:?}, which is none of its {} shards; build that part again",
                folder.display(),
                shard.file,
                first.num_shards
            ))
        })?;
        numbers.insert(number);
    }
    if numbers.len() != first.num_shards {
        return Err(Error::input(format!(
            "{}: the parts list {} shards of {}; build those again that lack some",
            folder.display(),
            numbers.len(),
            first.num_shards
        )));
    }
    let numbers: Vec<usize> = numbers.into_iter().collect();
    let shards = entries(folder, &first.identity.build, first.which(), &numbers)?;
    require_written(folder, &shards, &listed(parts.iter().flat_map(|part| &part.shards)))?;
    let text = write_manifest(folder, &first.identity, &shards)?;
    clean(folder)?;
    Ok(text)
}

fn read_part(path: &Path) -> Result<PartFile> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, "reading", error))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::input(format!(
            "{}: not what a part writes: {error}; remove it and build that part again",
            path.display()
        ))
    })
}

/// All parts, of one division and complete.
fn read_parts(folder: &Path) -> Result<Vec<PartFile>> {
    let mut parts: BTreeMap<usize, Vec<PartFile>> = BTreeMap::new();
    for name in names(folder)?.into_iter().filter(|name| is_part(name)) {
        let part = read_part(&folder.join(&name))?;
        parts.entry(part.of).or_default().push(part);
    }
    let found: Vec<String> = parts.iter().map(|(of, parts)| format!("{} of {of}", parts.len())).collect();
    parts.into_iter().find(|(of, parts)| parts.len() == *of && *of > 0).map(|(_, parts)| parts).ok_or_else(|| {
        let found = if found.is_empty() { "none".to_owned() } else { found.join(" and ") };
        Error::input(format!(
            "{}: parts are missing: found {found}; run the others with --part i/n, or copy their files here",
            folder.display()
        ))
    })
}
