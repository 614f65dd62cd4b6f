//! Classification: labelled texts, asked as Yes/No questions about a label or by naming the label.
//!
//! A row is a text with its label, or, in a relation file, a subject with its object, which makes a true and a false
//! statement. The text is a user's turn of which the content alone is read.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use rayon::slice::ParallelSliceMut;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use super::{About, Asked, RowPlace, Source, strip, user_turn};
use crate::datapoint::Question;
use crate::error::{Error, Result};
use crate::example::Kind;
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

/// What the oracle is shown of a row, other than its label: the text, and the values of the keys in questions.
#[derive(Debug)]
pub(crate) struct Shown {
    text: String,
    columns: BTreeMap<String, String>,
}

/// The labels of a source, and what is true of whom.
#[derive(Debug, Default)]
pub(crate) struct Labels {
    known: bool,
    /// Those that can be asked about, sorted.
    all: Vec<Arc<str>>,
    /// By wording, the places in `all` of the labels that have it.
    worded: HashMap<String, Vec<usize>>,
    /// The labels of what rows label differently, by its [`key_of`].
    several: HashMap<u128, Vec<Arc<str>>>,
    relations: BTreeMap<String, Relation>,
}

/// One relation file.
#[derive(Debug, Default)]
struct Relation {
    /// Sorted.
    objects: Vec<String>,
    /// By subject, the places of its objects, sorted.
    right: BTreeMap<String, Vec<usize>>,
}

impl Relation {
    fn new(pairs: &[(String, String, String)]) -> Self {
        let objects: BTreeSet<&String> = pairs.iter().map(|(_, _, object)| object).collect();
        let objects: Vec<String> = objects.into_iter().cloned().collect();
        let mut right: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (_, subject, object) in pairs {
            right.entry(subject.clone()).or_default().extend(objects.binary_search(object));
        }
        right.values_mut().for_each(in_order);
        Self { objects, right }
    }
}

/// Sort places, each once.
fn in_order(places: &mut Vec<usize>) {
    places.sort_unstable();
    places.dedup();
}

/// One of `items`, drawn, but none of those at the places `but`, which are sorted.
fn draw_but<'a, T>(items: &'a [T], but: &[usize], draws: &mut Draws) -> Option<&'a T> {
    let left = items.len() - but.len();
    if left == 0 {
        return None;
    }
    let first = draws.below(left as u64) as usize;
    // There may be as many items as rows, so they are stepped over and not listed.
    Some(&items[but.iter().fold(first, |at, &place| at + usize::from(place <= at))])
}

impl Labels {
    pub(super) fn are_known(&self) -> bool {
        self.known
    }

    /// What a survey found, beside the labels that were given.
    pub(super) fn surveyed(
        self,
        classification: &Classification,
        mut found: BTreeSet<Arc<str>>,
        mut labelled: Vec<(u128, Arc<str>)>,
        mut pairs: Vec<(String, String, String)>,
    ) -> Self {
        labelled.par_sort_unstable();
        labelled.dedup();
        let several = labelled
            .chunk_by(|one, next| one.0 == next.0)
            .filter(|labels| labels.len() > 1)
            .map(|labels| (labels[0].0, labels.iter().map(|(_, label)| Arc::clone(label)).collect()))
            .collect();
        found.extend(self.all);
        let all: Vec<Arc<str>> = found.into_iter().filter(|label| !classification.leaves_out(label)).collect();
        let mut worded: HashMap<String, Vec<usize>> = HashMap::new();
        for (place, label) in all.iter().enumerate() {
            for wording in classification.labels.get(&**label).into_iter().flatten() {
                worded.entry(wording.clone()).or_default().push(place);
            }
        }
        pairs.sort_by(|one, other| one.0.cmp(&other.0));
        let of_one_file = pairs.chunk_by(|one, next| one.0 == next.0);
        let relations = of_one_file.map(|pairs| (pairs[0].0.clone(), Relation::new(pairs))).collect();
        Self { known: true, all, worded, several, relations }
    }
}

/// What a survey needs to know of a row.
pub(super) enum Surveyed {
    /// A label, and the keys of all that has it.
    Label(String, BTreeSet<u128>),
    Pair(String, String),
}

/// The key of a text as a question shows it: with the values of the question's keys. A premise has a label for each of
/// its hypotheses, and only a question that shows the hypothesis can ask for one.
fn key_of(template: &str, shown: &Shown) -> u128 {
    let names: BTreeSet<&str> = keys(template).collect();
    let columns = names.iter().flat_map(|&name| [name, &shown.columns[name]]);
    let mut hasher = Xxh3::new();
    for part in [shown.text.as_str()].into_iter().chain(columns) {
        hasher.update(&part.len().to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.digest128()
}

/// The keys that a template shows, other than the label.
fn keys(template: &str) -> impl Iterator<Item = &str> {
    pieces(template).filter_map(|piece| match piece {
        Piece::Key(key) if key != SLOT_KEY => Some(key),
        _ => None,
    })
}

impl Classification {
    /// Whether rows of some label are left out: one that `labels` gives no wording.
    pub(super) fn leaves_out(&self, label: &str) -> bool {
        self.labels.get(label).is_some_and(Vec::is_empty)
    }

    pub(super) fn leaves_out_any(&self) -> bool {
        self.labels.values().any(Vec::is_empty)
    }

    /// The questions that ask about a label.
    fn asking(&self) -> impl Iterator<Item = &String> {
        self.questions.iter().filter(|question| question.contains(SLOT))
    }

    /// What is known of the labels before the survey: those that were given, and all where no question asks about one.
    pub(super) fn labels_before(&self, words: Option<Vec<String>>) -> Labels {
        let known = words.is_some() && self.asking().next().is_none();
        let all = words.into_iter().flatten().map(Arc::from).collect();
        Labels { known, all, ..Labels::default() }
    }

    /// Refuse labels of which one leaves nothing to ask wrongly.
    ///
    /// # Errors
    /// If a question asks about a label, and no other is worded differently.
    pub(super) fn require_wrong(&self, labels: &Labels) -> Result<()> {
        // The wordings tell most labels apart before any place is listed.
        let most = |own: &Arc<str>| -> usize {
            self.labels.get(&**own).map_or(1, |words| words.iter().map(|word| labels.worded[word].len()).sum())
        };
        let is_alone =
            |own: &&Arc<str>| most(own) >= labels.all.len() && self.not_wrong(&[own], labels).len() == labels.all.len();
        if self.asking().next().is_some()
            && let Some(own) = labels.all.iter().find(is_alone)
        {
            return Err(Error::settings(format!(
                "a question with {SLOT} needs two labels or more that are worded differently, got {own:?} of {:?}; ask \
                 without {SLOT}, word the labels differently, or give a table with other labels too",
                labels.all
            )));
        }
        Ok(())
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
            let about = About::Label(self.shown(place, &row, text.to_owned())?);
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
        let label = self.label_of(place, &row)?;
        if self.leaves_out(&label) {
            return Ok(Surveyed::Label(label, BTreeSet::new()));
        }
        let shown = self.shown(place, &row, self.text_of(place, &row)?)?;
        Ok(Surveyed::Label(label, self.asking().map(|template| key_of(template, &shown)).collect()))
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

    fn shown(&self, place: &RowPlace<'_>, row: &Map<String, Value>, text: String) -> Result<Shown> {
        let mut columns = BTreeMap::new();
        for key in self.questions.iter().flat_map(|question| keys(question)) {
            if !columns.contains_key(key) {
                columns.insert(key.to_owned(), place.text(row, key)?);
            }
        }
        Ok(Shown { text, columns })
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

    /// A question about a text, or none where it is to be asked about a wrong label and all are right.
    pub(super) fn question(
        &self,
        source: &Source,
        text_id: &str,
        id: String,
        at: u32,
        label: &str,
        shown: &Shown,
    ) -> Option<Question> {
        let mut order: Vec<usize> = (0..self.questions.len()).collect();
        Draws::new(source.seed, text_id, "templates").shuffle(&mut order);
        let template = &self.questions[order[at as usize % order.len()]];
        let (question, answer) = if template.contains(SLOT) {
            let mut draws = Draws::new(source.seed, &id, "label");
            let is_right = draws.below(2) == 0;
            let asked = if is_right {
                label
            } else {
                let right = source.labels.several.get(&key_of(template, shown));
                let right = right.map_or(vec![label], |labels| labels.iter().map(|label| &**label).collect());
                &**draw_but(&source.labels.all, &self.not_wrong(&right, &source.labels), &mut draws)?
            };
            let answer = if is_right { "Yes" } else { "No" };
            (filled(template, shown, self.wording(source, &id, asked)), answer)
        } else {
            (filled(template, shown, ""), self.wording(source, &id, label))
        };
        Some(Question {
            source: source.name.clone(),
            text: format!("{}{question}", self.prefix),
            answer: answer.to_owned(),
            layers: None,
            target: Kind::Base,
            meta: Map::from_iter([("label".to_owned(), json!(label))]),
            id,
        })
    }

    /// The places of the labels that are not wrong of what has the labels `right`: these, and those worded like one of them.
    fn not_wrong(&self, right: &[&str], labels: &Labels) -> Vec<usize> {
        let mut places = Vec::new();
        for &own in right {
            match self.labels.get(own) {
                Some(words) => places.extend(words.iter().filter_map(|word| labels.worded.get(word)).flatten()),
                None => places.extend(labels.all.binary_search_by(|label| (**label).cmp(own))),
            }
        }
        in_order(&mut places);
        places
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
fn filled(template: &str, shown: &Shown, label: &str) -> String {
    pieces(template)
        .map(|piece| match piece {
            Piece::Text(text) => text,
            Piece::Key(SLOT_KEY) => label,
            Piece::Key(key) => shown.columns.get(key).map_or("", String::as_str),
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
    let right = relation.right.get(&subject).map_or(&[][..], Vec::as_slice);
    let other = draw_but(&relation.objects, right, &mut Draws::new(seed, id, "wrong_object")).ok_or_else(|| {
        place.error("bad_field", format!("no other object than {object:?} to make a false statement of"))
    })?;
    Ok([&object, other].map(|object| format!("{} {object}.", strip(&filled))))
}
