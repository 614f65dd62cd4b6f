//! Classification: labelled texts, asked as Yes/No questions about a label or by naming the label.
//!
//! A row is a text with its label, or, in a relation file, a subject with its object, which makes a true and a false
//! statement. The text is a user's turn of which the content alone is read.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::{About, Asked, RowPlace, Source, strip, user_turn};
use crate::datapoint::Question;
use crate::error::{Error, Result};
use crate::example::Kind;
use crate::manifest::canonical_json;
use crate::sample::Draws;

/// Where a question shows the label that it asks about, and its key.
const SLOT: &str = "{label}";
const SLOT_KEY: &str = "label";

/// How a source of labelled texts asks.
#[derive(Debug)]
pub(crate) struct Classification {
    /// A key, or a template with keys in braces.
    pub(crate) text: String,
    pub(crate) label: String,
    pub(crate) questions: Vec<String>,
    /// The wordings of each label; none: as it stands.
    pub(crate) labels: BTreeMap<String, Vec<String>>,
    pub(crate) prefix: String,
    pub(crate) questions_per_text: u32,
}

/// The units of a row: id, numbers of their examples, and the context, or none where the label is left out.
pub(super) type Units = Vec<(String, Vec<u32>, Option<Asked>)>;

/// What a text is asked besides its label: the values of the keys that stand in questions.
pub(crate) type Columns = BTreeMap<String, String>;

/// The labels of a source, and of each relation file what is true of whom.
#[derive(Debug, Default)]
pub(crate) struct Labels {
    known: bool,
    /// All labels, sorted.
    all: Vec<String>,
    relations: BTreeMap<String, Relation>,
}

/// One relation file.
#[derive(Debug, Default)]
struct Relation {
    objects: BTreeSet<String>,
    right: BTreeMap<String, BTreeSet<String>>,
}

impl Labels {
    /// The labels where they are given beforehand.
    pub(super) fn known(words: Option<Vec<String>>) -> Self {
        let known = words.is_some();
        let all: BTreeSet<String> = words.into_iter().flatten().collect();
        Self { known, all: all.into_iter().collect(), relations: BTreeMap::new() }
    }

    pub(super) fn are_known(&self) -> bool {
        self.known
    }

    /// What a survey found.
    pub(super) fn from_survey(found: BTreeSet<String>, pairs: Vec<(String, String, String)>) -> Self {
        let mut relations: BTreeMap<String, Relation> = BTreeMap::new();
        for (prefix, subject, object) in pairs {
            let relation = relations.entry(prefix).or_default();
            relation.right.entry(subject).or_default().insert(object.clone());
            relation.objects.insert(object);
        }
        Self { known: true, all: found.into_iter().collect(), relations }
    }
}

/// What a survey needs to know of a row.
pub(super) enum Surveyed {
    Label(String),
    Pair(String, String),
}

impl Classification {
    /// Whether rows of some label are left out: one that `labels` gives no wording.
    pub(super) fn leaves_out(&self, label: &str) -> bool {
        self.labels.get(label).is_some_and(Vec::is_empty)
    }

    pub(super) fn leaves_out_any(&self) -> bool {
        self.labels.values().any(Vec::is_empty)
    }

    /// The units of a row.
    pub(super) fn asked(&self, place: &RowPlace<'_>, id: &str, row: &[u8]) -> Result<Units> {
        let row: Map<String, Value> = place.parse(row)?;
        let examples: Vec<u32> = (0..self.questions_per_text).collect();
        let unit = |id: String, text: &str, label: &str| {
            if self.leaves_out(label) {
                return Ok((id, vec![0], None));
            }
            let (context, read) = user_turn(text);
            let about = About::Label { columns: self.columns_of(place, &row)? };
            let asked = Asked { context, read: Some(read), label: Some(label.to_owned()), about };
            Ok((id, examples.clone(), Some(asked)))
        };
        let Some(templates) = &place.table.templates else {
            let (text, label) = (self.text_of(place, &row)?, self.label_of(place, &row)?);
            return Ok(vec![unit(id.to_owned(), &text, &label)?]);
        };
        let [right, wrong] = statements(place, id, &row, templates)?;
        Ok(vec![unit(format!("{id}/true"), &right, "true")?, unit(format!("{id}/false"), &wrong, "false")?])
    }

    pub(super) fn survey(&self, place: &RowPlace<'_>, row: &[u8]) -> Result<Surveyed> {
        let row: Map<String, Value> = place.parse(row)?;
        if place.table.templates.is_some() {
            return Ok(Surveyed::Pair(place.text(&row, "subject")?, place.text(&row, "object")?));
        }
        self.label_of(place, &row).map(Surveyed::Label)
    }

    fn text_of(&self, place: &RowPlace<'_>, row: &Map<String, Value>) -> Result<String> {
        if !self.text.contains('{') {
            return place.text(row, &self.text);
        }
        let mut text = String::new();
        let mut rest = self.text.as_str();
        while let Some((before, behind)) = rest.split_once('{') {
            let (key, after) = behind
                .split_once('}')
                .ok_or_else(|| Error::settings(format!("\"text\" is {:?}, where a brace is not closed", self.text)))?;
            text.push_str(before);
            text.push_str(&place.text(row, key)?);
            rest = after;
        }
        text.push_str(rest);
        Ok(strip(&text).to_owned())
    }

    /// What the questions show of the row, other than its label.
    fn columns_of(&self, place: &RowPlace<'_>, row: &Map<String, Value>) -> Result<Columns> {
        let mut columns = Columns::new();
        for piece in self.questions.iter().flat_map(|question| pieces(question)) {
            if let Piece::Key(key) = piece
                && key != SLOT_KEY
                && !columns.contains_key(key)
            {
                columns.insert(key.to_owned(), place.text(row, key)?);
            }
        }
        Ok(columns)
    }

    fn label_of(&self, place: &RowPlace<'_>, row: &Map<String, Value>) -> Result<String> {
        let value = place.field(row, &self.label)?;
        let label = match value {
            Value::String(text) => strip(text).to_owned(),
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            _ => String::new(),
        };
        if label.is_empty() {
            return Err(place.error("bad_field", format!("key {:?}: expected a label, got {value}", self.label)));
        }
        if !self.labels.is_empty() && !self.labels.contains_key(&label) {
            let known: Vec<&String> = self.labels.keys().collect();
            return Err(place.error("bad_field", format!("label {label:?} has no wording; \"labels\" has {known:?}")));
        }
        Ok(label)
    }

    pub(super) fn question(
        &self,
        source: &Source,
        text_id: &str,
        id: String,
        at: u32,
        label: &str,
        columns: &Columns,
    ) -> Result<Question> {
        let mut order: Vec<usize> = (0..self.questions.len()).collect();
        Draws::new(source.seed, text_id, "templates").shuffle(&mut order);
        let template = &self.questions[order[at as usize % order.len()]];
        let (question, answer) = if template.contains(SLOT) {
            let mut draws = Draws::new(source.seed, &id, "label");
            let is_right = draws.below(2) == 0;
            let asked = if is_right { label } else { self.other(label, &source.labels, &mut draws)? };
            let answer = if is_right { "Yes" } else { "No" };
            (filled(template, columns, self.wording(source, &id, asked)), answer)
        } else {
            (filled(template, columns, ""), self.wording(source, &id, label))
        };
        Ok(Question {
            source: source.name.clone(),
            text: format!("{}{question}", self.prefix),
            answer: answer.to_owned(),
            layers: None,
            target: Kind::Base,
            meta: canonical_json(&json!({"label": label})),
            id,
        })
    }

    /// Another label than `own`, all others alike; one that is worded like `own` is no other.
    fn other<'a>(&self, own: &str, labels: &'a Labels, draws: &mut Draws) -> Result<&'a str> {
        let worded_alike = |label: &str| match (self.labels.get(own), self.labels.get(label)) {
            (Some(own), Some(other)) => own.iter().any(|word| other.contains(word)),
            _ => label == own,
        };
        let others: Vec<&str> = labels
            .all
            .iter()
            .map(String::as_str)
            .filter(|label| !self.leaves_out(label) && !worded_alike(label))
            .collect();
        if others.is_empty() {
            return Err(Error::settings(format!(
                "a question with {SLOT} needs two labels or more, got only {own:?}; give \"labels\" or other questions"
            )));
        }
        Ok(others[draws.below(others.len() as u64) as usize])
    }

    /// How `label` is worded for the example `id`.
    fn wording<'a>(&'a self, source: &Source, id: &str, label: &'a str) -> &'a str {
        match self.labels.get(label).map(Vec::as_slice) {
            None | Some([]) => label,
            Some([only]) => only,
            Some(several) => &several[Draws::new(source.seed, id, "phrasing").below(several.len() as u64) as usize],
        }
    }
}

/// A template with its keys filled in, in one pass: braces in a value mean nothing.
fn filled(template: &str, columns: &Columns, label: &str) -> String {
    pieces(template)
        .map(|piece| match piece {
            Piece::Text(text) => text,
            Piece::Key(SLOT_KEY) => label,
            Piece::Key(key) => columns.get(key).map_or("", String::as_str),
        })
        .collect()
}

enum Piece<'a> {
    Text(&'a str),
    Key(&'a str),
}

/// The pieces of a template: a key is what stands between a brace and the next one, if that one closes it.
fn pieces(template: &str) -> impl Iterator<Item = Piece<'_>> {
    let mut rest = template;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let brace = |text: &str| text.find(['{', '}']);
        if let Some(behind) = rest.strip_prefix('{')
            && let Some(end) = brace(behind).filter(|&end| end > 0 && behind[end..].starts_with('}'))
        {
            rest = &behind[end + 1..];
            return Some(Piece::Key(&behind[..end]));
        }
        let begin = rest.chars().next().map_or(0, char::len_utf8);
        let end = rest[begin..].find('{').map_or(rest.len(), |end| begin + end);
        let (text, after) = rest.split_at(end);
        rest = after;
        Some(Piece::Text(text))
    })
}

/// A true and a false statement of a subject.
fn statements(place: &RowPlace<'_>, id: &str, row: &Map<String, Value>, templates: &[String]) -> Result<[String; 2]> {
    let seed = place.source.seed;
    let (subject, object) = (place.text(row, "subject")?, place.text(row, "object")?);
    let drawn = Draws::new(seed, id, "relation").below(templates.len().max(1) as u64) as usize;
    let template = templates.get(drawn).filter(|template| template.contains("{}")).ok_or_else(|| {
        place.error("bad_field", format!("expected templates with {{}} for the subject, got {templates:?}"))
    })?;
    let filled = template.replacen("{}", &subject, 1);
    let none = Relation::default();
    let relation = place.source.labels.relations.get(&place.table.prefix).unwrap_or(&none);
    let right = relation.right.get(&subject);
    let wrong: Vec<&String> =
        relation.objects.iter().filter(|other| right.is_none_or(|right| !right.contains(*other))).collect();
    if wrong.is_empty() {
        let what = format!("no other object than {object:?} to make a false statement of");
        return Err(place.error("bad_field", what));
    }
    let other = wrong[Draws::new(seed, id, "wrong_object").below(wrong.len() as u64) as usize];
    Ok([&object, other].map(|object| format!("{} {object}.", strip(&filled))))
}
