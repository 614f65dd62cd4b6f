//! Sources: rows of a file in, units out, a unit being one context with the examples that ask about it.
//!
//! Everything that an example draws is keyed by the seed and its id, so no row depends on another. What needs all rows
//! at once, the examples of a `count` and the set of labels, comes from a survey before the rows are packed.

mod classification;
mod context_prediction;
mod latentqa;
mod records;
mod survey;

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::de::DeserializeOwned;

pub use survey::Survey;

pub(crate) use classification::Classification;
use classification::Labels;
pub(crate) use context_prediction::Documents;
pub(crate) use latentqa::LatentQa;

use crate::datapoint::{LayersPerExample, Question, Share};
use crate::error::{Error, Result};
use crate::example::{Context, Read};
use crate::lens::LensSettings;
use crate::rows::Table;
use crate::sample::Draws;
use crate::settings::SourceSettings;

/// What a source's rows are.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Complete examples.
    Records,
    /// Texts and chats that are asked about their own tokens.
    ContextPrediction(Documents),
    /// Labelled texts.
    Classification(Classification),
    /// Stimuli with labels.
    LatentQa(LatentQa),
}

/// How many of a source's examples read another's context, and what they answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Unanswerable {
    pub(crate) share: f64,
    pub(crate) answer: String,
}

/// One source of examples.
#[derive(Debug)]
pub struct Source {
    /// Its name, where an example does not say its own.
    pub name: Arc<str>,
    pub(crate) seed: u64,
    pub(crate) kind: Kind,
    pub(crate) reads: Vec<Share>,
    pub(crate) layers_per_example: Option<LayersPerExample>,
    pub(crate) unanswerable: Option<Unanswerable>,
    count: Option<usize>,
    /// Found by the survey: the greatest key that an example of the `count` has.
    greatest_key: Option<u64>,
    /// Found by the survey, or given: the labels.
    labels: Labels,
}

/// One context and the examples that ask about it.
pub(crate) struct Unit {
    pub(crate) source: Arc<Source>,
    /// What the examples' ids begin with; of records, the whole id.
    pub(crate) id: String,
    /// Which of the row's examples are meant, as numbers within the row.
    pub(crate) examples: Vec<u32>,
    pub(crate) body: Body,
    /// Where the row stands that it was made from.
    table: Arc<Table>,
    row: usize,
}

impl Unit {
    /// Take the first `most` examples off this unit.
    pub(crate) fn split_front(&mut self, most: usize) -> Self {
        let rest = self.examples.split_off(most.min(self.examples.len()));
        let body = match &self.body {
            Body::Context(asked) => Body::Context(Arc::clone(asked)),
            Body::Dropped(reason) => Body::Dropped(reason),
            Body::Bad(error) => Body::Bad(error.again()),
        };
        let examples = std::mem::replace(&mut self.examples, rest);
        let (source, table) = (Arc::clone(&self.source), Arc::clone(&self.table));
        Self { source, id: self.id.clone(), examples, body, table, row: self.row }
    }

    /// What is wrong with example `at`, naming it and its place.
    pub(crate) fn error(&self, at: u32, error: Error) -> Error {
        error.in_example(&self.source.name, &self.table.place(self.row), &self.source.example_id(&self.id, at))
    }
}

/// What a row holds.
pub(crate) enum Body {
    /// A context with its questions.
    Context(Arc<Asked>),
    /// Nothing to ask, for this reason.
    Dropped(&'static str),
    /// A row that cannot be read.
    Bad(Error),
}

/// A context, what may be read of it, and what is asked.
pub(crate) struct Asked {
    pub(crate) context: Context,
    pub(crate) read: Option<Vec<Read>>,
    /// What tells this context from others that the same question could be about.
    pub(crate) label: Option<String>,
    pub(crate) about: About,
}

/// What the questions of a row are made from.
pub(crate) enum About {
    Record(Box<records::Record>),
    Tokens,
    Label(classification::Shown),
    Stimulus { kind: String },
}

impl Source {
    /// Read a source's settings from JSON, for a source that needs no survey.
    ///
    /// # Errors
    /// If a field is unknown, missing for the kind or out of range, or a survey is needed first.
    pub fn from_json(text: &str) -> Result<Self> {
        let source = Self::unsurveyed(text)?;
        if source.needs_survey() {
            return Err(Error::settings(format!(
                "source {:?} has a count or labels that are not given, so its rows must be surveyed before they are packed",
                source.name
            )));
        }
        Ok(source)
    }

    fn unsurveyed(text: &str) -> Result<Self> {
        SourceSettings::from_json(text)?.resolve()
    }

    pub(crate) fn new(name: &str, seed: u64, kind: Kind, reads: Vec<Share>) -> Self {
        Self {
            name: Arc::from(name),
            seed,
            kind,
            reads,
            layers_per_example: None,
            unanswerable: None,
            count: None,
            greatest_key: None,
            labels: Labels::default(),
        }
    }

    /// The same source with what all kinds share.
    pub(crate) fn with(
        mut self,
        count: Option<usize>,
        layers_per_example: Option<LayersPerExample>,
        unanswerable: Option<Unanswerable>,
        words: Option<Vec<String>>,
    ) -> Self {
        self.count = count;
        self.layers_per_example = layers_per_example;
        self.unanswerable = unanswerable;
        if let Kind::Classification(classification) = &self.kind {
            self.labels = classification.labels_before(words);
        }
        self
    }

    /// Whether its rows must be seen once before they can be packed.
    #[must_use]
    pub fn needs_survey(&self) -> bool {
        (self.count.is_some() && self.greatest_key.is_none()) || self.lacks_labels()
    }

    fn lacks_labels(&self) -> bool {
        !self.labels.are_known() && matches!(&self.kind, Kind::Classification(_))
    }

    pub(crate) fn documents(&self) -> Option<&LensSettings> {
        match &self.kind {
            Kind::ContextPrediction(documents) => Some(&documents.lens),
            _ => None,
        }
    }

    /// Whether the answers are few enough to count each.
    pub(crate) fn counts_answers(&self) -> bool {
        matches!(self.kind, Kind::Classification(_))
    }

    /// Whether ids are given by whoever wrote the rows, and not made from their numbers.
    pub(crate) fn has_own_ids(&self) -> bool {
        matches!(self.kind, Kind::Records)
    }

    /// The units of row `number`, of which only the examples of the `count` are kept; a unit without any is left out.
    pub(crate) fn units(self: &Arc<Self>, table: &Arc<Table>, number: usize, row: &[u8]) -> Vec<Unit> {
        let mut units = self.all_units(table, number, row);
        if let Some(greatest) = self.greatest_key {
            for unit in &mut units {
                if !matches!(unit.body, Body::Dropped(_)) {
                    unit.examples = std::mem::take(&mut unit.examples)
                        .into_iter()
                        .filter(|&at| self.key(&self.example_id(&unit.id, at)) <= greatest)
                        .collect();
                }
            }
            units.retain(|unit| !unit.examples.is_empty());
        }
        units
    }

    /// The units of row `number` with all their examples; none for a blank row.
    fn all_units(self: &Arc<Self>, table: &Arc<Table>, number: usize, row: &[u8]) -> Vec<Unit> {
        if row.trim_ascii().is_empty() {
            return Vec::new();
        }
        let place = RowPlace { source: self, table, number };
        let id = format!("{}/{number}", table.prefix);
        if table.unreadable {
            let error = place.error("bad_row", String::from_utf8_lossy(row));
            return vec![place.unit(id, vec![0], Body::Bad(error))];
        }
        let parsed = match &self.kind {
            Kind::Records => return vec![records::unit(&place, id, row)],
            Kind::ContextPrediction(documents) => documents
                .asked(&place, row)
                .map(|asked| vec![(id.clone(), (0..documents.draws_per_text).collect(), Some(asked))]),
            Kind::Classification(classification) => classification.asked(&place, &id, row),
            Kind::LatentQa(latentqa) => match latentqa.asked(&place, &id, row) {
                Ok((examples, _)) if examples.is_empty() => {
                    return vec![place.unit(id, vec![0], Body::Dropped("label_without_questions"))];
                }
                other => other.map(|(examples, asked)| vec![(id.clone(), examples, Some(asked))]),
            },
        };
        match parsed {
            Ok(parsed) => parsed
                .into_iter()
                .map(|(id, examples, asked)| {
                    let body = asked.map_or(Body::Dropped("label_left_out"), |asked| Body::Context(Arc::new(asked)));
                    place.unit(id, examples, body)
                })
                .collect(),
            Err(error) => vec![place.unit(id, vec![0], Body::Bad(error))],
        }
    }

    /// The id of example `at` of the unit `id`.
    pub(crate) fn example_id(&self, id: &str, at: u32) -> String {
        if matches!(self.kind, Kind::Records) { id.to_owned() } else { format!("{id}/{at}") }
    }

    /// What decides whether an example is among the `count`.
    fn key(&self, id: &str) -> u64 {
        Draws::new(self.seed, id, "draw").bits()
    }

    /// What example `at` of `unit` is asked.
    pub(crate) fn question(&self, unit: &Unit, asked: &Asked, at: u32) -> Result<Posed> {
        let id = self.example_id(&unit.id, at);
        let label = asked.label.as_deref().unwrap_or_default();
        Ok(match (&self.kind, &asked.about) {
            (Kind::Records, About::Record(record)) => Posed::Written(record.question(self, id)?),
            (Kind::Classification(classification), About::Label(shown)) => classification
                .question(self, &unit.id, id, at, label, shown)
                .map_or(Posed::Dropped("no_wrong_label"), Posed::Written),
            (Kind::LatentQa(latentqa), About::Stimulus { kind }) => {
                Posed::Written(latentqa.question(self, id, at, label, kind))
            }
            _ => Posed::OfTokens,
        })
    }
}

/// What an example is asked.
pub(crate) enum Posed {
    /// A question that was written.
    Written(Question),
    /// One that is made from the tokens.
    OfTokens,
    /// Nothing, for this reason.
    Dropped(&'static str),
}

/// A row while it is read, for messages.
struct RowPlace<'a> {
    source: &'a Arc<Source>,
    table: &'a Arc<Table>,
    number: usize,
}

impl RowPlace<'_> {
    fn unit(&self, id: String, examples: Vec<u32>, body: Body) -> Unit {
        let (source, table) = (Arc::clone(self.source), Arc::clone(self.table));
        Unit { source, id, examples, body, table, row: self.number }
    }

    fn error(&self, reason: &'static str, what: impl std::fmt::Display) -> Error {
        Error::Row {
            origin: self.source.name.to_string(),
            place: self.table.place(self.number),
            reason,
            what: what.to_string(),
        }
    }

    /// The row as `T`.
    fn parse<T: DeserializeOwned>(&self, row: &[u8]) -> Result<T> {
        serde_json::from_slice(row).map_err(|error| {
            // Read again with an eye on the path, which takes longer.
            let again = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_slice(row));
            let path = again.err().map(|error| error.path().to_string());
            self.not_read(&error, path.as_deref())
        })
    }

    /// What serde has to say, without its own idea of lines: a row is one. It names the field only where it is unknown.
    fn not_read(&self, error: &serde_json::Error, path: Option<&str>) -> Error {
        let text = error.to_string();
        let at = format!(" at line {} column {}", error.line(), error.column());
        let what = text.strip_suffix(&at).unwrap_or(&text);
        match error.classify() {
            serde_json::error::Category::Data => {
                let is_named =
                    |path: &str| ["`", "\""].iter().any(|quote| what.contains(&format!("{quote}{path}{quote}")));
                match path.filter(|path| *path != "." && !is_named(path)) {
                    Some(path) => self.error("bad_field", format!("in \"{path}\": {what}")),
                    None => self.error("bad_field", what),
                }
            }
            _ => self.error("not_json", format!("not JSON, from column {} on: {what}", error.column())),
        }
    }

    /// A text field, stripped; it must be there and not be empty.
    fn text(&self, row: &serde_json::Map<String, serde_json::Value>, key: &str) -> Result<String> {
        let value = self.field(row, key)?;
        let text = match value {
            serde_json::Value::String(text) => strip(text),
            _ => "",
        };
        if text.is_empty() {
            return Err(self.error("bad_field", format!("key {key:?}: expected text, got {value}")));
        }
        Ok(text.to_owned())
    }

    fn field<'a>(
        &self,
        row: &'a serde_json::Map<String, serde_json::Value>,
        key: &str,
    ) -> Result<&'a serde_json::Value> {
        row.get(key).ok_or_else(|| {
            let there: BTreeSet<&String> = row.keys().collect();
            self.error("bad_field", format!("key {key:?} is missing; there are {there:?}"))
        })
    }
}

/// `str.strip` of Python.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(crate::template::is_python_space)
}

/// A user's turn that holds `text`, and the read of its whole content.
fn user_turn(text: &str) -> (Context, Vec<Read>) {
    let read = Read { message: Some(0), start: Some(0), end: Some(text.chars().count()), onwards: false };
    (Context::Messages(vec![crate::turns::user(text)]), vec![read])
}
