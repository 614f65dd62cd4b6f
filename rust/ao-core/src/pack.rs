//! The writer of packed data sets: examples in, shards and a manifest out.
//!
//! Examples are built in parallel and taken in order, so the bytes depend on the input alone. The manifest is written
//! last: where it stands, the data set is whole.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::{Value, json};
use xxhash_rust::xxh3::xxh3_128;

use crate::datapoint::{Common, Datapoint, Outcome, Source, build};
use crate::error::{Error, Result};
use crate::example::Example;
use crate::frame::Framer;
use crate::manifest::{canonical_json, sha256_hex, write_atomic};
use crate::settings::PackSettings;
use crate::shard;

/// How many lines are built before their datapoints are taken over, whatever the number of threads.
const LINES_AT_ONCE: usize = 4096;

const MANIFEST: &str = "manifest.json";

/// What has been written so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Examples kept.
    pub examples: usize,
    /// Datapoints made of them.
    pub datapoints: usize,
    /// Tokens of their inputs.
    pub tokens: usize,
    /// Examples left out, by reason.
    pub drops: BTreeMap<String, usize>,
}

/// Writes a packed data set into one folder.
pub struct PackWriter {
    common: Common,
    settings: PackSettings,
    counts: Counts,
    per_source: BTreeMap<String, usize>,
    lines: BTreeMap<String, usize>,
    seen: HashSet<u128>,
    pending: Batch,
    full: Vec<Batch>,
    output: Output,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Open,
    Failed,
    Finished,
}

/// What becomes one shard.
#[derive(Default)]
struct Batch {
    examples: usize,
    datapoints: Vec<Datapoint>,
}

impl PackWriter {
    /// Start a data set in `folder`, which is made if it is not there.
    ///
    /// The settings are a JSON object of `seed`, `num_layers`, `read_layers` (indices), `layers_per_example` (`each`,
    /// `one`, `together`), `examples_per_shard`, `max_input_tokens`, `max_context_tokens`, and of what the manifest
    /// records: `oracle`, `targets`, `config`.
    ///
    /// # Errors
    /// If a setting is unknown or out of range, or the folder cannot be made.
    pub fn new(folder: &Path, framer: &Framer, settings_json: &str) -> Result<Self> {
        let settings: PackSettings = serde_json::from_str(settings_json).map_err(Error::settings)?;
        let common = settings.common()?;
        let fingerprints = json!({
            "framer": framer.fingerprint(),
            "oracle": settings.oracle,
            "targets": settings.targets,
        });
        Ok(Self {
            common,
            settings,
            counts: Counts::default(),
            per_source: BTreeMap::new(),
            lines: BTreeMap::new(),
            seen: HashSet::new(),
            pending: Batch::default(),
            full: Vec::new(),
            output: Output::new(folder, fingerprints)?,
            state: State::Open,
        })
    }

    /// Add the examples of one source, one JSON object per line, with the same `framer` every time. Full shards are
    /// written while the next examples are built.
    ///
    /// # Errors
    /// If an example cannot be used or a shard cannot be written. After such an error the writer refuses further work:
    /// the folder holds whole shards at most, and no manifest.
    pub fn add(&mut self, framer: &Framer, source_json: &str, examples_jsonl: &[u8]) -> Result<Counts> {
        self.require_open()?;
        let source = Source::from_json(source_json)?;
        self.state = State::Failed;
        let lines: Vec<&[u8]> = examples_jsonl.split(|&byte| byte == b'\n').collect();
        let before = self.lines.get(&*source.name).copied().unwrap_or(0);
        for (chunk_at, chunk) in lines.chunks(LINES_AT_ONCE).enumerate() {
            let first = before + chunk_at * LINES_AT_ONCE + 1;
            let full = std::mem::take(&mut self.full);
            let (common, output) = (&self.common, &mut self.output);
            let (built, written) =
                rayon::join(|| Built::from_lines(framer, common, &source, first, chunk), || output.write(&full));
            written?;
            for built in built {
                self.take(&source, built)?;
            }
        }
        // The text behind the last newline is a line only if there is any.
        let count = lines.len() - usize::from(lines.last().is_some_and(|line| line.is_empty()));
        *self.lines.entry(source.name.to_string()).or_default() += count;
        self.state = State::Open;
        Ok(self.counts.clone())
    }

    fn take(&mut self, source: &Source, built: Built) -> Result<()> {
        let id = built.id?;
        if !self.seen.insert(xxh3_128(id.as_bytes())) {
            let error = Error::input("the id was used before; ids must be unique in a data set");
            return Err(error.in_example(&source.name, &id));
        }
        let datapoints = match built.outcome? {
            Outcome::Kept(datapoints) => datapoints,
            Outcome::Dropped(reason) => {
                *self.counts.drops.entry(reason.to_owned()).or_default() += 1;
                return Ok(());
            }
        };
        self.counts.examples += 1;
        self.counts.datapoints += datapoints.len();
        self.counts.tokens += datapoints.iter().map(|datapoint| datapoint.input_ids.len()).sum::<usize>();
        for datapoint in &datapoints {
            *self.per_source.entry(datapoint.source.to_string()).or_default() += 1;
        }
        self.pending.examples += 1;
        self.pending.datapoints.extend(datapoints);
        if self.pending.examples == self.settings.examples_per_shard {
            self.full.push(std::mem::take(&mut self.pending));
        }
        Ok(())
    }

    /// Write the last shard and the manifest, and return the manifest's text.
    ///
    /// # Errors
    /// If nothing was kept, an error came before, or a file cannot be written.
    pub fn finish(&mut self) -> Result<String> {
        self.require_open()?;
        if self.counts.datapoints == 0 {
            return Err(Error::input(format!(
                "no example was kept, so there is nothing to pack; drops by reason: {:?}",
                self.counts.drops
            )));
        }
        self.state = State::Failed;
        let mut full = std::mem::take(&mut self.full);
        if self.pending.examples > 0 {
            full.push(std::mem::take(&mut self.pending));
        }
        self.output.write(&full)?;
        let manifest = canonical_json(&json!({
            "schema": shard::SCHEMA,
            "kind": "packed",
            "framer": self.output.fingerprints["framer"],
            "oracle": self.settings.oracle,
            "targets": self.settings.targets,
            "shards": self.output.shards,
            "counts": {
                "examples": self.counts.examples,
                "datapoints": self.counts.datapoints,
                "tokens": self.counts.tokens,
                "sources": self.per_source,
            },
            "drops": self.counts.drops,
            "config": self.settings.config,
        }));
        self.output.finish(&manifest)?;
        self.state = State::Finished;
        Ok(manifest)
    }

    fn require_open(&self) -> Result<()> {
        match self.state {
            State::Open => Ok(()),
            State::Failed => {
                Err(Error::input("this writer stopped at an error; make a new one and add everything again"))
            }
            State::Finished => Err(Error::input("this writer has finished; make a new one")),
        }
    }
}

/// The folder and what has been written into it.
struct Output {
    folder: PathBuf,
    fingerprints: Value,
    shards: Vec<Value>,
}

impl Output {
    fn new(folder: &Path, fingerprints: Value) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(|error| Error::io(folder, "creating the folder", error))?;
        Ok(Self { folder: folder.to_owned(), fingerprints, shards: Vec::new() })
    }

    /// Write the next shards. An older manifest goes first: it would vouch for files that change under it.
    fn write(&mut self, batches: &[Batch]) -> Result<()> {
        for batch in batches {
            if self.shards.is_empty() {
                self.remove(MANIFEST)?;
            }
            let file = shard_name(self.shards.len());
            let bytes = shard::encode(&batch.datapoints, &self.fingerprints)?;
            write_atomic(&self.folder.join(&file), &bytes)?;
            self.shards.push(json!({
                "file": file,
                "sha256": sha256_hex(&bytes),
                "bytes": bytes.len(),
                "datapoints": batch.datapoints.len(),
                "examples": batch.examples,
            }));
        }
        Ok(())
    }

    /// Remove the further shards of a longer data set that was here before, and write the manifest.
    fn finish(&self, manifest: &str) -> Result<()> {
        for number in self.shards.len().. {
            if !self.remove(&shard_name(number))? {
                break;
            }
        }
        write_atomic(&self.folder.join(MANIFEST), manifest.as_bytes())
    }

    fn remove(&self, name: &str) -> Result<bool> {
        let path = self.folder.join(name);
        match std::fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io(&path, "removing", error)),
        }
    }
}

fn shard_name(number: usize) -> String {
    format!("shard-{number:05}.safetensors")
}

/// What became of one line.
struct Built {
    id: Result<String>,
    outcome: Result<Outcome>,
}

impl Built {
    /// Build the examples of `lines`, of which the first has number `first`, in order.
    fn from_lines(framer: &Framer, common: &Common, source: &Source, first: usize, lines: &[&[u8]]) -> Vec<Self> {
        lines
            .par_iter()
            .enumerate()
            .filter_map(|(at, line)| Self::from_line(framer, common, source, first + at, line))
            .collect()
    }

    /// Build the example of a line; `None` if the line is blank.
    fn from_line(framer: &Framer, common: &Common, source: &Source, number: usize, line: &[u8]) -> Option<Self> {
        if line.trim_ascii().is_empty() {
            return None;
        }
        let example: Example = match serde_json::from_slice(line) {
            Ok(example) => example,
            Err(error) => {
                let id = Err(Error::Line { origin: source.name.to_string(), line: number, what: error.to_string() });
                return Some(Self { id, outcome: Ok(Outcome::Dropped("unreadable")) });
            }
        };
        let id = example.id.clone();
        let outcome = build(framer, common, source, example).map_err(|error| error.in_example(&source.name, &id));
        Some(Self { id: Ok(id), outcome })
    }
}
