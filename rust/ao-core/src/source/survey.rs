//! The survey: one pass over all rows of a source, for what no single row can tell.

use std::collections::BTreeSet;
use std::sync::Arc;

use rayon::prelude::*;

use super::classification::Surveyed;
use super::{Body, Kind, RowPlace, Source};
use crate::error::Result;
use crate::rows::Table;

/// A source whose rows are being seen.
pub struct Survey {
    source: Arc<Source>,
    /// What decides which examples are among the `count`; empty without one.
    keys: Vec<u64>,
    labels: BTreeSet<Arc<str>>,
    /// What has which label, by its key.
    labelled: Vec<(u128, Arc<str>)>,
    pairs: Vec<(String, String, String)>,
}

impl Survey {
    /// Begin with a source's settings, as JSON.
    ///
    /// # Errors
    /// If a field is unknown, missing for the kind or out of range.
    pub fn new(settings_json: &str) -> Result<Self> {
        let source = Arc::new(Source::unsurveyed(settings_json)?);
        Ok(Self { source, keys: Vec::new(), labels: BTreeSet::new(), labelled: Vec::new(), pairs: Vec::new() })
    }

    /// Whether the rows have to be shown at all.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.source.needs_survey()
    }

    /// See rows, of which the first has number `first`. A row that cannot be read says so when it is packed.
    pub fn add(&mut self, table: &Table, first: usize, rows: &[&[u8]]) {
        let source = &self.source;
        let table = &Arc::new(table.clone());
        if source.count.is_some() {
            let keys: Vec<Vec<u64>> =
                rows.par_iter().enumerate().map(|(at, row)| source.keys(table, first + at, row)).collect();
            self.keys.extend(keys.into_iter().flatten());
        }
        if source.lacks_labels()
            && let Kind::Classification(classification) = &source.kind
        {
            let found: Vec<Surveyed> = rows
                .par_iter()
                .enumerate()
                .filter_map(|(at, row)| {
                    classification.survey(&RowPlace { source, table, number: first + at }, row).ok()
                })
                .collect();
            for found in found {
                match found {
                    Surveyed::Label(label, keys) => {
                        let label: Arc<str> = self.labels.get(&*label).cloned().unwrap_or_else(|| Arc::from(label));
                        self.labels.insert(Arc::clone(&label));
                        self.labelled.extend(keys.into_iter().map(|key| (key, Arc::clone(&label))));
                    }
                    Surveyed::Pair(subject, object) => {
                        self.labels.extend(["false", "true"].map(Arc::from));
                        self.pairs.push((table.prefix.clone(), subject, object));
                    }
                }
            }
        }
    }

    /// The source, and how many examples its rows will give where that is known: with a `count`.
    ///
    /// # Errors
    /// If a question needs a wrong label, and the rows have none.
    pub fn settle(self) -> Result<(Source, Option<usize>)> {
        let Self { source, mut keys, labels, labelled, pairs } = self;
        let mut source = Arc::into_inner(source).expect("no unit of a survey outlives the call that made it");
        if source.lacks_labels()
            && let Kind::Classification(classification) = &source.kind
        {
            source.labels = std::mem::take(&mut source.labels).surveyed(classification, labels, labelled, pairs);
        }
        if let Kind::Classification(classification) = &source.kind {
            classification.require_wrong(&source.labels).map_err(|error| error.in_settings_of(&source.name))?;
        }
        let Some(count) = source.count else { return Ok((source, None)) };
        let examples = count.min(keys.len());
        source.greatest_key =
            Some(if examples == keys.len() { u64::MAX } else { *keys.select_nth_unstable(examples - 1).1 });
        Ok((source, Some(examples)))
    }
}

impl Source {
    /// The keys of a row's examples; those that are dropped whatever is drawn have none.
    fn keys(self: &Arc<Self>, table: &Arc<Table>, number: usize, row: &[u8]) -> Vec<u64> {
        if row.trim_ascii().is_empty() {
            return Vec::new();
        }
        let id = format!("{}/{number}", table.prefix);
        let fixed = |of: &[&str], count: u32| -> Vec<u64> {
            of.iter()
                .flat_map(|part| (0..count).map(|at| self.key(&format!("{id}{part}/{at}"))).collect::<Vec<_>>())
                .collect()
        };
        match &self.kind {
            // Whether such a row can be read does not matter to its examples' ids.
            Kind::ContextPrediction(documents) => fixed(&[""], documents.draws_per_text),
            Kind::Classification(classification) if !classification.leaves_out_any() => {
                let texts: &[&str] = if table.templates.is_some() { &["/true", "/false"] } else { &[""] };
                fixed(texts, classification.questions_per_text)
            }
            Kind::Records | Kind::LatentQa(_) | Kind::Classification(_) => self
                .all_units(table, number, row)
                .iter()
                .filter(|unit| !matches!(unit.body, Body::Dropped(_)))
                .flat_map(|unit| unit.examples.iter().map(|&at| self.key(&self.example_id(&unit.id, at))))
                .collect(),
        }
    }
}
