//! The writer of packed data sets: rows in, shards and a manifest out.
//!
//! Examples are numbered as the rows give them, and shard k holds what was kept of the examples from k E up to (k + 1) E.
//! So a shard depends on its own examples alone: several processes can build every n-th shard each, and a build that was
//! killed goes on with what is missing. The manifest is made from the shards' headers, and written last: where it stands,
//! the data set is whole.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use rayon::prelude::*;
use xxhash_rust::xxh3::xxh3_128;

use crate::build::{Block, build, gather};
use crate::datapoint::{Common, LayersPerExample};
use crate::error::{Error, Result};
use crate::folder::{BuildFolder, Identity, Part, ShardEntry, shard_name};
use crate::frame::Framer;
use crate::manifest::{sha256_hex, write_atomic};
use crate::memo::Prompts;
use crate::rows::Table;
use crate::settings::PackSettings;
use crate::shard;
use crate::source::{Body, Source, Unit};
use crate::stats::Stats;

/// How far a build is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Examples seen.
    pub offered: usize,
    /// Of them, those of shards that were there already or that other parts build.
    pub skipped: usize,
    /// Counts of what was built now.
    pub stats: Stats,
    /// What the first examples that were passed over lack.
    pub messages: Vec<String>,
}

/// How many messages of bad rows are kept.
const MESSAGES: usize = 5;

/// Writes a packed data set into one folder.
pub struct PackWriter {
    common: Common,
    examples_per_shard: usize,
    max_errors: usize,
    folder: BuildFolder,
    done: BTreeMap<usize, ShardEntry>,
    given: Given,
    heads: Heads,
    prompts: Prompts,
    progress: Progress,
    num_errors: usize,
    pending: Vec<Unit>,
    writing: Option<JoinHandle<Result<ShardEntry>>>,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    Failed,
    Finished,
}

/// How a build is done, which changes none of its bytes.
#[derive(Debug, Clone, Copy, Default)]
pub struct Run {
    /// Which shards are built.
    pub part: Part,
    /// Go on with the shards that are there.
    pub resume: bool,
    /// How many bad rows are passed over before the build stops.
    pub max_errors: usize,
}

impl PackWriter {
    /// Start a data set in `folder`, which is made if it is not there, or go on with one.
    ///
    /// The settings are a JSON object of `seed`, `num_layers`, `read_layers` (indices), `layers_per_example` (`each`,
    /// `one`, `together`), `examples_per_shard`, `max_input_tokens`, `max_context_tokens`, and of what the manifest
    /// records: `oracle`, `targets`, `config`, `inputs`.
    ///
    /// # Errors
    /// If a setting is unknown or out of range, the folder cannot be made or is in use, or it holds shards that are not
    /// to be resumed or belong to another build.
    pub fn new(folder: &Path, framer: &Framer, settings_json: &str, run: Run) -> Result<Self> {
        let settings: PackSettings = serde_json::from_str(settings_json).map_err(Error::settings)?;
        let common = settings.common()?;
        let examples_per_shard = settings.examples_per_shard;
        let folder = BuildFolder::open(folder, Identity::new(framer, settings_json, settings)?, run.part)?;
        let done = folder.shards(run.resume)?;
        let num_errors = done.values().flat_map(|shard| shard.stats.total().errors.into_values()).sum::<u64>() as usize;
        Ok(Self {
            common,
            examples_per_shard,
            max_errors: run.max_errors,
            folder,
            done,
            given: Given::default(),
            heads: Heads::default(),
            prompts: Prompts::new(),
            progress: Progress::default(),
            num_errors,
            pending: Vec::new(),
            writing: None,
            state: State::Open,
        })
    }

    /// Add rows of one source, of which the first has number `first` in its table, with the same `framer` every time.
    /// Full shards are built at once and written while the next rows are taken.
    ///
    /// # Errors
    /// If more rows than allowed cannot be used or a shard cannot be written. After such an error the writer refuses
    /// further work; the shards that were finished stay.
    pub fn add(
        &mut self,
        framer: &Framer,
        source: &Arc<Source>,
        table: &Table,
        first: usize,
        rows: &[&[u8]],
    ) -> Result<&Progress> {
        self.require_open()?;
        self.state = State::Failed;
        if !source.has_own_ids() {
            self.heads.generate(&table.prefix)?;
        }
        let table = Arc::new(table.clone());
        let units: Vec<Vec<Unit>> =
            rows.par_iter().enumerate().map(|(at, row)| source.units(&table, first + at, row)).collect();
        for unit in units.into_iter().flatten() {
            self.take(framer, unit)?;
        }
        self.state = State::Open;
        Ok(&self.progress)
    }

    /// The counts so far.
    #[must_use]
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Take over a unit, cut where a shard ends.
    fn take(&mut self, framer: &Framer, mut unit: Unit) -> Result<()> {
        if unit.source.has_own_ids() && !matches!(unit.body, Body::Bad(_)) {
            self.heads.give(&unit.id).map_err(|error| unit.error(0, error))?;
        }
        if unit.source.has_own_ids() {
            let layers = unit.source.layers_per_example.unwrap_or(self.common.layers_per_example);
            if let Err(error) = self.given.give(&unit.id, layers == LayersPerExample::Each) {
                unit.body = Body::Bad(unit.error(0, error));
            }
        }
        while !unit.examples.is_empty() {
            let room = self.examples_per_shard - self.progress.offered % self.examples_per_shard;
            let here = unit.split_front(room);
            let shard = self.progress.offered / self.examples_per_shard;
            self.progress.offered += here.examples.len();
            if self.is_wanted(shard) {
                self.pending.push(here);
            } else {
                self.progress.skipped += here.examples.len();
            }
            if self.progress.offered.is_multiple_of(self.examples_per_shard) {
                self.close(framer, shard)?;
            }
        }
        Ok(())
    }

    fn is_wanted(&self, shard: usize) -> bool {
        self.folder.part.has(shard) && !self.done.contains_key(&shard)
    }

    /// Build the pending shard and have it written while the next one is built.
    fn close(&mut self, framer: &Framer, number: usize) -> Result<()> {
        let units = std::mem::take(&mut self.pending);
        if !self.is_wanted(number) {
            return Ok(());
        }
        let blocks = build(framer, &self.prompts, &self.common, &units);
        self.flush()?;
        let errors = || blocks.iter().flat_map(|block| &block.errors);
        if let Some(wrong) = errors().find(|error| error.is_of_settings()) {
            return Err(wrong.again());
        }
        let first = errors().next().map(Error::again);
        for error in errors() {
            self.num_errors += 1;
            if self.progress.messages.len() < MESSAGES {
                self.progress.messages.push(error.to_string());
            }
        }
        if let Some(first) = first
            && self.num_errors > self.max_errors
        {
            return Err(self.too_many_errors(first));
        }
        let (identity, path) = (self.folder.identity.clone(), self.folder.path.join(shard_name(number)));
        self.writing = Some(std::thread::spawn(move || write(&identity, &path, number, units, &blocks)));
        Ok(())
    }

    fn too_many_errors(&self, first: Error) -> Error {
        if self.max_errors == 0 {
            return first;
        }
        Error::input(format!(
            "{} rows cannot be used, more than the {} that are passed over with --max-errors; the last shard's first: {first}",
            self.num_errors, self.max_errors
        ))
    }

    /// Wait for the shard that is being written.
    fn flush(&mut self) -> Result<()> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let entry = writing.join().map_err(|_| Error::input("the thread that writes shards has panicked"))??;
        self.progress.stats.add(&entry.stats);
        self.done.insert(entry.number, entry);
        Ok(())
    }

    /// Write the last shard and the manifest, or what stands for it until all parts are there, and return its text.
    ///
    /// # Errors
    /// If nothing was kept, an error came before, or a file cannot be written.
    pub fn finish(&mut self, framer: &Framer) -> Result<String> {
        self.require_open()?;
        self.state = State::Failed;
        let offered = self.progress.offered;
        if !offered.is_multiple_of(self.examples_per_shard) {
            self.close(framer, offered / self.examples_per_shard)?;
        }
        self.flush()?;
        let num_shards = offered.div_ceil(self.examples_per_shard);
        let text = self.folder.finish(num_shards, &self.done)?;
        self.state = State::Finished;
        Ok(text)
    }

    fn require_open(&self) -> Result<()> {
        match self.state {
            State::Open => Ok(()),
            State::Failed => Err(Error::input(
                "this writer stopped at an error; make a new one and add everything again, finished shards are kept",
            )),
            State::Finished => Err(Error::input("this writer has finished; make a new one")),
        }
    }
}

/// What stands before the first "/" of ids: of those that examples were given, and of those that sources make. As no
/// head is among both, no id is, and the made ones need not be remembered.
#[derive(Default)]
struct Heads {
    given: HashSet<u128>,
    made: HashSet<u128>,
}

impl Heads {
    /// A source makes ids that begin with `prefix`.
    fn generate(&mut self, prefix: &str) -> Result<()> {
        let head = prefix.split_once('/').map_or(prefix, |(head, _)| head);
        let key = xxh3_128(head.as_bytes());
        self.made.insert(key);
        if self.given.contains(&key) { Err(Self::collision(head)) } else { Ok(()) }
    }

    /// An example was given the id `id`.
    fn give(&mut self, id: &str) -> Result<()> {
        let Some((head, _)) = id.split_once('/') else { return Ok(()) };
        let key = xxh3_128(head.as_bytes());
        self.given.insert(key);
        if self.made.contains(&key) { Err(Self::collision(head)) } else { Ok(()) }
    }

    fn collision(head: &str) -> Error {
        let prefix = format!("{head}/");
        Error::settings(format!(
            "records have ids that begin with {prefix:?}, as those do which the source {head:?} makes; ids must be \
             unique in a data set, so rename the source, or the records"
        ))
    }
}

/// The ids that examples were given, as hashes.
#[derive(Default)]
struct Given {
    /// The lowest bit says whether the example makes a datapoint for each layer.
    ids: HashSet<u128>,
    /// What stands before the `@L2` of ids of other examples.
    stems: HashSet<u128>,
}

impl Given {
    /// An example was given the id `id`, which no other example may have, and no datapoint of another one.
    fn give(&mut self, id: &str, is_one_per_layer: bool) -> Result<()> {
        let key = |text: &str, is_one_per_layer| xxh3_128(text.as_bytes()) & !1 | u128::from(is_one_per_layer);
        if [false, true].iter().any(|&either| self.ids.contains(&key(id, either))) {
            return Err(Error::RepeatedId);
        }
        self.ids.insert(key(id, is_one_per_layer));
        let collides = if is_one_per_layer {
            self.stems.contains(&key(id, false))
        } else if let Some(stem) = stem(id) {
            self.stems.insert(key(stem, false));
            self.ids.contains(&key(stem, true))
        } else {
            false
        };
        if !collides {
            return Ok(());
        }
        let what = if is_one_per_layer {
            format!(
                "its datapoints get {:?} and their layer as ids, and another example has such an id",
                format!("{id}@L")
            )
        } else {
            format!("another example makes a datapoint for each layer, and their ids are of this form: {id:?}")
        };
        Err(Error::value("duplicate_id", format!("{what}; rename one of the two")))
    }
}

/// What stands before `@L` and a number at the end of an id.
fn stem(id: &str) -> Option<&str> {
    let (stem, layer) = id.rsplit_once("@L")?;
    (!layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit())).then_some(stem)
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        // Whoever removes or renames the folder next must not meet a file that is still being written.
        if let Some(writing) = self.writing.take() {
            let _ = writing.join();
        }
    }
}

/// Lay a shard out and write it. The units go with it, so that they are freed while the next ones are built.
fn write(identity: &Identity, path: &Path, number: usize, units: Vec<Unit>, blocks: &[Block]) -> Result<ShardEntry> {
    drop(units);
    let (columns, mut stats) = gather(blocks);
    let bytes = shard::encode(&columns, &mut stats, |stats| identity.header(number, stats))?;
    write_atomic(path, &bytes)?;
    Ok(ShardEntry { number, sha256: sha256_hex(&bytes), bytes: bytes.len() as u64, stats })
}
